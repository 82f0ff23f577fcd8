//! The listener: accepts connections, tells TLS from plaintext by the first byte, and serves HTTP on each. Bounded in connections,
//! and in the time anybody may take before saying something.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Request, StatusCode, header};
use axum::response::IntoResponse as _;
use dtma_api::REQUEST_ID_HEADER;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service as _;

use super::callers::network;
use super::error::ApiError;
use super::frame::{Peer, request_id};
use crate::config::Plaintext;

/// Connections served at once; each takes one descriptor, and one more while it is proxied.
const MAX_CONNECTIONS: usize = 400;
/// Of which one party may hold this many, so that one can't shut out all others.
const MAX_CONNECTIONS_PER_NETWORK: usize = 128;
/// From accepting a connection to its first byte, from there to the end of the TLS handshake, and from there to the first whole request.
const OPENING: Duration = Duration::from_secs(10);
/// How long a connection may lie idle between two requests, and how long the head of a later request may take.
const IDLE: Duration = Duration::from_secs(60);
/// How long requests under way may still take once the agent is to end.
const GRACE: Duration = Duration::from_secs(3);
/// Everything in a request's head, roughly.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// How often the accept loop shows that it turns when nobody connects.
const PULSE: Duration = Duration::from_secs(1);

/// The agent's port.
pub struct Server {
    listener: TcpListener,
    door: Arc<Door>,
    state: ServerState,
}

/// How a server is doing. Clones share it.
#[derive(Debug, Clone)]
pub struct ServerState(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    started: Instant,
    /// Milliseconds from `started` to the accept loop's last turn.
    turned: AtomicU64,
    open: Mutex<HashMap<IpAddr, usize>>,
    turned_away: AtomicU64,
}

impl Default for ServerState {
    fn default() -> Self {
        Self(Arc::new(Counts {
            started: Instant::now(),
            turned: AtomicU64::new(0),
            open: Mutex::default(),
            turned_away: AtomicU64::new(0),
        }))
    }
}

impl ServerState {
    /// Time since the accept loop last turned; a second or so while it lives.
    pub fn since_last_turn(&self) -> Duration {
        let turned = Duration::from_millis(self.0.turned.load(Ordering::Relaxed));
        self.0.started.elapsed().saturating_sub(turned)
    }

    /// Connections open now.
    pub fn open_connections(&self) -> usize {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }

    /// Connections closed at once because there were too many.
    pub fn turned_away(&self) -> u64 {
        self.0.turned_away.load(Ordering::Relaxed)
    }

    fn turn(&self) {
        let millis = u64::try_from(self.0.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.turned.store(millis, Ordering::Relaxed);
    }

    fn admit(&self, peer: SocketAddr) -> Option<Place> {
        let network = network(peer.ip());
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        let total: usize = open.values().sum();
        let held = open.entry(network).or_default();
        if total >= MAX_CONNECTIONS || *held >= MAX_CONNECTIONS_PER_NETWORK {
            self.0.turned_away.fetch_add(1, Ordering::Relaxed);
            if *held == 0 {
                open.remove(&network);
            }
            return None;
        }
        *held += 1;
        drop(open);
        Some(Place { counts: self.0.clone(), network })
    }
}

/// One of the connections served at once.
struct Place {
    counts: Arc<Counts>,
    network: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.counts.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = open.get_mut(&self.network) {
            *held -= 1;
            if *held == 0 {
                open.remove(&self.network);
            }
        }
    }
}

/// What becomes of a connection.
struct Door {
    tls: Option<TlsAcceptor>,
    plaintext: Plaintext,
    router: Router,
}

impl Server {
    /// Takes the port. As [`Server::on`].
    ///
    /// # Errors
    /// When the port can't be had.
    pub async fn bind(
        address: SocketAddr,
        tls: Option<TlsAcceptor>,
        plaintext: Plaintext,
        router: Router,
        state: ServerState,
    ) -> io::Result<Self> {
        Ok(Self::on(TcpListener::bind(address).await?, tls, plaintext, router, state))
    }

    /// Serves on a port that has been taken. Without `tls`, everything is plaintext and is served.
    pub fn on(
        listener: TcpListener,
        tls: Option<TlsAcceptor>,
        plaintext: Plaintext,
        router: Router,
        state: ServerState,
    ) -> Self {
        Self { listener, door: Arc::new(Door { tls, plaintext, router }), state }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until told to end, then lets requests under way finish for a moment.
    pub async fn run(self, shutdown: CancellationToken) {
        let connections = TaskTracker::new();
        let cut = CancellationToken::new();
        loop {
            self.state.turn();
            let accepted = tokio::select! {
                () = shutdown.cancelled() => break,
                accepted = timeout(PULSE, self.listener.accept()) => accepted,
            };
            match accepted {
                Err(_nobody_came) => {}
                Ok(Ok((stream, peer))) => {
                    let Some(place) = self.state.admit(peer) else { continue };
                    let connection = self.door.clone().open(stream, peer, shutdown.clone());
                    let cut = cut.clone();
                    connections.spawn(async move {
                        tokio::select! {
                            () = connection => {}
                            () = cut.cancelled() => {}
                        }
                        drop(place);
                    });
                }
                Ok(Err(error)) => {
                    // Out of descriptors, most likely; asking again at once would only burn the processor.
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
        drop(self.listener);
        connections.close();
        if timeout(GRACE, connections.wait()).await.is_err() {
            tracing::info!(open = connections.len(), "cutting the connections that are still open");
        }
        cut.cancel();
        connections.wait().await;
    }
}

impl Door {
    async fn open(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, shutdown: CancellationToken) {
        if let Err(error) = prepare(&stream) {
            tracing::debug!(%peer, %error, "a connection was gone before it was served");
            return;
        }
        let mut first = [0_u8; 1];
        let Ok(Ok(1)) = timeout(OPENING, stream.peek(&mut first)).await else { return };
        // A TLS connection begins with a handshake record (22); no HTTP method begins with that byte.
        match &self.tls {
            Some(tls) if first == [22] => match timeout(OPENING, tls.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                    self.serve(stream, peer, http2, shutdown).await;
                }
                Ok(Err(error)) => tracing::debug!(%peer, %error, "a TLS handshake failed"),
                Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
            },
            Some(_) if self.plaintext == Plaintext::Refuse => refuse_plaintext(stream).await,
            Some(_) | None => self.serve(stream, peer, false, shutdown).await,
        }
    }

    async fn serve<IO>(&self, stream: IO, peer: SocketAddr, http2: bool, shutdown: CancellationToken)
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let asked = Arc::new(AtomicBool::new(false));
        let service = service_fn({
            let (router, asked) = (self.router.clone(), asked.clone());
            move |request: Request<Incoming>| {
                asked.store(true, Ordering::Relaxed);
                let mut request = request.map(Body::new);
                request.extensions_mut().insert(Peer(peer));
                router.clone().call(request)
            }
        });
        let io = TokioIo::new(stream);
        if http2 {
            let connection = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .max_concurrent_streams(64)
                .max_send_buf_size(MAX_HEAD_BYTES)
                .keep_alive_interval(IDLE / 2)
                .keep_alive_timeout(OPENING)
                .serve_connection(io, service);
            drive(connection, http2::Connection::graceful_shutdown, &asked, shutdown).await;
        } else {
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(IDLE)
                .max_buf_size(MAX_HEAD_BYTES)
                .serve_connection(io, service);
            drive(connection, http1::Connection::graceful_shutdown, &asked, shutdown).await;
        }
    }
}

/// Polls a connection to its end; gives up on one that makes no request in time, and asks it to end when the agent does.
async fn drive<C>(connection: C, end: fn(std::pin::Pin<&mut C>), asked: &AtomicBool, shutdown: CancellationToken)
where
    C: Future<Output = hyper::Result<()>>,
{
    let mut connection = std::pin::pin!(connection);
    let mut opening = std::pin::pin!(sleep_until(Instant::now() + OPENING));
    let (mut ending, mut opened) = (false, false);
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection broke off");
                }
                return;
            }
            () = &mut opening, if !opened => {
                opened = asked.load(Ordering::Relaxed);
                if !opened {
                    return;
                }
            }
            () = shutdown.cancelled(), if !ending => {
                ending = true;
                end(connection.as_mut());
            }
        }
    }
}

/// Small writes go out at once, and a peer that is gone is noticed within two minutes even if nobody says anything.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    rustix::net::sockopt::set_socket_keepalive(stream, true)?;
    rustix::net::sockopt::set_tcp_keepidle(stream, Duration::from_secs(60))?;
    rustix::net::sockopt::set_tcp_keepintvl(stream, Duration::from_secs(15))?;
    rustix::net::sockopt::set_tcp_keepcnt(stream, 4)?;
    Ok(())
}

/// Answers one request with 426, whatever it is, and hangs up.
async fn refuse_plaintext(stream: TcpStream) {
    let service = service_fn(|request: Request<Incoming>| async move {
        let refusal = ApiError::new(
            StatusCode::UPGRADE_REQUIRED,
            "tls_required",
            "this port speaks TLS: call https:// and check the agent's certificate pin, or set DTMA_PLAINTEXT=allow on the droplet",
        );
        let mut response =
            refusal.with_header(header::UPGRADE, HeaderValue::from_static("TLS/1.3, HTTP/1.1")).into_response();
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade, close"));
        response.headers_mut().insert(REQUEST_ID_HEADER, request_id(request.headers()));
        Ok::<_, std::convert::Infallible>(response)
    });
    let connection = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service);
    let _ = timeout(OPENING, connection).await;
}
