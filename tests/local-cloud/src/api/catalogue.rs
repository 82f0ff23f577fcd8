//! What can be bought, and the account.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::ApiError;
use super::paging::Listing;
use crate::catalogue;
use crate::cloud::Cloud;
use crate::image::RECIPES;

/// `GET /v2/account`
pub(super) async fn account(State(cloud): State<Cloud>) -> Json<Value> {
    Json(json!({ "account": catalogue::account_view(cloud.ledger().droplet_limit()) }))
}

/// `GET /v2/account/keys`
pub(super) async fn ssh_keys(listing: Listing) -> Json<Value> {
    Json(listing.show("ssh_keys", catalogue::ssh_key_views()))
}

/// `GET /v2/regions`
pub(super) async fn regions(listing: Listing) -> Json<Value> {
    Json(listing.show("regions", catalogue::REGIONS.iter().map(catalogue::Region::view).collect()))
}

/// `GET /v2/sizes`
pub(super) async fn sizes(listing: Listing) -> Json<Value> {
    Json(listing.show("sizes", catalogue::SIZES.iter().map(catalogue::Size::view).collect()))
}

/// `GET /v2/images`: all are public distributions, so there are no private ones and no applications.
pub(super) async fn images(listing: Listing) -> Json<Value> {
    let none = listing.parameter("private") == Some("true")
        || listing.parameter("type") == Some("application")
        || listing.parameter("tag_name").is_some();
    let images = if none { Vec::new() } else { RECIPES.iter().map(catalogue::image_view).collect() };
    Json(listing.show("images", images))
}

/// `GET /v2/images/{id or slug}`
pub(super) async fn image(Path(image): Path<String>) -> Result<Json<Value>, ApiError> {
    let recipe = catalogue::image(&Value::String(image)).ok_or(ApiError::NotFound)?;
    Ok(Json(json!({ "image": catalogue::image_view(recipe) })))
}
