//! The loop: the only part that asks anything of the cloud. Woken by every change and by a timer, it reads the rows that need
//! something, looks, plans, and applies one step of each.
//!
//! Wake-ups carry no data, and nothing that matters is only in memory: a pass after a crash does what the pass before would have done.
//! While a step of an environment is being applied no other step of it is planned.

mod apply;
mod look;
pub mod plan;
mod sweep;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use dtma_api::EnvironmentId;
use jiff::Timestamp;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::board::Board;
use crate::cloud::Cloud;
use crate::environment::Environment;
use crate::metrics::Metrics;
use crate::releases::Releases;
use crate::store::StoreError;
use plan::{Observed, Policy, Step, plan};

/// How often things are looked at.
#[derive(Debug, Clone)]
pub struct Pace {
    /// Between the first looks at a droplet that is coming or going.
    pub first_look: Duration,
    /// Looks come more and more slowly, down to this.
    pub slowest_look: Duration,
    /// Between two looks at many droplets at once, which one list of the fleet pays for.
    pub crowd_look: Duration,
    /// Between two rounds while something is in flight.
    pub tick: Duration,
    /// Between two sweeps, and two rounds when nothing happens.
    pub sweep: Duration,
    /// An agent silent for longer is unresponsive.
    pub unresponsive_after: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            first_look: Duration::from_millis(400),
            slowest_look: Duration::from_secs(5),
            crowd_look: Duration::from_secs(2),
            tick: Duration::from_secs(1),
            sweep: Duration::from_secs(30),
            unresponsive_after: Duration::from_secs(180),
        }
    }
}

/// What the loop works with.
pub struct Reconciler {
    /// The rows.
    pub board: Arc<Board>,
    /// The cloud.
    pub cloud: Arc<dyn Cloud>,
    /// What new droplets install.
    pub releases: Arc<Releases>,
    /// How droplets reach us.
    pub public_url: String,
    /// Waits and limits.
    pub policy: Policy,
    /// How often.
    pub pace: Pace,
    /// Counters.
    pub metrics: Arc<Metrics>,
}

/// Steps in progress when the process is told to end get this long. What is not done then is resumed after the next start.
const LAST_STEPS: Duration = Duration::from_secs(8);

/// Creates under way at once. An attempt's deadline and its token's life begin when its intent is written, so nothing is begun that would
/// only wait for the cloud's allowance; those who wait have begun nothing, and come in the order they asked.
const CREATES_AT_ONCE: usize = 10;

/// Up to so many environments are looked at each in its own time and asked about one by one, which has no lag. More are looked at
/// together: asking after each of many would use up the allowance that their creates wait for.
const ONE_BY_ONE: usize = 3;

/// When to look at droplets again.
struct Looks {
    each: HashMap<EnvironmentId, Look>,
    /// At those of many environments together.
    crowd_at: Instant,
}

/// When to look at one environment's droplets again.
struct Look {
    generation: u64,
    wait: Duration,
    at: Instant,
}

impl Reconciler {
    /// Starts the loop and the sweeper. Both end after `stop`.
    pub fn start(self, stop: &CancellationToken) -> JoinHandle<()> {
        let reconciler = Arc::new(self);
        let sweeper = tokio::spawn(Arc::clone(&reconciler).sweep_until(stop.clone()));
        let stop = stop.clone();
        tokio::spawn(async move {
            reconciler.run(stop).await;
            if let Err(error) = sweeper.await {
                tracing::error!(error = %error, "the sweeper has failed");
            }
        })
    }

    async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut steps: JoinSet<Vec<EnvironmentId>> = JoinSet::new();
        let mut busy: HashSet<EnvironmentId> = HashSet::new();
        let mut looks = Looks { each: HashMap::new(), crowd_at: Instant::now() };
        let creates = Arc::new(Semaphore::new(CREATES_AT_ONCE));
        loop {
            self.metrics.pass();
            let wait = match self.pass(&mut steps, &mut busy, &mut looks, &creates).await {
                Ok(true) => self.pace.tick,
                Ok(false) => self.pace.sweep,
                Err(error) => {
                    tracing::error!(error = %error, cause = %error.source, "the loop can't read the database");
                    self.pace.slowest_look
                }
            };
            let soonest = looks.each.iter().filter(|(id, _)| !busy.contains(*id)).map(|(_, look)| look.at).min();
            let until = soonest.map_or(Instant::now() + wait, |at| at.min(Instant::now() + wait));
            tokio::select! {
                () = stop.cancelled() => break,
                () = self.board.work() => {}
                () = tokio::time::sleep_until(until) => {}
                Some(done) = steps.join_next() => finished(done, &mut busy),
            }
            while let Some(done) = steps.try_join_next() {
                finished(done, &mut busy);
            }
        }
        let last = async { while steps.join_next().await.is_some() {} };
        if tokio::time::timeout(LAST_STEPS, last).await.is_err() {
            tracing::warn!("ending in the middle of a step; it is resumed after the next start");
        }
    }

    /// One round. Answers whether anything is in flight.
    async fn pass(
        self: &Arc<Self>,
        steps: &mut JoinSet<Vec<EnvironmentId>>,
        busy: &mut HashSet<EnvironmentId>,
        looks: &mut Looks,
        creates: &Arc<Semaphore>,
    ) -> Result<bool, StoreError> {
        let rows = self.board.store().unsettled().await?;
        let any = !rows.is_empty();
        // A look that nobody will take any more would be overdue for ever, and keep the loop from resting.
        let looked_at: HashSet<EnvironmentId> =
            rows.iter().filter(|row| look::needed(&row.state)).map(|row| row.id).collect();
        looks.each.retain(|id, _| looked_at.contains(id));
        // Those under way count: a newcomer among many is one of many.
        let crowd = looked_at.len() > ONE_BY_ONE;
        let mut worth_a_look = Vec::new();
        for row in rows {
            if busy.contains(&row.id) {
                continue;
            }
            // Steps that need no look come at once.
            let step = plan(&row, &Observed::default(), &self.policy, Timestamp::now());
            if step != Step::Wait {
                let turn = match step {
                    Step::Create { .. } => match Arc::clone(creates).try_acquire_owned() {
                        Ok(turn) => Some(turn),
                        // Planned again when one of them is done.
                        Err(_) => continue,
                    },
                    Step::Wait | Step::Delete(_) | Step::Become(_) => None,
                };
                busy.insert(row.id);
                let reconciler = Arc::clone(self);
                steps.spawn(async move {
                    reconciler.apply(&row, step).await;
                    drop(turn);
                    vec![row.id]
                });
            } else if looked_at.contains(&row.id) {
                worth_a_look.push(row);
            }
        }
        let to_look_at = self.due(worth_a_look, crowd, looks);
        if !to_look_at.is_empty() {
            busy.extend(to_look_at.iter().map(|row| row.id));
            let reconciler = Arc::clone(self);
            steps.spawn(async move { reconciler.look_and_act(to_look_at, crowd).await });
        }
        Ok(any)
    }

    /// Those at which it is time to look; sets the next time.
    fn due(&self, mut rows: Vec<Environment>, crowd: bool, looks: &mut Looks) -> Vec<Environment> {
        if !crowd {
            rows.retain(|row| self.is_due(row, &mut looks.each));
            return rows;
        }
        looks.each.clear();
        let now = Instant::now();
        if rows.is_empty() || now < looks.crowd_at {
            return Vec::new();
        }
        looks.crowd_at = now + self.pace.crowd_look;
        rows
    }

    /// Whether it is time to look at one, and if so, when the next time is.
    fn is_due(&self, row: &Environment, looks: &mut HashMap<EnvironmentId, Look>) -> bool {
        let now = Instant::now();
        let fresh = || Look { generation: row.generation, wait: self.pace.first_look, at: now };
        let look = looks.entry(row.id).or_insert_with(fresh);
        if look.generation != row.generation {
            *look = fresh();
        }
        if now < look.at {
            return false;
        }
        // Spread by the id, so that many environments begun together are not looked at in step for ever.
        let spread = f64::from(u8::from_be(row.id.0.as_bytes().last().copied().unwrap_or_default())) / 255.0;
        look.at = now + look.wait.mul_f64(0.8 + 0.4 * spread);
        look.wait = look.wait.mul_f64(1.3).min(self.pace.slowest_look);
        true
    }

    async fn look_and_act(self: Arc<Self>, rows: Vec<Environment>, crowd: bool) -> Vec<EnvironmentId> {
        // Taken before looking: what is seen is at least as new as this.
        let now = Timestamp::now();
        let seen = self.look(&rows, crowd).await;
        let mut steps = JoinSet::new();
        let ids = rows.iter().map(|row| row.id).collect();
        for (row, observed) in rows.into_iter().zip(seen) {
            let step = plan(&row, &observed, &self.policy, now);
            let reconciler = Arc::clone(&self);
            steps.spawn(async move { reconciler.apply(&row, step).await });
        }
        while let Some(done) = steps.join_next().await {
            if let Err(error) = done {
                tracing::error!(error = %error, "a step has failed");
            }
        }
        ids
    }
}

fn finished(done: Result<Vec<EnvironmentId>, tokio::task::JoinError>, busy: &mut HashSet<EnvironmentId>) {
    match done {
        Ok(ids) => busy.retain(|id| !ids.contains(id)),
        // A panic: which environment it was is lost with the task. Planning one of them twice is safe, since every commit is
        // against a generation; never planning it again is not.
        Err(error) => {
            tracing::error!(error = %error, "a step has failed");
            busy.clear();
        }
    }
}
