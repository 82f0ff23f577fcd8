//! How updates of the agent itself stand: in heartbeats, and as the answer of `GET /update`.
//!
//! Versions are strings here: either side may be older, and what it can't read it repeats.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the agent and its updater stand.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UpdateState {
    /// What is being done now.
    pub phase: UpdatePhase,
    /// The version that is being tried, or was asked for and isn't looked at yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_version: Option<String>,
    /// When `phase` began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// The version `update --rollback` would go back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous_version: Option<String>,
    /// How the last update ended; none before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<UpdateResult>,
    /// Versions that have failed on this droplet, and aren't tried again by themselves.
    #[serde(default)]
    pub failed_versions: Vec<FailedVersion>,
}

/// What the updater does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UpdatePhase {
    /// Nothing.
    #[default]
    Idle,
    /// It has been asked and hasn't begun.
    Requested,
    /// It reads the release's manifest.
    Checking,
    /// It fetches the release's archive.
    Downloading,
    /// It checks and unpacks the archive.
    Installing,
    /// The new version is in use and has to prove itself; the old one comes back by itself if it doesn't.
    Trial,
    /// It puts the old version back.
    Reverting,
    /// A word of a newer version.
    #[serde(other)]
    Unknown,
}

/// How an update ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UpdateResult {
    /// How.
    pub outcome: UpdateOutcome,
    /// The version before.
    pub from_version: String,
    /// The version it was about; none when no manifest could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_version: Option<String>,
    /// Why it didn't become the version in use: a stable word, such as `wrong_key`, `expired`, `crashed`, `no_heartbeat`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// The same as a sentence, with the new version's last words where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When it ended.
    pub at: Timestamp,
}

/// How an update ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UpdateOutcome {
    /// The new version has proved itself and is in use.
    Updated,
    /// There was nothing newer.
    UpToDate,
    /// The release was refused before anything changed: its manifest, archive or program is not what it must be.
    Refused,
    /// Something else kept it from being tried: no network, a full disk. It is tried again when asked again.
    Failed,
    /// It was tried, didn't prove itself, and the version before is in use again.
    Reverted,
    /// A person went back to the version before.
    RolledBack,
    /// A word of a newer version.
    #[serde(other)]
    Unknown,
}

/// A version that isn't tried again by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FailedVersion {
    /// Which.
    pub version: String,
    /// Why, as in [`UpdateResult::code`].
    pub code: String,
    /// Why, as a sentence.
    pub reason: String,
    /// When.
    pub at: Timestamp,
}

/// Answer of `GET /update`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UpdateAnswer {
    /// Always `true`.
    pub success: bool,
    /// The version that answers.
    pub version: String,
    /// `x86_64-linux-gnu`: which builds it takes.
    pub target: String,
    /// How updates stand.
    #[serde(flatten)]
    pub update: UpdateState,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn words_of_a_newer_version_are_read_as_unknown() {
        let state: UpdateState = serde_json::from_value(json!({
            "phase": "meditating",
            "last": { "outcome": "postponed", "from_version": "1.0.0", "at": "2026-01-01T00:00:00Z", "mood": "good" },
            "failed_versions": [],
            "plans": {},
        }))
        .unwrap();
        assert_eq!(state.phase, UpdatePhase::Unknown);
        assert_eq!(state.last.unwrap().outcome, UpdateOutcome::Unknown);
    }

    #[test]
    fn least_that_may_be_said_is_understood() {
        let state: UpdateState = serde_json::from_value(json!({ "phase": "idle" })).unwrap();
        assert_eq!(state, UpdateState::default());
    }
}
