//! A relay between an agent and the Docker Engine. It passes everything on as it comes, streams and hijacked connections included,
//! sees each request, and can strike at the n-th that changes something: before it is passed on, while Docker is at it, or after its
//! effect and before the answer.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1 as client;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpListener, UnixStream};
use tokio::task::JoinHandle;

const SOCKET: &str = "/var/run/docker.sock";

type Broken = Box<dyn std::error::Error + Send + Sync>;
type Body = BoxBody<Bytes, hyper::Error>;

/// When to strike, seen from the request it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Docker never hears of it.
    Before,
    /// So long after Docker has been asked; the connection breaks then, as it does when the one who asked dies.
    During(Duration),
    /// It is done, and whoever asked never hears so.
    After,
}

/// A running relay. It ends when it is dropped, and with it every connection through it.
pub(crate) struct Relay {
    address: SocketAddr,
    watch: Arc<Mutex<Watch>>,
    accepting: JoinHandle<()>,
}

#[derive(Default)]
struct Watch {
    /// The changing requests since the relay was last armed.
    seen: Vec<String>,
    trap: Option<Trap>,
    sprung: bool,
}

struct Trap {
    /// The first request is number 1.
    number: usize,
    moment: Moment,
    strike: Box<dyn FnOnce() + Send>,
}

impl Relay {
    /// Starts on loopback, at a port of its own.
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let watch = Arc::<Mutex<Watch>>::default();
        let shared = Arc::clone(&watch);
        let accepting = tokio::spawn(async move {
            // Dropped with this task, it takes the connections with it.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                let watch = Arc::clone(&shared);
                let service = service_fn(move |request| pass_on(request, Arc::clone(&watch)));
                let connection = server::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades();
                connections.spawn(connection);
            }
        });
        Self { address, watch, accepting }
    }

    /// As `DOCKER_HOST` takes it.
    pub(crate) fn docker_host(&self) -> String {
        format!("tcp://{}", self.address)
    }

    /// Counts from now on, and calls `strike` once, at the changing request with this number (from 1). `strike` has to have made sure
    /// that no more requests come when it returns.
    pub(crate) fn arm(&self, number: usize, moment: Moment, strike: impl FnOnce() + Send + 'static) {
        let trap = Trap { number, moment, strike: Box::new(strike) };
        *lock(&self.watch) = Watch { seen: Vec::new(), trap: Some(trap), sprung: false };
    }

    /// Strikes no more. Whether it has, or is about to, and the changing requests since it was armed, such as `POST /containers/create`.
    pub(crate) fn disarm(&self) -> (bool, Vec<String>) {
        let mut watch = lock(&self.watch);
        watch.trap = None;
        (watch.sprung, watch.seen.clone())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn lock(watch: &Mutex<Watch>) -> MutexGuard<'_, Watch> {
    watch.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a request changes, in words without ids; nothing for one that only looks.
fn change(request: &Request<Incoming>) -> Option<String> {
    if matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS) {
        return None;
    }
    let path = request.uri().path();
    let path = match path.split_once('/').map(|(_, rest)| rest.split_once('/')) {
        Some(Some((version, rest))) if version.starts_with('v') => rest,
        _ => path.trim_start_matches('/'),
    };
    // These look, or concern only the connection.
    if ["/wait", "/attach", "/resize"].iter().any(|end| path.ends_with(end)) || path == "auth" {
        return None;
    }
    let parts: Vec<&str> = path.split('/').collect();
    let shown = match parts.as_slice() {
        [kind, "create" | "prune"] => format!("{} /{kind}/{}", request.method(), parts[1]),
        [kind, _, verb] => format!("{} /{kind}/*/{verb}", request.method()),
        [kind, _] => format!("{} /{kind}/*", request.method()),
        _ => format!("{} /{path}", request.method()),
    };
    Some(shown)
}

async fn pass_on(request: Request<Incoming>, watch: Arc<Mutex<Watch>>) -> Result<Response<Body>, Broken> {
    let Some(trap) = change(&request).and_then(|change| noted(&watch, change)) else {
        return forward(request).await;
    };
    match trap.moment {
        Moment::Before => {
            (trap.strike)();
        }
        Moment::During(pause) => {
            let asked = tokio::spawn(forward(request));
            tokio::time::sleep(pause).await;
            (trap.strike)();
            asked.abort();
        }
        Moment::After => {
            let (_, body) = forward(request).await?.into_parts();
            // The effect of a pull is there when its last line is.
            let _ = body.collect().await;
            (trap.strike)();
        }
    }
    Err("whoever asked is dead".into())
}

/// Counts a change; the trap when it is the one to strike at.
fn noted(watch: &Mutex<Watch>, change: String) -> Option<Trap> {
    let mut watch = lock(watch);
    watch.seen.push(change);
    let number = watch.seen.len();
    let trap = watch.trap.take_if(|trap| trap.number == number);
    watch.sprung |= trap.is_some();
    trap
}

async fn forward(mut request: Request<Incoming>) -> Result<Response<Body>, Broken> {
    let wants_upgrade = request.headers().contains_key(header::UPGRADE);
    let theirs = wants_upgrade.then(|| hyper::upgrade::on(&mut request));
    let mut docker = connect().await?;
    let mut response = docker.send_request(request).await?;
    if let Some(theirs) = theirs.filter(|_| response.status() == StatusCode::SWITCHING_PROTOCOLS) {
        let dockers = hyper::upgrade::on(&mut response);
        tokio::spawn(async move {
            if let (Ok(theirs), Ok(dockers)) = tokio::join!(theirs, dockers) {
                let (mut theirs, mut dockers) = (TokioIo::new(theirs), TokioIo::new(dockers));
                let _ = tokio::io::copy_bidirectional(&mut theirs, &mut dockers).await;
            }
        });
        let (parts, _) = response.into_parts();
        return Ok(Response::from_parts(parts, Empty::new().map_err(|never| match never {}).boxed()));
    }
    Ok(response.map(|body| body.boxed()))
}

/// A connection of its own for one request: Docker sees it end when the one who asked is gone.
async fn connect<B>() -> Result<client::SendRequest<B>, Broken>
where
    B: hyper::body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Broken>,
{
    let (sender, connection) = client::handshake(TokioIo::new(UnixStream::connect(SOCKET).await?)).await?;
    tokio::spawn(connection.with_upgrades());
    Ok(sender)
}

/// Asks the Docker Engine directly: status, and the answer where it is JSON.
pub(crate) async fn ask_docker(method: Method, path: &str, body: Option<&Value>) -> (StatusCode, Value) {
    let bytes = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "docker")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(bytes))
        .unwrap();
    let answer = connect().await.unwrap().send_request(request).await.unwrap();
    let status = answer.status();
    let bytes = answer.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}
