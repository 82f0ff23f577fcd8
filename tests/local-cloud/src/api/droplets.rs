//! `/v2/droplets`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use serde_json::{Value, json};

use super::paging::{Listing, origin};
use super::{ApiError, NoRoom, view};
use crate::cloud::Cloud;
use crate::droplet::DropletId;
use crate::ledger::Filter;
use crate::order::CreateRequest;

/// A droplet's number in a path. One that isn't a number names no droplet.
pub(super) fn parse_id(text: &str) -> Result<DropletId, ApiError> {
    text.parse().map(DropletId).map_err(|_| ApiError::NotFound)
}

/// A JSON body of the shape asked for.
pub(super) fn parse_body<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body)
        .map_err(|error| ApiError::BadRequest(format!("The request body is not valid: {error}")))
}

/// `GET /v2/droplets`
pub(super) async fn list(State(cloud): State<Cloud>, listing: Listing) -> Result<Json<Value>, ApiError> {
    let filter = match (listing.parameter("tag_name"), listing.parameter("name")) {
        (Some(_), Some(_)) => return Err(ApiError::BadRequest("name cannot be combined with tag_name.".into())),
        (Some(tag), None) => Filter::Tag(tag.to_owned()),
        (None, Some(name)) => Filter::Name(name.to_owned()),
        (None, None) => Filter::All,
    };
    let now = cloud.now();
    let droplets = cloud.ledger().listed(&filter, now).into_iter().map(|droplet| view::droplet(droplet, now)).collect();
    Ok(Json(listing.show("droplets", droplets)))
}

/// `GET /v2/droplets/{droplet_id}`
pub(super) async fn get(State(cloud): State<Cloud>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let id = parse_id(&id)?;
    let now = cloud.now();
    let ledger = cloud.ledger();
    let droplet = ledger.droplet(id).ok_or(ApiError::NotFound)?;
    Ok(Json(json!({ "droplet": view::droplet(droplet, now) })))
}

/// `POST /v2/droplets`
pub(super) async fn create(
    State(cloud): State<Cloud>,
    no_room: Option<axum::Extension<NoRoom>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let order = parse_body::<CreateRequest>(&body)?.check()?;
    let accepted = cloud.create(&order, no_room.is_some())?;
    let now = cloud.now();
    let origin = origin(&headers);
    let links: Vec<Value> = accepted
        .iter()
        .map(|(_, action)| json!({ "id": action.id, "rel": "create", "href": format!("{origin}/v2/actions/{}", action.id) }))
        .collect();
    let mut droplets: Vec<Value> = accepted.iter().map(|(droplet, _)| view::droplet(droplet, now)).collect();
    let links = json!({ "actions": links });
    let answer = if order.single {
        json!({ "droplet": droplets.pop(), "links": links })
    } else {
        json!({ "droplets": droplets, "links": links })
    };
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

/// `DELETE /v2/droplets/{droplet_id}`
pub(super) async fn delete(State(cloud): State<Cloud>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    if cloud.delete(parse_id(&id)?) { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::NotFound) }
}

/// `DELETE /v2/droplets?tag_name=…`
pub(super) async fn delete_tagged(State(cloud): State<Cloud>, listing: Listing) -> Result<StatusCode, ApiError> {
    let tag = listing.parameter("tag_name").ok_or_else(|| ApiError::Unprocessable("tag_name is required.".into()))?;
    cloud.delete_tagged(tag);
    Ok(StatusCode::NO_CONTENT)
}
