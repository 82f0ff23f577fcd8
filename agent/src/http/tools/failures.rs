//! Which status and code each failure of an instance is answered with.

use axum::http::{HeaderValue, StatusCode, header};
use dtma_api::InstanceName;
use serde_json::json;

use super::super::error::ApiError;
use crate::engine::EngineError;
use crate::instance::{Failure, FailureKind};
use crate::reconcile::{NotInside, Rejection};
use crate::store::ledger::LedgerError;

pub(super) fn not_found(name: &InstanceName) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "instance_not_found", format!("there is no instance called {name}"))
}

/// The answer to a request that was not carried out.
pub(in crate::http) fn rejected(rejection: Rejection) -> ApiError {
    let message = rejection.to_string();
    let conflict = |code| ApiError::new(StatusCode::CONFLICT, code, message.clone());
    match rejection {
        Rejection::NotFound(name) => not_found(&name),
        Rejection::NoGroup(_) => ApiError::new(StatusCode::NOT_FOUND, "group_not_found", message.clone()),
        Rejection::Exists(name) => {
            let details = json!({ "instance_name_on_toolbox": name, "update_with": format!("PUT /tools/{name}") });
            conflict("instance_exists").with_details(details)
        }
        Rejection::IdTaken { holder, .. } => {
            conflict("instance_exists").with_details(json!({ "instance_name_on_toolbox": holder }))
        }
        Rejection::PortTaken { port, holder } => {
            conflict("port_conflict").with_details(json!({ "port": port, "holder": holder }))
        }
        Rejection::BeingRemoved(_) | Rejection::Busy(_) => {
            conflict("busy").with_header(header::RETRY_AFTER, HeaderValue::from_static("1"))
        }
        Rejection::OtherId { name, id } => conflict("id_fixed").with_details(json!({
            "instance_name_on_toolbox": name,
            "account_tool_instance_id": id,
        })),
        Rejection::RolledBack { failure, .. } => {
            let why = failed(failure.clone());
            let details = json!({ "cause": why.code(), "reason": failure.message, "log": failure.log });
            conflict("update_rolled_back").with_details(details)
        }
        Rejection::NothingToFetch(_) => conflict("nothing_to_fetch"),
        Rejection::Vault(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "secrets could not be kept");
            let error = "this agent has no place in memory to keep secrets in, and nothing was changed; its log says what is missing";
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_secret_store", error)
        }
        Rejection::Unread(_) => conflict("agent_outdated"),
        Rejection::Superseded(_) => conflict("superseded"),
        Rejection::EngineUnavailable => {
            let error = "the Docker Engine on the droplet does not answer; GET /ready tells when it does";
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "docker_unavailable", error)
                .with_header(header::RETRY_AFTER, HeaderValue::from_static("5"))
        }
        Rejection::Ledger(LedgerError::NoSpace) => {
            let error = "the droplet's disk is full: the request could not be recorded, and nothing was changed";
            ApiError::new(StatusCode::INSUFFICIENT_STORAGE, "no_space", error)
        }
        Rejection::Ledger(LedgerError::Read { .. } | LedgerError::SetAside { .. } | LedgerError::Write(_)) => {
            let error = "the request could not be recorded, and nothing was changed; GET /ready has the reason";
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "ledger_unwritable", error)
        }
        Rejection::Failed(failure) => failed(failure),
    }
}

fn failed(failure: Failure) -> ApiError {
    let Failure { kind, message, log } = failure;
    let answer = |status, code| ApiError::new(status, code, message.clone());
    let unprocessable = StatusCode::UNPROCESSABLE_ENTITY;
    match kind {
        FailureKind::ImageNotFound => answer(StatusCode::NOT_FOUND, "image_not_found"),
        FailureKind::PullDenied => answer(unprocessable, "pull_denied"),
        // The registry was named by the caller, so what it said is the caller's to know.
        FailureKind::PullFailed => answer(StatusCode::BAD_GATEWAY, "pull_failed"),
        FailureKind::NameConflict => answer(StatusCode::CONFLICT, "name_conflict"),
        FailureKind::PortConflict { holder } => {
            answer(StatusCode::CONFLICT, "port_conflict").with_details(json!({ "holder": holder }))
        }
        FailureKind::Refused => answer(unprocessable, "container_refused"),
        FailureKind::Exited { code } => {
            answer(unprocessable, "exited").with_details(json!({ "exit_code": code, "log": log }))
        }
        FailureKind::NotAnswering => answer(unprocessable, "not_answering").with_details(json!({ "log": log })),
        FailureKind::MemberFailed { member } => {
            answer(StatusCode::CONFLICT, "member_failed").with_details(json!({ "instance_name_on_toolbox": member }))
        }
        FailureKind::NoSpace => answer(StatusCode::INSUFFICIENT_STORAGE, "no_space"),
        FailureKind::EgressUnavailable => answer(StatusCode::SERVICE_UNAVAILABLE, "egress_unavailable"),
        FailureKind::NeedsSecrets => answer(StatusCode::CONFLICT, "needs_secrets"),
        FailureKind::SecretsUnavailable => answer(StatusCode::BAD_GATEWAY, "secrets_unavailable"),
        FailureKind::Unknown(_) => answer(unprocessable, "failed"),
        FailureKind::EngineFailed => {
            let error = "the Docker Engine failed; GET /tools/{ref}/events has what it said";
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "docker_failed", error)
        }
    }
}

/// The answer when nothing was to be had inside a container; `what` it was to be done there.
pub(super) fn not_inside(failure: NotInside, what: &str) -> ApiError {
    match failure {
        NotInside::NotRunning(name) => {
            let error = format!("the instance {name} does not run; POST /tools/{name}/start starts it");
            ApiError::new(StatusCode::CONFLICT, "not_running", error)
        }
        NotInside::Busy => {
            let error = "the agent does as much of this at once as it may; try again in a moment";
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "busy", error)
                .with_header(header::RETRY_AFTER, HeaderValue::from_static("1"))
        }
        NotInside::CannotStart(message) => {
            let error = format!("the command can't be started in the container: {message}");
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "cannot_start", error)
        }
        NotInside::NoFigures(name) => {
            let error = format!(
                "Docker has no figures of the instance {name}: it runs, and its control groups can't be read; Docker's log on the \
                 droplet says why (each of those in /proc/cgroups has to be mounted)"
            );
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_figures", error)
        }
        NotInside::Engine(error) => engine_failed(&error, what),
    }
}

/// The answer when the engine didn't do what only reads.
pub(super) fn engine_failed(error: &EngineError, what: &str) -> ApiError {
    tracing::warn!(error = error as &dyn std::error::Error, what, "the engine did not do it");
    match error {
        EngineError::Unavailable { .. } => {
            let error = "the Docker Engine on the droplet does not answer; GET /ready tells when it does";
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "docker_unavailable", error)
                .with_header(header::RETRY_AFTER, HeaderValue::from_static("5"))
        }
        EngineError::ContainerGone { .. } => {
            ApiError::new(StatusCode::CONFLICT, "busy", "the instance's container was just removed; try again")
                .with_header(header::RETRY_AFTER, HeaderValue::from_static("1"))
        }
        EngineError::ImageNotFound { .. }
        | EngineError::PullDenied { .. }
        | EngineError::PullFailed { .. }
        | EngineError::NameTaken
        | EngineError::PortTaken { .. }
        | EngineError::NetworkGone { .. }
        | EngineError::NoSpace { .. }
        | EngineError::Refused { .. }
        | EngineError::Failed { .. } => {
            let error = format!("the Docker Engine could not {what}; the agent's log has what it said");
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "docker_failed", error)
        }
    }
}
