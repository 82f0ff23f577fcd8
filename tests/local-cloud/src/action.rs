//! Actions: what the cloud keeps of everything it was asked to do to a droplet.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::droplet::DropletId;

/// Number of an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ActionId(pub u64);

impl fmt::Display for ActionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActionKind {
    /// Made by the creation of a droplet; can't be asked for.
    Create,
    /// An orderly shutdown, then a boot.
    Reboot,
    /// The power is cut.
    PowerOff,
    /// A boot.
    PowerOn,
    /// The power is cut and given back.
    PowerCycle,
    /// An orderly shutdown.
    Shutdown,
}

/// How far an action is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Not done.
    InProgress,
    /// Done.
    Completed(Timestamp),
    /// Given up.
    Errored(Timestamp),
}

/// One action on one droplet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Action {
    /// Its number.
    pub id: ActionId,
    /// What was asked for.
    pub kind: ActionKind,
    /// Of which droplet.
    pub droplet: DropletId,
    /// Slug of the droplet's region.
    pub region: String,
    /// When it was accepted.
    pub started_at: Timestamp,
    /// How far it is.
    pub progress: Progress,
}
