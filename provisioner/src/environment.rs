//! What an account gets, and every way it can change. Owns the states, what is known in each, and the rules by which a request,
//! an agent's report or the cloud's answer moves one to another.
//!
//! Pure: no I/O, no clock, no randomness. Whoever commits a [`Change`] does so against the generation it was decided on.

mod agent_side;
mod caller_side;
pub(crate) mod cloud_side;
mod state;
mod view;

use std::net::Ipv4Addr;
use std::time::Duration;

use dtma_api::environment::{EnvironmentError, EnvironmentEvent};
use dtma_api::id::AccountId;
use dtma_api::{CertificatePin, EnvironmentId, TokenHash};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use agent_side::{EnrolmentClaim, EnrolmentRefused};
pub use caller_side::EnsureDecision;
pub use cloud_side::CreateOutcome;
pub use state::{Placement, State};

/// The cloud's id of a droplet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DropletId(pub i64);

impl std::fmt::Display for DropletId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What kind of droplet is wanted: slugs as the cloud names them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropletSpec {
    /// Region slug.
    pub region: String,
    /// Size slug.
    pub size: String,
    /// Image slug.
    pub image: String,
}

/// One environment as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Environment {
    /// For its whole life.
    pub id: EnvironmentId,
    /// Its owner; at most one environment of an account is not `deprovisioned`.
    pub account: AccountId,
    /// Goes up by one with every committed change.
    pub generation: u64,
    /// Goes up when `ensure` starts again after an error; events are told apart by it.
    pub run: u32,
    /// The droplet it is to have.
    pub spec: DropletSpec,
    /// When the account first asked for it.
    pub created_at: Timestamp,
    /// When it last changed.
    pub updated_at: Timestamp,
    /// Where it stands.
    pub state: State,
}

/// One try at making a droplet. Its id is in the droplet's tags, so the droplet can be found without having been told its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Unique; tagged on the droplet.
    pub id: Uuid,
    /// How many tries this run has made, this one included.
    pub number: u32,
    /// When the intent was written.
    pub started_at: Timestamp,
    /// When the first try of this run began.
    pub run_started_at: Timestamp,
    /// When the droplet must have reported, or the attempt has failed.
    pub deadline: Timestamp,
    /// Digest of the one-time token in its user data.
    pub token_hash: TokenHash,
    /// When that token stops working: at most 15 minutes after it was made.
    pub token_expires_at: Timestamp,
}

/// A droplet that is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningDroplet {
    /// The cloud's id.
    pub id: DropletId,
    /// Its public address.
    pub ip: Ipv4Addr,
}

/// An agent that has enrolled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolledAgent {
    /// Pin of its TLS key.
    pub pin: CertificatePin,
    /// Digest of the secret that lets it repeat a lost enrolment.
    pub retry_key_hash: TokenHash,
    /// Digests of the bearers it was given, newest last: more than one when an answer got lost on the way.
    pub bearers: Vec<TokenHash>,
    /// Its version when it enrolled.
    pub version: String,
    /// When it first enrolled.
    pub enrolled_at: Timestamp,
}

/// What a droplet has told of its set-up so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The bootstrap phase last begun.
    pub phase: Option<String>,
    /// How many phases watchers were told of.
    #[serde(default)]
    pub phases_told: u32,
    /// The agent, once enrolled.
    pub agent: Option<EnrolledAgent>,
    /// When its first heartbeat came.
    pub heard_at: Option<Timestamp>,
}

/// Droplets still to be deleted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cleanup {
    /// The droplet known by id.
    pub droplet: Option<DropletId>,
    /// Set while a create may have made a droplet that no list shows yet: since when that is in doubt.
    pub doubtful_since: Option<Timestamp>,
    /// When the cloud was last asked to delete. A delete may be ignored, so it is repeated.
    pub delete_asked_at: Option<Timestamp>,
}

impl Cleanup {
    /// One droplet, known by id.
    pub fn of(droplet: DropletId) -> Self {
        Self { droplet: Some(droplet), ..Self::default() }
    }
}

/// A decided transition, not yet committed.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Where the environment then stands.
    pub state: State,
    /// What is said about it; none for bookkeeping nobody watches.
    pub note: Option<Note>,
    /// A new droplet specification, where the change brings one.
    pub spec: Option<DropletSpec>,
    /// It begins a new run.
    pub new_run: bool,
}

/// One line for whoever watches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Bootstrap phase, where the droplet reported one.
    pub phase: Option<String>,
    /// A sentence.
    pub message: String,
}

impl Change {
    /// A change that watchers are told about.
    pub fn told(state: State, message: impl Into<String>) -> Self {
        let note = Some(Note { phase: None, message: message.into() });
        Self { state, note, spec: None, new_run: false }
    }

    /// A change nobody needs to hear of.
    pub fn quiet(state: State) -> Self {
        Self { state, note: None, spec: None, new_run: false }
    }

    fn with_phase(mut self, phase: &str) -> Self {
        if let Some(note) = &mut self.note {
            note.phase = Some(phase.to_owned());
        }
        self
    }
}

impl Environment {
    /// A new environment, wanted but not begun.
    pub fn new(id: EnvironmentId, account: AccountId, spec: DropletSpec, now: Timestamp) -> Self {
        Self { id, account, generation: 1, run: 1, spec, created_at: now, updated_at: now, state: State::wanted(now) }
    }

    /// The environment after `change`, and the event that tells of it.
    pub fn changed(&self, change: Change, now: Timestamp) -> (Self, Option<EnvironmentEvent>) {
        let status = change.state.status();
        let event =
            change.note.map(|note| EnvironmentEvent { at: now, status, phase: note.phase, message: note.message });
        let mut next = self.clone();
        next.generation += 1;
        next.updated_at = now;
        next.state = change.state;
        if let Some(spec) = change.spec {
            next.spec = spec;
        }
        if change.new_run {
            next.run += 1;
        }
        (next, event)
    }

    /// The tag every droplet of this environment bears.
    pub fn tag(&self) -> String {
        environment_tag(self.id)
    }
}

const ENVIRONMENT_TAG: &str = "dtma-env:";
const ATTEMPT_TAG: &str = "dtma-attempt:";

/// The tag every droplet of an environment bears.
pub fn environment_tag(id: EnvironmentId) -> String {
    format!("{ENVIRONMENT_TAG}{id}")
}

/// The tag of the one droplet an attempt may make.
pub fn attempt_tag(attempt: Uuid) -> String {
    format!("{ATTEMPT_TAG}{attempt}")
}

/// The environment a droplet's tags name, if they name one.
pub fn environment_of(tags: &[String]) -> Option<EnvironmentId> {
    tags.iter().find_map(|tag| tag.strip_prefix(ENVIRONMENT_TAG)?.parse().ok())
}

/// The attempt a droplet's tags name, if they name one.
pub fn attempt_of(tags: &[String]) -> Option<Uuid> {
    tags.iter().find_map(|tag| Uuid::parse_str(tag.strip_prefix(ATTEMPT_TAG)?).ok())
}

/// `moment + wait`, or the end of time.
pub fn after(moment: Timestamp, wait: Duration) -> Timestamp {
    moment.checked_add(wait).unwrap_or(Timestamp::MAX)
}

/// An error as callers see it, with nothing but a code and a sentence.
pub fn plain_error(code: &str, message: impl Into<String>, at: Timestamp) -> EnvironmentError {
    EnvironmentError {
        code: code.to_owned(),
        message: message.into(),
        phase: None,
        output: None,
        cloud_request_id: None,
        at,
    }
}
