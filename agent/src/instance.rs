//! The domain: what an instance is asked to be, what a caller may call it by, and where it stands.
//!
//! Owns validation, intent and the state machine. Must not do I/O or read a clock.

pub mod batch;
mod credentials;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
pub mod health;
mod image;
pub mod intent;
pub mod network;
pub mod reference;
pub mod secrets;
pub mod session;
mod shown;
pub mod spec;
pub mod state;
pub mod template;
pub mod update;
pub mod validate;

pub use batch::{Batch, BatchId};
pub use credentials::RegistryCredentials;
pub use health::HealthCheck;
pub use intent::{Departure, DeploymentId, Failure, FailureKind, Intent};
pub use network::{Destination, Egress, Network};
pub use reference::{Reference, Unresolved};
pub use secrets::{Confidential, Provider, SecretForm, SecretName, SecretSources, SecretValues, fetched_again_after};
pub use session::{SessionId, SessionMode, SessionOf};
pub use spec::{
    Capability, Environment, HostPort, ImageReference, Limits, McpServer, Port, PortProtocol, Process, RestartPolicy,
    Sandbox, Spec, SpecHash, Volume,
};
pub use state::State;
pub use template::Template;
pub use update::{Course, HealthGate, LastUpdate, Update};
pub use validate::{
    GroupPlan, Policy, Present, Refusal, Review, confidential, group_confidential, review, validate, validate_group,
    validate_update,
};
