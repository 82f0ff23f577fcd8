//! Names of the operations this cloud serves, as DigitalOcean's API description has them.

use axum::http::Method;

const OPERATIONS: &[(Method, &str, &str)] = &[
    (Method::GET, "/v2/account", "account_get"),
    (Method::GET, "/v2/account/keys", "sshKeys_list"),
    (Method::GET, "/v2/actions", "actions_list"),
    (Method::GET, "/v2/actions/{action_id}", "actions_get"),
    (Method::GET, "/v2/droplets", "droplets_list"),
    (Method::POST, "/v2/droplets", "droplets_create"),
    (Method::DELETE, "/v2/droplets", "droplets_destroy_byTag"),
    (Method::GET, "/v2/droplets/{droplet_id}", "droplets_get"),
    (Method::DELETE, "/v2/droplets/{droplet_id}", "droplets_destroy"),
    (Method::GET, "/v2/droplets/{droplet_id}/actions", "dropletActions_list"),
    (Method::POST, "/v2/droplets/{droplet_id}/actions", "dropletActions_post"),
    (Method::GET, "/v2/droplets/{droplet_id}/actions/{action_id}", "dropletActions_get"),
    (Method::POST, "/v2/droplets/actions", "dropletActions_post_byTag"),
    (Method::GET, "/v2/tags", "tags_list"),
    (Method::POST, "/v2/tags", "tags_create"),
    (Method::GET, "/v2/tags/{tag_id}", "tags_get"),
    (Method::DELETE, "/v2/tags/{tag_id}", "tags_delete"),
    (Method::POST, "/v2/tags/{tag_id}/resources", "tags_assign_resources"),
    (Method::DELETE, "/v2/tags/{tag_id}/resources", "tags_unassign_resources"),
    (Method::GET, "/v2/sizes", "sizes_list"),
    (Method::GET, "/v2/regions", "regions_list"),
    (Method::GET, "/v2/images", "images_list"),
    (Method::GET, "/v2/images/{image_id}", "images_get"),
];

/// The operation a route carries out.
pub fn find(method: &Method, route: &str) -> Option<&'static str> {
    OPERATIONS.iter().find(|(verb, path, _)| verb == method && *path == route).map(|(_, _, operation)| *operation)
}

/// Whether this cloud serves an operation of that name.
pub fn is_known(operation: &str) -> bool {
    OPERATIONS.iter().any(|(_, _, known)| *known == operation)
}
