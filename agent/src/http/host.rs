//! The agent itself and the droplet it is on: `/system`, `/logs`, `/diagnostics/…`, `/restart`, and what became of the remote shell.

use std::convert::Infallible;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::{StreamExt as _, stream};
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio_stream::wrappers::BroadcastStream;

use super::App;
use super::error::ApiError;
use super::tools::params::Parameters;
use crate::logs::LogLine;
use crate::system;

pub(super) fn router() -> Router<App> {
    Router::new()
        .route("/system", get(system_figures))
        .route("/logs", get(logs))
        .route("/diagnostics/docker", get(docker_diagnostics))
        .route("/diagnostics/system", get(system_diagnostics))
        .route("/diagnostics/logs", get(log_diagnostics))
        .route("/restart", post(restart))
        .route("/ssh/execute", post(no_remote_shell))
}

async fn system_figures(State(app): State<App>) -> Json<Value> {
    Json(figures(&app))
}

fn figures(app: &App) -> Value {
    let engine = app.parts().instances.engine_status();
    let sample = app.parts().system.borrow().clone();
    let [one, five, fifteen] = sample.load_average;
    json!({
        "success": true,
        "system_metrics": sample.metrics,
        "load_average": {"one": one, "five": five, "fifteen": fifteen},
        "uptime_seconds": sample.uptime_seconds,
        "kernel": system::kernel(),
        "docker_version": engine.version,
    })
}

/// Lines given when the caller doesn't say how many.
const DEFAULT_LINES: usize = 100;

/// `lines` (100, or `all` that are kept), `since`, `follow`.
async fn logs(State(app): State<App>, parameters: Parameters) -> Result<Response, ApiError> {
    let asked = parameters.count("lines")?.map_or(usize::MAX, |lines| usize::try_from(lines).unwrap_or(usize::MAX));
    let lines = if parameters.has("lines") { asked } else { DEFAULT_LINES };
    let since = parameters.time("since")?;
    let ring = &app.parts().logs;
    if !parameters.flag("follow")? {
        return Ok(log_answer(&ring.tail(lines, since)));
    }
    let (tail, receiver) = ring.follow(lines, since);
    let event = |line: LogLine| Event::default().data(&*line.json);
    let live = BroadcastStream::new(receiver).map(move |line| match line {
        Ok(line) => event(line),
        Err(_lagged) => Event::default().comment("some lines were lost: this stream is read too slowly"),
    });
    let all = stream::iter(tail.into_iter().map(event)).chain(live);
    let until = app.parts().shutdown.clone().cancelled_owned();
    let stream = all.take_until(until).map(Ok::<_, Infallible>);
    Ok(Sse::new(stream).keep_alive(KeepAlive::default()).into_response())
}

/// `{"success": true, "lines": […]}`; each line is JSON as it was logged, so it goes out as it is.
fn log_answer(lines: &[LogLine]) -> Response {
    let whole = lines.iter().filter(|line| serde_json::from_str::<IgnoredAny>(&line.json).is_ok());
    let lines: Vec<_> = whole.map(|line| &*line.json).collect();
    let body = format!("{{\"success\":true,\"lines\":[{}]}}", lines.join(","));
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

async fn docker_diagnostics(State(app): State<App>) -> Json<Value> {
    let snapshot = app.parts().instances.snapshot();
    let pass = &snapshot.pass;
    Json(json!({
        "success": true,
        "reachable": snapshot.engine.reachable,
        "version": snapshot.engine.version,
        "error": snapshot.engine.error,
        "last_pass": {
            "sequence": pass.sequence,
            "reason": pass.reason,
            "at": pass.at,
            "took_ms": pass.took.as_secs_f64() * 1_000.0,
            "started": pass.started,
        },
        "instances": snapshot.instances.iter().map(|view| json!({
            "instance_name_on_toolbox": view.instance_name_on_toolbox,
            "container_id": view.container_id,
            "state": view.state,
            "status": view.status,
            "health": view.health,
            "restart_count": view.restart_count,
            "error": view.error,
        })).collect::<Vec<_>>(),
    }))
}

async fn system_diagnostics(State(app): State<App>) -> Json<Value> {
    let parts = app.parts();
    let mut answer = figures(&app);
    let agent = json!({
        "version": crate::VERSION,
        "started_at": parts.started_at,
        "resident_bytes": system::resident_bytes(),
        "open_connections": parts.server.open_connections(),
        "connections_turned_away": parts.server.turned_away(),
        "refused_keys": parts.gate.callers.refused(),
        "link": format!("{:?}", *parts.link.borrow()),
    });
    if let Value::Object(fields) = &mut answer {
        fields.insert("agent".to_owned(), agent);
    }
    Json(answer)
}

async fn log_diagnostics(State(app): State<App>) -> Response {
    log_answer(&app.parts().logs.tail(500, None))
}

/// Ends the process in order; systemd starts it again. Tools aren't touched.
async fn restart(State(app): State<App>) -> (StatusCode, Json<Value>) {
    tracing::info!("a caller asked for a restart");
    app.parts().shutdown.cancel();
    let message = "the agent ends now and is started again; tools keep running";
    (StatusCode::ACCEPTED, Json(json!({"success": true, "message": message})))
}

async fn no_remote_shell() -> ApiError {
    ApiError::new(
        StatusCode::GONE,
        "no_remote_shell",
        "this agent runs no commands on the droplet; POST /tools/{ref}/exec runs one inside an instance's container",
    )
}
