//! Publishing: what is known becomes what callers are told.

use std::collections::BTreeMap;
use std::sync::Arc;

use dtma_api::instance::Health;
use jiff::Timestamp;
use tokio::time::Instant;

use super::plan;
use super::run::{Loop, Track};
use super::status::{Facts, Known, Snapshot};
use crate::engine::{Condition, Container};
use crate::instance::{Failure, FailureKind, Intent, RestartPolicy, State};
use crate::store::ledger::Entry;

impl Loop {
    pub(super) async fn publish(&mut self) {
        let (contents, first) = {
            let desk = self.shared.desk().await;
            let contents = desk.contents().clone();
            let first: BTreeMap<_, _> =
                contents.entries.keys().map(|name| (name.clone(), desk.first_ticket(name))).collect();
            (contents, first)
        };
        let now = Timestamp::now();
        let none = Track::default();
        let mut known = BTreeMap::new();
        let mut instances = Vec::with_capacity(contents.entries.len());
        self.shared.residents.keep(|name| contents.entries.contains_key(name));
        for (name, entry) in &contents.entries {
            let track = self.tracks.get(name).unwrap_or(&none);
            let containers = self.observed.get(name).map_or(&[][..], Vec::as_slice);
            let container = plan::current(entry, containers);
            // Of what is being worked on, the work knows more.
            if track.job.is_none() && !track.unsure {
                self.shared.residents.settle(name, entry, containers);
            }
            let state = match state(entry, container, track, now) {
                // After a start without an engine nothing has been seen yet, and nothing can be done.
                State::Accepted if !self.engine_status.reachable => {
                    let failure = Failure::new(FailureKind::EngineFailed, "the Docker Engine does not answer");
                    State::Failed { failure, retry_at: None }
                }
                state => state,
            };
            let busy = track.job.as_ref().is_some_and(|underway| underway.state.is_some());
            let (health, health_reason) = match &state {
                State::Probing => (Health::Starting, None),
                _ if busy => (Health::Unknown, None),
                state => track.health(matches!(state, State::Running | State::Failed { .. }), Instant::now()),
            };
            let problem = self.shared.secrets.problem(&entry.deployment);
            let facts = Facts {
                entry,
                container,
                state: &state,
                health,
                health_reason: problem.or(health_reason),
                last_probe_at: track.supervisor.last_probe_at(),
                crash_looping: track.crashes.is_looping(),
                revivals: track.supervisor.restarts(),
                usage: container.and_then(|container| self.shared.samples.of(&container.id)),
                sessions: self.sessions.count(name),
            };
            instances.push(facts.view());
            let upstream = facts.upstream();
            known.insert(
                name.clone(),
                Known {
                    first: first.get(name).copied().unwrap_or(0),
                    asked: track.asked,
                    settled: track.settled,
                    failure: track.failure.clone(),
                    account_tool_instance_id: entry.spec.account_tool_instance_id.clone(),
                    container: container.map(|container| container.id.clone()),
                    upstream,
                    mcp: entry.spec.mcp.is_some(),
                    membership: (entry.spec.group.clone(), entry.spec.network.group.is_some()),
                    last_update: entry.last_update.clone(),
                    server: track.supervisor.introduction().cloned(),
                    state,
                },
            );
        }
        let snapshot = Snapshot {
            instances,
            complete: !self.recover,
            engine: self.engine_status.clone(),
            pass: self.report.clone(),
            health: self.health_counts,
            known,
            departed: self.departed.clone(),
        };
        self.shared.published.send_replace(Arc::new(snapshot));
    }
}

/// Where an instance stands.
fn state(entry: &Entry, container: Option<&Container>, track: &Track, now: Timestamp) -> State {
    if let Some(state) = track.job.as_ref().and_then(|underway| underway.state.clone()) {
        return state;
    }
    let failed = |failure: &Failure| State::Failed {
        failure: failure.clone(),
        retry_at: track.not_before.and_then(|at| {
            let left = jiff::SignedDuration::try_from(at.saturating_duration_since(Instant::now())).ok()?;
            now.checked_add(left).ok()
        }),
    };
    let condition = container.map(|container| &container.condition);
    match (&entry.intent, condition, &track.failure) {
        (Intent::Remove(_), _, _) => State::Removing,
        (Intent::Run | Intent::Stop, _, None) if entry.update.is_some() => State::Updating,
        (Intent::Stop, _, Some(failure)) | (Intent::Run, _, Some(failure)) => failed(failure),
        (Intent::Stop, Some(Condition::Running { .. } | Condition::Restarting(_) | Condition::Paused), None) => {
            State::Stopping
        }
        (Intent::Stop, _, None) => State::Stopped,
        (Intent::Run, Some(Condition::Running { .. }), None) if entry.proven => State::Running,
        (Intent::Run, Some(Condition::Running { .. }), None) => State::Probing,
        (Intent::Run, Some(Condition::Paused), None) => {
            let message = "its process was paused, and not by the agent; it is woken";
            failed(&Failure::new(FailureKind::NotAnswering, message))
        }
        (Intent::Run, Some(Condition::Restarting(_)), None) => State::Restarting,
        (Intent::Run, Some(Condition::Exited(exit)), None) if entry.spec.restart != RestartPolicy::UnlessStopped => {
            let kind = FailureKind::Exited { code: Some(exit.code) };
            let message =
                format!("its process ended with exit code {}, and its restart policy leaves it so", exit.code);
            failed(&Failure::new(kind, message))
        }
        (Intent::Run, _, None) => State::Accepted,
    }
}
