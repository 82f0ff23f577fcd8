//! What a running instance uses: `GET /tools/{ref}/stats`, and `resource_usage` in every list.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Failure;

/// What a running instance uses at one moment. Counters begin at 0 when its container starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ResourceUsage {
    /// When this was measured.
    pub at: Timestamp,
    /// Processor time since the measurement before this one, percent: 100 is one core used all the time, 200 two. Absent when there was no
    /// measurement before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<f64>,
    /// Memory in use, bytes; files that are only cached aren't counted, as in `docker stats`.
    pub memory_usage_bytes: u64,
    /// The most it may use, bytes; the droplet's memory where it has no limit.
    pub memory_limit_bytes: u64,
    /// Received over all its networks since its start, bytes.
    pub network_rx_bytes: u64,
    /// Sent over all its networks since its start, bytes.
    pub network_tx_bytes: u64,
    /// Read from disks since its start, bytes; what came from the cache isn't counted.
    pub block_read_bytes: u64,
    /// Written to disks since its start, bytes.
    pub block_write_bytes: u64,
    /// Processes and threads now.
    pub pids: u64,
}

/// One message of `GET /tools/{ref}/stats?stream=true`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum UsageItem {
    /// A measurement.
    Usage(ResourceUsage),
    /// Why there are no more.
    Ended(Failure),
}

/// Answer of `GET /tools/{ref}/stats`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StatsAnswer {
    /// Always `true`.
    pub success: bool,
    /// What it uses now; `cpu_percent` is over the half second (up to two, where Docker is slow) before it.
    pub data: ResourceUsage,
}
