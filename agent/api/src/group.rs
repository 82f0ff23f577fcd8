//! Groups on the wire: instances that are deployed, looked at and removed together.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Fault};
use crate::instance::{DeployRequest, Health, InstanceState, InstanceView};
use crate::{AccountToolInstanceId, GroupId, InstanceName};

/// Body of `POST /mcp/groups`, for callers to build.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GroupRequest {
    /// The group's id, the caller's to choose.
    pub group_id: GroupId,
    /// Its servers, 1 to 32, each as `POST /tools` takes it.
    #[schemars(length(min = 1, max = 32))]
    pub servers: Vec<DeployRequest>,
    /// How they are to come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<GroupOptions>,
}

/// How a group's servers are to come.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GroupOptions {
    /// They reach each other, by their names; otherwise each is alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_networking: Option<bool>,
    /// Names of servers: each is begun when the one before it runs. Servers that aren't named come whenever there is room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dependency_order: Option<Vec<InstanceName>>,
    /// How many are brought up at the same time; 3 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16))]
    pub max_concurrent_deployments: Option<u32>,
    /// All or none: when one can't be had, everything this request brought is taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub atomic: Option<bool>,
}

/// Answer of `POST /mcp/groups`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GroupAnswer {
    /// Always `true`: at least one server runs, or is on its way.
    pub success: bool,
    /// What happened, for a person.
    pub message: String,
    /// The group.
    pub data: DeployedGroup,
}

/// What deploying a group made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeployedGroup {
    /// The group's id.
    pub group_id: GroupId,
    /// The servers that run, or are on their way.
    pub deployed_servers: Vec<InstanceView>,
    /// For each of the others why it could not be had: what `POST /tools` would have answered.
    pub errors: BTreeMap<String, Failure>,
    /// Servers that were asked for.
    pub total_servers: usize,
    /// Servers that run.
    pub successful_deployments: usize,
    /// What was changed or ignored, for a person.
    pub warnings: Vec<Fault>,
}

/// Answer of `DELETE /mcp/groups/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GroupRemovalAnswer {
    /// Always `true`.
    pub success: bool,
    /// What happened, for a person.
    pub message: String,
    /// What became of its servers.
    pub data: RemovedGroup,
}

/// What became of a group's servers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RemovedGroup {
    /// The group's id.
    pub group_id: GroupId,
    /// Nothing is left of these but their named volumes.
    pub removed_servers: Vec<InstanceName>,
    /// These are being removed.
    pub pending_servers: Vec<InstanceName>,
}

/// Answer of `GET /mcp/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct McpStatusAnswer {
    /// Always `true`.
    pub success: bool,
    /// Everything there is.
    pub data: McpStatus,
}

/// The servers on this droplet, and its groups.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct McpStatus {
    /// All of it in figures.
    pub summary: McpSummary,
    /// The groups, by id.
    pub groups: Vec<GroupStatus>,
    /// Servers that are in no group, by name.
    pub servers: Vec<ServerStatus>,
}

/// How many there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct McpSummary {
    /// Groups.
    pub total_groups: usize,
    /// Groups that are healthy.
    pub healthy_groups: usize,
    /// Servers, in groups or not.
    pub total_servers: usize,
    /// Servers that run.
    pub running_servers: usize,
    /// Servers that should run and don't, or don't answer.
    pub failed_servers: usize,
}

/// Answer of `GET /mcp/health/{groupId}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GroupHealthAnswer {
    /// Always `true`.
    pub success: bool,
    /// The group.
    pub data: GroupStatus,
}

/// One group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GroupStatus {
    /// The group's id.
    pub group_id: GroupId,
    /// How it stands, all in all.
    pub collective_status: CollectiveStatus,
    /// Its servers.
    pub total_servers: usize,
    /// Those of them that run.
    pub running_servers: usize,
    /// Each of them, by name.
    pub servers: Vec<ServerStatus>,
}

/// How a group stands, all in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CollectiveStatus {
    /// Every server runs, and none is known not to answer.
    Healthy,
    /// Some run, and some don't or don't answer.
    Degraded,
    /// None runs.
    Failed,
    /// Some are being brought up, and none has failed.
    Initializing,
}

/// One server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServerStatus {
    /// Its name.
    pub instance_name_on_toolbox: InstanceName,
    /// The backend's id.
    pub account_tool_instance_id: Option<AccountToolInstanceId>,
    /// Full id of its container; empty while there is none.
    pub container_id: String,
    /// Docker's word for the container.
    pub status: String,
    /// The agent's word for the instance.
    pub state: InstanceState,
    /// What the last probes found.
    pub health_status: Health,
    /// Why it is not healthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_reason: Option<String>,
    /// How often it was restarted.
    pub restart_count: u64,
    /// Path of its MCP endpoint under the agent's URL.
    pub mcp_url: Option<String>,
    /// Why it has failed.
    pub error: Option<String>,
}

impl From<&InstanceView> for ServerStatus {
    fn from(view: &InstanceView) -> Self {
        Self {
            instance_name_on_toolbox: view.instance_name_on_toolbox.clone(),
            account_tool_instance_id: view.account_tool_instance_id.clone(),
            container_id: view.container_id.clone(),
            status: view.status.clone(),
            state: view.state,
            health_status: view.health,
            health_reason: view.health_reason.clone(),
            restart_count: view.restart_count,
            mcp_url: view.mcp_url.clone(),
            error: view.error.clone(),
        }
    }
}
