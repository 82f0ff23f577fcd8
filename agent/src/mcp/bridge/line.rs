//! One open link and everybody who speaks over it: the switchboard says who gets what, this hands it over.
//!
//! Nothing waits for everybody: a client that doesn't read is cut off after a moment, and what the server asks is never answered from the
//! task that reads from it, so that a server that stops reading while it writes can't stop us from reading.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use bytes::Bytes;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::budget::{Budget, Parcel};
use super::envelope::{self, Envelope, INTERNAL_ERROR, MAX_ENTRIES, Malformed, NoBatch};
use super::outlet::{Mark, NotPut, Outlet, Piece, ROOM, pipe};
use super::switchboard::{Abilities, AskId, CallId, Delivery, Owner, Refusal, SessionKey, Switchboard};
use crate::mcp::link::{Link, LinkEnd};

/// Messages kept for a session whose client doesn't listen at the moment: it may be about to, or to come back.
const BACKLOG: usize = 16;
/// A longer notification isn't kept.
const BACKLOG_MESSAGE_BYTES: usize = 16 * 1024;
/// Bytes kept for one session: what may wait on the stream, once it comes.
const BACKLOG_BYTES: usize = ROOM as usize;
/// Messages of our own that wait because the server doesn't read.
const WAITING: usize = 64;
/// So many lines of noise are logged one by one, and then every so-manieth.
const NOISE_LOGGED: u64 = 10;
const NOISE_EVERY: u64 = 1000;

/// One open link.
#[derive(Debug)]
pub(super) struct Line {
    /// For the log.
    instance: String,
    state: Mutex<State>,
    to_server: mpsc::Sender<Bytes>,
    waiting: Arc<Semaphore>,
    noise: AtomicU64,
    ended: OnceLock<LinkEnd>,
    /// Memory for what waits for clients.
    budget: Budget,
    /// Ends the task that reads.
    _reading: DropGuard,
}

#[derive(Debug)]
struct State {
    board: Switchboard,
    calls: HashMap<CallId, Outlet>,
    /// Of the sessions whose clients listen.
    streams: BTreeMap<SessionKey, Outlet>,
    backlog: BTreeMap<SessionKey, VecDeque<Kept>>,
}

/// A message that waits for its client to listen.
#[derive(Debug)]
struct Kept {
    message: Parcel,
    /// It is a request of the server, which is answered whatever comes of it.
    ask: Option<AskId>,
}

impl State {
    /// Keeps a message until its client listens, or hands it over if that does already. Returns what the server is told if neither can be.
    fn lay_by(&mut self, session: SessionKey, kept: Kept, now: Instant) -> Option<Bytes> {
        let Kept { message, ask } = kept;
        // Then it has been answered in its client's place, as has all that one who left was asked.
        if !self.board.is_open(session) || ask.is_some_and(|ask| !self.board.is_asked(ask)) {
            return None;
        }
        if let Some(outlet) = self.streams.get(&session).filter(|outlet| !outlet.is_gone()) {
            let stuck = outlet.offer(message, ask).is_err();
            return ask.filter(|_| stuck).and_then(|ask| self.board.refuse(ask, NOT_READING));
        }
        let backlog = self.backlog.entry(session).or_default();
        let bytes = |backlog: &VecDeque<Kept>| backlog.iter().map(|kept| kept.message.len()).sum::<usize>();
        while backlog.len() >= BACKLOG || bytes(backlog) + message.len() > BACKLOG_BYTES {
            match backlog.iter().position(|kept| kept.ask.is_none()) {
                Some(notification) => drop(backlog.remove(notification)),
                None => return self.board.refuse(ask?, NOT_LISTENING),
            }
        }
        backlog.push_back(Kept { message, ask });
        if let Some(ask) = ask {
            self.board.waits(ask, true, now);
        }
        None
    }
}

/// What the server is told about what it asked somebody who can't be reached.
const NOT_LISTENING: &str = "the client does not listen, and too much waits for it already";
const NOT_READING: &str = "the client does not read its messages";

/// Why a request didn't go out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotSent {
    /// It may not.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There is nobody to send it to.
    #[error(transparent)]
    Ended(#[from] LinkEnd),
}

impl Line {
    /// Begins to read from `link`. One that is `exclusive` is of one client only.
    pub(super) fn new(link: Link, instance: &str, exclusive: bool, budget: Budget) -> Arc<Self> {
        let reading = CancellationToken::new();
        let first = getrandom::u32().unwrap_or_default();
        let state = State {
            board: Switchboard::new(first, exclusive),
            calls: HashMap::new(),
            streams: BTreeMap::new(),
            backlog: BTreeMap::new(),
        };
        let line = Arc::new(Self {
            instance: instance.to_owned(),
            state: Mutex::new(state),
            to_server: link.to_server,
            waiting: Arc::new(Semaphore::new(WAITING)),
            noise: AtomicU64::new(0),
            ended: OnceLock::new(),
            budget,
            _reading: reading.clone().drop_guard(),
        });
        tokio::spawn(read(Arc::downgrade(&line), link.from_server, reading));
        line
    }

    /// Why there is nobody at the other end any more.
    pub(super) fn ended(&self) -> Option<&LinkEnd> {
        self.ended.get()
    }

    /// How many calls are under way.
    pub(super) fn under_way(&self) -> usize {
        self.state().board.calls()
    }

    /// A client comes.
    pub(super) fn open(&self, session: SessionKey, abilities: Abilities) {
        self.state().board.open(session, abilities);
    }

    /// A client goes, and what it has under way with it.
    pub(super) fn close(&self, session: SessionKey) {
        let mut state = self.state();
        // Only its own: another's whose answer is just being handed over isn't on the board any more.
        let its: Vec<CallId> = state.board.calls_of(Owner::Session(session)).collect();
        let messages = state.board.close(session);
        state.streams.remove(&session);
        state.backlog.remove(&session);
        for call in its {
            state.calls.remove(&call);
        }
        drop(state);
        messages.into_iter().for_each(|message| self.post(message));
    }

    /// The stream of what is for a session and belongs to no call. An earlier one ends.
    pub(super) fn listen(self: &Arc<Self>, session: SessionKey) -> Listening {
        let (outlet, inlet) = pipe(&self.budget);
        let mark = outlet.mark();
        let mut state = self.state();
        let mut refusals = Vec::new();
        for Kept { message, ask } in state.backlog.remove(&session).unwrap_or_default() {
            // Others needed its room more.
            let Some(message) = message.taken() else {
                refusals.extend(ask.and_then(|ask| state.board.refuse(ask, NOT_LISTENING)));
                continue;
            };
            match ask {
                Some(ask) if !state.board.is_asked(ask) => continue,
                Some(ask) => state.board.waits(ask, false, Instant::now()),
                None => {}
            }
            // It fits: a backlog is not larger than what may wait.
            let _ = outlet.offer(message, ask);
        }
        if self.ended().is_none() {
            state.streams.insert(session, outlet);
            state.board.listens(session, true);
        }
        drop(state);
        refusals.into_iter().for_each(|refusal| self.post(refusal));
        Listening { line: Arc::clone(self), session, mark, inlet }
    }

    /// Sends a request; its answer and what belongs to it comes from what is returned. Dropping that cancels it.
    pub(super) async fn call(self: &Arc<Self>, owner: Owner, request: &Envelope<'_>) -> Result<Pending, NotSent> {
        let (mut pending, message) = {
            let mut state = self.state();
            if let Some(end) = self.ended() {
                return Err(end.clone().into());
            }
            let (call, message) = state.board.request(owner, request)?;
            let (outlet, inlet) = pipe(&self.budget);
            state.calls.insert(call, outlet);
            let pending = Pending { line: Arc::clone(self), call, id: request.id.to_owned(), inlet, open: true };
            (pending, message)
        };
        if self.to_server.send(message).await.is_err() {
            // It was never sent, so whoever asks may ask again over another link.
            pending.open = false;
            self.end(LinkEnd::because("the server does not read any more"));
            return Err(self.ended().cloned().unwrap_or_else(|| LinkEnd::because("the connection ended")).into());
        }
        Ok(pending)
    }

    /// Passes a client's notification on.
    pub(super) async fn notify(&self, owner: Owner, notification: &Envelope<'_>) -> Result<(), LinkEnd> {
        let deliveries = self.state().board.notification(owner, notification);
        // Clients first: the server may not read, and whoever waits for it here may go away meanwhile.
        let mut to_server = Vec::new();
        for delivery in deliveries {
            match delivery {
                Delivery::Server(message) => to_server.push(message),
                other => self.hand_over(other).await,
            }
        }
        for message in to_server {
            self.send(message).await?;
        }
        Ok(())
    }

    /// Passes a client's answer to a request of the server on; one to a request that isn't there goes nowhere.
    pub(super) async fn respond(&self, session: SessionKey, response: &Envelope<'_>) -> Result<(), LinkEnd> {
        let message = self.state().board.response(session, response);
        match message {
            Some(message) => self.send(message).await,
            None => Ok(()),
        }
    }

    async fn send(&self, message: Bytes) -> Result<(), LinkEnd> {
        if let Some(end) = self.ended() {
            return Err(end.clone());
        }
        self.to_server.send(message).await.map_err(|_| LinkEnd::because("the server does not read any more"))
    }

    /// Sends without waiting for a server that doesn't read.
    fn post(&self, message: Bytes) {
        match self.to_server.try_send(message) {
            Ok(()) | Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(message)) => {
                let Ok(permit) = Arc::clone(&self.waiting).try_acquire_owned() else {
                    tracing::debug!(instance = self.instance, "the server does not read; it is not told everything");
                    return;
                };
                let to_server = self.to_server.clone();
                tokio::spawn(async move {
                    let _ = to_server.send(message).await;
                    drop(permit);
                });
            }
        }
    }

    async fn receive(&self, message: Bytes) {
        // As clients of their own would read it: a byte that isn't UTF-8 is one in a text, and no reason never to answer.
        let message = match std::str::from_utf8(&message) {
            Ok(_) => message,
            Err(_) => Bytes::from(String::from_utf8_lossy(&message).into_owned()),
        };
        if message.first() != Some(&b'[') {
            return self.receive_one(&message).await;
        }
        // One version of the protocol has batches.
        match envelope::batch(&message) {
            Ok(batch) => {
                for one in batch {
                    self.receive_one(one.get().as_bytes()).await;
                }
            }
            Err(NoBatch::NotJson) => self.note_noise(&Malformed::NotJson, message.len()),
            // Answers may be in it, for which nobody shall wait.
            Err(NoBatch::TooMany) => {
                self.end(LinkEnd::because(format!("it sent a batch of more than {MAX_ENTRIES} messages")));
            }
        }
    }

    async fn receive_one(&self, message: &[u8]) {
        let deliveries = self.state().board.take(message, Instant::now());
        match deliveries {
            Ok(deliveries) => {
                for delivery in deliveries {
                    self.hand_over(delivery).await;
                }
            }
            Err(malformed) => self.note_noise(&malformed, message.len()),
        }
    }

    /// What a server prints beside its messages is in its log; here it only says how much.
    fn note_noise(&self, malformed: &Malformed, bytes: usize) {
        let count = self.noise.fetch_add(1, Ordering::Relaxed) + 1;
        if count <= NOISE_LOGGED || count.is_multiple_of(NOISE_EVERY) {
            tracing::debug!(instance = self.instance, %malformed, bytes, count, "a message of the server was skipped");
        }
    }

    async fn hand_over(&self, delivery: Delivery) {
        match delivery {
            Delivery::Answer(call, message) => {
                let outlet = self.state().calls.remove(&call);
                if let Some(outlet) = outlet
                    && outlet.put(message, true, None).await == Err(NotPut::Stuck)
                {
                    self.note_stuck();
                }
            }
            Delivery::Related(call, message) => {
                let outlet = self.state().calls.get(&call).cloned();
                if let Some(outlet) = outlet
                    && outlet.put(message, false, None).await == Err(NotPut::Stuck)
                {
                    self.note_stuck();
                    self.hang_up(call);
                }
            }
            Delivery::Session(session, message) => self.tell(session, message, None).await,
            Delivery::Ask(session, ask, message) => self.tell(session, message, Some(ask)).await,
            Delivery::Server(message) => self.post(message),
        }
    }

    async fn tell(&self, session: SessionKey, message: Bytes, ask: Option<AskId>) {
        let outlet = self.state().streams.get(&session).cloned();
        let Some(outlet) = outlet else { return self.keep(session, message, ask) };
        match outlet.put(message.clone(), false, ask).await {
            Ok(()) => {}
            Err(NotPut::Gone) => {
                self.stops_listening(session, &outlet.mark());
                self.keep(session, message, ask);
            }
            Err(NotPut::Stuck) => {
                self.note_stuck();
                self.stops_listening(session, &outlet.mark());
                let refusal = ask.and_then(|ask| self.state().board.refuse(ask, NOT_READING));
                refusal.into_iter().for_each(|refusal| self.post(refusal));
            }
        }
    }

    fn note_stuck(&self) {
        tracing::info!(instance = self.instance, "a client that does not read its messages was cut off");
    }

    fn keep(&self, session: SessionKey, message: Bytes, ask: Option<AskId>) {
        let refusal = match (message.len() <= BACKLOG_MESSAGE_BYTES, ask) {
            (false, None) => return,
            // Nobody waits for room to be made for somebody who may not come back.
            (_, ask) => match (self.budget.try_admit(message), ask) {
                (Some(message), ask) => self.state().lay_by(session, Kept { message, ask }, Instant::now()),
                (None, Some(ask)) => self.state().board.refuse(ask, NOT_LISTENING),
                (None, None) => None,
            },
        };
        refusal.into_iter().for_each(|refusal| self.post(refusal));
    }

    /// Answers what the server has waited for long enough.
    fn expire(&self) {
        let refusals = self.state().board.expire(Instant::now());
        refusals.into_iter().for_each(|refusal| self.post(refusal));
    }

    /// Unless another stream has taken the place of this one.
    fn stops_listening(&self, session: SessionKey, mark: &Mark) {
        let mut state = self.state();
        if state.streams.get(&session).is_some_and(|there| there.mark() == *mark) {
            state.streams.remove(&session);
            state.board.listens(session, false);
        }
    }

    fn hang_up(&self, call: CallId) {
        let mut state = self.state();
        let messages = state.board.hang_up(call);
        state.calls.remove(&call);
        drop(state);
        messages.into_iter().for_each(|message| self.post(message));
    }

    /// Everything under way fails now: whoever waits finds its way closed.
    pub(super) fn end(&self, end: LinkEnd) {
        let mut state = self.state();
        let under_way = state.board.calls();
        if self.ended.set(end).is_err() {
            return;
        }
        state.board.end();
        state.calls.clear();
        state.streams.clear();
        state.backlog.clear();
        drop(state);
        let reason = self.ended().map(ToString::to_string);
        tracing::info!(instance = self.instance, reason, under_way, "the connection to an MCP server ended");
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that holds it can panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn read(line: Weak<Line>, mut from: mpsc::Receiver<Result<Bytes, LinkEnd>>, dropped: CancellationToken) {
    loop {
        // Only what is read here can bring the next one nearer.
        let Some(due) = line.upgrade().map(|line| line.state().board.due()) else { return };
        let expiry = async {
            match due {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let message = tokio::select! {
            () = dropped.cancelled() => return,
            message = from.recv() => message,
            () = expiry => {
                line.upgrade().inspect(|line| line.expire());
                continue;
            }
        };
        let Some(line) = line.upgrade() else { return };
        match message {
            Some(Ok(message)) => {
                line.receive(message).await;
                if line.ended().is_some() {
                    return;
                }
            }
            Some(Err(end)) => return line.end(end),
            None => return line.end(LinkEnd::because("the connection to the server ended")),
        }
    }
}

/// A client listening. Dropped, it doesn't any more.
#[derive(Debug)]
pub(super) struct Listening {
    line: Arc<Line>,
    session: SessionKey,
    mark: Mark,
    inlet: mpsc::Receiver<Piece>,
}

impl Listening {
    /// The next message; nothing when the link has ended, the client listens elsewhere, or it was cut off. Safe to drop half-way.
    pub(super) async fn next(&mut self) -> Option<Parcel> {
        self.inlet.recv().await.and_then(|piece| piece.message.taken())
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.line.stops_listening(self.session, &self.mark);
        // What it has not read waits for the next.
        self.inlet.close();
        let mut refusals = Vec::new();
        while let Ok(Piece { message, ask, .. }) = self.inlet.try_recv() {
            let mut state = self.line.state();
            refusals.extend(match message.taken() {
                Some(message) => state.lay_by(self.session, Kept { message, ask }, Instant::now()),
                None => ask.and_then(|ask| state.board.refuse(ask, NOT_READING)),
            });
        }
        refusals.into_iter().for_each(|refusal| self.line.post(refusal));
    }
}

/// A call under way. Dropped before its answer has come, it is cancelled.
#[derive(Debug)]
pub(super) struct Pending {
    line: Arc<Line>,
    call: CallId,
    id: String,
    inlet: mpsc::Receiver<Piece>,
    open: bool,
}

/// What comes of a call.
#[derive(Debug)]
pub(super) enum Came {
    /// Something that belongs to it.
    Related(Parcel),
    /// Its answer, or why there is none; nothing comes after it.
    Answer(Parcel),
}

impl Pending {
    /// The next message; nothing after the answer. Safe to drop half-way.
    pub(super) async fn next(&mut self) -> Option<Came> {
        if !self.open {
            return None;
        }
        let piece = self.inlet.recv().await;
        let arrived = piece.is_some();
        match piece.and_then(|Piece { message, last, .. }| Some((message.taken()?, last))) {
            Some((message, false)) => Some(Came::Related(message)),
            Some((message, true)) => {
                self.open = false;
                Some(Came::Answer(message))
            }
            None => {
                self.open = false;
                // It was cut off while this one waited.
                if arrived {
                    self.line.hang_up(self.call);
                }
                let why = match self.line.ended().filter(|_| !arrived) {
                    Some(end) => format!("the server did not answer: {end}"),
                    None => "the call was given up, because its client did not read or its session ended".to_owned(),
                };
                Some(Came::Answer(Parcel::ours(envelope::error(&self.id, INTERNAL_ERROR, &why))))
            }
        }
    }

    /// The answer, whatever comes before it.
    pub(super) async fn answer(mut self) -> Bytes {
        loop {
            match self.next().await {
                Some(Came::Related(_)) => {}
                Some(Came::Answer(message)) => return message.whole(),
                None => return Bytes::new(),
            }
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.open {
            self.line.hang_up(self.call);
        }
    }
}
