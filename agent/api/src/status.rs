//! `GET /status` and the figures of a droplet.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::instance::InstanceView;

/// Answer of `GET /status` to an authenticated caller, and of `GET /tools/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AgentStatus {
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
    /// What the agent has been given.
    pub environment: AgentEnvironment,
    /// Every instance.
    pub tool_instances: Vec<InstanceView>,
    /// Figures of the droplet.
    pub system_metrics: SystemMetrics,
}

/// Which settings an agent has, without their values. camelCase, as the old agent answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AgentEnvironment {
    /// It has a bearer of its own.
    pub has_auth_token: bool,
    /// It knows at least one key callers may present.
    pub has_api_key: bool,
    /// It knows where to send heartbeats.
    pub has_api_base_url: bool,
    /// Port it listens on.
    pub port: u16,
}

/// Figures of a droplet, all of one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SystemMetrics {
    /// Over all cores since the last reading, 0 to 100.
    pub cpu_load_percent: f64,
    /// Main memory.
    pub memory: MemoryMetrics,
    /// The disk holding the agent's state, and Docker's where it is the same.
    pub disk: DiskMetrics,
    /// The disk holding Docker's images and volumes, where it is another one and the agent can see it; its mount is Docker's folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub docker_disk: Option<DiskMetrics>,
    /// One of the disks has less free than the agent keeps in reserve: unused images are removed, and none is pulled until there is room.
    #[serde(default)]
    pub disk_pressure: bool,
}

/// Main memory, bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryMetrics {
    /// Installed.
    pub total_bytes: u64,
    /// In use and not reclaimable: total less available.
    pub active_bytes: u64,
    /// Not used for anything.
    pub free_bytes: u64,
    /// In use, caches not counted.
    pub used_bytes: u64,
}

/// One file system, bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskMetrics {
    /// Where it is mounted.
    pub mount: String,
    /// Size.
    pub total_bytes: u64,
    /// Used.
    pub used_bytes: u64,
    /// Free to an unprivileged process.
    pub free_bytes: u64,
}
