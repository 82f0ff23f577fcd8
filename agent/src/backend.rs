//! Whoever sent us: the provisioner, or the platform's backend. Enrols once, then sends heartbeats and does what their answers say.

mod client;
mod link;
pub mod pace;
mod secrets;

#[cfg(any(test, fuzzing))]
pub(crate) use client::fuzzed::answer as fuzzed_answer;
pub use client::{BackendClient, BackendError};
pub use link::{Link, LinkState, NoToken, Patience, Reporting};
pub use secrets::BackendSecrets;
