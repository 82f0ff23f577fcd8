//! A client of one agent's API, the way edge functions call it: HTTPS to the pinned key, the fleet key as bearer.

use dtma_api::environment::EnvironmentView;
use dtma_api::instance::{DeployAnswer, DeployRequest, InstanceEvent, InstanceView};
use dtma_api::status::AgentStatus;
use dtma_api::{CertificatePin, Token};
use reqwest::Method;
use serde_json::Value;

use crate::error::{Result, StackError};
use crate::http::{self, Reply};
use crate::mcp::McpClient;
use crate::pinned;
use crate::sse::EventStream;

/// Knows the agent's URL, its pin and the fleet key. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Agent {
    base: String,
    key: Token,
    http: reqwest::Client,
}

impl Agent {
    /// The agent of an active environment.
    ///
    /// # Errors
    /// When the environment names no agent URL or pin yet.
    pub fn of(environment: &EnvironmentView, key: Token) -> Result<Self> {
        let missing =
            |what: &str| StackError::InUse(format!("environment {} has no {what} yet", environment.environment_id));
        let base = environment.agent_url.as_deref().ok_or_else(|| missing("agent URL"))?;
        let pin = environment.agent_certificate_pin.ok_or_else(|| missing("certificate pin"))?;
        Self::new(base, pin, key)
    }

    /// The agent at `base` (no slash at its end), having the TLS key `pin`.
    ///
    /// # Errors
    /// When no client can be made.
    pub fn new(base: &str, pin: CertificatePin, key: Token) -> Result<Self> {
        Ok(Self { base: base.to_owned(), key, http: pinned::client(pin)? })
    }

    /// The same agent, called with another key.
    #[must_use]
    pub fn with_key(&self, key: Token) -> Self {
        Self { key, ..self.clone() }
    }

    /// Its base URL.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// Any request, with the key as bearer.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.request_without_key(method, path).bearer_auth(self.key.expose())
    }

    /// Any request, as a stranger sends it.
    pub fn request_without_key(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    /// Sends a request with the key and, where given, a JSON body.
    ///
    /// # Errors
    /// When there is no answer; an answer that is no success is a [`Reply`] all the same.
    pub async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Reply> {
        let doing = format!("{method} {path}");
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.json(body);
        }
        http::send(doing, request).await
    }

    /// `GET path`.
    ///
    /// # Errors
    /// As [`Agent::send`].
    pub async fn get(&self, path: &str) -> Result<Reply> {
        self.send(Method::GET, path, None).await
    }

    /// `GET /status` with the key.
    ///
    /// # Errors
    /// When there is no answer or it is no success.
    pub async fn status(&self) -> Result<AgentStatus> {
        self.get("/status").await?.decode()
    }

    /// `POST /tools` with any body.
    ///
    /// # Errors
    /// As [`Agent::send`].
    pub async fn deploy_raw(&self, body: &Value) -> Result<Reply> {
        self.send(Method::POST, "/tools", Some(body)).await
    }

    /// `POST /tools`, for callers that expect a success.
    ///
    /// # Errors
    /// When there is no answer or it is no success.
    pub async fn deploy(&self, request: &DeployRequest) -> Result<DeployAnswer> {
        let body = serde_json::to_value(request).map_err(StackError::json("a deploy request"))?;
        self.deploy_raw(&body).await?.decode()
    }

    /// What happens to all instances from now on.
    ///
    /// # Errors
    /// When the stream can't be opened.
    pub async fn events(&self) -> Result<EventStream<InstanceEvent>> {
        EventStream::open("follow the agent's events", self.request(Method::GET, "/events")).await
    }

    /// A real MCP client, talking to an instance through its `mcp_url`.
    ///
    /// # Errors
    /// When the instance has no endpoint or the server doesn't complete the handshake.
    pub async fn mcp(&self, instance: &InstanceView) -> Result<McpClient> {
        let path = instance.mcp_url.as_deref().ok_or_else(|| StackError::Mcp {
            doing: "connect",
            problem: format!("{} has no MCP endpoint", instance.instance_name_on_toolbox),
        })?;
        let url = if path.starts_with('/') { format!("{}{path}", self.base) } else { path.to_owned() };
        McpClient::connect(self.http.clone(), &url, &self.key).await
    }
}
