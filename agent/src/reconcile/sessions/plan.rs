//! What to do about sessions' containers, from who wants one and what is there: a pure comparison.

use std::collections::{BTreeMap, BTreeSet};

use dtma_api::InstanceName;

use super::Wish;
use crate::engine::{Condition, Container, ContainerId};
use crate::instance::{SessionId, SessionOf};

/// Everything the plan sees. Only containers that say they are a session's are given to it, and it names no others.
#[derive(Debug, Clone, Copy)]
pub(in crate::reconcile) struct Subject<'a> {
    /// Who wants one.
    pub(in crate::reconcile) wishes: &'a [Wish],
    /// What is there.
    pub(in crate::reconcile) containers: &'a [Container],
    /// Sessions that are being worked on.
    pub(in crate::reconcile) under_way: &'a BTreeMap<SessionId, InstanceName>,
    /// Sessions of which something failed just now: not yet again.
    pub(in crate::reconcile) resting: &'a BTreeSet<SessionId>,
    /// The instances that are to run, each with its own container if it has one.
    pub(in crate::reconcile) hosts: &'a BTreeMap<InstanceName, ContainerId>,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::reconcile) enum Step {
    /// Make and start its container, like the instance's own one.
    Begin { session: SessionOf, like: ContainerId },
    /// Tell whoever has the session that it is over.
    Over { session: SessionId, why: String },
    /// Stop a container, if it runs, and remove it.
    Remove { session: SessionOf, container: ContainerId, runs: bool },
}

pub(in crate::reconcile) fn plan(subject: &Subject<'_>) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut kept = BTreeSet::new();
    let mut taken = taken(subject);
    for wish in subject.wishes {
        let session = wish.session;
        if subject.under_way.contains_key(&session) {
            kept.insert(session);
            continue;
        }
        let there = of(session, subject.containers);
        let over = if subject.hosts.get(&wish.instance) == Some(&wish.beside) {
            there.map_or_else(|| wish.container.as_ref().map(|_| "its container was removed".to_owned()), ended)
        } else {
            Some("the instance was stopped, updated or removed".to_owned())
        };
        if let Some(why) = over {
            steps.push(Step::Over { session, why });
            continue;
        }
        kept.insert(session);
        if there.is_none() {
            let taken = taken.entry(&wish.instance).or_default();
            if wish.most.is_none_or(|most| *taken < usize::from(most)) {
                *taken += usize::from(wish.most.is_some());
                let session = SessionOf { id: session, instance: wish.instance.clone() };
                steps.push(Step::Begin { session, like: wish.beside.clone() });
            }
        }
    }
    for container in subject.containers {
        let Some(session) = &container.session else { continue };
        let waits = kept.contains(&session.id)
            || subject.under_way.contains_key(&session.id)
            || subject.resting.contains(&session.id)
            || container.condition == Condition::Removing;
        if !waits {
            let runs = match container.condition {
                Condition::Running { .. } | Condition::Paused | Condition::Restarting(_) => true,
                Condition::Created | Condition::Exited(_) | Condition::Removing | Condition::Dead => false,
            };
            steps.push(Step::Remove { session: session.clone(), container: container.id.clone(), runs });
        }
    }
    steps
}

/// How many containers of clients' sessions each instance has, those that are being made included.
fn taken<'a>(subject: &Subject<'a>) -> BTreeMap<&'a InstanceName, usize> {
    let mut sessions: BTreeMap<SessionId, &InstanceName> =
        subject.under_way.iter().map(|(session, instance)| (*session, instance)).collect();
    let there = subject.containers.iter().filter_map(|container| container.session.as_ref());
    sessions.extend(there.map(|session| (session.id, &session.instance)));
    for wish in subject.wishes.iter().filter(|wish| wish.most.is_none()) {
        sessions.remove(&wish.session);
    }
    let mut taken: BTreeMap<&InstanceName, usize> = BTreeMap::new();
    for instance in sessions.into_values() {
        *taken.entry(instance).or_default() += 1;
    }
    taken
}

fn of(session: SessionId, containers: &[Container]) -> Option<&Container> {
    containers.iter().find(|container| container.session.as_ref().is_some_and(|of| of.id == session))
}

/// Why a container that was made for a session is of no use to it any more. One that somebody froze is left frozen: they had a reason, and
/// the session ends like any that nobody uses.
fn ended(container: &Container) -> Option<String> {
    match &container.condition {
        Condition::Running { .. } | Condition::Paused => None,
        Condition::Exited(exit) | Condition::Restarting(exit) => {
            let memory = if exit.out_of_memory { ", because it used up its memory limit" } else { "" };
            Some(format!("its process ended with exit code {}{memory}", exit.code))
        }
        Condition::Created | Condition::Removing | Condition::Dead => Some("its container was removed".to_owned()),
    }
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
