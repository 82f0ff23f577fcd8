use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{DefaultBodyLimit, RawQuery, State};
use axum::http::HeaderMap;
use axum::response::IntoResponse as _;
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_stream::wrappers::ReceiverStream;

use super::super::tests::{end_of, receive, within};
use super::*;

/// A server for one stream, played by the test.
struct Server {
    address: SocketAddr,
    /// What goes out on the stream, as it is; dropping it ends the stream, and it is closed once the client has gone.
    stream: mpsc::Sender<Bytes>,
    /// Each posted message, with the query and headers it came with.
    posted: mpsc::Receiver<(String, HeaderMap, Bytes)>,
    /// Something once the stream has been asked for.
    opened: mpsc::Receiver<HeaderMap>,
}

#[derive(Clone)]
struct Shared {
    stream: Arc<Mutex<Option<mpsc::Receiver<Bytes>>>>,
    posted: mpsc::Sender<(String, HeaderMap, Bytes)>,
    opened: mpsc::Sender<HeaderMap>,
    status: StatusCode,
    /// A message `slow` is accepted when one has come that says `go on`.
    go_on: Arc<Notify>,
}

impl Server {
    /// A server that answers `status` to what is posted to `/messages`.
    async fn start(status: StatusCode) -> Self {
        let (stream, receiver) = mpsc::channel(1);
        let (post_sender, posted) = mpsc::channel(100);
        let (open_sender, opened) = mpsc::channel(1);
        let shared = Shared {
            stream: Arc::new(Mutex::new(Some(receiver))),
            posted: post_sender,
            opened: open_sender,
            status,
            go_on: Arc::default(),
        };
        let router = Router::new()
            .route("/api/sse", get(open))
            .route("/messages", post(take))
            .route("/api/messages", post(take))
            .layer(DefaultBodyLimit::disable())
            .with_state(shared);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, stream, posted, opened }
    }

    /// A server whose stream begins with this endpoint, and a channel to it.
    async fn with_link(status: StatusCode) -> (Self, Link) {
        let server = Self::start(status).await;
        server.send("event: endpoint\ndata: /messages?session=1\n\n").await;
        let link = within(server.dial()).await.unwrap();
        (server, link)
    }

    async fn dial(&self) -> Result<Link, LinkEnd> {
        SseDialer::new(self.address, "/api/sse".to_owned()).dial().await
    }

    async fn send(&self, events: impl Into<String>) {
        within(self.stream.send(Bytes::from(events.into()))).await.unwrap();
    }
}

async fn open(State(shared): State<Shared>, headers: HeaderMap) -> Response<Body> {
    let stream = shared.stream.lock().unwrap().take().expect("one stream is all there is");
    shared.opened.send(headers).await.unwrap();
    let body = Body::from_stream(ReceiverStream::new(stream).map(Ok::<_, std::io::Error>));
    ([(header::CONTENT_TYPE, "text/event-stream; charset=utf-8")], body).into_response()
}

async fn take(
    State(shared): State<Shared>,
    query: RawQuery,
    headers: HeaderMap,
    body: Bytes,
) -> impl axum::response::IntoResponse {
    shared.posted.send((query.0.unwrap_or_default(), headers, body.clone())).await.unwrap();
    match &*body {
        b"slow" => shared.go_on.notified().await,
        b"go on" => shared.go_on.notify_one(),
        _ => {}
    }
    (shared.status, "Accepted")
}

#[tokio::test]
async fn messages_are_posted_in_order_and_answers_come_on_the_stream() {
    let (mut server, mut link) = Server::with_link(StatusCode::ACCEPTED).await;
    let asked = within(server.opened.recv()).await.unwrap();
    assert_eq!(asked[header::ACCEPT], "text/event-stream");
    assert_eq!(asked[header::HOST], format!("localhost:{}", server.address.port()));
    for number in 0..40 {
        within(link.to_server.send(Bytes::from(format!("{{\"id\":{number}}}")))).await.unwrap();
    }
    for number in 0..40 {
        let (query, headers, body) = within(server.posted.recv()).await.unwrap();
        assert_eq!((query.as_str(), body), ("session=1", Bytes::from(format!("{{\"id\":{number}}}"))));
        assert_eq!(headers[header::CONTENT_TYPE], "application/json");
        assert_eq!(headers[header::HOST], format!("localhost:{}", server.address.port()));
    }
    server
        .send("event: message\r\ndata: {\"id\":1}\r\n\r\n: ping\n\nevent: strange\ndata: 1\n\ndata:\n\ndata: [\nda")
        .await;
    server.send("ta: 2]\n\n").await;
    assert_eq!(receive(&mut link).await.unwrap(), "{\"id\":1}");
    assert_eq!(receive(&mut link).await.unwrap(), "[\n2]");
}

#[tokio::test]
async fn a_server_that_accepts_a_message_when_it_is_done_with_it_still_gets_what_it_waits_for() {
    let (mut server, mut link) = Server::with_link(StatusCode::ACCEPTED).await;
    for message in ["slow", "go on", "more"] {
        within(link.to_server.send(Bytes::from(message))).await.unwrap();
    }
    for message in ["slow", "go on", "more"] {
        assert_eq!(within(server.posted.recv()).await.unwrap().2, message);
    }
    server.send("data: well\n\n").await;
    assert_eq!(receive(&mut link).await.unwrap(), "well");
}

#[tokio::test]
async fn the_endpoint_may_be_named_in_any_way_that_means_this_server() {
    let server = Server::start(StatusCode::ACCEPTED).await;
    let port = server.address.port();
    for (named, expected) in [
        ("/messages?session=1".to_owned(), "/messages?session=1"),
        ("messages".to_owned(), "/api/messages"),
        ("?session=2".to_owned(), "/api/sse?session=2"),
        (format!("http://localhost:{port}/messages?a=b%20c"), "/messages?a=b%20c"),
        (format!("http://0.0.0.0:{port}/messages"), "/messages"),
        (format!("http://[::1]:{port}/messages"), "/messages"),
        (format!("http://mcp.example:{port}/messages#part"), "/messages"),
        (format!("//elsewhere:{port}"), "/"),
    ] {
        let uri = endpoint(server.address, "/api/sse", named.as_bytes()).unwrap();
        assert_eq!(uri.to_string(), format!("http://{}{expected}", server.address), "{named}");
    }
    server.send(format!("event: endpoint\ndata: http://0.0.0.0:{port}/api/messages?session=3\n\n")).await;
    let link = within(server.dial()).await.unwrap();
    within(link.to_server.send(Bytes::from_static(b"{}"))).await.unwrap();
    let mut server = server;
    assert_eq!(within(server.posted.recv()).await.unwrap().0, "session=3");
}

#[tokio::test]
async fn an_endpoint_elsewhere_is_refused() {
    for (named, why) in [
        ("http://localhost:1/messages", "another port"),
        ("http://localhost/messages", "another port"),
        ("https://localhost/messages", "not for http"),
        ("file:///etc/passwd", "not for http"),
        ("http://[", "no URL"),
    ] {
        let server = Server::start(StatusCode::ACCEPTED).await;
        server.send(format!("event: endpoint\ndata: {named}\n\n")).await;
        let refused = within(server.dial()).await.unwrap_err();
        assert!(refused.reason.contains(why), "{named}: {refused}");
        within(server.stream.closed()).await;
    }
}

#[tokio::test]
async fn what_is_no_stream_of_this_kind_is_refused() {
    let server = Server::start(StatusCode::ACCEPTED).await;
    let dial =
        async |path: &str| within(SseDialer::new(server.address, path.to_owned()).dial()).await.unwrap_err().reason;
    assert_eq!(dial("/nowhere").await, "it answered 404 Not Found instead of opening a stream");
    assert_eq!(dial("/ /").await, "the path of its stream can't be put into a URL");
    server.send("data: {}\n\n").await;
    assert_eq!(dial("/api/sse").await, "it sent a message before it named its endpoint");

    let router = Router::new().route("/", get(|| async { "a page" }));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let page = tokio::spawn(async move { axum::serve(listener, router).await });
    let dialer = SseDialer::new(address, "/".to_owned());
    assert_eq!(within(dialer.dial()).await.unwrap_err().reason, "its answer is not a stream of events");
    page.abort();
    assert!(page.await.unwrap_err().is_cancelled());
    // A fresh dialer: the other one still has a connection.
    let dialer = SseDialer::new(address, "/".to_owned());
    assert_eq!(within(dialer.dial()).await.unwrap_err().reason, "it does not accept connections");
}

#[tokio::test]
async fn a_server_that_names_no_endpoint_is_given_up() {
    let mut server = Server::start(StatusCode::ACCEPTED).await;
    let dialer = SseDialer::new(server.address, "/api/sse".to_owned());
    let dialing = tokio::spawn(async move { dialer.dial().await });
    within(server.opened.recv()).await.unwrap();
    // Only now: with the clock stopped before it is connected, that would be what takes too long.
    tokio::time::pause();
    let refused = within(dialing).await.unwrap().unwrap_err();
    assert!(refused.reason.ends_with("within 5 seconds"), "{refused}");
    tokio::time::resume();
    within(server.stream.closed()).await;
}

#[tokio::test]
async fn a_message_for_a_session_that_is_gone_ends_the_channel_with_the_status() {
    for (status, named) in [(404, "404 Not Found"), (410, "410 Gone")] {
        let (server, link) = Server::with_link(StatusCode::from_u16(status).unwrap()).await;
        within(link.to_server.send(Bytes::from_static(b"{}"))).await.unwrap();
        assert_eq!(end_of(link).await, format!("it answered {named} to a message"));
        within(server.stream.closed()).await;
    }
}

#[tokio::test]
async fn a_message_that_is_not_accepted_fails_alone_and_the_channel_goes_on() {
    for status in [400, 413, 429, 500, 503] {
        let (mut server, mut link) = Server::with_link(StatusCode::from_u16(status).unwrap()).await;
        for message in
            [r#"{"jsonrpc":"2.0","method":"told"}"#, r#"{"id":"a","result":{}}"#, r#"{"id":7,"method":"tools/call"}"#]
        {
            within(link.to_server.send(Bytes::from_static(message.as_bytes()))).await.unwrap();
        }
        let failed: serde_json::Value = serde_json::from_slice(&receive(&mut link).await.unwrap()).unwrap();
        assert_eq!(
            (&failed["id"], &failed["error"]["code"]),
            (&7.into(), &(-32603).into()),
            "only what wants an answer"
        );
        assert!(failed["error"]["message"].as_str().unwrap().contains(&status.to_string()), "{failed}");
        server.send("data: {\"id\":1}\n\n").await;
        assert_eq!(receive(&mut link).await.unwrap(), "{\"id\":1}");
        for _ in 0..3 {
            assert!(within(server.posted.recv()).await.is_some());
        }
    }
}

#[tokio::test]
async fn the_end_of_the_stream_ends_the_channel_after_what_it_carried() {
    let (server, mut link) = Server::with_link(StatusCode::ACCEPTED).await;
    server.send("data: 1\n\ndata: 2\n\ndata: not whole").await;
    drop(server);
    assert_eq!(receive(&mut link).await.unwrap(), "1");
    assert_eq!(receive(&mut link).await.unwrap(), "2");
    assert_eq!(end_of(link).await, "it closed its stream");
}

#[tokio::test]
async fn long_messages_go_through_and_too_long_ones_end_the_channel() {
    let (mut server, mut link) = Server::with_link(StatusCode::ACCEPTED).await;
    let long = "x".repeat(10 * 1024 * 1024);
    within(link.to_server.send(Bytes::from(long.clone()))).await.unwrap();
    assert!(within(server.posted.recv()).await.unwrap().2 == long);
    server.send(format!("data: {long}\n\n")).await;
    assert!(receive(&mut link).await.unwrap() == long);
    server.send(format!("data: {long}\ndata: {long}\n\n")).await;
    assert_eq!(end_of(link).await, format!("it sent a message longer than {MAX_MESSAGE_BYTES} bytes"));

    let (mut server, link) = Server::with_link(StatusCode::ACCEPTED).await;
    within(link.to_server.send(Bytes::from(vec![b'x'; MAX_MESSAGE_BYTES + 1]))).await.unwrap();
    assert_eq!(end_of(link).await, format!("a message for it is longer than {MAX_MESSAGE_BYTES} bytes"));
    assert!(server.posted.try_recv().is_err());
}

#[tokio::test]
async fn a_receiver_that_does_not_read_holds_the_server_up_and_loses_nothing() {
    const FAR_TOO_MANY: usize = 2000;
    let (server, mut link) = Server::with_link(StatusCode::ACCEPTED).await;
    let filler = "x".repeat(64 * 1024);
    let mut sent = 0;
    while sent < FAR_TOO_MANY {
        let event = Bytes::from(format!("data: {sent} {filler}\n\n"));
        if timeout(Duration::from_millis(500), server.stream.send(event)).await.is_err() {
            break;
        }
        sent += 1;
    }
    assert!((DEPTH..FAR_TOO_MANY).contains(&sent), "{sent} messages lie somewhere unread");
    for number in 0..sent {
        let message = receive(&mut link).await.unwrap();
        assert!(message.starts_with(format!("{number} ").as_bytes()), "message {number}");
    }
    server.send("data: and on\n\n").await;
    assert_eq!(receive(&mut link).await.unwrap(), "and on");
}

#[tokio::test]
async fn dropping_the_channel_closes_the_stream() {
    let (server, link) = Server::with_link(StatusCode::ACCEPTED).await;
    drop(link);
    within(server.stream.closed()).await;
    // Also while nobody reads and everything is full.
    let (server, link) = Server::with_link(StatusCode::ACCEPTED).await;
    for _ in 0..3 * DEPTH {
        server.send("data: 1\n\n").await;
    }
    drop(link);
    within(server.stream.closed()).await;
}

#[tokio::test]
async fn answers_still_come_when_nothing_more_is_sent() {
    let (server, link) = Server::with_link(StatusCode::ACCEPTED).await;
    let Link { to_server, mut from_server } = link;
    drop(to_server);
    server.send("data: late\n\n").await;
    assert_eq!(within(from_server.recv()).await.unwrap().unwrap(), "late");
}
