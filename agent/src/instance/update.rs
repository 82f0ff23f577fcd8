//! Changing what an instance is while the way back stays open: the version being tried, and what became of the last one.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{DeploymentId, Failure, Intent, Spec, SpecHash};

/// A new version of an instance that has been accepted and hasn't shown yet that it works. The present one is kept until it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// What the instance is to be.
    pub spec: Spec,
    /// Hash of `spec` when it was accepted.
    pub spec_hash: SpecHash,
    /// Which accepted request this is.
    pub deployment: DeploymentId,
    /// What the new version has to show.
    pub gate: HealthGate,
    /// What was wanted of the instance before, and is again if the new version fails.
    pub before: Intent,
    /// Where it goes.
    pub course: Course,
}

/// Where an update goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Course {
    /// The new version is being brought up.
    Forth,
    /// It failed; all it made is being taken back, and the old version serves again.
    Back(Failure),
}

/// What a new version has to show before the old one goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthGate {
    /// Seconds from its start until it has shown it.
    pub timeout_seconds: u32,
    /// How often in a row it has to be found well.
    pub successes: u32,
}

impl HealthGate {
    /// Longest time a new version may take: as long as a caller can wait.
    pub const MAX_TIMEOUT_SECONDS: u32 = 600;
    /// Most successes that may be asked for.
    pub const MAX_SUCCESSES: u32 = 100;
}

impl Default for HealthGate {
    fn default() -> Self {
        Self { timeout_seconds: 90, successes: 1 }
    }
}

/// How the last update ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastUpdate {
    /// Which it was.
    pub deployment: DeploymentId,
    /// When it ended.
    pub at: Timestamp,
    /// Why the new version was taken back; none when it was kept.
    pub failure: Option<Failure>,
}
