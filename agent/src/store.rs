//! What survives a restart: the state directory and the files in it.

pub mod durable;
pub mod identity;
pub mod ledger;
mod state_dir;
pub mod vault;

pub use state_dir::{StateDir, StateDirError};
