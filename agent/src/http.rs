//! The agent's HTTP API: parses requests, calls what knows, maps errors. It decides nothing about instances.

pub mod callers;
mod credentials;
pub mod error;
pub mod events;
pub mod frame;
mod groups;
mod health;
mod host;
mod mcp;
mod metrics;
mod openapi;
mod rest;
pub mod server;
mod table;
pub mod tls;
pub mod tools;
mod validation;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::FromRef;
use axum::http::{Method, StatusCode, Uri};
use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tower_http::timeout::RequestBodyTimeoutLayer;

#[cfg(any(test, fuzzing))]
pub(crate) use self::tools::exec::fuzzed::exec as fuzzed_exec;
#[cfg(any(test, fuzzing))]
pub(crate) use self::tools::params::fuzzed::query as fuzzed_query;

use self::error::ApiError;
use self::frame::Gate;
use self::server::ServerState;
use self::table::{Served, Table};
use crate::backend::LinkState;
use crate::logs::LogRing;
use crate::mcp::{Bridges, Proxy};
use crate::reconcile::Instances;
use crate::system::Sample;
use crate::update::Updates;

/// Longest silence in the middle of a request's body.
const BODY_SILENCE: Duration = Duration::from_secs(30);

/// Everything handlers are given. Cheap to clone.
#[derive(Clone)]
pub struct App(Arc<Shared>);

struct Shared {
    parts: Parts,
    status: health::StatusCache,
}

/// What an [`App`] is made of.
pub struct Parts {
    /// The instances.
    pub instances: Instances,
    /// What stands before every handler.
    pub gate: Arc<Gate>,
    /// The agent's own log.
    pub logs: LogRing,
    /// Figures of the droplet.
    pub system: watch::Receiver<Sample>,
    /// How the agent stands with its backend.
    pub link: watch::Receiver<LinkState>,
    /// The way to the agent's updater.
    pub updates: Updates,
    /// How the listener is doing.
    pub server: ServerState,
    /// The way to instances' MCP endpoints.
    pub proxy: Proxy,
    /// The way to those that don't speak streamable HTTP.
    pub bridges: Bridges,
    /// Ends the agent, in order.
    pub shutdown: CancellationToken,
    /// It knows where to report.
    pub has_api_base_url: bool,
    /// Where it listens.
    pub port: u16,
    /// When it started.
    pub started_at: Timestamp,
}

impl App {
    /// The application; the router is made of it.
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(Shared { parts, status: health::StatusCache::default() }))
    }

    fn parts(&self) -> &Parts {
        &self.0.parts
    }
}

impl FromRef<App> for Instances {
    fn from_ref(app: &App) -> Self {
        app.parts().instances.clone()
    }
}

/// Every route, behind the gate. Unknown paths and methods are answered in JSON too, and only to those who may call.
pub fn router(app: &App) -> Router {
    let Served(router) = table(Served(Router::new()));
    router
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(RequestBodyTimeoutLayer::new(BODY_SILENCE))
        .layer(axum::middleware::from_fn_with_state(app.parts().gate.clone(), frame::frame))
        .with_state(app.clone())
}

/// Every route there is.
fn table<T: Table>(table: T) -> T {
    let table = health::routes(table);
    let table = host::routes(table);
    let table = metrics::routes(table);
    let table = openapi::routes(table);
    let table = tools::routes(table);
    let table = validation::routes(table);
    let table = groups::routes(table);
    let table = credentials::routes(table);
    let table = events::routes(table);
    mcp::routes(table)
}

async fn not_found(uri: Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "no_such_route", format!("this agent has no {}", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let error = format!("{} can't be called with {method}; the Allow header says with what", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", error)
}
