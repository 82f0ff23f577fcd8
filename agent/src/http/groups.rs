//! `/mcp/groups`, `/mcp/status` and `/mcp/health`: instances that are deployed, looked at and removed together.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::handler::Handler as _;
use axum::http::StatusCode;
use bytes::Bytes;
use dtma_api::group::{
    CollectiveStatus, DeployedGroup, GroupAnswer, GroupHealthAnswer, GroupRemovalAnswer, GroupRequest, GroupStatus,
    McpStatus, McpStatusAnswer, McpSummary, RemovedGroup, ServerStatus,
};
use dtma_api::instance::{Health, InstanceState, InstanceView};
use dtma_api::{Failure, GroupId};
use serde_json::json;

use super::App;
use super::error::ApiError;
use super::table::{CHANGING, Failing, Operation, Table};
use super::tools::failures::rejected;
use super::tools::params::{Parameters, unresolved};
use super::tools::routes::NOT_VALID;
use super::tools::{json, policy, refused};
use crate::instance::{group_confidential, validate_group};
use crate::reconcile::{Instances, Missing};

/// Largest body of a group: as many servers as it may have, each with the largest environment anybody uses.
const MAX_BODY: usize = 4 * 1024 * 1024;
/// Longest time a server may be given to end by itself: callers don't wait longer.
const MOST_GRACE_MS: u32 = 120_000;

const NO_GROUP: [Failing; 3] = [
    (400, "invalid_request", "the id, or a parameter, can't be read"),
    (404, "group_not_found", "no instance is a member of such a group"),
    (503, "docker_unavailable", "the Docker Engine does not answer; try again after `Retry-After`"),
];

pub(super) fn routes<T: Table>(table: T) -> T {
    table
        .post("/mcp/groups", deploy.layer(DefaultBodyLimit::max(MAX_BODY)), || {
            Operation::new("Deploys a group of instances")
                .described(
                    "Each server is an instance like any other, under its own name. Repeating a group's deploy is safe, and adds the \
                     servers that are new in it.",
                )
                .takes::<GroupRequest>("What to run. Unknown fields are ignored with a warning.")
                .waits()
                .answers::<GroupAnswer>(200, "All of it was deployed before.")
                .answers::<GroupAnswer>(201, "At least one server runs; `errors` has those that could not be had.")
                .answers::<GroupAnswer>(202, "Not all of it runs yet; `GET /mcp/health/{groupId}` tells how far it is.")
                .fails(&NOT_VALID)
                .fails(&CHANGING)
                .fails(&[
                    (422, "group_failed", "no server could be had; `details.errors` says why, for each"),
                    (409, "group_rolled_back", "the group is atomic and a server could not be had; what this request brought is \
                     taken back, and `details.errors` says why"),
                ])
        })
        .delete("/mcp/groups/{id}", remove, || {
            Operation::new("Removes a group's instances")
                .described("Their named volumes are kept, as with `DELETE /tools/{ref}`.")
                .flag("forceRemove", false, "Their servers are ended at once.")
                .count("gracefulTimeoutMs", "Milliseconds their servers are given to end by themselves; 10000 when absent, 120000 at most.")
                .waits()
                .answers::<GroupRemovalAnswer>(200, "Nothing is left of them.")
                .answers::<GroupRemovalAnswer>(202, "They are being removed.")
                .fails(&NO_GROUP)
                .fails(&CHANGING)
        })
        .get("/mcp/status", status, || {
            Operation::new("Groups and servers at a glance").answers::<McpStatusAnswer>(200, "All there are.")
        })
        .get("/mcp/health/{groupId}", health, || {
            Operation::new("One group at a glance").answers::<GroupHealthAnswer>(200, "The group.").fails(&NO_GROUP)
        })
}

async fn deploy(
    State(app): State<App>,
    parameters: Parameters,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<GroupAnswer>), ApiError> {
    let wait = parameters.wait()?;
    let body = json(body)?;
    let mut plan = validate_group(&body, &policy(&app)).map_err(refused)?;
    let (id, atomic, total) = (plan.id.clone(), plan.atomic, plan.servers.len());
    let warnings = std::mem::take(&mut plan.warnings);
    let deployment =
        app.parts().instances.deploy_group_with(plan, group_confidential(&body), wait).await.map_err(rejected)?;
    let mut errors: BTreeMap<String, Failure> = BTreeMap::new();
    let mut deployed = Vec::new();
    let (mut settled, mut created) = (0, 0);
    for (name, member) in deployment.members {
        match member {
            Ok(member) => {
                settled += usize::from(member.settled);
                created += usize::from(member.created);
                deployed.push(member.view);
            }
            Err(rejection) => drop(errors.insert(name.to_string(), rejected(rejection).into_failure())),
        }
    }
    if !errors.is_empty() && (atomic || deployed.is_empty()) {
        let done = if deployment.refused { "nothing was begun" } else { "what it brought is taken back" };
        let (status, code, error) = if atomic {
            let error = format!("the group {id} is atomic and not all of it could be deployed; {done}");
            (StatusCode::CONFLICT, "group_rolled_back", error)
        } else {
            let error = format!("no server of the group {id} could be deployed; details says why, for each");
            (StatusCode::UNPROCESSABLE_ENTITY, "group_failed", error)
        };
        return Err(ApiError::new(status, code, error).with_details(json!({ "groupId": id, "errors": errors })));
    }
    let pending = deployed.len() - settled;
    let (status, message) = if pending > 0 {
        (StatusCode::ACCEPTED, format!("{pending} of {total} servers of {id} are still being deployed"))
    } else if created == 0 && errors.is_empty() {
        (StatusCode::OK, format!("{id} was deployed before with the same servers"))
    } else {
        (StatusCode::CREATED, format!("{settled} of {total} servers of {id} run"))
    };
    let data = DeployedGroup {
        group_id: id,
        deployed_servers: deployed,
        errors,
        total_servers: total,
        successful_deployments: settled,
        warnings,
    };
    Ok((status, Json(GroupAnswer { success: true, message, data })))
}

/// A path's group id. What can't be one is nobody's.
fn group(id: Result<Path<String>, PathRejection>) -> Result<GroupId, ApiError> {
    let Path(id) =
        id.map_err(|rejection| ApiError::new(StatusCode::BAD_REQUEST, "invalid_request", rejection.body_text()))?;
    GroupId::try_from(id.clone()).map_err(|_| no_group(&id))
}

fn no_group(id: &str) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "group_not_found", format!("there is no group called {id}"))
}

async fn remove(
    State(instances): State<Instances>,
    id: Result<Path<String>, PathRejection>,
    parameters: Parameters,
) -> Result<(StatusCode, Json<GroupRemovalAnswer>), ApiError> {
    let id = group(id)?;
    let grace = parameters.count("gracefulTimeoutMs")?.map(|millis| millis.min(MOST_GRACE_MS).div_ceil(1000));
    let grace = if parameters.flag("forceRemove")? { Some(0) } else { grace };
    let removal = instances.remove_group(&id, grace, parameters.wait()?).await.map_err(rejected)?;
    let (status, message) = if removal.going.is_empty() {
        (StatusCode::OK, format!("{id} is removed"))
    } else {
        (StatusCode::ACCEPTED, format!("{id} is being removed"))
    };
    let data = RemovedGroup { group_id: id, removed_servers: removal.gone, pending_servers: removal.going };
    Ok((status, Json(GroupRemovalAnswer { success: true, message, data })))
}

async fn status(State(instances): State<Instances>) -> Json<McpStatusAnswer> {
    instances.looked().await;
    let snapshot = instances.snapshot();
    let groups = groups(&snapshot.instances);
    let alone = snapshot.instances.iter().filter(|view| view.group_id.is_none());
    let summary = McpSummary {
        total_groups: groups.len(),
        healthy_groups: groups.iter().filter(|group| group.collective_status == CollectiveStatus::Healthy).count(),
        total_servers: snapshot.instances.len(),
        running_servers: snapshot.instances.iter().filter(|view| runs(view)).count(),
        failed_servers: snapshot.instances.iter().filter(|view| has_failed(view)).count(),
    };
    let data = McpStatus { summary, groups, servers: alone.map(ServerStatus::from).collect() };
    Json(McpStatusAnswer { success: true, data })
}

async fn health(
    State(instances): State<Instances>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<GroupHealthAnswer>, ApiError> {
    let id = group(id)?;
    instances.looked().await;
    let snapshot = instances.snapshot();
    let found = groups(&snapshot.instances).into_iter().find(|group| group.group_id == id);
    if found.is_none() && !snapshot.complete {
        return Err(unresolved(Missing::Unseen));
    }
    Ok(Json(GroupHealthAnswer { success: true, data: found.ok_or_else(|| no_group(id.as_str()))? }))
}

fn groups(instances: &[InstanceView]) -> Vec<GroupStatus> {
    let mut members: BTreeMap<&GroupId, Vec<&InstanceView>> = BTreeMap::new();
    for view in instances {
        if let Some(id) = &view.group_id {
            members.entry(id).or_default().push(view);
        }
    }
    let status = |(id, members): (&GroupId, Vec<&InstanceView>)| GroupStatus {
        group_id: id.clone(),
        collective_status: collective(&members),
        total_servers: members.len(),
        running_servers: members.iter().filter(|view| runs(view)).count(),
        servers: members.into_iter().map(ServerStatus::from).collect(),
    };
    members.into_iter().map(status).collect()
}

fn runs(view: &InstanceView) -> bool {
    matches!(view.state, InstanceState::Running | InstanceState::Updating)
}

fn has_failed(view: &InstanceView) -> bool {
    matches!(view.state, InstanceState::Failed | InstanceState::NeedsSecrets)
        || view.crash_looping
        || (runs(view) && view.health == Health::Unhealthy)
}

fn is_coming(view: &InstanceView) -> bool {
    matches!(view.state, InstanceState::Pulling | InstanceState::Creating | InstanceState::Starting)
}

fn collective(members: &[&InstanceView]) -> CollectiveStatus {
    let count = |is: fn(&InstanceView) -> bool| members.iter().filter(|view| is(view)).count();
    let well = members.iter().filter(|view| runs(view) && !has_failed(view)).count();
    if well == members.len() {
        CollectiveStatus::Healthy
    } else if count(is_coming) > 0 && count(has_failed) == 0 {
        CollectiveStatus::Initializing
    } else if count(runs) > 0 {
        CollectiveStatus::Degraded
    } else {
        CollectiveStatus::Failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(state: InstanceState, health: Health, crash_looping: bool) -> InstanceView {
        let view = serde_json::json!({
            "account_tool_instance_id": null, "instance_name_on_toolbox": "one", "container_id": "", "id": "", "names": [],
            "image": "one", "image_digest": null, "status": "running", "state": state, "status_on_toolbox": "running",
            "health": health, "health_reason": null, "last_probe_at": null, "restart_count": 0, "crash_looping": crash_looping,
            "ports": [], "created": 0, "started_at": null, "mcp_url": null, "transport": null, "group_id": "team", "error": null,
        });
        serde_json::from_value(view).unwrap()
    }

    #[test]
    fn a_group_is_as_well_as_its_members() {
        let well = member(InstanceState::Running, Health::Healthy, false);
        let unasked = member(InstanceState::Running, Health::Unknown, false);
        let ill = member(InstanceState::Running, Health::Unhealthy, false);
        let coming = member(InstanceState::Starting, Health::Starting, false);
        let looping = member(InstanceState::Starting, Health::Unhealthy, true);
        let cases: [(&[&InstanceView], CollectiveStatus); 6] = [
            (&[&well, &unasked], CollectiveStatus::Healthy),
            (&[&well, &ill], CollectiveStatus::Degraded),
            (&[&well, &looping], CollectiveStatus::Degraded),
            (&[&well, &coming], CollectiveStatus::Initializing),
            // Between two of its starts it doesn't count as coming.
            (&[&looping], CollectiveStatus::Failed),
            (&[&looping, &coming], CollectiveStatus::Failed),
        ];
        for (members, expected) in cases {
            assert_eq!(collective(members), expected, "{members:?}");
        }
    }
}
