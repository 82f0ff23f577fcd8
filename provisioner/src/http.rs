//! The two HTTP APIs: parse, call, answer. No decision about environments is taken here.

mod agent;
mod envelope;
mod error;
mod events;
mod extract;
mod fleet;
mod internal;
mod rollouts;
pub mod server;
mod service;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::Response;
use axum::routing::{MethodRouter, delete, get, post, put};
use axum::{Json, Router};
use dtma_api::enrolment::AgentSettings;
use dtma_api::{Token, TokenHash};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::accounts::Accounts;
use crate::board::Board;
use crate::environment::DropletSpec;
use crate::heartbeats::Heartbeats;
use crate::metrics::Metrics;
use crate::releases::Releases;
use crate::rollouts::Rollouts;
pub use error::ApiError;

/// Of a request's body at most.
const BODY_LIMIT: usize = 256 * 1024;
/// What callers of the internal API present.
const SECRET_HEADER: &str = "x-internal-api-secret";

/// What the handlers work with.
#[derive(Clone)]
pub struct App(Arc<Parts>);

/// See [`App`].
pub struct Parts {
    /// The rows.
    pub board: Arc<Board>,
    /// Whose agents are.
    pub accounts: Accounts,
    /// Heartbeats on their way to disk.
    pub heartbeats: Heartbeats,
    /// The agent's releases.
    pub releases: Arc<Releases>,
    /// Updates of the agents.
    pub rollouts: Arc<Rollouts>,
    /// How long an agent that was told to update may be unheard.
    pub silent_after_seconds: u64,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// What callers of the internal API present, digested.
    pub internal_secret: TokenHash,
    /// What a droplet is when the caller doesn't say.
    pub spec: DropletSpec,
    /// What agents are told.
    pub agent_settings: AgentSettings,
    /// Told when the process is to end.
    pub stop: CancellationToken,
}

impl App {
    /// An app of these parts.
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }
}

impl std::ops::Deref for App {
    type Target = Parts;
    fn deref(&self) -> &Parts {
        &self.0
    }
}

/// One line of the table of routes.
struct Route {
    method: &'static str,
    path: &'static str,
    /// It needs the internal secret.
    internal: bool,
    handler: MethodRouter<App>,
}

fn route(method: &'static str, path: &'static str, internal: bool, handler: MethodRouter<App>) -> Route {
    Route { method, path, internal, handler }
}

/// Every route there is; `openapi.json` is checked against it.
fn routes() -> Vec<Route> {
    vec![
        route("get", "/", false, get(service::root)),
        route("get", "/health", false, get(service::health)),
        route("get", "/ready", false, get(service::ready)),
        route("get", "/openapi.json", false, get(service::openapi)),
        route("get", "/metrics", true, get(fleet::metrics)),
        route("post", "/internal/agents/{agentId}/ensure-tool-environment", true, post(internal::ensure)),
        route("get", "/internal/agents/{agentId}/tool-environment", true, get(internal::show)),
        route("delete", "/internal/agents/{agentId}/tool-environment", true, delete(internal::deprovision)),
        route("get", "/internal/agents/{agentId}/tool-environment/events", true, get(events::stream)),
        route("get", "/internal/environments", true, get(fleet::list)),
        route("get", "/internal/environments/{environmentId}", true, get(fleet::show)),
        route("put", "/internal/environments/{environmentId}/updates", true, put(rollouts::prefer)),
        route("post", "/internal/rollouts", true, post(rollouts::start)),
        route("get", "/internal/rollouts", true, get(rollouts::list)),
        route("get", "/internal/rollouts/{rolloutId}", true, get(rollouts::show)),
        route("post", "/internal/rollouts/{rolloutId}/pause", true, post(rollouts::pause)),
        route("post", "/internal/rollouts/{rolloutId}/resume", true, post(rollouts::resume)),
        route("post", "/internal/rollouts/{rolloutId}/abort", true, post(rollouts::abort)),
        route("post", "/agent/v1/enroll", false, post(agent::enrol)),
        route("post", "/agent/v1/heartbeat", false, post(agent::heartbeat)),
        route("post", "/agent/v1/bootstrap-progress", false, post(agent::bootstrap_progress)),
        route("post", "/agent/v1/fetch-tool-secrets", false, post(agent::fetch_tool_secrets)),
        route("get", "/agent/v1/releases/{folder}/{file}", false, get(agent::release)),
    ]
}

/// Both APIs.
pub fn router(app: App) -> Router {
    let mut router = Router::new();
    for Route { path, internal, handler, .. } in routes() {
        let handler =
            if internal { handler.route_layer(from_fn_with_state(app.clone(), require_secret)) } else { handler };
        router = router.route(path, handler);
    }
    router
        .fallback(|| async { ApiError::NotFound })
        .method_not_allowed_fallback(|| async { ApiError::WrongMethod })
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(from_fn(envelope::to_the_end))
        .layer(from_fn(envelope::cross_origin))
        .layer(from_fn_with_state(app.clone(), envelope::identify))
        .with_state(app)
}

/// Lets pass who knows the internal secret: in its header, or as a bearer, which is what Prometheus can send.
async fn require_secret(State(app): State<App>, request: Request, next: Next) -> Result<Response, ApiError> {
    let headers = request.headers();
    let presented = match headers.get(SECRET_HEADER) {
        Some(value) => value.to_str().ok().map(|secret| Token::from(secret.to_owned())),
        None => bearer(headers).ok(),
    };
    // Digests are compared in constant time.
    if presented.is_some_and(|secret| secret.hash() == app.internal_secret) {
        Ok(next.run(request).await)
    } else {
        Err(ApiError::Forbidden)
    }
}

fn bearer(headers: &HeaderMap) -> Result<Token, ApiError> {
    let value = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).ok_or(ApiError::NoBearer)?;
    let (scheme, token) = value.split_once(' ').ok_or(ApiError::NoBearer)?;
    let token = token.trim();
    if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() {
        return Err(ApiError::NoBearer);
    }
    Ok(Token::from(token.to_owned()))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(ApiError::InvalidJson)
}

/// A JSON answer of any shape.
type Answer = Json<serde_json::Value>;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_description_names_every_route_and_no_other() {
        let described: serde_json::Value = serde_json::from_str(include_str!("../openapi.json")).unwrap();
        let mut operations = BTreeSet::new();
        for (path, methods) in described["paths"].as_object().unwrap() {
            for (method, operation) in methods.as_object().unwrap() {
                let guarded = operation["security"].as_array().unwrap().iter().any(|way| way["internal"].is_array());
                operations.insert((method.clone(), path.clone(), guarded));
            }
        }
        let served: BTreeSet<_> = routes()
            .into_iter()
            .map(|route| (route.method.to_owned(), route.path.to_owned(), route.internal))
            .collect();
        assert_eq!(operations, served);
    }

    #[test]
    fn the_description_has_this_version() {
        let described: serde_json::Value = serde_json::from_str(include_str!("../openapi.json")).unwrap();
        assert_eq!(described["info"]["version"], env!("CARGO_PKG_VERSION"));
    }
}
