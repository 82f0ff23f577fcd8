//! Progress of one environment as server-sent events: what happened in its present run, then what happens.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::response::Sse;
use axum::response::sse::{Event, KeepAlive};
use dtma_api::environment::{EnvironmentEvent, EnvironmentStatus};
use dtma_api::{AgentId, EnvironmentId};
use futures_util::Stream;
use tokio::sync::watch;

use super::extract::Path;
use super::{ApiError, App, internal};

const KEEP_ALIVE: Duration = Duration::from_secs(15);

struct Follower {
    app: App,
    id: EnvironmentId,
    changes: watch::Receiver<u64>,
    run: u32,
    sent: i64,
    waiting: VecDeque<(i64, EnvironmentEvent)>,
    /// The environment is gone: nothing will follow what is waiting.
    last: bool,
}

pub(super) async fn stream(
    State(app): State<App>,
    Path(agent): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let environment = internal::find(&app, &AgentId::try_from(agent)?).await?;
    let changes = app.board.watch(environment.id);
    let follower = Follower {
        app,
        id: environment.id,
        changes,
        run: environment.run,
        sent: 0,
        waiting: VecDeque::new(),
        last: false,
    };
    let events = futures_util::stream::unfold(follower, |mut follower| async move {
        let (sequence, event) = follower.next().await?;
        // The types have no shape that can't be JSON.
        let message = Event::default().id(sequence.to_string()).json_data(&event).unwrap_or_default();
        Some((Ok(message), follower))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

impl Follower {
    /// The next event; none when the environment is gone, the process ends, or the database fails (the caller may come again).
    async fn next(&mut self) -> Option<(i64, EnvironmentEvent)> {
        loop {
            if let Some((sequence, event)) = self.waiting.pop_front() {
                self.sent = sequence;
                return Some((sequence, event));
            }
            if self.last {
                return None;
            }
            // Marked before reading: a change after this wakes us again.
            self.changes.mark_unchanged();
            self.read().await?;
            if self.waiting.is_empty() && !self.last {
                tokio::select! {
                    () = self.app.stop.cancelled() => return None,
                    changed = self.changes.changed() => changed.ok()?,
                }
            }
        }
    }

    async fn read(&mut self) -> Option<()> {
        let store = self.app.board.store();
        let environment = store.environment(self.id).await.ok()??;
        // The row first: events of a state it shows are in the database by now.
        self.waiting = store.events(self.id, self.run, self.sent).await.ok()?.into();
        if self.waiting.is_empty() && environment.run != self.run {
            self.run = environment.run;
            self.waiting = store.events(self.id, self.run, self.sent).await.ok()?.into();
        }
        self.last = environment.state.status() == EnvironmentStatus::Deprovisioned;
        Some(())
    }
}
