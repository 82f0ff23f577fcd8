//! What an agent reports, and what it is told in return: `POST {AGENTOPIA_API_BASE_URL}/heartbeat`, the agent's own token as bearer.
//!
//! The old payload's names are kept, because the platform's edge function reads them; what the fleet view needs comes on top.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::enrolment::AgentSettings;
use crate::instance::{Health, InstallationStatus};
use crate::status::SystemMetrics;
use crate::usage::ResourceUsage;
use crate::{AccountToolInstanceId, InstanceName, Token};

/// One heartbeat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The agent's version.
    pub dtma_version: String,
    /// Figures of the droplet.
    pub system_status: SystemMetrics,
    /// Every instance; those without an `account_tool_instance_id` are not the backend's.
    pub tool_statuses: Vec<ToolStatus>,
    /// When the agent made this report, by its own clock.
    pub sent_at: Option<Timestamp>,
    /// When the agent process started.
    pub agent_started_at: Option<Timestamp>,
    /// `true` when the Docker Engine answers.
    pub docker_reachable: Option<bool>,
    /// Generation of the settings in use; none before the first.
    pub settings_generation: Option<u64>,
}

/// One instance in a heartbeat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToolStatus {
    /// The backend's id of the instance, where it gave one.
    pub account_tool_instance_id: Option<AccountToolInstanceId>,
    /// The instance's name.
    pub instance_name_on_toolbox: InstanceName,
    /// Where it stands, in the backend's own enum.
    pub status_on_toolbox: InstallationStatus,
    /// More about it, for a person.
    pub runtime_details: RuntimeDetails,
}

/// What is known of a running instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RuntimeDetails {
    /// Full id of the container serving it now.
    pub container_id: Option<String>,
    /// The image as it was asked for.
    pub image: String,
    /// Digest the image resolved to, `sha256:…`, where known.
    pub image_digest: Option<String>,
    /// What the last probes found.
    pub health: Health,
    /// Why it is not healthy, in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_reason: Option<String>,
    /// It keeps ending soon after it starts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub crash_looping: bool,
    /// How often it has been restarted.
    pub restart_count: u64,
    /// Why it is not running, where it is not.
    pub error: Option<String>,
    /// What it uses, as last sampled; absent while it doesn't run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_usage: Option<ResourceUsage>,
}

/// The body of a 200 answer to a heartbeat; 204 means there is nothing to do.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Directives {
    /// Version this agent should be running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_version: Option<String>,
    /// Newer settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<AgentSettings>,
    /// A new bearer, replacing the one this heartbeat came with; the old one works until the new one has been used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bearer_token: Option<Token>,
}
