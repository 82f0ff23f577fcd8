//! What to do, from what is wanted and what is there: a pure comparison, given `now`.
//!
//! The plan names only containers that bear our labels, because it is only ever given those. It decides for one instance at a time, so
//! that one that hangs holds up no other.

use std::time::Instant;

use dtma_api::InstanceName;

use crate::engine::{Condition, Container, ContainerId, Link, Settings, Volumes};
use crate::instance::{Course, Departure, Intent, RestartPolicy, Update};
use crate::store::ledger::{Entry, Version};

/// One instance as the plan sees it. Instances being worked on are left out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subject<'a> {
    /// What was promised.
    pub(super) entry: &'a Entry,
    /// Every container saying it belongs to this instance.
    pub(super) containers: &'a [Container],
    /// What a caller wants done once, whatever the state.
    pub(super) nudge: Option<Nudge>,
    /// Its server hangs, and is to be restarted now.
    pub(super) hung: bool,
    /// Its last attempt failed.
    pub(super) failing: bool,
    /// Not to be tried again by itself before this.
    pub(super) not_before: Option<Instant>,
    /// Its settings were put right and the engine shows others all the same: it can't have these, and is left alone.
    pub(super) adjusted: bool,
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
    /// The version `Fetch`, `Create`, `Await` and `Adjust` mean.
    pub(super) edition: Edition,
    /// The container that steps mean when they name none, unless `Create` makes another.
    pub(super) container: Option<ContainerId>,
    /// What is to be done.
    pub(super) steps: Vec<Step>,
    /// What is reached when all of it is done.
    pub(super) goal: Goal,
}

/// One of an instance's two versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Edition {
    /// The one that serves, or is to serve.
    Present,
    /// The one that is being tried.
    Next,
}

/// What a job is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// It runs.
    Running,
    /// It is stopped.
    Stopped,
    /// The next version has shown that it works.
    Updated,
    /// Nothing is left of the next version.
    Reverted,
    /// It was started anew because it hung. Whether it answers now is for the health check to see.
    Revived,
    /// What is in the way is gone, and what was changed from outside is as it was; the instance itself isn't touched.
    Tidy,
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
    /// Stop another container: the one whose place is taken.
    Retire(ContainerId),
    /// Give it the instance's name.
    Rename,
    /// Give it the limits and the restart policy of its spec.
    Adjust,
    /// Remove volumes.
    RemoveVolumes(Volumes),
}

/// What there is to do for one instance; nothing when it is as it should be, or has to wait.
pub(super) fn plan(subject: &Subject<'_>, now: Instant) -> Option<Job> {
    let job = match (&subject.entry.intent, subject.entry.update.as_deref()) {
        (Intent::Remove(departure), _) => Some(remove(subject, departure)),
        (Intent::Run | Intent::Stop, Some(update)) => match update.course {
            Course::Forth => Some(forth(subject)),
            Course::Back(_) => Some(back(subject, update)),
        },
        (Intent::Run, None) => keep(subject, |current| run(subject, current, now)),
        (Intent::Stop, None) => keep(subject, stop),
    };
    // A removal has to be tried again like everything else, but is never forgotten.
    let waits = subject.not_before.is_some_and(|at| now < at) && subject.nudge.is_none();
    job.filter(|_| !waits)
}

/// The container that is the instance, among those saying they belong to it: one made from its present spec, the liveliest first.
///
/// One that is to run has to be on its networks; otherwise it was left half made, or somebody has removed a network or changed what it is
/// connected to, and Docker can't always put it back. One that only waits to be stopped, removed or followed by a new version is kept.
pub(super) fn current<'a>(entry: &Entry, containers: &'a [Container]) -> Option<&'a Container> {
    let is_to_run = entry.intent == Intent::Run && entry.update.is_none();
    of_version(entry.present(), containers, is_to_run)
}

fn of_version<'a>(version: Version<'_>, containers: &'a [Container], is_to_run: bool) -> Option<&'a Container> {
    let links = Link::all_of(&version.spec.network);
    let rank = |container: &Container| match container.condition {
        Condition::Running { .. } => 0,
        Condition::Restarting(_) | Condition::Paused => 1,
        Condition::Exited(_) => 2,
        Condition::Created => 3,
        Condition::Removing | Condition::Dead => 4,
    };
    let fits = |container: &&Container| {
        &container.spec_hash == version.spec_hash
            // Labels of a lost ledger's containers may not have said.
            && container.deployment.is_none_or(|deployment| deployment == version.deployment)
            && !matches!(container.condition, Condition::Dead | Condition::Removing)
            && (!is_to_run || container.links == links)
    };
    containers.iter().filter(fits).min_by_key(|container| rank(container))
}

/// Removes every container but `kept`. One being removed by the engine can only be waited for.
fn discards(subject: &Subject<'_>, kept: &[Option<&Container>]) -> Vec<Step> {
    let kept: Vec<&ContainerId> = kept.iter().flatten().map(|container| &container.id).collect();
    let others = subject.containers.iter().filter(|container| !kept.contains(&&container.id));
    let others = others.filter(|container| container.condition != Condition::Removing);
    others.map(|container| Step::Discard(container.id.clone())).collect()
}

fn new_job(
    subject: &Subject<'_>,
    edition: Edition,
    container: Option<&Container>,
    steps: Vec<Step>,
    goal: Goal,
) -> Job {
    let container = container.map(|container| container.id.clone());
    Job { instance: subject.entry.spec.name.clone(), edition, container, steps, goal }
}

/// An instance that stays what it is. What is in the way goes before anything else, since it holds the name and the ports.
fn keep(subject: &Subject<'_>, wanted: impl FnOnce(Option<&Container>) -> Option<(Vec<Step>, Goal)>) -> Option<Job> {
    let current = current(subject.entry, subject.containers);
    let mut steps = discards(subject, &[current]);
    if let Some(current) = current {
        steps.extend(put_right(subject, current));
    }
    let (more, goal) = wanted(current).unwrap_or((Vec::new(), Goal::Tidy));
    steps.extend(more);
    (!steps.is_empty()).then(|| new_job(subject, Edition::Present, current, steps, goal))
}

/// What somebody changed about the container from outside.
fn put_right(subject: &Subject<'_>, current: &Container) -> Vec<Step> {
    let spec = &subject.entry.spec;
    let mut steps = Vec::new();
    if current.name != spec.name.as_str() {
        steps.push(Step::Rename);
    }
    if current.settings != Settings::of(spec) && !subject.adjusted {
        steps.push(Step::Adjust);
    }
    steps
}

fn run(subject: &Subject<'_>, current: Option<&Container>, now: Instant) -> Option<(Vec<Step>, Goal)> {
    let steps = match current.map(|container| &container.condition) {
        // The name is still held; the engine reports when it isn't.
        None if subject.containers.iter().any(|container| container.condition == Condition::Removing) => return None,
        None => vec![Step::Fetch, Step::Create, Step::Start, Step::Await],
        Some(Condition::Created) => vec![Step::Start, Step::Await],
        Some(Condition::Exited(exit)) => {
            let again = match subject.entry.spec.restart {
                RestartPolicy::UnlessStopped => true,
                // With an error it never started, and Docker doesn't try again: after a reboot its secrets weren't there, for one.
                RestartPolicy::OnFailure { .. } => exit.code != 0 && (subject.failing || !exit.error.is_empty()),
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
        Some(Condition::Running { .. }) if subject.hung && subject.entry.proven => {
            return Some((vec![Step::Restart], Goal::Revived));
        }
        // Docker starts it again by itself; looking is all there is to do, and only where the answer is still open.
        Some(Condition::Running { .. } | Condition::Restarting(_)) => {
            let due = subject.not_before.is_none_or(|at| now >= at) || subject.nudge.is_some();
            if subject.entry.proven && !(subject.failing && due) {
                return None;
            }
            vec![Step::Await]
        }
        // Somebody froze it, and it was promised to run.
        Some(Condition::Paused) => vec![Step::Start, Step::Await],
        // `current` never picks these.
        Some(Condition::Removing | Condition::Dead) => return None,
    };
    Some((steps, Goal::Running))
}

fn is_lively(container: &Container) -> bool {
    match container.condition {
        Condition::Running { .. } | Condition::Restarting(_) | Condition::Paused => true,
        Condition::Created | Condition::Exited(_) | Condition::Removing | Condition::Dead => false,
    }
}

fn stop(current: Option<&Container>) -> Option<(Vec<Step>, Goal)> {
    current.filter(|container| is_lively(container)).map(|_| (vec![Step::Stop], Goal::Stopped))
}

/// The next version is fetched and made while the old one serves; then they change places.
fn forth(subject: &Subject<'_>) -> Job {
    let old = current(subject.entry, subject.containers);
    let next = subject.entry.next().and_then(|version| of_version(version, subject.containers, true));
    let mut steps = discards(subject, &[old, next]);
    if next.is_none() {
        steps.extend([Step::Fetch, Step::Create]);
    }
    steps.extend(old.filter(|old| is_lively(old)).map(|old| Step::Retire(old.id.clone())));
    match next.map(|next| &next.condition) {
        Some(Condition::Running { .. } | Condition::Restarting(_)) => {}
        _ => steps.push(Step::Start),
    }
    steps.push(Step::Await);
    new_job(subject, Edition::Next, next, steps, Goal::Updated)
}

/// All the next version made is taken back. Then the instance is an ordinary one again.
fn back(subject: &Subject<'_>, update: &Update) -> Job {
    let old = current(subject.entry, subject.containers);
    let mut steps = discards(subject, &[old]);
    steps.extend(volumes_of(update));
    new_job(subject, Edition::Present, old, steps, Goal::Reverted)
}

fn volumes_of(update: &Update) -> Option<Step> {
    (!update.spec.volumes.is_empty()).then_some(Step::RemoveVolumes(Volumes::OfDeployment(update.deployment)))
}

fn remove(subject: &Subject<'_>, departure: &Departure) -> Job {
    let entry = subject.entry;
    let current = current(entry, subject.containers);
    let mut steps = discards(subject, &[current]);
    if let Some(current) = current {
        // A server that was asked for gets the chance to end in order; one that never worked doesn't.
        if matches!(departure, Departure::Asked { .. }) && matches!(current.condition, Condition::Running { .. }) {
            steps.push(Step::Stop);
        }
        steps.push(Step::Discard(current.id.clone()));
    }
    match departure {
        Departure::Asked { volumes: true, .. } => {
            steps.push(Step::RemoveVolumes(Volumes::OfInstance(entry.spec.name.clone())));
        }
        // What only a version had that never came to serve isn't kept.
        Departure::Asked { volumes: false, .. } => steps.extend(entry.update.as_deref().and_then(volumes_of)),
        Departure::Undone(_) if entry.spec.volumes.is_empty() => {}
        Departure::Undone(_) => steps.push(Step::RemoveVolumes(Volumes::OfDeployment(entry.deployment))),
    }
    new_job(subject, Edition::Present, current, steps, Goal::Gone)
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
