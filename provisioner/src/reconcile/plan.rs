//! What to do next for one environment: a pure function of its row, of what the cloud shows, and of the time.
//!
//! It never names a droplet that does not bear this environment's tags.

use std::time::Duration;

use jiff::Timestamp;

use crate::cloud::{ActionStatus, Droplet, Power};
use crate::environment::{
    Attempt, Change, Cleanup, DropletId, Environment, Placement, Progress, RunningDroplet, State, after, attempt_of,
    attempt_tag, cloud_side, plain_error,
};
use dtma_api::environment::EnvironmentError;

/// Waits and limits of the loop.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Tag of every droplet of this provisioner.
    pub fleet_tag: String,
    /// How long a droplet of doubtful existence is looked for.
    pub lookup_grace: Duration,
    /// How long an attempt may take from intent to first heartbeat.
    pub bootstrap_deadline: Duration,
    /// After this long without effect a delete is asked for again.
    pub delete_repeat: Duration,
    /// Deleting for longer than this is reported as an error, and goes on.
    pub delete_patience: Duration,
    /// Tries of one run.
    pub max_tries: u32,
    /// Age a droplet of an unknown environment must have before the sweeper deletes it.
    pub orphan_age: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            fleet_tag: "dtma-fleet".to_owned(),
            lookup_grace: Duration::from_secs(60),
            bootstrap_deadline: Duration::from_secs(900),
            delete_repeat: Duration::from_secs(5),
            delete_patience: Duration::from_secs(600),
            max_tries: 5,
            orphan_age: Duration::from_secs(900),
        }
    }
}

/// What was seen of an environment's droplets. Taken at or after the `now` handed to [`plan`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// The droplet whose id the row holds.
    pub known: Known,
    /// All droplets a list by tag showed; none when no list was read.
    pub tagged: Option<Vec<Droplet>>,
    /// The create action, where it was asked for.
    pub action: Option<ActionStatus>,
}

/// What is known of the droplet with the row's id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Known {
    /// Not looked at, or the cloud didn't answer.
    #[default]
    Unseen,
    /// There.
    Present(Droplet),
    /// The cloud knows no such id.
    Gone,
}

/// One step.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Nothing now.
    Wait,
    /// Write the intent of a new attempt, then ask for its droplet.
    Create {
        /// Which try of the run this is.
        number: u32,
        /// When the run began.
        run_started_at: Timestamp,
    },
    /// Ask for these droplets to be deleted.
    Delete(Vec<DropletId>),
    /// Only the row changes.
    Become(Box<Change>),
}

fn become_(change: Change) -> Step {
    Step::Become(Box::new(change))
}

/// The next step for `environment`.
pub fn plan(environment: &Environment, observed: &Observed, policy: &Policy, now: Timestamp) -> Step {
    let own = Own { environment, observed, policy, now };
    match &environment.state {
        State::PendingProvision { tries, since, not_before, last_error, leftover } => {
            if let Some(cleanup) = leftover {
                return own.clean(cleanup, || {
                    Change::quiet(State::PendingProvision {
                        tries: *tries,
                        since: *since,
                        not_before: *not_before,
                        last_error: last_error.clone(),
                        leftover: None,
                    })
                });
            }
            if not_before.is_some_and(|at| now < at) {
                return Step::Wait;
            }
            Step::Create { number: tries.saturating_add(1), run_started_at: *since }
        }
        State::Provisioning { attempt, placement: Placement::Asked, progress } => {
            // Nobody is waiting for the answer any more: the process that asked has ended.
            become_(cloud_side::doubtful(attempt, progress.clone(), now))
        }
        State::Provisioning { attempt, placement: Placement::Doubtful { since }, progress } => {
            own.look_for(attempt, *since, progress)
        }
        State::Provisioning { attempt, placement: Placement::Placed { droplet, action }, progress } => {
            own.placed(attempt, *droplet, action.is_some(), progress)
        }
        State::AwaitingHeartbeat { attempt, droplet, progress } => match observed.known {
            Known::Gone => own.lost(attempt, droplet.id),
            Known::Unseen | Known::Present(_) if now >= attempt.deadline => {
                own.too_late(attempt, progress, Cleanup::of(droplet.id))
            }
            Known::Unseen | Known::Present(_) => Step::Wait,
        },
        // Its agent reports: whatever the cloud says, the droplet is there. A token of another account must not cost us a fleet.
        State::Active { .. } => Step::Wait,
        State::Unresponsive { droplet, .. } => match observed.known {
            Known::Gone => {
                let message = format!("Droplet {} was deleted by somebody else.", droplet.id);
                let error = plain_error("droplet_gone", message.clone(), now);
                become_(Change::told(State::ErrorProvisioning { error, leftover: None }, message))
            }
            Known::Unseen | Known::Present(_) => Step::Wait,
        },
        State::ErrorProvisioning { error, leftover } => match leftover {
            Some(cleanup) => own.clean(cleanup, || {
                let state = State::ErrorProvisioning { error: error.clone(), leftover: None };
                Change::told(state, "What the failed attempt left behind is gone.")
            }),
            None => Step::Wait,
        },
        State::PendingDeprovision { cleanup } => {
            let state = State::Deprovisioning { since: now, cleanup: cleanup.clone(), failures: 0 };
            become_(Change::told(state, "Deleting the droplet."))
        }
        State::Deprovisioning { since, cleanup, failures } => own.deprovision(*since, cleanup, *failures),
        State::ErrorDeprovisioning { cleanup, retry_at, failures, .. } => {
            if now < *retry_at {
                return Step::Wait;
            }
            let cleanup = Cleanup { delete_asked_at: None, ..cleanup.clone() };
            become_(Change::told(
                State::Deprovisioning { since: now, cleanup, failures: *failures },
                "Trying again to delete the droplet.",
            ))
        }
        State::Deprovisioned { .. } => Step::Wait,
    }
}

struct Own<'a> {
    environment: &'a Environment,
    observed: &'a Observed,
    policy: &'a Policy,
    now: Timestamp,
}

impl Own<'_> {
    /// Those of the listed droplets that are this environment's.
    fn tagged(&self) -> Option<impl Iterator<Item = &Droplet>> {
        let tag = self.environment.tag();
        let listed = self.observed.tagged.as_ref()?;
        Some(
            listed
                .iter()
                .filter(move |droplet| droplet.tags.contains(&self.policy.fleet_tag) && droplet.tags.contains(&tag)),
        )
    }

    fn look_for(&self, attempt: &Attempt, since: Timestamp, progress: &Progress) -> Step {
        let Some(tagged) = self.tagged() else { return Step::Wait };
        let tag = attempt_tag(attempt.id);
        // Were there two, the sweeper deletes the one no row names; the choice must only be the same each time.
        if let Some(found) = tagged.filter(|droplet| droplet.tags.contains(&tag)).min_by_key(|droplet| droplet.id) {
            return become_(Change::told(
                State::Provisioning {
                    attempt: attempt.clone(),
                    placement: Placement::Placed { droplet: found.id, action: None },
                    progress: progress.clone(),
                },
                format!("Found droplet {} by its tag.", found.id),
            ));
        }
        if self.now < after(since, self.policy.lookup_grace) {
            return Step::Wait;
        }
        let message = "The cloud's answer was lost, and it made no droplet.";
        let error = plain_error("cloud_unavailable", message, self.now);
        // Should its droplet show up after all, no row names it and the sweeper deletes it.
        become_(cloud_side::try_again(attempt, error, None, self.now, self.policy.max_tries))
    }

    fn placed(&self, attempt: &Attempt, id: DropletId, has_action: bool, progress: &Progress) -> Step {
        if self.observed.action == Some(ActionStatus::Errored) || self.observed.known == Known::Gone {
            return self.lost(attempt, id);
        }
        if let Known::Present(Droplet { power: Power::Active, public_ip: Some(ip), .. }) = &self.observed.known
            && (!has_action || self.observed.action == Some(ActionStatus::Completed))
        {
            let droplet = RunningDroplet { id, ip: *ip };
            let attempt = attempt.clone();
            return become_(match (&progress.agent, progress.heard_at) {
                (Some(agent), Some(ready_at)) => Change::told(
                    State::Active { attempt, droplet, agent: agent.clone(), ready_at },
                    "The agent reports; the environment is ready.",
                ),
                (_, _) => Change::told(
                    State::AwaitingHeartbeat { attempt, droplet, progress: progress.clone() },
                    format!("Droplet {id} is up at {ip}; waiting for its agent."),
                ),
            });
        }
        if self.now >= attempt.deadline {
            return self.too_late(attempt, progress, Cleanup::of(id));
        }
        Step::Wait
    }

    /// The droplet will not come: the cloud accepted it and then could not place it, or somebody deleted it.
    fn lost(&self, attempt: &Attempt, id: DropletId) -> Step {
        let message = format!("The cloud could not place droplet {id}.");
        let error = plain_error("placement_failed", message, self.now);
        let wait = Duration::from_secs(u64::from(attempt.number.saturating_sub(1)).min(6).saturating_mul(5));
        let leftover = Some(Cleanup::of(id));
        become_(cloud_side::try_again(attempt, error, leftover, after(self.now, wait), self.policy.max_tries))
    }

    fn too_late(&self, attempt: &Attempt, progress: &Progress, leftover: Cleanup) -> Step {
        let seconds = self.now.duration_since(attempt.started_at).as_secs();
        let message = match &progress.phase {
            Some(phase) => {
                format!("The droplet has not finished set-up after {seconds} s; its last phase was {phase}.")
            }
            None => format!("Nothing was heard from the droplet for {seconds} s."),
        };
        let error = EnvironmentError {
            phase: progress.phase.clone(),
            ..plain_error("bootstrap_timeout", message.clone(), self.now)
        };
        become_(Change::told(State::ErrorProvisioning { error, leftover: Some(leftover) }, message))
    }

    fn deprovision(&self, since: Timestamp, cleanup: &Cleanup, failures: u32) -> Step {
        let step = self
            .clean(cleanup, || Change::told(State::Deprovisioned { at: self.now }, "Nothing is left of the droplet."));
        if matches!(step, Step::Become(_))
            || cleanup.doubtful_since.is_some()
            || self.now < after(since, self.policy.delete_patience)
        {
            return step;
        }
        let message = "The cloud accepted the delete, and the droplet is still there.";
        let failures = failures.saturating_add(1);
        become_(Change::told(
            State::ErrorDeprovisioning {
                error: plain_error("delete_ignored", message, self.now),
                cleanup: cleanup.clone(),
                retry_at: after(self.now, delete_backoff(failures)),
                failures,
            },
            message,
        ))
    }

    /// Deletes what is there; `done` once certainly nothing is.
    fn clean(&self, cleanup: &Cleanup, done: impl FnOnce() -> Change) -> Step {
        let known = match (&cleanup.droplet, &self.observed.known) {
            // The first delete needs no look; any other does, or repeating this one would keep us from ever seeing what else there is.
            (Some(id), Known::Unseen) if cleanup.delete_asked_at.is_none() => return Step::Delete(vec![*id]),
            (Some(_), Known::Unseen) => return Step::Wait,
            (Some(id), Known::Present(_)) => Some(*id),
            (Some(_), Known::Gone) | (None, _) => None,
        };
        let Some(tagged) = self.tagged() else {
            return self.delete(cleanup, known.into_iter().collect());
        };
        // A list lags: it may still show the droplet that the cloud, asked by id, no longer knows.
        let others = tagged.map(|droplet| droplet.id).filter(|id| Some(*id) != cleanup.droplet);
        let all: Vec<DropletId> = known.into_iter().chain(others).collect();
        if !all.is_empty() {
            return self.delete(cleanup, all);
        }
        if cleanup.doubtful_since.is_some_and(|since| self.now < after(since, self.policy.lookup_grace)) {
            return Step::Wait;
        }
        become_(done())
    }

    fn delete(&self, cleanup: &Cleanup, droplets: Vec<DropletId>) -> Step {
        let asked_lately =
            cleanup.delete_asked_at.is_some_and(|asked| self.now < after(asked, self.policy.delete_repeat));
        if droplets.is_empty() || asked_lately { Step::Wait } else { Step::Delete(droplets) }
    }
}

/// How long to wait after the `failures`-th delete that failed.
pub fn delete_backoff(failures: u32) -> Duration {
    Duration::from_secs(5_u64.saturating_mul(1 << failures.min(6)).min(300))
}

/// What the sweeper does about one droplet that bears the fleet tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Some row wants it, or is taking care of it.
    Keep,
    /// No row wants it.
    Delete,
    /// No row wants it, but it is too young to be sure.
    TooYoung,
}

/// Judges one droplet. `environment` is the row its tags name, read *after* the list that showed the droplet: since rows are written
/// before droplets are asked for, a row that doesn't want the droplet by then never will.
pub fn judge(droplet: &Droplet, environment: Option<&Environment>, policy: &Policy, now: Timestamp) -> Verdict {
    if !droplet.tags.contains(&policy.fleet_tag) {
        return Verdict::Keep;
    }
    let Some(environment) = environment else {
        // Perhaps another provisioner's, or made from a database since lost; age is the only sign that nobody cares.
        let old = now >= after(droplet.created_at, policy.orphan_age);
        return if old { Verdict::Delete } else { Verdict::TooYoung };
    };
    let attempt = attempt_of(&droplet.tags);
    match &environment.state {
        State::Deprovisioned { .. } => Verdict::Delete,
        state if state.droplet() == Some(droplet.id) => Verdict::Keep,
        state if state.cleanup().is_some() => Verdict::Keep,
        State::Provisioning { attempt: current, placement: Placement::Asked | Placement::Doubtful { .. }, .. }
            if attempt == Some(current.id) =>
        {
            Verdict::Keep
        }
        // Its environment has another droplet, or none: the attempt that made this one was given up.
        State::PendingProvision { .. }
        | State::Provisioning { .. }
        | State::AwaitingHeartbeat { .. }
        | State::Active { .. }
        | State::Unresponsive { .. }
        | State::ErrorProvisioning { .. }
        | State::PendingDeprovision { .. }
        | State::Deprovisioning { .. }
        | State::ErrorDeprovisioning { .. } => Verdict::Delete,
    }
}
