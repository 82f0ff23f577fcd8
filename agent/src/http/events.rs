//! `GET /events` and `GET /tools/{ref}/events`: what happens, as server-sent events.
//!
//! The last events come first, so that the reason of a failed deploy can be read after the fact; `?follow=false` ends there. An event's
//! id is its sequence number; a reader that reconnects with `Last-Event-ID` misses and repeats nothing that is still kept.

use std::convert::Infallible;

use axum::extract::{FromRequestParts, State};
use axum::http::{HeaderMap, request};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use dtma_api::InstanceName;
use dtma_api::instance::InstanceEvent;
use futures_util::{StreamExt as _, stream};
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;

use super::App;
use super::error::ApiError;
use super::table::{NAMED, Operation, Table};
use super::tools::params::{Parameters, reference, unresolved};

/// Both routes.
pub(super) fn routes<T: Table>(table: T) -> T {
    let describe = |summary| {
        Operation::new(summary)
            .described("The last events come first, so that the reason of a failed deploy can be read after the fact. An event's id is its `sequence`.")
            .flag("follow", true, "Go on with what happens from now on; otherwise the answer ends with the last event.")
            .header("Last-Event-ID", "The last event the reader has seen; what came before isn't sent again.")
            .streams::<InstanceEvent>(200, "The events, and comments to keep the connection open.")
    };
    table
        .get("/events", all, || {
            describe("What happens to every instance").fails(&[(
                400,
                "invalid_request",
                "`follow` is neither true nor false",
            )])
        })
        .get("/tools/{ref}/events", of_one, || {
            describe("What happens to one instance, also to one whose deploy failed").fails(&NAMED)
        })
}

async fn all(State(app): State<App>, parameters: Parameters, headers: HeaderMap) -> Result<Response, ApiError> {
    Ok(events(&app, None, parameters.flag_or("follow", true)?, last_seen(&headers)))
}

/// An instance that is there, or one that was and has left events: a failed deploy can be asked about by its name.
struct Remembered(InstanceName);

impl FromRequestParts<App> for Remembered {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut request::Parts, app: &App) -> Result<Self, ApiError> {
        let reference = reference(parts, app).await?;
        let instances = &app.parts().instances;
        instances.find(&reference).await.map(Self).or_else(|unknown| {
            let (history, _) = instances.events_with_history();
            let left = history.into_iter().map(|event| event.instance_name_on_toolbox);
            left.into_iter().find(|name| name.as_str() == reference).map(Self).ok_or_else(|| unresolved(unknown))
        })
    }
}

async fn of_one(
    State(app): State<App>,
    Remembered(name): Remembered,
    parameters: Parameters,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    Ok(events(&app, Some(name), parameters.flag_or("follow", true)?, last_seen(&headers)))
}

fn last_seen(headers: &HeaderMap) -> Option<u64> {
    headers.get("last-event-id")?.to_str().ok()?.parse().ok()
}

fn events(app: &App, only: Option<InstanceName>, follow: bool, last_seen: Option<u64>) -> Response {
    let (history, live) = app.parts().instances.events_with_history();
    // Numbers begin anew with every agent process; a higher one than any given out is from an earlier process.
    let last_seen = last_seen.filter(|seen| history.last().is_some_and(|last| *seen <= last.sequence));
    let wanted = move |event: &InstanceEvent| {
        only.as_ref().is_none_or(|name| name == &event.instance_name_on_toolbox)
            && last_seen.is_none_or(|seen| event.sequence > seen)
    };
    let live = BroadcastStream::new(live);
    let live = if follow { live.left_stream() } else { stream::empty().right_stream() };
    let ended = app.parts().shutdown.clone().cancelled_owned();
    let events = stream::iter(history.into_iter().map(Ok)).chain(live).take_until(ended).filter_map(move |event| {
        let shown = match event {
            Ok(event) if wanted(&event) => Some(shown(&event)),
            Ok(_) => None,
            Err(BroadcastStreamRecvError::Lagged(missed)) => {
                Some(Event::default().comment(format!("{missed} events were missed")))
            }
        };
        std::future::ready(shown.map(Ok::<_, Infallible>))
    });
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

fn shown(event: &InstanceEvent) -> Event {
    // Texts and numbers always serialise.
    Event::default().id(event.sequence.to_string()).json_data(event).unwrap_or_default()
}
