//! What agents and their droplets' set-up call: enrolment, heartbeats, bootstrap progress, releases.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use dtma_api::bootstrap::{BootstrapOutcome, BootstrapProgress};
use dtma_api::enrolment::{EnrolmentAnswer, EnrolmentRequest};
use dtma_api::failure::Fault;
use dtma_api::heartbeat::Directives;
use dtma_api::{Token, TokenHash};
use jiff::Timestamp;
use serde::Deserialize;
use tokio_util::io::ReaderStream;

use super::extract::{Path, Unread};
use super::{ApiError, App, bearer, parse};
use crate::environment::{EnrolmentClaim, EnrolmentRefused, Environment};
use crate::rollout::Report;
use crate::store::StoredHeartbeat;

/// An agent's version is a word, not a story.
const VERSION_LENGTH: usize = 64;
/// A retry key shorter than this could be guessed.
const RETRY_KEY_LENGTH: usize = 16;

pub(super) async fn enrol(
    State(app): State<App>,
    headers: HeaderMap,
    body: Unread,
) -> Result<Json<EnrolmentAnswer>, ApiError> {
    let token_hash = bearer(&headers)?.hash();
    let environment = by_token(&app, token_hash).await?;
    let request: EnrolmentRequest = parse(&body.read().await?)?;
    let mut faults = Vec::new();
    if request.retry_key.expose().len() < RETRY_KEY_LENGTH {
        faults.push(Fault { path: "$.retry_key".to_owned(), problem: "must have at least 16 characters".to_owned() });
    }
    let version = request.agent_version;
    if version.is_empty() || version.len() > VERSION_LENGTH || version.chars().any(char::is_control) {
        faults.push(Fault {
            path: "$.agent_version".to_owned(),
            problem: "must be 1 to 64 printable characters".to_owned(),
        });
    }
    if !faults.is_empty() {
        return Err(ApiError::InvalidRequest(faults));
    }
    let claim =
        EnrolmentClaim { token_hash, retry_key_hash: request.retry_key.hash(), pin: request.certificate_pin, version };
    let bearer_token = Token::generate().map_err(|_| ApiError::NoRandomness)?;
    let bearer_hash = bearer_token.hash();
    let now = Timestamp::now();
    app.board
        .try_change(environment.id, now, |environment| environment.enrol(&claim, bearer_hash, now).map(Some))
        .await?;
    Ok(Json(EnrolmentAnswer {
        success: true,
        environment_id: environment.id,
        bearer_token,
        settings: app.agent_settings.clone(),
    }))
}

/// Only the parts that matter here are read, so that an agent of any age is understood; all of it is kept.
pub(super) async fn heartbeat(State(app): State<App>, headers: HeaderMap, body: Unread) -> Result<Response, ApiError> {
    let member = app.board.roll().find(bearer(&headers)?.hash()).ok_or(ApiError::UnknownBearer)?;
    let body = body.read().await?;
    let report: Report = parse(&body)?;
    let now = Timestamp::now();
    // Parsed as JSON just now, so it is text.
    let payload = String::from_utf8_lossy(&body).into_owned();
    app.heartbeats.keep(StoredHeartbeat { environment: member.environment, received_at: now, payload }).await?;
    if member.heard(now) {
        app.board.change(member.environment, now, |environment| environment.heard(now)).await?;
    }
    let newer = |generation| generation < app.agent_settings.generation;
    let settings = report.settings_generation.is_some_and(newer).then(|| app.agent_settings.clone());
    let desired_version = app.rollouts.heard(&member, report, now).map(|version| version.to_string());
    if settings.is_none() && desired_version.is_none() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    Ok(Json(Directives { settings, desired_version, ..Directives::default() }).into_response())
}

/// A report in which a newer set-up may use words of its own.
#[derive(Deserialize)]
struct Progress {
    phase: String,
    outcome: String,
    #[serde(default)]
    output: String,
}

pub(super) async fn bootstrap_progress(
    State(app): State<App>,
    headers: HeaderMap,
    body: Unread,
) -> Result<StatusCode, ApiError> {
    let token_hash = bearer(&headers)?.hash();
    let environment = by_token(&app, token_hash).await?;
    let Progress { phase, outcome, output } = parse(&body.read().await?)?;
    let outcome = match outcome.as_str() {
        "begun" => BootstrapOutcome::Begun,
        "failed" => BootstrapOutcome::Failed,
        // Neither of what decides anything.
        _ => return Ok(StatusCode::NO_CONTENT),
    };
    let report = BootstrapProgress { phase, outcome, output };
    let now = Timestamp::now();
    app.board
        .change(environment.id, now, |environment| {
            // Still the attempt whose token this is.
            let current = environment.state.attempt().is_some_and(|attempt| attempt.token_hash == token_hash);
            if current { environment.bootstrap_reported(&report, now) } else { None }
        })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn fetch_tool_secrets(State(app): State<App>, headers: HeaderMap) -> Result<StatusCode, ApiError> {
    app.board.roll().find(bearer(&headers)?.hash()).ok_or(ApiError::UnknownBearer)?;
    Err(ApiError::NoToolSecrets)
}

/// No credential: whoever has the source can build it, and the makers' signature is what makes it trusted.
pub(super) async fn release(
    State(app): State<App>,
    Path((folder, file)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let path = app.releases.file(&folder, &file).ok_or(ApiError::NoReleaseFile)?;
    let opened = tokio::fs::File::open(path).await.map_err(ApiError::ReleaseFile)?;
    let data = opened.metadata().await.map_err(ApiError::ReleaseFile)?;
    let changed = data.modified().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    let tag = format!("\"{:x}-{:x}\"", data.len(), changed.unwrap_or_default().as_nanos());
    // A manifest is signed anew while its archive stays as it is; neither may be an old one for longer than it takes to ask.
    let (kind, caching) = if file.ends_with(".json") {
        ("application/json", "no-cache")
    } else {
        ("application/octet-stream", "public, max-age=300")
    };
    let described = [(ETAG, tag.clone()), (CACHE_CONTROL, caching.to_owned())];
    if headers.get(IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes()) {
        return Ok((StatusCode::NOT_MODIFIED, described).into_response());
    }
    let content = [(CONTENT_TYPE, kind.to_owned()), (CONTENT_LENGTH, data.len().to_string())];
    Ok((described, content, Body::from_stream(ReaderStream::with_capacity(opened, 1 << 16))).into_response())
}

async fn by_token(app: &App, token_hash: TokenHash) -> Result<Environment, ApiError> {
    let found = app.board.store().by_enrolment_token(token_hash).await?;
    found.ok_or(ApiError::Enrolment(EnrolmentRefused::Unknown))
}
