//! The loop that keeps this host's containers what callers asked for: observe, plan, apply, publish.
//!
//! It alone changes containers. Handlers write intent through [`Instances`] and wait for what the loop publishes. It acts on full state:
//! when intent changes, when the engine reports a change, and on a timer; a wake-up carries no data. A pass can't fail: what went wrong
//! is status.

mod apply;
mod batch;
mod desk;
mod failure;
mod fetch;
mod foresee;
mod handle;
mod inside;
mod journal;
mod observe;
mod plan;
mod prune;
mod publish;
mod recover;
mod residents;
mod run;
mod secrets;
mod status;
mod usage;
mod work;

use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use dtma_api::InstanceName;
use dtma_api::instance::Transport;

pub use handle::{
    Deployment, GroupDeployment, GroupRemoval, Instances, Members, NoUpstream, Rejection, Removal, Settled,
};
pub use inside::NotInside;
pub use prune::Pruned;
pub use run::{Parts, start};
pub use secrets::{FetchedSecrets, NoSecrets, SecretSource, Secrets, SecretsWanted};
pub use status::{EngineStatus, PassReport, Snapshot};

/// Where an instance's MCP endpoint is reached from this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// Whose.
    pub instance: InstanceName,
    /// What it speaks.
    pub transport: Transport,
    /// Its container's address and port.
    pub address: SocketAddr,
    /// Path of its endpoint, beginning with `/`.
    pub path: String,
}

/// Finds out whether an MCP server answers as one.
#[async_trait]
pub trait Prober: Send + Sync + 'static {
    /// One attempt. It ends by itself within a few seconds, whatever the server does.
    ///
    /// # Errors
    /// When the server doesn't answer, or not as an MCP server does.
    async fn probe(&self, upstream: &Upstream) -> Result<(), ProbeFailure>;
}

/// Why an MCP server isn't answering.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct ProbeFailure {
    /// For a person.
    pub reason: String,
}

/// How patient the loop is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Longest time between two looks at the engine.
    pub observe_every: Duration,
    /// Shortest time between two looks because of the engine's events.
    pub observe_pause: Duration,
    /// How long a container that isn't probed has to stay up to count as running.
    pub settle: Duration,
    /// How long an MCP server may take from its start to its first answer.
    pub probe_deadline: Duration,
    /// Time between two probes of a server that isn't answering yet.
    pub probe_pause: Duration,
    /// How long a server is given to end by itself.
    pub stop_grace_seconds: u32,
    /// First wait before something that failed is tried again; doubles up to `retry_max`.
    pub retry_first: Duration,
    /// Longest such wait.
    pub retry_max: Duration,
    /// Time between two samples of what instances use.
    pub sample_every: Duration,
    /// How long an image the agent pulled is kept after its last use.
    pub image_max_age: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            observe_every: Duration::from_secs(30),
            observe_pause: Duration::from_millis(100),
            settle: Duration::from_secs(1),
            probe_deadline: Duration::from_secs(90),
            probe_pause: Duration::from_millis(50),
            stop_grace_seconds: 10,
            retry_first: Duration::from_secs(5),
            retry_max: Duration::from_secs(300),
            sample_every: Duration::from_secs(30),
            image_max_age: Duration::from_secs(7 * 24 * 3600),
        }
    }
}

#[cfg(test)]
mod tests;
