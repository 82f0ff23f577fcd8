//! Who goes in which wave.

use std::collections::BTreeMap;

use dtma_api::EnvironmentId;
use dtma_release::Version;
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use super::{Course, LeftOut, Line, Rollout, RolloutId, Standing, Status, Target, Terms};

/// An agent that could be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Whose.
    pub environment: EnvironmentId,
    /// What it runs, as far as it has said.
    pub version: Option<String>,
    /// Whether somebody has exempted it.
    pub left_out: Option<LeftOut>,
}

/// An agent's place in the queue: stable for one version, so that whoever tried it first tries it first again; another for the next
/// version, so that it isn't always the same accounts that find the faults.
pub(super) fn place(version: &Version, environment: EnvironmentId) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(version.to_string());
    hasher.update([0]);
    hasher.update(environment.0.as_bytes());
    hasher.finalize().into()
}

/// How many of `count` have been asked once each wave has begun. Each wave has at least one, as long as there is one.
pub(super) fn sizes(waves: &[u8], count: usize) -> Vec<usize> {
    let mut sizes = Vec::with_capacity(waves.len());
    let mut before = 0;
    for percent in waves {
        let share = (count * usize::from(*percent)).div_ceil(100);
        before = share.max(before + 1).min(count);
        sizes.push(before);
    }
    sizes
}

impl Rollout {
    /// A new rollout over `candidates`. Exempted ones come last, so that they don't stand in for those who try the version first.
    pub fn new(id: RolloutId, terms: Terms, candidates: &[Candidate], now: Timestamp) -> Self {
        let (asked, left_out): (Vec<_>, Vec<_>) = candidates.iter().partition(|candidate| candidate.left_out.is_none());
        let mut queue: Vec<&Candidate> = asked;
        queue.sort_by_cached_key(|candidate| place(&terms.version, candidate.environment));
        let sizes = sizes(&terms.waves, queue.len());
        let last = u32::try_from(terms.waves.len()).unwrap_or(u32::MAX);
        let target = |candidate: &Candidate, wave: u32| Target {
            environment: candidate.environment,
            wave,
            from_version: candidate.version.clone(),
            asked: None,
            standing: candidate.left_out.map_or(Standing::Waiting, |why| Standing::LeftOut { why }),
            forgiven: false,
        };
        let mut targets = BTreeMap::new();
        for (position, candidate) in queue.into_iter().enumerate() {
            let wave = (1..).zip(&sizes).find(|(_, size)| position < **size).map_or(last, |(wave, _)| wave);
            targets.insert(candidate.environment, target(candidate, wave));
        }
        targets.extend(left_out.into_iter().map(|candidate| (candidate.environment, target(candidate, last))));
        let message = format!("Started: version {} for {} agents.", terms.version, targets.len());
        let course = Course {
            status: Status::Running,
            wave: 0,
            begun_at: Vec::new(),
            settled_at: None,
            history: vec![Line { at: now, message }],
        };
        Self { id, terms, started_at: now, updated_at: now, course, targets }
    }

    /// The number of its last wave.
    pub(super) fn last_wave(&self) -> u32 {
        u32::try_from(self.terms.waves.len()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wave_has_somebody_and_the_last_has_everybody() {
        assert_eq!(sizes(&[1, 10, 50, 100], 20), [1, 2, 10, 20]);
        assert_eq!(sizes(&[1, 10, 50, 100], 10_000), [100, 1000, 5000, 10_000]);
        assert_eq!(sizes(&[1, 10, 50, 100], 3), [1, 2, 3, 3]);
        assert_eq!(sizes(&[1, 10, 50, 100], 1), [1, 1, 1, 1]);
        assert_eq!(sizes(&[1, 10, 50, 100], 0), [0, 0, 0, 0]);
        assert_eq!(sizes(&[100], 7), [7]);
    }
}
