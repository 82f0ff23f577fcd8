//! Whether the agent lives, is ready, and what it looks after: `/health`, `/ready`, `/status`, `/tools/status`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use bytes::Bytes;
use dtma_api::host::{Checks, Liveness, NotReady, Ready};
use dtma_api::instance::InstanceView;
use dtma_api::status::{AgentEnvironment, AgentStatus, SystemMetrics};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;

use super::App;
use super::error::ApiError;
use super::frame::Caller;
use super::table::{Access, Content, Operation, Table};
use crate::backend::LinkState;
use crate::egress::EgressState;
use crate::reconcile::Snapshot;

pub(super) fn routes<T: Table>(table: T) -> T {
    table
        .get("/health", async || "OK", || {
            Operation::new("Whether the process serves").access(Access::Open).answer(200, "`OK`", Content::Text("text/plain"))
        })
        .get("/ready", ready, || {
            Operation::new("Whether the agent can do its work")
                .answers::<Ready>(200, "It can.")
                .fails(&[(503, "not_ready", "it can't; `details` is a `NotReady` with every reason")])
        })
        .get("/status", status, || {
            Operation::new("The agent, its instances and the droplet")
                .described("Without a credential the answer is a `Liveness`, unless the operator set `DTMA_PUBLIC_STATUS=full`.")
                .access(Access::More)
                .answers::<StatusAnswer>(200, "Everything, or that the agent lives.")
        })
        .get("/tools/status", full_status, || {
            Operation::new("The same as `GET /status`, and only for those who bear a key")
                .answers::<AgentStatus>(200, "Everything.")
        })
}

/// What `GET /status` answers, depending on who asks.
#[derive(JsonSchema)]
#[schemars(untagged)]
#[allow(dead_code)] // a schema, never a value
enum StatusAnswer {
    Full(AgentStatus),
    Liveness(Liveness),
}

/// 200 when the agent can do its work, otherwise 503 with every reason why not.
async fn ready(State(app): State<App>) -> Result<Json<Ready>, ApiError> {
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
    let egress = parts.instances.egress().state();
    if let EgressState::Closed { problem } = &egress {
        reasons.push(format!("instances whose egress is a list reach nothing: {problem}"));
    }
    let checks = Checks {
        docker_reachable: engine.reachable,
        ledger_writable: ledger.is_ok(),
        enrolled: !matches!(link, LinkState::Enrolling { .. }),
        egress: !matches!(egress, EgressState::Closed { .. }),
        disk_pressure: parts.system.borrow().metrics.disk_pressure,
    };
    if reasons.is_empty() {
        return Ok(Json(Ready { success: true, ready: true, checks }));
    }
    let error = reasons.join("; ");
    // Texts and switches always serialise.
    let details = serde_json::to_value(NotReady { checks, reasons }).unwrap_or(Value::Null);
    Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", error).with_details(details))
}

/// Everything, or for those without a key that the agent lives.
async fn status(State(app): State<App>, Extension(caller): Extension<Caller>) -> Result<Response, ApiError> {
    match caller {
        Caller::Known => full_status(State(app)).await,
        Caller::Anybody => Ok(Json(Liveness {
            success: true,
            status: "running".to_owned(),
            timestamp: Timestamp::now(),
            version: crate::version().to_owned(),
            service: "DTMA".to_owned(),
        })
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
        version: crate::version(),
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
