//! Secrets on the wire: how an agent asks its backend for them, and how a caller has them fetched again.

use std::collections::BTreeMap;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{AccountToolInstanceId, InstanceName, Token};

/// Body of `POST {base}/fetch-tool-secrets`, with the droplet's own token as bearer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretsRequest {
    /// Whose, by the old agent's name for it.
    #[serde(rename = "tool_instance_db_id")]
    pub tool_instance_db_id: AccountToolInstanceId,
    /// The same.
    pub account_tool_instance_id: AccountToolInstanceId,
    /// Its name on the droplet.
    pub instance_name_on_toolbox: InstanceName,
    /// Providers whose access tokens it needs.
    #[serde(default, rename = "requiredOAuthProviders", skip_serializing_if = "Vec::is_empty")]
    pub required_oauth_providers: Vec<String>,
}

/// The answer. Old backends give `secrets` only.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SecretsAnswer {
    /// By the name of the variable; null where there is none.
    #[serde(default)]
    pub secrets: BTreeMap<String, Option<Token>>,
    /// When those of `secrets` that expire do.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub expires_at: BTreeMap<String, Timestamp>,
    /// Access tokens by provider.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub oauth: BTreeMap<String, OAuthToken>,
}

/// An access token.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OAuthToken {
    /// The token.
    pub access_token: Token,
    /// When it is of no use any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

/// Answer of `POST /mcp/credentials/refresh/{ref}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RefreshAnswer {
    /// Always `true`.
    pub success: bool,
    /// What happened, for a person.
    pub message: String,
    /// What was fetched.
    pub data: Refreshed,
}

/// Secrets that were fetched again; never their values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Refreshed {
    /// Whose.
    pub instance_name_on_toolbox: InstanceName,
    /// What those that were fetched are called.
    pub secrets: Vec<String>,
    /// At least one of them is another than before.
    pub changed: bool,
    /// Its server is started anew, because it finds them in its environment.
    pub restarting: bool,
    /// When the first of them is of no use any more; they are fetched again before.
    pub expires_at: Option<Timestamp>,
}
