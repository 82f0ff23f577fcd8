//! What callers want of an instance, and why it could not be had. This is what the ledger keeps.

use dtma_api::InstanceName;
use serde::{Deserialize, Serialize};

/// One accepted deploy, unique for all time: what it made bears it, so that undoing it touches nothing older.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeploymentId(pub uuid::Uuid);

/// What is wanted of an instance, until somebody wants something else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Intent {
    /// That it runs.
    Run,
    /// That it is stopped, also after a reboot.
    Stop,
    /// That nothing of it is left; the ledger forgets it then.
    Remove(Departure),
}

/// Why an instance goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Departure {
    /// A caller asked for it.
    Asked {
        /// Its named volumes go too.
        volumes: bool,
        /// Seconds its server is given to end by itself; the agent's own patience when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        grace_seconds: Option<u32>,
    },
    /// Its first deploy failed, so that all it made is taken back.
    Undone(Failure),
}

/// Why an instance isn't what it was asked to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What programs decide by.
    pub kind: FailureKind,
    /// A sentence a person can act on.
    pub message: String,
    /// The server's last lines of output, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<String>,
}

impl Failure {
    /// It waits for secrets, whoever has them.
    pub fn lacks_secrets(&self) -> bool {
        matches!(self.kind, FailureKind::NeedsSecrets | FailureKind::SecretsUnavailable)
    }
}

/// What kind of failure it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// No registry has the image, or it isn't here and may not be pulled.
    ImageNotFound,
    /// The registry wants a credential.
    PullDenied,
    /// The registry can't be reached or broke off.
    PullFailed,
    /// A stranger's container has the instance's name.
    NameConflict,
    /// A published port is taken.
    PortConflict {
        /// By whom: `instance NAME`, `container NAME` or `a process on the droplet`.
        holder: String,
    },
    /// Docker won't make or start a container like this.
    Refused,
    /// Its process ended soon after it was started.
    Exited {
        /// Its exit code, where it could still be seen.
        code: Option<i64>,
    },
    /// It runs and doesn't answer as an MCP server.
    NotAnswering,
    /// Another member of its group could not be had, and it is not to be there without.
    MemberFailed {
        /// Which.
        member: InstanceName,
    },
    /// The disk is full.
    NoSpace,
    /// It may only go where its list says, and the agent's proxy, its only way there, can't be opened.
    EgressUnavailable,
    /// Secrets that came with its deploy are gone, as after a reboot: only whoever deployed it has them.
    NeedsSecrets,
    /// The backend doesn't give its secrets.
    SecretsUnavailable,
    /// Docker failed.
    EngineFailed,
    /// One that another version of the agent knows, as that wrote it down.
    #[serde(untagged)]
    Unknown(serde_json::Value),
}
