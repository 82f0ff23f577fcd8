//! Looking at servers, beside the loop and bounded: probes, and the last lines of those that keep ending.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use dtma_api::InstanceName;
use futures_util::StreamExt as _;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::timeout;

use super::supervisor::Due;
use crate::engine::{ContainerId, Engine, LogOptions};
use crate::reconcile::{Answer, ProbeFailure, Prober};

/// Looks that are made side by side.
const SIDE_BY_SIDE: usize = 8;
/// What a prober may take beyond the patience it is told: its farewell.
const OVERTIME: Duration = Duration::from_secs(5);
/// Lines that are kept of a process that keeps ending, and characters of each.
const LINES: u32 = 20;
const LINE: usize = 200;
/// Longest time reading them may take.
const READING: Duration = Duration::from_secs(5);

/// What was found.
#[derive(Debug)]
pub(in crate::reconcile) enum Found {
    Probed { instance: InstanceName, round: u64, answer: Result<Answer, ProbeFailure> },
    Words { instance: InstanceName, container: ContainerId, lines: Vec<String> },
}

/// The looks under way. They end with it.
#[derive(Debug)]
pub(in crate::reconcile) struct Looks {
    under_way: JoinSet<Found>,
    /// The probes among them, for when one breaks off.
    probes: HashMap<Id, (InstanceName, u64)>,
    permits: Arc<Semaphore>,
}

impl Looks {
    pub(in crate::reconcile) fn new() -> Self {
        Self { under_way: JoinSet::new(), probes: HashMap::new(), permits: Arc::new(Semaphore::new(SIDE_BY_SIDE)) }
    }

    pub(in crate::reconcile) fn probe(&mut self, instance: &InstanceName, due: Due, prober: &Arc<dyn Prober>) {
        let Due { round, at, question } = due;
        let (name, prober) = (instance.clone(), Arc::clone(prober));
        let look = async move {
            // A prober that doesn't keep its word must not take the probes' places for ever.
            let answer = timeout(question.patience + OVERTIME, prober.probe(&at, question)).await;
            let answer = answer.unwrap_or(Ok(Answer::CannotSay));
            Found::Probed { instance: name, round, answer }
        };
        let handle = self.spawn(look);
        self.probes.insert(handle.id(), (instance.clone(), round));
    }

    pub(in crate::reconcile) fn last_lines(
        &mut self,
        instance: &InstanceName,
        container: ContainerId,
        engine: &Arc<dyn Engine>,
    ) {
        let (instance, engine) = (instance.clone(), Arc::clone(engine));
        self.spawn(async move {
            let options = LogOptions { tail: Some(LINES), ..LogOptions::default() };
            let lines = engine.logs(&container, options).take(LINES as usize);
            let lines = lines.filter_map(|line| std::future::ready(line.ok()));
            let lines = lines.map(|line| line.message.chars().take(LINE).collect::<String>()).collect();
            // That they can't be had must not hide why they were wanted.
            let lines = timeout(READING, lines).await.unwrap_or_default();
            Found::Words { instance, container, lines }
        });
    }

    fn spawn(&mut self, look: impl Future<Output = Found> + Send + 'static) -> AbortHandle {
        let permits = Arc::clone(&self.permits);
        self.under_way.spawn(async move {
            // It is never closed.
            let _permit = permits.acquire().await;
            look.await
        })
    }

    /// What is found next; none when nothing is under way. Cancel-safe.
    pub(in crate::reconcile) async fn next(&mut self) -> Option<Found> {
        loop {
            match self.under_way.join_next_with_id().await? {
                Ok((id, found)) => {
                    self.probes.remove(&id);
                    return Some(found);
                }
                Err(error) => {
                    tracing::error!(error = &error as &dyn std::error::Error, "a look at a server broke off");
                    // A fault of the agent says nothing about the server.
                    if let Some((instance, round)) = self.probes.remove(&error.id()) {
                        return Some(Found::Probed { instance, round, answer: Ok(Answer::CannotSay) });
                    }
                }
            }
        }
    }
}
