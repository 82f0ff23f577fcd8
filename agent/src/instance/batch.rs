//! Instances deployed together: in which order they come, how many at a time, and whether one stands for all.

use std::collections::BTreeSet;

use dtma_api::InstanceName;
use serde::{Deserialize, Serialize};

/// One accepted request for a whole group, unique for all time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BatchId(pub uuid::Uuid);

/// What an instance's first deploy has to do with those it came together with. It matters until the instance has run once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// The request that brought them.
    pub id: BatchId,
    /// Those that have to run before this one is begun.
    pub after: BTreeSet<InstanceName>,
    /// When one of them can't be had, all are taken back.
    pub atomic: bool,
    /// How many are brought up at the same time.
    pub most_at_once: u32,
}
