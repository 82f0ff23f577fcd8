//! `/tools`: deploys, lifecycle calls, lists and logs. What is wrong with a request is answered here; what goes wrong with an instance
//! is mapped in [`failures`].

pub(super) mod exec;
pub(super) mod failures;
mod logs;
pub(super) mod params;
pub(super) mod routes;
mod stats;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use dtma_api::InstanceName;
use dtma_api::failure::Fault;
use dtma_api::instance::{DeployAnswer, Deployed, InstanceAnswer, InstanceView, RemovalAnswer, Removed};
use serde::Serialize;
use serde_json::Value;

use self::failures::{not_found, rejected};
use self::params::{Named, Parameters};
pub(super) use self::routes::{MAX_BODY, routes};
use super::App;
use super::error::ApiError;
use crate::instance::{Policy, Present, Refusal, confidential, validate, validate_update};
use crate::reconcile::{Instances, Rejection, Removal, Settled};

/// Answer of `GET /tools`: [`dtma_api::instance::InstanceList`] without owning the instances; a test holds the two together.
#[derive(Serialize)]
struct ListAnswer<'a> {
    success: bool,
    data: &'a [InstanceView],
}

async fn list(State(instances): State<Instances>) -> Response {
    instances.looked().await;
    let snapshot = instances.snapshot();
    Json(ListAnswer { success: true, data: &snapshot.instances }).into_response()
}

async fn show(State(instances): State<Instances>, Named(name): Named) -> Result<Json<InstanceAnswer>, ApiError> {
    let mut data = instances.get(&name).ok_or_else(|| not_found(&name))?;
    // Only here: its tools would make lists many times as long.
    data.server = instances.introduction(&name).map(|server| (*server).clone());
    Ok(Json(InstanceAnswer { success: true, message: format!("{name} is {}", data.status), data }))
}

async fn deploy(
    State(app): State<App>,
    parameters: Parameters,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<DeployAnswer>), ApiError> {
    let wait = parameters.wait()?;
    let body = json(body)?;
    let (spec, warnings) = validate(&body, &policy(&app)).map_err(refused)?;
    let (name, confidential) = (spec.name.clone(), confidential(&body));
    let deployment = app.parts().instances.deploy_with(spec, confidential, wait).await.map_err(rejected)?;
    let (status, message) = match (deployment.settled, deployment.created) {
        (false, _) => {
            (StatusCode::ACCEPTED, format!("{name} is being deployed; GET /tools/{name} tells how far it is"))
        }
        (true, true) => (StatusCode::CREATED, format!("{name} is deployed and runs")),
        (true, false) => (StatusCode::OK, format!("{name} was deployed before with the same specification")),
    };
    let data = Deployed { instance: deployment.view, warnings };
    Ok((status, Json(DeployAnswer { success: true, message, data })))
}

/// Brings an instance to another spec; the old version is kept until the new one has shown that it works.
async fn update(
    State(app): State<App>,
    Named(name): Named,
    parameters: Parameters,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<DeployAnswer>), ApiError> {
    let wait = parameters.wait()?;
    let instances = &app.parts().instances;
    let known = instances.get(&name).ok_or_else(|| not_found(&name))?;
    let id = known.account_tool_instance_id.ok_or_else(|| not_found(&name))?;
    let present = Present { name: &name, account_tool_instance_id: &id };
    // An update leaves it where it is.
    let (group, shared_network) = instances.membership(&name);
    let policy = Policy { group, shared_network, ..policy(&app) };
    let body = json(body)?;
    let (spec, gate, warnings) = validate_update(&body, present, &policy).map_err(refused)?;
    let updated = instances.update_with(spec, gate, confidential(&body), wait).await.map_err(rejected)?;
    let (status, message) = match (updated.settled, updated.already) {
        (false, _) => (
            StatusCode::ACCEPTED,
            format!("{name} is being updated; GET /tools/{name} tells how far it is, and last_update how it ended"),
        ),
        (true, false) => (StatusCode::OK, format!("{name} is updated and runs")),
        (true, true) => (StatusCode::OK, format!("{name} ran like this already")),
    };
    let data = Deployed { instance: updated.view, warnings };
    Ok((status, Json(DeployAnswer { success: true, message, data })))
}

/// What this agent's operator decides about deploys.
pub(super) fn policy(app: &App) -> Policy {
    Policy { agent_port: app.parts().port, ..Policy::default() }
}

/// A request's body as JSON.
pub(super) fn json(body: Result<Bytes, BytesRejection>) -> Result<Value, ApiError> {
    let body = body.map_err(|rejection| ApiError::new(rejection.status(), "invalid_request", rejection.body_text()))?;
    serde_json::from_slice(&body).map_err(|error| {
        // Said without the text around the fault, which may hold a secret.
        let (line, column) = (error.line(), error.column());
        invalid(vec![Fault { path: "$".to_owned(), problem: format!("is not JSON: line {line}, column {column}") }])
    })
}

async fn start(
    State(instances): State<Instances>,
    Named(name): Named,
    parameters: Parameters,
) -> Result<(StatusCode, Json<InstanceAnswer>), ApiError> {
    settled(&name, "started", "running", instances.start(&name, parameters.wait()?).await)
}

async fn stop(
    State(instances): State<Instances>,
    Named(name): Named,
    parameters: Parameters,
) -> Result<(StatusCode, Json<InstanceAnswer>), ApiError> {
    settled(&name, "stopped", "stopped", instances.stop(&name, parameters.wait()?).await)
}

async fn restart(
    State(instances): State<Instances>,
    Named(name): Named,
    parameters: Parameters,
) -> Result<(StatusCode, Json<InstanceAnswer>), ApiError> {
    settled(&name, "restarted", "running", instances.restart(&name, parameters.wait()?).await)
}

fn settled(
    name: &InstanceName,
    done: &str,
    state: &str,
    result: Result<Settled, Rejection>,
) -> Result<(StatusCode, Json<InstanceAnswer>), ApiError> {
    let result = result.map_err(rejected)?;
    let (status, message) = match (result.settled, result.already) {
        (true, true) => (StatusCode::OK, format!("{name} was {state} already")),
        (true, false) => (StatusCode::OK, format!("{name} is {done}")),
        (false, _) => {
            (StatusCode::ACCEPTED, format!("{name} is not {done} yet; GET /tools/{name} tells how far it is"))
        }
    };
    Ok((status, Json(InstanceAnswer { success: true, message, data: result.view })))
}

async fn remove(
    State(instances): State<Instances>,
    Named(name): Named,
    parameters: Parameters,
) -> Result<Response, ApiError> {
    let volumes = parameters.flag("volumes")?;
    let removal = instances.remove(&name, volumes, parameters.wait()?).await.map_err(rejected)?;
    let (status, removed, message) = match removal {
        Removal::Gone => (StatusCode::OK, true, format!("{name} is removed")),
        Removal::Working => (StatusCode::ACCEPTED, false, format!("{name} is being removed")),
    };
    let data = Removed { instance_name_on_toolbox: name, removed };
    Ok((status, Json(RemovalAnswer { success: true, message, data })).into_response())
}

/// A deploy that isn't accepted, with everything that is wrong with it.
pub(super) fn refused(refusal: Refusal) -> ApiError {
    if refusal.forbidden {
        let error = "the deploy asks for options that would give the container the host; details names each";
        return ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "forbidden_option", error)
            .with_details(faults(refusal.faults));
    }
    invalid(refusal.faults)
}

/// A request that can't be right, with everything that is wrong with it.
fn invalid(all: Vec<Fault>) -> ApiError {
    let summary: Vec<String> = all.iter().take(3).map(|fault| format!("{} {}", fault.path, fault.problem)).collect();
    let more = all.len().saturating_sub(summary.len());
    let tail = if more > 0 { format!(" (and {more} more)") } else { String::new() };
    let error = format!("the request is not valid: {}{tail}", summary.join("; "));
    ApiError::new(StatusCode::BAD_REQUEST, "invalid_request", error).with_details(faults(all))
}

fn faults(all: Vec<Fault>) -> Value {
    // A list of pairs of texts always serialises.
    serde_json::to_value(all).unwrap_or(Value::Null)
}
