//! What to do, from what is wanted and what is there: a pure comparison, given `now`.
//!
//! The plan names only containers that bear our labels, because it is only ever given those. It decides for one instance at a time, so
//! that one that hangs holds up no other.

use std::time::Instant;

use dtma_api::InstanceName;

use crate::engine::{Condition, Container, ContainerId, Volumes};
use crate::instance::{Departure, Intent, RestartPolicy};
use crate::store::ledger::Entry;

/// One instance as the plan sees it. Instances being worked on are left out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subject<'a> {
    /// What was promised.
    pub(super) entry: &'a Entry,
    /// Every container saying it belongs to this instance.
    pub(super) containers: &'a [Container],
    /// What a caller wants done once, whatever the state.
    pub(super) nudge: Option<Nudge>,
    /// Its last attempt failed.
    pub(super) failing: bool,
    /// Not to be tried again by itself before this.
    pub(super) not_before: Option<Instant>,
}

/// Something a caller wants done once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nudge {
    /// Start it now, whatever its restart policy and its backoff say.
    Start,
    /// Start it anew even if it runs.
    Restart,
}

/// What to do with one instance, in order. When a step fails the rest isn't done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Job {
    /// Which.
    pub(super) instance: InstanceName,
    /// The container that `Start`, `Stop`, `Restart` and `Await` mean, unless `Create` makes another.
    pub(super) container: Option<ContainerId>,
    /// What is to be done.
    pub(super) steps: Vec<Step>,
    /// What is reached when all of it is done.
    pub(super) goal: Goal,
}

/// What a job is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// It runs.
    Running,
    /// It is stopped.
    Stopped,
    /// Nothing is left of it.
    Gone,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Remove a container that isn't wanted any more.
    Discard(ContainerId),
    /// See that the image is there.
    Fetch,
    /// Make the container.
    Create,
    /// Start it.
    Start,
    /// Start it anew.
    Restart,
    /// Wait until it has shown that it runs.
    Await,
    /// Stop it.
    Stop,
    /// Remove volumes.
    RemoveVolumes(Volumes),
}

/// What there is to do for one instance; nothing when it is as it should be, or has to wait.
pub(super) fn plan(subject: &Subject<'_>, now: Instant) -> Option<Job> {
    let (current, others) = choose(subject);
    let mut job = match &subject.entry.intent {
        Intent::Run => run(subject, current, now),
        Intent::Stop => stop(subject, current),
        Intent::Remove(departure) => Some(remove(subject, current, departure)),
    };
    // Containers of an older spec, or doubles: out of the way before anything else, since they hold the name and the ports.
    if !others.is_empty() {
        let discards = others.into_iter().map(|container| Step::Discard(container.id.clone()));
        match &mut job {
            Some(job) => {
                job.steps.splice(0..0, discards);
            }
            None => {
                let goal = if subject.entry.intent == Intent::Run { Goal::Running } else { Goal::Stopped };
                job = Some(new_job(subject, current, discards.collect(), goal));
            }
        }
    }
    // A removal has to be tried again like everything else, but is never forgotten.
    let waits = subject.not_before.is_some_and(|at| now < at) && subject.nudge.is_none();
    job.filter(|_| !waits)
}

/// The container that is the instance, among those saying they belong to it: one made from its present spec, the liveliest first.
pub(super) fn current<'a>(entry: &Entry, containers: &'a [Container]) -> Option<&'a Container> {
    let rank = |container: &Container| match container.condition {
        Condition::Running { .. } => 0,
        Condition::Restarting(_) | Condition::Paused => 1,
        Condition::Exited(_) => 2,
        Condition::Created => 3,
        Condition::Removing | Condition::Dead => 4,
    };
    let fits = |container: &&Container| {
        container.spec_hash == entry.spec_hash
            && container.name == entry.spec.name.as_str()
            && !matches!(container.condition, Condition::Dead | Condition::Removing)
    };
    containers.iter().filter(fits).min_by_key(|container| rank(container))
}

/// The container to keep, and those in its way. One being removed by the engine is neither: it can only be waited for.
fn choose<'a>(subject: &Subject<'a>) -> (Option<&'a Container>, Vec<&'a Container>) {
    let current = current(subject.entry, subject.containers);
    let others = subject
        .containers
        .iter()
        .filter(|container| Some(&container.id) != current.map(|current| &current.id))
        .filter(|container| container.condition != Condition::Removing)
        .collect();
    (current, others)
}

fn new_job(subject: &Subject<'_>, current: Option<&Container>, steps: Vec<Step>, goal: Goal) -> Job {
    let container = current.map(|container| container.id.clone());
    Job { instance: subject.entry.spec.name.clone(), container, steps, goal }
}

fn run(subject: &Subject<'_>, current: Option<&Container>, now: Instant) -> Option<Job> {
    let steps = match current.map(|container| &container.condition) {
        // The name is still held; the engine reports when it isn't.
        None if subject.containers.iter().any(|container| container.condition == Condition::Removing) => return None,
        None => vec![Step::Fetch, Step::Create, Step::Start, Step::Await],
        Some(Condition::Created) => vec![Step::Start, Step::Await],
        Some(Condition::Exited(exit)) => {
            let again = match subject.entry.spec.restart {
                RestartPolicy::UnlessStopped => true,
                RestartPolicy::OnFailure { .. } => exit.code != 0 && subject.failing,
                RestartPolicy::Never => false,
            };
            // A policy that leaves it ended is kept to, unless somebody asks, or it has never been seen to run.
            if !again && subject.nudge.is_none() && subject.entry.proven {
                return None;
            }
            vec![Step::Start, Step::Await]
        }
        Some(Condition::Running { .. } | Condition::Restarting(_) | Condition::Paused)
            if subject.nudge == Some(Nudge::Restart) =>
        {
            vec![Step::Restart, Step::Await]
        }
        // Docker starts it again by itself; looking is all there is to do, and only where the answer is still open.
        Some(Condition::Running { .. } | Condition::Restarting(_)) => {
            let due = subject.not_before.is_none_or(|at| now >= at) || subject.nudge.is_some();
            if subject.entry.proven && !(subject.failing && due) {
                return None;
            }
            vec![Step::Await]
        }
        // Somebody's doing, and left so until somebody wants it otherwise.
        Some(Condition::Paused) if subject.nudge == Some(Nudge::Start) => vec![Step::Restart, Step::Await],
        Some(Condition::Paused) => return None,
        // `choose` never picks these.
        Some(Condition::Removing | Condition::Dead) => return None,
    };
    Some(new_job(subject, current, steps, Goal::Running))
}

fn stop(subject: &Subject<'_>, current: Option<&Container>) -> Option<Job> {
    match current.map(|container| &container.condition) {
        Some(Condition::Running { .. } | Condition::Restarting(_) | Condition::Paused) => {
            Some(new_job(subject, current, vec![Step::Stop], Goal::Stopped))
        }
        None | Some(Condition::Created | Condition::Exited(_) | Condition::Removing | Condition::Dead) => None,
    }
}

fn remove(subject: &Subject<'_>, current: Option<&Container>, departure: &Departure) -> Job {
    let mut steps = Vec::new();
    if let Some(current) = current {
        // A server that was asked for gets the chance to end in order; one that never worked doesn't.
        if matches!(departure, Departure::Asked { .. }) && matches!(current.condition, Condition::Running { .. }) {
            steps.push(Step::Stop);
        }
        steps.push(Step::Discard(current.id.clone()));
    }
    match departure {
        Departure::Asked { volumes: true } => {
            steps.push(Step::RemoveVolumes(Volumes::OfInstance(subject.entry.spec.name.clone())));
        }
        Departure::Asked { volumes: false } => {}
        Departure::Undone(_) if subject.entry.spec.volumes.is_empty() => {}
        Departure::Undone(_) => steps.push(Step::RemoveVolumes(Volumes::OfDeployment(subject.entry.deployment))),
    }
    new_job(subject, current, steps, Goal::Gone)
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
