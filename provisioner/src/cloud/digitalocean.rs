//! DigitalOcean's API v2. The only file that knows its paths, bodies and headers.
//!
//! Everything goes through one limiter. Questions and deletes are repeated when that is safe; a create is sent once, by a client that
//! follows no redirects and repeats nothing by itself. Answers are read leniently: unknown fields and words are no error.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Method, Response, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::retry::wait_before;
use super::{ActionStatus, Cloud, CloudError, CreateError, CreateRequest, Created, Droplet, Limiter, Power, Refusal};
use crate::environment::DropletId;
use crate::metrics::Metrics;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const ASK_TIMEOUT: Duration = Duration::from_secs(15);
/// A create may take long, and an early end only makes its outcome doubtful.
const CREATE_TIMEOUT: Duration = Duration::from_secs(60);
const PER_PAGE: usize = 200;
const MOST_PAGES: usize = 500;
/// Of a body that isn't the cloud's JSON, as much goes into a message.
const EXCERPT: usize = 200;

/// A client for one token.
pub struct DigitalOcean {
    http: reqwest::Client,
    base: String,
    token: SecretString,
    ssh_keys: Vec<String>,
    limiter: Limiter,
    metrics: Arc<Metrics>,
}

/// The HTTP client could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("setting up the HTTP client for the cloud")]
pub struct BuildError(#[source] reqwest::Error);

impl DigitalOcean {
    /// A client that sends to `base` (without `/v2`) and puts `ssh_keys` (ids or fingerprints) on every droplet.
    ///
    /// # Errors
    /// When the HTTP client can't be set up.
    pub fn new(
        base: &str,
        token: SecretString,
        ssh_keys: Vec<String>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, BuildError> {
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .user_agent(concat!("dtma-provisioner/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(BuildError)?;
        Ok(Self { http, base: base.to_owned(), token, ssh_keys, limiter: Limiter::new(), metrics })
    }

    async fn send(
        &self,
        operation: &'static str,
        method: Method,
        url: &str,
        body: Option<&serde_json::Value>,
        timeout: Duration,
    ) -> Result<Answer, reqwest::Error> {
        self.limiter.turn().await;
        let mut request = self.http.request(method, url).bearer_auth(self.token.expose_secret()).timeout(timeout);
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = match request.send().await {
            Ok(response) => Answer::read(response).await,
            // The URL holds a tag or an id, nothing secret, but it is said elsewhere already.
            Err(error) => Err(error.without_url()),
        };
        match &answer {
            Ok(answer) => {
                self.metrics.cloud_request(operation, answer.status.as_u16());
                if let Some(wait) = answer.pause(Timestamp::now()) {
                    tracing::warn!(operation, wait_ms = wait.as_millis(), "the cloud asks for a pause");
                    self.limiter.shut_for(wait);
                }
                tracing::debug!(
                    operation,
                    status = answer.status.as_u16(),
                    cloud_request_id = answer.request_id,
                    "cloud"
                );
            }
            Err(error) => {
                self.metrics.cloud_request(operation, 0);
                tracing::debug!(operation, error = %error, "the cloud did not answer");
            }
        }
        answer
    }

    /// Sends something that may be repeated. 404 is an answer, not an error.
    async fn ask(&self, operation: &'static str, method: Method, url: &str) -> Result<Answer, CloudError> {
        let mut tries = 1;
        loop {
            let outcome = self.send(operation, method.clone(), url, None, ASK_TIMEOUT).await;
            tries += 1;
            let error = match outcome {
                Ok(answer) if answer.status.is_success() || answer.status == StatusCode::NOT_FOUND => {
                    return Ok(answer);
                }
                Ok(answer) => {
                    let passing = answer.status.is_server_error() || answer.status == StatusCode::TOO_MANY_REQUESTS;
                    let refusal = answer.refusal();
                    let wait = wait_before(tries, refusal.retry_after, jitter()).filter(|_| passing);
                    (CloudError::Refused { operation, refusal }, wait)
                }
                Err(source) => (CloudError::Unreachable { operation, source }, wait_before(tries, None, jitter())),
            };
            match error {
                (error, None) => return Err(error),
                (error, Some(wait)) => {
                    tracing::info!(operation, error = %error, wait_ms = wait.as_millis(), "asking the cloud again");
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    async fn ask_json<T: DeserializeOwned>(&self, operation: &'static str, url: &str) -> Result<Option<T>, CloudError> {
        let answer = self.ask(operation, Method::GET, url).await?;
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        serde_json::from_slice(&answer.body).map(Some).map_err(|source| CloudError::Unreadable { operation, source })
    }
}

#[async_trait]
impl Cloud for DigitalOcean {
    async fn create(&self, request: &CreateRequest) -> Result<Created, CreateError> {
        let mut body = serde_json::json!({
            "name": request.name,
            "region": request.spec.region,
            "size": request.spec.size,
            "image": request.spec.image,
            "tags": request.tags,
            "user_data": request.user_data.expose_secret(),
            // Its installation holds the package lock for minutes at first boot.
            "with_droplet_agent": false,
        });
        if let (false, Some(fields)) = (self.ssh_keys.is_empty(), body.as_object_mut()) {
            // The API takes ids as numbers and fingerprints as text.
            let keys = self.ssh_keys.iter().map(|key| {
                key.parse::<u64>().map_or_else(|_| serde_json::Value::from(key.as_str()), serde_json::Value::from)
            });
            fields.insert("ssh_keys".to_owned(), keys.collect());
        }
        let url = format!("{}/v2/droplets", self.base);
        let answer = match self.send("droplets_create", Method::POST, &url, Some(&body), CREATE_TIMEOUT).await {
            Ok(answer) => answer,
            Err(error) if error.is_connect() => return Err(CreateError::NotSent(error)),
            Err(error) => return Err(CreateError::Doubtful { reason: chain(&error) }),
        };
        if answer.status.is_success() {
            let created: CreatedBody = serde_json::from_slice(&answer.body)
                .map_err(|error| CreateError::Doubtful { reason: format!("unreadable acceptance: {error}") })?;
            let action = created.links.actions.into_iter().find(|action| action.rel == "create");
            return Ok(Created { droplet: DropletId(created.droplet.id), action: action.map(|action| action.id) });
        }
        let definite = answer.status.is_client_error()
            && answer.status != StatusCode::REQUEST_TIMEOUT
            && answer.error_body().is_some();
        match answer.status {
            StatusCode::TOO_MANY_REQUESTS => Err(CreateError::RateLimited(answer.refusal())),
            _ if definite => Err(CreateError::Refused(answer.refusal())),
            _ => Err(CreateError::Doubtful { reason: answer.refusal().to_string() }),
        }
    }

    async fn droplet(&self, id: DropletId) -> Result<Option<Droplet>, CloudError> {
        let url = format!("{}/v2/droplets/{id}", self.base);
        let body: Option<OneDroplet> = self.ask_json("droplets_get", &url).await?;
        Ok(body.map(|body| body.droplet.into()))
    }

    async fn tagged(&self, tag: &str) -> Result<Vec<Droplet>, CloudError> {
        let operation = "droplets_list";
        let mut droplets = Vec::new();
        for page in 1..=MOST_PAGES {
            // Tags are ours: letters, digits, dashes and colons, all allowed in a query as they are.
            let url = format!("{}/v2/droplets?tag_name={tag}&per_page={PER_PAGE}&page={page}", self.base);
            // A tag nobody has made yet is answered with 404 by some, with an empty list by others.
            let Some(body) = self.ask_json::<ManyDroplets>(operation, &url).await? else { return Ok(droplets) };
            droplets.extend(body.droplets.into_iter().map(Droplet::from));
            if body.links.pages.next.is_none() {
                return Ok(droplets);
            }
        }
        Err(CloudError::Endless { operation, pages: MOST_PAGES })
    }

    async fn action(&self, id: i64) -> Result<Option<ActionStatus>, CloudError> {
        let url = format!("{}/v2/actions/{id}", self.base);
        let body: Option<OneAction> = self.ask_json("actions_get", &url).await?;
        Ok(body.map(|body| match body.action.status.as_str() {
            "completed" => ActionStatus::Completed,
            "errored" => ActionStatus::Errored,
            _ => ActionStatus::InProgress,
        }))
    }

    async fn delete(&self, id: DropletId) -> Result<(), CloudError> {
        let url = format!("{}/v2/droplets/{id}", self.base);
        self.ask("droplets_destroy", Method::DELETE, &url).await.map(drop)
    }
}

struct Answer {
    status: StatusCode,
    request_id: Option<String>,
    retry_after: Option<Duration>,
    exhausted_until: Option<Timestamp>,
    body: bytes::Bytes,
}

impl Answer {
    async fn read(response: Response) -> Result<Self, reqwest::Error> {
        let headers = response.headers();
        let exhausted = text(headers, "ratelimit-remaining").is_some_and(|left| left == "0");
        let reset = text(headers, "ratelimit-reset").and_then(|at| Timestamp::from_second(at.parse().ok()?).ok());
        Ok(Self {
            status: response.status(),
            request_id: text(headers, "x-request-id").map(ToOwned::to_owned),
            retry_after: text(headers, RETRY_AFTER.as_str()).and_then(|s| s.parse().ok()).map(Duration::from_secs),
            exhausted_until: reset.filter(|_| exhausted),
            body: response.bytes().await.map_err(reqwest::Error::without_url)?,
        })
    }

    /// How long to send nothing at all.
    fn pause(&self, now: Timestamp) -> Option<Duration> {
        let reset = self.exhausted_until.and_then(|until| Duration::try_from(until.duration_since(now)).ok());
        let asked = self.retry_after.filter(|_| self.status == StatusCode::TOO_MANY_REQUESTS);
        asked.max(reset)
    }

    fn error_body(&self) -> Option<ErrorBody> {
        serde_json::from_slice(&self.body).ok()
    }

    fn refusal(&self) -> Refusal {
        let body = self.error_body().unwrap_or_else(|| ErrorBody {
            id: "unreadable".to_owned(),
            message: String::from_utf8_lossy(&self.body).chars().take(EXCERPT).collect(),
            request_id: None,
        });
        Refusal {
            status: self.status.as_u16(),
            id: body.id,
            message: body.message,
            request_id: body.request_id.or_else(|| self.request_id.clone()),
            retry_after: self.retry_after,
        }
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn jitter() -> u8 {
    let mut byte = [0];
    // Without randomness the waits are only less spread.
    getrandom::fill(&mut byte).map_or(128, |()| u8::from_ne_bytes(byte))
}

/// An error with its causes; the outermost alone only says "error sending request".
fn chain(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        said = format!("{said}: {inner}");
        cause = inner.source();
    }
    said
}

#[derive(Deserialize)]
struct ErrorBody {
    id: String,
    message: String,
    request_id: Option<String>,
}

#[derive(Deserialize)]
struct CreatedBody {
    droplet: DropletNumber,
    #[serde(default)]
    links: CreatedLinks,
}

#[derive(Deserialize)]
struct DropletNumber {
    id: i64,
}

#[derive(Deserialize, Default)]
struct CreatedLinks {
    #[serde(default)]
    actions: Vec<ActionLink>,
}

#[derive(Deserialize)]
struct ActionLink {
    id: i64,
    #[serde(default)]
    rel: String,
}

#[derive(Deserialize)]
struct OneAction {
    action: ActionBody,
}

#[derive(Deserialize)]
struct ActionBody {
    status: String,
}

#[derive(Deserialize)]
struct OneDroplet {
    droplet: DropletBody,
}

#[derive(Deserialize)]
struct ManyDroplets {
    droplets: Vec<DropletBody>,
    #[serde(default)]
    links: ListLinks,
}

#[derive(Deserialize, Default)]
struct ListLinks {
    #[serde(default)]
    pages: PageLinks,
}

#[derive(Deserialize, Default)]
struct PageLinks {
    next: Option<String>,
}

#[derive(Deserialize)]
struct DropletBody {
    id: i64,
    #[serde(default)]
    status: String,
    created_at: Timestamp,
    #[serde(default)]
    tags: Vec<String>,
    #[serde(default)]
    networks: Networks,
}

#[derive(Deserialize, Default)]
struct Networks {
    #[serde(default)]
    v4: Vec<Network>,
}

#[derive(Deserialize)]
struct Network {
    #[serde(default)]
    ip_address: String,
    #[serde(default, rename = "type")]
    kind: String,
}

impl From<DropletBody> for Droplet {
    fn from(body: DropletBody) -> Self {
        let public = body.networks.v4.into_iter().find(|network| network.kind == "public");
        Self {
            id: DropletId(body.id),
            power: match body.status.as_str() {
                "new" => Power::New,
                "active" => Power::Active,
                _ => Power::Other,
            },
            public_ip: public.and_then(|network| network.ip_address.parse().ok()),
            tags: body.tags,
            created_at: body.created_at,
        }
    }
}
