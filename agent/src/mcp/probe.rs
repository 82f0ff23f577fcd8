//! Finds out whether an instance answers as an MCP server: one handshake, in whichever era it speaks, cleaned up after.

mod bridged;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzzed;
mod introduction;

use std::time::Duration;

use async_trait::async_trait;
use axum::body::Body;
use axum::http::{HeaderValue, Method, Request, Response, StatusCode, header};
use dtma_api::health::{Era, Introduction};
use dtma_api::instance::Transport;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, timeout, timeout_at};

use super::era::{MODERN, NEWEST_LEGACY, client_info, modern_meta};
use super::proxy::host_of;
use super::{HttpClient, http_client};
use crate::reconcile::{Answer, ProbeFailure, Prober, Question, Upstream};

/// For telling the server that the session is over; it may not listen.
const FAREWELL: Duration = Duration::from_secs(1);
/// More than any handshake needs.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// Tools come with their schemas.
const MAX_PAGE_BYTES: usize = 4 * 1024 * 1024;
/// Pages of tools that are asked for.
const MAX_PAGES: u64 = 20;
/// Id of a conversation's first request; the others' come after it.
const FIRST: u64 = 1;
const SESSION: &str = "mcp-session-id";

pub use bridged::McpProber;

/// Probes servers that speak streamable HTTP, with a handshake.
#[derive(Debug, Clone)]
pub struct HttpProber {
    client: HttpClient,
}

impl Default for HttpProber {
    fn default() -> Self {
        Self { client: http_client() }
    }
}

#[async_trait]
impl Prober for HttpProber {
    async fn probe(&self, upstream: &Upstream, question: Question) -> Result<Answer, ProbeFailure> {
        match upstream.transport {
            Transport::Http => {
                let introduction = self.converse(upstream, question).await;
                introduction
                    .map(|introduction| Answer::Introduced(Box::new(introduction)))
                    .map_err(|obstacle| ProbeFailure { reason: obstacle.reason() })
            }
            // Not over plain HTTP.
            Transport::Sse | Transport::Websocket | Transport::Stdio => Ok(Answer::CannotSay),
        }
    }
}

/// What came instead of a result.
#[derive(Debug)]
enum NoResult {
    /// A server that understands HTTP, and not this request: it may be of the other era.
    Refusal(String),
    /// Nothing, or nothing a server would say.
    Nothing(String),
}

impl NoResult {
    fn reason(self) -> String {
        match self {
            Self::Refusal(reason) | Self::Nothing(reason) => reason,
        }
    }
}

/// A conversation that has begun.
struct Begun {
    introduction: Introduction,
    /// What its further messages have to bear; a server of the new era gives none.
    session: Option<HeaderValue>,
}

impl HttpProber {
    /// Shakes hands, asks for the tools where they are wanted, and says goodbye.
    async fn converse(&self, upstream: &Upstream, question: Question) -> Result<Introduction, NoResult> {
        let until = Instant::now() + question.patience;
        let begun = timeout_at(until, self.handshake(upstream)).await;
        let Begun { mut introduction, session } = begun.unwrap_or_else(|_| {
            let seconds = question.patience.as_secs();
            Err(NoResult::Nothing(format!("it did not answer within {seconds} seconds")))
        })?;
        if question.tools && introduction::offers_tools(&introduction) {
            let asked = self.tools(upstream, &introduction, session.as_ref());
            // It has shaken hands, which is what was to be found out.
            introduction.tools = timeout_at(until, asked).await.ok().and_then(Result::ok);
        } else if question.tools {
            introduction.tools = Some(Vec::new());
        }
        if let Some(session) = session {
            self.end_session(upstream, session).await;
        }
        Ok(introduction)
    }

    async fn handshake(&self, upstream: &Upstream) -> Result<Begun, NoResult> {
        // Legacy first: nearly every server speaks it, many of them only it.
        let refusal = match self.initialize(upstream).await {
            Err(NoResult::Refusal(reason)) => reason,
            ended => return ended,
        };
        match self.discover(upstream).await {
            Ok(introduction) => Ok(Begun { introduction, session: None }),
            Err(NoResult::Refusal(second)) => {
                Err(NoResult::Refusal(format!("initialize: {refusal}; server/discover: {second}")))
            }
            Err(nothing @ NoResult::Nothing(_)) => Err(nothing),
        }
    }

    async fn initialize(&self, upstream: &Upstream) -> Result<Begun, NoResult> {
        let message = json!({
            "jsonrpc": "2.0",
            "id": FIRST,
            "method": "initialize",
            "params": {"protocolVersion": NEWEST_LEGACY, "capabilities": {}, "clientInfo": client_info()},
        });
        let response = self.post(upstream, &message, &[]).await?;
        let session = response.headers().get(SESSION).cloned();
        let introduced = result(response, FIRST, MAX_ANSWER_BYTES).await.and_then(|result| {
            introduction::legacy(&result)
                .ok_or_else(|| NoResult::Refusal("its result names no protocolVersion".to_owned()))
        });
        match (introduced, session) {
            (Ok(introduction), session) => Ok(Begun { introduction, session }),
            (Err(no), None) => Err(no),
            (Err(no), Some(session)) => {
                self.end_session(upstream, session).await;
                Err(no)
            }
        }
    }

    async fn discover(&self, upstream: &Upstream) -> Result<Introduction, NoResult> {
        let message = json!({
            "jsonrpc": "2.0",
            "id": FIRST,
            "method": "server/discover",
            "params": {"_meta": modern_meta()},
        });
        let headers = [("mcp-protocol-version", MODERN), ("mcp-method", "server/discover")];
        let result = result(self.post(upstream, &message, &headers).await?, FIRST, MAX_ANSWER_BYTES).await?;
        introduction::modern(&result)
            .ok_or_else(|| NoResult::Refusal("its result names no supportedVersions".to_owned()))
    }

    /// Names of its tools, page by page.
    async fn tools(
        &self,
        upstream: &Upstream,
        introduction: &Introduction,
        session: Option<&HeaderValue>,
    ) -> Result<Vec<String>, NoResult> {
        let session = session.map(|value| value.to_str()).transpose();
        let session = session.map_err(|_| NoResult::Refusal("its session's id can't be repeated".to_owned()))?;
        let mut headers: Vec<(&str, &str)> = session.into_iter().map(|id| (SESSION, id)).collect();
        match introduction.era {
            Era::Legacy => {
                headers.push(("mcp-protocol-version", &introduction.protocol_version));
                let ready = json!({"jsonrpc": "2.0", "method": "notifications/initialized"});
                self.post(upstream, &ready, &headers).await?;
            }
            Era::Modern => headers.extend([("mcp-protocol-version", MODERN), ("mcp-method", "tools/list")]),
        }
        let mut names = Vec::new();
        let mut cursor = None;
        for id in FIRST + 1..=FIRST + MAX_PAGES {
            let mut params = Map::new();
            if introduction.era == Era::Modern {
                params.insert("_meta".to_owned(), modern_meta());
            }
            if let Some(cursor) = cursor.take() {
                params.insert("cursor".to_owned(), cursor);
            }
            let message = json!({"jsonrpc": "2.0", "id": id, "method": "tools/list", "params": params});
            let page = result(self.post(upstream, &message, &headers).await?, id, MAX_PAGE_BYTES).await?;
            cursor = introduction::add_tools(&mut names, &page);
            if cursor.is_none() {
                break;
            }
        }
        Ok(names)
    }

    /// Tells the server to forget a session; one that doesn't want to is within its rights.
    async fn end_session(&self, upstream: &Upstream, session: HeaderValue) {
        let request = request(upstream, Method::DELETE)
            .header(SESSION, session)
            .header("mcp-protocol-version", NEWEST_LEGACY)
            .body(Body::empty());
        if let Ok(request) = request {
            let _ = timeout(FAREWELL, self.client.request(request)).await;
        }
    }

    async fn post(
        &self,
        upstream: &Upstream,
        message: &Value,
        headers: &[(&str, &str)],
    ) -> Result<Response<Incoming>, NoResult> {
        let mut request = request(upstream, Method::POST)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json, text/event-stream");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request
            .body(Body::from(message.to_string()))
            .map_err(|_| NoResult::Nothing("its endpoint's path can't be put into a URL".to_owned()))?;
        self.client.request(request).await.map_err(|error| {
            let what =
                if error.is_connect() { "it does not accept connections" } else { "it hung up before it answered" };
            NoResult::Nothing(what.to_owned())
        })
    }
}

fn request(upstream: &Upstream, method: Method) -> axum::http::request::Builder {
    Request::builder()
        .method(method)
        .uri(format!("http://{}{}", upstream.address, upstream.path))
        .header(header::HOST, host_of(upstream.address))
}

/// The result of the request `id`, whether it comes as JSON or on a stream, in `most` bytes.
async fn result(response: Response<Incoming>, id: u64, most: usize) -> Result<Value, NoResult> {
    let status = response.status();
    let content_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let streams = content_type.is_some_and(|value| value.starts_with("text/event-stream"));
    let mut body = response.into_body();
    let mut received = Vec::new();
    loop {
        let message = if streams { event_with_answer(&received, id) } else { None };
        if let Some(message) = message {
            return judge(status, &message, id);
        }
        match body.frame().await {
            None => break,
            Some(Ok(frame)) => received.extend_from_slice(frame.data_ref().map(AsRef::as_ref).unwrap_or_default()),
            Some(Err(_)) => return Err(NoResult::Nothing("it broke off its answer".to_owned())),
        }
        if received.len() > most {
            return Err(NoResult::Nothing("its answer to the handshake is far too long".to_owned()));
        }
    }
    match serde_json::from_slice(&received) {
        Ok(message) if !streams => judge(status, &message, id),
        _ if status.is_server_error() => Err(NoResult::Nothing(format!("it answered {status}"))),
        _ if !status.is_success() => Err(NoResult::Refusal(format!("it answered {status}"))),
        _ => Err(NoResult::Refusal("its answer is no JSON-RPC message".to_owned())),
    }
}

/// The first whole event of a stream that answers the request `id`.
fn event_with_answer(received: &[u8], id: u64) -> Option<Value> {
    let text = String::from_utf8_lossy(received).replace("\r\n", "\n").replace('\r', "\n");
    // What comes after the last blank line is not whole yet.
    let (whole, _) = text.rsplit_once("\n\n")?;
    whole.split("\n\n").find_map(|event| {
        let lines = event.lines().filter_map(|line| line.strip_prefix("data:"));
        let data: Vec<_> = lines.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
        let message: Value = serde_json::from_str(&data.join("\n")).ok()?;
        (message.get("id") == Some(&json!(id)) && message.get("method").is_none()).then_some(message)
    })
}

fn judge(status: StatusCode, message: &Value, id: u64) -> Result<Value, NoResult> {
    if let Some(error) = message.get("error") {
        let code = error.get("code").and_then(Value::as_i64).unwrap_or_default();
        let text: String = error.get("message").and_then(Value::as_str).unwrap_or_default().chars().take(200).collect();
        return Err(NoResult::Refusal(format!("it answered {status} with the error {code}: {text}")));
    }
    match message.get("result") {
        Some(result) if status.is_success() && message.get("id") == Some(&json!(id)) => Ok(result.clone()),
        _ if status.is_server_error() => Err(NoResult::Nothing(format!("it answered {status}"))),
        _ => Err(NoResult::Refusal(format!("it answered {status} with something that is no JSON-RPC result"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_found_in_a_stream_however_it_is_cut() {
        let stream = ": hello\r\n\r\nid: 0\r\ndata:\r\n\r\nevent: message\r\ndata: {\"jsonrpc\":\"2.0\",\r\ndata: \"id\":1,\"result\":{}}\r\n\r\n";
        let found = (0..=stream.len()).find(|end| event_with_answer(&stream.as_bytes()[..*end], 1).is_some());
        assert!(found.is_some_and(|end| end >= stream.len() - 1), "{found:?}");
        let other = "data: {\"id\":1,\"method\":\"sampling/createMessage\"}\n\ndata: {\"id\":2,\"result\":{}}\n\n";
        assert_eq!(event_with_answer(other.as_bytes(), 1), None);
    }

    #[test]
    fn only_a_result_for_our_request_counts() {
        assert!(judge(StatusCode::OK, &json!({"jsonrpc": "2.0", "id": 1, "result": {}}), 1).is_ok());
        for bad in [json!({}), json!([]), json!({"id": 2, "result": {}}), json!({"id": 1, "error": {"code": -32601}})] {
            assert!(matches!(judge(StatusCode::OK, &bad, 1), Err(NoResult::Refusal(_))), "{bad}");
        }
        let broken = judge(StatusCode::INTERNAL_SERVER_ERROR, &json!({}), 1);
        assert!(matches!(broken, Err(NoResult::Nothing(_))));
    }
}
