//! The task that keeps in touch: enrolment first, where there has been none, then heartbeats for as long as the agent runs.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use dtma_api::enrolment::{AgentSettings, EnrolmentRequest};
use dtma_api::heartbeat::{Directives, Heartbeat};
use dtma_api::instance::InstanceEvent;
use dtma_api::{Token, TokenHash};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::client::{BackendClient, BackendError};
use super::pace::{backoff, chance, jittered};
use super::secrets::{Access, BackendSecrets};
use crate::causes::in_one_line as chain;
use crate::config::Backend;
use crate::http::callers::Callers;
use crate::store::identity::{Enrolment, Identity};
use crate::update::Updates;

/// A provisioner can't ask for more heartbeats than this, nor for fewer: an agent that never calls can't be told otherwise.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);
const LONGEST_INTERVAL: Duration = Duration::from_secs(3600);

/// The time between heartbeats when a provisioner asks for so many seconds.
pub(super) fn heartbeat_interval(seconds: u64) -> Duration {
    Duration::from_secs(seconds).clamp(SHORTEST_INTERVAL, LONGEST_INTERVAL)
}

/// How patient a link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Between heartbeats, until a provisioner says otherwise.
    pub interval: Duration,
    /// Changes that come together within this time go out in one heartbeat.
    pub settle: Duration,
    /// At least this long between two heartbeats, whatever changes.
    pub pause: Duration,
    /// First wait after a failure; doubles up to the interval, or `longest_enrol_wait`.
    pub first_wait: Duration,
    /// Longest wait between two attempts to enrol.
    pub longest_enrol_wait: Duration,
    /// Wait after a refusal that is final: only a person can change that, so asking often would help nobody.
    pub refused_wait: Duration,
    /// The longest a call may take, answer included.
    pub answer: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(60),
            settle: Duration::from_millis(250),
            pause: Duration::from_secs(1),
            first_wait: Duration::from_millis(500),
            longest_enrol_wait: Duration::from_secs(30),
            refused_wait: Duration::from_secs(600),
            answer: Duration::from_secs(15),
        }
    }
}

impl Patience {
    fn after(&self, failures: u32, longest: Duration) -> Duration {
        backoff(failures, self.first_wait, longest, chance())
    }
}

/// What a link needs of the rest of the agent.
pub struct Reporting {
    /// Makes a report of this moment, given the generation of the settings in use.
    pub report: Box<dyn Fn(Option<u64>) -> Heartbeat + Send + Sync>,
    /// What happens to instances; a change is reported at once.
    pub events: broadcast::Receiver<InstanceEvent>,
    /// Where other versions of the agent are asked for; what the updater does is reported soon.
    pub updates: Updates,
    /// Where the keys a provisioner brings go.
    pub callers: Arc<Callers>,
    /// Keys from the agent's own settings, accepted whatever a provisioner says.
    pub own_keys: Vec<TokenHash>,
}

impl fmt::Debug for Reporting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reporting").finish_non_exhaustive()
    }
}

/// How the agent stands with whoever sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkState {
    /// It reports to nobody, on purpose.
    Offline,
    /// It is not known yet. Not ready.
    Enrolling {
        /// Why the last attempt failed, for a person.
        problem: Option<String>,
    },
    /// It has a token of its own and reports.
    Linked {
        /// Heartbeats taken since the agent started.
        taken: u64,
        /// Heartbeats that failed in a row.
        failing: u32,
        /// Why the last one failed, for a person.
        problem: Option<String>,
    },
}

/// The settings name a provisioner, but neither a one-time token nor an earlier enrolment gives access to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this agent has never enrolled and has no token: set DTMA_ENROLMENT_TOKEN, or DTMA_BEARER_TOKEN for a backend without \
     provisioner, or OFFLINE_MODE=true"
)]
pub struct NoToken;

/// A link that is set up and not running yet.
#[derive(Debug)]
pub struct Link {
    kind: Kind,
    state: watch::Sender<LinkState>,
    access: watch::Sender<Option<Access>>,
    patience: Patience,
}

#[derive(Debug)]
enum Kind {
    Offline,
    Standalone { base_url: String, bearer: Token },
    Enrolled { base_url: String, identity: Identity, enrolment: Enrolment },
    Enrolling { base_url: String, identity: Identity, token: Token },
}

impl Link {
    /// Decides how this agent reports, and tells `callers` the keys that are known already. No I/O.
    ///
    /// # Errors
    /// [`NoToken`].
    pub fn new(
        backend: Backend,
        identity: Identity,
        own_keys: &[TokenHash],
        callers: &Callers,
        patience: Patience,
    ) -> Result<Self, NoToken> {
        let (kind, state) = match backend {
            Backend::Offline => (Kind::Offline, LinkState::Offline),
            Backend::Standalone { base_url, bearer } => {
                (Kind::Standalone { base_url, bearer }, LinkState::Linked { taken: 0, failing: 0, problem: None })
            }
            Backend::Provisioner { base_url, enrolment_token } => {
                match (identity.enrolment().cloned(), enrolment_token) {
                    // The one-time token is spent once this is here, so this wins.
                    (Some(enrolment), _) => {
                        callers.set_keys(accepted(own_keys, &enrolment.settings));
                        let state = LinkState::Linked { taken: 0, failing: 0, problem: None };
                        (Kind::Enrolled { base_url, identity, enrolment }, state)
                    }
                    (None, Some(token)) => {
                        (Kind::Enrolling { base_url, identity, token }, LinkState::Enrolling { problem: None })
                    }
                    (None, None) => return Err(NoToken),
                }
            }
        };
        Ok(Self { kind, state: watch::Sender::new(state), access: watch::Sender::new(None), patience })
    }

    /// How it stands, now and from now on.
    pub fn state(&self) -> watch::Receiver<LinkState> {
        self.state.subscribe()
    }

    /// The backend as a source of secrets, once there is one that knows this agent.
    pub fn secrets(&self) -> BackendSecrets {
        BackendSecrets(self.access.subscribe())
    }

    /// Whether there is anybody to report to.
    pub fn reports(&self) -> bool {
        !matches!(self.kind, Kind::Offline)
    }

    /// Reports for as long as the agent runs; an offline agent's link ends at once.
    pub async fn run(self, reporting: Reporting) {
        let Self { kind, state, access, patience } = self;
        let base_url = match &kind {
            Kind::Offline => return,
            Kind::Standalone { base_url, .. } | Kind::Enrolled { base_url, .. } | Kind::Enrolling { base_url, .. } => {
                base_url.clone()
            }
        };
        let client = client(base_url, patience).await;
        let mut reporter = match kind {
            Kind::Offline => return,
            Kind::Standalone { bearer, .. } => {
                Reporter { client, bearer, enrolled: None, reporting, state, access, patience }
            }
            Kind::Enrolled { identity, enrolment, .. } => {
                let bearer = enrolment.bearer_token.clone();
                Reporter { client, bearer, enrolled: Some((identity, enrolment)), reporting, state, access, patience }
            }
            Kind::Enrolling { identity, token, .. } => {
                let (identity, enrolment) = enrol(&client, identity, &token, &state, patience).await;
                reporting.callers.set_keys(accepted(&reporting.own_keys, &enrolment.settings));
                state.send_replace(LinkState::Linked { taken: 0, failing: 0, problem: None });
                let bearer = enrolment.bearer_token.clone();
                Reporter { client, bearer, enrolled: Some((identity, enrolment)), reporting, state, access, patience }
            }
        };
        reporter.run().await;
    }
}

fn accepted(own: &[TokenHash], settings: &AgentSettings) -> Vec<TokenHash> {
    own.iter().chain(&settings.caller_key_sha256s).copied().collect()
}

/// Makes the client on a thread of its own, because it reads the system's certificates; again and again should that ever fail.
async fn client(base_url: String, patience: Patience) -> BackendClient {
    let mut failures = 0;
    loop {
        let base_url = base_url.clone();
        match tokio::task::spawn_blocking(move || BackendClient::new(&base_url, patience.answer)).await {
            Ok(Ok(client)) => return client,
            Ok(Err(error)) => tracing::error!(error = %chain(&error), "no client for the backend"),
            Err(error) => tracing::error!(%error, "making the client for the backend was interrupted"),
        }
        failures += 1;
        sleep(patience.after(failures, patience.interval)).await;
    }
}

async fn enrol(
    client: &BackendClient,
    mut identity: Identity,
    token: &Token,
    state: &watch::Sender<LinkState>,
    patience: Patience,
) -> (Identity, Enrolment) {
    let request = EnrolmentRequest {
        certificate_pin: identity.pin(),
        retry_key: identity.retry_key().clone(),
        agent_version: crate::version().to_owned(),
    };
    let mut failures = 0;
    loop {
        failures += 1;
        let (problem, wait) = match client.enrol(token, &request).await {
            Ok(answer) => {
                let enrolment = Enrolment::from(answer);
                // Used only once it is on disk: an agent that forgets its bearer could never come back.
                match identity.enrolled(enrolment.clone()) {
                    Ok(()) => {
                        tracing::info!(environment = %enrolment.environment_id, failures = failures - 1, "enrolled");
                        return (identity, enrolment);
                    }
                    Err(error) => (chain(&error), patience.after(failures, patience.longest_enrol_wait)),
                }
            }
            Err(error @ BackendError::TokenRefused { .. }) => {
                tracing::error!(
                    error = %chain(&error),
                    "this agent can't enrol: its one-time token is not accepted. Ask for the environment again, or set a new \
                     DTMA_ENROLMENT_TOKEN"
                );
                (chain(&error), jittered(patience.refused_wait, chance()))
            }
            Err(error) => (chain(&error), patience.after(failures, patience.longest_enrol_wait)),
        };
        tracing::warn!(problem, failures, next_in_ms = u64::try_from(wait.as_millis()).ok(), "not enrolled yet");
        state.send_replace(LinkState::Enrolling { problem: Some(problem) });
        sleep(wait).await;
    }
}

struct Reporter {
    client: BackendClient,
    bearer: Token,
    /// The identity new settings and tokens are stored in; none where they are set by hand.
    enrolled: Option<(Identity, Enrolment)>,
    reporting: Reporting,
    state: watch::Sender<LinkState>,
    access: watch::Sender<Option<Access>>,
    patience: Patience,
}

impl Reporter {
    async fn run(&mut self) {
        self.publish_access();
        let mut failures = 0;
        loop {
            let generation = self.enrolled.as_ref().map(|(_, enrolment)| enrolment.settings.generation);
            let heartbeat = (self.reporting.report)(generation);
            let sent = Instant::now();
            let wait = match self.client.heartbeat(&self.bearer, &heartbeat).await {
                Ok(directives) => {
                    if failures > 0 {
                        tracing::info!(failures, "heartbeats are taken again");
                    }
                    failures = 0;
                    self.taken();
                    if let Some(desired) = &directives.desired_version {
                        self.reporting.updates.want(desired);
                    }
                    // New settings or a new token are confirmed soon, by using them.
                    if self.follow(directives) { self.patience.pause } else { jittered(self.interval(), chance()) }
                }
                Err(error) => {
                    failures += 1;
                    let problem = chain(&error);
                    let refused = matches!(error, BackendError::TokenRefused { .. });
                    if refused {
                        tracing::error!(problem, "heartbeats are refused: the agent's own token is not accepted");
                    } else {
                        tracing::warn!(problem, failures, "a heartbeat failed");
                    }
                    self.failed(failures, problem);
                    if refused {
                        jittered(self.interval(), chance())
                    } else {
                        self.patience.after(failures, self.interval())
                    }
                }
            };
            self.wait(sent, Instant::now() + wait).await;
        }
    }

    /// Until it is time for the next heartbeat, or an instance or an update has changed and some time has passed since the last.
    async fn wait(&mut self, sent: Instant, mut until: Instant) {
        let mut updates = self.reporting.updates.changes();
        loop {
            tokio::select! {
                () = sleep_until(until) => return,
                Ok(()) = updates.changed() => {
                    until = until.min((Instant::now() + self.patience.settle).max(sent + self.patience.pause));
                }
                event = self.reporting.events.recv() => match event {
                    // Pull progress is no change of state, and comes in crowds.
                    Ok(InstanceEvent { progress: Some(_), .. }) => {}
                    Ok(_) | Err(RecvError::Lagged(_)) => {
                        until = until.min((Instant::now() + self.patience.settle).max(sent + self.patience.pause));
                    }
                    // Nobody reports changes any more: the agent is ending.
                    Err(RecvError::Closed) => return sleep_until(until).await,
                }
            }
        }
    }

    fn interval(&self) -> Duration {
        let given = self.enrolled.as_ref().map(|(_, enrolment)| enrolment.settings.heartbeat_interval_seconds);
        given.map_or(self.patience.interval, heartbeat_interval)
    }

    fn taken(&self) {
        self.state.send_modify(|state| {
            let before = if let LinkState::Linked { taken, .. } = state { *taken } else { 0 };
            *state = LinkState::Linked { taken: before + 1, failing: 0, problem: None };
        });
    }

    fn failed(&self, failing: u32, problem: String) {
        self.state.send_modify(|state| {
            let taken = if let LinkState::Linked { taken, .. } = state { *taken } else { 0 };
            *state = LinkState::Linked { taken, failing, problem: Some(problem) };
        });
    }

    /// Does what the answer to a heartbeat says; `true` when the next one should go out at once.
    fn follow(&mut self, directives: Directives) -> bool {
        let Some((identity, enrolment)) = &mut self.enrolled else { return false };
        let settings = directives.settings.filter(|settings| settings.generation > enrolment.settings.generation);
        if settings.is_none() && directives.bearer_token.is_none() {
            return false;
        }
        let mut next = enrolment.clone();
        if let Some(settings) = settings {
            next.settings = settings;
        }
        if let Some(bearer) = directives.bearer_token {
            next.bearer_token = bearer;
        }
        if let Err(error) = identity.enrolled(next.clone()) {
            // Unchanged; the provisioner sees the old generation in the next heartbeat and says it again.
            tracing::error!(error = %chain(&error), "new settings could not be stored");
            return false;
        }
        tracing::info!(generation = next.settings.generation, "new settings or token in use");
        self.reporting.callers.set_keys(accepted(&self.reporting.own_keys, &next.settings));
        self.bearer = next.bearer_token.clone();
        *enrolment = next;
        self.publish_access();
        true
    }

    /// Others may ask the backend with the present token.
    fn publish_access(&self) {
        self.access.send_replace(Some(Access { client: self.client.clone(), bearer: self.bearer.clone() }));
    }
}
