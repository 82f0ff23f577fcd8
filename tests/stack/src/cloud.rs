//! A client of the local cloud: DigitalOcean's API as its owner sees it, and the control endpoint for what no real cloud does
//! on request.

use dtma_api::Token;
use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::Result;
use crate::http::{self, Reply};

/// Knows the base URL and the token. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Cloud {
    base: String,
    token: Token,
    http: reqwest::Client,
}

/// One droplet as the local cloud itself knows it: at once, with no lag.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct LocalDroplet {
    /// The API's id.
    pub id: i64,
    /// Id of its container.
    pub container: String,
    /// Its address, once it has one.
    pub ip: Option<String>,
}

/// One request the local cloud has received.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct SeenRequest {
    /// Counts up from the start of the local cloud.
    pub sequence: u64,
    /// The operation's id in DigitalOcean's OpenAPI description; none when the path is no operation.
    pub operation: Option<String>,
    /// HTTP method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// What it answered; none when the connection was dropped.
    pub status: Option<u16>,
}

/// What goes wrong, on request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Fault {
    /// Answers with this status and DigitalOcean's error body.
    Status {
        /// 429, 500, …
        status: u16,
    },
    /// Closes the connection.
    Drop {
        /// Before or after the operation has had its effect.
        when: When,
    },
    /// Waits.
    Delay {
        /// Before or after the operation has had its effect.
        when: When,
        /// For how long.
        ms: u64,
    },
    /// Accepts the droplet; then its create action fails and the droplet is gone.
    PlacementFailure,
}

/// Which side of an operation's effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// The effect never happens.
    Before,
    /// The effect has happened.
    After,
}

/// What happens to a droplet's power.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// Everything in it is killed; then it boots.
    Cycle,
    /// Everything in it is killed.
    Off,
    /// It boots.
    On,
}

impl Cloud {
    /// A client for the local cloud at `base` (no slash at its end).
    ///
    /// # Errors
    /// When no HTTP client can be made.
    pub fn new(base: impl Into<String>, token: Token) -> Result<Self> {
        Ok(Self { base: base.into(), token, http: http::client()? })
    }

    /// Its base URL, `/v2` not included.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// Any request with the token and, where given, a JSON body.
    ///
    /// # Errors
    /// When there is no answer; an answer that is no success is a [`Reply`] all the same.
    pub async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Reply> {
        let doing = format!("{method} {path} of the local cloud");
        let mut request = self.http.request(method, format!("{}{path}", self.base)).bearer_auth(self.token.expose());
        if let Some(body) = body {
            request = request.json(body);
        }
        http::send(doing, request).await
    }

    /// Every droplet there is.
    ///
    /// # Errors
    /// When there is no answer or it is no success.
    pub async fn droplets(&self) -> Result<Vec<LocalDroplet>> {
        self.send(Method::GET, "/control/droplets", None).await?.decode()
    }

    /// How many droplets DigitalOcean's own API lists.
    ///
    /// # Errors
    /// When there is no answer or it is no success.
    pub async fn listed_droplets(&self) -> Result<u64> {
        let reply = self.send(Method::GET, "/v2/droplets?per_page=1", None).await?;
        reply.success()?;
        Ok(reply.json().pointer("/meta/total").and_then(Value::as_u64).unwrap_or(u64::MAX))
    }

    /// Every request since the local cloud started, oldest first.
    ///
    /// # Errors
    /// When there is no answer or it is no success.
    pub async fn requests(&self) -> Result<Vec<SeenRequest>> {
        self.send(Method::GET, "/control/requests", None).await?.decode()
    }

    /// Every request and answer so far that was outside DigitalOcean's description of its API; none where nothing is checked.
    ///
    /// # Errors
    /// When there is no answer or it is no success.
    pub async fn violations(&self) -> Result<Vec<Value>> {
        self.send(Method::GET, "/control/violations", None).await?.decode()
    }

    /// Lets the next `times` requests of `operation` (an operation id such as `droplets_create`) go wrong.
    ///
    /// # Errors
    /// When there is no answer or it is no success.
    pub async fn fault(&self, operation: &str, fault: Fault, times: u32) -> Result<()> {
        let body = json!({ "operation": operation, "fault": fault, "times": times });
        self.send(Method::POST, "/control/faults", Some(&body)).await?.success()
    }

    /// Nothing goes wrong on request any more.
    ///
    /// # Errors
    /// When there is no answer or it is no success.
    pub async fn clear_faults(&self) -> Result<()> {
        self.send(Method::DELETE, "/control/faults", None).await?.success()
    }

    /// Cuts a droplet off from the network, or lets it back on.
    ///
    /// # Errors
    /// When there is no answer or it is no success.
    pub async fn set_network(&self, droplet: i64, connected: bool) -> Result<()> {
        let path = format!("/control/droplets/{droplet}/network");
        self.send(Method::POST, &path, Some(&json!({ "connected": connected }))).await?.success()
    }

    /// Does to a droplet's power what no operating system is asked about.
    ///
    /// # Errors
    /// When there is no answer or it is no success.
    pub async fn power(&self, droplet: i64, action: Power) -> Result<()> {
        let path = format!("/control/droplets/{droplet}/power");
        self.send(Method::POST, &path, Some(&json!({ "action": action }))).await?.success()
    }

    /// A droplet's boot console and cloud-init's output.
    ///
    /// # Errors
    /// When there is no answer or it is no success.
    pub async fn console(&self, droplet: i64) -> Result<String> {
        let reply = self.send(Method::GET, &format!("/control/droplets/{droplet}/console"), None).await?;
        reply.success()?;
        Ok(reply.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_and_power_are_written_as_the_control_endpoint_reads_them() {
        let written = |value: Value| value.to_string();
        assert_eq!(written(json!(Fault::Status { status: 429 })), r#"{"kind":"status","status":429}"#);
        assert_eq!(written(json!(Fault::Drop { when: When::After })), r#"{"kind":"drop","when":"after"}"#);
        assert_eq!(written(json!(Fault::PlacementFailure)), r#"{"kind":"placement_failure"}"#);
        assert_eq!(written(json!(Power::Cycle)), r#""cycle""#);
    }
}
