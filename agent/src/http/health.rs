//! Whether the agent lives, is ready, and what it looks after: `/health`, `/ready`, `/status`, `/tools/status`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Extension, Json, Router};
use bytes::Bytes;
use dtma_api::instance::InstanceView;
use dtma_api::status::{AgentEnvironment, SystemMetrics};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;

use super::App;
use super::error::ApiError;
use super::frame::Caller;
use crate::backend::LinkState;
use crate::reconcile::Snapshot;

pub(super) fn router() -> Router<App> {
    Router::new()
        .route("/health", get(async || "OK"))
        .route("/ready", get(ready))
        .route("/status", get(status))
        .route("/tools/status", get(full_status))
}

/// 200 when the agent can do its work, otherwise 503 with every reason why not.
async fn ready(State(app): State<App>) -> Result<Response, ApiError> {
    let parts = app.parts();
    let engine = parts.instances.engine_status();
    let ledger = parts.instances.ledger_writable();
    let link = parts.link.borrow().clone();
    let mut reasons = Vec::new();
    if !engine.reachable {
        reasons.push(match engine.error {
            Some(error) => format!("the Docker Engine does not answer: {error}"),
            None => "the Docker Engine has not answered yet".to_owned(),
        });
    }
    if let Err(error) = &ledger {
        reasons.push(format!("the ledger cannot be written: {error}"));
    }
    if let LinkState::Enrolling { problem } = &link {
        reasons.push(match problem {
            Some(problem) => format!("the agent has not enrolled yet: {problem}"),
            None => "the agent has not enrolled yet".to_owned(),
        });
    }
    let checks = json!({
        "docker_reachable": engine.reachable,
        "ledger_writable": ledger.is_ok(),
        "enrolled": !matches!(link, LinkState::Enrolling { .. }),
    });
    if reasons.is_empty() {
        return Ok(Json(json!({"success": true, "ready": true, "checks": checks})).into_response());
    }
    Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", reasons.join("; "))
        .with_details(json!({"checks": checks, "reasons": reasons})))
}

/// Everything, or for those without a key that the agent lives.
async fn status(State(app): State<App>, Extension(caller): Extension<Caller>) -> Result<Response, ApiError> {
    match caller {
        Caller::Known => full_status(State(app)).await,
        Caller::Anybody => Ok(Json(json!({
            "success": true,
            "status": "running",
            "timestamp": Timestamp::now(),
            "version": crate::VERSION,
            "service": "DTMA",
        }))
        .into_response()),
    }
}

async fn full_status(State(app): State<App>) -> Result<Response, ApiError> {
    let body = app.0.status.get(&app).map_err(|error| {
        tracing::error!(%error, "the status could not be written as JSON");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "the status could not be put together")
    })?;
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// The last rendered answer. Consoles poll; putting the same text together thousands of times a second would be for nothing.
#[derive(Default)]
pub(super) struct StatusCache(Mutex<Option<Rendered>>);

struct Rendered {
    /// What it shows. A newer snapshot makes it worthless at once, so nobody who has just deployed sees the time before.
    snapshot: Arc<Snapshot>,
    at: Instant,
    body: Bytes,
}

impl StatusCache {
    /// Its time stamp and figures may be this old.
    const MAX_AGE: Duration = Duration::from_millis(100);

    fn get(&self, app: &App) -> Result<Bytes, serde_json::Error> {
        let snapshot = app.parts().instances.snapshot();
        let now = Instant::now();
        let mut rendered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*rendered {
            Some(last) if Arc::ptr_eq(&last.snapshot, &snapshot) && now.duration_since(last.at) < Self::MAX_AGE => {
                Ok(last.body.clone())
            }
            _ => {
                let body = render(app, &snapshot)?;
                *rendered = Some(Rendered { snapshot, at: now, body: body.clone() });
                Ok(body)
            }
        }
    }
}

/// [`dtma_api::status::AgentStatus`] without owning the instances; a test holds the two together.
#[derive(Serialize)]
struct StatusBody<'a> {
    success: bool,
    status: &'a str,
    timestamp: Timestamp,
    version: &'a str,
    service: &'a str,
    environment: AgentEnvironment,
    tool_instances: &'a [InstanceView],
    system_metrics: &'a SystemMetrics,
}

fn render(app: &App, snapshot: &Snapshot) -> Result<Bytes, serde_json::Error> {
    let parts = app.parts();
    let system = parts.system.borrow();
    let body = StatusBody {
        success: true,
        status: "running",
        timestamp: Timestamp::now(),
        version: crate::VERSION,
        service: "DTMA",
        environment: AgentEnvironment {
            has_auth_token: matches!(*parts.link.borrow(), LinkState::Linked { .. }),
            has_api_key: parts.gate.callers.has_keys(),
            has_api_base_url: parts.has_api_base_url,
            port: parts.port,
        },
        tool_instances: &snapshot.instances,
        system_metrics: &system.metrics,
    };
    serde_json::to_vec(&body).map(Bytes::from)
}
