//! `/v2/tags`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::ApiError;
use super::droplets::{parse_body, parse_id};
use super::paging::Listing;
use crate::cloud::Cloud;
use crate::droplet::DropletId;
use crate::ledger::{Filter, Ledger};
use crate::order::is_tag;

#[derive(Deserialize)]
struct TagRequest {
    name: String,
}

#[derive(Deserialize)]
struct Resources {
    resources: Vec<Resource>,
}

#[derive(Deserialize)]
struct Resource {
    resource_id: String,
    resource_type: String,
}

fn view(ledger: &Ledger, tag: &str) -> Value {
    let count = ledger.all(&Filter::Tag(tag.to_owned())).len();
    let none = json!({ "count": 0 });
    json!({
        "name": tag,
        "resources": {
            "count": count, "droplets": { "count": count }, "images": none, "volumes": none, "volume_snapshots": none,
            "databases": none,
        },
    })
}

/// `GET /v2/tags`
pub(super) async fn list(State(cloud): State<Cloud>, listing: Listing) -> Json<Value> {
    let ledger = cloud.ledger();
    let tags = ledger.tags().map(|tag| view(&ledger, tag)).collect();
    Json(listing.show("tags", tags))
}

/// `POST /v2/tags`: making one that is there is a success.
pub(super) async fn create(State(cloud): State<Cloud>, body: Bytes) -> Result<(StatusCode, Json<Value>), ApiError> {
    let name = parse_body::<TagRequest>(&body)?.name;
    if !is_tag(&name) {
        return Err(ApiError::InvalidTag(name));
    }
    let mut ledger = cloud.ledger();
    ledger.add_tag(name.clone());
    Ok((StatusCode::CREATED, Json(json!({ "tag": view(&ledger, &name) }))))
}

/// `GET /v2/tags/{tag_id}`
pub(super) async fn get(State(cloud): State<Cloud>, Path(tag): Path<String>) -> Result<Json<Value>, ApiError> {
    let ledger = cloud.ledger();
    if ledger.has_tag(&tag) { Ok(Json(json!({ "tag": view(&ledger, &tag) }))) } else { Err(ApiError::NotFound) }
}

/// `DELETE /v2/tags/{tag_id}`: the droplets stay.
pub(super) async fn delete(State(cloud): State<Cloud>, Path(tag): Path<String>) -> Result<StatusCode, ApiError> {
    let changed = cloud.ledger().remove_tag(&tag).ok_or(ApiError::NotFound)?;
    changed.into_iter().for_each(|id| cloud.keep_tags(id));
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v2/tags/{tag_id}/resources`
pub(super) async fn assign(
    State(cloud): State<Cloud>,
    Path(tag): Path<String>,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    mark(&cloud, &tag, &body, true)
}

/// `DELETE /v2/tags/{tag_id}/resources`
pub(super) async fn unassign(
    State(cloud): State<Cloud>,
    Path(tag): Path<String>,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    mark(&cloud, &tag, &body, false)
}

/// All of the resources, or none when one of them isn't there.
fn mark(cloud: &Cloud, tag: &str, body: &[u8], marked: bool) -> Result<StatusCode, ApiError> {
    let resources = parse_body::<Resources>(body)?.resources;
    let mut ledger = cloud.ledger();
    if !ledger.has_tag(tag) {
        return Err(ApiError::NotFound);
    }
    let mut droplets: Vec<DropletId> = Vec::new();
    for resource in resources {
        if resource.resource_type != "droplet" {
            return Err(ApiError::Unprocessable("Only droplets can be tagged in this cloud.".into()));
        }
        let id = parse_id(&resource.resource_id)?;
        ledger.droplet(id).ok_or(ApiError::NotFound)?;
        droplets.push(id);
    }
    for id in &droplets {
        ledger.mark(*id, tag, marked);
    }
    drop(ledger);
    droplets.into_iter().for_each(|id| cloud.keep_tags(id));
    Ok(StatusCode::NO_CONTENT)
}
