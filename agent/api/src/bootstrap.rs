//! What a droplet tells the provisioner while it is being set up: `POST {PUBLIC_URL}/agent/v1/bootstrap-progress`.

use serde::{Deserialize, Serialize};

/// One report, sent with the enrolment token as bearer (which it does not use up). Answered with 204.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootstrapProgress {
    /// The phase begun or failed: `network`, `docker`, `download`, `install`, `start`, `enrol`. Others may come.
    pub phase: String,
    /// Whether the phase has begun or has failed.
    pub outcome: BootstrapOutcome,
    /// The last lines of the phase's output, at most 4 KiB; only for failures.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub output: String,
}

/// How far a phase is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootstrapOutcome {
    /// The phase has begun, so the one before it is done.
    Begun,
    /// The phase has failed and set-up has ended.
    Failed,
}
