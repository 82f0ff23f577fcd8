//! The listener: accepts connections and serves HTTP/1.1 on each. Bounded in connections, in the time anybody may take to say
//! something, and in the time anybody may take to hear it.
//!
//! TLS is for whoever stands in front: agents check a proxy's public certificate, and this process holds no key.

mod patient;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::header::CONNECTION;
use axum::http::{HeaderValue, Request};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service as _;

use self::patient::Patient;
use crate::metrics::Metrics;

/// Everything in a request's head, roughly; a connection's buffers are no larger either.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Descriptors that are not connections' own: database, cloud, logs.
const OTHER_DESCRIPTORS: u64 = 128;
/// A connection, and a release's file being sent over it.
const DESCRIPTORS_EACH: u64 = 2;

/// What callers may take up.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections served at once.
    pub connections: usize,
    /// Of which one party may hold this many, so that one can't shut out all others. A proxy in front is one party.
    pub per_network: usize,
    /// From accepting a connection to its first whole request.
    pub opening: Duration,
    /// How long a connection may lie idle between two requests, and how long the head of a later request may take. Longer than the
    /// minute after which load balancers usually let go, so that it is they who do, and not we while they send.
    pub idle: Duration,
    /// How long the other side may take nothing of what it is sent.
    pub stall: Duration,
    /// How long requests under way may still take once the process is to end.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            per_network: 2048,
            opening: Duration::from_secs(10),
            idle: Duration::from_secs(75),
            stall: Duration::from_secs(30),
            grace: Duration::from_secs(5),
        }
    }
}

impl Limits {
    /// The usual ones, or as many connections as this process may have descriptors for. Asks for as many as it may have.
    pub fn of_this_process() -> Self {
        let usual = Self::default();
        let wanted = usual.connections as u64 * DESCRIPTORS_EACH + OTHER_DESCRIPTORS;
        let had = getrlimit(Resource::Nofile);
        let mut may = had.current.unwrap_or(u64::MAX);
        if may < wanted {
            let more = had.maximum.unwrap_or(u64::MAX).min(wanted);
            if setrlimit(Resource::Nofile, Rlimit { current: Some(more), maximum: had.maximum }).is_ok() {
                may = more;
            }
        }
        let room = may.saturating_sub(OTHER_DESCRIPTORS) / DESCRIPTORS_EACH;
        let connections = usual.connections.min(usize::try_from(room).unwrap_or(usize::MAX)).max(2);
        if connections < usual.connections {
            tracing::warn!(connections, descriptors = may, "few descriptors: raise the limit on open files");
        }
        Self { connections, per_network: usual.per_network.min(connections / 2), ..usual }
    }
}

/// The provisioner's port.
pub struct Server {
    listener: TcpListener,
    limits: Limits,
    places: Arc<Places>,
}

impl Server {
    /// Takes the port.
    ///
    /// # Errors
    /// When the port can't be had.
    pub async fn bind(address: SocketAddr, limits: Limits, metrics: Arc<Metrics>) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let places = Arc::new(Places { held: Mutex::default(), limits: limits.clone(), metrics });
        Ok(Self { listener, limits, places })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until told to stop, then lets requests under way finish for a moment.
    pub async fn run(self, router: Router, stop: CancellationToken) {
        let connections = TaskTracker::new();
        let cut = CancellationToken::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    // Closed at once: it may come again, and those who are being served go on being served.
                    let Some(place) = Places::take(&self.places, peer.ip()) else { continue };
                    let connection = serve(stream, router.clone(), self.limits.clone(), place, stop.clone());
                    let cut = cut.clone();
                    connections.spawn(async move {
                        tokio::select! {
                            () = connection => {}
                            () = cut.cancelled() => {}
                        }
                    });
                }
                Err(error) => {
                    // Out of descriptors, most likely; asking again at once would only burn the processor.
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
        drop(self.listener);
        connections.close();
        if timeout(self.limits.grace, connections.wait()).await.is_err() {
            tracing::warn!(open = connections.len(), "some requests were not answered in time");
        }
        cut.cancel();
        connections.wait().await;
    }
}

/// Who is connected.
struct Places {
    held: Mutex<Held>,
    limits: Limits,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Held {
    all: usize,
    by_network: HashMap<IpAddr, usize>,
}

impl Places {
    fn take(this: &Arc<Self>, peer: IpAddr) -> Option<Place> {
        let network = network(peer);
        let mut held = this.held.lock().unwrap_or_else(PoisonError::into_inner);
        let theirs = held.by_network.get(&network).copied().unwrap_or_default();
        if held.all >= this.limits.connections || theirs >= this.limits.per_network {
            this.metrics.turned_away();
            return None;
        }
        held.all += 1;
        held.by_network.insert(network, theirs + 1);
        this.metrics.connections(held.all as u64);
        Some(Place { places: Arc::clone(this), network })
    }
}

/// One of the connections served at once.
struct Place {
    places: Arc<Places>,
    network: IpAddr,
}

impl Place {
    /// Whether places have become so few that nobody may keep one just in case. Ten thousand agents that report once a minute and keep
    /// their connection meanwhile would take up all there are.
    fn is_scarce(&self) -> bool {
        self.places.held.lock().unwrap_or_else(PoisonError::into_inner).all > self.places.limits.connections / 2
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.places.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.all -= 1;
        if let Some(theirs) = held.by_network.get_mut(&self.network) {
            *theirs -= 1;
            if *theirs == 0 {
                held.by_network.remove(&self.network);
            }
        }
        self.places.metrics.connections(held.all as u64);
    }
}

/// Whom an address belongs to: with IPv6, everybody has a whole /64.
fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
    }
}

/// Serves one connection to its end; gives up on one that makes no request in time, and asks it to end when the process does.
async fn serve(stream: TcpStream, router: Router, limits: Limits, place: Place, stop: CancellationToken) {
    if let Err(error) = prepare(&stream) {
        tracing::debug!(%error, "a connection was gone before it was served");
        return;
    }
    let asked = AtomicBool::new(false);
    let service = service_fn(|request: Request<Incoming>| {
        asked.store(true, Ordering::Relaxed);
        let answering = router.clone().call(request.map(Body::new));
        let place = &place;
        async move {
            let mut response = answering.await?;
            if place.is_scarce() {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(Patient::new(stream, limits.stall)), service);
    let mut connection = std::pin::pin!(connection);
    let mut opening = std::pin::pin!(sleep_until(Instant::now() + limits.opening));
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
            () = stop.cancelled(), if !ending => {
                ending = true;
                connection.as_mut().graceful_shutdown();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_party_has_its_whole_network() {
        let network = |text: &str| network(text.parse().unwrap());
        assert_eq!(network("2001:db8:1:2:3::4"), network("2001:db8:1:2:ffff::"));
        assert_ne!(network("2001:db8:1:2::"), network("2001:db8:1:3::"));
        assert_eq!(network("::ffff:192.0.2.7"), network("192.0.2.7"));
        assert_ne!(network("192.0.2.7"), network("192.0.2.8"));
    }
}
