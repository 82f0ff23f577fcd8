//! What the instances use, sampled in the background for lists and heartbeats. Nobody ever waits for it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dtma_api::usage::ResourceUsage;
use futures_util::{StreamExt as _, stream};
use tokio::time::{MissedTickBehavior, timeout};

use super::desk::Shared;
use crate::engine::{ContainerId, Usage};

/// How many containers are read side by side.
const SIDE_BY_SIDE: usize = 4;
/// Longest time a reading may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The last sample of every running container.
#[derive(Debug, Default)]
pub(super) struct Samples(Mutex<BTreeMap<ContainerId, (Usage, ResourceUsage)>>);

impl Samples {
    pub(super) fn of(&self, container: &ContainerId) -> Option<ResourceUsage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(container).map(|(_, shown)| shown.clone())
    }

    fn before(&self, container: &ContainerId) -> Option<Usage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(container).map(|(usage, _)| usage.clone())
    }

    fn replace(&self, samples: BTreeMap<ContainerId, (Usage, ResourceUsage)>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = samples;
    }
}

/// Samples over and over, and rings when there is something new to publish.
pub(super) async fn watch(shared: Arc<Shared>, every: Duration) {
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let running: Vec<ContainerId> = {
            let snapshot = shared.published.borrow();
            let running = snapshot.instances.iter().filter(|view| view.status == "running");
            let known = running.filter_map(|view| snapshot.known.get(&view.instance_name_on_toolbox));
            known.filter_map(|known| known.container.clone()).collect()
        };
        let samples: BTreeMap<_, _> = stream::iter(running)
            .map(|container| sample(&shared, container))
            .buffer_unordered(SIDE_BY_SIDE)
            .filter_map(std::future::ready)
            .collect()
            .await;
        let any = !samples.is_empty();
        shared.samples.replace(samples);
        if any {
            shared.sampled.notify_one();
        }
    }
}

/// Nothing when it doesn't run any more, or its engine doesn't tell in time: the loop itself notices such things.
async fn sample(shared: &Shared, container: ContainerId) -> Option<(ContainerId, (Usage, ResourceUsage))> {
    let usage = timeout(PATIENCE, shared.engine.usage(&container)).await.ok()?.ok()??;
    let shown = usage.shown(shared.samples.before(&container).as_ref());
    Some((container, (usage, shown)))
}
