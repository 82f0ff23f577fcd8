//! Where callers leave what they want and the loop picks it up.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use dtma_api::InstanceName;
use tokio::sync::{Notify, OwnedMutexGuard, watch};
use tokio_util::sync::CancellationToken;

use super::calls::Calls;
use super::inside::Doors;
use super::journal::Journal;
use super::plan::Nudge;
use super::prune::Prune;
use super::residents::Residents;
use super::secrets::{Keeper, Secrets};
use super::status::Snapshot;
use super::usage::Samples;
use crate::disks::Disks;
use crate::egress::EgressProxy;
use crate::engine::Engine;
use crate::instance::RegistryCredentials;
use crate::store::ledger::{Contents, Ledger, LedgerError};

/// What handlers and the loop share.
pub(super) struct Shared {
    /// Held while the ledger is written, so that changes come one after the other.
    desk: Arc<tokio::sync::Mutex<Desk>>,
    /// Rung when intent has changed.
    pub(super) wake: Notify,
    pub(super) published: watch::Sender<Arc<Snapshot>>,
    pub(super) journal: Journal,
    pub(super) engine: Arc<dyn Engine>,
    pub(super) residents: Residents,
    pub(super) egress: EgressProxy,
    pub(super) doors: Doors,
    /// What callers are waiting for.
    pub(super) calls: Calls,
    pub(super) samples: Samples,
    /// Rung when there are new samples.
    pub(super) sampled: Notify,
    pub(super) disks: Arc<Disks>,
    pub(super) prune: Prune,
    pub(super) secrets: Keeper,
    write_problem: Mutex<Option<String>>,
}

/// Intent, and who waits for what.
#[derive(Debug)]
pub(super) struct Desk {
    ledger: Ledger,
    /// The requests for each instance. Numbers go up over all instances and are never used twice.
    tickets: BTreeMap<InstanceName, Tickets>,
    last_ticket: u64,
    nudges: BTreeMap<InstanceName, Nudge>,
    /// Only here: they are never written down.
    credentials: BTreeMap<InstanceName, Arc<RegistryCredentials>>,
}

/// Numbers of the requests for one instance, since it was accepted or since the agent started.
#[derive(Debug, Clone, Copy)]
struct Tickets {
    first: u64,
    last: u64,
}

impl Desk {
    pub(super) fn contents(&self) -> &Contents {
        self.ledger.contents()
    }

    /// See [`Ledger::commit`]: for what callers want.
    pub(super) fn commit(&mut self, contents: Contents) -> Result<(), LedgerError> {
        self.ledger.commit(contents)
    }

    /// See [`Ledger::note`]: for what has happened.
    pub(super) fn note(&mut self, contents: Contents) -> Result<(), LedgerError> {
        self.ledger.note(contents)
    }

    pub(super) fn is_saved(&self) -> bool {
        self.ledger.is_saved()
    }

    /// Gives a request its number; whoever made it waits until the loop has settled that number.
    pub(super) fn take_ticket(&mut self, name: &InstanceName) -> u64 {
        self.last_ticket += 1;
        let number = self.last_ticket;
        let tickets = self.tickets.entry(name.clone()).or_insert(Tickets { first: number, last: number });
        tickets.last = number;
        number
    }

    /// The last request's number; 0 when nobody has asked since the agent started.
    pub(super) fn ticket(&self, name: &InstanceName) -> u64 {
        self.tickets.get(name).map_or(0, |tickets| tickets.last)
    }

    /// The first request's number: earlier ones were for another instance that had the name before.
    pub(super) fn first_ticket(&self, name: &InstanceName) -> u64 {
        self.tickets.get(name).map_or(0, |tickets| tickets.first)
    }

    /// Nothing is left of an instance: forgets it and what was asked of it. The last request's number, and whether it was written down.
    ///
    /// All at once, so that whoever deploys the same name right after gets a number that isn't forgotten with the old ones.
    pub(super) fn forget(&mut self, name: &InstanceName) -> (u64, Result<(), LedgerError>) {
        let last = self.ticket(name);
        self.tickets.remove(name);
        self.nudges.remove(name);
        self.credentials.remove(name);
        let mut contents = self.contents().clone();
        contents.entries.remove(name);
        contents.with_credentials.remove(name);
        (last, self.note(contents))
    }

    /// Keeps an instance's registry credentials until it is forgotten or the agent ends. That there are some has to be in the ledger.
    pub(super) fn keep_credentials(&mut self, name: &InstanceName, credentials: RegistryCredentials) {
        self.credentials.insert(name.clone(), Arc::new(credentials));
    }

    /// An instance's registry credentials, if they are still known.
    pub(super) fn credentials(&self, name: &InstanceName) -> Option<Arc<RegistryCredentials>> {
        self.credentials.get(name).cloned()
    }

    /// Leaves a nudge. A restart that is wanted isn't taken back by a start.
    pub(super) fn nudge(&mut self, name: &InstanceName, nudge: Nudge) {
        if self.nudges.get(name) != Some(&Nudge::Restart) {
            self.nudges.insert(name.clone(), nudge);
        }
    }

    pub(super) fn nudge_for(&self, name: &InstanceName) -> Option<Nudge> {
        self.nudges.get(name).copied()
    }

    pub(super) fn take_nudge(&mut self, name: &InstanceName) {
        self.nudges.remove(name);
    }
}

impl Shared {
    pub(super) fn new(
        ledger: Ledger,
        engine: Arc<dyn Engine>,
        disks: Arc<Disks>,
        secrets: Secrets,
        shutdown: CancellationToken,
    ) -> Self {
        let residents = Residents::default();
        let desk = Desk {
            ledger,
            tickets: BTreeMap::new(),
            last_ticket: 0,
            nudges: BTreeMap::new(),
            credentials: BTreeMap::new(),
        };
        Self {
            desk: Arc::new(tokio::sync::Mutex::new(desk)),
            wake: Notify::new(),
            published: watch::Sender::new(Arc::new(Snapshot::default())),
            journal: Journal::new(),
            engine,
            egress: EgressProxy::new(residents.clone(), shutdown),
            residents,
            doors: Doors::new(),
            calls: Calls::default(),
            samples: Samples::default(),
            sampled: Notify::new(),
            disks,
            prune: Prune::new(),
            secrets: Keeper::new(secrets),
            write_problem: Mutex::new(None),
        }
    }

    pub(super) async fn desk(&self) -> OwnedMutexGuard<Desk> {
        Arc::clone(&self.desk).lock_owned().await
    }

    /// Lets `change` at the desk, off the async threads because it writes to the disk, and wakes the loop afterwards. A caller that goes
    /// away meanwhile changes nothing: what was begun is finished, and the loop is woken all the same.
    pub(super) async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        change: impl FnOnce(&mut Desk) -> T + Send + 'static,
    ) -> Result<T, LedgerError> {
        let mut desk = self.desk().await;
        let shared = Arc::clone(self);
        let work = tokio::task::spawn_blocking(move || {
            let result = change(&mut desk);
            drop(desk);
            shared.wake.notify_one();
            result
        });
        work.await.map_err(|error| LedgerError::Write(std::io::Error::other(error)))
    }

    /// Remembers that the ledger could not be written, until it can be again.
    pub(super) fn note_write_problem(&self, error: &LedgerError) {
        tracing::error!(error = error as &dyn std::error::Error, "the ledger was not written");
        *self.write_problem.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
    }

    pub(super) fn forget_write_problem(&self) {
        *self.write_problem.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn write_problem(&self) -> Option<String> {
        self.write_problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
