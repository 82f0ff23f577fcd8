//! Health on the wire: how an instance's server is to be checked, and what it says of itself when it is.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How an MCP server is checked while it runs. What is absent is as the agent decides it; the agent takes the names in `snake_case`, too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HealthCheck {
    /// `false`: it is never asked anything, and counts by staying up; `true` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// Seconds between two probes; 30 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub interval_seconds: Option<u32>,
    /// Seconds one probe may take; 5 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 60))]
    pub timeout_seconds: Option<u32>,
    /// How many probes in a row have to fail before it counts as unhealthy; 3 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub failure_threshold: Option<u32>,
    /// How many have to succeed in a row before it counts as healthy, also for a deploy; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub success_threshold: Option<u32>,
    /// Seconds from its start in which a failed probe says nothing, and within which a deploy has to succeed; 90 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 600))]
    pub start_period_seconds: Option<u32>,
    /// Whether it is restarted when it is unhealthy; `true` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart: Option<bool>,
}

/// What an MCP server said of itself at its last handshake. All of it is the server's own word, cut to a bearable size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Introduction {
    /// How it shakes hands.
    pub era: Era,
    /// Version of the protocol it chose, `2025-06-18`; of the new era the latest it supports.
    pub protocol_version: String,
    /// Its name, where it says one.
    pub name: Option<String>,
    /// Its version, where it says one.
    pub version: Option<String>,
    /// Its capabilities as it sent them; only their names where they are longer than 16 KiB.
    pub capabilities: Value,
    /// Names of its tools, 1000 at most; none while it has not been asked for them, or didn't answer.
    pub tools: Option<Vec<String>>,
}

/// The two ways to begin a conversation in MCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Era {
    /// With `initialize`: all versions up to 2025-11-25.
    Legacy,
    /// With `server/discover`, and without sessions: 2026-07-28 and later.
    Modern,
}
