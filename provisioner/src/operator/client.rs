//! The internal API about rollouts, as the command line calls it.

use std::time::Duration;

use dtma_api::Failure;
use reqwest::Method;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::rollout::{RolloutAnswer, RolloutList, RolloutView, StartRequest};

const PATIENCE: Duration = Duration::from_secs(60);

/// Knows where the provisioner is, and the internal secret.
pub struct Client {
    http: reqwest::Client,
    base: String,
    secret: SecretString,
}

/// Why something was not done, for whoever asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no HTTP client to be had.
    #[error("an HTTP client could not be made: {0}")]
    Client(#[source] reqwest::Error),
    /// Nobody answers there.
    #[error(
        "the provisioner at {base} can't be reached: {why}; is it running, and is PROVISIONER_URL (or PORT) the right one?"
    )]
    Unreachable {
        /// Where it was looked for.
        base: String,
        /// Why, down to the last cause.
        why: String,
        /// The same.
        #[source]
        source: reqwest::Error,
    },
    /// It said no.
    #[error("{error} ({code})")]
    Refused {
        /// Its words.
        error: String,
        /// Its stable word.
        code: String,
        /// With what status.
        status: u16,
    },
    /// It said something else than a provisioner says.
    #[error("what answers at {base} is no provisioner of this version (HTTP {status})")]
    Unreadable {
        /// Where.
        base: String,
        /// With what status.
        status: u16,
    },
}

impl ClientError {
    /// Whether the same may be answered soon: the provisioner, or what stands before it, is being restarted.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused { status, .. } | Self::Unreadable { status, .. } => *status >= 500,
            Self::Client(_) => false,
        }
    }
}

impl Client {
    /// A client for the provisioner at `base`.
    ///
    /// # Errors
    /// When no HTTP client can be made.
    pub fn new(base: String, secret: SecretString) -> Result<Self, ClientError> {
        let http = reqwest::Client::builder().timeout(PATIENCE).build().map_err(ClientError::Client)?;
        Ok(Self { http, base, secret })
    }

    /// Begins a rollout.
    ///
    /// # Errors
    /// When it can't be begun.
    pub async fn start(&self, request: &StartRequest) -> Result<RolloutAnswer, ClientError> {
        self.send(Method::POST, "/internal/rollouts", Some(request)).await
    }

    /// All rollouts, the latest first, without their agents.
    ///
    /// # Errors
    /// When they can't be read.
    pub async fn list(&self) -> Result<Vec<RolloutView>, ClientError> {
        let list: RolloutList = self.send(Method::GET, "/internal/rollouts", None::<&()>).await?;
        Ok(list.data)
    }

    /// One rollout with all its agents.
    ///
    /// # Errors
    /// When it can't be read.
    pub async fn show(&self, id: &str) -> Result<RolloutView, ClientError> {
        let path = format!("/internal/rollouts/{id}");
        let first: RolloutAnswer = self.send(Method::GET, &path, None::<&()>).await?;
        let (mut rollout, mut next) = (first.data, first.next);
        while let Some(after) = next {
            let page: RolloutAnswer = self.send(Method::GET, &format!("{path}?after={after}"), None::<&()>).await?;
            rollout.agents.get_or_insert_default().extend(page.data.agents.unwrap_or_default());
            next = page.next;
        }
        Ok(rollout)
    }

    /// How one rollout stands, with hardly any of its agents.
    ///
    /// # Errors
    /// When it can't be read.
    pub async fn glance(&self, id: &str) -> Result<RolloutView, ClientError> {
        let answer: RolloutAnswer =
            self.send(Method::GET, &format!("/internal/rollouts/{id}?limit=1"), None::<&()>).await?;
        Ok(answer.data)
    }

    /// `pause`, `resume` or `abort`.
    ///
    /// # Errors
    /// When it can't be done.
    pub async fn steer(&self, id: &str, word: &str) -> Result<RolloutAnswer, ClientError> {
        self.send(Method::POST, &format!("/internal/rollouts/{id}/{word}"), None::<&()>).await
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        let mut request = self
            .http
            .request(method, format!("{}{path}", self.base))
            .header("x-internal-api-secret", self.secret.expose_secret());
        if let Some(body) = body {
            request = request.json(body);
        }
        let unreachable = |source: reqwest::Error| ClientError::Unreachable {
            base: self.base.clone(),
            why: last_cause(&source),
            source,
        };
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let bytes = response.bytes().await.map_err(unreachable)?;
        if status.is_success()
            && let Ok(answer) = serde_json::from_slice(&bytes)
        {
            return Ok(answer);
        }
        match serde_json::from_slice::<Failure>(&bytes) {
            Ok(failure) if !status.is_success() => {
                let mut error = failure.error;
                // Every fault of the request, where there is more than one way to be wrong.
                for fault in failure.details.iter().filter_map(|details| details.as_array()).flatten() {
                    let text = |name: &str| fault.get(name).and_then(|value| value.as_str()).unwrap_or_default();
                    error.push_str(&format!("\n  {} {}", text("path"), text("problem")));
                }
                Err(ClientError::Refused { error, code: failure.code, status: status.as_u16() })
            }
            _ => Err(ClientError::Unreadable { base: self.base.clone(), status: status.as_u16() }),
        }
    }
}

fn last_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}
