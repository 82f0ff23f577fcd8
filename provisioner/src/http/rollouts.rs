//! The internal API about updates of the fleet: rollouts, and what is decided about single environments.

use std::collections::HashMap;

use axum::Json;
use axum::extract::State;
use dtma_api::EnvironmentId;
use dtma_api::failure::Fault;
use dtma_release::Version;
use serde::Deserialize;
use serde_json::json;

use super::extract::{Path, Query, Unread};
use super::{Answer, ApiError, App, parse};
use crate::rollout::{
    AgentView, Preference, Rollout, RolloutAnswer, RolloutId, RolloutList, Seen, StartRequest, Terms,
};
use crate::rollouts::{RolloutError, Wish};

const WAVES: [u8; 4] = [1, 10, 50, 100];
const MOST_WAVES: usize = 20;
const SOAK_SECONDS: u64 = 600;
/// Longer than agents take before they look at a release again that they have refused.
const DEADLINE_SECONDS: u64 = 3600;
const A_WEEK: u64 = 7 * 86_400;
const DEFAULT_LIMIT: usize = 1000;

/// Begins a rollout.
pub(super) async fn start(State(app): State<App>, body: Unread) -> Result<Json<RolloutAnswer>, ApiError> {
    let request: StartRequest = parse(&body.read().await?)?;
    let terms = terms(&request, app.silent_after_seconds)?;
    let rollout = app.rollouts.begin(terms).await?;
    let message = format!("The rollout of {} to {} agents has begun.", rollout.terms.version, rollout.targets.len());
    Ok(Json(answer(&rollout, message)))
}

/// All rollouts, the latest first.
pub(super) async fn list(State(app): State<App>) -> Result<Json<RolloutList>, ApiError> {
    let summaries = app.rollouts.list().await?;
    let data = summaries.into_iter().map(|summary| summary.rollout.view(summary.counts, &summary.sizes)).collect();
    Ok(Json(RolloutList { success: true, data }))
}

#[derive(Deserialize)]
pub(super) struct Page {
    after: Option<String>,
    limit: Option<String>,
}

/// One rollout with a page of its agents.
pub(super) async fn show(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(page): Query<Page>,
) -> Result<Json<RolloutAnswer>, ApiError> {
    let after: Option<EnvironmentId> = page.after.as_deref().map(str::parse).transpose()?;
    let limit = page.limit.as_deref().map_or(Ok(DEFAULT_LIMIT), str::parse).ok();
    let limit = limit
        .filter(|limit| (1..=DEFAULT_LIMIT).contains(limit))
        .ok_or(ApiError::InvalidQuery { name: "limit", rule: "a number from 1 to 1000" })?;
    let (rollout, seen) = app.rollouts.find(rollout_id(&id)?).await?;
    let message = sentence(&rollout);
    let (agents, next) = agents(&rollout, &seen, after, limit);
    let mut answer = answer(&rollout, message);
    answer.data.agents = Some(agents);
    answer.next = next;
    Ok(Json(answer))
}

pub(super) async fn pause(state: State<App>, id: Path<String>) -> Result<Json<RolloutAnswer>, ApiError> {
    fulfil(state, id, Wish::Pause).await
}

pub(super) async fn resume(state: State<App>, id: Path<String>) -> Result<Json<RolloutAnswer>, ApiError> {
    fulfil(state, id, Wish::Resume).await
}

pub(super) async fn abort(state: State<App>, id: Path<String>) -> Result<Json<RolloutAnswer>, ApiError> {
    fulfil(state, id, Wish::Abort).await
}

async fn fulfil(State(app): State<App>, Path(id): Path<String>, wish: Wish) -> Result<Json<RolloutAnswer>, ApiError> {
    let rollout = app.rollouts.fulfil(rollout_id(&id)?, wish).await?;
    Ok(Json(answer(&rollout, sentence(&rollout))))
}

#[derive(Deserialize)]
struct PreferenceRequest {
    #[serde(default)]
    pin: Option<String>,
    #[serde(default)]
    excluded: bool,
}

/// Decides about updates of one environment's agent, in place of what was decided before.
pub(super) async fn prefer(State(app): State<App>, Path(id): Path<String>, body: Unread) -> Result<Answer, ApiError> {
    let id: EnvironmentId = id.parse()?;
    let request: PreferenceRequest = parse(&body.read().await?)?;
    let pin = match request.pin.as_deref().map(str::parse::<Version>) {
        None => None,
        Some(Ok(version)) => Some(version),
        Some(Err(_)) => return Err(ApiError::InvalidRequest(vec![not_a_version("$.pin")])),
    };
    app.board.store().environment(id).await?.ok_or(ApiError::NoEnvironment)?;
    let preference = Preference { pin, excluded: request.excluded };
    app.rollouts.prefer(id, preference.clone()).await?;
    let message = match (&preference.pin, preference.excluded) {
        (_, true) => "Its agent is told no version.".to_owned(),
        (Some(pin), false) => format!("Its agent is told {pin} and no other version."),
        (None, false) => "Its agent takes part in rollouts.".to_owned(),
    };
    Ok(Json(json!({"success": true, "message": message, "data": preference})))
}

fn rollout_id(text: &str) -> Result<RolloutId, ApiError> {
    text.parse().map_err(|_| ApiError::Rollout(RolloutError::Missing))
}

fn answer(rollout: &Rollout, message: String) -> RolloutAnswer {
    let data = rollout.view(rollout.counts(), &rollout.sizes());
    RolloutAnswer { success: true, message, data, next: None }
}

fn sentence(rollout: &Rollout) -> String {
    let last = rollout.course.history.last().map(|line| line.message.as_str()).unwrap_or_default();
    format!("The rollout of {} is {}. {last}", rollout.terms.version, rollout.course.status.as_str())
}

fn agents(
    rollout: &Rollout,
    seen: &HashMap<EnvironmentId, Seen>,
    after: Option<EnvironmentId>,
    limit: usize,
) -> (Vec<AgentView>, Option<EnvironmentId>) {
    let following = rollout.targets.values().filter(|target| after.is_none_or(|after| target.environment > after));
    let agents: Vec<AgentView> = following.take(limit).map(|target| target.view(seen)).collect();
    let last = agents.last().map(|agent| agent.environment_id);
    let more = last.is_some_and(|last| rollout.targets.keys().next_back().is_some_and(|end| *end > last));
    (agents, last.filter(|_| more))
}

fn not_a_version(path: &str) -> Fault {
    Fault { path: path.to_owned(), problem: "must be a version such as 1.2.3".to_owned() }
}

fn terms(request: &StartRequest, silent_after_seconds: u64) -> Result<Terms, ApiError> {
    let mut faults = Vec::new();
    let version = request.version.parse::<Version>();
    if version.is_err() {
        faults.push(not_a_version("$.version"));
    }
    let waves = request.waves.clone().unwrap_or_else(|| WAVES.to_vec());
    let ascending = waves.is_sorted_by(|one, next| one < next);
    if !ascending || waves.len() > MOST_WAVES || waves.first() == Some(&0) || waves.last() != Some(&100) {
        let problem = "must be up to 20 percentages, each more than the one before, the last of them 100".to_owned();
        faults.push(Fault { path: "$.waves".to_owned(), problem });
    }
    let soak_seconds = request.soak_seconds.unwrap_or(SOAK_SECONDS);
    if soak_seconds > A_WEEK {
        let problem = "must be a whole number of seconds, at most a week".to_owned();
        faults.push(Fault { path: "$.soak_seconds".to_owned(), problem });
    }
    let deadline_seconds = request.deadline_seconds.unwrap_or(DEADLINE_SECONDS);
    if !(1..=A_WEEK).contains(&deadline_seconds) {
        let problem = "must be a whole number of seconds, 1 to those of a week".to_owned();
        faults.push(Fault { path: "$.deadline_seconds".to_owned(), problem });
    }
    match version {
        Ok(version) if faults.is_empty() => Ok(Terms {
            version,
            waves,
            soak_seconds,
            max_failures: request.max_failures.unwrap_or_default(),
            silent_after_seconds,
            deadline_seconds,
        }),
        _ => Err(ApiError::InvalidRequest(faults)),
    }
}
