//! The service itself: what it is, whether it lives, whether it can work.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use jiff::Timestamp;
use serde_json::json;

use super::{Answer, App, routes};

/// The name the old backend answered with; its callers look for it.
const SERVICE: &str = "Agentopia Backend";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const OPENAPI: &str = include_str!("../../openapi.json");

pub(super) async fn root() -> Answer {
    let endpoints: Vec<String> =
        routes().iter().map(|route| format!("{} {}", route.method.to_uppercase(), route.path)).collect();
    Json(json!({"success": true, "service": SERVICE, "version": VERSION, "status": "running", "endpoints": endpoints}))
}

pub(super) async fn health() -> Answer {
    Json(json!({
        "success": true, "status": "healthy", "timestamp": Timestamp::now(), "service": SERVICE, "version": VERSION,
    }))
}

pub(super) async fn ready(State(app): State<App>) -> (StatusCode, Answer) {
    let mut reasons = Vec::new();
    if let Err(error) = app.board.store().check().await {
        tracing::warn!(error = %error, cause = %error.source, "not ready");
        reasons.push("the database can't be written to".to_owned());
    }
    let release = app.releases.current().await;
    if let Err(error) = &release {
        reasons.push(error.to_string());
    }
    let ready = reasons.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut body = json!({
        "success": ready,
        "status": if ready { "ready" } else { "not_ready" },
        "reasons": reasons,
        "agent_version": release.map(|release| release.version).ok(),
    });
    if let (false, Some(fields)) = (ready, body.as_object_mut()) {
        fields.insert("code".to_owned(), "not_ready".into());
        fields.insert("error".to_owned(), format!("Not ready: {}.", reasons.join("; ")).into());
    }
    (status, Json(body))
}

pub(super) async fn openapi() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], OPENAPI)
}
