//! What an agent reports, and what it is told in return: `POST {AGENTOPIA_API_BASE_URL}/heartbeat`, the agent's own token as bearer.
//!
//! The old payload's names are kept, because the platform's edge function reads them; what the fleet view needs comes on top.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::enrolment::AgentSettings;
use crate::instance::{Health, InstallationStatus};
use crate::status::SystemMetrics;
use crate::update::UpdateState;
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
    /// How updates of the agent stand; none from an agent that has no updater.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update: Option<UpdateState>,
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
    /// Version this agent should be running. Said in every answer while a rollout wants it; the agent sees to it that it is tried once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_version: Option<String>,
    /// Newer settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<AgentSettings>,
    /// A new bearer, replacing the one this heartbeat came with; the old one works until the new one has been used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bearer_token: Option<Token>,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_heartbeat_has_the_shape_the_backend_reads() {
        let metrics = json!({
            "cpu_load_percent": 1.5,
            "memory": { "total_bytes": 4, "active_bytes": 2, "free_bytes": 1, "used_bytes": 3 },
            "disk": { "mount": "/", "total_bytes": 9, "used_bytes": 5, "free_bytes": 4 },
            "disk_pressure": false,
        });
        let tool = json!({
            "account_tool_instance_id": "id-1",
            "instance_name_on_toolbox": "tool.one",
            "status_on_toolbox": "error_runtime",
            "runtime_details": {
                "container_id": "c", "image": "i", "image_digest": null, "health": "unknown", "restart_count": 2, "error": "it ended",
            },
        });
        let sent = json!({
            "dtma_version": "1.2.3", "system_status": metrics, "tool_statuses": [tool], "sent_at": null,
            "agent_started_at": null, "docker_reachable": true, "settings_generation": 4,
        });
        let heartbeat: Heartbeat = serde_json::from_value(sent.clone()).unwrap();
        assert_eq!(serde_json::to_value(heartbeat).unwrap(), sent);
    }

    #[test]
    fn every_status_is_one_the_backends_table_takes() {
        use InstallationStatus::{
            Deleting, Deploying, Error, ErrorRuntime, PendingDeploy, Running, Starting, Stopped, Stopping,
        };
        // account_tool_installation_status_enum: a row with any other word is refused.
        let taken = [
            "pending_install",
            "installing",
            "active",
            "error_install",
            "pending_uninstall",
            "uninstalling",
            "uninstalled",
            "error_uninstall",
            "pending_config",
            "stopped",
            "starting",
            "stopping",
            "error_runtime",
            "disabled",
            "pending_deploy",
            "deploying",
            "running",
            "error",
            "pending_delete",
            "deleting",
        ];
        for status in [PendingDeploy, Deploying, Starting, Running, Stopping, Stopped, ErrorRuntime, Error, Deleting] {
            let Value::String(word) = serde_json::to_value(status).unwrap() else { panic!("{status:?} is no word") };
            assert!(taken.contains(&word.as_str()), "{word}");
        }
    }
}
