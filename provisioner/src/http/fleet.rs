//! The internal API about all environments: lists, one by id, metrics.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use dtma_api::EnvironmentId;
use dtma_api::environment::EnvironmentStatus;
use serde::Deserialize;
use serde_json::{Value, json};

use super::extract::{Path, Query};
use super::{Answer, ApiError, App};
use crate::environment::Environment;

const DEFAULT_LIMIT: u32 = 100;
const LARGEST_LIMIT: u32 = 1000;

#[derive(Deserialize)]
pub(super) struct Filter {
    status: Option<String>,
    after: Option<String>,
    limit: Option<String>,
}

/// A page of environments, oldest first. `next` is the `after` of the next page, none at the end.
pub(super) async fn list(State(app): State<App>, Query(filter): Query<Filter>) -> Result<Answer, ApiError> {
    let statuses: Vec<EnvironmentStatus> = match &filter.status {
        None => Vec::new(),
        Some(words) => words
            .split(',')
            .map(|word| serde_json::from_value(Value::from(word)))
            .collect::<Result<_, _>>()
            .map_err(|_| ApiError::InvalidQuery { name: "status", rule: "statuses separated by commas" })?,
    };
    let after: Option<EnvironmentId> = filter.after.as_deref().map(str::parse).transpose()?;
    let limit = filter.limit.as_deref().map_or(Ok(DEFAULT_LIMIT), str::parse).ok();
    let limit = limit
        .filter(|limit| (1..=LARGEST_LIMIT).contains(limit))
        .ok_or(ApiError::InvalidQuery { name: "limit", rule: "a number from 1 to 1000" })?;
    let environments = app.board.store().page(&statuses, after, limit).await?;
    let full = environments.len() == usize::try_from(limit).unwrap_or(usize::MAX);
    let next = environments.last().filter(|_| full).map(|last| last.id);
    let data: Vec<_> = environments.iter().map(|environment| view(&app, environment)).collect();
    Ok(Json(json!({"success": true, "data": data, "next": next})))
}

/// One environment, and what its agent last reported.
pub(super) async fn show(State(app): State<App>, Path(id): Path<String>) -> Result<Answer, ApiError> {
    let id: EnvironmentId = id.parse()?;
    let environment = app.board.store().environment(id).await?.ok_or(ApiError::NoEnvironment)?;
    let heartbeat = app.board.store().heartbeat(id).await?.map(|heartbeat| {
        let report: Value = serde_json::from_str(&heartbeat.payload).unwrap_or_default();
        json!({"received_at": heartbeat.received_at, "report": report})
    });
    let message = format!("The environment is {}.", environment.state.status().as_str());
    let data = view(&app, &environment);
    Ok(Json(json!({"success": !environment.failed(), "message": message, "data": data, "heartbeat": heartbeat})))
}

/// The environment, and what is decided about updates of its agent.
fn view(app: &App, environment: &Environment) -> Value {
    let mut view = serde_json::to_value(environment.view(None)).unwrap_or_default();
    if let Some(fields) = view.as_object_mut() {
        let updates = serde_json::to_value(app.rollouts.preference(environment.id)).unwrap_or_default();
        fields.insert("updates".to_owned(), updates);
    }
    view
}

pub(super) async fn metrics(State(app): State<App>) -> Result<impl IntoResponse, ApiError> {
    let counts: BTreeMap<String, u64> = app.board.store().counts().await?;
    let page = app.metrics.page(&counts, app.rollouts.latest().await.as_ref());
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page))
}
