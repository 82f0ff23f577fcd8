//! The agent itself and the droplet it is on: `/system`, `/logs`, `/diagnostics/…`, `/restart`, `/redeploy`, `/update`, and what became
//! of the remote shell.

use std::convert::Infallible;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use dtma_api::host::{
    Accepted, AgentLog, AgentLogLine, AgentProcess, DockerDiagnostics, InstanceDiagnosis, LinkView, LoadAverage,
    PassView, SystemAnswer, SystemDiagnostics,
};
use dtma_api::update::UpdateAnswer;
use futures_util::{StreamExt as _, stream};
use serde::de::IgnoredAny;
use tokio_stream::wrappers::BroadcastStream;

use super::App;
use super::error::ApiError;
use super::table::{Failing, Operation, Table};
use super::tools::params::Parameters;
use crate::backend::LinkState;
use crate::logs::LogLine;
use crate::system;
use crate::update::NotAsked;

pub(super) fn routes<T: Table>(table: T) -> T {
    table
        .get("/system", system_figures, || {
            Operation::new("Figures of the droplet")
                .answers::<SystemAnswer>(200, "All of one moment, a few seconds ago.")
        })
        .get("/logs", logs, || {
            Operation::new("The agent's own log")
                .count("lines", "How many of the last lines that are kept (some two thousand); 100 unless it says so.")
                .time("since", "Only lines written then or later.")
                .flag("follow", false, "Go on with what is written from now on, as server-sent events.")
                .answers::<AgentLog>(200, "The lines, oldest first.")
                .streams::<AgentLogLine>(200, "With `follow`: one event for each line.")
                .fails(&[(400, "invalid_request", "a parameter can't be read; `details` names each")])
        })
        .get("/diagnostics/docker", docker_diagnostics, || {
            Operation::new("How the agent stands with Docker, for a person chasing a fault")
                .answers::<DockerDiagnostics>(200, "The engine, the agent's last look at it, and every instance.")
        })
        .get("/diagnostics/system", system_diagnostics, || {
            Operation::new("The droplet and the agent's own process, for a person chasing a fault")
                .answers::<SystemDiagnostics>(200, "All of one moment.")
        })
        .get("/diagnostics/logs", log_diagnostics, || {
            Operation::new("The agent's own log, for a person chasing a fault")
                .answers::<AgentLog>(200, "The last 500 lines, oldest first.")
        })
        .post("/restart", restart, || {
            Operation::new("Ends the agent in order; systemd starts it again")
                .described("Tools keep running.")
                .answers::<Accepted>(202, "It ends when this answer is out.")
        })
        .post("/redeploy", redeploy, || {
            Operation::new("Looks for a newer release of the agent, and goes to it")
                .described("The newest of the droplet's channel. It is kept only if it proves itself; tools keep running. `GET /update` tells how it goes.")
                .answers::<Accepted>(202, "The updater is asked.")
                .fails(&[NO_UPDATER, (507, "no_space", "the request can't be written down")])
        })
        .get("/update", update, || {
            Operation::new("How an update of the agent stands")
                .answers::<UpdateAnswer>(200, "What the updater does, and how the last update ended.")
                .fails(&[NO_UPDATER])
        })
        .post("/ssh/execute", no_remote_shell, || {
            Operation::new("What became of the old agent's remote shell").fails(&[(
                410,
                "no_remote_shell",
                "always; `POST /tools/{ref}/exec` runs a command in an instance's container",
            )])
        })
}

async fn system_figures(State(app): State<App>) -> Json<SystemAnswer> {
    Json(figures(&app))
}

fn figures(app: &App) -> SystemAnswer {
    let sample = app.parts().system.borrow().clone();
    let [one, five, fifteen] = sample.load_average;
    SystemAnswer {
        success: true,
        system_metrics: sample.metrics,
        load_average: LoadAverage { one, five, fifteen },
        uptime_seconds: sample.uptime_seconds,
        kernel: system::kernel(),
        docker_version: app.parts().instances.engine_status().version,
    }
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

async fn docker_diagnostics(State(app): State<App>) -> Json<DockerDiagnostics> {
    let snapshot = app.parts().instances.snapshot();
    let pass = &snapshot.pass;
    let instances = snapshot.instances.iter().map(|view| InstanceDiagnosis {
        instance_name_on_toolbox: view.instance_name_on_toolbox.clone(),
        container_id: view.container_id.clone(),
        state: view.state,
        status: view.status.clone(),
        health: view.health,
        health_reason: view.health_reason.clone(),
        restart_count: view.restart_count,
        error: view.error.clone(),
    });
    Json(DockerDiagnostics {
        success: true,
        reachable: snapshot.engine.reachable,
        version: snapshot.engine.version.clone(),
        error: snapshot.engine.error.clone(),
        last_pass: PassView {
            sequence: pass.sequence,
            reason: pass.reason.to_owned(),
            at: pass.at,
            took_ms: pass.took.as_secs_f64() * 1_000.0,
            started: pass.started as u64,
        },
        instances: instances.collect(),
    })
}

async fn system_diagnostics(State(app): State<App>) -> Json<SystemDiagnostics> {
    let parts = app.parts();
    let agent = AgentProcess {
        version: crate::version().to_owned(),
        started_at: parts.started_at,
        resident_bytes: system::resident_bytes(),
        open_connections: parts.server.open_connections() as u64,
        connections_turned_away: parts.server.turned_away(),
        refused_keys: parts.gate.callers.refused(),
        link: link_view(&parts.link.borrow()),
    };
    Json(SystemDiagnostics { system: figures(&app), agent })
}

fn link_view(link: &LinkState) -> LinkView {
    match link.clone() {
        LinkState::Offline => LinkView::Offline,
        LinkState::Enrolling { problem } => LinkView::Enrolling { problem },
        LinkState::Linked { taken, failing, problem } => {
            LinkView::Linked { heartbeats_taken: taken, heartbeats_failing: failing, problem }
        }
    }
}

async fn log_diagnostics(State(app): State<App>) -> Response {
    log_answer(&app.parts().logs.tail(500, None))
}

/// Ends the process in order; systemd starts it again. Tools aren't touched.
async fn restart(State(app): State<App>) -> (StatusCode, Json<Accepted>) {
    tracing::info!("a caller asked for a restart");
    app.parts().shutdown.cancel();
    let message = "the agent ends now and is started again; tools keep running".to_owned();
    (StatusCode::ACCEPTED, Json(Accepted { success: true, message }))
}

/// What both of them fail with.
const NO_UPDATER: Failing =
    (501, "no_updater", "the agent was installed without its updater; `error` says how an update is made by hand");

impl From<NotAsked> for ApiError {
    fn from(error: NotAsked) -> Self {
        let (status, code) = match &error {
            NotAsked::NoUpdater => (StatusCode::NOT_IMPLEMENTED, "no_updater"),
            NotAsked::NotWritten(source) => {
                tracing::error!(%source, "a request for an update could not be written");
                (StatusCode::INSUFFICIENT_STORAGE, "no_space")
            }
        };
        Self::new(status, code, error.to_string())
    }
}

/// Asks the updater, which is another process, to look for a release now.
async fn redeploy(State(app): State<App>) -> Result<(StatusCode, Json<Accepted>), ApiError> {
    let updates = app.parts().updates.clone();
    // It waits for the disk.
    let asked = tokio::task::spawn_blocking(move || updates.ask(None)).await;
    asked.map_err(|error| NotAsked::NotWritten(std::io::Error::other(error)))??;
    tracing::info!("a caller asked for an update");
    let message =
        "the updater looks for a newer release now; GET /update tells how it goes, and tools keep running".to_owned();
    Ok((StatusCode::ACCEPTED, Json(Accepted { success: true, message })))
}

async fn update(State(app): State<App>) -> Result<Json<UpdateAnswer>, ApiError> {
    let update = app.parts().updates.state().ok_or(NotAsked::NoUpdater)?;
    let (version, target) = (crate::version().to_owned(), crate::TARGET.to_owned());
    Ok(Json(UpdateAnswer { success: true, version, target, update }))
}

async fn no_remote_shell() -> ApiError {
    ApiError::new(
        StatusCode::GONE,
        "no_remote_shell",
        "this agent runs no commands on the droplet; POST /tools/{ref}/exec runs one inside an instance's container",
    )
}
