//! Instances on the wire: how they are deployed and how they are shown.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::deploy_schema;
use crate::failure::Fault;
use crate::health::{HealthCheck, Introduction};
use crate::template::TemplateNames;
use crate::usage::ResourceUsage;
use crate::{AccountToolInstanceId, GroupId, InstanceName, Token};

/// Body of `POST /tools`, for callers to build. The agent doesn't parse with this type: it reads the JSON itself, so that it can name
/// every fault at once.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeployRequest {
    /// Image reference, as `docker pull` takes it.
    #[schemars(length(min = 1, max = 512), regex(pattern = deploy_schema::IMAGE))]
    pub docker_image_url: String,
    /// Name of the instance and of its container.
    pub instance_name_on_toolbox: InstanceName,
    /// The backend's id of the instance.
    pub account_tool_instance_id: AccountToolInstanceId,
    /// Docker's own words, a bounded subset: `Env[]`, `Cmd`, `Entrypoint`, `WorkingDir`, `User`, `Labels`, `HostConfig{PortBindings, Memory,
    /// NanoCpus, RestartPolicy, …}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "deploy_schema::base_config")]
    pub base_config_override_json: Option<Value>,
    /// What the server speaks; absent for a container that is no MCP server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mcp_transport_type: Option<Transport>,
    /// Path of the MCP endpoint inside the container, `/mcp` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024), regex(pattern = deploy_schema::ENDPOINT_PATH))]
    pub mcp_endpoint_path: Option<String>,
    /// Port of the MCP endpoint inside the container, 8080 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub mcp_port: Option<u16>,
    /// Whether the clients of a stdio server share its process; `shared` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_mode: Option<SessionMode>,
    /// With `per-session`: how many sessions there may be at once, 16 when absent. Each may take as much as `resourceLimits` allow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub max_sessions: Option<u16>,
    /// Environment variables; not for secrets, Docker writes them to disk.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "deploy_schema::environment_variables")]
    pub environment_variables: BTreeMap<String, String>,
    /// Limits; the agent's defaults where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_limits: Option<ResourceLimits>,
    /// Templates for what isn't said here; `GET /mcp/templates` lists them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<TemplateNames>,
    /// Named volumes, kept when the container is replaced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "deploy_schema::volumes")]
    pub volumes: Vec<VolumeRequest>,
    /// Where it may connect to; anywhere when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
    /// When to ask the registry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull_policy: Option<PullPolicy>,
    /// How the MCP server is checked while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// Secrets by name. Kept in memory only and no part of what makes two deploys the same: another value is taken over where the instance
    /// is. After a reboot of the droplet they are gone, and the instance is `needs_secrets` until the same deploy brings them again.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "deploy_schema::secrets")]
    pub secrets: BTreeMap<String, Token>,
    /// Who has more of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secrets_from: Option<SecretsFrom>,
    /// How its server finds them; `files` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secrets_as: Option<SecretsAs>,
    /// OAuth providers, `github` for one, whose access tokens the backend has. Each is called `OAUTH_{PROVIDER}_ACCESS_TOKEN`, and what
    /// that provider's programs look for (`GITHUB_TOKEN`); it is fetched again before it expires.
    #[serde(default, rename = "requiredOAuthProviders", skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "deploy_schema::providers")]
    pub required_oauth_providers: Vec<String>,
    /// For the registry the image comes from. Kept in memory only and no part of what makes two deploys the same; after a restart of the
    /// agent a deploy of the same spec brings them again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registry_credentials: Option<RegistryLogin>,
}

/// Who has secrets that don't come with the deploy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SecretsFrom {
    /// The backend the agent reports to: all it has for this instance.
    Backend,
}

/// How a server finds its secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SecretsAs {
    /// As files `/run/secrets/{NAME}`, which always hold the present values. `{NAME}_FILE` says where, for those known by name.
    Files,
    /// As environment variables too. They are set by a shell in the container as its server starts, so that Docker never sees them; the
    /// image needs `/bin/sh` and `cat`. A value that changes later starts the server anew.
    Environment,
}

/// What a registry wants to see: either `username` and `password`, or `identityToken`.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RegistryLogin {
    /// The name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// The password, or a token that is used as one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub password: Option<Token>,
    /// What the registry gave out at an earlier login.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub identity_token: Option<Token>,
}

/// Which of them there are, and nothing of what is in them.
impl fmt::Debug for RegistryLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.identity_token.is_some() { "RegistryLogin(token)" } else { "RegistryLogin(password)" })
    }
}

/// Where an instance may connect to: `"open"`, `"none"`, or `{"allow": ["api.example.com:443", …]}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Egress {
    /// Anywhere but to the metadata service and to other instances.
    Open,
    /// Nowhere.
    None,
    /// Only there, through the agent's proxy: host names, `*.` and a name for all below it, or addresses, each with a port (443 when
    /// absent).
    Allow(Vec<String>),
}

/// Body of `PUT /tools/{ref}`: that of a deploy, which need not say again whose it is, and what the new version has to show.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = names_nobody)]
pub struct UpdateRequest {
    /// What the instance is to be. Its name and its `accountToolInstanceId` may be absent, and can't be changed.
    #[serde(flatten)]
    pub deploy: DeployRequest,
    /// What the new version has to show before the old one goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_gate: Option<HealthGate>,
}

fn names_nobody(schema: &mut Schema) {
    if let Some(required) = schema.get_mut("required").and_then(Value::as_array_mut) {
        required.retain(|name| name != "instanceNameOnToolbox" && name != "accountToolInstanceId");
    }
}

/// What a new version has to show before the old one goes: that it answers as an MCP server, or on its port where it can't be asked, or
/// has stayed up where it is no server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HealthGate {
    /// Seconds from its start until it has shown it; the health check's start period when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 600))]
    pub timeout_seconds: Option<u32>,
    /// How often in a row it has to be found well; the health check's success threshold when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub successes: Option<u32>,
}

impl DeployRequest {
    /// A container that is no MCP server, with everything else as the agent decides it.
    pub fn new(image: &str, name: InstanceName, id: AccountToolInstanceId) -> Self {
        Self {
            docker_image_url: image.to_owned(),
            instance_name_on_toolbox: name,
            account_tool_instance_id: id,
            base_config_override_json: None,
            mcp_transport_type: None,
            mcp_endpoint_path: None,
            mcp_port: None,
            session_mode: None,
            max_sessions: None,
            environment_variables: BTreeMap::new(),
            resource_limits: None,
            template: None,
            volumes: Vec::new(),
            egress: None,
            pull_policy: None,
            health_check: None,
            secrets: BTreeMap::new(),
            secrets_from: None,
            secrets_as: None,
            required_oauth_providers: Vec::new(),
            registry_credentials: None,
        }
    }
}

/// What an MCP server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// JSON lines on its standard input and output.
    Stdio,
    /// The deprecated HTTP+SSE pair of endpoints.
    Sse,
    /// Streamable HTTP.
    Http,
    /// WebSocket.
    Websocket,
}

/// Whether the clients of a stdio server share its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SessionMode {
    /// All speak with one process, their messages kept apart. Only a server that knows both eras of the protocol, and keeps to the one its
    /// process was addressed in first, has a second one for clients of the era without sessions, in a container like the instance's own,
    /// while there are any.
    Shared,
    /// Each session has a container of its own, made like the instance's when the client says `initialize`, and removed when the session
    /// ends. It has the same limits, volumes, secrets and way out; it publishes no ports. The instance's own container is what is probed,
    /// logged, measured and executed in, and what clients of the era without sessions speak with.
    PerSession,
}

/// Upper bounds of one instance.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ResourceLimits {
    /// Bytes, or a number with `k`, `m`, `g` as Docker takes it: `"256m"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "deploy_schema::memory")]
    pub memory: Option<String>,
    /// Cores, fractions allowed: `0.5`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "deploy_schema::cpu")]
    pub cpu: Option<f64>,
}

/// A named volume, owned by the instance and kept when its container is replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VolumeRequest {
    /// Name within the instance: 1 to 64 of `A-Z a-z 0-9 _ -`, beginning with a letter or digit.
    #[schemars(regex(pattern = "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"))]
    pub name: String,
    /// Absolute path in the container, outside `/proc`, `/sys`, `/dev` and `/run/secrets`.
    #[schemars(length(max = 4096), regex(pattern = "^(/[^/:,]+)+$"))]
    pub path: String,
}

/// When an image is pulled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PullPolicy {
    /// Only when it is not there.
    #[default]
    IfNotPresent,
    /// Before every create.
    Always,
    /// Never; it has to be there.
    Never,
}

/// Answer of `POST /tools`: 201 or 200 when it runs, 202 while work goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DeployAnswer {
    /// Always `true`.
    pub success: bool,
    /// What happened, for a person.
    pub message: String,
    /// The instance.
    pub data: Deployed,
}

/// What a deploy made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Deployed {
    /// The instance, as every list shows it (the old agent's fields are among these).
    #[serde(flatten)]
    pub instance: InstanceView,
    /// What was changed or ignored, for a person.
    pub warnings: Vec<Fault>,
}

/// Answer of `GET /tools/{ref}` and of start, stop and restart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceAnswer {
    /// Always `true`.
    pub success: bool,
    /// What happened, for a person.
    pub message: String,
    /// The instance.
    pub data: InstanceView,
}

/// Answer of `GET /tools`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceList {
    /// Always `true`.
    pub success: bool,
    /// Every instance, by name.
    pub data: Vec<InstanceView>,
}

/// Answer of `DELETE /tools/{ref}`: 200 when nothing is left, 202 while work goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RemovalAnswer {
    /// Always `true`.
    pub success: bool,
    /// What happened, for a person.
    pub message: String,
    /// What was removed.
    pub data: Removed,
}

/// What a removal removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Removed {
    /// The instance's name.
    pub instance_name_on_toolbox: InstanceName,
    /// Nothing of it is left; otherwise the work goes on.
    pub removed: bool,
}

/// One instance in every list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceView {
    /// The backend's id of the instance.
    pub account_tool_instance_id: Option<AccountToolInstanceId>,
    /// The instance's name.
    pub instance_name_on_toolbox: InstanceName,
    /// Full id of its container; empty while there is none.
    pub container_id: String,
    /// The same as `container_id`, as old callers read it.
    pub id: String,
    /// Docker's names of the container, with the leading slash.
    pub names: Vec<String>,
    /// The image as it was asked for.
    pub image: String,
    /// Digest it resolved to, `sha256:…`.
    pub image_digest: Option<String>,
    /// Docker's word for the container: `running`, `exited`, …; `pending` while there is none.
    pub status: String,
    /// The agent's word for the instance.
    pub state: InstanceState,
    /// The same, in the backend's enum.
    pub status_on_toolbox: InstallationStatus,
    /// What the last probes found.
    pub health: Health,
    /// Why it is not healthy, for a person. Of a server that keeps ending: its exit code and its last lines.
    pub health_reason: Option<String>,
    /// When its last probe ended.
    pub last_probe_at: Option<Timestamp>,
    /// How often Docker restarted its container, and the agent because it hung.
    pub restart_count: u64,
    /// It keeps ending soon after it starts.
    pub crash_looping: bool,
    /// Published ports.
    pub ports: Vec<PortView>,
    /// When the container was created, Unix seconds; 0 while there is none.
    pub created: i64,
    /// When the container last started.
    pub started_at: Option<Timestamp>,
    /// The way in: path of the MCP endpoint under the agent's URL. None when it is no MCP server.
    pub mcp_url: Option<String>,
    /// What the server itself speaks.
    pub transport: Option<Transport>,
    /// Whether its clients share its process; only of stdio servers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_mode: Option<SessionMode>,
    /// How many sessions have a container of their own now; only where `session_mode` is `per-session`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sessions: Option<u32>,
    /// What the server says of itself; only in the answer of `GET /tools/{ref}`, once it has been asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<Introduction>,
    /// The group it was deployed in.
    pub group_id: Option<GroupId>,
    /// How the last `PUT /tools/{ref}` ended; none when there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_update: Option<UpdateView>,
    /// Why it is `failed`.
    pub error: Option<String>,
    /// What it uses, as last sampled (every 30 s); absent while it doesn't run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_usage: Option<ResourceUsage>,
}

/// How an update of an instance ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct UpdateView {
    /// When it ended.
    pub at: Timestamp,
    /// Which of the two versions serves since.
    pub outcome: UpdateOutcome,
    /// Why the new version was taken back; none when it wasn't.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Which version serves after an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UpdateOutcome {
    /// The new one.
    Applied,
    /// The old one: the new one did not show that it works.
    RolledBack,
}

/// One published port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortView {
    /// Host address it is bound to.
    pub ip: String,
    /// Port in the container.
    pub private_port: u16,
    /// Port on the host.
    pub public_port: u16,
    /// `tcp` or `udp`.
    #[serde(rename = "type")]
    pub protocol: String,
}

/// Where an instance stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    /// Accepted; its image is being pulled.
    Pulling,
    /// Its container is being created.
    Creating,
    /// Its container is being started, or doesn't answer its probe yet.
    Starting,
    /// It runs.
    Running,
    /// Another version of it is being brought up; the old one is kept until that works.
    Updating,
    /// It is being stopped.
    Stopping,
    /// It is stopped, as asked.
    Stopped,
    /// It should run, and a secret it needs isn't there; `error` says whose turn it is.
    NeedsSecrets,
    /// It should run and doesn't; tried again later.
    Failed,
    /// It is being removed.
    Removing,
}

/// The backend's own enum (`account_tool_installation_status_enum`); the values an agent reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstallationStatus {
    /// Accepted, nothing done yet.
    PendingDeploy,
    /// Pulling or creating.
    Deploying,
    /// Starting.
    Starting,
    /// Running.
    Running,
    /// Being stopped.
    Stopping,
    /// Stopped.
    Stopped,
    /// It waits for secrets.
    PendingConfig,
    /// It should run and doesn't.
    ErrorRuntime,
    /// It could not be deployed.
    Error,
    /// Being removed.
    Deleting,
}

/// What probing found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// It answered as an MCP server.
    Healthy,
    /// It runs and does not answer, or keeps ending.
    Unhealthy,
    /// Not long enough up to say.
    Starting,
    /// It has not been probed yet, or can't be.
    Unknown,
}

/// One SSE message of `GET /events` and `GET /tools/{ref}/events`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceEvent {
    /// When.
    pub at: Timestamp,
    /// Goes up by one with every event of this agent process.
    pub sequence: u64,
    /// Whose.
    pub instance_name_on_toolbox: InstanceName,
    /// What: `accepted`, `pulling`, `creating`, `starting`, `probing`, `running`, `stopping`, `stopped`, `failed`, `exited`,
    /// `unhealthy`, `healthy`, `gave_up`, `crash_looping`, `removed`, …
    pub event: String,
    /// For a person.
    pub message: String,
    /// Pull progress, bytes done and bytes known so far; only in `pulling`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
}

/// How far a pull is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    /// Bytes downloaded.
    pub current_bytes: u64,
    /// Bytes known to be needed; grows while layers are discovered.
    pub total_bytes: u64,
    /// Layers that are there, unpacked.
    #[serde(default)]
    pub layers_done: u32,
    /// Layers known to be needed.
    #[serde(default)]
    pub layers_total: u32,
}
