//! What the updater remembers over all restarts, and what it tells everybody: `state.json`.

use std::collections::BTreeMap;
use std::io;

use dtma_api::update::{FailedVersion, UpdateOutcome, UpdatePhase, UpdateResult, UpdateState};
use dtma_release::{Accepted, Digest, Version};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::places::Places;
use crate::store::durable;

/// More failed versions than these aren't remembered; the oldest go first.
const MAX_FAILED: usize = 50;

/// The whole of it. Every field may be missing, because another version may have written it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Memory {
    /// What makes the past recognisable. None on a droplet that has never been updated.
    #[serde(default)]
    pub accepted: Option<Accepted>,
    /// The trial under way, or one that nobody has finished.
    #[serde(default)]
    pub trial: Option<Trial>,
    /// How often a version was put on trial without a verdict, by its archive's digest.
    #[serde(default)]
    pub unjudged: BTreeMap<String, u32>,
    /// What is shown: phase, last result, versions that failed.
    #[serde(default)]
    pub shown: UpdateState,
    /// Digests of the archives that failed, beside `shown.failed_versions`.
    #[serde(default)]
    pub failed_digests: Vec<String>,
}

/// A version in use that hasn't proved itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Trial {
    /// The one on trial.
    pub version: Version,
    /// The one that comes back.
    pub from: Version,
    /// Its archive; none where it was on the disk already.
    pub sha256: Option<Digest>,
    /// A person goes back to it: when it passes, the one before it is not to come again by itself.
    #[serde(default)]
    pub rollback: bool,
}

impl Memory {
    /// Reads it. What can't be read is put aside and begun anew, loudly: a droplet that can't be updated any more would be worse. Then
    /// the version in use is the highest known.
    pub(super) fn load(places: &Places, running: &Version) -> io::Result<Self> {
        let path = places.memory_file();
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error),
        };
        serde_json::from_slice(&bytes).or_else(|error| {
            tracing::error!(%error, path = %path.display(), "THE UPDATER'S MEMORY CAN'T BE READ; it is put aside as state.json.unreadable");
            std::fs::rename(&path, path.with_extension("json.unreadable"))?;
            let accepted = Accepted { highest_version: running.clone(), issued_at: None };
            Ok(Self { accepted: Some(accepted), ..Self::default() })
        })
    }

    /// Writes it; on return it is on the disk.
    pub(super) fn save(&self, places: &Places) -> io::Result<()> {
        places.write()?;
        let bytes = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        durable::replace_with_mode(&places.memory_file(), &bytes, 0o644)
    }

    /// How the trial ended that is being undone, where that was begun.
    pub(super) fn verdict_being_carried_out(&self) -> Option<UpdateResult> {
        self.shown
            .last
            .clone()
            .filter(|last| self.shown.phase == UpdatePhase::Reverting && last.outcome == UpdateOutcome::Reverted)
    }

    /// Says what is being done, since now.
    pub(super) fn enter(&mut self, phase: UpdatePhase, target: Option<&Version>, now: Timestamp) {
        self.shown.phase = phase;
        self.shown.target_version = target.map(ToString::to_string);
        self.shown.since = Some(now);
    }

    /// Says how it ended.
    pub(super) fn ended(&mut self, result: UpdateResult) {
        self.shown.phase = UpdatePhase::Idle;
        self.shown.target_version = None;
        self.shown.since = Some(result.at);
        self.shown.last = Some(result);
    }

    /// Remembers that a version has failed and isn't to come again by itself.
    pub(super) fn blame(&mut self, version: &Version, digest: Option<Digest>, code: &str, reason: &str, at: Timestamp) {
        let failed = &mut self.shown.failed_versions;
        failed.retain(|other| other.version != version.to_string());
        failed.push(FailedVersion {
            version: version.to_string(),
            code: code.to_owned(),
            reason: reason.to_owned(),
            at,
        });
        if failed.len() > MAX_FAILED {
            failed.remove(0);
        }
        if let Some(digest) = digest {
            self.failed_digests.retain(|other| *other != digest.to_string());
            self.failed_digests.push(digest.to_string());
            if self.failed_digests.len() > MAX_FAILED {
                self.failed_digests.remove(0);
            }
            self.unjudged.remove(&digest.to_string());
        }
    }

    /// Forgets that a version has failed: a person wants it tried again.
    pub(super) fn forgive(&mut self, version: &Version, digest: Digest) {
        self.shown.failed_versions.retain(|failed| failed.version != version.to_string());
        self.failed_digests.retain(|failed| *failed != digest.to_string());
        self.unjudged.remove(&digest.to_string());
    }

    /// Why a version isn't tried again; none when it may be.
    pub(super) fn failure_of(&self, version: &Version, digest: Digest) -> Option<String> {
        let by_version = self.shown.failed_versions.iter().find(|failed| failed.version == version.to_string());
        match by_version {
            Some(failed) => Some(format!("{} at {}: {}", failed.code, failed.at, failed.reason)),
            // The same bytes under another name.
            None if self.failed_digests.contains(&digest.to_string()) => {
                Some("these very bytes have failed here".to_owned())
            }
            None => None,
        }
    }

    /// A version has proved itself.
    pub(super) fn proved(&mut self, version: &Version) {
        match &mut self.accepted {
            Some(accepted) if accepted.highest_version >= *version => {}
            Some(accepted) => accepted.highest_version = version.clone(),
            None => self.accepted = Some(Accepted { highest_version: version.clone(), issued_at: None }),
        }
    }

    /// A manifest has been taken: nothing issued earlier will be.
    pub(super) fn taken(&mut self, issued_at: Timestamp, running: &Version) {
        let accepted =
            self.accepted.get_or_insert_with(|| Accepted { highest_version: running.clone(), issued_at: None });
        accepted.issued_at = Some(accepted.issued_at.map_or(issued_at, |before| before.max(issued_at)));
    }
}

/// How an update ended, put together.
pub(super) fn result(
    outcome: UpdateOutcome,
    from: &Version,
    to: Option<&Version>,
    why: Option<(&str, &str)>,
    at: Timestamp,
) -> UpdateResult {
    UpdateResult {
        outcome,
        from_version: from.to_string(),
        to_version: to.map(ToString::to_string),
        code: why.map(|(code, _)| code.to_owned()),
        reason: why.map(|(_, reason)| reason.to_owned()),
        at,
    }
}
