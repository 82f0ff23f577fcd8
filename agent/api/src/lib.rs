//! The wire between the agent, the provisioner and whoever calls them.
//!
//! Owns the JSON shapes of both services, the identifiers and credentials that travel in them, and nothing else: no I/O, no
//! policy. Both sides depend on this crate and never on each other. Requests keep the callers' camelCase, answers are
//! snake_case. Readers ignore fields they don't know, so that either side may be the older one.

pub mod bootstrap;
mod deploy_schema;
pub mod enrolment;
pub mod environment;
pub mod exec;
pub mod failure;
pub mod group;
pub mod health;
pub mod heartbeat;
pub mod host;
pub mod id;
pub mod instance;
pub mod output;
pub mod pin;
pub mod secrets;
pub mod status;
pub mod template;
pub mod token;
pub mod update;
pub mod usage;
pub mod validation;

pub use failure::Failure;
pub use id::{AccountToolInstanceId, AgentId, EnvironmentId, GroupId, InstanceName, InvalidId};
pub use pin::CertificatePin;
pub use token::{Token, TokenHash};

/// Header naming one request across both services and their logs; the caller's value is kept when it sent one.
pub const REQUEST_ID_HEADER: &str = "x-request-id";

/// Port the agent listens on unless told otherwise.
pub const AGENT_PORT: u16 = 30_000;
