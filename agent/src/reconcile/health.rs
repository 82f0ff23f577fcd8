//! Health: every running MCP server is probed again and again, what hangs is restarted, and what keeps ending is reported.
//!
//! Docker restarts what ends, the agent restarts what hangs; neither does the other's work. What follows from what was found is decided
//! by [`supervisor`] and [`crashes`], without I/O; [`looks`] does the looking, beside the loop. Restarts are planned and carried out like
//! everything else. All of it is in memory: after the agent's own restart every server is probed at once, and none is touched.

mod crashes;
mod looks;
mod supervisor;

use std::time::Duration;

use dtma_api::InstanceName;
use dtma_api::instance::Health;
use tokio::time::Instant;

pub(super) use self::crashes::Crashes;
pub(super) use self::looks::{Found, Looks};
use self::supervisor::{Heard, News};
pub(super) use self::supervisor::{Moment, Process, Supervisor};
use super::journal::Journal;
use super::plan::{self, Goal};
use super::run::{Loop, Track};
use super::status::upstream;
use super::{Answer, Timing};
use crate::engine::{Condition, Container};
use crate::instance::{FailureKind, Intent, Spec};
use crate::store::ledger::Entry;

/// A restart that is due and that something else holds up is tried again after this.
const HELD_UP: Duration = Duration::from_secs(1);

/// How often what was found, since the agent's start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HealthCounts {
    /// Probes that were answered.
    pub answered: u64,
    /// Probes that failed.
    pub failed: u64,
    /// Servers that could not be asked.
    pub cannot_say: u64,
    /// Restarts of servers that hung.
    pub restarts: u64,
}

/// The process of `container` that is to be probed, if it is.
pub(super) fn process(spec: &Spec, container: &Container) -> Option<Process> {
    let Condition::Running { since } = container.condition else { return None };
    let at = upstream(spec, container).filter(|_| spec.health_check.enabled)?;
    Some(Process { container: container.id.clone(), since, at })
}

/// Whether it is for the health check to find that this runs and doesn't answer, and what is done about it.
pub(super) fn is_checked(spec: &Spec) -> bool {
    spec.mcp.is_some() && spec.health_check.enabled
}

impl Track {
    /// Takes note of what the engine shows of an instance that isn't being worked on.
    pub(super) fn look_after(
        &mut self,
        entry: &Entry,
        containers: &[Container],
        timing: &Timing,
        now: Moment,
        journal: &Journal,
    ) {
        // What is to be stopped or removed may end, and what is being updated is looked after by the update.
        let settled = entry.intent == Intent::Run && entry.update.is_none();
        let current = plan::current(entry, containers).filter(|_| settled);
        let process = current.filter(|_| entry.proven).and_then(|container| process(&entry.spec, container));
        self.supervisor.observe(process, &entry.spec.health_check, timing, now);
        if self.crashes.observe(current, now.time) {
            journal.write(&entry.spec.name, "stable", "its process stays up");
        }
    }

    /// Work begins that changes the container: what was known of its process isn't so any more.
    pub(super) fn look_away(&mut self) {
        let tidies = self.job.as_ref().is_some_and(|underway| underway.job.goal == Goal::Tidy);
        if !tidies {
            self.supervisor.look_away();
        }
    }

    /// It runs, it does not answer, and there is nothing to do about it but what the health check does.
    pub(super) fn is_left_to_checks(&self, entry: &Entry, containers: &[Container]) -> bool {
        let silent = self.failure.as_ref().is_some_and(|failure| failure.kind == FailureKind::NotAnswering);
        let runs = plan::current(entry, containers)
            .is_some_and(|container| matches!(container.condition, Condition::Running { .. }));
        silent && runs && entry.proven && is_checked(&entry.spec)
    }

    /// What callers are told of its health while it is not being worked on.
    pub(super) fn health(&self, runs: bool, now: Instant) -> (Health, Option<String>) {
        if let Some(reason) = self.crashes.reason() {
            return (Health::Unhealthy, Some(reason));
        }
        if runs { self.supervisor.shown(now.into_std()) } else { (Health::Unknown, None) }
    }
}

impl Loop {
    /// Begins the looks that are due.
    pub(super) fn look_closer(&mut self) {
        // What is reached through the engine can't be asked, and isn't to blame for it.
        if !self.engine_status.reachable {
            return;
        }
        let now = Moment::now();
        for (name, track) in &mut self.tracks {
            if let Some(due) = track.supervisor.due(now.instant) {
                self.looks.probe(name, due, &self.prober);
            }
            if let Some(container) = track.crashes.wants_words(now.time) {
                self.looks.last_lines(name, container, &self.engine);
            }
        }
    }

    /// When the next look or restart is due.
    pub(super) fn next_look(&self) -> Option<Instant> {
        if !self.engine_status.reachable {
            return None;
        }
        let held_up = Instant::now() + HELD_UP;
        let next = self.tracks.values().flat_map(|track| {
            let (probe, restart) = track.supervisor.next();
            let restart = restart.map(Instant::from_std).map(|at| if at <= Instant::now() { held_up } else { at });
            [probe.map(Instant::from_std), restart]
        });
        next.flatten().min()
    }

    /// Takes what a look has found.
    pub(super) fn found(&mut self, found: Found) {
        let now = Moment::now();
        match found {
            Found::Probed { instance, round, answer } => {
                match &answer {
                    Ok(Answer::Introduced(_)) => self.health_counts.answered += 1,
                    Ok(Answer::CannotSay) => self.health_counts.cannot_say += 1,
                    Err(_) => self.health_counts.failed += 1,
                }
                let answers = matches!(&answer, Ok(Answer::Introduced(_)));
                let Some(track) = self.tracks.get_mut(&instance) else { return };
                let calls = self.shared.calls.since(&instance);
                match track.supervisor.answered(round, answer, &calls, &self.timing, now) {
                    Heard::TooLate => {}
                    Heard::Answers(news) => {
                        // It runs and answers, whatever failed before.
                        if answers {
                            track.failure = None;
                            track.tries = 0;
                            track.not_before = None;
                        }
                        self.tell(&instance, news);
                    }
                    Heard::Fails(news) => self.tell(&instance, news),
                }
            }
            Found::Words { instance, container, lines } => {
                let Some(track) = self.tracks.get_mut(&instance) else { return };
                if let Some(reason) = track.crashes.tell(&container, lines) {
                    self.shared.journal.write(&instance, "crash_looping", reason);
                }
            }
        }
    }

    fn tell(&self, instance: &InstanceName, news: Option<News>) {
        match news {
            None => {}
            Some(News::Healthy) => self.shared.journal.write(instance, "healthy", "the server answers again"),
            Some(News::Unhealthy(reason)) => self.shared.journal.write(instance, "unhealthy", reason),
            Some(News::GaveUp(reason)) => self.shared.journal.write(instance, "gave_up", reason),
        }
    }

    /// A server that hangs is being restarted.
    pub(super) fn restarting(&mut self, instance: &InstanceName) {
        let Some(track) = self.tracks.get_mut(instance) else { return };
        self.health_counts.restarts += 1;
        let message = track.supervisor.restarting(&self.timing, Moment::now().instant);
        self.shared.journal.write(instance, "hangs", message);
    }
}
