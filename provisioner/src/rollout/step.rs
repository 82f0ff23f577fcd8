//! The next step of a rollout: what has changed about its agents, and whether it goes on, stops, or is done.

use std::collections::{BTreeMap, HashMap};

use dtma_api::EnvironmentId;
use jiff::Timestamp;

use super::judge::Circumstances;
use super::waves::{place, sizes};
use super::{Course, LeftOut, Line, Rollout, Seen, Standing, Status, Target, TroubleKind, elapsed};

/// Lines of history kept.
const HISTORY: usize = 200;

/// What is to be written down.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// How far the rollout then is.
    pub course: Course,
    /// The agents that stand otherwise than before.
    pub targets: Vec<Target>,
}

/// The agents as they stand after what has changed.
struct After<'a> {
    before: &'a BTreeMap<EnvironmentId, Target>,
    changed: BTreeMap<EnvironmentId, Target>,
}

impl After<'_> {
    fn all(&self) -> impl Iterator<Item = &Target> {
        let kept = self.before.values().filter(|target| !self.changed.contains_key(&target.environment));
        kept.chain(self.changed.values())
    }
}

impl Course {
    pub(super) fn tell(&mut self, now: Timestamp, message: impl Into<String>) {
        if self.history.len() < HISTORY {
            self.history.push(Line { at: now, message: message.into() });
        }
    }
}

impl Rollout {
    /// What is to be done, given what is known of all agents and which are exempted; nothing when all is as it was.
    pub fn step(
        &self,
        seen: &HashMap<EnvironmentId, Seen>,
        left_out: &HashMap<EnvironmentId, LeftOut>,
        now: Timestamp,
    ) -> Option<Step> {
        if !self.course.status.is_open() {
            return None;
        }
        let running = self.course.status == Status::Running;
        let around = Circumstances { terms: &self.terms, running, now };
        let mut after = After { before: &self.targets, changed: BTreeMap::new() };
        for target in self.targets.values() {
            let id = target.environment;
            let judged = target.judged(seen.get(&id), left_out.get(&id).copied(), &around);
            if judged != *target {
                after.changed.insert(id, judged);
            }
        }
        let mut course = self.course.clone();
        if running {
            self.welcome(seen, &mut after);
            self.go_on(&mut course, &mut after, seen, now);
        }
        let step = Step { course, targets: after.changed.into_values().collect() };
        (step.course != self.course || !step.targets.is_empty()).then_some(step)
    }

    /// This rollout after a step.
    pub fn apply(&mut self, step: Step, now: Timestamp) {
        self.course = step.course;
        self.targets.extend(step.targets.into_iter().map(|target| (target.environment, target)));
        self.updated_at = now;
    }

    /// Environments that have become active meanwhile come last. Once the last wave has begun the rollout doesn't wait for more: they
    /// are told when it is complete.
    fn welcome(&self, seen: &HashMap<EnvironmentId, Seen>, after: &mut After<'_>) {
        let last = self.last_wave();
        if self.course.wave >= last {
            return;
        }
        for (id, seen) in seen.iter().filter(|(id, seen)| seen.reporting && !self.targets.contains_key(id)) {
            let from_version = seen.report.as_ref().map(|report| report.dtma_version.clone());
            let target = Target {
                environment: *id,
                wave: last,
                from_version,
                asked: None,
                standing: Standing::Waiting,
                forgiven: false,
            };
            after.changed.insert(*id, target);
        }
    }

    fn go_on(&self, course: &mut Course, after: &mut After<'_>, seen: &HashMap<EnvironmentId, Seen>, now: Timestamp) {
        let against: Vec<&Target> = after.all().filter(|target| target.counts_against()).collect();
        if against.len() > usize::try_from(self.terms.max_failures).unwrap_or(usize::MAX) {
            let reason = self.why(&against, after);
            course.settled_at = None;
            course.tell(now, format!("Halted: {reason}"));
            course.status = Status::Halted { at: now, reason };
            return;
        }
        // Exempted or without an agent when its wave began, and now neither.
        let missed = |target: &&Target| target.wave <= course.wave && target.standing == Standing::Waiting;
        let late = asked(after.all().filter(missed), seen, now);
        after.changed.extend(late);
        let begun = |target: &&Target| target.wave <= course.wave;
        if !after.all().filter(begun).all(Target::has_settled) {
            course.settled_at = None;
            return;
        }
        let Some(settled_at) = course.settled_at.or((course.wave == 0).then_some(now)) else {
            course.settled_at = Some(now);
            return;
        };
        // Where nobody had to be asked there is nothing to wait for.
        if after.all().any(|target| target.wave == course.wave && target.asked.is_some()) {
            if !after.all().any(|target| target.wave == course.wave && target.vouches()) {
                let more = self.stand_in(course.wave, after);
                if !more.is_empty() {
                    let agents = if more.len() == 1 {
                        "1 more agent is".to_owned()
                    } else {
                        format!("{} more agents are", more.len())
                    };
                    course.tell(now, format!("Nobody of wave {} runs it so far: {agents} asked.", course.wave));
                    course.settled_at = None;
                    after.changed.extend(asked(more.iter(), seen, now));
                    return;
                }
                // All have been asked, and those who weren't reached may still be heard.
                let unreached = after.all().any(|target| target.standing == Standing::Unreached);
                if unreached && !after.all().any(Target::vouches) {
                    return;
                }
            }
            let updated =
                after.all().filter(begun).filter(|target| matches!(target.standing, Standing::Updated { .. }));
            let all_heard = updated.filter(|target| target.asked.is_some()).all(|target| {
                seen.get(&target.environment).and_then(|seen| seen.reported_at).is_some_and(|at| at > settled_at)
            });
            if elapsed(settled_at, now) < self.terms.soak() || !all_heard {
                return;
            }
        }
        if course.wave < self.last_wave() {
            self.begin(course, after, seen, now);
        } else {
            let updated = after.all().filter(|target| matches!(target.standing, Standing::Updated { .. })).count();
            let all = after.all().count();
            course.tell(now, format!("Completed: {updated} of {all} agents run {}.", self.terms.version));
            course.status = Status::Completed { at: now };
        }
    }

    /// Where nobody of a wave has come to run the version, nothing is known of it that wasn't before, so the next and larger wave doesn't
    /// begin. As many as this one was to have are taken out of those that come next, and are in this one.
    fn stand_in(&self, wave: u32, after: &After<'_>) -> Vec<Target> {
        let all = after.all().filter(|target| !matches!(target.standing, Standing::LeftOut { .. })).count();
        let sizes = sizes(&self.terms.waves, all);
        let until = |wave: u32| {
            let index = usize::try_from(wave).ok().and_then(|wave| wave.checked_sub(1));
            index.and_then(|index| sizes.get(index)).copied().unwrap_or_default()
        };
        let size = until(wave).saturating_sub(until(wave.saturating_sub(1))).max(1);
        let mut next: Vec<&Target> = after.all().filter(|target| target.standing == Standing::Waiting).collect();
        next.sort_by_cached_key(|target| (target.wave, place(&self.terms.version, target.environment)));
        next.into_iter().take(size).map(|target| Target { wave, ..target.clone() }).collect()
    }

    fn begin(&self, course: &mut Course, after: &mut After<'_>, seen: &HashMap<EnvironmentId, Seen>, now: Timestamp) {
        course.wave += 1;
        course.begun_at.push(now);
        course.settled_at = None;
        let waiting = |target: &&Target| target.wave == course.wave && target.standing == Standing::Waiting;
        let asked: Vec<Target> =
            after.all().filter(waiting).map(|target| target.ask(seen.get(&target.environment), now)).collect();
        let (wave, waves, count) = (course.wave, self.last_wave(), asked.len());
        let agents = if count == 1 { "1 agent is".to_owned() } else { format!("{count} agents are") };
        course.tell(now, format!("Wave {wave} of {waves} has begun: {agents} asked."));
        after.changed.extend(asked.into_iter().map(|target| (target.environment, target)));
    }

    /// Why it halts, in one sentence that names numbers, waves, and one agent's own reason.
    fn why(&self, against: &[&Target], after: &After<'_>) -> String {
        let what = |target: &Target| match &target.standing {
            Standing::Failed { trouble } => match trouble.kind {
                TroubleKind::Reverted => "reverted",
                TroubleKind::Refused => "refused the release",
                TroubleKind::Failed => "could not try it",
                TroubleKind::RolledBack => "were rolled back by hand",
                TroubleKind::TimedOut => "came to no end",
                TroubleKind::Unsupported => "have no updater",
            },
            _ => "fell silent",
        };
        let mut by_what: BTreeMap<&str, usize> = BTreeMap::new();
        for target in against {
            *by_what.entry(what(target)).or_default() += 1;
        }
        let wave = against.iter().map(|target| target.wave).max().unwrap_or_default();
        let least = against.iter().map(|target| target.wave).min().unwrap_or_default();
        let waves = if least == wave { format!("wave {wave}") } else { format!("waves {least} to {wave}") };
        let asked =
            after.all().filter(|target| (least..=wave).contains(&target.wave) && target.asked.is_some()).count();
        let mut reason = match by_what.iter().next() {
            Some((what, count)) if by_what.len() == 1 => format!("{count} of {asked} agents of {waves} {what}"),
            _ => {
                let parts: Vec<String> = by_what.iter().map(|(what, count)| format!("{count} {what}")).collect();
                format!("{} of {asked} agents of {waves} failed ({})", against.len(), parts.join(", "))
            }
        };
        let trouble = against.iter().find_map(|target| match &target.standing {
            Standing::Failed { trouble } => Some(trouble),
            _ => None,
        });
        if let Some(trouble) = trouble {
            reason.push_str(&format!(": {}: {}", trouble.code, trouble.reason));
        }
        reason
    }
}

/// Those of `targets` as they stand once they are asked.
fn asked<'a>(
    targets: impl Iterator<Item = &'a Target>,
    seen: &HashMap<EnvironmentId, Seen>,
    now: Timestamp,
) -> Vec<(EnvironmentId, Target)> {
    targets.map(|target| (target.environment, target.ask(seen.get(&target.environment), now))).collect()
}
