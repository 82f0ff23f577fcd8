//! Where an instance stands.

use dtma_api::instance::{InstallationStatus, InstanceState};
use jiff::Timestamp;

use super::Failure;

/// Where an instance stands. What belongs to a state is in it.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// Accepted, and nothing has been done yet.
    Accepted,
    /// Its image is being fetched.
    Pulling,
    /// Its container is being made.
    Creating,
    /// Its container is being started.
    Starting,
    /// Its process runs; whether it stays up, or answers, is being found out.
    Probing,
    /// It runs.
    Running,
    /// Its process ended and Docker is about to start it again.
    Restarting,
    /// Another version of it is being brought up.
    Updating,
    /// It is being stopped.
    Stopping,
    /// It is stopped.
    Stopped,
    /// It should run and doesn't.
    Failed {
        /// Why.
        failure: Failure,
        /// When it is tried again; never by itself when absent.
        retry_at: Option<Timestamp>,
    },
    /// It is being removed.
    Removing,
}

impl State {
    /// The state as lists show it.
    pub fn shown(&self) -> InstanceState {
        match self {
            Self::Accepted | Self::Pulling => InstanceState::Pulling,
            Self::Creating => InstanceState::Creating,
            Self::Starting | Self::Probing | Self::Restarting => InstanceState::Starting,
            Self::Running => InstanceState::Running,
            Self::Updating => InstanceState::Updating,
            Self::Stopping => InstanceState::Stopping,
            Self::Stopped => InstanceState::Stopped,
            Self::Failed { failure, .. } if failure.lacks_secrets() => InstanceState::NeedsSecrets,
            Self::Failed { .. } => InstanceState::Failed,
            Self::Removing => InstanceState::Removing,
        }
    }

    /// The state in the backend's enum.
    pub fn reported(&self) -> InstallationStatus {
        match self {
            Self::Accepted => InstallationStatus::PendingDeploy,
            Self::Pulling | Self::Creating | Self::Updating => InstallationStatus::Deploying,
            Self::Starting | Self::Probing => InstallationStatus::Starting,
            Self::Running => InstallationStatus::Running,
            Self::Stopping => InstallationStatus::Stopping,
            Self::Stopped => InstallationStatus::Stopped,
            Self::Failed { failure, .. } if failure.lacks_secrets() => InstallationStatus::PendingConfig,
            Self::Restarting | Self::Failed { .. } => InstallationStatus::ErrorRuntime,
            Self::Removing => InstallationStatus::Deleting,
        }
    }
}
