//! The calls the agent makes, as HTTP.

#[cfg(any(test, fuzzing))]
pub(super) mod fuzzed;

use std::time::Duration;

use dtma_api::enrolment::{EnrolmentAnswer, EnrolmentRequest};
use dtma_api::heartbeat::{Directives, Heartbeat};
use dtma_api::secrets::{SecretsAnswer, SecretsRequest};
use dtma_api::{Failure, Token};
use reqwest::{Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// More than any answer needs.
const MAX_ANSWER_BYTES: usize = 256 * 1024;
/// Secrets may be files.
const MAX_SECRETS_BYTES: usize = 2 * 1024 * 1024;

/// A backend at a base URL.
#[derive(Debug, Clone)]
pub struct BackendClient {
    http: reqwest::Client,
    base_url: String,
}

/// Why a call brought nothing. What the caller does depends only on which of these it is.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The HTTP client could not be made.
    #[error("no HTTP client could be made to {operation}")]
    Client {
        /// What was to be done.
        operation: &'static str,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// No answer, or a broken one: the call may or may not have had its effect.
    #[error("the backend gave no answer when asked to {operation}")]
    NoAnswer {
        /// What was asked.
        operation: &'static str,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// 401 or 403: the token is not, or no longer, good for this.
    #[error("the backend refused the token when asked to {operation}: {status} {code}: {message}")]
    TokenRefused {
        /// What was asked.
        operation: &'static str,
        /// Status code.
        status: u16,
        /// The backend's code, where it gave one.
        code: String,
        /// Its words.
        message: String,
    },
    /// Any other status that is no success.
    #[error("the backend failed to {operation}: {status} {code}: {message}")]
    Failed {
        /// What was asked.
        operation: &'static str,
        /// Status code.
        status: u16,
        /// The backend's code, where it gave one.
        code: String,
        /// Its words.
        message: String,
    },
    /// A success whose body is not what it should be.
    #[error("the backend's answer when asked to {operation} was not understood")]
    NotUnderstood {
        /// What was asked.
        operation: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl BackendClient {
    /// A client of the backend at `base_url` (no slash at the end), every call of which takes `patience` at most. Loads the system's certificates, which takes tens of milliseconds:
    /// not for the start-up path.
    ///
    /// # Errors
    /// [`BackendError::Client`].
    pub fn new(base_url: &str, patience: Duration) -> Result<Self, BackendError> {
        let http = reqwest::Client::builder()
            .user_agent(format!("dtma-agent/{}", crate::version()))
            .timeout(patience)
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_max_idle_per_host(1)
            // A redirect would carry the token to wherever it points.
            .redirect(reqwest::redirect::Policy::none())
            // Proxies from the environment would be settings nobody sees in our settings.
            .no_proxy()
            .build()
            .map_err(|source| BackendError::Client { operation: "reach the backend", source })?;
        Ok(Self { http, base_url: base_url.to_owned() })
    }

    /// `POST {base}/enroll` with the one-time token.
    ///
    /// # Errors
    /// See [`BackendError`]; `TokenRefused` is final.
    pub async fn enrol(&self, token: &Token, request: &EnrolmentRequest) -> Result<EnrolmentAnswer, BackendError> {
        let operation = "enrol this agent";
        let response = self.post(operation, "enroll", token, request).await?;
        parse(operation, &body(operation, response).await?)
    }

    /// `POST {base}/heartbeat` with the agent's own token. An empty or unknown success means there is nothing to do, because old
    /// backends answer whatever they like.
    ///
    /// # Errors
    /// See [`BackendError`].
    pub async fn heartbeat(&self, token: &Token, heartbeat: &Heartbeat) -> Result<Directives, BackendError> {
        let operation = "take a heartbeat";
        let response = self.post(operation, "heartbeat", token, heartbeat).await?;
        if response.status() != StatusCode::OK {
            return Ok(Directives::default());
        }
        let body = body(operation, response).await?;
        if body.is_empty() { Ok(Directives::default()) } else { parse(operation, &body) }
    }

    /// `POST {base}/fetch-tool-secrets` with the agent's own token.
    ///
    /// # Errors
    /// See [`BackendError`]; nothing of the answer is ever repeated in one.
    pub async fn fetch_secrets(&self, token: &Token, request: &SecretsRequest) -> Result<SecretsAnswer, BackendError> {
        let operation = "give secrets";
        let response = self.post(operation, "fetch-tool-secrets", token, request).await?;
        let body = body_of(operation, response, MAX_SECRETS_BYTES).await?;
        serde_json::from_slice(&body).map_err(|error| {
            // The error's own words may hold a value.
            let source = format!("line {}, column {}", error.line(), error.column()).into();
            BackendError::NotUnderstood { operation, source }
        })
    }

    async fn post(
        &self,
        operation: &'static str,
        path: &str,
        token: &Token,
        body: &(impl Serialize + Sync),
    ) -> Result<Response, BackendError> {
        let request = self.http.post(format!("{}/{path}", self.base_url)).bearer_auth(token.expose()).json(body);
        let response = request.send().await.map_err(|source| BackendError::NoAnswer { operation, source })?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(refusal(operation, response).await)
    }
}

async fn refusal(operation: &'static str, response: Response) -> BackendError {
    let status = response.status();
    let body = body(operation, response).await.unwrap_or_default();
    let Failure { code, error, .. } =
        serde_json::from_slice(&body).unwrap_or_else(|_| Failure::new("", excerpt(&body)));
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            BackendError::TokenRefused { operation, status: status.as_u16(), code, message: error }
        }
        _ => BackendError::Failed { operation, status: status.as_u16(), code, message: error },
    }
}

/// The beginning of a text that is for a person.
fn excerpt(body: &[u8]) -> String {
    String::from_utf8_lossy(body).chars().take(200).collect()
}

async fn body(operation: &'static str, response: Response) -> Result<Vec<u8>, BackendError> {
    body_of(operation, response, MAX_ANSWER_BYTES).await
}

async fn body_of(operation: &'static str, mut response: Response, most: usize) -> Result<Vec<u8>, BackendError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|source| BackendError::NoAnswer { operation, source })? {
        if body.len() + chunk.len() > most {
            return Err(BackendError::NotUnderstood { operation, source: "it is far too long".into() });
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

fn parse<T: DeserializeOwned>(operation: &'static str, body: &[u8]) -> Result<T, BackendError> {
    serde_json::from_slice(body).map_err(|source| BackendError::NotUnderstood { operation, source: source.into() })
}
