//! How a new agent becomes known: `POST {PUBLIC_URL}/agent/v1/enroll`.

use serde::{Deserialize, Serialize};

use crate::{CertificatePin, EnvironmentId, Token, TokenHash};

/// The agent's first words; the one-time token is the bearer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EnrolmentRequest {
    /// Pin of the TLS key the agent has made and will keep.
    pub certificate_pin: CertificatePin,
    /// A secret the agent has made and stored before it asks. If the answer is lost, the same token with the same key enrols
    /// again; with another key the used token is refused.
    pub retry_key: Token,
    /// The agent's version.
    pub agent_version: String,
}

/// The provisioner's answer, 200. 401 `token_unknown`, `token_expired` or `token_used` are final.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EnrolmentAnswer {
    /// Always `true`.
    pub success: bool,
    /// The environment this agent serves.
    pub environment_id: EnvironmentId,
    /// The agent's own bearer for everything it sends from now on.
    pub bearer_token: Token,
    /// What it should know to serve.
    pub settings: AgentSettings,
}

/// What the provisioner decides for an agent. Carried at enrolment, and again in heartbeat directives when `generation` is higher than
/// the one the agent reported.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AgentSettings {
    /// Goes up with every change.
    pub generation: u64,
    /// SHA-256 of each key callers may present to the agent.
    pub caller_key_sha256s: Vec<TokenHash>,
    /// Seconds between heartbeats, before jitter.
    pub heartbeat_interval_seconds: u64,
}
