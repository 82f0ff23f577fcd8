//! The way from a link to one client's stream, bounded in bytes: what a client doesn't read waits with the server, and not in memory.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

/// Bytes that may wait for one client; a longer message waits alone.
const ROOM: u32 = 1024 * 1024;
/// Messages that may.
const DEPTH: usize = 64;
/// How long a client that reads nothing may hold the others of its server up, before its stream is cut off.
const PATIENCE: Duration = Duration::from_secs(2);

/// Takes messages for one client.
#[derive(Debug, Clone)]
pub(super) struct Outlet {
    pieces: mpsc::Sender<Piece>,
    room: Arc<Semaphore>,
}

/// One message on its way.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) message: Bytes,
    /// It is the answer.
    pub(super) last: bool,
    /// Given back when the message has been taken.
    _room: OwnedSemaphorePermit,
}

/// Which outlet it is.
#[derive(Debug)]
pub(super) struct Mark(Arc<Semaphore>);

impl PartialEq for Mark {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// A client that doesn't take its messages.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stuck;

/// Both ends of a new way.
pub(super) fn pipe() -> (Outlet, mpsc::Receiver<Piece>) {
    let (pieces, inlet) = mpsc::channel(DEPTH);
    (Outlet { pieces, room: Arc::new(Semaphore::new(ROOM as usize)) }, inlet)
}

fn cost(message: &Bytes) -> u32 {
    u32::try_from(message.len()).unwrap_or(ROOM).clamp(1, ROOM)
}

impl Outlet {
    /// Hands a message over, waiting a little for room. A client that is gone takes everything.
    pub(super) async fn put(&self, message: Bytes, last: bool) -> Result<(), Stuck> {
        let handing_over = async {
            let room = tokio::select! {
                room = Arc::clone(&self.room).acquire_many_owned(cost(&message)) => room,
                () = self.pieces.closed() => return,
            };
            if let Ok(room) = room {
                // Refused by nobody but a client that is gone.
                let _ = self.pieces.send(Piece { message, last, _room: room }).await;
            }
        };
        timeout(PATIENCE, handing_over).await.map_err(|_| Stuck)
    }

    /// Its client has gone.
    pub(super) fn is_gone(&self) -> bool {
        self.pieces.is_closed()
    }

    /// Tells it from others without keeping it open.
    pub(super) fn mark(&self) -> Mark {
        Mark(Arc::clone(&self.room))
    }

    /// Hands a message over if there is room now.
    pub(super) fn offer(&self, message: Bytes) -> Result<(), Stuck> {
        let room = Arc::clone(&self.room).try_acquire_many_owned(cost(&message)).map_err(|_| Stuck)?;
        self.pieces.try_send(Piece { message, last: false, _room: room }).map_err(|_| Stuck)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_not_read_waits_up_to_a_bound_and_then_the_client_is_stuck() {
        let (outlet, mut inlet) = pipe();
        let half = Bytes::from(vec![b'x'; 600 * 1024]);
        assert_eq!(outlet.put(half.clone(), false).await, Ok(()));
        let begun = tokio::time::Instant::now();
        assert_eq!(outlet.put(half.clone(), false).await, Err(Stuck));
        assert_eq!((begun.elapsed(), outlet.offer(half.clone())), (PATIENCE, Err(Stuck)));
        assert_eq!(inlet.recv().await.unwrap().message.len(), half.len());
        // Longer than all the room there is: alone, but not refused.
        let large = Bytes::from(vec![b'x'; 10 * 1024 * 1024]);
        assert_eq!(outlet.put(large, true).await, Ok(()));
        drop(inlet);
        assert_eq!(outlet.put(half, false).await, Ok(()), "nobody is there to be stuck");
    }
}
