//! A client of the provisioner's internal API, the way an edge function calls it.

use dtma_api::Token;
use dtma_api::environment::{EnsureRequest, EnvironmentAnswer, EnvironmentEvent, EnvironmentView};
use reqwest::Method;
use serde_json::Value;

use crate::error::Result;
use crate::http::{self, Reply};
use crate::sse::EventStream;

/// Knows the base URL and the internal secret. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Provisioner {
    base: String,
    secret: Token,
    http: reqwest::Client,
}

impl Provisioner {
    /// A client for the provisioner at `base` (no slash at its end).
    ///
    /// # Errors
    /// When no HTTP client can be made.
    pub fn new(base: impl Into<String>, secret: Token) -> Result<Self> {
        Ok(Self { base: base.into(), secret, http: http::client()? })
    }

    /// Its base URL.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// Any request, with the internal secret.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.request_without_secret(method, path).header("x-internal-api-secret", self.secret.expose())
    }

    /// Any request, as a stranger sends it.
    pub fn request_without_secret(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    /// Asks for an agent's environment and waits up to `wait` seconds for it to become active.
    ///
    /// # Errors
    /// When there is no answer; an answer that is no success is a [`Reply`] all the same.
    pub async fn ensure_raw(&self, agent: &str, body: Option<&Value>, wait: u64) -> Result<Reply> {
        let path = format!("/internal/agents/{agent}/ensure-tool-environment?wait={wait}");
        let mut request = self.request(Method::POST, &path);
        if let Some(body) = body {
            request = request.json(body);
        }
        http::send(format!("ensure the environment of {agent}"), request).await
    }

    /// As [`Provisioner::ensure_raw`], for callers that expect a success.
    ///
    /// # Errors
    /// When there is no answer or it is no success (active or on its way).
    pub async fn ensure(&self, agent: &str, body: &EnsureRequest, wait: u64) -> Result<EnvironmentView> {
        let body = serde_json::to_value(body).map_err(crate::StackError::json("an ensure request"))?;
        let reply = self.ensure_raw(agent, Some(&body), wait).await?;
        reply.decode::<EnvironmentAnswer>().map(|answer| answer.data)
    }

    /// The agent's environment, whatever its status.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn get_raw(&self, agent: &str) -> Result<Reply> {
        let path = format!("/internal/agents/{agent}/tool-environment");
        http::send(format!("get the environment of {agent}"), self.request(Method::GET, &path)).await
    }

    /// As [`Provisioner::get_raw`], for callers that know there is one.
    ///
    /// # Errors
    /// When there is no answer or it is no success.
    pub async fn get(&self, agent: &str) -> Result<EnvironmentView> {
        self.get_raw(agent).await?.decode::<EnvironmentAnswer>().map(|answer| answer.data)
    }

    /// Gives the agent's environment up and waits up to `wait` seconds for the droplet to be gone.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn delete(&self, agent: &str, wait: u64) -> Result<Reply> {
        let path = format!("/internal/agents/{agent}/tool-environment?wait={wait}");
        http::send(format!("delete the environment of {agent}"), self.request(Method::DELETE, &path)).await
    }

    /// Everything that happens to the agent's environment: first what has happened on its present droplet, then live.
    ///
    /// # Errors
    /// When the stream can't be opened.
    pub async fn events(&self, agent: &str) -> Result<EventStream<EnvironmentEvent>> {
        let path = format!("/internal/agents/{agent}/tool-environment/events");
        EventStream::open(&format!("follow the environment of {agent}"), self.request(Method::GET, &path)).await
    }
}
