//! The droplet and the agent's own process, as `/ready`, `/system`, `/logs`, `/diagnostics/…` and `/restart` show them.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::InstanceName;
use crate::instance::{Health, InstanceState};
use crate::status::SystemMetrics;

/// Answer of `GET /status` to a caller without a credential: that the agent lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Liveness {
    /// Always `true`.
    pub success: bool,
    /// `running`.
    pub status: String,
    /// When this was put together.
    pub timestamp: Timestamp,
    /// The agent's version.
    pub version: String,
    /// `DTMA`.
    pub service: String,
}

/// Answer of `GET /ready` when the agent can do its work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Ready {
    /// Always `true`.
    pub success: bool,
    /// Always `true`.
    pub ready: bool,
    /// What was looked at.
    pub checks: Checks,
}

/// What an agent needs to do its work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Checks {
    /// The Docker Engine answers.
    pub docker_reachable: bool,
    /// What callers want can be written down.
    pub ledger_writable: bool,
    /// It has a token of its own, or reports to nobody on purpose.
    pub enrolled: bool,
    /// Instances whose egress is a list have their way out, or there are none.
    pub egress: bool,
    /// A disk has less free than the agent keeps in reserve. No reason not to be ready: what runs goes on, and so does everything but a pull.
    #[serde(default)]
    pub disk_pressure: bool,
}

/// `details` of a `not_ready`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NotReady {
    /// What was looked at.
    pub checks: Checks,
    /// Why the agent can't do its work, one sentence each.
    pub reasons: Vec<String>,
}

/// Something was begun and nobody waits for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Accepted {
    /// Always `true`.
    pub success: bool,
    /// What happens now, for a person.
    pub message: String,
}

/// Answer of `GET /system`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SystemAnswer {
    /// Always `true`.
    pub success: bool,
    /// Figures of the droplet.
    pub system_metrics: SystemMetrics,
    /// Processes that run or wait to.
    pub load_average: LoadAverage,
    /// Seconds since the droplet started.
    pub uptime_seconds: u64,
    /// The kernel's release, as `uname -r` prints it.
    pub kernel: Option<String>,
    /// The Docker Engine's version, once it has answered.
    pub docker_version: Option<String>,
}

/// Load averages.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LoadAverage {
    /// Over one minute.
    pub one: f64,
    /// Over five minutes.
    pub five: f64,
    /// Over fifteen minutes.
    pub fifteen: f64,
}

/// Answer of `GET /diagnostics/system`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SystemDiagnostics {
    /// The droplet, as `GET /system` shows it.
    #[serde(flatten)]
    pub system: SystemAnswer,
    /// The agent's own process.
    pub agent: AgentProcess,
}

/// The agent's own process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AgentProcess {
    /// Its version.
    pub version: String,
    /// When it started.
    pub started_at: Timestamp,
    /// Bytes of its memory that are in RAM.
    pub resident_bytes: u64,
    /// Connections open now.
    pub open_connections: u64,
    /// Connections closed at once because there were too many, since it started.
    pub connections_turned_away: u64,
    /// Requests with a wrong key, since it started.
    pub refused_keys: u64,
    /// How it stands with its backend.
    pub link: LinkView,
}

/// How an agent stands with its backend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum LinkView {
    /// It reports to nobody, on purpose.
    Offline,
    /// It is not known to its backend yet.
    Enrolling {
        /// Why the last attempt failed.
        problem: Option<String>,
    },
    /// It has a token of its own and reports.
    Linked {
        /// Heartbeats the backend took since the agent started.
        heartbeats_taken: u64,
        /// Heartbeats that failed in a row.
        heartbeats_failing: u32,
        /// Why the last one failed.
        problem: Option<String>,
    },
}

/// Answer of `GET /diagnostics/docker`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DockerDiagnostics {
    /// Always `true`.
    pub success: bool,
    /// The Docker Engine answers.
    pub reachable: bool,
    /// Its version, once it has answered.
    pub version: Option<String>,
    /// Why it doesn't answer.
    pub error: Option<String>,
    /// The agent's last look at everything.
    pub last_pass: PassView,
    /// Every instance.
    pub instances: Vec<InstanceDiagnosis>,
}

/// One pass of the agent's loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PassView {
    /// Goes up by one with every pass of this agent process; 0 before the first.
    pub sequence: u64,
    /// Why it was made.
    pub reason: String,
    /// When it ended.
    pub at: Option<Timestamp>,
    /// How long it took, milliseconds.
    pub took_ms: f64,
    /// For how many instances it found something to do.
    pub started: u64,
}

/// One instance, for a person chasing a fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceDiagnosis {
    /// The instance's name.
    pub instance_name_on_toolbox: InstanceName,
    /// Full id of its container; empty while there is none.
    pub container_id: String,
    /// The agent's word for the instance.
    pub state: InstanceState,
    /// Docker's word for the container; `pending` while there is none.
    pub status: String,
    /// What the last probes found.
    pub health: Health,
    /// Why it is not healthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_reason: Option<String>,
    /// How often Docker restarted its container, and the agent because it hung.
    pub restart_count: u64,
    /// Why it is `failed`.
    pub error: Option<String>,
}

/// Answer of `GET /logs` and `GET /diagnostics/logs`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AgentLog {
    /// Always `true`.
    pub success: bool,
    /// The agent's own log, oldest line first.
    pub lines: Vec<AgentLogLine>,
}

/// One line of the agent's own log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AgentLogLine {
    /// When.
    pub timestamp: Timestamp,
    /// `ERROR`, `WARN`, `INFO`, `DEBUG` or `TRACE`.
    pub level: String,
    /// Which part of the agent.
    pub target: String,
    /// What else was noted; `message` among it.
    #[serde(flatten)]
    pub fields: Map<String, Value>,
}
