//! `GET /tools/{ref}/stats`: what an instance uses, once or every second.

use std::convert::Infallible;

use axum::Json;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use dtma_api::Failure;
use dtma_api::usage::StatsAnswer;
use futures_util::StreamExt as _;

use super::super::App;
use super::super::error::ApiError;
use super::failures::not_inside;
use super::params::{Named, Parameters};
use crate::reconcile::NotInside;

const WHAT: &str = "read the instance's figures";

/// One JSON answer, or with `stream` one server-sent event a second until the instance stops; the last one then is an `error`.
pub(super) async fn stats(
    State(app): State<App>,
    Named(name): Named,
    parameters: Parameters,
) -> Result<Response, ApiError> {
    let parts = app.parts();
    if !parameters.flag("stream")? {
        let data = parts.instances.usage(&name).await.map_err(|failure| not_inside(failure, WHAT))?;
        return Ok(Json(StatsAnswer { success: true, data }).into_response());
    }
    let usage = parts.instances.usage_stream(&name).await.map_err(|failure| not_inside(failure, WHAT))?;
    let ended = parts.shutdown.clone().cancelled_owned();
    let events = usage.take_until(ended).map(|usage| {
        let event = match usage {
            Ok(usage) => Event::default().json_data(usage),
            Err(NotInside::NotRunning(name)) => {
                let failure = Failure::new("not_running", format!("the instance {name} does not run any more"));
                Event::default().event("error").json_data(failure)
            }
            Err(NotInside::Busy | NotInside::CannotStart(_) | NotInside::NoFigures(_) | NotInside::Engine(_)) => {
                let failure = Failure::new("broken_off", "the Docker Engine told no more");
                Event::default().event("error").json_data(failure)
            }
        };
        // Numbers and texts always serialise.
        Ok::<_, Infallible>(event.unwrap_or_default())
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}
