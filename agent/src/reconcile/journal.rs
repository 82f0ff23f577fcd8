//! What happened, for whoever watches: the last events, and those to come.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use dtma_api::InstanceName;
use dtma_api::instance::{InstanceEvent, Progress};
use jiff::Timestamp;
use tokio::sync::broadcast;

/// How many events are kept for those who come late. About 50 KB.
const KEPT: usize = 200;
/// How far a watcher may fall behind before it misses some.
const DEPTH: usize = 256;

/// The agent's events.
#[derive(Debug)]
pub(super) struct Journal {
    recent: Mutex<Recent>,
    watchers: broadcast::Sender<InstanceEvent>,
}

#[derive(Debug, Default)]
struct Recent {
    next: u64,
    events: VecDeque<InstanceEvent>,
}

impl Journal {
    pub(super) fn new() -> Self {
        Self { recent: Mutex::default(), watchers: broadcast::Sender::new(DEPTH) }
    }

    /// Writes one event down and tells the watchers.
    pub(super) fn write(&self, instance: &InstanceName, event: &str, message: impl Into<String>) {
        self.add(instance, event, message.into(), None);
    }

    /// Tells how far a pull is. The latest replaces the one before it among the kept events, so that a long pull doesn't push out
    /// everything else.
    pub(super) fn pulling(&self, instance: &InstanceName, message: String, progress: Progress) {
        self.add(instance, "pulling", message, Some(progress));
    }

    fn add(&self, instance: &InstanceName, event: &str, message: String, progress: Option<Progress>) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let event = InstanceEvent {
            at: Timestamp::now(),
            sequence: recent.next,
            instance_name_on_toolbox: instance.clone(),
            event: event.to_owned(),
            message,
            progress,
        };
        recent.next += 1;
        if progress.is_some() {
            recent.events.retain(|old| old.progress.is_none() || &old.instance_name_on_toolbox != instance);
        } else {
            tracing::info!(instance = %instance, event = event.event, "{}", event.message);
        }
        if recent.events.len() == KEPT {
            recent.events.pop_front();
        }
        recent.events.push_back(event.clone());
        // Sent under the lock, so that a new watcher gets every event exactly once. An error only means that nobody watches.
        let _ = self.watchers.send(event);
    }

    /// The kept events, oldest first, and all that come after them.
    pub(super) fn watch(&self) -> (Vec<InstanceEvent>, broadcast::Receiver<InstanceEvent>) {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        (recent.events.iter().cloned().collect(), self.watchers.subscribe())
    }
}
