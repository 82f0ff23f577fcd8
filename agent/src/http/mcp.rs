//! `ANY /tools/{ref}/mcp[/…]`: finds the instance and hands the exchange to the proxy.

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::Response;
use dtma_api::InstanceName;
use dtma_api::instance::{Health, InstanceState};
use http_body_util::BodyExt as _;
use serde::Deserialize;

use super::App;
use super::error::ApiError;
use super::table::{Content, Operation, Table, Verb};
use super::tools::params::unresolved;
use crate::mcp::{Forwarding, Obstacle, Refused, origin};
use crate::reconcile::{Instances, NoUpstream};

pub(super) fn routes<T: Table>(table: T) -> T {
    // What streamable HTTP uses, in both eras; anything else is answered with 405.
    let methods = [Verb::Post, Verb::Get, Verb::Delete, Verb::Options];
    let describe = |summary| {
        Operation::new(summary)
            .described(
                "Streamable HTTP, whatever the server itself speaks, in both eras of the protocol. To a server that speaks it too, request and \
                 answer are passed on with their headers; the agent's credential stays behind. To any other \
                 the agent speaks the transport's part itself: `initialize` is answered with an `Mcp-Session-Id`, which ends after 30 minutes \
                 without use or with the server's process; then it is answered with 404, and the client begins anew. With `sessionMode: per-session` \
                 it begins in a container of its own, ends two minutes after its client has stopped listening at the latest, and the \
                 instance's own one answers clients of the era without sessions. Every call under way when the \
                 process ends is answered with the JSON-RPC error -32603. A client that hangs up cancels its call. A failure of the agent is a \
                 `Failure`, a failure of the server whatever it says; of the errors of the 2026-07-28 version -32601 comes with 404, -32020 to \
                 -32022 with 400, and are JSON-RPC responses.",
            )
            .takes::<serde_json::Value>("An MCP message, 16 MiB at most.")
            .optionally()
            .answer(200, "The server's answer, with the server's status.", Content::Any)
            .answer(202, "A notification, or an answer to the server, was passed on.", Content::Any)
            .answer(204, "The session is over.", Content::Any)
            .fails(&[
                (400, "bad_path", "the path can't be passed on to the server"),
                (400, "id_in_use", "a request with this id is under way in the session"),
                (400, "invalid_message", "the body is not one JSON-RPC message"),
                (400, "invalid_request", "the path is not UTF-8"),
                (400, "session_missing", "everything but `initialize` needs an `Mcp-Session-Id`"),
                (400, "version_not_supported", "`MCP-Protocol-Version` names none the agent knows"),
                (403, "origin_not_allowed", "a web page of another origin asks"),
                (404, "instance_not_found", "nothing is called that"),
                (404, "no_such_route", "the server does not speak HTTP itself, and nothing is below its endpoint"),
                (404, "not_an_mcp_server", "it was deployed without `mcpTransportType`"),
                (404, "session_not_found", "the session is over; begin anew with `initialize`"),
                (405, "method_not_allowed", "this version of the protocol has no such request"),
                (406, "not_acceptable", "`Accept` must name what may come"),
                (409, "ambiguous_reference", "several containers' ids begin with it"),
                (413, "message_too_long", "the message is longer than the agent passes on"),
                (415, "not_json", "a message is `application/json`"),
                (429, "too_many_calls", "1,024 calls are under way to the server"),
                (502, "instance_unreachable", "it runs, and doesn't accept connections or hung up"),
                (503, "docker_unavailable", "which instances there are isn't known before the Docker Engine answers"),
                (503, "busy", "the agent is taking in as many messages for the server as it may"),
                (503, "instance_failed", "it does not run; the sentence says why"),
                (503, "instance_removing", "it is being removed"),
                (503, "instance_starting", "try again after `Retry-After`"),
                (503, "instance_stopped", "`POST /tools/{ref}/start` starts it"),
                (503, "too_many_sessions", "as many clients as may have a session with the server: 256, or with `sessionMode: per-session` as many as `maxSessions` says"),
                (504, "instance_silent", "it took too long to begin its answer"),
            ])
    };
    table.on(&methods, "/tools/{ref}/mcp", endpoint, || describe("The instance's MCP endpoint")).on(
        &methods,
        "/tools/{ref}/mcp/{*rest}",
        endpoint,
        || describe("What is below the instance's MCP endpoint"),
    )
}

#[derive(Deserialize)]
struct Which {
    r#ref: String,
}

async fn endpoint(
    State(app): State<App>,
    which: Result<Path<Which>, PathRejection>,
    request: Request,
) -> Result<Response, ApiError> {
    let parts = app.parts();
    let Path(Which { r#ref: reference }) =
        which.map_err(|rejection| ApiError::new(StatusCode::BAD_REQUEST, "invalid_request", rejection.body_text()))?;
    if !origin::permitted(request.headers(), request.uri().authority().map(Authority::as_str)) {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "origin_not_allowed",
            "web pages of this origin may not speak to MCP servers here",
        ));
    }
    let name = parts.instances.find(&reference).await.map_err(unresolved)?;
    let upstream = parts.instances.upstream(&name).map_err(|missing| no_upstream(&parts.instances, missing))?;
    let path = request.uri().path().to_owned();
    let (prefix, suffix) = split(&path);
    // Listening streams last for ever and keep no server busy; and what a session's own process does says nothing about the instance's.
    let is_elsewhere = !upstream.sessions.is_shared() && request.headers().contains_key("mcp-session-id");
    let call = (request.method() == Method::POST && !is_elsewhere).then(|| parts.instances.call(&name));
    let answer = match parts.bridges.to(&upstream) {
        Some(_) if !matches!(suffix, "" | "/") => {
            let error = format!("{name} does not speak streamable HTTP itself, so there is nothing below its endpoint");
            return Err(ApiError::new(StatusCode::NOT_FOUND, "no_such_route", error));
        }
        Some(bridge) => bridge.serve(request).await.map_err(|refused| {
            tracing::info!(instance = %name, %refused, "an MCP exchange did not come about");
            not_bridged(&parts.instances, &name, &refused)
        })?,
        None => {
            let forwarding = Forwarding { upstream: &upstream, prefix, suffix };
            parts.proxy.forward(forwarding, request).await.map_err(|obstacle| {
                tracing::info!(instance = %name, error = %obstacle, cause = ?std::error::Error::source(&obstacle), "an MCP exchange did not go through");
                blocked(&parts.instances, &name, &obstacle)
            })?
        }
    };
    // The call lasts as long as its answer.
    Ok(answer.map(|body| {
        Body::new(body.map_err(move |error| {
            let _call = &call;
            error
        }))
    }))
}

/// `/tools/{ref}/mcp` and what follows it, both as they were sent.
fn split(path: &str) -> (&str, &str) {
    // `mcp` ends where the fourth slash is, if there is one.
    let ends = path.match_indices('/').nth(3).map_or(path.len(), |(at, _)| at);
    path.split_at_checked(ends).unwrap_or((path, ""))
}

fn no_upstream(instances: &Instances, missing: NoUpstream) -> ApiError {
    match &missing {
        NoUpstream::NotFound(_) => ApiError::new(StatusCode::NOT_FOUND, "instance_not_found", missing.to_string()),
        NoUpstream::NotMcp(_) => ApiError::new(StatusCode::NOT_FOUND, "not_an_mcp_server", missing.to_string()),
        NoUpstream::NotRunning(name) => away(instances, name),
    }
}

/// What a bridge doesn't take, and what it says of it.
fn not_bridged(instances: &Instances, name: &InstanceName, refused: &Refused) -> ApiError {
    let (status, code) = match refused {
        Refused::Method { .. } => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
        Refused::NotAcceptable(_) => (StatusCode::NOT_ACCEPTABLE, "not_acceptable"),
        Refused::NotJson => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "not_json"),
        Refused::TooLong => (StatusCode::PAYLOAD_TOO_LARGE, "message_too_long"),
        Refused::BrokeOff | Refused::NoMessage(_) => (StatusCode::BAD_REQUEST, "invalid_message"),
        Refused::Version(_) => (StatusCode::BAD_REQUEST, "version_not_supported"),
        Refused::NoSession => (StatusCode::BAD_REQUEST, "session_missing"),
        Refused::IdInUse => (StatusCode::BAD_REQUEST, "id_in_use"),
        Refused::DeadSession => (StatusCode::NOT_FOUND, "session_not_found"),
        Refused::TooManySessions { .. } => (StatusCode::SERVICE_UNAVAILABLE, "too_many_sessions"),
        Refused::Busy => (StatusCode::SERVICE_UNAVAILABLE, "busy"),
        Refused::TooManyCalls => (StatusCode::TOO_MANY_REQUESTS, "too_many_calls"),
        Refused::Silent => (StatusCode::GATEWAY_TIMEOUT, "instance_silent"),
        Refused::Unreachable(_) => {
            let runs = instances.get(name).is_some_and(|view| view.state == InstanceState::Running);
            if !runs {
                return away(instances, name);
            }
            (StatusCode::BAD_GATEWAY, "instance_unreachable")
        }
    };
    let error = match refused {
        Refused::Unreachable(end) => format!("the instance {name} runs, but there is no speaking with it: {end}"),
        refused => refused.to_string(),
    };
    let answer = ApiError::new(status, code, error);
    match refused {
        Refused::Method { allowed } => answer.with_header(header::ALLOW, HeaderValue::from_static(allowed)),
        Refused::TooManySessions { .. } => answer.with_header(header::RETRY_AFTER, HeaderValue::from_static("60")),
        Refused::Busy | Refused::TooManyCalls | Refused::Unreachable(_) => {
            answer.with_header(header::RETRY_AFTER, HeaderValue::from_static("1"))
        }
        _ => answer,
    }
}

/// Why an instance that should answer doesn't, as far as the loop knows.
fn away(instances: &Instances, name: &InstanceName) -> ApiError {
    let unavailable = |code: &str, error: String| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code, error);
    let Some(view) = instances.get(name) else {
        return ApiError::new(
            StatusCode::NOT_FOUND,
            "instance_not_found",
            format!("there is no instance called {name}"),
        );
    };
    match view.state {
        InstanceState::Updating => {
            unavailable("instance_updating", format!("the instance {name} is being updated; try again in a moment"))
                .with_header(header::RETRY_AFTER, HeaderValue::from_static("1"))
        }
        InstanceState::Pulling | InstanceState::Creating | InstanceState::Starting | InstanceState::Running => {
            unavailable("instance_starting", format!("the instance {name} is starting; try again in a moment"))
                .with_header(header::RETRY_AFTER, HeaderValue::from_static("1"))
        }
        InstanceState::Stopping | InstanceState::Stopped => unavailable(
            "instance_stopped",
            format!("the instance {name} is stopped; POST /tools/{name}/start starts it"),
        ),
        InstanceState::NeedsSecrets => {
            let why = view.error.unwrap_or_else(|| "it has to be deployed again with its secrets".to_owned());
            unavailable("instance_needs_secrets", format!("the instance {name} does not run: {why}"))
        }
        InstanceState::Failed => {
            let why = view.error.unwrap_or_else(|| "the reason is in its log".to_owned());
            unavailable("instance_failed", format!("the instance {name} does not run: {why}"))
        }
        InstanceState::Removing => unavailable("instance_removing", format!("the instance {name} is being removed")),
    }
}

fn blocked(instances: &Instances, name: &InstanceName, obstacle: &Obstacle) -> ApiError {
    let view = instances.get(name);
    let runs =
        view.as_ref().is_some_and(|view| view.state == InstanceState::Running && view.health != Health::Starting);
    match obstacle {
        Obstacle::Unreachable(_) if !runs => away(instances, name),
        Obstacle::Unreachable(_) | Obstacle::HungUp(_) => {
            let reason =
                view.and_then(|view| view.health_reason).map(|reason| format!(" ({reason})")).unwrap_or_default();
            let error = format!("the instance {name} runs, but {obstacle}{reason}");
            ApiError::new(StatusCode::BAD_GATEWAY, "instance_unreachable", error)
        }
        Obstacle::Silent => {
            ApiError::new(StatusCode::GATEWAY_TIMEOUT, "instance_silent", format!("the instance {name}: {obstacle}"))
        }
        Obstacle::TooLong => ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "message_too_long", obstacle.to_string()),
        Obstacle::BadPath => ApiError::new(StatusCode::BAD_REQUEST, "bad_path", obstacle.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_split_as_it_was_sent() {
        assert_eq!(split("/tools/a/mcp"), ("/tools/a/mcp", ""));
        assert_eq!(split("/tools/a%2Fb/mcp/"), ("/tools/a%2Fb/mcp", "/"));
        assert_eq!(split("/tools/a/mcp/x/y"), ("/tools/a/mcp", "/x/y"));
    }
}
