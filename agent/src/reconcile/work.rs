//! Carrying out one job: the steps for one instance, one after the other, until one fails or the job isn't wanted any more.
//!
//! Every step may be the last one this process does, so each leaves something the plan can go on from.

use std::net::SocketAddr;
use std::sync::Arc;

use dtma_api::InstanceName;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::desk::Shared;
use super::failure::{Meaning, meaning};
use super::plan::{Edition, Goal, Job, Step};
use super::status::upstream;
use super::{Answer, Prober, Question, Timing, Upstream, health};
use crate::egress;
use crate::engine::{Condition, Container, ContainerId, EngineError, Exit, LogOptions, exact_ports};
use crate::instance::{Departure, Egress, Failure, FailureKind, HealthGate, Intent, RestartPolicy, Spec, State};
use crate::store::ledger::{Entry, Version};

/// How many lines of a failed server's output go into the failure.
const LAST_LINES: u32 = 20;
/// How long Docker may take to make a container whose name is taken already.
const UNSEEN: std::time::Duration = std::time::Duration::from_secs(10);

/// How much goes on at once, over all instances.
#[derive(Debug)]
pub(super) struct Gates {
    pub(super) pulls: Semaphore,
    calls: Semaphore,
}

impl Gates {
    pub(super) fn new() -> Self {
        Self { pulls: Semaphore::new(3), calls: Semaphore::new(8) }
    }
}

/// One job and all it needs.
pub(super) struct Work {
    pub(super) job: Job,
    pub(super) entry: Arc<Entry>,
    pub(super) shared: Arc<Shared>,
    pub(super) prober: Arc<dyn Prober>,
    pub(super) timing: Timing,
    pub(super) gates: Arc<Gates>,
    pub(super) cancel: CancellationToken,
    pub(super) reports: mpsc::UnboundedSender<(InstanceName, State)>,
}

/// How a job ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Its goal is reached.
    Reached(Box<Reached>),
    /// A step failed.
    Failed(Failure),
    /// What was planned doesn't fit what is there, or isn't wanted any more.
    LookAgain,
}

/// What is known when the goal is reached.
#[derive(Debug)]
pub(super) struct Reached {
    pub(super) container: Option<Container>,
    pub(super) image_digest: Option<String>,
    /// How its server answered, where it was asked.
    pub(super) answer: Option<Answer>,
}

/// Why a job ends before its goal.
pub(super) enum Stop {
    Failed(Failure),
    LookAgain,
}

/// Why the egress proxy isn't open.
#[derive(Debug, thiserror::Error)]
pub(super) enum CannotOpen {
    #[error(transparent)]
    Engine(EngineError),
    #[error(transparent)]
    Listen(egress::CannotListen),
}

/// Sees that the egress proxy listens on the network for allow-lists.
pub(super) async fn open_egress(shared: &Shared) -> Result<(), CannotOpen> {
    let gateway = shared.engine.egress_gateway().await.map_err(CannotOpen::Engine)?;
    shared.egress.open(SocketAddr::new(gateway, egress::PORT)).await.map_err(CannotOpen::Listen)
}

impl Work {
    /// Does the job. Dropping the future is what a crash does: nothing is taken back, and the next plan goes on from what is there.
    pub(super) async fn carry_out(self) -> Outcome {
        let mut progress = Reached { container: None, image_digest: None, answer: None };
        let mut container = self.job.container.clone();
        match self.have_secrets().await {
            Ok(()) => {}
            Err(Stop::Failed(failure)) => return Outcome::Failed(failure),
            Err(Stop::LookAgain) => return Outcome::LookAgain,
        }
        for step in &self.job.steps {
            if self.cancel.is_cancelled() {
                return Outcome::LookAgain;
            }
            match self.step(step, &mut container, &mut progress).await {
                Ok(()) => {}
                Err(Stop::Failed(failure)) => return Outcome::Failed(failure),
                Err(Stop::LookAgain) => return Outcome::LookAgain,
            }
        }
        // What was stopped, or started anew, is looked at once more; what was awaited has been.
        if let (Goal::Revived, Some(id)) = (self.job.goal, &container) {
            match self.shared.engine.inspect(id).await {
                Ok(Some(found)) if matches!(found.condition, Condition::Running { .. }) => {
                    progress.container = Some(found);
                }
                Ok(_) | Err(_) => return Outcome::LookAgain,
            }
        }
        if let (Goal::Stopped, Some(id)) = (self.job.goal, &container) {
            match self.shared.engine.inspect(id).await {
                // Somebody has started it again meanwhile, perhaps Docker itself at the word of an agent that died since.
                Ok(Some(Container { condition: Condition::Running { .. } | Condition::Restarting(_), .. }))
                | Err(_) => {
                    return Outcome::LookAgain;
                }
                Ok(found) => progress.container = found,
            }
        }
        Outcome::Reached(Box::new(progress))
    }

    pub(super) fn name(&self) -> &InstanceName {
        &self.job.instance
    }

    /// The version the job is about. A next version that went away meanwhile means that the job isn't wanted any more.
    pub(super) fn version(&self) -> Version<'_> {
        match self.job.edition {
            Edition::Present => self.entry.present(),
            Edition::Next => self.entry.next().unwrap_or(self.entry.present()),
        }
    }

    pub(super) fn spec(&self) -> &Spec {
        self.version().spec
    }

    pub(super) fn enter(&self, state: State, event: &str, message: impl Into<String>) {
        self.shared.journal.write(self.name(), event, message);
        let state = match self.job.goal {
            Goal::Updated => State::Updating,
            // The instance goes on as it was.
            Goal::Tidy => return,
            Goal::Running | Goal::Revived | Goal::Stopped | Goal::Reverted | Goal::Gone => state,
        };
        // The loop outlives its jobs; when it doesn't, nobody is left to tell.
        let _ = self.reports.send((self.name().clone(), state));
    }

    async fn step(&self, step: &Step, container: &mut Option<ContainerId>, progress: &mut Reached) -> Result<(), Stop> {
        let engine = &self.shared.engine;
        let grace = self.grace();
        match (step, &*container) {
            (Step::Fetch, _) => {
                progress.image_digest = self.fetch().await?;
                return Ok(());
            }
            (Step::Create, _) => {
                self.open_the_way_out().await?;
                self.enter(State::Creating, "creating", "creating the container");
                let _permit = self.gates.calls.acquire().await;
                let version = self.version();
                match engine.create(&self.container_name(), version.spec, &version.deployment).await {
                    Ok(id) => *container = Some(id),
                    Err(error) => return Err(self.explain(&error).await),
                }
                return Ok(());
            }
            (Step::Await, Some(id)) => return self.wait_until_up(id, progress).await,
            (Step::Start | Step::Restart | Step::Stop | Step::Rename | Step::Adjust | Step::Await, None) => {
                return Err(Stop::LookAgain);
            }
            (Step::Discard(_) | Step::Retire(_) | Step::RemoveVolumes(_), _)
            | (Step::Start | Step::Restart | Step::Stop | Step::Rename | Step::Adjust, _) => {}
        }
        if let (Step::Start | Step::Restart, Some(id)) = (step, &*container) {
            self.open_the_way_out().await?;
            self.announce(id).await?;
        }
        let _permit = self.gates.calls.acquire().await;
        let result = match (step, &*container) {
            (Step::Start, Some(id)) => {
                self.enter(State::Starting, "starting", "starting the container");
                engine.start(id).await
            }
            (Step::Restart, Some(id)) => {
                self.enter(State::Starting, "restarting", "restarting the container");
                engine.restart(id, grace).await
            }
            (Step::Stop, Some(id)) => {
                let state = if self.job.goal == Goal::Gone { State::Removing } else { State::Stopping };
                self.enter(state, "stopping", "stopping the container");
                engine.stop(id, grace).await
            }
            (Step::Retire(id), _) => {
                self.enter(State::Updating, "replacing", "stopping the old version's container");
                engine.stop(id, grace).await
            }
            (Step::Rename, Some(id)) => engine.rename(id, self.spec().name.as_str()).await,
            (Step::Adjust, Some(id)) => {
                self.shared.journal.write(
                    self.name(),
                    "adjusting",
                    "its limits or its restart policy were changed, and not by the agent; they are put right",
                );
                engine.adjust(id, self.spec()).await
            }
            (Step::Discard(id), _) => {
                if self.job.goal == Goal::Gone {
                    self.enter(State::Removing, "removing", "removing the container");
                } else {
                    self.shared.journal.write(
                        self.name(),
                        "replacing",
                        "removing a container that is not wanted any more",
                    );
                }
                engine.remove(id).await
            }
            (Step::RemoveVolumes(which), _) => engine.remove_volumes(which).await,
            // Handled above.
            (Step::Fetch | Step::Create | Step::Await, _)
            | (Step::Start | Step::Restart | Step::Stop | Step::Rename | Step::Adjust, None) => Ok(()),
        };
        match result {
            Ok(()) => Ok(()),
            Err(error) => Err(self.explain(&error).await),
        }
    }

    /// Seconds a server is given to end by itself.
    fn grace(&self) -> u32 {
        match &self.entry.intent {
            Intent::Remove(Departure::Asked { grace_seconds: Some(seconds), .. }) => *seconds,
            Intent::Run | Intent::Stop | Intent::Remove(_) => self.timing.stop_grace_seconds,
        }
    }

    /// Sees that the proxy is there before anything runs that has no other way out.
    async fn open_the_way_out(&self) -> Result<(), Stop> {
        let Egress::AllowList(_) = self.spec().network.egress else { return Ok(()) };
        match open_egress(&self.shared).await {
            Ok(()) => Ok(()),
            Err(CannotOpen::Engine(error)) => Err(self.explain(&error).await),
            Err(CannotOpen::Listen(error)) => {
                Err(Stop::Failed(Failure::new(FailureKind::EgressUnavailable, error.to_string())))
            }
        }
    }

    /// Tells the proxy whose address the container has, before it runs.
    async fn announce(&self, id: &ContainerId) -> Result<(), Stop> {
        let Egress::AllowList(_) = self.spec().network.egress else { return Ok(()) };
        match self.shared.engine.inspect(id).await {
            Ok(Some(found)) => {
                self.shared.residents.moves_in(self.name(), self.spec(), &found);
                Ok(())
            }
            Ok(None) => Err(Stop::LookAgain),
            Err(error) => Err(self.explain(&error).await),
        }
    }

    /// What the job's container is called. The next version's gets the instance's name when the old one's is gone; until then it has one
    /// that no instance and hardly a stranger has.
    fn container_name(&self) -> String {
        match self.job.edition {
            Edition::Present => self.entry.spec.name.to_string(),
            Edition::Next => format!("dtma-next-{}", self.version().deployment.0),
        }
    }

    /// Waits until it has shown that it runs; an end of its process ends that at once.
    async fn wait_until_up(&self, id: &ContainerId, progress: &mut Reached) -> Result<(), Stop> {
        tokio::select! {
            up = self.pass_gate(id, progress) => up,
            exit = self.shared.engine.next_exit(id) => Err(match exit {
                Ok(code) => self.exited(id, code).await,
                Err(error) => self.explain(&error).await,
            }),
        }
    }

    /// What the version has to show, and how long it may take.
    fn gate(&self) -> (std::time::Duration, u32) {
        match (self.job.edition, &self.entry.update) {
            (Edition::Next, Some(update)) => {
                let HealthGate { timeout_seconds, successes } = update.gate;
                (std::time::Duration::from_secs(timeout_seconds.into()), successes)
            }
            (Edition::Next, None) | (Edition::Present, _) => {
                let check = &self.spec().health_check;
                (std::time::Duration::from_secs(check.start_period_seconds.into()), check.success_threshold)
            }
        }
    }

    /// Looks again and again until it was found well as often in a row as the gate wants.
    async fn pass_gate(&self, id: &ContainerId, progress: &mut Reached) -> Result<(), Stop> {
        let Some(first) = self.look(id, None).await? else { return Err(Stop::LookAgain) };
        let (patience, successes) = self.gate();
        let answers = health::is_checked(self.spec());
        let what = if answers { "waiting for the server to answer" } else { "waiting to see whether it stays up" };
        self.enter(State::Probing, "probing", what);
        let started = Instant::now();
        let mut last = "its container has no address".to_owned();
        let mut in_a_row = 0;
        while started.elapsed() < patience {
            match self.check(&first).await? {
                Ok(answer) => {
                    progress.container = self.look(id, Some(first.restart_count)).await?;
                    progress.answer = answer;
                    in_a_row += 1;
                    if in_a_row >= successes {
                        return Ok(());
                    }
                }
                Err(reason) => {
                    last = reason;
                    in_a_row = 0;
                }
            }
            self.pause(self.timing.probe_pause).await?;
        }
        let seconds = patience.as_secs();
        let message = if in_a_row > 0 {
            format!("the server was found well only {in_a_row} times in a row within {seconds} s of its start")
        } else {
            format!("the server did not answer as an MCP server within {seconds} s of its start: {last}")
        };
        let mut failure = Failure::new(FailureKind::NotAnswering, message);
        failure.log = self.last_lines(id).await;
        Err(Stop::Failed(failure))
    }

    /// Whether it is well now: an MCP server answers as one, or on its port where it can't be asked; anything else has stayed up.
    async fn check(&self, container: &Container) -> Result<Result<Option<Answer>, String>, Stop> {
        if !health::is_checked(self.spec()) {
            self.pause(self.timing.settle).await?;
            return Ok(Ok(None));
        }
        let Some(at) = upstream(self.spec(), container) else {
            return Ok(Err("its container has no address".to_owned()));
        };
        let answer = self.probe(&at).await?;
        if answer == Ok(Answer::CannotSay) {
            self.pause(self.timing.settle).await?;
        }
        Ok(answer.map(Some))
    }

    /// The process ended with `code`; the engine may know more about it.
    async fn exited(&self, id: &ContainerId, code: i64) -> Stop {
        let seen = match self.shared.engine.inspect(id).await {
            Ok(seen) => seen.map(|container| container.condition),
            // It went away together with its containers.
            Err(EngineError::Unavailable { .. }) => return Stop::LookAgain,
            Err(_) => None,
        };
        let exit = match seen {
            // A process that ends by itself is started again under this policy. This one was ended from outside: by somebody, or by an
            // engine that is about to restart. That says nothing about the server.
            Some(Condition::Exited(_)) if self.spec().restart == RestartPolicy::UnlessStopped => {
                return Stop::LookAgain;
            }
            Some(Condition::Restarting(exit) | Condition::Exited(exit)) => exit,
            Some(_) | None => Exit { code, out_of_memory: false, error: String::new() },
        };
        Stop::Failed(self.ended(id, &exit).await)
    }

    async fn probe(&self, at: &Upstream) -> Result<Result<Answer, String>, Stop> {
        let patience = std::time::Duration::from_secs(self.spec().health_check.timeout_seconds.into());
        // Callers wait for this one; the tools can come later.
        let question = Question { patience, tools: false };
        tokio::select! {
            answer = self.prober.probe(at, question) => Ok(answer.map_err(|failure| failure.reason)),
            () = self.cancel.cancelled() => Err(Stop::LookAgain),
        }
    }

    async fn pause(&self, pause: std::time::Duration) -> Result<(), Stop> {
        tokio::select! {
            () = tokio::time::sleep(pause) => Ok(()),
            () = self.cancel.cancelled() => Err(Stop::LookAgain),
        }
    }

    /// The container, when its process runs and has not ended since it had been restarted `restarts` times.
    async fn look(&self, id: &ContainerId, restarts: Option<u64>) -> Result<Option<Container>, Stop> {
        let found = match self.shared.engine.inspect(id).await {
            Ok(Some(found)) => found,
            Ok(None) => return Err(Stop::LookAgain),
            Err(error) => return Err(self.explain(&error).await),
        };
        match &found.condition {
            Condition::Running { .. } if restarts.is_none_or(|before| found.restart_count <= before) => Ok(Some(found)),
            Condition::Running { .. } => {
                let message = "the server's process ended soon after its start, and Docker started it again";
                let mut failure = Failure::new(FailureKind::Exited { code: None }, message);
                failure.log = self.last_lines(id).await;
                Err(Stop::Failed(failure))
            }
            Condition::Restarting(exit) | Condition::Exited(exit) => Err(Stop::Failed(self.ended(id, exit).await)),
            Condition::Created | Condition::Paused | Condition::Removing | Condition::Dead => Err(Stop::LookAgain),
        }
    }

    async fn ended(&self, id: &ContainerId, exit: &Exit) -> Failure {
        let mut message = format!("the server's process ended soon after its start with exit code {}", exit.code);
        if exit.out_of_memory {
            message.push_str(", because it used up its memory limit");
        }
        if !exit.error.is_empty() {
            message.push_str(": ");
            message.push_str(&exit.error);
        }
        let mut failure = Failure::new(FailureKind::Exited { code: Some(exit.code) }, message);
        failure.log = self.last_lines(id).await;
        failure
    }

    /// The server's last words. That they can't be had must not hide why they were wanted.
    async fn last_lines(&self, id: &ContainerId) -> Vec<String> {
        use futures_util::StreamExt as _;

        let options = LogOptions { tail: Some(LAST_LINES), ..LogOptions::default() };
        let lines = self.shared.engine.logs(id, options);
        lines
            .take(LAST_LINES as usize)
            .filter_map(|line| std::future::ready(line.ok()))
            .map(|line| line.message.chars().take(500).collect())
            .collect()
            .await
    }

    /// Why an engine error ends the job.
    pub(super) async fn explain(&self, error: &EngineError) -> Stop {
        tracing::warn!(
            instance = %self.name(),
            error = error as &dyn std::error::Error,
            "a step failed"
        );
        match meaning(error, self.spec()) {
            Meaning::Failed(failure) => Stop::Failed(failure),
            Meaning::LookAgain => Stop::LookAgain,
            Meaning::NameTaken => self.name_taken().await,
            Meaning::PortTaken(port) => self.port_taken(port).await,
        }
    }

    /// A container of ours with this name only means that the plan was made too early. So does one that isn't to be seen yet: Docker takes
    /// the name before it makes the container, and whoever asked for it may have died since, this agent included.
    async fn name_taken(&self) -> Stop {
        let name = self.container_name();
        let engine = &self.shared.engine;
        let begun = Instant::now();
        loop {
            match engine.list().await {
                Ok(ours) if ours.iter().any(|container| container.name == name) => return Stop::LookAgain,
                Ok(_) => {}
                Err(_) => return Stop::LookAgain,
            }
            // Docker takes a name where it takes an id.
            match engine.inspect(&ContainerId(name.clone())).await {
                Ok(None) if begun.elapsed() < UNSEEN => {}
                Ok(_) => break,
                Err(_) => return Stop::LookAgain,
            }
            if let Err(stop) = self.pause(self.timing.observe_pause).await {
                return stop;
            }
        }
        Stop::Failed(Failure::new(
            FailureKind::NameConflict,
            format!(
                "a container called {name} exists on the droplet that this agent did not make; choose another name"
            ),
        ))
    }

    async fn port_taken(&self, port: Option<u16>) -> Stop {
        let wanted = exact_ports(self.spec()).find(|(number, _)| port.is_none_or(|port| port == *number));
        let holder = match wanted {
            Some((number, protocol)) => self.shared.engine.port_holder(number, protocol).await.ok().flatten(),
            None => None,
        };
        let holder = match holder {
            Some(container) => match self.shared.engine.list().await {
                Ok(ours) if ours.iter().any(|our| our.name == container) => format!("instance {container}"),
                Ok(_) | Err(_) => format!("container {container}"),
            },
            None => "a process on the droplet".to_owned(),
        };
        let number = port.or(wanted.map(|(number, _)| number)).map(|number| format!(" {number}")).unwrap_or_default();
        let message = format!("host port{number} is taken by {holder}");
        Stop::Failed(Failure::new(FailureKind::PortConflict { holder }, message))
    }
}
