//! One two-way channel of JSON-RPC messages to one server, whatever carries it: a container's standard streams, legacy HTTP+SSE, or a
//! websocket. Messages are whole and unread; order is kept. Both directions are bounded, so that a side that doesn't read holds the
//! other one up instead of filling memory.

pub mod session;
pub mod sse;
pub mod stdio;
pub mod websocket;

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

/// Messages under way in one direction before the sender has to wait. Few: each may have 16 MiB.
pub const DEPTH: usize = 2;

/// How long opening a channel may take where nothing has to be made for it.
const PATIENCE: Duration = Duration::from_secs(10);

/// An open channel. Dropping it closes it.
#[derive(Debug)]
pub struct Link {
    /// Whole messages for the server, without line ends or framing. Sending fails once the server is gone.
    pub to_server: mpsc::Sender<Bytes>,
    /// Whole messages from the server. The last item says why there are no more; then it ends.
    pub from_server: mpsc::Receiver<Result<Bytes, LinkEnd>>,
}

/// Why a channel ended, or was never opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct LinkEnd {
    /// For a person; nothing in it is secret.
    pub reason: String,
}

impl LinkEnd {
    /// An end for this reason.
    pub fn because(reason: impl Into<String>) -> Self {
        Self { reason: reason.into() }
    }
}

/// Opens channels to one server.
#[async_trait]
pub trait Dial: Send + Sync + 'static {
    /// One new channel. It is answered within a few seconds, whatever the server does.
    ///
    /// # Errors
    /// When the server isn't there, or doesn't speak what it should.
    async fn dial(&self) -> Result<Link, LinkEnd>;

    /// How long that may take; nothing of the server's own doing is part of it.
    fn patience(&self) -> Duration {
        PATIENCE
    }
}

#[cfg(test)]
mod tests;
