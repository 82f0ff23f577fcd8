//! A rollout: one version brought to the fleet's agents in waves, each of which has to prove itself before the next begins. Owns who
//! goes when, what an agent's reports say of it, when to go on, and when to stop by itself.
//!
//! Pure: no I/O, no clock. [`Rollout::step`] compares what is with what agents report and answers with the difference; whoever commits
//! that does so before any agent is told.

mod judge;

mod orders;
mod report;
mod step;
#[cfg(test)]
mod tests;
mod view;
mod waves;
mod wishes;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use dtma_api::EnvironmentId;
use dtma_release::Version;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use orders::Orders;
pub use report::Report;
pub use step::Step;
pub use view::{AgentView, RolloutAnswer, RolloutList, RolloutView, StartRequest, WaveView};
pub use waves::Candidate;
pub use wishes::Impossible;

/// Which rollout. Later ones have higher ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RolloutId(pub Uuid);

impl fmt::Display for RolloutId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for RolloutId {
    type Err = uuid::Error;
    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        Uuid::parse_str(text).map(Self)
    }
}

/// What was asked for. Never changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// Where to.
    pub version: Version,
    /// How much of the fleet has been asked once each wave has begun, in per cent: ascending, the last is 100.
    pub waves: Vec<u8>,
    /// How long a wave has to go well after all of it has settled.
    pub soak_seconds: u64,
    /// So many agents may fail or fall silent; one more halts it.
    pub max_failures: u32,
    /// An agent that was told and is not heard for longer has fallen silent.
    pub silent_after_seconds: u64,
    /// An agent that was told and comes to no end for longer has failed.
    pub deadline_seconds: u64,
}

impl Terms {
    /// [`Self::soak_seconds`].
    pub fn soak(&self) -> Duration {
        Duration::from_secs(self.soak_seconds)
    }

    /// [`Self::silent_after_seconds`].
    pub fn silent_after(&self) -> Duration {
        Duration::from_secs(self.silent_after_seconds)
    }

    /// [`Self::deadline_seconds`].
    pub fn deadline(&self) -> Duration {
        Duration::from_secs(self.deadline_seconds)
    }
}

/// One rollout, with every agent it is about.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    /// For its whole life.
    pub id: RolloutId,
    /// What was asked for.
    pub terms: Terms,
    /// When it was asked for.
    pub started_at: Timestamp,
    /// When anything about it last changed.
    pub updated_at: Timestamp,
    /// How far it is.
    pub course: Course,
    /// Its agents, by environment.
    pub targets: BTreeMap<EnvironmentId, Target>,
}

/// How far a rollout is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Course {
    /// Whether it goes on.
    pub status: Status,
    /// The wave begun last, from 1; 0 before the first.
    pub wave: u32,
    /// When each wave begun so far began.
    pub begun_at: Vec<Timestamp>,
    /// Since when all of the waves begun have settled; none while they haven't.
    pub settled_at: Option<Timestamp>,
    /// What happened, oldest first.
    pub history: Vec<Line>,
}

/// Something that happened to a rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// When.
    pub at: Timestamp,
    /// A sentence.
    pub message: String,
}

/// Whether a rollout goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Status {
    /// It does.
    Running,
    /// Somebody has stopped it for the time being: nobody is told anything.
    Paused {
        /// Since when.
        at: Timestamp,
    },
    /// It has stopped by itself, and only somebody's word makes it go on.
    Halted {
        /// Since when.
        at: Timestamp,
        /// Why.
        reason: String,
    },
    /// Somebody has ended it.
    Aborted {
        /// When.
        at: Timestamp,
    },
    /// The whole fleet was asked, and that went well.
    Completed {
        /// When.
        at: Timestamp,
    },
}

impl Status {
    /// Its name.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused { .. } => "paused",
            Self::Halted { .. } => "halted",
            Self::Aborted { .. } => "aborted",
            Self::Completed { .. } => "completed",
        }
    }

    /// Whether anything can still come of it. There is one such rollout at most.
    pub fn is_open(&self) -> bool {
        match self {
            Self::Running | Self::Paused { .. } | Self::Halted { .. } => true,
            Self::Aborted { .. } | Self::Completed { .. } => false,
        }
    }
}

/// One agent of a rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Whose agent.
    pub environment: EnvironmentId,
    /// Its wave, from 1.
    pub wave: u32,
    /// What it ran when the rollout began, as far as it had said.
    pub from_version: Option<String>,
    /// Set once its wave has begun.
    pub asked: Option<Asked>,
    /// Where it stands.
    pub standing: Standing,
    /// It failed, and somebody has resumed the rollout all the same.
    #[serde(default)]
    pub forgiven: bool,
}

/// That heartbeats of an agent are answered with the version it should run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// From when on: a moment after that was decided.
    pub at: Timestamp,
    /// When its last update before had ended, by its own clock: what it says of that one is no news.
    pub known_result: Option<Timestamp>,
    /// How often something kept it from trying.
    pub tries: u32,
}

/// Where an agent stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "standing", rename_all = "snake_case")]
pub enum Standing {
    /// Its wave has not begun.
    Waiting,
    /// It is told with its next heartbeat, or was told and hasn't come to an end.
    Pending {
        /// Something kept it from trying; it is told again then.
        retry_at: Option<Timestamp>,
        /// What.
        trouble: Option<Trouble>,
    },
    /// It runs the version, which has proved itself to it.
    Updated {
        /// Since when we know.
        at: Timestamp,
    },
    /// It runs a later one, and is left alone: versions never go down.
    Ahead,
    /// It doesn't run the version and won't by itself.
    Failed {
        /// Why.
        trouble: Trouble,
    },
    /// It was told, and isn't heard any more.
    Silent {
        /// Since when.
        since: Timestamp,
    },
    /// It hasn't been heard since its wave began, so it was never told: no fault of the version's.
    Unreached,
    /// Somebody has exempted it.
    LeftOut {
        /// How.
        why: LeftOut,
    },
    /// Its environment is being given up, or has lost its droplet.
    Gone,
}

impl Standing {
    /// Its name.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Pending { .. } => "pending",
            Self::Updated { .. } => "updated",
            Self::Ahead => "ahead",
            Self::Failed { .. } => "failed",
            Self::Silent { .. } => "silent",
            Self::Unreached => "unreached",
            Self::LeftOut { .. } => "left_out",
            Self::Gone => "gone",
        }
    }

    /// All names, in the order in which they are told.
    pub const NAMES: [&'static str; 9] =
        ["waiting", "pending", "updated", "ahead", "failed", "silent", "unreached", "left_out", "gone"];
}

/// How an agent is exempted from rollouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeftOut {
    /// It is to stay at one version.
    Pinned,
    /// It is told nothing.
    Excluded,
}

/// What was decided about updates of one environment's agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preference {
    /// The only version it is ever told.
    pub pin: Option<Version>,
    /// It is never told any.
    pub excluded: bool,
}

impl Preference {
    /// Whether rollouts pass it by.
    pub fn left_out(&self) -> Option<LeftOut> {
        if self.excluded { Some(LeftOut::Excluded) } else { self.pin.as_ref().map(|_| LeftOut::Pinned) }
    }
}

/// Why an agent doesn't run the version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// In one word.
    pub kind: TroubleKind,
    /// The agent's stable word for it.
    pub code: String,
    /// The same as a sentence.
    pub reason: String,
    /// When.
    pub at: Timestamp,
}

/// Why an agent doesn't run the version, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TroubleKind {
    /// It tried, the version didn't prove itself, and the one before is in use again.
    Reverted,
    /// It found the release not to be what it must be.
    Refused,
    /// Something else kept it from trying, again and again.
    Failed,
    /// Somebody went back by hand.
    RolledBack,
    /// It came to no end.
    TimedOut,
    /// It says nothing of updates.
    Unsupported,
}

/// What is known of an agent at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// Its environment has an agent at all.
    pub enrolled: bool,
    /// It reports.
    pub reporting: bool,
    /// What it reported last.
    pub report: Option<Arc<Report>>,
    /// When that came.
    pub reported_at: Option<Timestamp>,
    /// From when its silence counts: the same, or when this process began, since before nobody could report.
    pub quiet_since: Timestamp,
}

/// `later - earlier`; nothing where it is the other way round.
fn elapsed(earlier: Timestamp, later: Timestamp) -> Duration {
    Duration::try_from(later.duration_since(earlier)).unwrap_or_default()
}
