//! Memory for what waits for clients: one budget for all clients of all servers of an agent.
//!
//! Each client has a bound of its own (see [`outlet`](super::outlet)), but there may be many clients, and a message may be 16 MiB. So whatever
//! waits is counted here, from when it is put before a client until it has gone to its connection, which is given it in slices. When there is no
//! room, whoever brings the next message waits, and with it its server. Those who read give room back all the time; those who don't are cut
//! off so that others needn't wait for them:
//! - at once, who has taken nothing for [`PATIENCE`];
//! - after the waiting has lasted for [`PATIENCE`], whoever has not taken a whole message in that time: reading one byte now and then
//!   is no way to keep others out.
//!
//! Of several that may be cut off the one that holds most goes first, and no more of them than has to. Where there is room nobody is.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};

/// Bytes that may wait: four of the longest messages.
const TOTAL: usize = 4 * crate::mcp::MAX_MESSAGE_BYTES;
/// How long a client that reads nothing may hold others up.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// What a connection is given at once. It keeps that much until it is sent, which isn't counted.
const SLICE: usize = 64 * 1024;

/// The room there is. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    total: usize,
    room: Arc<Semaphore>,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    cells: BTreeMap<u64, Arc<Cell>>,
}

/// A message that waits, or what is left of it. Dropped, it gives its room back.
#[derive(Debug)]
pub(super) struct Parcel {
    cell: Arc<Cell>,
    /// Where it is counted; what the agent says itself isn't.
    counted: Option<(Budget, u64)>,
    /// Bytes of it, when it was whole.
    length: usize,
}

#[derive(Debug)]
struct Cell {
    since: Instant,
    contents: Mutex<Contents>,
}

#[derive(Debug)]
struct Contents {
    /// None once its client was cut off.
    rest: Option<Bytes>,
    room: Option<OwnedSemaphorePermit>,
    /// Of the room of its client; closed when that is cut off.
    own: Option<OwnedSemaphorePermit>,
    /// When its client last took something of it.
    moved: Instant,
}

/// Its client didn't read, and was cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client did not read its messages")]
pub(super) struct CutOff;

impl Default for Budget {
    fn default() -> Self {
        Self::of(TOTAL)
    }
}

impl Budget {
    /// Room for so many bytes.
    pub(super) fn of(total: usize) -> Self {
        let room = Arc::new(Semaphore::new(total));
        Self(Arc::new(Inner { total, room, waiting: Mutex::default() }))
    }

    /// Counts a message in, waiting until there is room. `own` is what it takes of its client's own room.
    pub(super) async fn admit(&self, message: Bytes, own: OwnedSemaphorePermit) -> Parcel {
        let mut acquiring = std::pin::pin!(Arc::clone(&self.0.room).acquire_many_owned(self.cost(&message)));
        let since = Instant::now();
        let mut until = since;
        let room = loop {
            tokio::select! {
                biased;
                // It is never closed.
                room = &mut acquiring => break room.ok(),
                () = sleep_until(until) => until = self.make_room(since, Instant::now()),
            }
        };
        self.keep(message, room, Some(own))
    }

    /// Counts a message in that is for nobody in particular yet, if there is room now.
    pub(super) fn try_admit(&self, message: Bytes) -> Option<Parcel> {
        let room = Arc::clone(&self.0.room).try_acquire_many_owned(self.cost(&message)).ok()?;
        Some(self.keep(message, Some(room), None))
    }

    /// Bytes that wait now.
    #[cfg(test)]
    pub(super) fn taken(&self) -> usize {
        self.0.total - self.0.room.available_permits()
    }

    fn cost(&self, message: &Bytes) -> u32 {
        u32::try_from(message.len().clamp(1, self.0.total)).unwrap_or(u32::MAX)
    }

    fn keep(&self, message: Bytes, room: Option<OwnedSemaphorePermit>, own: Option<OwnedSemaphorePermit>) -> Parcel {
        let length = message.len();
        let cell = Arc::new(Cell::new(message, room, own));
        let mut waiting = self.waiting();
        let key = waiting.next;
        waiting.next += 1;
        waiting.cells.insert(key, Arc::clone(&cell));
        drop(waiting);
        Parcel { cell, counted: Some((self.clone(), key)), length }
    }

    /// Cuts one client off for somebody who has waited since `since`, if one may be. Returns when to look again.
    fn make_room(&self, since: Instant, now: Instant) -> Instant {
        let waiting = self.waiting();
        let mut next = now + PATIENCE;
        let mut largest: Option<(usize, &Arc<Cell>)> = None;
        for cell in waiting.cells.values() {
            let contents = cell.contents();
            let Some(rest) = &contents.rest else { continue };
            let due = (contents.moved + PATIENCE).min(cell.since.max(since) + PATIENCE);
            if due > now {
                next = next.min(due);
            } else if largest.is_none_or(|(most, _)| rest.len() > most) {
                largest = Some((rest.len(), cell));
            }
        }
        let Some((bytes, cell)) = largest else { return next };
        tracing::info!(bytes, "a client that does not read its messages was cut off, because others need the room");
        cell.contents().cut_off();
        now
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing that holds it can panic half-way.
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cell {
    fn new(message: Bytes, room: Option<OwnedSemaphorePermit>, own: Option<OwnedSemaphorePermit>) -> Self {
        let since = Instant::now();
        Self { since, contents: Mutex::new(Contents { rest: Some(message), room, own, moved: since }) }
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Contents {
    fn cut_off(&mut self) {
        self.rest = None;
        self.room = None;
        if let Some(own) = self.own.take() {
            own.semaphore().close();
        }
    }
}

impl Parcel {
    /// What the agent says itself.
    pub(super) fn ours(message: Bytes) -> Self {
        let length = message.len();
        Self { cell: Arc::new(Cell::new(message, None, None)), counted: None, length }
    }

    /// It is for a client now, whose own room it takes.
    pub(super) fn is_for(&self, own: OwnedSemaphorePermit) {
        self.cell.contents().own = Some(own);
    }

    /// Its client begins to read it, and may have others wait meanwhile. None when that was cut off.
    pub(super) fn taken(self) -> Option<Self> {
        let mut contents = self.cell.contents();
        if let Some(own) = &mut contents.own {
            drop(own.split(own.num_permits()));
        }
        contents.moved = Instant::now();
        let cut_off = contents.rest.is_none();
        drop(contents);
        (!cut_off).then_some(self)
    }

    /// How long it is, or was before parts of it were taken.
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// Puts it into other words, of about the same length.
    pub(super) fn reword(&mut self, words: impl FnOnce(Bytes) -> Bytes) {
        // Not under the lock: it may be long.
        let Some(message) = self.cell.contents().rest.clone() else { return };
        let message = words(message);
        self.length = message.len();
        let mut contents = self.cell.contents();
        if contents.rest.is_some() {
            contents.rest = Some(message);
        }
    }

    /// Reads what is left of it.
    pub(super) fn read<T>(&self, reader: impl FnOnce(&[u8]) -> T) -> T {
        let message = self.cell.contents().rest.clone().unwrap_or_default();
        reader(&message)
    }

    /// All of it.
    pub(super) fn whole(self) -> Bytes {
        self.cell.contents().rest.take().unwrap_or_default()
    }

    /// The next slice for its client's connection; none when that was all.
    pub(super) fn slice(&mut self) -> Option<Result<Bytes, CutOff>> {
        let mut contents = self.cell.contents();
        let Some(rest) = &mut contents.rest else { return Some(Err(CutOff)) };
        if rest.is_empty() {
            return None;
        }
        let slice = rest.split_to(rest.len().min(SLICE));
        let left = rest.len();
        contents.moved = Instant::now();
        // What is left is paid for, and no more.
        if let Some(room) = &mut contents.room {
            let spare = room.num_permits().saturating_sub(left);
            drop(room.split(spare));
        }
        drop(contents);
        // A connection that holds a part of the message would hold all of it.
        Some(Ok(if self.length > SLICE { Bytes::copy_from_slice(&slice) } else { slice }))
    }
}

impl Drop for Parcel {
    fn drop(&mut self) {
        if let Some((budget, key)) = &self.counted {
            budget.waiting().cells.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(bytes: usize) -> Bytes {
        Bytes::from(vec![b'x'; bytes])
    }

    /// A client's own room, all of which its message takes.
    fn own() -> (Arc<Semaphore>, OwnedSemaphorePermit) {
        let room = Arc::new(Semaphore::new(1));
        let all = Arc::clone(&room).try_acquire_owned().unwrap();
        (room, all)
    }

    async fn admit(budget: &Budget, bytes: usize) -> (Parcel, Duration) {
        let begun = Instant::now();
        let parcel = budget.admit(message(bytes), own().1).await;
        (parcel, begun.elapsed())
    }

    impl Parcel {
        fn is_cut_off(&self) -> bool {
            self.cell.contents().rest.is_none()
        }
    }

    const TICK: Duration = Duration::from_millis(2);

    #[tokio::test(start_paused = true)]
    async fn who_has_read_nothing_makes_room_at_once_and_who_holds_most_goes_first() {
        let budget = Budget::of(1000);
        let (room, all) = own();
        let large = budget.admit(message(700), all).await;
        let (small, _) = admit(&budget, 200).await;
        tokio::time::advance(PATIENCE).await;
        let (next, waited) = admit(&budget, 800).await;
        assert!(waited <= TICK, "{waited:?}");
        assert_eq!((large.is_cut_off(), small.is_cut_off(), next.is_cut_off()), (true, false, false));
        assert!(room.is_closed(), "nothing more is put before that client");
        let mut large = large;
        assert_eq!(large.slice(), Some(Err(CutOff)));
    }

    #[tokio::test(start_paused = true)]
    async fn who_reads_makes_room_without_being_cut_off() {
        let budget = Budget::of(4 * SLICE);
        let (mut reads, _) = admit(&budget, 4 * SLICE).await;
        let waits = tokio::spawn({
            let budget = budget.clone();
            async move { admit(&budget, SLICE + SLICE / 2).await }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(reads.slice().unwrap().unwrap().len(), SLICE);
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!waits.is_finished());
        assert_eq!(reads.slice().unwrap().unwrap().len(), SLICE);
        let (next, waited) = waits.await.unwrap();
        assert!(waited < PATIENCE && !next.is_cut_off() && !reads.is_cut_off());
        let rest: usize = std::iter::from_fn(|| reads.slice()).map(|slice| slice.unwrap().len()).sum();
        assert_eq!(rest, 2 * SLICE);
        drop((reads, next));
        assert_eq!((budget.0.room.available_permits(), budget.waiting().cells.len()), (4 * SLICE, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn who_reads_a_little_now_and_then_does_not_keep_others_out_for_long() {
        let budget = Budget::of(100 * SLICE);
        let (mut trickles, _) = admit(&budget, 100 * SLICE).await;
        let trickling = tokio::spawn(async move {
            while let Some(Ok(_)) = trickles.slice() {
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            trickles.is_cut_off()
        });
        let (_, waited) = admit(&budget, 50 * SLICE).await;
        assert!(waited >= PATIENCE && waited <= PATIENCE + TICK, "{waited:?}");
        assert!(trickling.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn while_there_is_room_nobody_is_cut_off_and_what_has_no_room_is_not_kept() {
        let budget = Budget::of(1000);
        let (first, _) = admit(&budget, 600).await;
        tokio::time::advance(10 * PATIENCE).await;
        let (second, waited) = admit(&budget, 400).await;
        assert_eq!(waited, Duration::ZERO);
        assert!(budget.try_admit(message(1)).is_none());
        assert!(!first.is_cut_off() && !second.is_cut_off());
        drop(first);
        assert_eq!(budget.try_admit(message(1)).unwrap().whole(), "x");
        // Longer than all the room there is: alone, but not refused.
        drop(second);
        assert_eq!(admit(&budget, 5000).await.1, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn however_many_wait_each_gets_its_turn() {
        let budget = Budget::of(1000);
        let clients = (0..20).map(|_| {
            let budget = budget.clone();
            // None of them ever reads.
            tokio::spawn(async move {
                let (parcel, _) = admit(&budget, 500).await;
                tokio::time::sleep(Duration::from_secs(3600)).await;
                parcel.is_cut_off()
            })
        });
        let clients: Vec<_> = clients.collect();
        let mut cut_off = 0;
        for client in clients {
            cut_off += usize::from(client.await.unwrap());
        }
        assert_eq!(cut_off, 18);
    }
}
