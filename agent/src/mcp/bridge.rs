//! Streamable HTTP for servers that speak something else: a container's standard streams, legacy HTTP+SSE, a websocket.
//!
//! A *shared* server has one link for all its clients: the agent itself shakes hands with it and tells every client what it was told, ids are
//! kept apart by the [`switchboard`], and no client's coming or going matters to another. Otherwise each session has a link of its own, and
//! with it the server sees the client's own handshake. Where sessions have processes of their own, that link leads to a container that the loop
//! makes for it; whoever has no session speaks with the instance's own container, which is shared.
//!
//! When the server goes, every call under way fails at once and all sessions are gone with it: their next request is answered with 404, upon
//! which clients begin anew. The link is made again by the next call that needs it.

mod budget;
mod downstream;
mod envelope;
mod eras;
mod feed;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
mod handshake;
mod line;
mod outlet;
mod switchboard;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use dtma_api::instance::Transport;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;

use self::budget::Budget;
use self::eras::Eras;
use self::line::Line;
use self::switchboard::{Abilities, SessionKey};
use super::link::session::SessionDialer;
use super::link::sse::SseDialer;
use super::link::stdio::StdioDialer;
use super::link::websocket::WebsocketDialer;
use super::link::{Dial, LinkEnd};
use crate::engine::{ContainerId, Engine};
use crate::instance::SessionMode;
use crate::reconcile::{Sessions, Upstream};

pub use self::downstream::Refused;
pub(super) use self::envelope::{Unanswered, single_line};
pub use self::handshake::Known;

/// Sessions of one instance.
const MAX_SESSIONS: usize = 256;
/// A session nobody uses for so long is gone.
const IDLE: Duration = Duration::from_secs(30 * 60);
/// The same where a session has a process of its own, and its client has listened and then hung up: clients that leave without saying so do
/// that, and others listen again at once.
const LEFT: Duration = Duration::from_secs(2 * 60);
/// When there are too many, one that nobody has used for so long makes room: many clients leave without saying so.
const SPARE: Duration = Duration::from_secs(60);
/// The same where a session takes what its server remembers with it.
const SPARE_PROCESS: Duration = Duration::from_secs(5 * 60);
/// From when the agent is told to end to when calls under way are given up; shorter than what its listener waits for them.
const PARTING: Duration = Duration::from_millis(2_500);
/// How often idle sessions are looked for.
const SWEEP: Duration = Duration::from_secs(60);
/// How long a client waits for the handshake with a server that may have to start first. The handshake itself goes on.
const HANDSHAKE: Duration = Duration::from_secs(60);
/// The same where the process begins with the session, and may have to fetch its program first.
const STARTING: Duration = Duration::from_secs(5 * 60);
/// Memory for requests on their way in, in [`IN_UNIT`]s.
const IN_UNITS: usize = 1024;
const IN_UNIT: usize = 64 * 1024;

/// Whether clients share a link.
#[derive(Clone)]
pub enum Sharing {
    /// One link for all.
    Shared,
    /// One for each session.
    Own,
    /// One for each session, to a process of its own, and one to a process for whoever has no session.
    Processes {
        /// Opens those of sessions.
        dial: Arc<dyn Dial>,
        /// How many sessions there may be.
        most: u16,
    },
}

impl Sharing {
    /// Clients of the common link share it, so the agent shakes hands on it.
    fn has_shared_link(&self) -> bool {
        match self {
            Self::Shared | Self::Processes { .. } => true,
            Self::Own => false,
        }
    }

    /// A session's server sees its client's own handshake.
    fn has_own_links(&self) -> bool {
        match self {
            Self::Own | Self::Processes { .. } => true,
            Self::Shared => false,
        }
    }

    /// How many sessions there may be, and for how long nobody must have used one for it to make room.
    fn room(&self) -> (usize, Duration) {
        match self {
            Self::Shared | Self::Own => (MAX_SESSIONS, SPARE),
            Self::Processes { most, .. } => (usize::from(*most), SPARE_PROCESS),
        }
    }
}

/// The bridges of all instances. Cheap to clone.
#[derive(Clone)]
pub struct Bridges {
    inner: Arc<Inner>,
}

/// Where a bridge leads. A container that is started again may have another address, where that matters.
type Place = (ContainerId, Option<SocketAddr>);

struct Inner {
    engine: Arc<dyn Engine>,
    sessions: Sessions,
    bridges: Mutex<HashMap<Place, Arc<Bridge>>>,
    /// Memory for what waits for clients of any of them.
    budget: Budget,
    shutdown: CancellationToken,
}

impl Bridges {
    /// No bridges yet. Containers for sessions are asked for at `sessions`. Listening streams end when `shutdown` says so; calls under way
    /// don't.
    pub fn new(engine: Arc<dyn Engine>, sessions: Sessions, shutdown: CancellationToken) -> Self {
        let inner = Arc::new(Inner {
            engine,
            sessions,
            bridges: Mutex::default(),
            budget: Budget::default(),
            shutdown: shutdown.clone(),
        });
        tokio::spawn(sweep(Arc::downgrade(&inner), shutdown));
        Self { inner }
    }

    /// The bridge to a server; none where none is needed.
    pub fn to(&self, upstream: &Upstream) -> Option<Arc<Bridge>> {
        let (address, path) = (upstream.address, upstream.path.clone());
        let (sharing, dial): (Sharing, Arc<dyn Dial>) = match upstream.transport {
            Transport::Stdio => {
                let engine = Arc::clone(&self.inner.engine);
                (self.sharing(upstream), Arc::new(StdioDialer::new(engine, upstream.container.clone())))
            }
            Transport::Sse => (Sharing::Own, Arc::new(SseDialer::new(address, path))),
            Transport::Websocket => (Sharing::Own, Arc::new(WebsocketDialer::new(address, path))),
            Transport::Http => return None,
        };
        let (budget, shutdown) = (&self.inner.budget, &self.inner.shutdown);
        let mut bridges = lock(&self.inner.bridges);
        let bridge = bridges
            .entry((upstream.container.clone(), (upstream.transport != Transport::Stdio).then_some(address)))
            .or_insert_with(|| {
                let another = (upstream.transport == Transport::Stdio).then(|| self.container(upstream, None));
                let ways = Ways { sharing, dial, another };
                Bridge::new(upstream.instance.as_str(), ways, budget.clone(), shutdown.clone())
            });
        Some(Arc::clone(bridge))
    }

    fn sharing(&self, upstream: &Upstream) -> Sharing {
        let SessionMode::PerSession { most } = upstream.sessions else { return Sharing::Shared };
        Sharing::Processes { dial: self.container(upstream, Some(most)), most }
    }

    /// Leads to a container beside the instance's own.
    fn container(&self, upstream: &Upstream, most: Option<u16>) -> Arc<dyn Dial> {
        let (engine, sessions) = (Arc::clone(&self.inner.engine), self.inner.sessions.clone());
        let (instance, beside) = (upstream.instance.clone(), upstream.container.clone());
        Arc::new(SessionDialer::new(engine, sessions, instance, beside, most))
    }
}

/// Ends what nobody uses, and in the end, everything.
async fn sweep(inner: Weak<Inner>, shutdown: CancellationToken) {
    let mut ticks = tokio::time::interval(SWEEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            _ = ticks.tick() => {}
        }
        let Some(inner) = inner.upgrade() else { return };
        lock(&inner.bridges).retain(|_, bridge| {
            bridge.expire(Instant::now());
            // Somebody may just have been given it.
            Arc::strong_count(bridge) > 1 || bridge.is_of_use()
        });
    }
    // Calls may end well for a moment. Then those that can't are told so, rather than that their connection broke.
    tokio::time::sleep(PARTING).await;
    let Some(inner) = inner.upgrade() else { return };
    let bridges: Vec<_> = lock(&inner.bridges).values().cloned().collect();
    bridges.iter().for_each(|bridge| bridge.part());
}

/// A server the agent has shaken hands with.
#[derive(Debug)]
pub struct Acquaintance {
    line: Arc<Line>,
    known: Arc<Known>,
}

impl Acquaintance {
    /// What the server says of itself.
    pub fn known(&self) -> &Known {
        &self.known
    }

    /// A page of its tools, as `tools/list` answers it; `cursor` is where the page before ended.
    ///
    /// # Errors
    /// When the server goes, or refuses.
    pub async fn tools(&self, cursor: Option<serde_json::Value>) -> Result<serde_json::Value, LinkEnd> {
        handshake::tools(&self.line, &self.known, cursor).await
    }
}

type Opening = Shared<BoxFuture<'static, Result<(Arc<Line>, Option<Arc<Known>>), LinkEnd>>>;

/// How a server is reached.
struct Ways {
    sharing: Sharing,
    dial: Arc<dyn Dial>,
    /// To another process of it, where there can be one.
    another: Option<Arc<dyn Dial>>,
}

/// The way to one server.
pub struct Bridge {
    instance: String,
    sharing: Sharing,
    dial: Arc<dyn Dial>,
    /// Opens a link to another process of the same server, where there can be one.
    another: Option<Arc<dyn Dial>>,
    eras: Eras,
    /// The link of those who have none of their own, made when it is first needed.
    common: Mutex<Option<Opening>>,
    sessions: Mutex<HashMap<String, Arc<Session>>>,
    /// One permit for each session, those included that have ended and are still in use.
    seats: Arc<Semaphore>,
    next_session: AtomicU64,
    /// Memory for requests on their way in.
    inbound: Arc<Semaphore>,
    /// Memory for what waits for clients, of this bridge and all others.
    budget: Budget,
    shutdown: CancellationToken,
}

impl Bridge {
    /// A bridge to the server that `ways` lead to.
    fn new(instance: &str, ways: Ways, budget: Budget, shutdown: CancellationToken) -> Arc<Self> {
        let Ways { sharing, dial, another } = ways;
        let (most, _) = sharing.room();
        Arc::new(Self {
            instance: instance.to_owned(),
            seats: Arc::new(Semaphore::new(most)),
            sharing,
            dial,
            another,
            eras: Eras::default(),
            common: Mutex::default(),
            sessions: Mutex::default(),
            next_session: AtomicU64::new(1),
            inbound: Arc::new(Semaphore::new(IN_UNITS)),
            budget,
            shutdown,
        })
    }

    /// What the server says of itself, and the proof that it answers now. Its clients notice nothing of it, and dropping it disturbs nothing.
    ///
    /// # Errors
    /// When the server isn't there or doesn't answer as an MCP server. How long to wait is for the caller to say.
    pub async fn handshake(&self) -> Result<Acquaintance, LinkEnd> {
        let (line, known) = if self.sharing.has_shared_link() {
            let (line, known) = self.common().await?;
            (line, known.ok_or_else(|| LinkEnd::because("nobody has shaken hands"))?)
        } else {
            let line = self.open().await?;
            let known = Arc::new(handshake::shake_hands(&line).await?);
            (line, known)
        };
        // It comes after what was said last, which has been taken when this is answered.
        handshake::prove(&line, &known).await?;
        Ok(Acquaintance { line, known })
    }

    /// The same for a client, which isn't left waiting for as long as a server may take to start.
    async fn common_in_time(&self) -> Result<(Arc<Line>, Option<Arc<Known>>), Refused> {
        let common = timeout(HANDSHAKE, self.common()).await.map_err(|_| Refused::Silent)?;
        common.map_err(Refused::Unreachable)
    }

    /// The link of those who have none of their own, and what the server said on it. It is waited for as long as the server's process is
    /// there: on another link over the same standard streams that would be asked to initialize a second time.
    async fn common(&self) -> Result<(Arc<Line>, Option<Arc<Known>>), LinkEnd> {
        let opening = {
            let mut common = lock(&self.common);
            match &*common {
                Some(opening) if is_of_use(opening) => opening.clone(),
                Some(_) | None => common.insert(self.start_opening()).clone(),
            }
        };
        opening.await
    }

    /// In a task of its own: whoever waits for it may go away.
    fn start_opening(&self) -> Opening {
        let (dial, instance, budget) = (Arc::clone(&self.dial), self.instance.clone(), self.budget.clone());
        let shakes_hands = self.sharing.has_shared_link();
        let opening = tokio::spawn(async move {
            let line = dial_line(dial.as_ref(), &instance, false, budget).await?;
            if !shakes_hands {
                return Ok((line, None));
            }
            let known = handshake::shake_hands(&line).await?;
            tracing::info!(instance, "connected to an MCP server");
            Ok((line, Some(Arc::new(known))))
        });
        opening.map(|ended| ended.unwrap_or_else(|_| Err(LinkEnd::because("the agent failed")))).boxed().shared()
    }

    /// A link of its own.
    async fn open(&self) -> Result<Arc<Line>, LinkEnd> {
        let dial = match &self.sharing {
            Sharing::Shared | Sharing::Own => &self.dial,
            Sharing::Processes { dial, .. } => dial,
        };
        dial_line(dial.as_ref(), &self.instance, true, self.budget.clone()).await
    }

    /// The session called `id`, as long as its link is there.
    fn session(&self, id: &str) -> Option<InUse> {
        let mut sessions = lock(&self.sessions);
        let session = sessions.get(id)?;
        if session.line.ended().is_some() {
            sessions.remove(id);
            return None;
        }
        Some(InUse(Arc::clone(session)))
    }

    /// Room for another session, unless there are too many.
    fn seat(&self) -> Result<OwnedSemaphorePermit, Refused> {
        let free = || Arc::clone(&self.seats).try_acquire_owned().ok();
        let (most, spare) = self.sharing.room();
        let now = Instant::now();
        free()
            .or_else(|| {
                self.expire(now);
                free()
            })
            .or_else(|| {
                // After the lock: it cancels what a session has under way.
                let spared = {
                    let mut sessions = lock(&self.sessions);
                    let idle = sessions.values().filter(|session| session.idle(now) >= spare);
                    let oldest = idle.min_by_key(|session| *lock(&session.used)).map(|session| session.id.clone())?;
                    sessions.remove(&oldest)
                };
                drop(spared);
                free()
            })
            .ok_or(Refused::TooManySessions { most })
    }

    /// A new session.
    fn admit(&self, line: Arc<Line>, abilities: Abilities, seat: OwnedSemaphorePermit) -> InUse {
        let key = SessionKey(self.next_session.fetch_add(1, Ordering::Relaxed));
        let session = Arc::new(Session {
            id: uuid::Uuid::new_v4().simple().to_string(),
            key,
            line,
            used: Mutex::new(Instant::now()),
            listened: AtomicBool::new(false),
            _seat: seat,
        });
        let mut sessions = lock(&self.sessions);
        session.line.open(key, abilities);
        sessions.insert(session.id.clone(), Arc::clone(&session));
        drop(sessions);
        InUse(session)
    }

    /// Ends a session; whether there was one.
    fn end(&self, id: &str) -> bool {
        let ended = lock(&self.sessions).remove(id);
        ended.inspect(|session| session.line.close(session.key)).is_some()
    }

    /// Ends sessions that nobody uses, and those whose link is gone.
    fn expire(&self, now: Instant) {
        let expired: Vec<Arc<Session>> = lock(&self.sessions)
            .extract_if(|_, session| session.line.ended().is_some() || session.idle(now) >= self.patience(session))
            .map(|(_, session)| session)
            .collect();
        drop(expired);
        self.eras.expire(now);
    }

    /// For how long nobody may use a session.
    fn patience(&self, session: &Session) -> Duration {
        match self.sharing {
            Sharing::Processes { .. } if session.listened.load(Ordering::Relaxed) => LEFT,
            Sharing::Processes { .. } | Sharing::Shared | Sharing::Own => IDLE,
        }
    }

    /// The agent ends: what is under way on any link fails now.
    fn part(&self) {
        let end = || LinkEnd::because("the agent is being restarted; ask again in a moment");
        let common = lock(&self.common).as_ref().and_then(|opening| opening.clone().now_or_never());
        if let Some(Ok((line, _))) = common {
            line.end(end());
        }
        lock(&self.sessions).values().for_each(|session| session.line.end(end()));
        self.eras.part(end());
    }

    fn is_of_use(&self) -> bool {
        !lock(&self.sessions).is_empty() || self.eras.is_of_use() || lock(&self.common).as_ref().is_some_and(is_of_use)
    }
}

/// It is being made, or is there.
fn is_of_use(opening: &Opening) -> bool {
    // Polled: of one for which nobody waits any more nobody else finds out that it is done.
    match opening.clone().now_or_never() {
        None => true,
        Some(Ok((line, _))) => line.ended().is_none(),
        Some(Err(_)) => false,
    }
}

async fn dial_line(dial: &dyn Dial, instance: &str, exclusive: bool, budget: Budget) -> Result<Arc<Line>, LinkEnd> {
    let patience = dial.patience();
    let link = timeout(patience, dial.dial()).await.unwrap_or_else(|_| {
        let seconds = patience.as_secs();
        Err(LinkEnd::because(format!("no connection to the server came about within {seconds} seconds")))
    })?;
    Ok(Line::new(link, instance, exclusive, budget))
}

/// A client's session.
#[derive(Debug)]
struct Session {
    id: String,
    key: SessionKey,
    line: Arc<Line>,
    used: Mutex<Instant>,
    /// Its client has listened for what belongs to no call.
    listened: AtomicBool,
    _seat: OwnedSemaphorePermit,
}

impl Session {
    /// For how long nobody has used it.
    fn idle(self: &Arc<Self>, now: Instant) -> Duration {
        // One is the table's own; whoever uses it has another.
        if Arc::strong_count(self) > 1 { Duration::ZERO } else { now.saturating_duration_since(*lock(&self.used)) }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.line.close(self.key);
    }
}

/// Somebody uses a session, which is why it isn't idle.
#[derive(Debug)]
struct InUse(Arc<Session>);

impl std::ops::Deref for InUse {
    type Target = Session;
    fn deref(&self) -> &Session {
        &self.0
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        *lock(&self.0.used) = Instant::now();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that holds one can panic half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
