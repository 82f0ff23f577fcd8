//! `GET /tools/{ref}/logs`: JSON lines, or server-sent events with `follow`.

use std::convert::Infallible;

use axum::body::Body;
use axum::extract::State;
use axum::http::header;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use dtma_api::output::{BrokenOff, OutputLine};
use futures_util::{Stream, StreamExt as _};

use super::super::App;
use super::super::error::ApiError;
use super::failures::engine_failed;
use super::params::{Named, Parameters};
use crate::engine::{EngineError, LogLine, LogOptions};

/// Lines given when the caller says neither `tail` nor `since`.
const DEFAULT_TAIL: u32 = 1000;

pub(super) async fn logs(
    State(app): State<App>,
    Named(name): Named,
    parameters: Parameters,
) -> Result<Response, ApiError> {
    let since = parameters.time("since")?;
    let asked = parameters.count("tail")?;
    let tail = if since.is_none() && !parameters.has("tail") { Some(DEFAULT_TAIL) } else { asked };
    let follow = parameters.flag("follow")?;
    let timestamps = parameters.flag_or("timestamps", true)?;
    let parts = app.parts();
    let mut lines = parts.instances.logs(&name, LogOptions { tail, since, follow }).peekable();
    if !follow {
        // A failure that shows before the first line can still be answered as one. With `follow` the first line may be hours away.
        if let Some(Err(error)) = std::pin::Pin::new(&mut lines).peek().await {
            return Err(engine_failed(error, "read the instance's log"));
        }
        return Ok(json_lines(lines, timestamps));
    }
    let ended = parts.shutdown.clone().cancelled_owned();
    let events = lines.take_until(ended).map(move |line| {
        let event = match line {
            Ok(line) => Event::default().json_data(shown(line, timestamps)),
            Err(_) => Event::default().event("error").json_data(broken_off()),
        };
        Ok::<_, Infallible>(event.unwrap_or_default())
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}

fn broken_off() -> BrokenOff {
    BrokenOff { error: "the log broke off".to_owned() }
}

fn shown(line: LogLine, timestamps: bool) -> OutputLine {
    OutputLine { timestamp: line.at.filter(|_| timestamps), stream: line.stream, message: line.message }
}

fn json_lines(lines: impl Stream<Item = Result<LogLine, EngineError>> + Send + 'static, timestamps: bool) -> Response {
    let bytes = lines.map(move |line| {
        let json = match line {
            Ok(line) => serde_json::to_vec(&shown(line, timestamps)),
            Err(_) => serde_json::to_vec(&broken_off()),
        };
        json.map(|mut bytes| {
            bytes.push(b'\n');
            bytes
        })
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(bytes)).into_response()
}
