//! `POST /mcp/validate`: a deploy looked at and not carried out.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::failure::Fault;
use crate::instance::{Egress, PullPolicy, SecretsAs, SessionMode, Transport, VolumeRequest};
use crate::template::{LimitsView, SandboxView};
use crate::{AccountToolInstanceId, GroupId, InstanceName};

/// Answer of `POST /mcp/validate`, also when the deploy is not valid.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ValidationAnswer {
    /// Always `true`.
    pub success: bool,
    /// What was found, for a person.
    pub message: String,
    /// What was found.
    pub data: Validation,
}

/// What is to be said of a deploy before it is asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Validation {
    /// The request as such would be accepted; what it would meet is in `outlook`.
    pub valid: bool,
    /// Everything that is wrong with it; empty exactly when it is valid.
    pub errors: Vec<ValidationError>,
    /// What would be changed or ignored.
    pub warnings: Vec<Fault>,
    /// What it comes to, when it is valid.
    pub spec: Option<SpecView>,
    /// What deploying it now would meet, when it is valid.
    pub outlook: Option<Outlook>,
}

/// One thing wrong with a deploy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ValidationError {
    /// Where and what.
    #[serde(flatten)]
    pub fault: Fault,
    /// It would give the container the host, or another instance: the deploy would be answered with 422 `forbidden_option`.
    pub forbidden: bool,
}

/// What a deploy comes to, defaults and templates included. Without the values of environment variables, which may be secret.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SpecView {
    /// Name of the instance and of its container.
    pub instance_name_on_toolbox: InstanceName,
    /// The backend's id.
    pub account_tool_instance_id: AccountToolInstanceId,
    /// What is run.
    pub image: String,
    /// When the registry is asked for it.
    pub pull_policy: PullPolicy,
    /// How it is reached, when it is an MCP server.
    pub mcp: Option<McpView>,
    /// How it is checked while it runs, when it is one.
    pub health_check: Option<HealthCheckView>,
    /// Names of the environment variables on top of the image's.
    pub environment_variables: Vec<String>,
    /// Replaces the image's entry point.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command.
    pub command: Option<Vec<String>>,
    /// Replaces the image's working directory.
    pub working_dir: Option<String>,
    /// Replaces the image's user.
    pub user: Option<String>,
    /// The caller's own labels.
    pub labels: BTreeMap<String, String>,
    /// Published ports.
    pub ports: Vec<PublishedPort>,
    /// Named volumes.
    pub volumes: Vec<VolumeRequest>,
    /// Upper bounds.
    pub limits: LimitsView,
    /// What Docker does when the process ends by itself: `unless-stopped`, `on-failure`, `on-failure:N` or `no`.
    pub restart_policy: String,
    /// How it is shut in.
    pub sandbox: SandboxView,
    /// The group it is part of.
    pub group_id: Option<GroupId>,
    /// Where it may connect to.
    pub egress: Egress,
    /// Its secrets, where it has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secrets: Option<SecretsView>,
}

/// Which secrets an instance has; never their values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SecretsView {
    /// What those are called that are known by name.
    pub names: Vec<String>,
    /// The backend has more.
    pub from_backend: bool,
    /// Providers whose access tokens are fetched.
    pub providers: Vec<String>,
    /// How its server finds them.
    pub given_as: SecretsAs,
}

/// How an MCP server is checked, with everything a deploy left to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HealthCheckView {
    /// It is probed at all.
    pub enabled: bool,
    /// Seconds between two probes.
    pub interval_seconds: u32,
    /// Seconds one probe may take.
    pub timeout_seconds: u32,
    /// How many in a row have to fail before it counts as unhealthy.
    pub failure_threshold: u32,
    /// How many in a row have to succeed before it counts as healthy.
    pub success_threshold: u32,
    /// Seconds from its start in which a failed probe says nothing.
    pub start_period_seconds: u32,
    /// It is restarted when it is unhealthy.
    pub restart: bool,
}

/// How an MCP server is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct McpView {
    /// What it speaks.
    pub transport: Transport,
    /// Port in the container; not used for stdio.
    pub port: u16,
    /// Path of its endpoint; not used for stdio.
    pub path: String,
    /// Whether its clients share its process; only of stdio servers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_mode: Option<SessionMode>,
    /// How many sessions it may have at once that have a container of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sessions: Option<u16>,
}

/// One port published on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PublishedPort {
    /// Host address it is bound to.
    pub ip: String,
    /// Port in the container.
    pub private_port: u16,
    /// Port on the host; none when whichever is free is taken.
    pub public_port: Option<u16>,
    /// `tcp` or `udp`.
    #[serde(rename = "type")]
    pub protocol: String,
}

/// What deploying would meet at this moment. Nothing was changed to find out, so that a moment later it can be different.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Outlook {
    /// Nothing stands in the way, as far as can be seen.
    pub clear: bool,
    /// The instance that has the name.
    pub name: NameOutlook,
    /// The other instance that has the `accountToolInstanceId`.
    pub id_taken_by: Option<InstanceName>,
    /// Published ports that are taken.
    pub ports_taken: Vec<PortTaken>,
    /// The image.
    pub image: ImageOutlook,
    /// The Docker Engine answers; where it doesn't, image and ports couldn't be looked at.
    pub docker_reachable: bool,
}

/// Whether the name is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NameOutlook {
    /// Nobody has it.
    Free,
    /// The same was deployed before: deploying it again changes nothing.
    SameSpec,
    /// An instance with another specification has it: `PUT /tools/{ref}` changes that one.
    OtherSpec,
    /// The instance that has it is being updated.
    BeingUpdated,
    /// The instance that has it is being removed.
    BeingRemoved,
}

/// A port that can't be had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortTaken {
    /// Port on the host.
    pub port: u16,
    /// `tcp` or `udp`.
    #[serde(rename = "type")]
    pub protocol: String,
    /// `instance NAME` or `container NAME`. A process outside Docker isn't seen from here.
    pub holder: String,
}

/// Where the image would come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ImageOutlook {
    /// It is on the droplet; none when Docker couldn't be asked.
    pub here: Option<bool>,
    /// Digest of what is here, `sha256:…`, where it came from a registry.
    pub digest: Option<String>,
    /// The registry will be asked; whether it has the image shows only then.
    pub will_pull: Option<bool>,
}
