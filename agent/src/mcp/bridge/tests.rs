use std::collections::BTreeMap;

use async_trait::async_trait;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use super::*;
use crate::mcp::link::Link;

/// However slow this machine is.
const LIMIT: Duration = Duration::from_secs(90);

/// A server in memory: each link to it is a new process.
#[derive(Debug, Clone)]
struct Server {
    manner: Manner,
    /// Everything any process of it was told, and the end of each.
    heard: mpsc::UnboundedSender<Value>,
    /// While it is true nothing is answered.
    holds: watch::Receiver<bool>,
    absent: watch::Receiver<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    Legacy,
    /// Knows no `initialize`.
    Modern,
    /// Knows both, and each process keeps to what it is addressed in first.
    Locks,
    /// Knows both over one link.
    Both,
    /// Knows the older, and has something to say to whatever it is asked.
    Chatty,
}

impl Manner {
    /// Whether it takes `initialize`, and what only the newer era has, in a process that was addressed in the newer era, or the older, or
    /// not at all yet.
    fn takes(self, addressed: Option<bool>) -> (bool, bool) {
        match self {
            Self::Legacy | Self::Chatty => (true, false),
            Self::Modern => (false, true),
            Self::Locks => (addressed != Some(true), addressed != Some(false)),
            Self::Both => (true, true),
        }
    }
}

struct World {
    bridge: Arc<Bridge>,
    heard: mpsc::UnboundedReceiver<Value>,
    holds: watch::Sender<bool>,
    absent: watch::Sender<bool>,
    shutdown: CancellationToken,
}

fn world_of(manner: Manner, sharing: Sharing) -> World {
    world_with(manner, sharing, Budget::default())
}

fn world_with(manner: Manner, sharing: Sharing, budget: Budget) -> World {
    let (server, around) = server(manner);
    around.with(sharing, server, budget)
}

/// One whose sessions have processes of their own, and what those hear.
fn world_of_processes(most: u16) -> (World, mpsc::UnboundedReceiver<Value>) {
    world_of_processes_of(Manner::Legacy, most)
}

fn world_of_processes_of(manner: Manner, most: u16) -> (World, mpsc::UnboundedReceiver<Value>) {
    let (own, heard) = mpsc::unbounded_channel();
    let (server, around) = server(manner);
    let dial = Arc::new(Server { heard: own, ..server.clone() });
    (around.with(Sharing::Processes { dial, most }, server, Budget::default()), heard)
}

/// What there is around a server.
struct Around {
    heard: mpsc::UnboundedReceiver<Value>,
    holds: watch::Sender<bool>,
    absent: watch::Sender<bool>,
}

fn server(manner: Manner) -> (Server, Around) {
    let (heard_sender, heard) = mpsc::unbounded_channel();
    let (holds, absent) = (watch::Sender::new(false), watch::Sender::new(false));
    let server = Server { manner, heard: heard_sender, holds: holds.subscribe(), absent: absent.subscribe() };
    (server, Around { heard, holds, absent })
}

impl Around {
    fn with(self, sharing: Sharing, server: Server, budget: Budget) -> World {
        let Self { heard, holds, absent } = self;
        let shutdown = CancellationToken::new();
        let another = Some(Arc::new(server.clone()) as Arc<dyn Dial>);
        let ways = Ways { sharing, dial: Arc::new(server), another };
        let bridge = Bridge::new("echo", ways, budget, shutdown.clone());
        World { bridge, heard, holds, absent, shutdown }
    }
}

fn world() -> World {
    world_of(Manner::Legacy, Sharing::Shared)
}

#[async_trait]
impl Dial for Server {
    async fn dial(&self) -> Result<Link, LinkEnd> {
        if *self.absent.borrow() {
            return Err(LinkEnd::because("nobody is there"));
        }
        let (to_server, messages) = mpsc::channel(2);
        let (out, from_server) = mpsc::channel(2);
        tokio::spawn(process(self.manner, messages, out, self.heard.clone(), self.holds.clone()));
        Ok(Link { to_server, from_server })
    }
}

async fn process(
    manner: Manner,
    mut messages: mpsc::Receiver<Bytes>,
    out: mpsc::Sender<Result<Bytes, LinkEnd>>,
    heard: mpsc::UnboundedSender<Value>,
    mut holds: watch::Receiver<bool>,
) {
    let say = |message: Value| {
        let out = out.clone();
        async move { drop(out.send(Ok(Bytes::from(message.to_string()))).await) }
    };
    // What it asked, and the id of the call it asked for.
    let mut asked: BTreeMap<String, Value> = BTreeMap::new();
    // Calls that are answered in another order.
    let mut late: Vec<Value> = Vec::new();
    // Whether it was addressed in the newer era first.
    let mut addressed = None;
    while let Some(message) = messages.recv().await {
        let message: Value = serde_json::from_slice(&message).unwrap();
        let _ = heard.send(message.clone());
        drop(holds.wait_for(|holds| !holds).await);
        let (id, params) = (message["id"].clone(), message["params"].clone());
        let answer = |result: Value| json!({"jsonrpc": "2.0", "id": id, "result": result});
        let (older, newer) = manner.takes(addressed);
        let begins = message["method"].as_str().filter(|method| matches!(*method, "initialize" | "server/discover"));
        if begins.is_some() && addressed.is_none() {
            addressed = Some(begins == Some("server/discover"));
        }
        if manner == Manner::Locks && begins == Some("server/discover") && !newer {
            let error = json!({"code": -32600, "message": "this connection serves another era"});
            say(json!({"jsonrpc": "2.0", "id": id, "error": error})).await;
            continue;
        }
        match message["method"].as_str() {
            None => {
                if let Some(call) = asked.remove(id.as_str().unwrap_or_default()) {
                    say(json!({"jsonrpc": "2.0", "id": call, "result": message})).await;
                }
            }
            // For nobody's sake.
            Some("notifications/say") => {
                for message in params["messages"].as_array().unwrap() {
                    say(message.clone()).await;
                }
            }
            Some("initialize") if older => {
                say(answer(json!({"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}}))).await;
            }
            Some("server/discover") if newer => {
                say(answer(json!({"supportedVersions": ["2026-07-28"]}))).await;
            }
            Some("server/discover") if manner == Manner::Chatty => say(answer(json!({}))).await,
            Some("crash") => {
                drop(out.send(Err(LinkEnd::because("its process ended"))).await);
                break;
            }
            Some("hang") => {}
            Some("big") => {
                let text = "x".repeat(usize::try_from(params["bytes"].as_u64().unwrap()).unwrap());
                say(answer(json!(text))).await;
            }
            Some("flood") => {
                let token = &params["_meta"]["progressToken"];
                for progress in 0..params["times"].as_u64().unwrap() {
                    let params = json!({"progressToken": token, "progress": progress, "message": params["message"]});
                    say(json!({"jsonrpc": "2.0", "method": "notifications/progress", "params": params})).await;
                }
                say(answer(json!("done"))).await;
            }
            Some("batch") => {
                let noted = json!({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"});
                let mut batch = vec![noted; usize::try_from(params["others"].as_u64().unwrap()).unwrap()];
                batch.push(answer(json!("in a batch")));
                say(json!(batch)).await;
            }
            Some("ask") => {
                let own = format!("own-{id}");
                asked.insert(own.clone(), id.clone());
                say(json!({"jsonrpc": "2.0", "id": own, "method": params["method"], "params": {}})).await;
            }
            Some("tell") => {
                say(json!({"jsonrpc": "2.0", "method": params["method"]})).await;
                say(answer(json!({}))).await;
            }
            Some("ping") => say(answer(json!({}))).await,
            Some("echo") => say(answer(params)).await,
            Some("late") => {
                late.push(answer(params));
                if late.len() >= 8 {
                    for answer in late.drain(..).rev() {
                        say(answer).await;
                    }
                }
            }
            Some(_) if id.is_null() => {}
            Some(_) => {
                let error = json!({"code": -32601, "message": "Method not found"});
                say(json!({"jsonrpc": "2.0", "id": id, "error": error})).await;
            }
        }
    }
    let _ = heard.send(json!("end"));
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Body,
}

impl Answer {
    async fn text(self) -> String {
        let body = tokio::time::timeout(LIMIT, self.body.collect()).await.unwrap().unwrap();
        String::from_utf8(body.to_bytes().to_vec()).unwrap()
    }

    /// Its messages, the answer last, however they came.
    async fn messages(self) -> Vec<Value> {
        if self.headers["content-type"] == "application/json" {
            return vec![serde_json::from_str(&self.text().await).unwrap()];
        }
        let text = self.text().await;
        text.lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .map(|data| serde_json::from_str(data).unwrap())
            .collect()
    }

    async fn json(self) -> Value {
        self.messages().await.pop().unwrap()
    }

    fn session(&self) -> String {
        self.headers["mcp-session-id"].to_str().unwrap().to_owned()
    }
}

impl World {
    async fn send(&self, method: &str, headers: &[(&str, &str)], body: impl Into<Body>) -> Result<Answer, Refused> {
        let mut request = Request::builder()
            .method(method)
            .header("content-type", "application/json")
            .header("accept", "application/json, text/event-stream");
        for (name, value) in headers {
            request
                .headers_mut()
                .unwrap()
                .insert(axum::http::HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
        }
        let request = request.body(body.into()).unwrap();
        let answer = tokio::time::timeout(LIMIT, self.bridge.serve(request)).await.unwrap()?;
        let (parts, body) = answer.into_parts();
        Ok(Answer { status: parts.status, headers: parts.headers, body })
    }

    async fn post(&self, session: &str, message: Value) -> Result<Answer, Refused> {
        self.send("POST", &[("mcp-session-id", session)], message.to_string()).await
    }

    async fn initialize(&self, capabilities: Value) -> Answer {
        let params = json!({"protocolVersion": "2025-06-18", "capabilities": capabilities, "clientInfo": {}});
        let message = json!({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params});
        self.send("POST", &[], message.to_string()).await.unwrap()
    }

    /// A session, as a client begins one.
    async fn session(&self) -> String {
        let session = self.initialize(json!({"sampling": {}, "elicitation": {}})).await.session();
        let done = self.post(&session, json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await.unwrap();
        assert_eq!(done.status, StatusCode::ACCEPTED);
        session
    }

    async fn modern(&self, method: &str, params: Value) -> Result<Answer, Refused> {
        let mut params = params;
        params["_meta"]["io.modelcontextprotocol/protocolVersion"] = json!("2026-07-28");
        params["_meta"]["io.modelcontextprotocol/clientCapabilities"] = json!({});
        let message = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        let headers = [("mcp-protocol-version", "2026-07-28"), ("mcp-method", method)];
        self.send("POST", &headers, message.to_string()).await
    }

    async fn listen(&self, session: &str) -> Body {
        let answer = self.send("GET", &[("mcp-session-id", session)], "").await.unwrap();
        assert_eq!(
            (answer.status, &answer.headers["content-type"]),
            (StatusCode::OK, &"text/event-stream".parse().unwrap())
        );
        answer.body
    }

    /// What the server is told next, other than what is left out.
    async fn hears(&mut self, method: &str) -> Value {
        let hearing = async {
            loop {
                let message = self.heard.recv().await.unwrap();
                if message["method"] == method {
                    return message;
                }
            }
        };
        tokio::time::timeout(LIMIT, hearing).await.unwrap()
    }

    /// What the server is answered next to what it asked.
    async fn hears_an_answer(&mut self) -> Value {
        let hearing = async {
            loop {
                let message = self.heard.recv().await.unwrap();
                if message.get("method").is_none() {
                    return message;
                }
            }
        };
        tokio::time::timeout(LIMIT, hearing).await.unwrap()
    }

    /// The server says this, for nobody's sake, and it has been taken. What the server was answered meanwhile.
    async fn server_says(&mut self, session: &str, messages: impl IntoIterator<Item = Value>) -> Vec<Value> {
        let messages: Vec<Value> = messages.into_iter().chain([request("taken", "ping", json!({}))]).collect();
        let say = json!({"jsonrpc": "2.0", "method": "notifications/say", "params": {"messages": messages}});
        assert_eq!(self.post(session, say).await.unwrap().status, StatusCode::ACCEPTED);
        let mut answers = Vec::new();
        loop {
            match self.hears_an_answer().await {
                answer if answer["id"] == "taken" => return answers,
                answer => answers.push(answer),
            }
        }
    }

    fn heard_so_far(&mut self) -> Vec<Value> {
        std::iter::from_fn(|| self.heard.try_recv().ok()).collect()
    }
}

fn request(id: impl Into<Value>, method: &str, params: Value) -> Value {
    json!({"jsonrpc": "2.0", "id": id.into(), "method": method, "params": params})
}

/// The next message of a stream.
async fn next(body: &mut Body) -> Value {
    let next = async {
        loop {
            let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
            let text = String::from_utf8(frame.to_vec()).unwrap();
            if let Some(data) = text.lines().find_map(|line| line.strip_prefix("data: ")) {
                return serde_json::from_str(data).unwrap();
            }
        }
    };
    tokio::time::timeout(LIMIT, next).await.unwrap()
}

mod asked;
mod calls;
mod eras;
mod rules;
mod sessions;
