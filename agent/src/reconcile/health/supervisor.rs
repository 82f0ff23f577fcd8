//! One server under supervision: when it is probed next, what its answers come to, and when it is to be restarted because it hangs.
//!
//! Pure: it is given `now` and what was found, and says what follows. It knows one process at a time. While that isn't to be probed (its
//! instance is being worked on, or isn't wanted) it says nothing of it, and goes on with it if it is still the same one afterwards.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dtma_api::health::Introduction;
use dtma_api::instance::Health;
use jiff::Timestamp;

use crate::engine::ContainerId;
use crate::instance::HealthCheck;
use crate::reconcile::{Answer, ProbeFailure, Question, Timing, Upstream};

/// Time between two probes of a server that was just started. Longer where even its usual interval is shorter.
const EAGER: Duration = Duration::from_secs(1);
/// Within this time the first probes are spread after the agent's start.
const SPREAD: Duration = Duration::from_secs(1);
/// How old its list of tools may get.
const TOOLS_AGE: Duration = Duration::from_secs(300);
/// When it is asked again after it has not said which they are. Not at every probe: it may take all the time it is given.
const TOOLS_PAUSE: Duration = Duration::from_secs(60);

/// How long a call that is with it from before it fell silent holds up its restart. Callers wait no longer for an answer to begin.
const BUSY: Duration = Duration::from_secs(300);

/// The same moment on both clocks.
#[derive(Debug, Clone, Copy)]
pub(in crate::reconcile) struct Moment {
    pub(in crate::reconcile) instant: Instant,
    pub(in crate::reconcile) time: Timestamp,
}

impl Moment {
    pub(in crate::reconcile) fn now() -> Self {
        Self { instant: tokio::time::Instant::now().into_std(), time: Timestamp::now() }
    }
}

/// A process that is to be probed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::reconcile) struct Process {
    pub(in crate::reconcile) container: ContainerId,
    pub(in crate::reconcile) since: Timestamp,
    pub(in crate::reconcile) at: Upstream,
}

impl Process {
    fn is(&self, other: &Self) -> bool {
        self.container == other.container && self.since == other.since
    }
}

/// A probe to be made now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::reconcile) struct Due {
    /// Tells its answer from those to earlier ones.
    pub(in crate::reconcile) round: u64,
    pub(in crate::reconcile) at: Upstream,
    pub(in crate::reconcile) question: Question,
}

/// What callers are to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::reconcile) enum News {
    Healthy,
    Unhealthy(String),
    /// Unhealthy, and restarted often enough.
    GaveUp(String),
}

/// What became of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::reconcile) enum Heard {
    /// It is about something that isn't there any more.
    TooLate,
    Answers(Option<News>),
    Fails(Option<News>),
}

/// One instance's server. By default there is none.
#[derive(Debug, Default)]
pub(in crate::reconcile) struct Supervisor {
    watched: Option<Watched>,
    /// It was found hanging by whoever waited for its start, before its process was seen here.
    condemned: Option<String>,
    /// Restarts because it hung, since it was last healthy for long enough or somebody asked.
    in_a_row: u32,
    restarts: u64,
    round: u64,
    introduction: Option<Arc<Introduction>>,
    /// When it was last asked for its tools.
    tools_at: Option<Instant>,
    last_probe_at: Option<Timestamp>,
}

#[derive(Debug)]
struct Watched {
    process: Process,
    check: HealthCheck,
    /// End of its start period.
    grown_at: Instant,
    phase: Phase,
    probe: Probe,
    /// When it last answered.
    answered_at: Option<Instant>,
    failures: u32,
    successes: u32,
}

#[derive(Debug)]
enum Phase {
    /// It has not answered yet, or not often enough.
    Starting {
        /// It was just started, so that its first answer is waited for.
        eager: bool,
        last: Option<String>,
    },
    Well {
        since: Instant,
        /// It shook hands. Otherwise it accepts connections, or just stays up.
        proven: bool,
    },
    Hung {
        reason: String,
        /// None when it isn't to be restarted by the agent.
        restart_at: Option<Instant>,
        /// It may only be busy with a call. At this time that is no excuse any more; whether it answers is found out once more then.
        excused_until: Option<Instant>,
    },
}

#[derive(Debug)]
enum Probe {
    At(Instant),
    UnderWay {
        round: u64,
        begun: Instant,
    },
    /// It isn't to be probed now.
    Suspended,
}

impl Supervisor {
    /// What is there to be probed now, and how. A process it hasn't seen begins anew.
    pub(in crate::reconcile) fn observe(
        &mut self,
        process: Option<Process>,
        check: &HealthCheck,
        timing: &Timing,
        now: Moment,
    ) {
        let Some(process) = process else { return self.look_away() };
        if let Some(watched) = self.watched.as_mut().filter(|watched| watched.process.is(&process)) {
            watched.process = process;
            watched.check = *check;
            if let Probe::Suspended = watched.probe {
                watched.probe = Probe::At(now.instant + part(SPREAD, &watched.process, self.round));
            }
            return;
        }
        if self.watched.as_ref().is_some_and(|watched| watched.process.container != process.container) {
            self.introduction = None;
        }
        self.tools_at = None;
        let mut watched = Watched::new(process, check, now);
        // Not all at once after the agent's start.
        watched.probe = Probe::At(now.instant + part(SPREAD, &watched.process, self.round));
        self.watched = Some(watched);
        if let Some(reason) = self.condemned.take() {
            self.hang(reason, None, timing, now);
        }
    }

    /// There is nothing to be probed: the process, if it is still there, may be in the middle of anything.
    pub(in crate::reconcile) fn look_away(&mut self) {
        self.condemned = None;
        if let Some(watched) = &mut self.watched {
            watched.probe = Probe::Suspended;
        }
    }

    /// Whoever waited for its start has found it answering.
    pub(in crate::reconcile) fn prove(&mut self, process: Process, check: &HealthCheck, answer: &Answer, now: Moment) {
        let mut watched = Watched::new(process, check, now);
        let proven = matches!(answer, Answer::Introduced(_));
        watched.phase = Phase::Well { since: now.instant, proven };
        watched.answered_at = Some(now.instant);
        // That one was in a hurry, and has not asked for the tools.
        watched.probe = Probe::At(now.instant + watched.interval(self.round).min(EAGER));
        self.watched = Some(watched);
        self.condemned = None;
        self.in_a_row = 0;
        self.introduction = None;
        self.tools_at = None;
        self.listen(answer, now);
    }

    /// Whoever waited for its start has found it not answering.
    pub(in crate::reconcile) fn condemn(&mut self, reason: String) {
        self.watched = None;
        self.condemned = Some(reason);
    }

    /// Somebody asked for something: it gets all its chances anew.
    pub(in crate::reconcile) fn forgive(&mut self) {
        self.in_a_row = 0;
        if let Some(watched) = &mut self.watched
            && watched.check.restart
            && let Phase::Hung { restart_at: restart_at @ None, .. } = &mut watched.phase
        {
            *restart_at = Some(watched.grown_at);
        }
    }

    /// The probe to be made now, if there is one. It counts as under way until its answer comes.
    pub(in crate::reconcile) fn due(&mut self, now: Instant) -> Option<Due> {
        let known = self.introduction.as_ref().is_some_and(|introduction| introduction.tools.is_some());
        let age = if known { TOOLS_AGE } else { TOOLS_PAUSE };
        let tools = self.tools_at.is_none_or(|at| now.saturating_duration_since(at) >= age);
        let watched = self.watched.as_mut()?;
        match watched.probe {
            Probe::At(at) if at <= now => {}
            Probe::At(_) | Probe::UnderWay { .. } | Probe::Suspended => return None,
        }
        self.round += 1;
        watched.probe = Probe::UnderWay { round: self.round, begun: now };
        let patience = Duration::from_secs(watched.check.timeout_seconds.into());
        if tools {
            self.tools_at = Some(now);
        }
        let question = Question { patience, tools };
        Some(Due { round: self.round, at: watched.process.at.clone(), question })
    }

    /// Takes the answer to the probe `round`. `calls`: since when each call has been with the server that is there now.
    pub(in crate::reconcile) fn answered(
        &mut self,
        round: u64,
        answer: Result<Answer, ProbeFailure>,
        calls: &[Instant],
        timing: &Timing,
        now: Moment,
    ) -> Heard {
        let begun = self.watched.as_ref().and_then(|watched| match watched.probe {
            Probe::UnderWay { round: at, begun } if at == round => Some(begun),
            Probe::UnderWay { .. } | Probe::At(_) | Probe::Suspended => None,
        });
        let Some(begun) = begun else { return Heard::TooLate };
        let heard = match answer {
            Ok(answer) => {
                self.listen(&answer, now);
                Heard::Answers(self.succeeded(&answer, now.instant))
            }
            Err(failure) => {
                self.last_probe_at = Some(now.time);
                Heard::Fails(self.failed(failure.reason, begun, calls, timing, now))
            }
        };
        if let Some(watched) = &mut self.watched {
            let mut next = now.instant + watched.pause(self.round);
            if let Phase::Hung { excused_until: Some(until), .. } = watched.phase {
                next = next.min(until.max(now.instant));
            }
            watched.probe = Probe::At(next);
        }
        heard
    }

    fn listen(&mut self, answer: &Answer, now: Moment) {
        match answer {
            Answer::Introduced(introduction) => {
                self.last_probe_at = Some(now.time);
                let mut introduction = (**introduction).clone();
                if introduction.tools.is_none() {
                    introduction.tools = self.introduction.as_ref().and_then(|before| before.tools.clone());
                }
                self.introduction = Some(Arc::new(introduction));
            }
            Answer::CannotSay => {}
        }
    }

    fn succeeded(&mut self, answer: &Answer, now: Instant) -> Option<News> {
        let proven = matches!(answer, Answer::Introduced(_));
        let watched = self.watched.as_mut()?;
        watched.failures = 0;
        watched.answered_at = Some(now);
        watched.successes = watched.successes.saturating_add(1);
        // One that can't be asked can't be asked several times either.
        let enough = watched.successes >= watched.check.success_threshold || answer == &Answer::CannotSay;
        match &watched.phase {
            Phase::Well { since, proven: before } => {
                // Busy with a call, it can't be asked for a while, and what it said before holds.
                let proven = proven || (*before && answer == &Answer::CannotSay);
                watched.phase = Phase::Well { since: *since, proven };
                None
            }
            Phase::Starting { .. } | Phase::Hung { .. } if !enough => None,
            Phase::Starting { .. } => {
                watched.phase = Phase::Well { since: now, proven };
                (self.in_a_row > 0).then_some(News::Healthy)
            }
            Phase::Hung { .. } => {
                watched.phase = Phase::Well { since: now, proven };
                Some(News::Healthy)
            }
        }
    }

    fn failed(
        &mut self,
        reason: String,
        begun: Instant,
        calls: &[Instant],
        timing: &Timing,
        now: Moment,
    ) -> Option<News> {
        let watched = self.watched.as_mut()?;
        watched.successes = 0;
        if let Phase::Starting { last, .. } = &mut watched.phase {
            *last = Some(reason.clone());
            if now.instant < watched.grown_at {
                return None;
            }
        }
        watched.failures = watched.failures.saturating_add(1);
        if watched.failures < watched.check.failure_threshold {
            return None;
        }
        let reason = match watched.failures {
            1 => format!("it failed its probe: {reason}"),
            several => format!("it failed {several} probes in a row, the last because {reason}"),
        };
        // It may have come free since this probe began.
        let excuse = watched.excused_until(calls).filter(|until| *until > begun);
        if let Phase::Hung { reason: before, excused_until, .. } = &mut watched.phase {
            *before = reason;
            *excused_until = excuse;
            return None;
        }
        self.hang(reason, excuse, timing, now)
    }

    fn hang(&mut self, reason: String, excused_until: Option<Instant>, timing: &Timing, now: Moment) -> Option<News> {
        let watched = self.watched.as_mut()?;
        if let Phase::Well { since, .. } = watched.phase
            && now.instant.saturating_duration_since(since) >= timing.stable_after
        {
            self.in_a_row = 0;
        }
        let again = watched.check.restart && self.in_a_row < timing.hung_restarts;
        let pause = pause(timing, self.in_a_row);
        let restart_at = again.then(|| (now.instant + pause).max(watched.grown_at));
        let gave_up = watched.check.restart && !again;
        watched.phase = Phase::Hung { reason, restart_at, excused_until };
        let reason = self.shown(now.instant).1.unwrap_or_default();
        Some(if gave_up { News::GaveUp(reason) } else { News::Unhealthy(reason) })
    }

    /// Whether it is to be restarted now.
    pub(in crate::reconcile) fn is_to_be_restarted(&self, now: Instant) -> bool {
        self.restart_at().is_some_and(|at| at <= now)
    }

    /// Its restart has begun. Why, for callers.
    pub(in crate::reconcile) fn restarting(&mut self, timing: &Timing, now: Instant) -> String {
        let reason = self.shown(now).1.unwrap_or_default();
        self.watched = None;
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.restarts += 1;
        format!(
            "{reason}; it is restarted, for the {} of at most {} times in a row",
            self.in_a_row, timing.hung_restarts
        )
    }

    /// The process, where it is to be probed.
    fn in_sight(&self) -> Option<&Watched> {
        self.watched.as_ref().filter(|watched| !matches!(watched.probe, Probe::Suspended))
    }

    fn restart_at(&self) -> Option<Instant> {
        match self.in_sight()?.phase {
            Phase::Hung { restart_at, excused_until: None, .. } => restart_at,
            // The probe at its end comes first.
            Phase::Hung { excused_until: Some(_), .. } | Phase::Starting { .. } | Phase::Well { .. } => None,
        }
    }

    /// When there is something to do next: a probe, and a restart.
    pub(in crate::reconcile) fn next(&self) -> (Option<Instant>, Option<Instant>) {
        let probe = self.watched.as_ref().and_then(|watched| match watched.probe {
            Probe::At(at) => Some(at),
            Probe::UnderWay { .. } | Probe::Suspended => None,
        });
        (probe, self.restart_at())
    }

    /// Its health, and why it isn't better.
    pub(in crate::reconcile) fn shown(&self, now: Instant) -> (Health, Option<String>) {
        let Some(watched) = self.in_sight() else { return (Health::Unknown, None) };
        match &watched.phase {
            Phase::Starting { last, .. } if now < watched.grown_at => (Health::Starting, last.clone()),
            Phase::Starting { last, .. } => (Health::Unknown, last.clone()),
            Phase::Well { proven: true, .. } => (Health::Healthy, None),
            Phase::Well { proven: false, .. } => (Health::Unknown, None),
            Phase::Hung { reason, restart_at: Some(_), excused_until: Some(_) } => {
                let told =
                    format!("{reason}; a call it was given before is still with it, and so it is not restarted yet");
                (Health::Unhealthy, Some(told))
            }
            Phase::Hung { reason, restart_at: Some(_), .. } => (Health::Unhealthy, Some(reason.clone())),
            Phase::Hung { reason, restart_at: None, .. } => {
                let name = &watched.process.at.instance;
                let told = if watched.check.restart {
                    format!(
                        "{reason}; {} restarts in a row did not help, and the agent has given up: look at GET /tools/{name}/logs, \
                         then POST /tools/{name}/restart, or PUT /tools/{name} with a version that works",
                        self.in_a_row
                    )
                } else {
                    format!("{reason}; it is not restarted, as its healthCheck says")
                };
                (Health::Unhealthy, Some(told))
            }
        }
    }

    /// How often it was restarted because it hung, since the agent's start.
    pub(in crate::reconcile) fn restarts(&self) -> u64 {
        self.restarts
    }

    pub(in crate::reconcile) fn introduction(&self) -> Option<&Arc<Introduction>> {
        self.introduction.as_ref()
    }

    pub(in crate::reconcile) fn last_probe_at(&self) -> Option<Timestamp> {
        self.last_probe_at
    }
}

impl Watched {
    fn new(process: Process, check: &HealthCheck, now: Moment) -> Self {
        let start_period = Duration::from_secs(check.start_period_seconds.into());
        // A clock that was set back makes nobody older, or younger than new.
        let age = Duration::try_from(now.time.duration_since(process.since)).unwrap_or_default();
        let left = start_period.saturating_sub(age);
        Self {
            process,
            check: *check,
            grown_at: now.instant + left,
            phase: Phase::Starting { eager: !left.is_zero(), last: None },
            probe: Probe::At(now.instant),
            answered_at: None,
            failures: 0,
            successes: 0,
        }
    }

    /// Until when one of its calls may be what keeps it from answering: many servers do one thing at a time. What was called only after
    /// it fell silent is no excuse; nor is a call that has lasted for too long.
    fn excused_until(&self, calls: &[Instant]) -> Option<Instant> {
        // It fell silent at some time before the next probe.
        let silent_since = self.answered_at.map(|at| at + self.interval_at_most());
        let before = calls.iter().filter(|began| silent_since.is_some_and(|silent| **began <= silent));
        before.map(|began| *began + BUSY).max()
    }

    fn interval_at_most(&self) -> Duration {
        Duration::from_secs(self.check.interval_seconds.into())
    }

    /// From one answer to the next probe.
    fn pause(&self, round: u64) -> Duration {
        let interval = self.interval(round);
        match self.phase {
            Phase::Starting { eager: true, .. } => interval.min(EAGER),
            Phase::Starting { eager: false, .. } | Phase::Well { .. } | Phase::Hung { .. } => interval,
        }
    }

    /// Its interval, or up to a tenth less, so that servers started together aren't probed together for ever.
    fn interval(&self, round: u64) -> Duration {
        let interval = self.interval_at_most();
        interval - part(interval / 10, &self.process, round)
    }
}

/// A part of `whole` that differs from process to process and from round to round.
fn part(whole: Duration, process: &Process, round: u64) -> Duration {
    let mut hasher = DefaultHasher::new();
    (process.container.as_str(), round).hash(&mut hasher);
    whole.mul_f64((hasher.finish() % 1000) as f64 / 1000.0)
}

/// How long to wait before the restart after `in_a_row` others.
fn pause(timing: &Timing, in_a_row: u32) -> Duration {
    let doubled = 2_u32.checked_pow(in_a_row.min(16)).and_then(|factor| timing.hung_first.checked_mul(factor));
    doubled.unwrap_or(timing.hung_max).min(timing.hung_max)
}

#[cfg(test)]
mod tests;
