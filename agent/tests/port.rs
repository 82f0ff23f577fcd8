//! The agent's port as callers find it: TLS with the agent's own key, what becomes of plaintext, and of those who say nothing.

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

mod pinned;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::routing::get;
use dtma_agent::config::Plaintext;
use dtma_agent::http::frame::Peer;
use dtma_agent::http::server::{Server, ServerState};
use dtma_agent::http::tls;
use dtma_agent::store::StateDir;
use dtma_agent::store::identity::Identity;
use dtma_api::{CertificatePin, Failure};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;

struct Port {
    address: SocketAddr,
    pin: CertificatePin,
    state: ServerState,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
    _directory: TempDir,
}

async fn open(plaintext: Plaintext, with_tls: bool) -> Port {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let directory = tempfile::tempdir().unwrap();
    let identity = Identity::load_or_make(&StateDir::open(&directory.path().join("state")).unwrap()).unwrap();
    let router = Router::new()
        .route("/peer", get(async |request: Request| request.extensions().get::<Peer>().unwrap().0.ip().to_string()))
        .route("/version", get(async |request: Request| format!("{:?}", request.version())))
        .route(
            "/slow",
            get(async || {
                tokio::time::sleep(Duration::from_millis(300)).await;
                "done"
            }),
        )
        .route("/endless", get(async || axum::body::Body::from_stream(endless())));
    let acceptor = with_tls.then(|| tls::acceptor(&identity).unwrap());
    let state = ServerState::default();
    let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let server = Server::bind(any_port, acceptor, plaintext, router, state.clone()).await.unwrap();
    let address = server.local_address().unwrap();
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(server.run(shutdown.clone()));
    Port { address, pin: identity.pin(), state, shutdown, task, _directory: directory }
}

fn endless() -> impl futures_util::Stream<Item = Result<&'static str, std::io::Error>> {
    tokio_stream::once(Ok("first")).chain(tokio_stream::pending())
}

/// Waits, a few seconds at most, for what other tasks bring about.
async fn until(reached: impl Fn() -> bool) {
    let turns = async {
        while !reached() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(5), turns).await.unwrap();
}

async fn plain(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(Duration::from_secs(5), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

#[tokio::test]
async fn callers_who_check_the_pin_are_served_over_http2_and_others_find_out() {
    let port = open(Plaintext::Refuse, true).await;
    let url = |path| format!("https://{}{path}", port.address);
    let client = pinned::client(port.pin);
    assert_eq!(client.get(url("/peer")).send().await.unwrap().text().await.unwrap(), "127.0.0.1");
    assert_eq!(client.get(url("/version")).send().await.unwrap().text().await.unwrap(), "HTTP/2.0");
    let wrong = pinned::client(CertificatePin::of_spki(b"another key"));
    assert!(wrong.get(url("/peer")).send().await.unwrap_err().is_connect());
}

#[tokio::test]
async fn plaintext_is_told_to_use_tls() {
    let port = open(Plaintext::Refuse, true).await;
    let answer = plain(port.address, "GET /peer HTTP/1.1\r\nhost: x\r\nx-request-id: mine\r\n\r\n").await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 426 ") && head.contains("x-request-id: mine"), "{head}");
    assert!(head.to_lowercase().contains("upgrade: tls/1.3"), "{head}");
    assert_eq!(serde_json::from_str::<Failure>(body).unwrap().code, "tls_required");
}

#[tokio::test]
async fn plaintext_is_served_where_the_operator_says_so() {
    for port in [open(Plaintext::Allow, true).await, open(Plaintext::Refuse, false).await] {
        let answer = plain(port.address, "GET /peer HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("127.0.0.1"), "{answer}");
    }
    let port = open(Plaintext::Allow, true).await;
    let url = format!("https://{}/peer", port.address);
    assert_eq!(pinned::client(port.pin).get(url).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn nonsense_ends_a_connection_and_nothing_else() {
    let port = open(Plaintext::Refuse, true).await;
    for nonsense in
        [&b"\x16\x03\x01\x00\x05hello"[..], b"\x16", b"\x00\x00\x00", b"\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    {
        let mut stream = TcpStream::connect(port.address).await.unwrap();
        stream.write_all(nonsense).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        // A reset is as good an end as any.
        let _ = timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await.unwrap();
    }
    let url = format!("https://{}/peer", port.address);
    assert_eq!(pinned::client(port.pin).get(url).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn one_party_cannot_take_every_connection_and_gets_its_places_back() {
    let port = open(Plaintext::Refuse, false).await;
    let mut held = Vec::new();
    while port.state.turned_away() == 0 {
        held.push(TcpStream::connect(port.address).await.unwrap());
        // The listener counts a connection when it accepts it.
        until(|| port.state.turned_away() > 0 || port.state.open_connections() == held.len()).await;
        assert!(held.len() < 1_000, "connections are not bounded");
    }
    assert_eq!(port.state.open_connections(), held.len() - 1);
    drop(held);
    until(|| port.state.open_connections() == 0).await;
    let answer = plain(port.address, "GET /peer HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test(start_paused = true)]
async fn whoever_says_nothing_is_hung_up_on() {
    let port = open(Plaintext::Refuse, false).await;
    for beginning in ["", "GET / HT", "GET / HTTP/1.1\r\nhost: x\r\nslow"] {
        let mut stream = TcpStream::connect(port.address).await.unwrap();
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let started = tokio::time::Instant::now();
        timeout(Duration::from_secs(60), stream.read_to_end(&mut rest)).await.unwrap().unwrap();
        assert!(started.elapsed() <= Duration::from_secs(25), "{beginning:?}: {:?}", started.elapsed());
    }
}

#[tokio::test]
async fn the_end_waits_for_calls_under_way_but_not_for_streams() {
    let port = open(Plaintext::Refuse, true).await;
    let client = pinned::client(port.pin);
    let slow = tokio::spawn(client.get(format!("https://{}/slow", port.address)).send());
    let mut endless = client.get(format!("https://{}/endless", port.address)).send().await.unwrap();
    assert_eq!(&endless.chunk().await.unwrap().unwrap()[..], b"first");
    port.shutdown.cancel();
    assert_eq!(slow.await.unwrap().unwrap().text().await.unwrap(), "done");
    timeout(Duration::from_secs(10), port.task).await.unwrap().unwrap();
    assert!(endless.chunk().await.is_err());
    assert!(TcpStream::connect(port.address).await.is_err());
}
