//! Actions on droplets, and `/v2/actions`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::droplets::{parse_body, parse_id};
use super::paging::Listing;
use super::{ApiError, view};
use crate::action::{ActionId, ActionKind};
use crate::cloud::Cloud;
use crate::droplet::Refusal;
use crate::ledger::Filter;

#[derive(Deserialize)]
struct ActionRequest {
    #[serde(rename = "type")]
    kind: String,
}

impl ActionRequest {
    /// What is asked for; anything DigitalOcean can do and this cloud can't is refused.
    fn kind(self) -> Result<ActionKind, ApiError> {
        serde_json::from_value(Value::String(self.kind))
            .map_err(|_| ApiError::Unprocessable(Refusal::Unsupported.to_string()))
    }
}

fn parse_action_id(text: &str) -> Result<ActionId, ApiError> {
    text.parse().map(ActionId).map_err(|_| ApiError::NotFound)
}

/// `POST /v2/droplets/{droplet_id}/actions`
pub(super) async fn act(
    State(cloud): State<Cloud>,
    Path(id): Path<String>,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let id = parse_id(&id)?;
    if cloud.ledger().droplet(id).is_none() {
        return Err(ApiError::NotFound);
    }
    let action = cloud.act(id, parse_body::<ActionRequest>(&body)?.kind()?)?;
    Ok((StatusCode::CREATED, Json(json!({ "action": view::action(&action) }))))
}

/// `POST /v2/droplets/actions?tag_name=…`: of the droplets with that tag, those that can take the action do.
pub(super) async fn act_on_tagged(
    State(cloud): State<Cloud>,
    listing: Listing,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let kind = parse_body::<ActionRequest>(&body)?.kind()?;
    let tag = listing.parameter("tag_name").ok_or_else(|| ApiError::Unprocessable("tag_name is required.".into()))?;
    let tagged: Vec<_> =
        cloud.ledger().all(&Filter::Tag(tag.to_owned())).into_iter().map(|droplet| droplet.record.id).collect();
    let actions: Vec<Value> =
        tagged.into_iter().filter_map(|id| cloud.act(id, kind).ok()).map(|action| view::action(&action)).collect();
    Ok((StatusCode::CREATED, Json(json!({ "actions": actions }))))
}

/// `GET /v2/droplets/{droplet_id}/actions`
pub(super) async fn of_droplet(
    State(cloud): State<Cloud>,
    Path(id): Path<String>,
    listing: Listing,
) -> Result<Json<Value>, ApiError> {
    let id = parse_id(&id)?;
    let ledger = cloud.ledger();
    ledger.droplet(id).ok_or(ApiError::NotFound)?;
    let actions = ledger.actions(Some(id)).into_iter().map(view::action).collect();
    Ok(Json(listing.show("actions", actions)))
}

/// `GET /v2/droplets/{droplet_id}/actions/{action_id}`
pub(super) async fn of_droplet_get(
    State(cloud): State<Cloud>,
    Path((id, action)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let (id, action) = (parse_id(&id)?, parse_action_id(&action)?);
    let ledger = cloud.ledger();
    let action = ledger.action(action).filter(|action| action.droplet == id).ok_or(ApiError::NotFound)?;
    Ok(Json(json!({ "action": view::action(action) })))
}

/// `GET /v2/actions`
pub(super) async fn list(State(cloud): State<Cloud>, listing: Listing) -> Json<Value> {
    let actions = cloud.ledger().actions(None).into_iter().map(view::action).collect();
    Json(listing.show("actions", actions))
}

/// `GET /v2/actions/{action_id}`
pub(super) async fn get(State(cloud): State<Cloud>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let id = parse_action_id(&id)?;
    let ledger = cloud.ledger();
    let action = ledger.action(id).ok_or(ApiError::NotFound)?;
    Ok(Json(json!({ "action": view::action(action) })))
}
