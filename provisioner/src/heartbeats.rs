//! Heartbeats on their way to disk: many wait together for one transaction, and each is answered once it is committed.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::metrics::Metrics;
use crate::store::{Store, StoredHeartbeat};

/// Waiting at most; beyond that agents are told to come again.
const WAITING: usize = 8192;
/// In one transaction at most.
const BATCH: usize = 1024;

/// Hands heartbeats to the writer.
#[derive(Clone)]
pub struct Heartbeats {
    queue: mpsc::Sender<Pending>,
}

struct Pending {
    heartbeat: StoredHeartbeat,
    kept: oneshot::Sender<bool>,
}

/// Why a heartbeat was not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotKept {
    /// Too many are waiting.
    #[error("too many heartbeats are waiting")]
    Busy,
    /// The database failed; the writer has logged why.
    #[error("the heartbeat could not be stored")]
    Failed,
}

impl Heartbeats {
    /// Starts the writer. It ends once every handle is gone and all that waits is written.
    pub fn start(store: Arc<dyn Store>, metrics: Arc<Metrics>) -> (Self, JoinHandle<()>) {
        let (queue, waiting) = mpsc::channel(WAITING);
        (Self { queue }, tokio::spawn(write(waiting, store, metrics)))
    }

    /// Resolves when the heartbeat is on disk.
    ///
    /// # Errors
    /// When it isn't and won't be.
    pub async fn keep(&self, heartbeat: StoredHeartbeat) -> Result<(), NotKept> {
        let (kept, answer) = oneshot::channel();
        self.queue.try_send(Pending { heartbeat, kept }).map_err(|_| NotKept::Busy)?;
        if answer.await.unwrap_or(false) { Ok(()) } else { Err(NotKept::Failed) }
    }
}

async fn write(mut waiting: mpsc::Receiver<Pending>, store: Arc<dyn Store>, metrics: Arc<Metrics>) {
    let mut batch = Vec::new();
    // What arrives while one transaction is being written forms the next: under load they grow, idle they hold one.
    while waiting.recv_many(&mut batch, BATCH).await > 0 {
        let (heartbeats, answers): (Vec<_>, Vec<_>) =
            batch.drain(..).map(|pending: Pending| (pending.heartbeat, pending.kept)).unzip();
        let kept = match store.keep_heartbeats(&heartbeats).await {
            Ok(()) => {
                metrics.heartbeats_committed(heartbeats.len() as u64);
                true
            }
            Err(error) => {
                tracing::error!(error = %error, cause = %error.source, "heartbeats lost");
                false
            }
        };
        for answer in answers {
            // An agent that hung up needs no answer.
            let _ = answer.send(kept);
        }
    }
}
