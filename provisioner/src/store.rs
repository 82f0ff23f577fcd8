//! The seams to the database. [`sqlite`] is the one real adapter; every query the provisioner makes is a method here.

pub mod sqlite;

use std::collections::{BTreeMap, HashMap};

use async_trait::async_trait;
use dtma_api::environment::{EnvironmentEvent, EnvironmentStatus};
use dtma_api::id::AccountId;
use dtma_api::{AgentId, EnvironmentId, TokenHash};
use jiff::Timestamp;

use crate::environment::Environment;
use crate::rollout::{Preference, Rollout, RolloutId};

/// What the provisioner asks of its database. A write that answered is on disk.
#[async_trait]
pub trait Store: Send + Sync {
    /// Adds a new environment and its first event.
    ///
    /// # Errors
    /// [`InsertError::AccountTaken`] when the account has a live one.
    async fn insert(&self, environment: &Environment, event: &EnvironmentEvent) -> Result<(), InsertError>;

    /// Replaces the row if it still has the generation before `environment.generation`, and adds the event.
    ///
    /// # Errors
    /// [`ReplaceError::Changed`] when somebody else was quicker; nothing is written then.
    async fn replace(&self, environment: &Environment, event: Option<&EnvironmentEvent>) -> Result<(), ReplaceError>;

    /// One environment.
    ///
    /// # Errors
    /// When the database fails.
    async fn environment(&self, id: EnvironmentId) -> Result<Option<Environment>, StoreError>;

    /// The account's live environment, else the one that went last.
    ///
    /// # Errors
    /// When the database fails.
    async fn of_account(&self, account: &AccountId) -> Result<Option<Environment>, StoreError>;

    /// The environment whose present attempt has this enrolment token.
    ///
    /// # Errors
    /// When the database fails.
    async fn by_enrolment_token(&self, hash: TokenHash) -> Result<Option<Environment>, StoreError>;

    /// Those the loop has something to do for.
    ///
    /// # Errors
    /// When the database fails.
    async fn unsettled(&self) -> Result<Vec<Environment>, StoreError>;

    /// All that are not deprovisioned.
    ///
    /// # Errors
    /// When the database fails.
    async fn live(&self) -> Result<Vec<Environment>, StoreError>;

    /// Up to `limit` environments in order of creation, beginning after `after`, with one of `statuses` (any, when empty).
    ///
    /// # Errors
    /// When the database fails.
    async fn page(
        &self,
        statuses: &[EnvironmentStatus],
        after: Option<EnvironmentId>,
        limit: u32,
    ) -> Result<Vec<Environment>, StoreError>;

    /// How many there are in each status.
    ///
    /// # Errors
    /// When the database fails.
    async fn counts(&self) -> Result<BTreeMap<String, u64>, StoreError>;

    /// Events of one run after a sequence number, oldest first, at most 1,000.
    ///
    /// # Errors
    /// When the database fails.
    async fn events(&self, id: EnvironmentId, run: u32, after: i64)
    -> Result<Vec<(i64, EnvironmentEvent)>, StoreError>;

    /// Forgets events older than `before`.
    ///
    /// # Errors
    /// When the database fails.
    async fn forget_events(&self, before: Timestamp) -> Result<(), StoreError>;

    /// Whose an agent is, as far as it was told.
    ///
    /// # Errors
    /// When the database fails.
    async fn binding(&self, agent: &AgentId) -> Result<Option<Binding>, StoreError>;

    /// Writes down whose an agent is, in place of what was known.
    ///
    /// # Errors
    /// When the database fails.
    async fn bind(&self, agent: &AgentId, binding: &Binding, now: Timestamp) -> Result<(), StoreError>;

    /// Keeps the latest of each environment's heartbeats, all in one transaction.
    ///
    /// # Errors
    /// When the database fails; then none is kept.
    async fn keep_heartbeats(&self, heartbeats: &[StoredHeartbeat]) -> Result<(), StoreError>;

    /// The latest heartbeat.
    ///
    /// # Errors
    /// When the database fails.
    async fn heartbeat(&self, id: EnvironmentId) -> Result<Option<StoredHeartbeat>, StoreError>;

    /// The generation of what agents are told: one higher than before if `content` is not what it was.
    ///
    /// # Errors
    /// When the database fails.
    async fn settings_generation(&self, content: &str) -> Result<u64, StoreError>;

    /// Whether it can be written to.
    ///
    /// # Errors
    /// When it can't.
    async fn check(&self) -> Result<(), StoreError>;
}

/// What rollouts are kept in. A write that answered is on disk.
#[async_trait]
pub trait RolloutStore: Send + Sync {
    /// Adds a new rollout with its agents; false when another one is open.
    ///
    /// # Errors
    /// When the database fails.
    async fn add_rollout(&self, rollout: &Rollout) -> Result<bool, StoreError>;

    /// Writes how far a rollout is, and those of its agents that stand otherwise than before, all in one transaction.
    ///
    /// # Errors
    /// When the database fails; then nothing is written.
    async fn keep_rollout(&self, rollout: &Rollout, changed: &[EnvironmentId]) -> Result<(), StoreError>;

    /// The open rollout.
    ///
    /// # Errors
    /// When the database fails.
    async fn open_rollout(&self) -> Result<Option<Rollout>, StoreError>;

    /// The rollout completed last.
    ///
    /// # Errors
    /// When the database fails.
    async fn completed_rollout(&self) -> Result<Option<Rollout>, StoreError>;

    /// One rollout.
    ///
    /// # Errors
    /// When the database fails.
    async fn rollout(&self, id: RolloutId) -> Result<Option<Rollout>, StoreError>;

    /// The latest rollouts, the latest first, without their agents.
    ///
    /// # Errors
    /// When the database fails.
    async fn rollouts(&self, limit: u32) -> Result<Vec<Summary>, StoreError>;

    /// Every agent's latest heartbeat.
    ///
    /// # Errors
    /// When the database fails.
    async fn heartbeats(&self) -> Result<Vec<StoredHeartbeat>, StoreError>;

    /// What was decided about updates of single environments.
    ///
    /// # Errors
    /// When the database fails.
    async fn preferences(&self) -> Result<HashMap<EnvironmentId, Preference>, StoreError>;

    /// Writes down what was decided about one.
    ///
    /// # Errors
    /// When the database fails.
    async fn prefer(&self, id: EnvironmentId, preference: &Preference, now: Timestamp) -> Result<(), StoreError>;
}

/// A rollout whose agents are only counted.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// The rollout, without its agents.
    pub rollout: Rollout,
    /// How many agents stand how.
    pub counts: BTreeMap<String, usize>,
    /// How many agents are in each wave.
    pub sizes: BTreeMap<u32, usize>,
}

/// Whose an agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// Its account.
    pub account: AccountId,
    /// `false` when nobody said, so that it is its own account.
    pub owner_known: bool,
}

/// A heartbeat as it is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredHeartbeat {
    /// Whose.
    pub environment: EnvironmentId,
    /// When it came.
    pub received_at: Timestamp,
    /// The body, JSON.
    pub payload: String,
}

/// The database failed.
#[derive(Debug, thiserror::Error)]
#[error("database: {operation}")]
pub struct StoreError {
    /// What was being done.
    pub operation: &'static str,
    /// Whether it may do it later: it is locked, say, or its disk is full.
    pub passing: bool,
    /// Why it failed.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Why a row was not added.
#[derive(Debug, thiserror::Error)]
pub enum InsertError {
    /// The account has a live environment.
    #[error("the account has an environment")]
    AccountTaken,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a row was not replaced.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// It is not what the change was decided on.
    #[error("the environment has changed meanwhile")]
    Changed,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}
