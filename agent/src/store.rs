//! What survives a restart: the state directory and the files in it, and, in memory and until a reboot only, the vault of secrets.

pub mod durable;
pub mod identity;
pub mod ledger;
mod state_dir;
pub mod vault;

pub use state_dir::{StateDir, StateDirError};
