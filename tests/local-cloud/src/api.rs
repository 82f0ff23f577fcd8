//! DigitalOcean's API v2 over the cloud: routes, shapes and errors. Handlers parse, ask the cloud, and show.

mod actions;
mod catalogue;
mod droplets;
pub mod error;
mod operations;
mod paging;
mod tags;
mod view;

use axum::Router;
use axum::routing::{get, post};

pub use self::error::ApiError;
pub use self::operations::{find as find_operation, is_known as is_operation};
use crate::cloud::Cloud;
use crate::gate::Gate;

/// What handlers work with.
#[derive(Clone)]
pub struct App {
    /// The cloud.
    pub cloud: Cloud,
    /// What every request passes.
    pub gate: Gate,
}

/// Marks a create for which there is no room.
#[derive(Debug, Clone, Copy)]
pub struct NoRoom;

impl axum::extract::FromRef<App> for Cloud {
    fn from_ref(app: &App) -> Self {
        app.cloud.clone()
    }
}

impl axum::extract::FromRef<App> for Gate {
    fn from_ref(app: &App) -> Self {
        app.gate.clone()
    }
}

/// Every route under `/v2`, with the paths of DigitalOcean's description: [`find_operation`] relies on them being the same.
pub fn router() -> Router<App> {
    Router::new()
        .route("/v2/account", get(catalogue::account))
        .route("/v2/account/keys", get(catalogue::ssh_keys))
        .route("/v2/regions", get(catalogue::regions))
        .route("/v2/sizes", get(catalogue::sizes))
        .route("/v2/images", get(catalogue::images))
        .route("/v2/images/{image_id}", get(catalogue::image))
        .route("/v2/droplets", get(droplets::list).post(droplets::create).delete(droplets::delete_tagged))
        .route("/v2/droplets/{droplet_id}", get(droplets::get).delete(droplets::delete))
        .route("/v2/droplets/actions", post(actions::act_on_tagged))
        .route("/v2/droplets/{droplet_id}/actions", get(actions::of_droplet).post(actions::act))
        .route("/v2/droplets/{droplet_id}/actions/{action_id}", get(actions::of_droplet_get))
        .route("/v2/actions", get(actions::list))
        .route("/v2/actions/{action_id}", get(actions::get))
        .route("/v2/tags", get(tags::list).post(tags::create))
        .route("/v2/tags/{tag_id}", get(tags::get).delete(tags::delete))
        .route("/v2/tags/{tag_id}/resources", post(tags::assign).delete(tags::unassign))
        .fallback(async || ApiError::NotFound)
        .method_not_allowed_fallback(async || ApiError::NotFound)
}
