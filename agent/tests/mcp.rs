//! The way through to an MCP server, and the probe, against servers made by hand: what they receive, what comes back, and when.

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

#[allow(dead_code, reason = "each test program uses its part")]
mod loopback;

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, Response, StatusCode, header};
use axum::response::IntoResponse as _;
use axum::routing::{self, any, get};
use axum::{Json, Router};
use dtma_agent::engine::ContainerId;
use dtma_agent::instance::SessionMode;
use dtma_agent::mcp::{Bridges, Forwarding, HttpProber, MAX_MESSAGE_BYTES, McpProber, Obstacle, Proxy};
use dtma_agent::reconcile::{Answer, ProbeFailure, Prober as _, Question, Sessions, Upstream};
use dtma_api::health::{Era, Introduction};
use dtma_api::instance::Transport;
use futures_util::{SinkExt as _, StreamExt as _, stream};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::{CancellationToken, DropGuard};

use self::loopback::LoopbackEngine;

const LIMIT: Duration = Duration::from_secs(10);

async fn serve(router: Router) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

fn upstream(address: SocketAddr) -> Upstream {
    let container = ContainerId("c".to_owned());
    Upstream {
        instance: "echo".parse().unwrap(),
        container,
        transport: Transport::Http,
        sessions: SessionMode::Shared,
        address,
        path: "/mcp".to_owned(),
    }
}

async fn forward(address: SocketAddr, suffix: &str, request: Request) -> Result<Response<Body>, Obstacle> {
    let upstream = upstream(address);
    let proxy = Proxy::new(CancellationToken::new());
    let forwarding = Forwarding { upstream: &upstream, prefix: "/tools/echo/mcp", suffix };
    timeout(LIMIT, proxy.forward(forwarding, request)).await.unwrap()
}

fn post(body: impl Into<Body>) -> Request {
    Request::post("https://203.0.113.7:30000/tools/echo/mcp?x=%20y").body(body.into()).unwrap()
}

#[tokio::test]
async fn a_message_arrives_as_it_was_sent_without_what_is_ours() {
    let echo = |method: Method, headers: HeaderMap, request: Request| async move {
        let path = request.uri().to_string();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
        let seen = json!({
            "method": method.as_str(), "path": path, "body": String::from_utf8(body.to_vec()).unwrap(),
            "host": header("host"), "authorization": header("authorization"), "accept": header("accept"),
            "session": header("mcp-session-id"),
        });
        (StatusCode::ACCEPTED, [("mcp-session-id", "s-2"), ("keep-alive", "timeout=5")], Json(seen))
    };
    let address = serve(Router::new().fallback(echo)).await;
    let mut request = post("{\"jsonrpc\": \"2.0\"}");
    for (name, value) in [("authorization", "Bearer fleet"), ("accept", "text/event-stream"), ("mcp-session-id", "s-1")]
    {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let response = forward(address, "/more", request).await.unwrap();
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    assert_eq!(response.headers()["mcp-session-id"], "s-2");
    assert!(!response.headers().contains_key("keep-alive"));
    let seen: Value = serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap();
    let expected = json!({
        "method": "POST", "path": "/mcp/more?x=%20y", "body": "{\"jsonrpc\": \"2.0\"}",
        "host": format!("localhost:{}", address.port()), "authorization": null, "accept": "text/event-stream",
        "session": "s-1",
    });
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn every_method_of_the_protocol_gets_through() {
    let address = serve(Router::new().route("/mcp", any(async |method: Method| method.to_string()))).await;
    for method in [Method::GET, Method::POST, Method::DELETE, Method::OPTIONS] {
        let request = Request::builder().method(&method).uri("/tools/echo/mcp").body(Body::empty()).unwrap();
        let response = forward(address, "", request).await.unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), method.as_str());
    }
}

/// Sends what the test says when it says so, and tells when its stream is dropped.
#[derive(Clone)]
struct Events {
    source: Arc<tokio::sync::Mutex<mpsc::Receiver<&'static str>>>,
    dropped: CancellationToken,
}

async fn events(State(Events { source, dropped }): State<Events>) -> Response<Body> {
    let state: (_, DropGuard) = (source, dropped.drop_guard());
    let events = stream::unfold(state, |state| async move {
        let event = state.0.lock().await.recv().await?;
        Some((Ok::<_, Infallible>(Bytes::from_static(event.as_bytes())), state))
    });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(events)).into_response()
}

async fn event_server() -> (SocketAddr, mpsc::Sender<&'static str>, CancellationToken) {
    let (sender, receiver) = mpsc::channel(1);
    let dropped = CancellationToken::new();
    let state = Events { source: Arc::new(tokio::sync::Mutex::new(receiver)), dropped: dropped.clone() };
    (serve(Router::new().route("/mcp", any(events)).with_state(state)).await, sender, dropped)
}

#[tokio::test]
async fn events_come_one_by_one_and_hanging_up_cancels_upstream() {
    let (address, sender, dropped) = event_server().await;
    let response = forward(address, "", post(Body::empty())).await.unwrap();
    assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
    let mut events = response.into_body().into_data_stream();
    for event in ["data: 1\n\n", "data: 2\n\n", "data: 3\n\n"] {
        // The next one isn't sent before this one has arrived, so nothing may wait for more.
        sender.send(event).await.unwrap();
        assert_eq!(timeout(LIMIT, events.next()).await.unwrap().unwrap().unwrap(), event);
    }
    drop(events);
    timeout(LIMIT, dropped.cancelled()).await.expect("the server noticed that its client is gone");
}

#[tokio::test]
async fn a_client_that_gives_up_before_the_answer_cancels_upstream() {
    let dropped = CancellationToken::new();
    let arrived = Arc::new(tokio::sync::Notify::new());
    let handler = {
        let (dropped, arrived) = (dropped.clone(), arrived.clone());
        async move || {
            let _guard = dropped.drop_guard();
            arrived.notify_one();
            std::future::pending::<()>().await;
        }
    };
    let address = serve(Router::new().route("/mcp", any(handler))).await;
    let call = tokio::spawn(forward_to_the_end(address));
    timeout(LIMIT, arrived.notified()).await.unwrap();
    call.abort();
    timeout(LIMIT, dropped.cancelled()).await.expect("the server noticed that its client is gone");
}

async fn forward_to_the_end(address: SocketAddr) {
    let _ = forward(address, "", post("{}")).await;
}

#[tokio::test]
async fn listening_streams_end_with_the_agent() {
    let (address, sender, _dropped) = event_server().await;
    let shutdown = CancellationToken::new();
    let (proxy, upstream) = (Proxy::new(shutdown.clone()), upstream(address));
    let forwarding = Forwarding { upstream: &upstream, prefix: "/tools/echo/mcp", suffix: "" };
    let request = Request::get("/tools/echo/mcp").body(Body::empty()).unwrap();
    let mut events = proxy.forward(forwarding, request).await.unwrap().into_body().into_data_stream();
    sender.send("data: 1\n\n").await.unwrap();
    assert!(timeout(LIMIT, events.next()).await.unwrap().is_some());
    shutdown.cancel();
    assert!(timeout(LIMIT, events.next()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_message_may_be_sixteen_mebibytes_and_no_more() {
    let length = |body: Body| async move {
        body.collect().await.map(|body| body.to_bytes().len().to_string()).unwrap_or_default()
    };
    let address = serve(Router::new().route("/mcp", any(length))).await;
    let response = forward(address, "", post(vec![b'x'; MAX_MESSAGE_BYTES])).await.unwrap();
    let answer = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(answer, MAX_MESSAGE_BYTES.to_string());

    let mut declared = post(Body::empty());
    declared.headers_mut().insert(header::CONTENT_LENGTH, (MAX_MESSAGE_BYTES + 1).into());
    assert!(matches!(forward(address, "", declared).await, Err(Obstacle::TooLong)));
    let chunks = stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from(vec![b'x'; 1024 * 1024]))).take(17);
    assert!(matches!(forward(address, "", post(Body::from_stream(chunks))).await, Err(Obstacle::TooLong)));
}

#[tokio::test]
async fn a_server_that_is_not_there_or_hangs_up_is_told_apart() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let hanging_up = tokio::spawn(async move { drop(listener.accept().await) });
    assert!(matches!(forward(address, "", post("{}")).await, Err(Obstacle::HungUp(_))));
    hanging_up.await.unwrap();
    assert!(matches!(forward(address, "", post("{}")).await, Err(Obstacle::Unreachable(_))));
}

const ALIVE: Question = Question { patience: Duration::from_secs(1), tools: false };
const TOOLS: Question = Question { patience: Duration::from_secs(1), tools: true };

async fn probe(address: SocketAddr, question: Question) -> Result<Introduction, ProbeFailure> {
    match timeout(LIMIT, HttpProber::default().probe(&upstream(address), question)).await.unwrap()? {
        Answer::Introduced(introduction) => Ok(*introduction),
        other => panic!("{other:?}"),
    }
}

type Handler = fn(&HeaderMap, &Value) -> Response<Body>;

/// What a server does with a probe, and the methods it has been asked.
async fn probed(handler: Handler, question: Question) -> (Result<Introduction, String>, Vec<String>) {
    let (sender, mut asked) = mpsc::unbounded_channel();
    let answer = move |request: Request| async move {
        let (parts, body) = request.into_parts();
        let message = serde_json::from_slice(&body.collect().await.unwrap().to_bytes()).unwrap_or(Value::Null);
        let method = if parts.method == Method::POST { &message["method"] } else { &json!(parts.method.as_str()) };
        sender.send(method.as_str().unwrap().to_owned()).unwrap();
        handler(&parts.headers, &message)
    };
    let address = serve(Router::new().route("/mcp", any(answer))).await;
    let result = probe(address, question).await;
    let mut methods = Vec::new();
    while let Ok(method) = asked.try_recv() {
        methods.push(method);
    }
    (result.map_err(|failure| failure.reason), methods)
}

#[tokio::test]
async fn a_legacy_server_counts_when_it_shakes_hands_and_its_session_is_ended() {
    let (result, asked) = probed(
        |headers, message| {
            if message.is_null() {
                assert_eq!(headers["mcp-session-id"], "s");
                return StatusCode::NO_CONTENT.into_response();
            }
            assert!(headers[header::HOST].to_str().unwrap().starts_with("localhost:"));
            assert_eq!(message["params"]["protocolVersion"], "2025-11-25");
            let result = json!({"jsonrpc": "2.0", "id": message["id"], "result": {"protocolVersion": "2025-06-18"}});
            let stream = stream::iter([Ok::<_, Infallible>(format!("event: message\r\ndata: {result}\r\n\r\n"))]);
            // The stream stays open: a probe must not wait for its end.
            let body = Body::from_stream(stream.chain(stream::pending()));
            ([("mcp-session-id", "s"), ("content-type", "text/event-stream")], body).into_response()
        },
        ALIVE,
    )
    .await;
    let introduction = result.unwrap();
    assert_eq!((introduction.era, introduction.protocol_version.as_str()), (Era::Legacy, "2025-06-18"));
    assert_eq!(introduction.tools, None);
    assert_eq!(asked, ["initialize", "DELETE"]);
}

#[tokio::test]
async fn a_server_of_the_new_era_counts_when_it_can_be_discovered() {
    let (result, asked) = probed(
        |headers, message| {
            if message["method"] != "server/discover" {
                let error = json!({"jsonrpc": "2.0", "id": message["id"], "error": {"code": -32601, "message": "no"}});
                return (StatusCode::NOT_FOUND, Json(error)).into_response();
            }
            assert_eq!(
                (&headers["mcp-method"], &headers["mcp-protocol-version"]),
                (&"server/discover".parse().unwrap(), &"2026-07-28".parse().unwrap())
            );
            assert_eq!(message["params"]["_meta"]["io.modelcontextprotocol/protocolVersion"], "2026-07-28");
            let result = json!({"supportedVersions": ["2026-07-28"], "capabilities": {}});
            Json(json!({"jsonrpc": "2.0", "id": message["id"], "result": result})).into_response()
        },
        ALIVE,
    )
    .await;
    let introduction = result.unwrap();
    assert_eq!((introduction.era, introduction.protocol_version.as_str()), (Era::Modern, "2026-07-28"));
    assert_eq!(asked, ["initialize", "server/discover"]);
}

#[tokio::test]
async fn a_legacy_server_names_its_tools_page_by_page_in_the_same_session() {
    let (result, asked) = probed(
        |headers, message| {
            if message["method"] != "initialize" {
                assert_eq!(headers["mcp-session-id"], "s");
                assert_eq!(
                    headers["mcp-protocol-version"],
                    if message.is_null() { "2025-11-25" } else { "2025-06-18" }
                );
            }
            let result = match message["method"].as_str() {
                Some("initialize") => {
                    json!({"protocolVersion": "2025-06-18", "capabilities": {"tools": {"listChanged": true}},
                "serverInfo": {"name": "calculator", "version": "3"}})
                }
                Some("tools/list") if message["params"]["cursor"] == "2" => json!({"tools": [{"name": "subtract"}]}),
                Some("tools/list") => json!({"tools": [{"name": "add", "inputSchema": {}}], "nextCursor": "2"}),
                _ => return StatusCode::ACCEPTED.into_response(),
            };
            ([("mcp-session-id", "s")], Json(json!({"jsonrpc": "2.0", "id": message["id"], "result": result})))
                .into_response()
        },
        TOOLS,
    )
    .await;
    let introduction = result.unwrap();
    assert_eq!((introduction.name.as_deref(), introduction.version.as_deref()), (Some("calculator"), Some("3")));
    assert_eq!(introduction.capabilities, json!({"tools": {"listChanged": true}}));
    assert_eq!(introduction.tools, Some(vec!["add".to_owned(), "subtract".to_owned()]));
    assert_eq!(asked, ["initialize", "notifications/initialized", "tools/list", "tools/list", "DELETE"]);
}

#[tokio::test]
async fn a_server_of_the_new_era_names_its_tools_without_a_session() {
    let (result, asked) = probed(
        |headers, message| {
            let result = match message["method"].as_str() {
                Some("server/discover") => json!({"supportedVersions": ["2026-07-28"], "capabilities": {"tools": {}},
                "_meta": {"io.modelcontextprotocol/serverInfo": {"name": "new"}}}),
                Some("tools/list") => {
                    assert_eq!(headers["mcp-method"], "tools/list");
                    assert_eq!(message["params"]["_meta"]["io.modelcontextprotocol/protocolVersion"], "2026-07-28");
                    json!({"tools": [{"name": "add"}]})
                }
                _ => return StatusCode::NOT_FOUND.into_response(),
            };
            Json(json!({"jsonrpc": "2.0", "id": message["id"], "result": result})).into_response()
        },
        TOOLS,
    )
    .await;
    let introduction = result.unwrap();
    assert_eq!((introduction.name.as_deref(), introduction.tools), (Some("new"), Some(vec!["add".to_owned()])));
    assert_eq!(asked, ["initialize", "server/discover", "tools/list"]);
}

#[tokio::test]
async fn a_server_that_shakes_hands_is_one_although_it_does_not_name_its_tools() {
    let (silent, asked) = probed(
        |_, message| match message["method"].as_str() {
            Some("initialize") => {
                let result = json!({"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}});
                Json(json!({"jsonrpc": "2.0", "id": message["id"], "result": result})).into_response()
            }
            Some("tools/list") => Body::from_stream(stream::pending::<Result<Bytes, Infallible>>()).into_response(),
            _ => StatusCode::ACCEPTED.into_response(),
        },
        TOOLS,
    )
    .await;
    assert_eq!(silent.unwrap().tools, None);
    assert_eq!(asked, ["initialize", "notifications/initialized", "tools/list"]);
    let (without, asked) = probed(
        |_, message| {
            let result = json!({"protocolVersion": "2025-06-18", "capabilities": {"prompts": {}}});
            Json(json!({"jsonrpc": "2.0", "id": message["id"], "result": result})).into_response()
        },
        TOOLS,
    )
    .await;
    assert_eq!(without.unwrap().tools, Some(vec![]), "it says that it has none");
    assert_eq!(asked, ["initialize"]);
}

#[tokio::test]
async fn anything_else_that_answers_is_no_mcp_server() {
    let cases: [(Handler, &str); 5] = [
        (|_, _| "hello".into_response(), "no JSON-RPC"),
        (|_, _| StatusCode::METHOD_NOT_ALLOWED.into_response(), "405"),
        (|_, _| StatusCode::INTERNAL_SERVER_ERROR.into_response(), "500"),
        (|_, message| Json(json!({"id": message["id"], "result": {}})).into_response(), "protocolVersion"),
        (|_, _| Body::from(vec![b'x'; 2 * 1024 * 1024]).into_response(), "far too long"),
    ];
    for (handler, expected) in cases {
        let (result, _) = probed(handler, TOOLS).await;
        let reason = result.unwrap_err();
        assert!(reason.contains(expected), "{reason} should say {expected}");
    }
}

#[tokio::test]
async fn a_server_that_accepts_and_says_nothing_fails_the_probe_in_time() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let failure = probe(address, ALIVE).await.unwrap_err();
    assert!(failure.reason.contains("did not answer within 1 seconds"), "{failure}");
    drop(listener);
    let failure = probe(address, ALIVE).await.unwrap_err();
    assert!(failure.reason.contains("does not accept"), "{failure}");
}

/// What servers here answer to `initialize` and `ping`, and to nothing else.
fn answer_to(message: &str) -> Option<String> {
    let message: Value = serde_json::from_str(message).unwrap();
    let result = match message["method"].as_str()? {
        "initialize" => {
            json!({"protocolVersion": "2024-11-05", "capabilities": {}, "serverInfo": {"name": "echo"}})
        }
        "ping" => json!({}),
        _ => return None,
    };
    Some(json!({"jsonrpc": "2.0", "id": message["id"], "result": result}).to_string())
}

/// The name of a server that isn't spoken to over streamable HTTP, from its handshake.
async fn probe_over(transport: Transport, address: SocketAddr) -> Result<Option<String>, String> {
    let upstream = Upstream { transport, ..upstream(address) };
    let prober = McpProber::new(Bridges::new(
        Arc::new(LoopbackEngine::default()),
        Sessions::default(),
        CancellationToken::new(),
    ));
    match timeout(LIMIT, prober.probe(&upstream, ALIVE)).await.unwrap() {
        Ok(Answer::Introduced(introduction)) => Ok(introduction.name),
        Ok(other) => panic!("{other:?}"),
        Err(failure) => Err(failure.reason),
    }
}

#[tokio::test]
async fn a_server_on_http_and_sse_counts_when_it_shakes_hands_and_its_stream_is_closed() {
    let (events, stream) = mpsc::channel::<String>(4);
    let stream = Arc::new(std::sync::Mutex::new(Some(stream)));
    let open = move || async move {
        let events = ReceiverStream::new(stream.lock().unwrap().take().unwrap());
        let body = Body::from_stream(events.map(Ok::<_, Infallible>));
        ([(header::CONTENT_TYPE, "text/event-stream")], body)
    };
    let answering = events.clone();
    let take = move |message: String| async move {
        if let Some(answer) = answer_to(&message) {
            answering.send(format!("event: message\ndata: {answer}\n\n")).await.unwrap();
        }
        StatusCode::ACCEPTED
    };
    let address = serve(Router::new().route("/mcp", get(open)).route("/messages", routing::post(take))).await;
    events.send("event: endpoint\ndata: /messages\n\n".to_owned()).await.unwrap();
    assert_eq!(probe_over(Transport::Sse, address).await, Ok(Some("echo".to_owned())));
    timeout(LIMIT, events.closed()).await.unwrap();
}

#[tokio::test]
async fn a_server_on_a_websocket_counts_when_it_shakes_hands_and_is_told_when_that_is_all() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = async {
        let (connection, _) = listener.accept().await.unwrap();
        let mut socket = tokio_tungstenite::accept_async(connection).await.unwrap();
        loop {
            match timeout(LIMIT, socket.next()).await.unwrap() {
                Some(Ok(Message::Text(message))) => {
                    if let Some(answer) = answer_to(&message) {
                        socket.send(Message::text(answer)).await.unwrap();
                    }
                }
                farewell => break farewell,
            }
        }
    };
    let (probed, farewell) = tokio::join!(probe_over(Transport::Websocket, address), serving);
    assert_eq!(probed, Ok(Some("echo".to_owned())));
    assert!(matches!(farewell, Some(Ok(Message::Close(_)))), "{farewell:?}");
}

#[tokio::test]
async fn something_that_merely_listens_is_no_server_on_either() {
    let address = serve(Router::new()).await;
    for transport in [Transport::Sse, Transport::Websocket] {
        let reason = probe_over(transport, address).await.unwrap_err();
        assert!(reason.contains("404"), "{transport:?}: {reason}");
    }
}
