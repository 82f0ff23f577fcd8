//! Clients' sessions with a server on its standard input and output: whether they share its process, and what is a session's own.

use dtma_api::InstanceName;
use dtma_api::instance as wire;
use serde::{Deserialize, Serialize};

/// How many sessions an instance may have at once that have a container of their own, where its deploy doesn't say.
pub const DEFAULT_MOST: u16 = 16;
/// And how many a deploy may ask for.
pub const LARGEST_MOST: u16 = 64;

/// Whether the clients of a server share its process. Where they don't, each session has a container of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionMode {
    /// All clients speak with the instance's one process, or one for each era of the protocol, their messages kept apart.
    #[default]
    Shared,
    /// Each session has a process of its own.
    PerSession {
        /// So many at once.
        most: u16,
    },
}

impl SessionMode {
    /// As it is where nothing is said.
    pub fn is_shared(&self) -> bool {
        matches!(self, Self::Shared)
    }

    /// In the wire's words, with how many there may be at most.
    pub fn shown(self) -> (wire::SessionMode, Option<u16>) {
        match self {
            Self::Shared => (wire::SessionMode::Shared, None),
            Self::PerSession { most } => (wire::SessionMode::PerSession, Some(most)),
        }
    }
}

/// One session that has a container of its own, unique for all time. Not the id its client knows: that one is a credential of sorts, and this
/// is in the container's labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub uuid::Uuid);

impl SessionId {
    /// What its container is called: a name that no instance and hardly a stranger has.
    pub fn container_name(&self) -> String {
        format!("dtma-session-{}", self.0.simple())
    }
}

/// Whose a container is that is one session's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionOf {
    /// The session.
    pub id: SessionId,
    /// The instance whose server it is with.
    pub instance: InstanceName,
}
