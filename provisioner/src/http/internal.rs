//! The internal API about one agent's environment: ensure, show, delete.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use dtma_api::AgentId;
use dtma_api::environment::{EnsureRequest, EnvironmentAnswer, EnvironmentError, EnvironmentStatus};
use dtma_api::failure::Fault;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use super::extract::{Path, Query, Unread};
use super::{ApiError, App, parse};
use crate::accounts::NoAccount;
use crate::config::is_word;
use crate::environment::{DropletSpec, Environment, State as EnvironmentState};
use crate::requests::{self, Patience};

const DEFAULT_WAIT: u64 = 25;
/// Edge functions are cut off after about 150 s without a byte.
const LONGEST_WAIT: u64 = 140;
/// What callers are told to wait before asking again.
const RETRY_SECONDS: &str = "5";

#[derive(Deserialize)]
pub(super) struct Waiting {
    wait: Option<String>,
}

impl Waiting {
    fn patience(&self, app: &App) -> Result<Patience, ApiError> {
        let invalid = || ApiError::InvalidQuery { name: "wait", rule: "a whole number of seconds, at most 140" };
        let seconds = self.wait.as_deref().map_or(Ok(DEFAULT_WAIT), |text| text.parse().map_err(|_| invalid()))?;
        Ok(Patience::new(Duration::from_secs(seconds.min(LONGEST_WAIT)), app.stop.clone()))
    }
}

pub(super) async fn ensure(
    State(app): State<App>,
    Path(agent): Path<String>,
    Query(waiting): Query<Waiting>,
    body: Unread,
) -> Result<Response, ApiError> {
    let agent = AgentId::try_from(agent)?;
    let patience = waiting.patience(&app)?;
    let body = body.read().await?;
    let request: Option<EnsureRequest> = if body.trim_ascii().is_empty() { None } else { parse(&body)? };
    let request = request.unwrap_or_default();
    let spec = wanted(&app.spec, &request)?;
    let account = app.accounts.for_ensure(&agent, request.user_id.as_ref(), Timestamp::now()).await?;
    let environment = requests::ensure(&app.board, &account, &spec, &patience).await?;
    let (status, message) = match &environment.state {
        EnvironmentState::Active { .. } => (StatusCode::OK, "The environment is ready."),
        EnvironmentState::ErrorProvisioning { error, .. } => {
            (refusal_status(error), "The environment could not be made.")
        }
        EnvironmentState::PendingProvision { .. }
        | EnvironmentState::Provisioning { .. }
        | EnvironmentState::AwaitingHeartbeat { .. } => {
            (StatusCode::ACCEPTED, "The environment is being made; ask again.")
        }
        EnvironmentState::Unresponsive { .. } => {
            (StatusCode::ACCEPTED, "The environment's agent does not report at present; ask again.")
        }
        EnvironmentState::PendingDeprovision { .. }
        | EnvironmentState::Deprovisioning { .. }
        | EnvironmentState::Deprovisioned { .. }
        | EnvironmentState::ErrorDeprovisioning { .. } => (StatusCode::CONFLICT, "The environment is being deleted."),
    };
    Ok(answer(status, message, &environment, Some(agent)))
}

pub(super) async fn show(State(app): State<App>, Path(agent): Path<String>) -> Result<Response, ApiError> {
    let agent = AgentId::try_from(agent)?;
    let environment = find(&app, &agent).await?;
    let message = format!("The environment is {}.", environment.state.status().as_str());
    Ok(answer(StatusCode::OK, &message, &environment, Some(agent)))
}

pub(super) async fn deprovision(
    State(app): State<App>,
    Path(agent): Path<String>,
    Query(waiting): Query<Waiting>,
) -> Result<Response, ApiError> {
    let agent = AgentId::try_from(agent)?;
    let patience = waiting.patience(&app)?;
    let account = match app.accounts.of(&agent).await {
        Ok(account) => account,
        // What nobody has ever heard of is not there: just what the caller wants.
        Err(NoAccount::NoSuchAgent) => return Ok(nothing_there()),
        Err(error) => return Err(error.into()),
    };
    let Some(environment) = requests::deprovision(&app.board, &account, &patience).await? else {
        return Ok(nothing_there());
    };
    Ok(if environment.state.status() == EnvironmentStatus::Deprovisioned {
        answer(StatusCode::OK, "The environment is gone.", &environment, Some(agent))
    } else {
        answer(StatusCode::ACCEPTED, "The environment is being deleted; ask again.", &environment, Some(agent))
    })
}

/// The environment an agent has, or had last.
pub(super) async fn find(app: &App, agent: &AgentId) -> Result<Environment, ApiError> {
    let account = match app.accounts.of(agent).await {
        Ok(account) => account,
        // Without anybody who knows the agents, an agent never heard of only has no environment yet.
        Err(NoAccount::NoSuchAgent) if app.accounts.owners.is_none() => return Err(ApiError::NoEnvironment),
        Err(error) => return Err(error.into()),
    };
    app.board.store().of_account(&account).await?.ok_or(ApiError::NoEnvironment)
}

fn nothing_there() -> Response {
    Json(json!({"success": true, "message": "There is no environment.", "data": null})).into_response()
}

/// The contract's answer about one environment. In an error state it also carries what every failure carries.
pub(super) fn answer(status: StatusCode, message: &str, environment: &Environment, agent: Option<AgentId>) -> Response {
    let failed = environment.failed();
    let view = environment.view(agent);
    let answer = EnvironmentAnswer { success: !failed, message: message.to_owned(), data: view };
    let mut body = serde_json::to_value(&answer).unwrap_or_default();
    if let (true, Some(error), Some(fields)) = (failed, &answer.data.error, body.as_object_mut()) {
        fields.insert("error".to_owned(), Value::from(error.message.as_str()));
        fields.insert("code".to_owned(), Value::from(error.code.as_str()));
        fields.insert("details".to_owned(), serde_json::to_value(error).unwrap_or_default());
    }
    let mut response = (status, Json(body)).into_response();
    let again =
        [StatusCode::ACCEPTED, StatusCode::CONFLICT, StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE];
    if again.contains(&status) {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static(RETRY_SECONDS));
    }
    response
}

fn refusal_status(error: &EnvironmentError) -> StatusCode {
    match error.code.as_str() {
        "cloud_refused" => StatusCode::UNPROCESSABLE_ENTITY,
        "cloud_rate_limited" => StatusCode::TOO_MANY_REQUESTS,
        // The droplet was there and came to nothing.
        "bootstrap_failed" | "bootstrap_timeout" | "droplet_gone" => StatusCode::BAD_GATEWAY,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

fn wanted(default: &DropletSpec, request: &EnsureRequest) -> Result<DropletSpec, ApiError> {
    let mut faults = Vec::new();
    let mut slug = |field: &str, asked: &Option<String>, default: &str| {
        let slug = asked.as_deref().unwrap_or(default);
        if !is_word(slug) {
            let problem = "must be 1 to 128 of A-Z a-z 0-9 _ : . -".to_owned();
            faults.push(Fault { path: format!("$.{field}"), problem });
        }
        slug.to_owned()
    };
    let spec = DropletSpec {
        region: slug("region", &request.region, &default.region),
        size: slug("size", &request.size, &default.size),
        image: slug("image", &request.image, &default.image),
    };
    if faults.is_empty() { Ok(spec) } else { Err(ApiError::InvalidRequest(faults)) }
}
