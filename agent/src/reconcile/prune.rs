//! Images that the agent brought and nobody needs any more: which they are, and taking them away.
//!
//! Images are no containers, so this is a task of its own beside the loop. What keeps the two apart is the desk: an image is condemned
//! while the desk is held and no entry names it; an entry that comes later finds the condemnation, and its job waits for its end before
//! it looks whether the image is there.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, MissedTickBehavior};

use super::Timing;
use super::desk::Shared;
use crate::disks::Room;
use crate::engine::{EngineError, HeldImage};
use crate::instance::ImageReference;
use crate::store::ledger::{Contents, PulledImage, StrangeEntry};

/// How often the disks are looked at.
const LOOK: Duration = Duration::from_secs(60);
/// How often images are looked through for old ones.
const ROUND: Duration = Duration::from_secs(3600);
/// How far behind the time an image was last used may be in the ledger, as a part of the age at which it goes: each step costs a write.
const STEPS: i64 = 14;

/// What pruning shares with the rest.
#[derive(Debug)]
pub(super) struct Prune {
    /// One round at a time.
    round: Mutex<()>,
    /// Names of the images that are being removed now.
    condemned: watch::Sender<BTreeSet<String>>,
    by_age: AtomicU64,
    for_room: AtomicU64,
}

/// How many images have been removed since the agent started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Because nobody had used them for long.
    pub by_age: u64,
    /// Because a disk was nearly full.
    pub for_room: u64,
}

impl Prune {
    pub(super) fn new() -> Self {
        Self {
            round: Mutex::new(()),
            condemned: watch::Sender::new(BTreeSet::new()),
            by_age: AtomicU64::new(0),
            for_room: AtomicU64::new(0),
        }
    }

    pub(super) fn counts(&self) -> Pruned {
        Pruned { by_age: self.by_age.load(Ordering::Relaxed), for_room: self.for_room.load(Ordering::Relaxed) }
    }

    /// Waits until nobody is removing the image called this.
    pub(super) async fn spared(&self, familiar: &str) {
        let mut condemned = self.condemned.subscribe();
        // The sender lives as long as this does.
        let _ = condemned.wait_for(|names| !names.contains(familiar)).await;
    }
}

/// Why images go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// Nobody has used them for this long.
    Age(SignedDuration),
    /// A disk is short: any that nobody uses now, the oldest first, until it isn't.
    Room,
}

/// An image that may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    id: String,
    /// What to remove, in order: its names, or its id when it has none.
    names: Vec<String>,
    /// Everything an entry could call it.
    called: BTreeSet<String>,
    last_used: Timestamp,
    bytes: u64,
}

/// What is to become of the images the agent brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Sorted {
    /// In use by nobody, the longest unused first.
    pub(super) unused: Vec<Candidate>,
    /// In use.
    pub(super) used: BTreeSet<String>,
    /// Gone, or somebody else's now.
    pub(super) lost: BTreeSet<String>,
}

/// Sorts the images the agent brought. Never names one that a container is made from, that an entry names, or that has a name the agent
/// did not give it.
pub(super) fn sort(contents: &Contents, held: &[HeldImage]) -> Sorted {
    let mut sorted = Sorted::default();
    let named = named(contents);
    for (id, record) in &contents.images {
        let Some(image) = held.iter().find(|image| &image.id == id) else {
            sorted.lost.insert(id.clone());
            continue;
        };
        // Not what it was once called: another image may have that name by now, and its user doesn't use this one.
        let called: BTreeSet<String> = image.tags.iter().chain(&image.digests).cloned().collect();
        if image.used || called.iter().any(|name| named.contains(name)) {
            sorted.used.insert(id.clone());
            continue;
        }
        let Some(names) = removable(image, record) else {
            sorted.lost.insert(id.clone());
            continue;
        };
        let (last_used, bytes) = (record.last_used, image.bytes);
        sorted.unused.push(Candidate { id: id.clone(), names, called, last_used, bytes });
    }
    sorted.unused.sort_by_key(|candidate| candidate.last_used);
    sorted
}

/// Names of all images that instances are promised, in both of their versions.
fn named(contents: &Contents) -> BTreeSet<String> {
    let versions = contents.entries.values().flat_map(|entry| [Some(entry.present()), entry.next()]);
    let strange = contents.strange.values().flat_map(StrangeEntry::images);
    let strange = strange.filter_map(|image| image.parse::<ImageReference>().ok());
    versions
        .flatten()
        .map(|version| version.spec.image.familiar())
        .chain(strange.map(|image| image.familiar()))
        .collect()
}

/// What has to be removed for an image to go; nothing when somebody else has a name for it. A digest under the name of a tag comes and goes
/// with the tag.
fn removable(image: &HeldImage, record: &PulledImage) -> Option<Vec<String>> {
    let ours = |name: &&String| record.references.contains(*name);
    if !image.tags.iter().all(|tag| ours(&tag)) {
        return None;
    }
    let repositories: BTreeSet<&str> = record.references.iter().filter_map(|name| repository(name)).collect();
    if !image.digests.iter().all(|name| repository(name).is_some_and(|own| repositories.contains(own))) {
        return None;
    }
    let names: Vec<String> = image.tags.iter().chain(image.digests.iter().filter(ours)).cloned().collect();
    Some(if names.is_empty() { vec![image.id.clone()] } else { names })
}

fn repository(name: &str) -> Option<&str> {
    match name.split_once('@') {
        Some((repository, _)) => Some(repository),
        None => name.rsplit_once(':').map(|(repository, _)| repository),
    }
}

impl Shared {
    /// The disk that is short, if one is; Docker is asked where its own is when that isn't known yet.
    pub(super) async fn short_disk(&self) -> Option<Room> {
        if self.disks.data_root().is_none()
            && let Ok(Some(folder)) = self.engine.data_root().await
        {
            self.disks.learn_data_root(folder);
        }
        self.disks.short()
    }

    /// Removes images until no disk is short, the longest unused first. How many that were.
    ///
    /// # Errors
    /// When the engine doesn't answer.
    pub(super) async fn make_room(self: &Arc<Self>) -> Result<usize, EngineError> {
        self.prune(Why::Room, SignedDuration::MAX).await
    }

    async fn prune(self: &Arc<Self>, why: Why, step: SignedDuration) -> Result<usize, EngineError> {
        let _round = self.prune.round.lock().await;
        // Looked at before anything else: what is recorded later isn't among these and so isn't taken for lost.
        let recorded = self.desk().await.contents().clone();
        if recorded.images.is_empty() {
            return Ok(0);
        }
        let held = self.engine.images().await?;
        let now = Timestamp::now();
        let sorted = sort(&recorded, &held);
        self.note_images(&sorted, now, step).await;
        let mut removed = 0;
        for candidate in sorted.unused {
            let due = match why {
                Why::Age(age) => now.duration_since(candidate.last_used) >= age,
                Why::Room => self.disks.short().is_some(),
            };
            if due && self.remove_image(&candidate).await {
                removed += 1;
                let count = if why == Why::Room { &self.prune.for_room } else { &self.prune.by_age };
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(removed)
    }

    /// Removes one image, unless an entry names it by now. Whether it is gone.
    async fn remove_image(self: &Arc<Self>, candidate: &Candidate) -> bool {
        {
            let desk = self.desk().await;
            let named = named(desk.contents());
            if candidate.called.iter().any(|name| named.contains(name)) {
                return false;
            }
            self.prune.condemned.send_modify(|condemned| condemned.extend(candidate.called.iter().cloned()));
        }
        let mut removed = true;
        for name in &candidate.names {
            if let Err(error) = self.engine.remove_image(name).await {
                // Somebody has begun to use it, most likely; the next round knows.
                tracing::warn!(
                    image = name,
                    error = &error as &dyn std::error::Error,
                    "an unused image was not removed"
                );
                removed = false;
                break;
            }
        }
        if removed {
            tracing::info!(
                image = candidate.id,
                names = ?candidate.names,
                last_used = %candidate.last_used,
                bytes = candidate.bytes,
                "removed an image that nobody uses"
            );
            let id = candidate.id.clone();
            self.note_quietly(move |contents| drop(contents.images.remove(&id))).await;
        }
        self.prune.condemned.send_modify(|condemned| condemned.retain(|name| !candidate.called.contains(name)));
        removed
    }

    /// Writes down which images were seen in use and which are gone. What is in use is only written down anew after `step`.
    async fn note_images(self: &Arc<Self>, sorted: &Sorted, now: Timestamp, step: SignedDuration) {
        let recorded = self.desk().await.contents().images.clone();
        let stale: BTreeSet<String> = recorded
            .iter()
            .filter(|(id, record)| sorted.used.contains(*id) && now.duration_since(record.last_used) >= step)
            .map(|(id, _)| id.clone())
            .collect();
        if stale.is_empty() && sorted.lost.is_empty() {
            return;
        }
        let lost = sorted.lost.clone();
        self.note_quietly(move |contents| {
            contents.images.retain(|id, _| !lost.contains(id));
            for (id, record) in &mut contents.images {
                if stale.contains(id) {
                    record.last_used = now;
                }
            }
        })
        .await;
    }

    /// Writes something down that is found out again should it be lost.
    pub(super) async fn note_quietly(self: &Arc<Self>, change: impl FnOnce(&mut Contents) + Send + 'static) {
        let noted = self
            .change(move |desk| {
                let mut contents = desk.contents().clone();
                change(&mut contents);
                desk.note(contents)
            })
            .await
            .and_then(|noted| noted);
        if let Err(error) = noted {
            self.note_write_problem(&error);
        }
    }
}

/// Looks after images and disks for as long as the agent runs.
pub(super) async fn watch(shared: Arc<Shared>, timing: Timing) {
    let age = SignedDuration::try_from(timing.image_max_age).unwrap_or(SignedDuration::MAX);
    let step = SignedDuration::from_secs(age.as_secs() / STEPS);
    let mut ticks = tokio::time::interval_at(Instant::now() + LOOK, LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut round_at = Instant::now();
    let mut was_short = false;
    loop {
        ticks.tick().await;
        if !shared.published.borrow().engine.reachable {
            continue;
        }
        let mut result = Ok(0);
        if Instant::now() >= round_at {
            // After every hour it may be another engine.
            if let Ok(Some(folder)) = shared.engine.data_root().await {
                shared.disks.learn_data_root(folder);
            }
            result = shared.prune(Why::Age(age), step).await;
            if result.is_ok() {
                round_at = Instant::now() + ROUND;
            }
        }
        let short = shared.short_disk().await;
        match &short {
            Some(room) if !was_short => tracing::warn!("a disk is nearly full: {room}"),
            None if was_short => tracing::info!("no disk is nearly full any more"),
            Some(_) | None => {}
        }
        was_short = short.is_some();
        if was_short && result.is_ok() {
            result = shared.make_room().await;
        }
        if let Err(error) = result {
            tracing::warn!(error = &error as &dyn std::error::Error, "images could not be looked through");
        }
    }
}

#[cfg(test)]
#[path = "prune/tests.rs"]
mod tests;
