//! The agent itself and the droplet it is on: `/system`, `/logs`, `/diagnostics/…`, `/restart`, and what became of the remote shell.

use std::convert::Infallible;

use axum::extract::{Query, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use dtma_api::failure::Fault;
use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio_stream::wrappers::BroadcastStream;

use super::App;
use super::error::ApiError;
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

/// `lines` (100, at most 2000), `since` (RFC 3339 or Unix seconds) and `follow` of a query string.
#[derive(Debug, PartialEq)]
struct LogQuery {
    lines: usize,
    since: Option<Timestamp>,
    follow: bool,
}

impl LogQuery {
    fn parse(uri: &Uri) -> Result<Self, ApiError> {
        let pairs = Query::<Vec<(String, String)>>::try_from_uri(uri).map(|Query(pairs)| pairs).unwrap_or_default();
        let mut query = Self { lines: 100, since: None, follow: false };
        let mut faults = Vec::new();
        for (name, value) in pairs {
            let problem = match name.as_str() {
                "lines" => match value.parse() {
                    Ok(lines @ 1..=2_000) => {
                        query.lines = lines;
                        continue;
                    }
                    Ok(_) | Err(_) => "must be a number from 1 to 2000",
                },
                "since" => match point_in_time(&value) {
                    Some(since) => {
                        query.since = Some(since);
                        continue;
                    }
                    None => "must be a time, as 2026-01-31T12:00:00Z or in Unix seconds",
                },
                "follow" => match value.as_str() {
                    "true" | "1" | "" => {
                        query.follow = true;
                        continue;
                    }
                    "false" | "0" => continue,
                    _ => "must be true or false",
                },
                _ => continue,
            };
            faults.push(Fault { path: format!("?{name}"), problem: problem.to_owned() });
        }
        if faults.is_empty() {
            return Ok(query);
        }
        let sentences: Vec<_> = faults.iter().map(|fault| format!("{} {}", fault.path, fault.problem)).collect();
        Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_request", sentences.join("; ")).with_details(json!(faults)))
    }
}

fn point_in_time(text: &str) -> Option<Timestamp> {
    match text.parse::<i64>() {
        Ok(seconds) => Timestamp::from_second(seconds).ok(),
        Err(_) => text.parse().ok(),
    }
}

async fn logs(State(app): State<App>, uri: Uri) -> Result<Response, ApiError> {
    let query = LogQuery::parse(&uri)?;
    let ring = &app.parts().logs;
    if !query.follow {
        return Ok(log_answer(&ring.tail(query.lines, query.since)));
    }
    let (tail, receiver) = ring.follow(query.lines, query.since);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_query_is_read_and_its_faults_are_named() {
        let parse = |query: &str| LogQuery::parse(&format!("/logs{query}").parse().unwrap()).ok();
        let since = Timestamp::from_second(1_700_000_000).unwrap();
        assert_eq!(parse(""), Some(LogQuery { lines: 100, since: None, follow: false }));
        assert_eq!(
            parse("?lines=5&since=1700000000&follow=true&other=1"),
            Some(LogQuery { lines: 5, since: Some(since), follow: true })
        );
        assert_eq!(parse("?since=2023-11-14T22:13:20Z").and_then(|query| query.since), Some(since));
        for bad in ["?lines=0", "?lines=2001", "?lines=x", "?since=yesterday", "?follow=maybe"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
