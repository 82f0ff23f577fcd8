//! What the provisioner's internal API says about an environment.

use std::net::IpAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::AccountId;
use crate::{AgentId, CertificatePin, EnvironmentId};

/// Body of `POST /internal/agents/{agentId}/ensure-tool-environment`; may be absent altogether.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EnsureRequest {
    /// The agent's owner, where no Supabase tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_id: Option<AccountId>,
    /// Region slug; the provisioner's default when absent. Only used when a droplet has to be created.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Size slug, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// Image slug, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

/// Every answer of the internal API about one environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EnvironmentAnswer {
    /// `false` only when the environment is in an error state.
    pub success: bool,
    /// What happened, for a person.
    pub message: String,
    /// The environment.
    pub data: EnvironmentView,
}

/// One environment as its callers see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EnvironmentView {
    /// The agent the caller asked for.
    pub agent_id: Option<AgentId>,
    /// The environment, shared by all agents of the account.
    pub environment_id: EnvironmentId,
    /// Its owner.
    pub account_id: AccountId,
    /// The cloud's id of the droplet.
    pub droplet_id: Option<i64>,
    /// Where it stands.
    pub status: EnvironmentStatus,
    /// Public IPv4 address of the droplet.
    pub ip_address: Option<IpAddr>,
    /// Base URL of the agent's API, `https://{ip}:30000`.
    pub agent_url: Option<String>,
    /// The agent's TLS key; check it when the certificate is self-signed.
    pub agent_certificate_pin: Option<CertificatePin>,
    /// Region slug.
    pub region: String,
    /// Size slug.
    pub size: String,
    /// When the account first asked for it.
    pub created_at: Timestamp,
    /// When it became active for the first time on its present droplet.
    pub ready_at: Option<Timestamp>,
    /// What went wrong, in `error_*` and `unresponsive` states, and while a retry is pending.
    pub error: Option<EnvironmentError>,
}

/// Why an environment is not as it should be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EnvironmentError {
    /// Stable, snake_case: `cloud_refused`, `placement_failed`, `bootstrap_failed`, `bootstrap_timeout`, …
    pub code: String,
    /// A sentence; the cloud's own words where it refused.
    pub message: String,
    /// Bootstrap phase reached, where it got that far.
    pub phase: Option<String>,
    /// Last lines of that phase's output.
    pub output: Option<String>,
    /// The cloud's request id.
    pub cloud_request_id: Option<String>,
    /// When it happened.
    pub at: Timestamp,
}

/// Where an environment stands. The names are those of the backend's database enum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EnvironmentStatus {
    /// Wanted; nothing has been asked of the cloud yet.
    PendingProvision,
    /// The cloud has been asked for a droplet, or is making it.
    Provisioning,
    /// The droplet is up; the agent has not reported yet.
    AwaitingHeartbeat,
    /// The agent reports.
    Active,
    /// The agent has stopped reporting.
    Unresponsive,
    /// It could not be made; `ensure` tries again.
    ErrorProvisioning,
    /// To be deleted; nothing has been asked of the cloud yet.
    PendingDeprovision,
    /// The cloud is deleting the droplet.
    Deprovisioning,
    /// Gone.
    Deprovisioned,
    /// Could not be deleted; it is being tried again.
    ErrorDeprovisioning,
}

impl EnvironmentStatus {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PendingProvision => "pending_provision",
            Self::Provisioning => "provisioning",
            Self::AwaitingHeartbeat => "awaiting_heartbeat",
            Self::Active => "active",
            Self::Unresponsive => "unresponsive",
            Self::ErrorProvisioning => "error_provisioning",
            Self::PendingDeprovision => "pending_deprovision",
            Self::Deprovisioning => "deprovisioning",
            Self::Deprovisioned => "deprovisioned",
            Self::ErrorDeprovisioning => "error_deprovisioning",
        }
    }
}

/// One SSE message of `GET …/tool-environment/events`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EnvironmentEvent {
    /// When.
    pub at: Timestamp,
    /// Where the environment stands now.
    pub status: EnvironmentStatus,
    /// Bootstrap phase, once the droplet reports one.
    pub phase: Option<String>,
    /// For a person.
    pub message: String,
}
