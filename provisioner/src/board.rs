//! The one way to change an environment: decide on the row as it is, commit against its generation, then publish.
//!
//! Nothing is published that isn't committed. Whoever waits is told only *that* something changed, and reads what.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use dtma_api::EnvironmentId;
use dtma_api::environment::EnvironmentEvent;
use dtma_api::id::AccountId;
use jiff::Timestamp;
use tokio::sync::{Notify, watch};
use uuid::Uuid;

use crate::environment::{Change, DropletSpec, Environment};
use crate::roll::Roll;
use crate::store::{InsertError, ReplaceError, Store, StoreError};

/// A change is decided anew this often when others are quicker; more would mean that something writes in a loop.
const DECISIONS: usize = 50;

/// The rows, and those who watch them.
pub struct Board {
    store: Arc<dyn Store>,
    roll: Roll,
    watched: Mutex<HashMap<EnvironmentId, watch::Sender<u64>>>,
    work: Notify,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError<E> {
    /// Whoever decided said no.
    #[error("refused")]
    Refused(E),
    /// There is no such environment.
    #[error("there is no such environment")]
    Missing,
    /// Others kept being quicker.
    #[error("the environment keeps changing")]
    Contended,
    /// The database failed.
    #[error(transparent)]
    Store(StoreError),
}

impl Board {
    /// Reads the live rows, so that their agents may report.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn open(store: Arc<dyn Store>, now: Timestamp) -> Result<Self, StoreError> {
        let roll = Roll::default();
        for environment in store.live().await? {
            roll.note(&environment, now);
        }
        Ok(Self { store, roll, watched: Mutex::default(), work: Notify::new() })
    }

    /// The database, for reading.
    pub fn store(&self) -> &dyn Store {
        self.store.as_ref()
    }

    /// Who may report.
    pub fn roll(&self) -> &Roll {
        &self.roll
    }

    /// Resolves when something has changed that the loop may have to act on.
    pub async fn work(&self) {
        self.work.notified().await;
    }

    /// Adds an environment for an account that has none; false when it has one by now.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn admit(&self, account: &AccountId, spec: DropletSpec, now: Timestamp) -> Result<bool, StoreError> {
        let environment = Environment::new(EnvironmentId(Uuid::now_v7()), account.clone(), spec, now);
        let event = EnvironmentEvent {
            at: now,
            status: environment.state.status(),
            phase: None,
            message: "Asked for.".to_owned(),
        };
        match self.store.insert(&environment, &event).await {
            Ok(()) => {
                self.publish(&environment, Some(&event), now);
                Ok(true)
            }
            Err(InsertError::AccountTaken) => Ok(false),
            Err(InsertError::Store(error)) => Err(error),
        }
    }

    /// Makes the change `decide` asks for, deciding anew whenever the row changed meanwhile. Answers with the row as it then is, and
    /// whether it was changed.
    ///
    /// # Errors
    /// When there is no such row, `decide` refuses, or the database fails.
    pub async fn try_change<E: Send>(
        &self,
        id: EnvironmentId,
        now: Timestamp,
        decide: impl Fn(&Environment) -> Result<Option<Change>, E> + Send + Sync,
    ) -> Result<(Environment, bool), ChangeError<E>> {
        for _ in 0..DECISIONS {
            let found = self.store.environment(id).await.map_err(ChangeError::Store)?;
            let environment = found.ok_or(ChangeError::Missing)?;
            let Some(change) = decide(&environment).map_err(ChangeError::Refused)? else {
                return Ok((environment, false));
            };
            let (next, event) = environment.changed(change, now);
            match self.store.replace(&next, event.as_ref()).await {
                Ok(()) => {
                    self.publish(&next, event.as_ref(), now);
                    return Ok((next, true));
                }
                Err(ReplaceError::Changed) => {}
                Err(ReplaceError::Store(error)) => return Err(ChangeError::Store(error)),
            }
        }
        Err(ChangeError::Contended)
    }

    /// [`Self::try_change`] for decisions that never refuse.
    ///
    /// # Errors
    /// When there is no such row or the database fails.
    pub async fn change(
        &self,
        id: EnvironmentId,
        now: Timestamp,
        decide: impl Fn(&Environment) -> Option<Change> + Send + Sync,
    ) -> Result<(Environment, bool), ChangeError<Infallible>> {
        self.try_change(id, now, |environment| Ok(decide(environment))).await
    }

    /// Told of every change of one environment from now on: subscribe, then read, and no change is missed.
    pub fn watch(&self, id: EnvironmentId) -> watch::Receiver<u64> {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.entry(id).or_insert_with(|| watch::channel(0).0).subscribe()
    }

    fn publish(&self, environment: &Environment, event: Option<&EnvironmentEvent>, now: Timestamp) {
        if let Some(event) = event {
            tracing::info!(
                environment = %environment.id,
                account = %environment.account,
                droplet = environment.state.droplet().map(|droplet| droplet.0),
                status = event.status.as_str(),
                phase = event.phase,
                message = event.message,
                "environment"
            );
        }
        self.roll.note(environment, now);
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(entry) = watched.entry(environment.id) {
            // Nobody left to tell: forget the channel. Subscribing takes the same lock.
            if entry.get().receiver_count() == 0 {
                entry.remove();
            } else {
                entry.get().send_modify(|generation| *generation = (*generation).max(environment.generation));
            }
        }
        drop(watched);
        self.work.notify_one();
    }
}
