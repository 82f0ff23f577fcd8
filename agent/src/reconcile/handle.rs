//! The handle through which everything else asks: it writes intent, wakes the loop, and waits for what the loop publishes.

mod accept;
mod group;
mod update;

use std::sync::Arc;
use std::time::Duration;

use dtma_api::health::Introduction;
use dtma_api::heartbeat::ToolStatus;
use dtma_api::instance::{InstanceEvent, InstanceView};
use dtma_api::{AccountToolInstanceId, GroupId, InstanceName};
use jiff::Timestamp;
use tokio::sync::{broadcast, watch};
use tokio::time::Instant;

use super::desk::{Desk, Shared};
use super::plan::Nudge;
use super::status::{EngineStatus, Snapshot};
use super::{Call, Pruned, Upstream, status};
use crate::egress::EgressProxy;
use crate::instance::reference;
use crate::instance::{
    Confidential, Departure, DeploymentId, Failure, Intent, LastUpdate, Reference, Spec, State, Unresolved,
};
use crate::store::ledger::{Contents, Entry, LedgerError};
use crate::store::vault::VaultError;

/// How long a caller is let wait for the first look at the engine after the agent's start.
const FIRST_LOOK: Duration = Duration::from_secs(5);

/// How long past its own patience a caller is let wait until the loop has taken notice, so that what was accepted can be found by the
/// caller's next request.
const NOTICE: Duration = Duration::from_secs(1);

pub use self::group::{GroupDeployment, GroupRemoval, Members};

/// The instances of this host. Cheap to clone.
#[derive(Clone)]
pub struct Instances {
    pub(super) shared: Arc<Shared>,
}

/// What became of a deploy.
#[derive(Debug, Clone)]
pub struct Deployment {
    /// The instance.
    pub view: InstanceView,
    /// This call brought it; otherwise the same spec was there already.
    pub created: bool,
    /// It is as asked; otherwise the work goes on.
    pub settled: bool,
}

/// What became of a start, stop or restart.
#[derive(Debug, Clone)]
pub struct Settled {
    /// The instance.
    pub view: InstanceView,
    /// It was so already.
    pub already: bool,
    /// It is as asked; otherwise the work goes on.
    pub settled: bool,
}

/// Why a reference leads to no instance.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// It names none, or more than one.
    #[error(transparent)]
    Unresolved(Unresolved),
    /// The ledger was lost, and what there is can be told only by an engine that doesn't answer.
    #[error(
        "which instances there are is known when the Docker Engine on the droplet answers; GET /ready tells when it does"
    )]
    Unseen,
}

/// What became of a removal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// Nothing is left.
    Gone,
    /// The work goes on.
    Working,
}

/// Why a request wasn't carried out.
#[derive(Debug, thiserror::Error)]
pub enum Rejection {
    /// There is no such instance.
    #[error("there is no instance called {0}")]
    NotFound(InstanceName),
    /// Another spec has this name.
    #[error("an instance called {0} exists with another specification; change it with PUT /tools/{0}")]
    Exists(InstanceName),
    /// Another version of the agent wrote the instance down, and this one can't read it.
    #[error(
        "an instance called {0} was deployed with a newer version of the agent, and this one can't read it: it is left as it is until \
         the agent is updated again"
    )]
    Unread(InstanceName),
    /// Another instance has this id.
    #[error("the accountToolInstanceId {id} belongs to the instance {holder}")]
    IdTaken {
        /// The id.
        id: AccountToolInstanceId,
        /// Who has it.
        holder: InstanceName,
    },
    /// Another instance was promised this port.
    #[error("port {port} is taken by {holder}")]
    PortTaken {
        /// The port.
        port: u16,
        /// Who has it, as in [`crate::instance::FailureKind::PortConflict`].
        holder: String,
    },
    /// Nobody is a member of this group.
    #[error("there is no group called {0}")]
    NoGroup(GroupId),
    /// Something that excludes this is going on.
    #[error("the instance {0} is being removed; try again when it is gone")]
    BeingRemoved(InstanceName),
    /// An update is under way, or the first deploy is.
    #[error("the instance {0} is being brought up or updated; try again when that has ended")]
    Busy(InstanceName),
    /// An instance keeps its id.
    #[error("the instance {name} has the accountToolInstanceId {id}, and keeps it")]
    OtherId {
        /// The instance.
        name: InstanceName,
        /// Its id.
        id: AccountToolInstanceId,
    },
    /// The new version failed, and the old one is back.
    #[error("the update of {name} was rolled back: {}", .failure.message)]
    RolledBack {
        /// The instance.
        name: InstanceName,
        /// Why the new version was taken back.
        failure: Failure,
    },
    /// All its secrets came with its deploy, or it has none.
    #[error(
        "the instance {0} has no secrets that could be fetched: it was deployed without secretsFrom and requiredOAuthProviders"
    )]
    NothingToFetch(InstanceName),
    /// Secrets can't be kept, so nothing was done.
    #[error("the secrets could not be kept in memory")]
    Vault(#[source] VaultError),
    /// Another caller wanted something else meanwhile.
    #[error("another request changed the instance {0} meanwhile")]
    Superseded(InstanceName),
    /// Docker doesn't answer.
    #[error("the Docker Engine does not answer")]
    EngineUnavailable,
    /// The intent could not be written down, so nothing was done.
    #[error("the request could not be recorded")]
    Ledger(#[source] LedgerError),
    /// It was tried, and failed.
    #[error("{}", .0.message)]
    Failed(Failure),
}

/// Why there is no way to an instance's MCP endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoUpstream {
    /// There is no such instance.
    #[error("there is no instance called {0}")]
    NotFound(InstanceName),
    /// It was deployed without `mcpTransportType`.
    #[error("the instance {0} is no MCP server: it was deployed without mcpTransportType")]
    NotMcp(InstanceName),
    /// Its container doesn't run.
    #[error("the instance {0} does not run")]
    NotRunning(InstanceName),
}

/// What a waiting caller finds.
enum Outcome {
    Here { state: State, failure: Option<Failure>, last_update: Option<Box<LastUpdate>>, view: Box<InstanceView> },
    Gone(Option<Failure>),
}

impl Instances {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Everything known at the end of the last pass. Costs nothing; it is shared.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.shared.published.borrow())
    }

    /// Follows what is published; the present one counts as seen only when it is looked at.
    pub fn watch_snapshots(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.shared.published.subscribe()
    }

    /// Every instance, by name.
    pub fn list(&self) -> Vec<InstanceView> {
        self.snapshot().instances.clone()
    }

    /// One instance.
    pub fn get(&self, name: &InstanceName) -> Option<InstanceView> {
        self.snapshot().view(name).cloned()
    }

    /// Every instance as a heartbeat reports it, those whose deploy failed included.
    pub fn tool_statuses(&self) -> Vec<ToolStatus> {
        self.snapshot().tool_statuses()
    }

    /// Waits for the loop's first look at the engine, which takes a moment after the agent's start, so that nobody is told that there is
    /// nothing before anybody has looked. Not for long: an engine that doesn't answer is looked at too.
    pub async fn looked(&self) {
        let mut published = self.shared.published.subscribe();
        let looked = published.wait_for(|snapshot| snapshot.pass.sequence > 0);
        // Whoever waited in vain is shown what there is.
        let _ = tokio::time::timeout(FIRST_LOOK, looked).await;
    }

    /// [`Self::resolve`] after the first look.
    ///
    /// # Errors
    /// See there; and when not all instances are known yet, so that nobody can say what isn't there.
    pub async fn find(&self, text: &str) -> Result<InstanceName, Missing> {
        self.looked().await;
        let incomplete = !self.snapshot().complete;
        self.resolve(text).map_err(|unresolved| match unresolved {
            Unresolved::Unknown(_) if incomplete => Missing::Unseen,
            Unresolved::Unknown(_) | Unresolved::Ambiguous(_) => Missing::Unresolved(unresolved),
        })
    }

    /// The instance called `text`: its name, the backend's id, or its container's.
    ///
    /// # Errors
    /// When nothing, or more than one container, is called that.
    pub fn resolve(&self, text: &str) -> Result<InstanceName, Unresolved> {
        let snapshot = self.snapshot();
        let all = snapshot.known.iter().map(|(name, known)| Reference {
            name,
            account_tool_instance_id: &known.account_tool_instance_id,
            container_id: known.container.as_ref().map(crate::engine::ContainerId::as_str).unwrap_or_default(),
        });
        reference::resolve(text, all).cloned()
    }

    /// The group the instance is part of, and whether its members reach each other.
    pub fn membership(&self, name: &InstanceName) -> (Option<GroupId>, bool) {
        self.snapshot().known.get(name).map(|known| known.membership.clone()).unwrap_or_default()
    }

    /// Where the instance's MCP endpoint is.
    ///
    /// # Errors
    /// When it has none now.
    pub fn upstream(&self, name: &InstanceName) -> Result<Upstream, NoUpstream> {
        let snapshot = self.snapshot();
        let known = snapshot.known.get(name).ok_or_else(|| NoUpstream::NotFound(name.clone()))?;
        if !known.mcp {
            return Err(NoUpstream::NotMcp(name.clone()));
        }
        known.upstream.clone().ok_or_else(|| NoUpstream::NotRunning(name.clone()))
    }

    /// Somebody begins to call the instance's server. While the answer lasts, that it has no time for probes isn't held against it.
    pub fn call(&self, name: &InstanceName) -> Call {
        self.shared.calls.begin(name, Instant::now().into_std())
    }

    /// What the instance's MCP server said of itself when it was last probed; none before that, and where it can't be.
    pub fn introduction(&self, name: &InstanceName) -> Option<Arc<Introduction>> {
        self.snapshot().known.get(name)?.server.clone()
    }

    /// Whether the container engine answers.
    pub fn engine_status(&self) -> EngineStatus {
        self.snapshot().engine.clone()
    }

    /// Whether intent can be written down.
    ///
    /// # Errors
    /// The reason why the last attempt failed; it is tried again on the timer.
    pub fn ledger_writable(&self) -> Result<(), String> {
        self.shared.write_problem().map_or(Ok(()), Err)
    }

    /// The way out of instances whose egress is a list.
    pub fn egress(&self) -> &EgressProxy {
        &self.shared.egress
    }

    /// How many images were removed because nobody needed them.
    pub fn pruned(&self) -> Pruned {
        self.shared.prune.counts()
    }

    /// Every event from now on.
    pub fn events(&self) -> broadcast::Receiver<InstanceEvent> {
        self.shared.journal.watch().1
    }

    /// The last events, oldest first, and every one after them.
    pub fn events_with_history(&self) -> (Vec<InstanceEvent>, broadcast::Receiver<InstanceEvent>) {
        self.shared.journal.watch()
    }

    /// Brings an instance into being and waits up to `wait` until it runs.
    ///
    /// # Errors
    /// When it can't be accepted, or was tried and failed; then nothing of it is left.
    pub async fn deploy(&self, spec: Spec, wait: Duration) -> Result<Deployment, Rejection> {
        self.deploy_with(spec, Confidential::default(), wait).await
    }

    /// The same, with what is kept in memory only: registry credentials and the values of its secrets. They replace those given before, also
    /// where the spec is the same.
    ///
    /// # Errors
    /// As [`Self::deploy`].
    pub async fn deploy_with(
        &self,
        spec: Spec,
        confidential: impl Into<Confidential> + Send,
        wait: Duration,
    ) -> Result<Deployment, Rejection> {
        let confidential = confidential.into();
        let deadline = Instant::now() + wait;
        self.engine_answers().await?;
        let name = spec.name.clone();
        let entry = Arc::new(new_entry(spec));
        let (shared, asked) = (Arc::clone(&self.shared), name.clone());
        let accepted = self
            .record(move |desk| {
                let accepted = accept::deploy(desk, &entry, confidential, shared.secrets.vault())?;
                if accepted.created {
                    // Before the desk is left, and with it before the loop begins the work that the next events tell of.
                    shared.journal.write(&asked, "accepted", "the deploy was accepted");
                }
                Ok(accepted)
            })
            .await?;
        self.deployed(&name, accepted, deadline).await
    }

    /// Waits for what becomes of an accepted deploy.
    async fn deployed(
        &self,
        name: &InstanceName,
        accepted: accept::Accepted,
        deadline: Instant,
    ) -> Result<Deployment, Rejection> {
        let accept::Accepted { ticket, created, pending } = accepted;
        match self.outcome(name, ticket, deadline).await {
            Some(Outcome::Here { state: State::Stopped | State::Removing, .. }) if created => {
                Err(Rejection::Superseded(name.clone()))
            }
            Some(Outcome::Here { view, .. }) => Ok(Deployment { view: *view, created, settled: true }),
            Some(Outcome::Gone(Some(failure))) => Err(Rejection::Failed(failure)),
            Some(Outcome::Gone(None)) => Err(Rejection::Superseded(name.clone())),
            None => {
                let view = self.get(name).unwrap_or(*pending);
                Ok(Deployment { view, created, settled: false })
            }
        }
    }

    /// Starts the instance, and keeps it so.
    ///
    /// # Errors
    /// When it can't be, or was tried and failed; it is then tried again with growing pauses.
    pub async fn start(&self, name: &InstanceName, wait: Duration) -> Result<Settled, Rejection> {
        let running = self.state(name) == Some(State::Running);
        self.bring(name, wait, Intent::Run, move |desk, name, was| {
            if was == &Intent::Run && running {
                return None;
            }
            desk.nudge(name, Nudge::Start);
            Some(desk.take_ticket(name))
        })
        .await
    }

    /// Stops the instance and keeps it stopped, also after a reboot.
    ///
    /// # Errors
    /// When it can't be.
    pub async fn stop(&self, name: &InstanceName, wait: Duration) -> Result<Settled, Rejection> {
        let stopped = self.state(name) == Some(State::Stopped);
        self.bring(name, wait, Intent::Stop, move |desk, name, was| {
            if was == &Intent::Stop && stopped { None } else { Some(desk.take_ticket(name)) }
        })
        .await
    }

    /// Starts the instance anew.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn restart(&self, name: &InstanceName, wait: Duration) -> Result<Settled, Rejection> {
        self.bring(name, wait, Intent::Run, |desk, name, _| {
            desk.nudge(name, Nudge::Restart);
            Some(desk.take_ticket(name))
        })
        .await
    }

    /// Removes the instance; its named volumes only when `volumes` says so.
    ///
    /// # Errors
    /// When there is none, or Docker failed; it is then tried again.
    pub async fn remove(&self, name: &InstanceName, volumes: bool, wait: Duration) -> Result<Removal, Rejection> {
        let deadline = Instant::now() + wait;
        self.engine_answers().await?;
        let asked = name.clone();
        let ticket = self
            .record(move |desk| {
                let entry = desk.contents().entries.get(&asked).ok_or_else(|| Rejection::NotFound(asked.clone()))?;
                let intent = match &entry.intent {
                    Intent::Run | Intent::Stop => Intent::Remove(Departure::Asked { volumes, grace_seconds: None }),
                    Intent::Remove(Departure::Asked { volumes: already, grace_seconds }) => {
                        let grace_seconds = *grace_seconds;
                        Intent::Remove(Departure::Asked { volumes: volumes || *already, grace_seconds })
                    }
                    undone @ Intent::Remove(Departure::Undone(_)) => undone.clone(),
                };
                set_intent(desk, &asked, intent)?;
                Ok(desk.take_ticket(&asked))
            })
            .await?;
        match self.outcome(name, ticket, deadline).await {
            Some(Outcome::Gone(_)) => Ok(Removal::Gone),
            Some(Outcome::Here { failure: Some(failure), .. }) => Err(Rejection::Failed(failure)),
            Some(Outcome::Here { failure: None, .. }) | None => Ok(Removal::Working),
        }
    }

    fn state(&self, name: &InstanceName) -> Option<State> {
        self.snapshot().known.get(name).map(|known| known.state.clone())
    }

    /// Sets an existing instance's intent and waits for it. `request` gives the number to wait for, or nothing when it is so already.
    async fn bring(
        &self,
        name: &InstanceName,
        wait: Duration,
        intent: Intent,
        request: impl FnOnce(&mut Desk, &InstanceName, &Intent) -> Option<u64> + Send + 'static,
    ) -> Result<Settled, Rejection> {
        let deadline = Instant::now() + wait;
        self.engine_answers().await?;
        let (asked, wanted) = (name.clone(), intent.clone());
        let (ticket, pending) = self
            .record(move |desk| {
                let entry = desk.contents().entries.get(&asked).ok_or_else(|| Rejection::NotFound(asked.clone()))?;
                let was = entry.intent.clone();
                if matches!(was, Intent::Remove(_)) {
                    return Err(Rejection::BeingRemoved(asked));
                }
                update::not_updating(entry)?;
                let pending = status::Facts::accepted(entry);
                set_intent(desk, &asked, wanted)?;
                Ok((request(desk, &asked, &was), pending))
            })
            .await?;
        let missing = || Rejection::Superseded(name.clone());
        let Some(ticket) = ticket else {
            let view = self.get(name).unwrap_or(pending);
            return Ok(Settled { view, already: true, settled: true });
        };
        match self.outcome(name, ticket, deadline).await {
            Some(Outcome::Here { state: State::Failed { failure, .. }, .. }) => Err(Rejection::Failed(failure)),
            Some(Outcome::Here { state, view, .. }) => match (&intent, &state) {
                (Intent::Run, State::Running) | (Intent::Stop, State::Stopped) => {
                    Ok(Settled { view: *view, already: false, settled: true })
                }
                (Intent::Run, State::Stopped | State::Stopping | State::Removing)
                | (Intent::Stop, State::Running | State::Removing) => Err(missing()),
                (Intent::Run | Intent::Stop | Intent::Remove(_), _) => {
                    Ok(Settled { view: *view, already: false, settled: false })
                }
            },
            Some(Outcome::Gone(Some(failure))) => Err(Rejection::Failed(failure)),
            Some(Outcome::Gone(None)) => Err(missing()),
            None => Ok(Settled { view: self.get(name).unwrap_or(pending), already: false, settled: false }),
        }
    }

    async fn record<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Desk) -> Result<T, Rejection> + Send + 'static,
    ) -> Result<T, Rejection> {
        let result = self.shared.change(change).await.map_err(Rejection::Ledger).and_then(|result| result);
        if let Err(Rejection::Ledger(error)) = &result {
            self.shared.note_write_problem(error);
        }
        result
    }

    async fn engine_answers(&self) -> Result<(), Rejection> {
        self.looked().await;
        if self.snapshot().engine.reachable { Ok(()) } else { Err(Rejection::EngineUnavailable) }
    }

    /// Waits until the loop has settled request `ticket`, or `deadline`.
    async fn outcome(&self, name: &InstanceName, ticket: u64, deadline: Instant) -> Option<Outcome> {
        let mut published = self.shared.published.subscribe();
        let settled = published.wait_for(|snapshot| found(snapshot, name, ticket).is_some());
        // Cloned at once: holding on to what `wait_for` gives would keep the loop from publishing.
        let snapshot =
            tokio::time::timeout_at(deadline, settled).await.ok().map(|found| found.map(|found| Arc::clone(&found)));
        let Some(snapshot) = snapshot else {
            let noticed = published.wait_for(|snapshot| {
                snapshot.known.get(name).is_some_and(|known| known.asked >= ticket)
                    || snapshot.departed.get(name).is_some_and(|departed| departed.settled >= ticket)
            });
            // It isn't settled either way; only when the caller is told so differs.
            let _ = tokio::time::timeout(NOTICE, noticed).await;
            return None;
        };
        found(&*snapshot.ok()?, name, ticket)
    }
}

/// What became of request `ticket`, once that is known.
fn found(snapshot: &Snapshot, name: &InstanceName, ticket: u64) -> Option<Outcome> {
    let here = snapshot.known.get(name).zip(snapshot.view(name));
    if let Some((known, view)) = here.filter(|(known, _)| known.first <= ticket) {
        let here = || Outcome::Here {
            state: known.state.clone(),
            failure: known.failure.clone(),
            last_update: known.last_update.clone().map(Box::new),
            view: Box::new(view.clone()),
        };
        return (known.settled >= ticket).then(here);
    }
    match snapshot.departed.get(name).filter(|departed| departed.settled >= ticket) {
        Some(departed) => Some(Outcome::Gone(departed.failure.clone())),
        // Whoever has the name now came after it.
        None => here.map(|_| Outcome::Gone(None)),
    }
}

/// A promise that has just been made.
fn new_entry(spec: Spec) -> Entry {
    Entry {
        spec_hash: spec.hash(),
        deployment: DeploymentId(uuid::Uuid::new_v4()),
        intent: Intent::Run,
        proven: false,
        image_digest: None,
        accepted_at: Timestamp::now(),
        batch: None,
        update: None,
        last_update: None,
        spec,
    }
}

/// Writes down what is wanted of an instance; nothing is written when it was wanted before.
fn set_intent(desk: &mut Desk, name: &InstanceName, intent: Intent) -> Result<(), Rejection> {
    match with_entry(desk.contents(), name, |entry| entry.intent = intent) {
        Some(contents) if &contents != desk.contents() => desk.commit(contents).map_err(Rejection::Ledger),
        Some(_) | None => Ok(()),
    }
}

/// The ledger's contents with one entry changed.
pub(super) fn with_entry(
    contents: &Contents,
    name: &InstanceName,
    change: impl FnOnce(&mut Entry),
) -> Option<Contents> {
    let mut contents = contents.clone();
    change(Arc::make_mut(contents.entries.get_mut(name)?));
    Some(contents)
}
