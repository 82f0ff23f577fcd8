//! What every failed request answers with.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The body of every 4xx and 5xx answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// Always `false`.
    pub success: bool,
    /// A sentence a person can act on; never anything internal.
    pub error: String,
    /// Stable, snake_case; what programs decide by.
    pub code: String,
    /// More, where it helps: for `invalid_request` the list of [`Fault`]s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Value>,
}

impl Failure {
    /// A failure without details.
    pub fn new(code: &str, error: impl Into<String>) -> Self {
        Self { success: false, error: error.into(), code: code.to_owned(), details: None }
    }
}

/// One thing wrong with a request body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Fault {
    /// Where, as a JSON path: `$.baseConfigOverrideJson.HostConfig.Memory`.
    pub path: String,
    /// What is wrong and what would be right.
    pub problem: String,
}
