//! Channels to servers that speak legacy HTTP+SSE (protocol version 2024-11-05): a GET opens a stream, whose first event names the URL
//! that messages are posted to; the answers come on the stream.

mod events;

use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use axum::body::Body;
use axum::http::uri::{Authority, PathAndQuery, Scheme};
use axum::http::{Method, Request, Response, StatusCode, Uri, header};
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use reqwest::Url;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};

use self::events::{Event, Events, Kind};
use super::{DEPTH, Dial, Link, LinkEnd};
use crate::mcp::bridge::Unanswered;
use crate::mcp::proxy::host_of;
use crate::mcp::{HttpClient, MAX_MESSAGE_BYTES, http_client};

#[cfg(any(test, fuzzing))]
pub(crate) use self::events::fuzzed::events as fuzzed_events;

/// From connecting to the event that names the endpoint.
const ATTEMPT: Duration = Duration::from_secs(5);
/// For one posted message to be accepted. Nearly every server answers 202 at once; some only when the tool has finished, and tools may
/// take minutes.
const POST_TIMEOUT: Duration = Duration::from_secs(300);
/// For so long the next message waits for it.
const PROMPT: Duration = Duration::from_secs(1);
/// Posts that are not accepted yet, beside which others are sent.
const MAX_SLOW: usize = 16;

/// Opens channels to one server that speaks legacy HTTP+SSE. Each is a stream, and so a session, of its own.
#[derive(Debug, Clone)]
pub struct SseDialer {
    client: HttpClient,
    address: SocketAddr,
    path: String,
}

impl SseDialer {
    /// Dials the stream at `path`, which begins with a slash and may have a query.
    pub fn new(address: SocketAddr, path: String) -> Self {
        Self { client: http_client(), address, path }
    }

    async fn open_stream(&self) -> Result<Incoming, LinkEnd> {
        let request = Request::builder()
            .method(Method::GET)
            .uri(format!("http://{}{}", self.address, self.path))
            .header(header::HOST, host_of(self.address))
            .header(header::ACCEPT, "text/event-stream")
            .header(header::CACHE_CONTROL, "no-store")
            .body(Body::empty())
            .map_err(|_| LinkEnd::because("the path of its stream can't be put into a URL"))?;
        let response = exchange(&self.client, request).await?;
        if response.status() != StatusCode::OK {
            return Err(LinkEnd::because(format!("it answered {} instead of opening a stream", response.status())));
        }
        let content_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = content_type.and_then(|value| value.split(';').next()).unwrap_or_default().trim();
        if !media_type.eq_ignore_ascii_case("text/event-stream") {
            return Err(LinkEnd::because("its answer is not a stream of events"));
        }
        Ok(response.into_body())
    }
}

#[async_trait]
impl Dial for SseDialer {
    async fn dial(&self) -> Result<Link, LinkEnd> {
        let deadline = Instant::now() + ATTEMPT;
        let late = |what: &str| LinkEnd::because(format!("it did not {what} within {} seconds", ATTEMPT.as_secs()));
        let body = timeout_at(deadline, self.open_stream()).await.unwrap_or_else(|_| Err(late("answer")))?;
        let mut stream = Stream { body, events: Events::new(MAX_MESSAGE_BYTES), chunk: Bytes::new() };
        let first = timeout_at(deadline, stream.next()).await.unwrap_or_else(|_| Err(late("name its endpoint")))?;
        if first.kind != Kind::Endpoint {
            return Err(LinkEnd::because("it sent a message before it named its endpoint"));
        }
        let mailbox = Mailbox {
            client: self.client.clone(),
            address: self.address,
            endpoint: endpoint(self.address, &self.path, &first.data)?,
        };
        let (to_server, outgoing) = mpsc::channel(DEPTH);
        let (incoming, from_server) = mpsc::channel(DEPTH);
        tokio::spawn(run(stream, mailbox, outgoing, incoming));
        Ok(Link { to_server, from_server })
    }
}

/// Carries messages both ways until either side is gone. The two directions don't wait for each other.
async fn run(
    stream: Stream,
    mailbox: Mailbox,
    outgoing: mpsc::Receiver<Bytes>,
    incoming: mpsc::Sender<Result<Bytes, LinkEnd>>,
) {
    // What isn't polled any more is dropped here, connections included: from then on sending fails.
    let end = tokio::select! {
        end = stream.deliver(&incoming) => end,
        end = mailbox.post_all(outgoing, &incoming) => end,
        () = incoming.closed() => return,
    };
    // Nobody is left to be told when this fails.
    let _ = incoming.send(Err(end)).await;
}

/// The server's stream of events.
struct Stream {
    body: Incoming,
    events: Events,
    /// Received, and not parsed yet.
    chunk: Bytes,
}

impl Stream {
    /// The next event of a kind we know. Nothing is lost when this is dropped before it is done.
    async fn next(&mut self) -> Result<Event, LinkEnd> {
        loop {
            let event = self.events.next(&mut self.chunk);
            if let Some(event) = event.map_err(|too_long| LinkEnd::because(too_long.to_string()))? {
                return Ok(event);
            }
            match self.body.frame().await {
                None => return Err(LinkEnd::because("it closed its stream")),
                Some(Err(_)) => return Err(LinkEnd::because("its stream broke off")),
                Some(Ok(frame)) => self.chunk = frame.into_data().unwrap_or_default(),
            }
        }
    }

    /// Delivers messages until there are no more. Nothing is read while there is no room for what was.
    async fn deliver(mut self, incoming: &mpsc::Sender<Result<Bytes, LinkEnd>>) -> LinkEnd {
        loop {
            match self.next().await {
                Err(end) => return end,
                // An empty one only keeps the connection open; an endpoint is named once.
                Ok(event) if event.kind != Kind::Message || event.data.is_empty() => {}
                Ok(event) => {
                    if incoming.send(Ok(event.data)).await.is_err() {
                        return LinkEnd::because("nobody reads its messages any more");
                    }
                }
            }
        }
    }
}

/// Where the server takes messages for one stream.
struct Mailbox {
    client: HttpClient,
    address: SocketAddr,
    endpoint: Uri,
}

impl Mailbox {
    /// Posts messages in their order, until the server or its session is gone. Never done when there are merely no more: answers may still come.
    ///
    /// A message that isn't accepted fails alone, and is answered in the server's place.
    ///
    /// Some servers accept a message only when they are done with it. What comes after one that isn't accepted promptly is sent beside it:
    /// it may be what the server waits for.
    async fn post_all(
        self,
        mut outgoing: mpsc::Receiver<Bytes>,
        incoming: &mpsc::Sender<Result<Bytes, LinkEnd>>,
    ) -> LinkEnd {
        let mut slow = FuturesUnordered::new();
        let mut more = true;
        loop {
            tokio::select! {
                Some(posted) = slow.next() => {
                    if let Err(end) = posted {
                        return end;
                    }
                }
                message = outgoing.recv(), if more && slow.len() < MAX_SLOW => {
                    let Some(message) = message else {
                        more = false;
                        continue;
                    };
                    let mut posting = Box::pin(self.deliver(message, incoming));
                    match timeout(PROMPT, &mut posting).await {
                        Ok(Ok(())) => {}
                        Ok(Err(end)) => return end,
                        Err(_) => slow.push(posting),
                    }
                }
                else => return std::future::pending().await,
            }
        }
    }

    async fn deliver(&self, message: Bytes, incoming: &mpsc::Sender<Result<Bytes, LinkEnd>>) -> Result<(), LinkEnd> {
        // Not the message itself: it may be long, and its posting take minutes.
        let unanswered = Unanswered::of(&message);
        let posted = timeout(POST_TIMEOUT, self.post(message)).await;
        let why = match posted.unwrap_or_else(|_| Err(NotPosted::Refused("it did not accept it in time".to_owned()))) {
            Ok(()) => return Ok(()),
            Err(NotPosted::Over(end)) => return Err(end),
            Err(NotPosted::Refused(why)) => why,
        };
        tracing::debug!(why, "a server did not take a message");
        if let Some(unanswered) = unanswered {
            let answer = unanswered.because(&format!("the server did not take the message: {why}"));
            // Nobody is left to be told when this fails.
            let _ = incoming.send(Ok(answer)).await;
        }
        Ok(())
    }

    async fn post(&self, message: Bytes) -> Result<(), NotPosted> {
        let over = |why: String| NotPosted::Over(LinkEnd::because(why));
        if message.len() > MAX_MESSAGE_BYTES {
            return Err(over(format!("a message for it is longer than {MAX_MESSAGE_BYTES} bytes")));
        }
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.endpoint.clone())
            .header(header::HOST, host_of(self.address))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(message))
            .map_err(|_| over("its endpoint can't be posted to".to_owned()))?;
        let status = exchange(&self.client, request).await.map_err(NotPosted::Over)?.status();
        match status {
            _ if status.is_success() => Ok(()),
            // It doesn't know the session any more.
            StatusCode::NOT_FOUND | StatusCode::GONE => Err(over(format!("it answered {status} to a message"))),
            _ => Err(NotPosted::Refused(format!("it answered {status}"))),
        }
    }
}

/// Why a message was not taken.
enum NotPosted {
    /// Others may be.
    Refused(String),
    /// No other will be.
    Over(LinkEnd),
}

async fn exchange(client: &HttpClient, request: Request<Body>) -> Result<Response<Incoming>, LinkEnd> {
    client.request(request).await.map_err(|error| {
        LinkEnd::because(if error.is_connect() {
            "it does not accept connections"
        } else {
            "it hung up before it answered"
        })
    })
}

/// The URL to post to, from what the server calls it. We know where the server is; only path and query are its to choose. Its idea of
/// its own host is of no use to us (many say `0.0.0.0`), but another port is another server.
fn endpoint(address: SocketAddr, path: &str, named: &[u8]) -> Result<Uri, LinkEnd> {
    let unusable = || LinkEnd::because("the endpoint it names is no URL");
    let named = std::str::from_utf8(named).map_err(|_| unusable())?;
    let base = Url::parse(&format!("http://{address}{path}")).map_err(|_| unusable())?;
    let url = base.join(named).map_err(|_| unusable())?;
    if url.scheme() != "http" {
        return Err(LinkEnd::because("the endpoint it names is not for http"));
    }
    if url.port_or_known_default() != Some(address.port()) {
        return Err(LinkEnd::because("the endpoint it names is on another port"));
    }
    let path_and_query = match url.query() {
        None => url.path().to_owned(),
        Some(query) => format!("{}?{query}", url.path()),
    };
    let mut parts = axum::http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(Authority::try_from(address.to_string()).map_err(|_| unusable())?);
    parts.path_and_query = Some(PathAndQuery::try_from(path_and_query).map_err(|_| unusable())?);
    Uri::from_parts(parts).map_err(|_| unusable())
}

#[cfg(test)]
mod tests;
