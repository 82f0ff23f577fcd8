//! The rollout under way: watches what agents report, commits each step of it, and only then has them told.
//!
//! Everything that matters is in the database; what is here is made from it at the start and after every commit. Heartbeats look into a
//! table in memory and are never kept waiting.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use dtma_api::EnvironmentId;
use dtma_release::Version;
use jiff::Timestamp;
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::board::Board;
use crate::metrics::Metrics;
use crate::releases::{NoRelease, Releases};
use crate::roll::Member;
use crate::rollout::{
    Candidate, Impossible, LeftOut, Orders, Preference, Report, Rollout, RolloutId, Seen, Status, Step, Terms,
};
use crate::store::{RolloutStore, StoreError, Summary};

/// Of the list of rollouts at most.
const LISTED: u32 = 100;

/// How often a rollout is looked at.
#[derive(Debug, Clone)]
pub struct RolloutPace {
    /// Between two looks at an open one.
    pub tick: Duration,
    /// Between two looks because of news: heartbeats bring many at once.
    pub gap: Duration,
    /// Between two looks when there is none.
    pub idle: Duration,
}

impl Default for RolloutPace {
    fn default() -> Self {
        Self { tick: Duration::from_secs(1), gap: Duration::from_millis(200), idle: Duration::from_secs(30) }
    }
}

/// What rollouts work with.
pub struct RolloutParts {
    /// Where they are kept.
    pub store: Arc<dyn RolloutStore>,
    /// Whose agents there are, and what they report.
    pub board: Arc<Board>,
    /// What can be rolled out.
    pub releases: Arc<Releases>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// How often.
    pub pace: RolloutPace,
}

/// The rollouts.
pub struct Rollouts {
    parts: RolloutParts,
    desk: Mutex<Desk>,
    preferences: RwLock<HashMap<EnvironmentId, Preference>>,
    orders: RwLock<Arc<Orders>>,
    /// Whether news are of any interest.
    open: AtomicBool,
    work: Notify,
}

/// Whoever changes anything holds it until it is committed and published.
struct Desk {
    open: Option<Rollout>,
    completed: Option<Rollout>,
    /// What the completed one brought can still be installed.
    offers_fleet: bool,
    /// When that was looked at.
    looked_at: Option<Instant>,
    /// A new rollout may be in the database, or not: the database has to be asked.
    unsure: bool,
}

/// Why a request about rollouts can't be met.
#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    /// There is no such rollout.
    #[error("there is no such rollout; GET /internal/rollouts lists them")]
    Missing,
    /// Another one is open.
    #[error("the rollout {id} to {version} is {status}; let it complete or abort it before starting another")]
    AnotherOpen {
        /// Which.
        id: RolloutId,
        /// Where to.
        version: String,
        /// How it stands.
        status: &'static str,
    },
    /// Another process has just started one.
    #[error("another rollout has just been started")]
    JustStarted,
    /// The database has it open, and yet this process doesn't carry it on.
    #[error(
        "this provisioner doesn't carry on the rollout {0}, which the database has open; ask again in a moment, and if it stays so, see that only one \
         provisioner runs, and restart it"
    )]
    Elsewhere(RolloutId),
    /// It isn't one that agents would take.
    #[error("this version can't be rolled out: {0}")]
    Release(#[source] NoRelease),
    /// Not in its state.
    #[error(transparent)]
    Impossible(#[from] Impossible),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What somebody asks of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// See [`Rollout::pause`].
    Pause,
    /// See [`Rollout::resume`].
    Resume,
    /// See [`Rollout::abort`].
    Abort,
}

impl Rollouts {
    /// Takes up what the database says: the open rollout, what agents reported last, and who is told what.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn open(parts: RolloutParts) -> Result<Self, StoreError> {
        for heartbeat in parts.store.heartbeats().await? {
            let Some(member) = parts.board.roll().member(heartbeat.environment) else { continue };
            // One of an agent whose words we don't know any more says nothing; its next one will.
            if let Ok(report) = serde_json::from_str::<Report>(&heartbeat.payload) {
                member.reported(report, heartbeat.received_at);
            }
        }
        let open = parts.store.open_rollout().await?;
        let completed = parts.store.completed_rollout().await?;
        if let Some(completed) = &completed {
            parts.releases.has_proved_itself(completed.terms.version.clone());
        }
        let preferences = RwLock::new(parts.store.preferences().await?);
        let desk = Desk { open, completed, offers_fleet: false, looked_at: None, unsure: false };
        let rollouts = Self {
            parts,
            desk: Mutex::new(desk),
            preferences,
            orders: RwLock::default(),
            open: AtomicBool::new(false),
            work: Notify::new(),
        };
        let mut desk = rollouts.desk.lock().await;
        rollouts.look_at_fleet(&mut desk).await;
        rollouts.publish(&desk);
        drop(desk);
        Ok(rollouts)
    }

    /// Starts the loop. It ends after `stop`.
    pub fn start(self: &Arc<Self>, stop: &CancellationToken) -> JoinHandle<()> {
        let (rollouts, stop) = (Arc::clone(self), stop.clone());
        tokio::spawn(async move { rollouts.run(&stop).await })
    }

    async fn run(&self, stop: &CancellationToken) {
        let pace = &self.parts.pace;
        while !stop.is_cancelled() {
            let wait = match self.pass().await {
                // One step may make the next one possible; each costs a write to the disk, so not without a pause.
                Ok(true) => pace.gap,
                Ok(false) if self.open.load(Ordering::Relaxed) => pace.tick,
                Ok(false) => pace.idle,
                Err(error) => {
                    tracing::error!(error = %error, cause = %error.source, "a rollout can't be carried on");
                    pace.tick
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(wait) => {}
                () = self.work.notified() => tokio::time::sleep(pace.gap).await,
            }
        }
    }

    /// One look. Answers whether anything has changed.
    async fn pass(&self) -> Result<bool, StoreError> {
        let mut desk = self.desk.lock().await;
        // Also while one is open: those who aren't of it are told of the completed one.
        let due = desk.looked_at.is_none_or(|at| at.elapsed() >= self.parts.pace.idle);
        if (desk.open.is_none() || due) && self.look_at_fleet(&mut desk).await {
            self.publish(&desk);
        }
        if desk.unsure {
            desk.open = self.parts.store.open_rollout().await?;
            desk.unsure = false;
            self.publish(&desk);
        }
        let Some(open) = &desk.open else { return Ok(false) };
        let now = Timestamp::now();
        let Some(step) = open.step(&self.parts.board.roll().seen(), &self.left_out(), now) else { return Ok(false) };
        let open = open.clone();
        self.commit(&mut desk, open, step, now).await?;
        Ok(true)
    }

    /// On disk, then true, then told. Answers with what has become of `open`, which is the desk's.
    async fn commit(&self, desk: &mut Desk, open: Rollout, step: Step, now: Timestamp) -> Result<Rollout, StoreError> {
        let (told, was_halted) = (open.course.history.len(), matches!(open.course.status, Status::Halted { .. }));
        let changed: Vec<EnvironmentId> = step.targets.iter().map(|target| target.environment).collect();
        let mut next = open;
        next.apply(step, now);
        self.parts.store.keep_rollout(&next, &changed).await?;
        for line in next.course.history.iter().skip(told) {
            tracing::info!(rollout = %next.id, version = %next.terms.version, "{}", line.message);
        }
        if matches!(next.course.status, Status::Halted { .. }) && !was_halted {
            self.parts.metrics.rollout_halted();
        }
        match next.course.status {
            Status::Completed { .. } => {
                self.parts.releases.has_proved_itself(next.terms.version.clone());
                desk.completed = Some(next.clone());
                desk.open = None;
                self.look_at_fleet(desk).await;
            }
            Status::Aborted { .. } => desk.open = None,
            Status::Running | Status::Paused { .. } | Status::Halted { .. } => desk.open = Some(next.clone()),
        }
        self.publish(desk);
        Ok(next)
    }

    /// Whether what the fleet has gone to can be installed still; agents aren't sent after what they would refuse. Answers whether
    /// that has changed.
    async fn look_at_fleet(&self, desk: &mut Desk) -> bool {
        desk.looked_at = Some(Instant::now());
        let Some(completed) = &desk.completed else { return false };
        let found = self.parts.releases.signed(completed.terms.version.clone()).await;
        let offers = found.is_ok();
        if let (true, Err(error)) = (desk.offers_fleet, &found) {
            tracing::warn!(error = %error, "agents that missed the last rollout are not told of it any more");
        }
        std::mem::replace(&mut desk.offers_fleet, offers) != offers
    }

    fn publish(&self, desk: &Desk) {
        let preferences = self.preferences.read().unwrap_or_else(PoisonError::into_inner);
        let orders = Orders::new(desk.open.as_ref(), desk.completed.as_ref(), desk.offers_fleet, &preferences);
        *self.orders.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(orders);
        self.open.store(desk.open.is_some(), Ordering::Relaxed);
    }

    fn left_out(&self) -> HashMap<EnvironmentId, LeftOut> {
        let preferences = self.preferences.read().unwrap_or_else(PoisonError::into_inner);
        preferences.iter().filter_map(|(id, preference)| Some((*id, preference.left_out()?))).collect()
    }

    /// A heartbeat that came at `at`, and is on disk, said this. Answers with the version its agent is to be told.
    pub fn heard(&self, member: &Member, report: Report, at: Timestamp) -> Option<Arc<Version>> {
        let orders = Arc::clone(&self.orders.read().unwrap_or_else(PoisonError::into_inner));
        let told = orders.for_agent(member.environment, &report, at);
        if member.reported(report, at) && self.open.load(Ordering::Relaxed) {
            self.work.notify_one();
        }
        told
    }

    /// Begins a rollout over all agents that report.
    ///
    /// # Errors
    /// When another is open, or the release isn't one that agents would take.
    pub async fn begin(&self, terms: Terms) -> Result<Rollout, RolloutError> {
        self.parts.releases.signed(terms.version.clone()).await.map_err(RolloutError::Release)?;
        let mut desk = self.desk.lock().await;
        if let Some(open) = &desk.open {
            return Err(RolloutError::AnotherOpen {
                id: open.id,
                version: open.terms.version.to_string(),
                status: open.course.status.as_str(),
            });
        }
        let (now, left_out) = (Timestamp::now(), self.left_out());
        let seen = self.parts.board.roll().seen();
        let candidates: Vec<Candidate> = seen
            .iter()
            .filter(|(_, seen)| seen.reporting)
            .map(|(id, seen)| Candidate {
                environment: *id,
                version: seen.report.as_ref().map(|report| report.dtma_version.clone()),
                left_out: left_out.get(id).copied(),
            })
            .collect();
        let rollout = Rollout::new(RolloutId(Uuid::now_v7()), terms, &candidates, now);
        match self.parts.store.add_rollout(&rollout).await {
            Ok(true) => {}
            Ok(false) => return Err(RolloutError::JustStarted),
            Err(error) => {
                // It may have been written down all the same.
                desk.unsure = true;
                self.work.notify_one();
                return Err(error.into());
            }
        }
        tracing::info!(rollout = %rollout.id, version = %rollout.terms.version, agents = candidates.len(), "a rollout begins");
        desk.open = Some(rollout.clone());
        self.publish(&desk);
        self.work.notify_one();
        Ok(rollout)
    }

    /// Does what somebody asks of one, and answers with how it then is.
    ///
    /// # Errors
    /// When there is no such rollout, or it is over.
    pub async fn fulfil(&self, id: RolloutId, wish: Wish) -> Result<Rollout, RolloutError> {
        let mut desk = self.desk.lock().await;
        let now = Timestamp::now();
        let rollout = match &desk.open {
            Some(open) if open.id == id => open.clone(),
            _ => self.parts.store.rollout(id).await?.ok_or(RolloutError::Missing)?,
        };
        let step = match wish {
            Wish::Pause => rollout.pause(now)?,
            Wish::Resume => rollout.resume(now)?,
            Wish::Abort => rollout.abort(now)?,
        };
        let Some(step) = step else { return Ok(rollout) };
        if desk.open.as_ref().is_none_or(|open| open.id != id) {
            return Err(RolloutError::Elsewhere(id));
        }
        let after = self.commit(&mut desk, rollout, step, now).await?;
        self.work.notify_one();
        Ok(after)
    }

    /// One rollout, and what is known of all agents now.
    ///
    /// # Errors
    /// When there is no such rollout.
    pub async fn find(&self, id: RolloutId) -> Result<(Rollout, HashMap<EnvironmentId, Seen>), RolloutError> {
        let desk = self.desk.lock().await;
        let known = [&desk.open, &desk.completed].into_iter().flatten().find(|rollout| rollout.id == id).cloned();
        drop(desk);
        let rollout = match known {
            Some(rollout) => rollout,
            None => self.parts.store.rollout(id).await?.ok_or(RolloutError::Missing)?,
        };
        Ok((rollout, self.parts.board.roll().seen()))
    }

    /// The latest ones, without their agents.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list(&self) -> Result<Vec<Summary>, StoreError> {
        self.parts.store.rollouts(LISTED).await
    }

    /// The open one, else the one completed last: for the metrics.
    pub async fn latest(&self) -> Option<Rollout> {
        let desk = self.desk.lock().await;
        desk.open.as_ref().or(desk.completed.as_ref()).cloned()
    }

    /// What was decided about updates of one environment.
    pub fn preference(&self, id: EnvironmentId) -> Preference {
        self.preferences.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned().unwrap_or_default()
    }

    /// Decides about updates of one environment.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn prefer(&self, id: EnvironmentId, preference: Preference) -> Result<(), StoreError> {
        let desk = self.desk.lock().await;
        self.parts.store.prefer(id, &preference, Timestamp::now()).await?;
        self.preferences.write().unwrap_or_else(PoisonError::into_inner).insert(id, preference);
        self.publish(&desk);
        self.work.notify_one();
        Ok(())
    }
}
