//! What instances that came together have to do with each other until they have run once. Pure; the loop calls it.

use std::collections::{BTreeMap, BTreeSet};

use dtma_api::InstanceName;

use crate::instance::{BatchId, Departure, Failure, FailureKind, Intent};
use crate::reconcile::handle::with_entry;
use crate::store::ledger::{Contents, Entry};

/// How many members of each batch are being brought up.
#[derive(Debug, Default)]
pub(super) struct AtWork(BTreeMap<BatchId, u32>);

impl AtWork {
    /// This one is, too.
    pub(super) fn count(&mut self, entry: &Entry) {
        if let Some(batch) = entry.batch.as_ref().filter(|_| is_new(entry)) {
            *self.0.entry(batch.id).or_default() += 1;
        }
    }

    /// Whether this one has to wait for those it came with.
    pub(super) fn holds_up(&self, entry: &Entry, contents: &Contents) -> bool {
        let Some(batch) = entry.batch.as_ref().filter(|_| is_new(entry)) else { return false };
        let same_batch = |other: &Entry| other.batch.as_ref().is_some_and(|theirs| theirs.id == batch.id);
        let awaited = batch.after.iter().filter_map(|name| contents.entries.get(name));
        awaited.into_iter().any(|other| same_batch(other) && !other.proven)
            || self.0.get(&batch.id).is_some_and(|count| *count >= batch.most_at_once)
    }
}

/// Its first deploy is under way.
fn is_new(entry: &Entry) -> bool {
    !entry.proven && entry.intent == Intent::Run
}

/// The ledger's contents after an instance's first deploy has failed: it is to go, and with it those that aren't to be there without it.
pub(super) fn undo(contents: &Contents, name: &InstanceName, failure: Failure) -> Contents {
    let Some(failed) = contents.entries.get(name) else { return contents.clone() };
    let reason = failure.message.clone();
    let mut undone = BTreeSet::from([name.clone()]);
    let mut changed = depart(contents.clone(), name, failure);
    let Some(batch) = failed.batch.clone() else { return changed };
    loop {
        let goes = |other: &&std::sync::Arc<Entry>| {
            let same_batch = |theirs: &crate::instance::Batch| {
                theirs.id == batch.id && (theirs.atomic || (!other.proven && !theirs.after.is_disjoint(&undone)))
            };
            !matches!(other.intent, Intent::Remove(_)) && other.batch.as_ref().is_some_and(same_batch)
        };
        let Some(next) = changed.entries.values().find(goes).map(|other| other.spec.name.clone()) else {
            return changed;
        };
        let kind = FailureKind::MemberFailed { member: name.clone() };
        let message = format!("{name}, without which it is not to be there, could not be deployed: {reason}");
        changed = depart(changed, &next, Failure::new(kind, message));
        undone.insert(next);
    }
}

fn depart(contents: Contents, name: &InstanceName, failure: Failure) -> Contents {
    let intent = Intent::Remove(Departure::Undone(failure));
    with_entry(&contents, name, |entry| entry.intent = intent).unwrap_or(contents)
}
