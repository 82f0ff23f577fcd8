//! Channels to servers that speak websocket with the subprotocol `mcp`: every text frame is one message. The protocol's own pings are
//! answered while messages are being read, so not by an agent whose client doesn't take what was sent to it.

use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, Method, Request, StatusCode, header};
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, Error};
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use super::{DEPTH, Dial, Link, LinkEnd};
use crate::mcp::proxy::host_of;
use crate::mcp::{HttpClient, MAX_MESSAGE_BYTES, http_client};

const SUBPROTOCOL: &str = "mcp";
/// From connecting to the whole handshake.
const ATTEMPT: Duration = Duration::from_secs(5);
/// For telling the server that we go; it may not listen.
const FAREWELL: Duration = Duration::from_secs(1);
/// Read at once, and kept for as long as the channel is open: an agent may have many.
const BUFFER_BYTES: usize = 16 * 1024;

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Opens channels to one server that speaks websocket. Each is a connection, and so a session, of its own.
#[derive(Debug, Clone)]
pub struct WebsocketDialer {
    client: HttpClient,
    address: SocketAddr,
    path: String,
}

impl WebsocketDialer {
    /// Dials the endpoint at `path`, which begins with a slash and may have a query.
    pub fn new(address: SocketAddr, path: String) -> Self {
        Self { client: http_client(), address, path }
    }

    /// Makes the handshake ourselves: tungstenite's refuses servers that don't pick the subprotocol that was offered, and many don't.
    async fn open(&self) -> Result<Socket, LinkEnd> {
        let key = generate_key();
        let request = Request::builder()
            .method(Method::GET)
            .uri(format!("http://{}{}", self.address, self.path))
            .header(header::HOST, host_of(self.address))
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, &key)
            .header(header::SEC_WEBSOCKET_PROTOCOL, SUBPROTOCOL)
            .body(Body::empty())
            .map_err(|_| LinkEnd::because("the path of its endpoint can't be put into a URL"))?;
        let response = self.client.request(request).await.map_err(|error| {
            LinkEnd::because(if error.is_connect() {
                "it does not accept connections"
            } else {
                "it hung up before it answered"
            })
        })?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(LinkEnd::because(format!("it answered {} instead of opening a websocket", response.status())));
        }
        check_handshake(response.headers(), &key)?;
        let connection = hyper::upgrade::on(response)
            .await
            .map_err(|_| LinkEnd::because("it hung up after it had agreed to a websocket"))?;
        let config = WebSocketConfig::default()
            .read_buffer_size(BUFFER_BYTES)
            .write_buffer_size(BUFFER_BYTES)
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES));
        Ok(WebSocketStream::from_raw_socket(TokioIo::new(connection), Role::Client, Some(config)).await)
    }
}

#[async_trait]
impl Dial for WebsocketDialer {
    async fn dial(&self) -> Result<Link, LinkEnd> {
        let late = || LinkEnd::because(format!("it did not answer within {} seconds", ATTEMPT.as_secs()));
        let socket = timeout(ATTEMPT, self.open()).await.unwrap_or_else(|_| Err(late()))?;
        let (to_server, outgoing) = mpsc::channel(DEPTH);
        let (incoming, from_server) = mpsc::channel(DEPTH);
        tokio::spawn(run(socket, outgoing, incoming));
        Ok(Link { to_server, from_server })
    }
}

/// What a client has to check of the server's answer (RFC 6455, 4.1).
fn check_handshake(headers: &HeaderMap, key: &str) -> Result<(), LinkEnd> {
    let value = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let upgrades = value(header::UPGRADE).is_some_and(|to| to.eq_ignore_ascii_case("websocket"));
    let expected = derive_accept_key(key.as_bytes());
    if !upgrades || value(header::SEC_WEBSOCKET_ACCEPT).map(str::trim) != Some(expected.as_str()) {
        return Err(LinkEnd::because("its answer to the handshake is not that of a websocket server"));
    }
    if headers.contains_key(header::SEC_WEBSOCKET_EXTENSIONS) {
        return Err(LinkEnd::because("it uses an extension that was not offered"));
    }
    match headers.get(header::SEC_WEBSOCKET_PROTOCOL) {
        Some(picked) if picked != SUBPROTOCOL => Err(LinkEnd::because("it speaks another subprotocol than mcp")),
        _ => Ok(()),
    }
}

/// Carries messages both ways until either side is gone. The two directions don't wait for each other.
async fn run(socket: Socket, mut outgoing: mpsc::Receiver<Bytes>, incoming: mpsc::Sender<Result<Bytes, LinkEnd>>) {
    let (mut writer, reader) = socket.split();
    let end = tokio::select! {
        end = deliver(reader, &incoming) => Some(end),
        end = send_all(&mut writer, &mut outgoing) => Some(end),
        () = incoming.closed() => None,
    };
    // From here on sending fails.
    drop(outgoing);
    // Our farewell, or the answer to theirs.
    let _ = timeout(FAREWELL, writer.close()).await;
    drop(writer);
    if let Some(end) = end {
        // Nobody is left to be told when this fails.
        let _ = incoming.send(Err(end)).await;
    }
}

/// Delivers messages until there are no more. Nothing is read while there is no room for what was.
async fn deliver(mut reader: SplitStream<Socket>, incoming: &mpsc::Sender<Result<Bytes, LinkEnd>>) -> LinkEnd {
    loop {
        match reader.next().await {
            Some(Ok(Message::Text(text))) => {
                if incoming.send(Ok(text.into())).await.is_err() {
                    return LinkEnd::because("nobody reads its messages any more");
                }
            }
            Some(Ok(Message::Binary(_))) => return LinkEnd::because("it sent a binary message, and JSON-RPC is text"),
            Some(Ok(Message::Close(farewell))) => return closed(farewell),
            // Reading on answers a ping.
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
            Some(Err(error)) => return broken(&error),
            None => return LinkEnd::because("it closed its connection"),
        }
    }
}

/// Sends messages until one can't be. Never done when there are merely no more: answers may still come.
async fn send_all(writer: &mut SplitSink<Socket, Message>, outgoing: &mut mpsc::Receiver<Bytes>) -> LinkEnd {
    while let Some(message) = outgoing.recv().await {
        if message.len() > MAX_MESSAGE_BYTES {
            return LinkEnd::because(format!("a message for it is longer than {MAX_MESSAGE_BYTES} bytes"));
        }
        let Ok(text) = Utf8Bytes::try_from(message) else {
            return LinkEnd::because("a message for it is not UTF-8");
        };
        match writer.send(Message::Text(text)).await {
            Ok(()) => {}
            // It has said goodbye; the reader is about to find out with which words.
            Err(Error::ConnectionClosed | Error::AlreadyClosed | Error::Protocol(_)) => break,
            Err(error) => return broken(&error),
        }
    }
    std::future::pending().await
}

fn closed(farewell: Option<CloseFrame>) -> LinkEnd {
    LinkEnd::because(match farewell {
        None => "it closed the websocket".to_owned(),
        Some(CloseFrame { code, reason }) if reason.is_empty() => format!("it closed the websocket with code {code}"),
        Some(CloseFrame { code, reason }) => format!("it closed the websocket with code {code}: {reason}"),
    })
}

fn broken(error: &Error) -> LinkEnd {
    LinkEnd::because(match error {
        Error::Capacity(CapacityError::MessageTooLong { .. }) => {
            format!("it sent a message longer than {MAX_MESSAGE_BYTES} bytes")
        }
        Error::Utf8(_) => "it sent a text message that is not UTF-8".to_owned(),
        Error::Protocol(violation) => format!("it broke the websocket protocol: {violation}"),
        _ => "its connection broke off".to_owned(),
    })
}

#[cfg(test)]
mod tests;
