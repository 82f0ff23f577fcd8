//! Looking at the engine: what is there, and what has changed there without the loop's doing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dtma_api::InstanceName;
use futures_util::StreamExt as _;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::recover;
use super::run::Loop;
use crate::engine::{Condition, Container, Engine, EngineError};

/// Longest pause between two attempts to reach an engine that doesn't answer.
const MISSED_PAUSE_MAX: u32 = 5;

impl Loop {
    /// Looks at every container of ours. An engine that doesn't answer leaves what was seen last as it is.
    pub(super) async fn observe(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut look = Box::pin(look(Arc::clone(&self.engine), !self.engine_status.reachable));
        let looked = loop {
            tokio::select! {
                looked = &mut look => break looked,
                // An engine that is just starting takes its time to answer. What is accepted meanwhile can be found all the same; work on
                // it begins with the rest of this pass.
                () = shared.wake.notified() => self.publish().await,
            }
        };
        match looked {
            Ok((version, containers)) => {
                let (sessions, containers): (Vec<_>, Vec<_>) =
                    containers.into_iter().partition(|container| container.session.is_some());
                self.keeping.merge(sessions);
                if let Some(version) = version {
                    tracing::info!(version, "the container engine answers");
                    self.engine_status.version = Some(version);
                }
                self.missed = 0;
                self.engine_status.error = None;
                self.engine_status.reachable = true;
                self.observe_at = Instant::now() + self.timing.observe_every;
                if self.recover {
                    self.recover(&containers).await;
                }
                self.merge(containers);
                self.save_what_is_not().await;
            }
            Err(error) => {
                if self.engine_status.reachable || self.missed == 0 {
                    tracing::error!(error = &error as &dyn std::error::Error, "the container engine does not answer");
                }
                self.missed = (self.missed + 1).min(MISSED_PAUSE_MAX);
                self.engine_status.reachable = false;
                self.engine_status.error = Some(error.to_string());
                self.observe_at = Instant::now() + Duration::from_secs(self.missed.into());
            }
        }
    }

    async fn recover(&mut self, containers: &[Container]) {
        let recovered = recover::contents(&*self.engine, containers, jiff::Timestamp::now()).await;
        let Ok(recovered) = recovered else {
            // The engine went away in the middle; the next look tries again.
            self.engine_status.reachable = false;
            self.observe_at = Instant::now() + Duration::from_secs(1);
            return;
        };
        if !recovered.entries.is_empty() || !recovered.unreadable.is_empty() {
            tracing::warn!(
                recovered = recovered.entries.len(),
                unreadable = recovered.unreadable.len(),
                "there was no usable ledger: instances were taken over from their containers' labels"
            );
        }
        for name in recovered.entries.keys() {
            self.shared.journal.write(name, "recovered", "taken over from its container's labels: the ledger was lost");
        }
        self.recover = false;
        if self.shared.desk().await.contents() != &recovered {
            self.note(move |contents| *contents = recovered).await;
        }
    }

    /// What was seen replaces what was known, except for instances being worked on: of those, this look may have seen a middle.
    fn merge(&mut self, containers: Vec<Container>) {
        let mut seen: BTreeMap<InstanceName, Vec<Container>> = BTreeMap::new();
        self.nameless.clear();
        for container in containers {
            match container.instance.clone() {
                Some(name) => seen.entry(name).or_default().push(container),
                None => self.nameless.push(container),
            }
        }
        for (name, track) in &mut self.tracks {
            if track.job.is_some() {
                seen.remove(name);
                if let Some(known) = self.observed.remove(name) {
                    seen.insert(name.clone(), known);
                }
                continue;
            }
            track.unsure = false;
            let (before, after) = (self.observed.get(name), seen.get(name));
            let changes = changes(before.map_or(&[], Vec::as_slice), after.map_or(&[], Vec::as_slice));
            for (event, message) in changes {
                self.shared.journal.write(name, event, message);
            }
        }
        self.observed = seen;
    }
}

/// The engine's version, when it is wanted, and every container of ours.
async fn look(engine: Arc<dyn Engine>, anew: bool) -> Result<(Option<String>, Vec<Container>), EngineError> {
    let version = if anew { Some(engine.version().await?) } else { None };
    Ok((version, engine.list().await?))
}

/// What happened to an instance's containers between two looks.
fn changes(before: &[Container], after: &[Container]) -> Vec<(&'static str, String)> {
    let mut changes = Vec::new();
    for old in before {
        let Some(new) = after.iter().find(|new| new.id == old.id) else {
            changes.push(("vanished", "its container was removed, and not by the agent".to_owned()));
            continue;
        };
        match (&old.condition, &new.condition) {
            (Condition::Running { .. }, Condition::Exited(exit) | Condition::Restarting(exit)) => {
                let memory = if exit.out_of_memory { ", out of memory" } else { "" };
                changes.push(("exited", format!("its process ended with exit code {}{memory}", exit.code)));
            }
            (Condition::Running { since: old_since }, Condition::Running { since }) if since != old_since => {
                changes.push(("exited", "its process ended, and Docker started it again".to_owned()));
            }
            (Condition::Running { .. }, Condition::Paused) => {
                changes.push(("paused", "its process was paused, and not by the agent".to_owned()));
            }
            (Condition::Exited(_) | Condition::Restarting(_) | Condition::Paused, Condition::Running { .. }) => {
                changes.push(("running", "its process runs again".to_owned()));
            }
            _ => {}
        }
    }
    changes
}

/// Rings whenever the engine reports a change, and whenever the reports may have had a gap.
pub(super) async fn watch(engine: Arc<dyn Engine>, changed: Arc<Notify>) {
    loop {
        let mut changes = engine.changes();
        while let Some(Ok(())) = changes.next().await {
            changed.notify_one();
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        changed.notify_one();
    }
}
