//! The loop that keeps this host's containers what callers asked for: observe, plan, apply, publish.
//!
//! It alone changes containers. Handlers write intent through [`Instances`] and wait for what the loop publishes. It acts on full state:
//! when intent changes, when the engine reports a change, and on a timer; a wake-up carries no data. A pass can't fail: what went wrong
//! is status.

mod apply;
mod batch;
mod calls;
mod desk;
mod failure;
mod fetch;
mod foresee;
mod handle;
mod health;
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
mod sessions;
mod status;
mod usage;
mod work;

use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use dtma_api::InstanceName;
use dtma_api::health::Introduction;
use dtma_api::instance::Transport;

use crate::engine::ContainerId;
use crate::instance::SessionMode;

pub use calls::Call;
pub use handle::{
    Deployment, GroupDeployment, GroupRemoval, Instances, Members, Missing, NoUpstream, Rejection, Removal, Settled,
};
pub use health::HealthCounts;
pub use inside::NotInside;
pub use prune::Pruned;
pub use run::{Parts, start};
pub use secrets::{FetchedSecrets, NoSecrets, SecretSource, Secrets, SecretsWanted};
pub use sessions::{Place, Sessions};
pub use status::{EngineStatus, PassReport, Snapshot};

/// Where an instance's MCP endpoint is reached from this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// Whose.
    pub instance: InstanceName,
    /// Its container.
    pub container: ContainerId,
    /// What it speaks.
    pub transport: Transport,
    /// Whether its clients share its process.
    pub sessions: SessionMode,
    /// Its container's address and port.
    pub address: SocketAddr,
    /// Path of its endpoint, beginning with `/`.
    pub path: String,
}

/// Finds out whether an MCP server answers as one.
#[async_trait]
pub trait Prober: Send + Sync + 'static {
    /// One attempt. It ends by itself soon after the question's patience, whatever the server does, and leaves nothing behind.
    ///
    /// # Errors
    /// When the server doesn't answer, or not as an MCP server does.
    async fn probe(&self, upstream: &Upstream, question: Question) -> Result<Answer, ProbeFailure>;
}

/// What a server is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// How long it may take, from connecting to the answer.
    pub patience: Duration,
    /// Its tools are of interest, too. That it doesn't name them is no failure.
    pub tools: bool,
}

/// How a server answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// As an MCP server.
    Introduced(Box<Introduction>),
    /// It can't be asked without disturbing those it serves: it counts by staying up.
    CannotSay,
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
    /// Time between two probes of a server that isn't answering yet.
    pub probe_pause: Duration,
    /// How long a server is given to end by itself.
    pub stop_grace_seconds: u32,
    /// First wait before something that failed is tried again; doubles up to `retry_max`.
    pub retry_first: Duration,
    /// Longest such wait.
    pub retry_max: Duration,
    /// First wait before a server that hangs is restarted; doubles with every restart in a row up to `hung_max`.
    pub hung_first: Duration,
    /// Longest such wait.
    pub hung_max: Duration,
    /// How often in a row it is restarted before the agent gives up.
    pub hung_restarts: u32,
    /// How long it has to be healthy for its restarts to be forgotten.
    pub stable_after: Duration,
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
            probe_pause: Duration::from_millis(50),
            stop_grace_seconds: 10,
            retry_first: Duration::from_secs(5),
            retry_max: Duration::from_secs(300),
            hung_first: Duration::from_secs(5),
            hung_max: Duration::from_secs(60),
            hung_restarts: 5,
            stable_after: Duration::from_secs(600),
            sample_every: Duration::from_secs(30),
            image_max_age: Duration::from_secs(7 * 24 * 3600),
        }
    }
}

#[cfg(test)]
mod tests;
