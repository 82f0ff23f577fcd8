//! The loop's side of sessions: what it has seen of their containers, and the work on them. One job a session, beside the jobs of instances and
//! with permits of its own, so that neither holds the other up.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use dtma_api::InstanceName;
use tokio::sync::Semaphore;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::Instant;

use super::Sessions;
use super::plan::{self, Step, Subject};
use crate::engine::{Condition, Container, ContainerId, EngineError};
use crate::instance::{Egress, Intent, SessionId, SessionOf};
use crate::reconcile::desk::Shared;
use crate::reconcile::failure::{Meaning, meaning};
use crate::reconcile::plan::current;
use crate::reconcile::run::Loop;
use crate::reconcile::work::open_egress;
use crate::store::ledger::{Contents, Entry};

/// How many containers of sessions are made side by side.
const BEGUN_AT_ONCE: usize = 4;
/// How many are stopped and removed side by side. A server may take its time to end.
const ENDED_AT_ONCE: usize = 8;
/// Time between two attempts to remove one.
const AGAIN: Duration = Duration::from_secs(5);

/// What the loop knows of sessions' containers.
pub(in crate::reconcile) struct Keeping {
    sessions: Sessions,
    /// As last seen; of those being worked on as they were before.
    containers: Vec<Container>,
    under_way: BTreeMap<SessionId, InstanceName>,
    jobs: JoinSet<(SessionOf, Outcome)>,
    /// For when a job breaks off.
    job_sessions: HashMap<Id, SessionOf>,
    /// Not again before this.
    resting: BTreeMap<SessionId, Instant>,
    begins: Arc<Semaphore>,
    ends: Arc<Semaphore>,
}

/// How a job ended.
pub(in crate::reconcile) enum Outcome {
    /// Its container runs.
    Runs(Box<Container>),
    /// It has none. One may be left.
    None(String),
    /// Its container is gone.
    Gone,
    /// Its container could not be removed.
    Left,
}

impl Keeping {
    pub(in crate::reconcile) fn new(sessions: Sessions) -> Self {
        Self {
            sessions,
            containers: Vec::new(),
            under_way: BTreeMap::new(),
            jobs: JoinSet::new(),
            job_sessions: HashMap::new(),
            resting: BTreeMap::new(),
            begins: Arc::new(Semaphore::new(BEGUN_AT_ONCE)),
            ends: Arc::new(Semaphore::new(ENDED_AT_ONCE)),
        }
    }

    /// What was seen replaces what was known, except of sessions being worked on.
    pub(in crate::reconcile) fn merge(&mut self, seen: Vec<Container>) {
        let worked_on = |container: &Container| {
            container.session.as_ref().is_some_and(|session| self.under_way.contains_key(&session.id))
        };
        let known = std::mem::take(&mut self.containers).into_iter().filter(worked_on);
        self.containers = known.chain(seen.into_iter().filter(|container| !worked_on(container))).collect();
    }

    /// Whether there is anything of sessions of this instance.
    pub(in crate::reconcile) fn has_any_of(&self, instance: &InstanceName) -> bool {
        let there = self.containers.iter().filter_map(|container| container.session.as_ref());
        self.under_way.values().any(|worked_on| worked_on == instance)
            || there.into_iter().any(|session| &session.instance == instance)
    }

    /// When something that failed is tried again. What is past is tried with the next pass, and no reason for one: while Docker is away
    /// nothing is tried at all.
    pub(in crate::reconcile) fn due(&self, now: Instant) -> Option<Instant> {
        self.resting.values().filter(|until| **until > now).min().copied()
    }

    /// The next job that ends; none when there is none. Cancel-safe.
    pub(in crate::reconcile) async fn next(&mut self) -> Option<(SessionOf, Outcome)> {
        match self.jobs.join_next_with_id().await? {
            Ok((id, ended)) => {
                self.job_sessions.remove(&id);
                Some(ended)
            }
            Err(error) => Some((self.job_sessions.remove(&error.id())?, broken(&error))),
        }
    }

    fn sessions_there(&self) -> impl Iterator<Item = SessionId> {
        let there = self.containers.iter().filter_map(|container| Some(container.session.as_ref()?.id));
        there.chain(self.under_way.keys().copied())
    }

    fn forget(&mut self, session: SessionId) {
        self.containers.retain(|container| container.session.as_ref().is_none_or(|of| of.id != session));
    }
}

fn broken(error: &JoinError) -> Outcome {
    tracing::error!(error = error as &dyn std::error::Error, "work on a session's container broke off");
    Outcome::None("the agent failed inside; its log has more".to_owned())
}

impl Loop {
    /// Sees to sessions' containers. How much was started.
    pub(in crate::reconcile) fn keep_sessions(&mut self, contents: &Contents) -> usize {
        // A ledger that has yet to be put together again doesn't say which instances there are.
        if self.recover {
            return 0;
        }
        let runs = |entry: &&Arc<Entry>| entry.intent == Intent::Run;
        let own = |entry: &Arc<Entry>| {
            let containers = self.observed.get(&entry.spec.name).map_or(&[][..], Vec::as_slice);
            Some((entry.spec.name.clone(), current(entry, containers)?.id.clone()))
        };
        let hosts: BTreeMap<_, _> = contents.entries.values().filter(runs).filter_map(own).collect();
        let keeping = &mut self.keeping;
        let now = Instant::now();
        keeping.resting.retain(|_, until| *until > now);
        let there: BTreeSet<SessionId> = keeping.sessions_there().collect();
        self.shared.residents.keep_guests(|session| there.contains(&session));
        let steps = plan::plan(&Subject {
            wishes: &keeping.sessions.all(),
            containers: &keeping.containers,
            under_way: &keeping.under_way,
            resting: &keeping.resting.keys().copied().collect::<BTreeSet<_>>(),
            hosts: &hosts,
        });
        let mut started = 0;
        for step in steps {
            match step {
                Step::Over { session, why } => keeping.sessions.over(session, &why),
                Step::Begin { session, like } => {
                    let Some(entry) = contents.entries.get(&session.instance) else { continue };
                    let work = Begin {
                        sessions: keeping.sessions.clone(),
                        shared: Arc::clone(&self.shared),
                        entry: Arc::clone(entry),
                        like,
                        permits: Arc::clone(&keeping.begins),
                    };
                    let of = session.clone();
                    started += 1;
                    keeping.spawn(session, async move { work.carry_out(&of).await });
                }
                Step::Remove { session, container, runs } => {
                    let (shared, permits) = (Arc::clone(&self.shared), Arc::clone(&keeping.ends));
                    let grace = runs.then_some(self.timing.stop_grace_seconds);
                    started += 1;
                    keeping.spawn(session, async move { remove(&shared, &permits, &container, grace).await });
                }
            }
        }
        started
    }

    /// Work on a session's container has ended.
    pub(in crate::reconcile) fn session_ended(&mut self, session: &SessionOf, outcome: Outcome) {
        let keeping = &mut self.keeping;
        keeping.under_way.remove(&session.id);
        keeping.forget(session.id);
        match outcome {
            Outcome::Runs(container) => {
                tracing::info!(instance = %session.instance, session = %session.id.0, "a session has a container of its own");
                keeping.sessions.runs(session.id, &container.id);
                keeping.containers.push(*container);
            }
            Outcome::None(why) => {
                self.shared.journal.write(&session.instance, "session_failed", why.clone());
                keeping.sessions.over(session.id, &why);
                self.observe_at = self.observe_at.min(Instant::now() + self.timing.observe_pause);
            }
            Outcome::Gone => {
                tracing::info!(instance = %session.instance, session = %session.id.0, "a session's container was removed");
            }
            Outcome::Left => {
                keeping.resting.insert(session.id, Instant::now() + AGAIN);
                self.observe_at = self.observe_at.min(Instant::now() + self.timing.observe_pause);
            }
        }
    }
}

impl Keeping {
    fn spawn(&mut self, session: SessionOf, work: impl Future<Output = Outcome> + Send + 'static) {
        self.under_way.insert(session.id, session.instance.clone());
        let of = session.clone();
        let handle = self.jobs.spawn(async move { (of, work.await) });
        self.job_sessions.insert(handle.id(), session);
    }
}

/// Making a session's container.
struct Begin {
    sessions: Sessions,
    shared: Arc<Shared>,
    entry: Arc<Entry>,
    like: ContainerId,
    permits: Arc<Semaphore>,
}

impl Begin {
    async fn carry_out(self, session: &SessionOf) -> Outcome {
        let _permit = self.permits.acquire().await;
        if !self.sessions.is_wanted(session.id) {
            return Outcome::Gone;
        }
        match self.make(session).await {
            // Whoever wanted it may have gone away meanwhile; then it goes, too.
            Ok(container) => match &container.condition {
                Condition::Running { .. } => Outcome::Runs(Box::new(container)),
                Condition::Exited(exit) => {
                    Outcome::None(format!("the session's process ended at once with exit code {}", exit.code))
                }
                other => Outcome::None(format!("the session's container is {} and does not run", other.word())),
            },
            Err(why) => Outcome::None(why),
        }
    }

    async fn make(&self, session: &SessionOf) -> Result<Container, String> {
        let engine = &self.shared.engine;
        let (spec, deployment) = (&self.entry.spec, &self.entry.deployment);
        let explain = |error: EngineError| {
            tracing::warn!(instance = %session.instance, error = &error as &dyn std::error::Error, "a session has no container");
            match meaning(&error, spec) {
                Meaning::Failed(failure) => failure.message,
                Meaning::LookAgain | Meaning::NameTaken | Meaning::PortTaken(_) => error.to_string(),
            }
        };
        let listed = matches!(spec.network.egress, Egress::AllowList(_));
        if listed {
            open_egress(&self.shared).await.map_err(|error| error.to_string())?;
        }
        let id = engine.create_for_session(session, spec, deployment, &self.like).await.map_err(explain)?;
        let gone = || "the session's container was removed".to_owned();
        if listed {
            // Before it runs, because it may ask for its way out at once.
            let made = engine.inspect(&id).await.map_err(explain)?.ok_or_else(gone)?;
            self.shared.residents.guest_moves_in(session, spec, &made);
        }
        engine.start(&id).await.map_err(explain)?;
        let started = engine.inspect(&id).await.map_err(explain)?.ok_or_else(gone)?;
        self.shared.residents.guest_moves_in(session, spec, &started);
        Ok(started)
    }
}

async fn remove(shared: &Shared, permits: &Semaphore, container: &ContainerId, grace: Option<u32>) -> Outcome {
    let _permit = permits.acquire().await;
    if let Some(seconds) = grace
        && let Err(error) = shared.engine.stop(container, seconds).await
    {
        // It is removed by force then.
        tracing::warn!(error = &error as &dyn std::error::Error, "a session's server was not stopped");
    }
    match shared.engine.remove(container).await {
        Ok(()) => Outcome::Gone,
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "a session's container was not removed");
            Outcome::Left
        }
    }
}
