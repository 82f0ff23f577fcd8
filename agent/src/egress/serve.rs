//! Serving: connections in, requests judged, connections out.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::body::Body;
use axum::http::uri::{PathAndQuery, Scheme};
use axum::http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::connections::Place;
use super::rule::{self, Refusal};
use super::watched::Watched;
use super::{Resident, Shared};
use crate::instance::network::Wanted;
use crate::mcp::drop_hop_by_hop;

/// How long the head of a request may take, and how long nobody may ask for anything between two.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long nothing may pass over a connection.
const IDLE: Duration = Duration::from_secs(300);
/// Everything in a request's head, roughly.
const MAX_HEAD_BYTES: usize = 32 * 1024;
/// Addresses of one name that are tried.
const MOST_TRIED: usize = 4;

/// Why a request gets no way out.
#[derive(Debug, thiserror::Error)]
enum NoWay {
    #[error("this is a forward proxy: it takes CONNECT host:port, and http:// URLs in full")]
    NotForUs,
    #[error("the host of the request is neither a name nor an address")]
    BadHost,
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("{name} has no address")]
    NoSuchName { name: String },
    #[error("{name} could not be looked up")]
    Lookup {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("{to} did not accept the connection")]
    Unreachable {
        to: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("the server hung up before it answered")]
    HungUp(#[source] hyper::Error),
}

impl NoWay {
    fn status(&self) -> StatusCode {
        match self {
            Self::NotForUs | Self::BadHost => StatusCode::BAD_REQUEST,
            Self::Refused(_) => StatusCode::FORBIDDEN,
            Self::NoSuchName { .. } | Self::HungUp(_) => StatusCode::BAD_GATEWAY,
            Self::Lookup { source, .. } | Self::Unreachable { source, .. } => match source.kind() {
                io::ErrorKind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
                _ => StatusCode::BAD_GATEWAY,
            },
        }
    }
}

/// Lets connections in until `open` is cancelled, as it is when nobody holds the proxy any more. What was let in goes on until it ends by
/// itself, or the agent does.
pub(super) async fn accept(shared: Weak<Shared>, listener: TcpListener, open: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            () = open.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let Some(shared) = shared.upgrade() else { return };
                // One too many is hung up on: it is the instance's own doing.
                let Some(place) = shared.connections.admit(peer.ip()) else { continue };
                tokio::spawn(serve(shared, stream, peer.ip(), Arc::new(place)));
            }
            Err(error) => {
                // Out of descriptors, most likely; asking again at once would only burn the processor.
                tracing::warn!(%error, "the egress proxy could not accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(shared: Arc<Shared>, stream: TcpStream, from: IpAddr, place: Arc<Place>) {
    let _ = stream.set_nodelay(true);
    let (stream, activity) = Watched::new(stream);
    let end = shared.shutdown.clone();
    let service = service_fn(move |request| {
        let (shared, place) = (Arc::clone(&shared), Arc::clone(&place));
        async move { Ok::<_, Infallible>(shared.answer(request, from, place).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::select! {
        ended = connection => {
            if let Err(error) = ended {
                tracing::debug!(%error, %from, "a connection to the egress proxy ended early");
            }
        }
        () = activity.until_idle(IDLE) => {}
        () = end.cancelled() => {}
    }
}

impl Shared {
    async fn answer(self: Arc<Self>, request: Request<Incoming>, from: IpAddr, place: Arc<Place>) -> Response<Body> {
        let way = if request.method() == Method::CONNECT {
            self.connect(request, from, place).await
        } else {
            self.forward(request, from, place).await
        };
        way.unwrap_or_else(|no_way| {
            let text = format!("{no_way}\n");
            let mut answer = Response::new(Body::from(text));
            *answer.status_mut() = no_way.status();
            answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
            answer
        })
    }

    /// A tunnel: what is in it is between the instance and where it goes.
    async fn connect(
        self: Arc<Self>,
        request: Request<Incoming>,
        from: IpAddr,
        place: Arc<Place>,
    ) -> Result<Response<Body>, NoWay> {
        let authority = request.uri().authority().ok_or(NoWay::NotForUs)?;
        let port = authority.port_u16().ok_or(NoWay::NotForUs)?;
        let server = self.reach(authority.host(), port, from).await?;
        let end = self.shutdown.clone();
        tokio::spawn(tunnel(hyper::upgrade::on(request), server, end, place));
        Ok(Response::new(Body::empty()))
    }

    /// One plain exchange.
    async fn forward(
        self: Arc<Self>,
        request: Request<Incoming>,
        from: IpAddr,
        place: Arc<Place>,
    ) -> Result<Response<Body>, NoWay> {
        let (mut parts, body) = request.into_parts();
        let authority = parts.uri.authority().filter(|_| parts.uri.scheme() == Some(&Scheme::HTTP));
        let authority = authority.cloned().ok_or(NoWay::NotForUs)?;
        let server = self.reach(authority.host(), authority.port_u16().unwrap_or(80), from).await?;
        let (server, activity) = Watched::new(server);
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(server)).await.map_err(NoWay::HungUp)?;
        let end = self.shutdown.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = connection => {}
                () = activity.until_idle(IDLE) => {}
                () = end.cancelled() => {}
            }
            drop(place);
        });
        // As the server would have been asked directly. `Host` is what was judged, whatever else the request says.
        let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        parts.uri = Uri::from(path);
        parts.version = Version::HTTP_11;
        parts.extensions.clear();
        drop_hop_by_hop(&mut parts.headers);
        parts.headers.remove(header::EXPECT);
        let host = authority.as_str().rsplit('@').next().unwrap_or_default();
        parts.headers.insert(header::HOST, HeaderValue::from_str(host).map_err(|_| NoWay::BadHost)?);
        let answer = sender.send_request(Request::from_parts(parts, Body::new(body))).await.map_err(NoWay::HungUp)?;
        let (mut parts, body) = answer.into_parts();
        parts.version = Version::default();
        parts.extensions.clear();
        drop_hop_by_hop(&mut parts.headers);
        Ok(Response::from_parts(parts, Body::new(body)))
    }

    /// A connection to where the instance at `from` wants to go, when it may.
    async fn reach(&self, host: &str, port: u16, from: IpAddr) -> Result<TcpStream, NoWay> {
        let wanted = Wanted::parse(host).ok_or(NoWay::BadHost)?;
        let way = match self.directory.resident(from) {
            Some(resident) => self.way(&resident, &wanted, port).await,
            None => Err(Refusal::Stranger.into()),
        };
        let counts = &self.counts;
        match &way {
            Ok(_) => counts.permitted.fetch_add(1, Ordering::Relaxed),
            Err(NoWay::Refused(_)) => counts.refused.fetch_add(1, Ordering::Relaxed),
            Err(_) => counts.failed.fetch_add(1, Ordering::Relaxed),
        };
        if let Err(no_way) = &way
            && let Some(unlogged) = self.connections.may_log(from)
        {
            let instance = self.directory.resident(from).map(|resident| resident.instance.to_string());
            tracing::info!(
                %from, instance, host, port, unlogged, reason = no_way as &dyn std::error::Error, "an instance gets no way out"
            );
        }
        way
    }

    async fn way(&self, resident: &Resident, wanted: &Wanted, port: u16) -> Result<TcpStream, NoWay> {
        let allowed = &resident.allowed;
        rule::listed(allowed, wanted, port)?;
        let addresses = match wanted {
            Wanted::Address(address) => vec![*address],
            Wanted::Name(name) => {
                let found = self.world.addresses(name).await;
                found.map_err(|source| NoWay::Lookup { name: name.clone(), source })?
            }
        };
        let is_instance = |address| self.directory.is_instance(address);
        let reachable = rule::reachable(&addresses, port, allowed, is_instance, |address| self.world.is_own(address))?;
        let mut last = match wanted {
            Wanted::Name(name) => NoWay::NoSuchName { name: name.clone() },
            Wanted::Address(_) => NoWay::BadHost,
        };
        for to in reachable.into_iter().take(MOST_TRIED) {
            match self.world.connect(to).await {
                Ok(stream) => {
                    tracing::debug!(instance = %resident.instance, %to, "an instance is let out");
                    return Ok(stream);
                }
                Err(source) => last = NoWay::Unreachable { to, source },
            }
        }
        Err(last)
    }
}

async fn tunnel(client: OnUpgrade, server: TcpStream, end: CancellationToken, place: Arc<Place>) {
    // The answer that opens the tunnel may never be sent: then there is no client either.
    let Ok(client) = client.await else { return };
    let mut client = TokioIo::new(client);
    let (mut server, activity) = Watched::new(server);
    tokio::select! {
        // How it ends, and why, is between the two.
        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
        () = activity.until_idle(IDLE) => {}
        () = end.cancelled() => {}
    }
    drop(place);
}
