//! How an instance's MCP server is checked while it runs.

use serde::{Deserialize, Serialize};

/// How an MCP server is checked while it runs, and what is done when it isn't well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// It is probed at all; otherwise it counts by staying up.
    pub enabled: bool,
    /// Seconds between two probes.
    pub interval_seconds: u32,
    /// Seconds one probe may take.
    pub timeout_seconds: u32,
    /// How many probes in a row have to fail before it counts as unhealthy.
    pub failure_threshold: u32,
    /// How many have to succeed in a row before it counts as healthy.
    pub success_threshold: u32,
    /// Seconds from its start in which a failed probe says nothing; also how long its deploy may take from there.
    pub start_period_seconds: u32,
    /// It is restarted when it is unhealthy.
    pub restart: bool,
}

impl HealthCheck {
    /// Longest time between two probes.
    pub const MAX_INTERVAL_SECONDS: u32 = 3600;
    /// Longest time a probe may take.
    pub const MAX_TIMEOUT_SECONDS: u32 = 60;
    /// Most probes in a row that may be asked for.
    pub const MAX_THRESHOLD: u32 = 100;
    /// Longest start period: as long as a caller can wait.
    pub const MAX_START_PERIOD_SECONDS: u32 = 600;

    /// Nothing was asked for.
    pub fn is_default(&self) -> bool {
        self == &Self::default()
    }
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            enabled: true,
            interval_seconds: 30,
            timeout_seconds: 5,
            failure_threshold: 3,
            success_threshold: 1,
            start_period_seconds: 90,
            restart: true,
        }
    }
}
