//! Finds out whether an instance answers as an MCP server: one handshake, in whichever era it speaks, cleaned up after.

#[cfg(any(test, fuzzing))]
pub(super) mod fuzzed;
mod over_link;

use std::time::Duration;

use async_trait::async_trait;
use axum::body::Body;
use axum::http::{HeaderValue, Method, Request, Response, StatusCode, header};
use dtma_api::instance::Transport;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::time::timeout;

use self::over_link::{Shaken, shake_hands};
use super::link::Dial;
use super::link::sse::SseDialer;
use super::link::websocket::WebsocketDialer;
use super::proxy::host_of;
use super::{HttpClient, http_client};
use crate::reconcile::{ProbeFailure, Prober, Upstream};

/// One attempt, from connecting to the answer.
const ATTEMPT: Duration = Duration::from_secs(5);
/// For telling the server that the session is over; it may not listen.
const FAREWELL: Duration = Duration::from_secs(1);
/// More than any handshake needs.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// The last version that begins with `initialize`, and the first that doesn't.
const LEGACY: &str = "2025-11-25";
const MODERN: &str = "2026-07-28";
const SESSION: &str = "mcp-session-id";

/// Probes servers: a handshake, over streamable HTTP or over a channel.
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
    async fn probe(&self, upstream: &Upstream) -> Result<(), ProbeFailure> {
        match upstream.transport {
            Transport::Http => {}
            Transport::Sse => {
                return over_link(upstream, &SseDialer::new(upstream.address, upstream.path.clone())).await;
            }
            Transport::Websocket => {
                return over_link(upstream, &WebsocketDialer::new(upstream.address, upstream.path.clone())).await;
            }
            Transport::Stdio => {
                return Err(ProbeFailure {
                    reason: "a server on its standard input can't be probed from outside".to_owned(),
                });
            }
        }
        let attempt = timeout(ATTEMPT, self.handshake(upstream)).await;
        attempt
            .unwrap_or_else(|_| Err(Answer::Nothing(format!("it did not answer within {} seconds", ATTEMPT.as_secs()))))
            .map_err(|answer| ProbeFailure { reason: answer.reason() })
    }
}

/// Whether a handshake succeeds over a channel of its own, which is closed after.
async fn over_link(upstream: &Upstream, dialer: &dyn Dial) -> Result<(), ProbeFailure> {
    let mut link = dialer.dial().await.map_err(|end| ProbeFailure { reason: end.reason })?;
    let Shaken { protocol_version, server, capabilities } =
        shake_hands(&mut link).await.map_err(|reason| ProbeFailure { reason })?;
    tracing::debug!(instance = %upstream.instance, protocol_version, %server, %capabilities, "shook hands");
    Ok(())
}

/// What came instead of a result.
#[derive(Debug)]
enum Answer {
    /// A server that understands HTTP, and not this request: it may be of the other era.
    Refusal(String),
    /// Nothing, or nothing a server would say.
    Nothing(String),
}

impl Answer {
    fn reason(self) -> String {
        match self {
            Self::Refusal(reason) | Self::Nothing(reason) => reason,
        }
    }
}

impl HttpProber {
    async fn handshake(&self, upstream: &Upstream) -> Result<(), Answer> {
        // Legacy first: nearly every server speaks it, many of them only it.
        let refusal = match self.initialize(upstream).await {
            Err(Answer::Refusal(reason)) => reason,
            ended => return ended,
        };
        match self.discover(upstream).await {
            Ok(()) => Ok(()),
            Err(Answer::Refusal(second)) => {
                Err(Answer::Refusal(format!("initialize: {refusal}; server/discover: {second}")))
            }
            Err(nothing @ Answer::Nothing(_)) => Err(nothing),
        }
    }

    async fn initialize(&self, upstream: &Upstream) -> Result<(), Answer> {
        let message = json!({
            "jsonrpc": "2.0",
            "id": 1,
            "method": "initialize",
            "params": {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": client_info()},
        });
        let response = self.post(upstream, &message, &[]).await?;
        let session = response.headers().get(SESSION).cloned();
        let result = result(response).await;
        if let Some(session) = session {
            self.end_session(upstream, session).await;
        }
        let result = result?;
        match result.get("protocolVersion") {
            Some(Value::String(_)) => Ok(()),
            _ => Err(Answer::Refusal("its result names no protocolVersion".to_owned())),
        }
    }

    async fn discover(&self, upstream: &Upstream) -> Result<(), Answer> {
        let message = json!({
            "jsonrpc": "2.0",
            "id": 1,
            "method": "server/discover",
            "params": {"_meta": {
                "io.modelcontextprotocol/protocolVersion": MODERN,
                "io.modelcontextprotocol/clientInfo": client_info(),
                "io.modelcontextprotocol/clientCapabilities": {},
            }},
        });
        let headers = [("mcp-protocol-version", MODERN), ("mcp-method", "server/discover")];
        let result = result(self.post(upstream, &message, &headers).await?).await?;
        match result.get("supportedVersions") {
            Some(Value::Array(_)) => Ok(()),
            _ => Err(Answer::Refusal("its result names no supportedVersions".to_owned())),
        }
    }

    /// Tells the server to forget a session; one that doesn't want to is within its rights.
    async fn end_session(&self, upstream: &Upstream, session: HeaderValue) {
        let request = request(upstream, Method::DELETE)
            .header(SESSION, session)
            .header("mcp-protocol-version", LEGACY)
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
    ) -> Result<Response<Incoming>, Answer> {
        let mut request = request(upstream, Method::POST)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json, text/event-stream");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request
            .body(Body::from(message.to_string()))
            .map_err(|_| Answer::Nothing("its endpoint's path can't be put into a URL".to_owned()))?;
        self.client.request(request).await.map_err(|error| {
            let what =
                if error.is_connect() { "it does not accept connections" } else { "it hung up before it answered" };
            Answer::Nothing(what.to_owned())
        })
    }
}

fn request(upstream: &Upstream, method: Method) -> axum::http::request::Builder {
    Request::builder()
        .method(method)
        .uri(format!("http://{}{}", upstream.address, upstream.path))
        .header(header::HOST, host_of(upstream.address))
}

fn client_info() -> Value {
    json!({"name": "dtma-agent", "version": crate::VERSION})
}

/// The result of the one request that was sent, whether it comes as JSON or on a stream.
async fn result(response: Response<Incoming>) -> Result<Value, Answer> {
    let status = response.status();
    let content_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let streams = content_type.is_some_and(|value| value.starts_with("text/event-stream"));
    let mut body = response.into_body();
    let mut received = Vec::new();
    loop {
        let message = if streams { event_with_answer(&received) } else { None };
        if let Some(message) = message {
            return judge(status, &message);
        }
        match body.frame().await {
            None => break,
            Some(Ok(frame)) => received.extend_from_slice(frame.data_ref().map(AsRef::as_ref).unwrap_or_default()),
            Some(Err(_)) => return Err(Answer::Nothing("it broke off its answer".to_owned())),
        }
        if received.len() > MAX_ANSWER_BYTES {
            return Err(Answer::Nothing("its answer to the handshake is far too long".to_owned()));
        }
    }
    match serde_json::from_slice(&received) {
        Ok(message) if !streams => judge(status, &message),
        _ if status.is_server_error() => Err(Answer::Nothing(format!("it answered {status}"))),
        _ if !status.is_success() => Err(Answer::Refusal(format!("it answered {status}"))),
        _ => Err(Answer::Refusal("its answer is no JSON-RPC message".to_owned())),
    }
}

/// The first whole event of a stream that answers our request.
fn event_with_answer(received: &[u8]) -> Option<Value> {
    let text = String::from_utf8_lossy(received).replace("\r\n", "\n").replace('\r', "\n");
    // What comes after the last blank line is not whole yet.
    let (whole, _) = text.rsplit_once("\n\n")?;
    whole.split("\n\n").find_map(|event| {
        let lines = event.lines().filter_map(|line| line.strip_prefix("data:"));
        let data: Vec<_> = lines.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
        let message: Value = serde_json::from_str(&data.join("\n")).ok()?;
        (message.get("id") == Some(&json!(1)) && message.get("method").is_none()).then_some(message)
    })
}

fn judge(status: StatusCode, message: &Value) -> Result<Value, Answer> {
    if let Some(error) = message.get("error") {
        let code = error.get("code").and_then(Value::as_i64).unwrap_or_default();
        let text: String = error.get("message").and_then(Value::as_str).unwrap_or_default().chars().take(200).collect();
        return Err(Answer::Refusal(format!("it answered {status} with the error {code}: {text}")));
    }
    match message.get("result") {
        Some(result) if status.is_success() && message.get("id") == Some(&json!(1)) => Ok(result.clone()),
        _ if status.is_server_error() => Err(Answer::Nothing(format!("it answered {status}"))),
        _ => Err(Answer::Refusal(format!("it answered {status} with something that is no JSON-RPC result"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_found_in_a_stream_however_it_is_cut() {
        let stream = ": hello\r\n\r\nid: 0\r\ndata:\r\n\r\nevent: message\r\ndata: {\"jsonrpc\":\"2.0\",\r\ndata: \"id\":1,\"result\":{}}\r\n\r\n";
        let found = (0..=stream.len()).find(|end| event_with_answer(&stream.as_bytes()[..*end]).is_some());
        assert!(found.is_some_and(|end| end >= stream.len() - 1), "{found:?}");
        let other = "data: {\"id\":1,\"method\":\"sampling/createMessage\"}\n\ndata: {\"id\":2,\"result\":{}}\n\n";
        assert_eq!(event_with_answer(other.as_bytes()), None);
    }

    #[test]
    fn only_a_result_for_our_request_counts() {
        assert!(judge(StatusCode::OK, &json!({"jsonrpc": "2.0", "id": 1, "result": {}})).is_ok());
        for bad in [json!({}), json!([]), json!({"id": 2, "result": {}}), json!({"id": 1, "error": {"code": -32601}})] {
            assert!(matches!(judge(StatusCode::OK, &bad), Err(Answer::Refusal(_))), "{bad}");
        }
        let broken = judge(StatusCode::INTERNAL_SERVER_ERROR, &json!({}));
        assert!(matches!(broken, Err(Answer::Nothing(_))));
    }
}
