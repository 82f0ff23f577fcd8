use axum::http::HeaderValue;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::accept_hdr_async_with_config;
use tokio_tungstenite::tungstenite::handshake::server;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::super::tests::{end_of, receive, within};
use super::*;

/// The server's end of a connection, played by the test.
type Server = WebSocketStream<TcpStream>;

/// A connection, whose server answers the handshake with `picked` as its subprotocol; and the headers it was asked with.
async fn open(picked: Option<&'static str>) -> (Server, Result<Link, LinkEnd>, HeaderMap) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialer = WebsocketDialer::new(listener.local_addr().unwrap(), "/ws?a=b".to_owned());
    let mut asked = HeaderMap::new();
    let accept = async {
        let (stream, _) = listener.accept().await.unwrap();
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        #[allow(clippy::result_large_err, reason = "tungstenite says what a refusal is")]
        let answer = |request: &server::Request, mut response: server::Response| {
            assert_eq!(request.uri().to_string(), "/ws?a=b");
            asked = request.headers().clone();
            if let Some(picked) = picked {
                response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(picked));
            }
            Ok(response)
        };
        accept_hdr_async_with_config(stream, answer, Some(config)).await.unwrap()
    };
    let (server, link) = within(async { tokio::join!(accept, dialer.dial()) }).await;
    (server, link, asked)
}

async fn linked() -> (Server, Link) {
    let (server, link, _) = open(Some("mcp")).await;
    (server, link.unwrap())
}

#[tokio::test]
async fn messages_go_both_ways_in_order_one_in_each_text_frame() {
    for picked in [Some("mcp"), None] {
        let (mut server, link, asked) = open(picked).await;
        let mut link = link.unwrap();
        assert_eq!(asked[header::SEC_WEBSOCKET_PROTOCOL], "mcp");
        assert!(asked[header::HOST].to_str().unwrap().starts_with("localhost:"));
        for number in 0..40 {
            within(link.to_server.send(Bytes::from(format!("{{\"id\":{number}}}")))).await.unwrap();
            within(server.send(Message::text(format!("[{number}]")))).await.unwrap();
            assert_eq!(within(server.next()).await.unwrap().unwrap(), Message::text(format!("{{\"id\":{number}}}")));
        }
        for number in 0..40 {
            assert_eq!(receive(&mut link).await.unwrap(), format!("[{number}]"));
        }
    }
}

#[tokio::test]
async fn pings_are_answered_also_when_nothing_else_is_sent() {
    let (mut server, _link) = linked().await;
    within(server.send(Message::Ping(Bytes::from_static(b"there?")))).await.unwrap();
    assert_eq!(within(server.next()).await.unwrap().unwrap(), Message::Pong(Bytes::from_static(b"there?")));
}

#[tokio::test]
async fn what_is_said_at_closing_is_the_reason() {
    let frame = |code, reason: &str| Some(CloseFrame { code, reason: reason.into() });
    for (frame, reason) in [
        (None, "it closed the websocket"),
        (frame(CloseCode::Away, ""), "it closed the websocket with code 1001"),
        (frame(CloseCode::Library(4001), "no such session"), "it closed the websocket with code 4001: no such session"),
    ] {
        let (mut server, mut link) = linked().await;
        within(server.send(Message::text("1"))).await.unwrap();
        within(server.close(frame)).await.unwrap();
        assert_eq!(receive(&mut link).await.unwrap(), "1");
        assert_eq!(end_of(link).await, reason);
        // Ours, in answer.
        assert!(matches!(within(server.next()).await, Some(Ok(Message::Close(_)))));
    }
}

#[tokio::test]
async fn what_is_no_message_ends_the_channel() {
    let (mut server, link) = linked().await;
    within(server.send(Message::Binary(Bytes::from_static(b"{}")))).await.unwrap();
    assert_eq!(end_of(link).await, "it sent a binary message, and JSON-RPC is text");
    assert!(matches!(within(server.next()).await, Some(Ok(Message::Close(_)))));

    let (server, link) = linked().await;
    drop(server);
    assert!(end_of(link).await.contains("reset without closing handshake"));

    let (_server, link) = linked().await;
    within(link.to_server.send(Bytes::from_static(b"\xFF"))).await.unwrap();
    assert_eq!(end_of(link).await, "a message for it is not UTF-8");
}

#[tokio::test]
async fn long_messages_go_through_and_too_long_ones_end_the_channel() {
    let (mut server, mut link) = linked().await;
    let long = "x".repeat(10 * 1024 * 1024);
    within(link.to_server.send(Bytes::from(long.clone()))).await.unwrap();
    assert!(within(server.next()).await.unwrap().unwrap() == Message::text(long.clone()));
    within(server.send(Message::text(long.clone()))).await.unwrap();
    assert!(receive(&mut link).await.unwrap() == long);
    // It may hang up on us while we are still sending.
    let _ = within(server.send(Message::text(format!("{long}{long}")))).await;
    assert_eq!(end_of(link).await, format!("it sent a message longer than {MAX_MESSAGE_BYTES} bytes"));

    let (_server, link) = linked().await;
    within(link.to_server.send(Bytes::from(vec![b'x'; MAX_MESSAGE_BYTES + 1]))).await.unwrap();
    assert_eq!(end_of(link).await, format!("a message for it is longer than {MAX_MESSAGE_BYTES} bytes"));
}

#[tokio::test]
async fn a_receiver_that_does_not_read_holds_the_server_up_and_loses_nothing() {
    const FAR_TOO_MANY: usize = 2000;
    let (mut server, mut link) = linked().await;
    let filler = "x".repeat(64 * 1024);
    let mut sent = 0;
    while sent < FAR_TOO_MANY {
        let message = Message::text(format!("{sent} {filler}"));
        sent += 1;
        // A message that isn't flushed in time is in the server's buffer all the same, and is flushed below.
        if timeout(Duration::from_millis(500), server.send(message)).await.is_err() {
            break;
        }
    }
    assert!((DEPTH..FAR_TOO_MANY).contains(&sent), "{sent} messages lie somewhere unread");
    let reading = async {
        for number in 0..sent {
            let message = receive(&mut link).await.unwrap();
            assert!(message.starts_with(format!("{number} ").as_bytes()), "message {number}");
        }
    };
    let (flushed, ()) = within(async { tokio::join!(server.flush(), reading) }).await;
    flushed.unwrap();
}

#[tokio::test]
async fn a_server_that_does_not_read_holds_the_sender_up_and_is_still_heard() {
    const FAR_TOO_MANY: usize = 2000;
    let (mut server, mut link) = linked().await;
    let message = Bytes::from("x".repeat(64 * 1024));
    let mut sent = 0;
    while sent < FAR_TOO_MANY && timeout(Duration::from_millis(500), link.to_server.send(message.clone())).await.is_ok()
    {
        sent += 1;
    }
    assert!((DEPTH..FAR_TOO_MANY).contains(&sent), "{sent} messages lie somewhere unread");
    within(server.send(Message::text("busy"))).await.unwrap();
    assert_eq!(receive(&mut link).await.unwrap(), "busy");
    for _ in 0..sent {
        assert_eq!(within(server.next()).await.unwrap().unwrap().len(), message.len());
    }
}

#[tokio::test]
async fn dropping_the_channel_closes_the_connection() {
    let (mut server, link) = linked().await;
    drop(link);
    assert_eq!(within(server.next()).await.unwrap().unwrap(), Message::Close(None));

    // Also while nobody reads and everything is full.
    let (mut server, link) = linked().await;
    for _ in 0..3 * DEPTH {
        within(server.send(Message::text("1"))).await.unwrap();
    }
    drop(link);
    assert_eq!(within(server.next()).await.unwrap().unwrap(), Message::Close(None));
}

#[tokio::test]
async fn answers_still_come_when_nothing_more_is_sent() {
    let (mut server, link) = linked().await;
    let Link { to_server, mut from_server } = link;
    drop(to_server);
    within(server.send(Message::text("late"))).await.unwrap();
    assert_eq!(within(from_server.recv()).await.unwrap().unwrap(), "late");
}

#[tokio::test]
async fn a_server_that_is_none_of_this_kind_is_refused() {
    let (_, link, _) = open(Some("graphql-ws")).await;
    assert_eq!(link.unwrap_err().reason, "it speaks another subprotocol than mcp");
    for (answer, reason) in [
        (
            "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n",
            "it answered 403 Forbidden instead of opening a websocket",
        ),
        (
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: guessed\r\n\r\n",
            "its answer to the handshake is not that of a websocket server",
        ),
        ("", "it hung up before it answered"),
    ] {
        assert_eq!(answered(answer).await.unwrap_err().reason, reason);
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialer = WebsocketDialer::new(listener.local_addr().unwrap(), "/".to_owned());
    drop(listener);
    assert_eq!(within(dialer.dial()).await.unwrap_err().reason, "it does not accept connections");
}

/// What becomes of a dial that is answered with these bytes.
async fn answered(answer: &str) -> Result<Link, LinkEnd> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialer = WebsocketDialer::new(listener.local_addr().unwrap(), "/".to_owned());
    let accept = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(stream.read_u8().await.unwrap());
        }
        stream.write_all(answer.as_bytes()).await.unwrap();
    };
    within(async { tokio::join!(accept, dialer.dial()) }).await.1
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialer = WebsocketDialer::new(listener.local_addr().unwrap(), "/".to_owned());
    let dialing = tokio::spawn(async move { dialer.dial().await });
    let (mut stream, _) = within(listener.accept()).await.unwrap();
    within(stream.read_u8()).await.unwrap();
    // Only now: with the clock stopped before it is connected, that would be what takes too long.
    tokio::time::pause();
    let refused = within(dialing).await.unwrap().unwrap_err();
    assert_eq!(refused.reason, "it did not answer within 5 seconds");
}
