//! What an agent reports about its version, as far as rollouts go by it.

use dtma_api::update::{UpdateOutcome, UpdatePhase, UpdateResult, UpdateState};
use dtma_release::Version;
use jiff::Timestamp;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::{Trouble, TroubleKind};

/// Characters of what an agent says that are kept; a sentence with a few last lines of output has room.
const WORD: usize = 64;
const SENTENCE: usize = 2048;
/// The code of a trial that nobody could judge: the updater ended, or the droplet went down.
const INTERRUPTED: &str = "interrupted";
/// Of the versions that failed on a droplet, the latest ones.
const FAILED_VERSIONS: usize = 32;

/// The part of a heartbeat that the provisioner goes by: what the agent runs, how its updates stand, what it was told last.
///
/// Read by itself: what a newer agent says beside it in words we don't know is no reason not to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The version, in the agent's own words.
    pub dtma_version: String,
    /// How updates stand; none from an agent that has no updater, or one that speaks of it in another way.
    pub update: Option<UpdateState>,
    /// Generation of the settings the agent has; none before the first.
    pub settings_generation: Option<u64>,
}

#[derive(Deserialize)]
struct Head {
    dtma_version: String,
    #[serde(default)]
    update: Option<Value>,
    #[serde(default)]
    settings_generation: Option<Value>,
}

impl<'de> Deserialize<'de> for Report {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Head { dtma_version, update, settings_generation } = Head::deserialize(deserializer)?;
        let update = update.and_then(|update| serde_json::from_value(update).ok());
        let settings_generation = settings_generation.as_ref().and_then(Value::as_u64);
        Ok(Self { settings_generation, ..Self::new(&dtma_version, update) })
    }
}

impl Report {
    /// What an agent says, kept to a reasonable length: one for each of ten thousand agents is in memory.
    pub fn new(dtma_version: &str, mut update: Option<UpdateState>) -> Self {
        if let Some(update) = &mut update {
            let surplus = update.failed_versions.len().saturating_sub(FAILED_VERSIONS);
            update.failed_versions.drain(..surplus);
            let last = update.last.iter_mut();
            let words = last.flat_map(|last| {
                let optional = last.to_version.iter_mut().chain(&mut last.code);
                optional
                    .chain([&mut last.from_version])
                    .map(|text| (text, WORD))
                    .chain(last.reason.iter_mut().map(|text| (text, SENTENCE)))
            });
            let failed = update.failed_versions.iter_mut().flat_map(|failed| {
                [(&mut failed.version, WORD), (&mut failed.code, WORD), (&mut failed.reason, SENTENCE)]
            });
            let versions =
                update.target_version.iter_mut().chain(&mut update.previous_version).map(|text| (text, WORD));
            for (text, most) in words.chain(failed).chain(versions) {
                shorten(text, most);
            }
        }
        let mut dtma_version = dtma_version.to_owned();
        shorten(&mut dtma_version, WORD);
        Self { dtma_version, update, settings_generation: None }
    }

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
                // It runs an older one, and yet there is nothing newer for it: a person went back from this one.
                UpdateOutcome::UpToDate => Some((TroubleKind::RolledBack, "up_to_date")),
                UpdateOutcome::Updated | UpdateOutcome::Unknown => None,
            };
            if let Some((kind, word)) = kind {
                let code = last.code.clone().unwrap_or_else(|| word.to_owned());
                let reason = last.reason.clone().unwrap_or_else(|| match last.outcome {
                    UpdateOutcome::UpToDate => {
                        "this version has been in use there, and somebody went back from it".to_owned()
                    }
                    _ => "the agent gives no reason".to_owned(),
                });
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

impl Trouble {
    /// Whether the same may go well another time: it was no judgement of the version.
    pub(super) fn may_pass(&self) -> bool {
        match self.kind {
            TroubleKind::Failed => true,
            TroubleKind::Reverted => self.code == INTERRUPTED,
            TroubleKind::Refused | TroubleKind::RolledBack | TroubleKind::TimedOut | TroubleKind::Unsupported => false,
        }
    }
}

fn same(text: &str, version: &Version) -> bool {
    text.parse::<Version>().is_ok_and(|parsed| parsed.cmp_precedence(version).is_eq())
}

fn shorten(text: &mut String, most: usize) {
    if let Some((end, _)) = text.char_indices().nth(most) {
        text.truncate(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_beside_it_in_any_words_is_no_reason_not_to_listen() {
        let read = |text: &str| serde_json::from_str::<Report>(text).ok();
        let plain = Report::new("1.2.3", None);
        assert_eq!(read(r#"{"dtma_version": "1.2.3", "tool_statuses": 7, "x": {}}"#), Some(plain.clone()));
        assert_eq!(read(r#"{"dtma_version": "1.2.3", "update": "another way"}"#), Some(plain));
        assert_eq!(read(r#"{"dtma_version": 3}"#), None);
        let spoken = read(r#"{"dtma_version": "1.2.3", "update": {"phase": "meditating"}}"#).unwrap();
        assert_eq!(spoken.update.unwrap().phase, UpdatePhase::Unknown);
    }

    #[test]
    fn nobody_fills_the_memory_with_words() {
        let result = UpdateResult {
            outcome: UpdateOutcome::Failed,
            from_version: "1".repeat(99_999),
            to_version: Some("1".repeat(99_999)),
            code: Some("ä".repeat(99_999)),
            reason: Some("ö".repeat(99_999)),
            at: Timestamp::UNIX_EPOCH,
        };
        let update = UpdateState { last: Some(result), ..UpdateState::default() };
        let report = Report::new(&"1".repeat(99_999), Some(update));
        assert!(format!("{report:?}").len() < 6_000);
    }
}
