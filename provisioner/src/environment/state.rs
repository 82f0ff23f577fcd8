//! The states, each owning what is known in it.

use dtma_api::TokenHash;
use dtma_api::environment::{EnvironmentError, EnvironmentStatus};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Attempt, Cleanup, DropletId, EnrolledAgent, Progress, RunningDroplet};

/// Where an environment stands, and what is known there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum State {
    /// A droplet is wanted; nothing has been asked of the cloud in this try.
    PendingProvision {
        /// Tries made in this run.
        tries: u32,
        /// When this run began.
        since: Timestamp,
        /// No sooner than this.
        not_before: Option<Timestamp>,
        /// Why the try before failed.
        last_error: Option<EnvironmentError>,
        /// What an earlier try left behind; deleted first.
        leftover: Option<Cleanup>,
    },
    /// The intent is written; the cloud has been asked, or is about to be.
    Provisioning {
        /// The attempt.
        attempt: Attempt,
        /// How far its create is.
        placement: Placement,
        /// What the droplet has told: it may talk before the cloud says that it is up.
        progress: Progress,
    },
    /// The droplet is up, its agent has not reported.
    AwaitingHeartbeat {
        /// The attempt; its deadline counts.
        attempt: Attempt,
        /// The droplet.
        droplet: RunningDroplet,
        /// What it has told.
        progress: Progress,
    },
    /// The agent reports.
    Active {
        /// The attempt that succeeded; its token may still be repeated.
        attempt: Attempt,
        /// The droplet.
        droplet: RunningDroplet,
        /// The agent.
        agent: EnrolledAgent,
        /// When it first reported.
        ready_at: Timestamp,
    },
    /// The agent has stopped reporting.
    Unresponsive {
        /// The attempt that succeeded.
        attempt: Attempt,
        /// The droplet.
        droplet: RunningDroplet,
        /// The agent.
        agent: EnrolledAgent,
        /// When it first reported.
        ready_at: Timestamp,
        /// Since when it is silent, as it is told to callers.
        error: EnvironmentError,
    },
    /// It could not be made, or its droplet was taken away.
    ErrorProvisioning {
        /// Why.
        error: EnvironmentError,
        /// What the failed attempt left behind.
        leftover: Option<Cleanup>,
    },
    /// To be deleted.
    PendingDeprovision {
        /// What is to go.
        cleanup: Cleanup,
    },
    /// The cloud has been asked to delete.
    Deprovisioning {
        /// Since when.
        since: Timestamp,
        /// What is to go.
        cleanup: Cleanup,
        /// How often deleting has failed so far.
        failures: u32,
    },
    /// Gone.
    Deprovisioned {
        /// Since when.
        at: Timestamp,
    },
    /// Deleting failed; it is tried again.
    ErrorDeprovisioning {
        /// Why.
        error: EnvironmentError,
        /// What is to go.
        cleanup: Cleanup,
        /// When to try again.
        retry_at: Timestamp,
        /// How often deleting has failed.
        failures: u32,
    },
}

/// How far the one create of an attempt is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "placement", rename_all = "snake_case")]
pub enum Placement {
    /// The intent is on disk. The request may or may not have been sent.
    Asked,
    /// The answer was lost or said nothing: a droplet may exist. Only looking tells.
    Doubtful {
        /// Since when.
        since: Timestamp,
    },
    /// The cloud has given the droplet an id.
    Placed {
        /// The droplet.
        droplet: DropletId,
        /// The cloud's action that makes it; unknown for an adopted one.
        action: Option<i64>,
    },
}

impl State {
    /// Wanted from `now` on.
    pub fn wanted(now: Timestamp) -> Self {
        Self::PendingProvision { tries: 0, since: now, not_before: None, last_error: None, leftover: None }
    }

    /// Its name.
    pub fn status(&self) -> EnvironmentStatus {
        match self {
            Self::PendingProvision { .. } => EnvironmentStatus::PendingProvision,
            Self::Provisioning { .. } => EnvironmentStatus::Provisioning,
            Self::AwaitingHeartbeat { .. } => EnvironmentStatus::AwaitingHeartbeat,
            Self::Active { .. } => EnvironmentStatus::Active,
            Self::Unresponsive { .. } => EnvironmentStatus::Unresponsive,
            Self::ErrorProvisioning { .. } => EnvironmentStatus::ErrorProvisioning,
            Self::PendingDeprovision { .. } => EnvironmentStatus::PendingDeprovision,
            Self::Deprovisioning { .. } => EnvironmentStatus::Deprovisioning,
            Self::Deprovisioned { .. } => EnvironmentStatus::Deprovisioned,
            Self::ErrorDeprovisioning { .. } => EnvironmentStatus::ErrorDeprovisioning,
        }
    }

    /// Whether the loop has nothing to do here until something happens.
    pub fn settled(&self) -> bool {
        match self {
            Self::Active { .. } | Self::Unresponsive { .. } | Self::Deprovisioned { .. } => true,
            Self::ErrorProvisioning { leftover, .. } => leftover.is_none(),
            Self::PendingProvision { .. }
            | Self::Provisioning { .. }
            | Self::AwaitingHeartbeat { .. }
            | Self::PendingDeprovision { .. }
            | Self::Deprovisioning { .. }
            | Self::ErrorDeprovisioning { .. } => false,
        }
    }

    /// The attempt whose droplet is wanted.
    pub fn attempt(&self) -> Option<&Attempt> {
        match self {
            Self::Provisioning { attempt, .. }
            | Self::AwaitingHeartbeat { attempt, .. }
            | Self::Active { attempt, .. }
            | Self::Unresponsive { attempt, .. } => Some(attempt),
            Self::PendingProvision { .. }
            | Self::ErrorProvisioning { .. }
            | Self::PendingDeprovision { .. }
            | Self::Deprovisioning { .. }
            | Self::Deprovisioned { .. }
            | Self::ErrorDeprovisioning { .. } => None,
        }
    }

    /// The agent that is or will be reporting.
    pub fn agent(&self) -> Option<&EnrolledAgent> {
        match self {
            Self::Provisioning { progress, .. } | Self::AwaitingHeartbeat { progress, .. } => progress.agent.as_ref(),
            Self::Active { agent, .. } | Self::Unresponsive { agent, .. } => Some(agent),
            Self::PendingProvision { .. }
            | Self::ErrorProvisioning { .. }
            | Self::PendingDeprovision { .. }
            | Self::Deprovisioning { .. }
            | Self::Deprovisioned { .. }
            | Self::ErrorDeprovisioning { .. } => None,
        }
    }

    /// Digests of the bearers that may report for it.
    pub fn bearers(&self) -> &[TokenHash] {
        self.agent().map_or(&[], |agent| &agent.bearers)
    }

    /// What has to be deleted, in the states that delete something.
    pub fn cleanup(&self) -> Option<&Cleanup> {
        match self {
            Self::PendingProvision { leftover, .. } | Self::ErrorProvisioning { leftover, .. } => leftover.as_ref(),
            Self::PendingDeprovision { cleanup }
            | Self::Deprovisioning { cleanup, .. }
            | Self::ErrorDeprovisioning { cleanup, .. } => Some(cleanup),
            Self::Provisioning { .. }
            | Self::AwaitingHeartbeat { .. }
            | Self::Active { .. }
            | Self::Unresponsive { .. }
            | Self::Deprovisioned { .. } => None,
        }
    }

    /// The same, to be written to.
    pub fn cleanup_mut(&mut self) -> Option<&mut Cleanup> {
        match self {
            Self::PendingProvision { leftover, .. } | Self::ErrorProvisioning { leftover, .. } => leftover.as_mut(),
            Self::PendingDeprovision { cleanup }
            | Self::Deprovisioning { cleanup, .. }
            | Self::ErrorDeprovisioning { cleanup, .. } => Some(cleanup),
            Self::Provisioning { .. }
            | Self::AwaitingHeartbeat { .. }
            | Self::Active { .. }
            | Self::Unresponsive { .. }
            | Self::Deprovisioned { .. } => None,
        }
    }

    /// The droplet, wanted or to be deleted, where its id is known.
    pub fn droplet(&self) -> Option<DropletId> {
        match self {
            Self::Provisioning { placement: Placement::Placed { droplet, .. }, .. } => Some(*droplet),
            Self::AwaitingHeartbeat { droplet, .. }
            | Self::Active { droplet, .. }
            | Self::Unresponsive { droplet, .. } => Some(droplet.id),
            Self::Provisioning { placement: Placement::Asked | Placement::Doubtful { .. }, .. }
            | Self::PendingProvision { .. }
            | Self::ErrorProvisioning { .. }
            | Self::PendingDeprovision { .. }
            | Self::Deprovisioning { .. }
            | Self::Deprovisioned { .. }
            | Self::ErrorDeprovisioning { .. } => self.cleanup().and_then(|cleanup| cleanup.droplet),
        }
    }
}
