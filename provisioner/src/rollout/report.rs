//! What an agent reports about its version, as far as rollouts go by it.

use dtma_api::heartbeat::Heartbeat;
use dtma_api::update::{UpdateOutcome, UpdatePhase, UpdateResult, UpdateState};
use dtma_release::Version;
use jiff::Timestamp;
use serde::Deserialize;

use super::{Trouble, TroubleKind};

/// The part of a heartbeat that says what the agent runs and how its updates stand.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Report {
    /// The version, in the agent's own words.
    pub dtma_version: String,
    /// How updates stand; none from an agent that has no updater.
    #[serde(default)]
    pub update: Option<UpdateState>,
}

impl From<Heartbeat> for Report {
    fn from(heartbeat: Heartbeat) -> Self {
        Self { dtma_version: heartbeat.dtma_version, update: heartbeat.update }
    }
}

impl Report {
    /// The version, if it is one.
    pub fn version(&self) -> Option<Version> {
        self.dtma_version.parse().ok()
    }

    /// When the last update ended, by the agent's clock.
    pub(super) fn last_result(&self) -> Option<Timestamp> {
        self.last().map(|last| last.at)
    }

    fn last(&self) -> Option<&UpdateResult> {
        self.update.as_ref().and_then(|update| update.last.as_ref())
    }

    /// Whether an agent that runs `version` has done with trying it.
    pub(super) fn has_proved(&self, version: &Version) -> bool {
        let Some(update) = &self.update else { return true };
        let about_it = update.target_version.as_deref().is_none_or(|target| same(target, version));
        match update.phase {
            UpdatePhase::Idle => true,
            UpdatePhase::Trial | UpdatePhase::Reverting => !about_it,
            // It was asked once more, or for another one: it runs this one.
            UpdatePhase::Requested | UpdatePhase::Checking | UpdatePhase::Downloading | UpdatePhase::Installing => true,
            // A word we don't know: only the result tells.
            UpdatePhase::Unknown => self.last().is_some_and(|last| {
                last.outcome == UpdateOutcome::Updated && last.to_version.as_deref().is_some_and(|to| same(to, version))
            }),
        }
    }

    /// Nothing is being done.
    pub(super) fn is_idle(&self) -> bool {
        self.update.as_ref().is_none_or(|update| update.phase == UpdatePhase::Idle)
    }

    /// Why an agent that runs an older one doesn't run `version`. What it already said before it was asked, at `known`, is no answer.
    pub(super) fn trouble(&self, version: &Version, known: Option<Timestamp>, now: Timestamp) -> Option<Trouble> {
        let update = self.update.as_ref()?;
        // Without a version it is about the manifest it was asked to read, which was this one's.
        let about_it = |last: &&UpdateResult| {
            last.to_version.as_deref().is_none_or(|to| same(to, version))
                || (last.outcome == UpdateOutcome::RolledBack && same(&last.from_version, version))
        };
        if let Some(last) = self.last().filter(|last| Some(last.at) != known).filter(about_it) {
            let kind = match last.outcome {
                UpdateOutcome::Reverted => Some((TroubleKind::Reverted, "reverted")),
                UpdateOutcome::Refused => Some((TroubleKind::Refused, "refused")),
                UpdateOutcome::Failed => Some((TroubleKind::Failed, "failed")),
                UpdateOutcome::RolledBack => Some((TroubleKind::RolledBack, "rolled_back")),
                UpdateOutcome::Updated | UpdateOutcome::UpToDate | UpdateOutcome::Unknown => None,
            };
            if let Some((kind, word)) = kind {
                let code = last.code.clone().unwrap_or_else(|| word.to_owned());
                let reason = last.reason.clone().unwrap_or_else(|| "the agent gives no reason".to_owned());
                return Some(Trouble { kind, code, reason, at: now });
            }
        }
        if !self.is_idle() {
            return None;
        }
        // It failed here before, whoever asked for it then; agents don't try such a version again by themselves.
        let failed = update.failed_versions.iter().find(|failed| same(&failed.version, version))?;
        Some(Trouble { kind: TroubleKind::Reverted, code: failed.code.clone(), reason: failed.reason.clone(), at: now })
    }
}

fn same(text: &str, version: &Version) -> bool {
    text.parse::<Version>().is_ok_and(|parsed| parsed.cmp_precedence(version).is_eq())
}
