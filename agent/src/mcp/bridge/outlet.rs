//! The way from a link to one client's stream, bounded in bytes: what a client doesn't read waits with the server, and not in memory.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::budget::{Budget, PATIENCE, Parcel};
use super::switchboard::AskId;

/// Bytes that may wait for one client; a longer message waits alone.
pub(super) const ROOM: u32 = 1024 * 1024;
/// Messages that may.
const DEPTH: usize = 64;

/// Takes messages for one client.
#[derive(Debug, Clone)]
pub(super) struct Outlet {
    pieces: mpsc::Sender<Piece>,
    /// Its client's own.
    room: Arc<Semaphore>,
    budget: Budget,
}

/// One message on its way.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) message: Parcel,
    /// It is the answer.
    pub(super) last: bool,
    /// It is a request of the server, which waits for its answer.
    pub(super) ask: Option<AskId>,
}

/// Which outlet it is.
#[derive(Debug)]
pub(super) struct Mark(Arc<Semaphore>);

impl PartialEq for Mark {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Why a client doesn't get a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotPut {
    /// It doesn't take its messages.
    Stuck,
    /// It isn't there any more.
    Gone,
}

/// Both ends of a new way. What waits on it is counted in `budget`, too.
pub(super) fn pipe(budget: &Budget) -> (Outlet, mpsc::Receiver<Piece>) {
    let (pieces, inlet) = mpsc::channel(DEPTH);
    (Outlet { pieces, room: Arc::new(Semaphore::new(ROOM as usize)), budget: budget.clone() }, inlet)
}

fn cost(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(ROOM).clamp(1, ROOM)
}

impl Outlet {
    /// Hands a message over, waiting a little for room.
    pub(super) async fn put(&self, message: Bytes, last: bool, ask: Option<AskId>) -> Result<(), NotPut> {
        let putting = async {
            let placing = async {
                let place = self.pieces.reserve().await;
                (place, Arc::clone(&self.room).acquire_many_owned(cost(message.len())).await)
            };
            let (place, room) = timeout(PATIENCE, placing).await.map_err(|_| NotPut::Stuck)?;
            // Closed because the client was cut off.
            let (place, room) = (place.map_err(|_| NotPut::Gone)?, room.map_err(|_| NotPut::Stuck)?);
            // That there is no room because of others isn't this client's fault; it doesn't last.
            let message = self.budget.admit(message, room).await;
            place.send(Piece { message, last, ask });
            Ok(())
        };
        tokio::select! {
            put = putting => put,
            () = self.pieces.closed() => Err(NotPut::Gone),
        }
    }

    /// Its client has gone.
    pub(super) fn is_gone(&self) -> bool {
        self.pieces.is_closed()
    }

    /// Tells it from others without keeping it open.
    pub(super) fn mark(&self) -> Mark {
        Mark(Arc::clone(&self.room))
    }

    /// Hands a message over that is counted already, if there is room now.
    pub(super) fn offer(&self, message: Parcel, ask: Option<AskId>) -> Result<(), NotPut> {
        let room = Arc::clone(&self.room).try_acquire_many_owned(cost(message.len())).map_err(|_| NotPut::Stuck)?;
        message.is_for(room);
        self.pieces.try_send(Piece { message, last: false, ask }).map_err(|_| NotPut::Stuck)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_not_read_waits_up_to_a_bound_and_then_the_client_is_stuck() {
        let budget = Budget::default();
        let (outlet, mut inlet) = pipe(&budget);
        let half = Bytes::from(vec![b'x'; 600 * 1024]);
        assert_eq!(outlet.put(half.clone(), false, None).await, Ok(()));
        let begun = tokio::time::Instant::now();
        assert_eq!(outlet.put(half.clone(), false, None).await, Err(NotPut::Stuck));
        let counted = budget.try_admit(half.clone()).unwrap();
        assert_eq!((begun.elapsed(), outlet.offer(counted, None)), (PATIENCE, Err(NotPut::Stuck)));
        assert_eq!(inlet.recv().await.unwrap().message.len(), half.len());
        // Longer than all the room there is: alone, but not refused.
        let large = Bytes::from(vec![b'x'; 10 * 1024 * 1024]);
        assert_eq!(outlet.put(large, true, None).await, Ok(()));
        drop(inlet);
        assert_eq!(outlet.put(half, false, None).await, Err(NotPut::Gone), "nobody is there to be stuck");
    }
}
