//! A container of a session's own as a link: asked for when the session begins, and given back when nobody is at either end any more.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dtma_api::InstanceName;
use tokio::sync::mpsc;

use super::stdio::StdioDialer;
use super::{Dial, Link, LinkEnd};
use crate::engine::{ContainerId, Engine};
use crate::reconcile::{Place, Sessions};

/// Making and starting a container on a busy host, after others that are wanted at the same time.
const PATIENCE: Duration = Duration::from_secs(30);

/// Gives each link a container of its own, beside the instance's.
pub struct SessionDialer {
    engine: Arc<dyn Engine>,
    sessions: Sessions,
    instance: InstanceName,
    /// The instance's own container.
    beside: ContainerId,
    most: Option<u16>,
}

impl SessionDialer {
    /// For sessions with the server of `instance`, whose own container is `beside`; `most` at once, as [`Sessions::ask`] has it.
    pub fn new(
        engine: Arc<dyn Engine>,
        sessions: Sessions,
        instance: InstanceName,
        beside: ContainerId,
        most: Option<u16>,
    ) -> Self {
        Self { engine, sessions, instance, beside, most }
    }
}

#[async_trait]
impl Dial for SessionDialer {
    async fn dial(&self) -> Result<Link, LinkEnd> {
        let mut place = self.sessions.ask(&self.instance, &self.beside, self.most);
        let container = place.container().await.map_err(LinkEnd::because)?;
        // Its server waits for its client to begin, so nothing is missed.
        let dialer = StdioDialer::new(Arc::clone(&self.engine), container);
        let link = tokio::select! {
            link = dialer.dial() => link?,
            // Docker may not say so to whoever attaches.
            why = place.over() => return Err(LinkEnd::because(why)),
        };
        Ok(kept(link, place))
    }

    fn patience(&self) -> Duration {
        PATIENCE
    }
}

/// The same link, which ends with the place at the latest, and keeps it as long as it lasts.
fn kept(link: Link, mut place: Place) -> Link {
    let Link { to_server, mut from_server } = link;
    // One, on top of those in the link itself: each may have 16 MiB, and an instance many sessions.
    let (out, kept) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let message = tokio::select! {
                // What the process said last comes before its end.
                biased;
                message = from_server.recv() => message,
                why = place.over() => Some(Err(LinkEnd::because(why))),
                () = out.closed() => return,
            };
            let Some(message) = message else { return };
            let ended = message.is_err();
            tokio::select! {
                biased;
                sent = out.send(message) => if ended || sent.is_err() { return },
                // Nobody reads; what is over is over all the same.
                _ = place.over(), if !ended => return,
            }
        }
    });
    Link { to_server, from_server: kept }
}
