//! The loop itself: waits, observes, plans, starts jobs, takes their results, publishes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use dtma_api::InstanceName;
use jiff::Timestamp;
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::desk::Shared;
use super::handle::Instances;
use super::health::{Crashes, HealthCounts, Looks, Supervisor};
use super::observe::watch;
use super::plan::Job;
use super::sessions::work::Keeping;
use super::status::{Departed, EngineStatus, PassReport};
use super::work::{Gates, Outcome};
use super::{Prober, Secrets, Sessions, Timing, prune, secrets, usage};
use crate::disks::Disks;
use crate::engine::{Container, Engine};
use crate::instance::{Failure, State};
use crate::store::ledger::{Found, Ledger, Purpose};

/// What the loop is made of.
pub struct Parts {
    /// The container engine.
    pub engine: Arc<dyn Engine>,
    /// The ledger, and what was found at its place; anything but a whole one is put together again from the containers' labels.
    pub ledger: (Ledger, Found),
    /// How MCP servers are probed.
    pub prober: Arc<dyn Prober>,
    /// The disks that may get full.
    pub disks: Arc<Disks>,
    /// Where secrets are kept, and who has those that don't come with a deploy.
    pub secrets: Secrets,
    /// Who wants a container for a session.
    pub sessions: Sessions,
    /// How patient it is.
    pub timing: Timing,
    /// Ends the loop, between two steps of whatever it does. The containers stay as they are.
    pub shutdown: CancellationToken,
}

/// Starts the loop. The task ends soon after `shutdown`.
pub fn start(parts: Parts) -> (Instances, JoinHandle<()>) {
    let (ledger, found) = parts.ledger;
    let (engine, disks, shutdown) = (Arc::clone(&parts.engine), parts.disks, parts.shutdown.clone());
    let shared = Arc::new(Shared::new(ledger, engine, disks, parts.secrets, shutdown));
    let instances = Instances::new(Arc::clone(&shared));
    let (reports, inbox) = mpsc::unbounded_channel();
    let run = Loop {
        shared,
        engine: parts.engine,
        prober: parts.prober,
        timing: parts.timing,
        gates: Arc::new(Gates::new()),
        reports,
        tracks: BTreeMap::new(),
        observed: BTreeMap::new(),
        nameless: Vec::new(),
        keeping: Keeping::new(parts.sessions.clone()),
        sessions: parts.sessions,
        departed: BTreeMap::new(),
        jobs: JoinSet::new(),
        job_names: HashMap::new(),
        looks: Looks::new(),
        health_counts: HealthCounts::default(),
        orphan_work: None,
        egress_work: None,
        engine_status: EngineStatus::default(),
        observe_at: Instant::now(),
        missed: 0,
        recover: found != Found::Whole,
        report: PassReport::default(),
    };
    if let Found::Damaged { kept_as, problem } = &found {
        tracing::error!(
            kept_as = %kept_as.display(),
            problem,
            "THE LEDGER COULD NOT BE READ; it is being put together again from the containers' labels"
        );
    }
    (instances, tokio::spawn(run.until(inbox, parts.shutdown)))
}

pub(super) struct Loop {
    pub(super) shared: Arc<Shared>,
    pub(super) engine: Arc<dyn Engine>,
    pub(super) prober: Arc<dyn Prober>,
    pub(super) timing: Timing,
    pub(super) gates: Arc<Gates>,
    pub(super) reports: mpsc::UnboundedSender<(InstanceName, State)>,
    pub(super) tracks: BTreeMap<InstanceName, Track>,
    /// Containers of ours by the instance they say they belong to, as last seen. Those of an instance being worked on are as they were
    /// before the work began, so a look that overlaps with work can't be mistaken for what the work left.
    pub(super) observed: BTreeMap<InstanceName, Vec<Container>>,
    /// Containers of ours that name no instance.
    pub(super) nameless: Vec<Container>,
    pub(super) sessions: Sessions,
    /// Their containers, which are never among `observed` and `nameless`.
    pub(super) keeping: Keeping,
    pub(super) departed: BTreeMap<InstanceName, Departed>,
    pub(super) jobs: JoinSet<(InstanceName, Outcome)>,
    pub(super) job_names: HashMap<tokio::task::Id, InstanceName>,
    /// Probes, and other looks at servers.
    pub(super) looks: Looks,
    pub(super) health_counts: HealthCounts,
    pub(super) orphan_work: Option<JoinHandle<()>>,
    /// Opens the egress proxy for instances that run already.
    pub(super) egress_work: Option<JoinHandle<()>>,
    pub(super) engine_status: EngineStatus,
    pub(super) observe_at: Instant,
    /// Looks that failed since the last that succeeded.
    pub(super) missed: u32,
    /// The ledger has to be put together again from what the engine shows.
    pub(super) recover: bool,
    pub(super) report: PassReport,
}

/// What the loop remembers of an instance, and may forget: everything that matters is in the ledger or at the engine.
#[derive(Debug, Default)]
pub(super) struct Track {
    pub(super) job: Option<Underway>,
    /// The last request that has been planned for.
    pub(super) asked: u64,
    pub(super) settled: u64,
    pub(super) failure: Option<Failure>,
    pub(super) tries: u32,
    pub(super) not_before: Option<Instant>,
    /// A job ended in the middle: nothing is planned before the next look.
    pub(super) unsure: bool,
    /// Whether its server answers.
    pub(super) supervisor: Supervisor,
    /// Whether its process stays up.
    pub(super) crashes: Crashes,
    /// Its settings have been put right since they were last seen to be right.
    pub(super) adjusted: bool,
}

#[derive(Debug)]
pub(super) struct Underway {
    pub(super) ticket: u64,
    pub(super) purpose: Purpose,
    pub(super) job: Job,
    /// How far it is; none where the instance goes on as it was meanwhile.
    pub(super) state: Option<State>,
    pub(super) cancel: CancellationToken,
}

impl Loop {
    async fn until(mut self, mut inbox: mpsc::UnboundedReceiver<(InstanceName, State)>, shutdown: CancellationToken) {
        let changed = Arc::new(Notify::new());
        // They end with the loop, however it ends: what they share with it ends only after them.
        let _beside = [
            AbortOnDropHandle::new(tokio::spawn(watch(Arc::clone(&self.engine), Arc::clone(&changed)))),
            AbortOnDropHandle::new(tokio::spawn(usage::watch(Arc::clone(&self.shared), self.timing.sample_every))),
            AbortOnDropHandle::new(tokio::spawn(prune::watch(Arc::clone(&self.shared), self.timing))),
            AbortOnDropHandle::new(tokio::spawn(secrets::watch(Arc::clone(&self.shared), self.timing))),
        ];
        // An engine that is just starting can hold up the first look for long; what was promised can be told without it.
        self.publish().await;
        let mut reason = "start";
        loop {
            self.pass(reason).await;
            let due = self.due().await;
            // Every arm only takes note; what is to be done is found out anew by the pass. `notified` keeps a ring that nobody has
            // heard yet, and the other arms are cancel-safe too.
            tokio::select! {
                () = shutdown.cancelled() => break,
                Some((name, state)) = inbox.recv() => {
                    self.reported(&name, state);
                    while let Ok((name, state)) = inbox.try_recv() {
                        self.reported(&name, state);
                    }
                    reason = "progress";
                }
                Some(ended) = self.jobs.join_next_with_id() => {
                    match ended {
                        Ok((id, (name, outcome))) => {
                            self.job_names.remove(&id);
                            self.ended(name, outcome).await;
                        }
                        Err(error) => self.broke(&error).await,
                    }
                    reason = "work ended";
                }
                Some((session, outcome)) = self.keeping.next() => {
                    self.session_ended(&session, outcome);
                    reason = "work for a session ended";
                }
                () = self.sessions.changed() => reason = "a session came or went",
                Some(found) = self.looks.next() => {
                    self.found(found);
                    reason = "a server was looked at";
                }
                () = self.shared.wake.notified() => reason = "intent changed",
                () = changed.notified() => {
                    self.observe_at = self.observe_at.min(Instant::now() + self.timing.observe_pause);
                    reason = "the engine reported a change";
                }
                () = self.shared.sampled.notified() => reason = "instances were sampled",
                () = tokio::time::sleep_until(due) => reason = "timer",
            }
        }
        // Work under way is left where it is, as a crash would leave it; the next start goes on from there.
        self.jobs.abort_all();
    }

    /// Until when there is nothing to do unless something happens.
    async fn due(&self) -> Instant {
        let idle = self.tracks.values().filter(|track| track.job.is_none());
        let waiting = idle.filter_map(|track| track.not_before).filter(|at| *at > Instant::now());
        waiting.chain(self.next_look()).chain(self.keeping.due(Instant::now())).fold(self.observe_at, Instant::min)
    }

    /// One pass. It can't fail: what goes wrong is in what it publishes.
    async fn pass(&mut self, reason: &'static str) {
        let began = Instant::now();
        if began >= self.observe_at {
            self.observe().await;
        }
        let started = if self.engine_status.reachable { self.apply().await } else { 0 };
        self.look_closer();
        self.report = PassReport {
            sequence: self.report.sequence + 1,
            reason,
            at: Some(Timestamp::now()),
            took: began.elapsed(),
            started,
        };
        self.publish().await;
    }
}
