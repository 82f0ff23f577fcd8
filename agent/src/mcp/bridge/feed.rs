//! What goes to a client's connection: messages in slices, as fast as they are taken, and signs of life between them.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::stream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::budget::Parcel;
use super::line::{Came, Listening, Pending};
use super::{InUse, single_line};

/// Between two signs of life on a stream on which nothing happens.
const ALIVE: Duration = Duration::from_secs(15);

/// Puts an answer into the words of the client's era.
pub(super) type Shape = fn(Bytes) -> Bytes;

/// Where the messages of a stream come from.
pub(super) trait Source: Send + 'static {
    /// The next one; none when there won't be any more. Safe to drop half-way.
    fn next(&mut self) -> impl Future<Output = Option<Parcel>> + Send;
}

/// A call under way, whose session doesn't end meanwhile.
pub(super) struct Call {
    pending: Pending,
    shape: Shape,
    _session: Option<InUse>,
}

impl Call {
    pub(super) fn new(pending: Pending, shape: Shape, session: Option<InUse>) -> Self {
        Self { pending, shape, _session: session }
    }
}

impl Source for Call {
    async fn next(&mut self) -> Option<Parcel> {
        match self.pending.next().await? {
            Came::Related(message) => Some(message),
            Came::Answer(mut message) => {
                message.reword(self.shape);
                Some(message)
            }
        }
    }
}

/// A client that listens, until the agent ends.
pub(super) struct Ear {
    listening: Listening,
    end: CancellationToken,
    _session: InUse,
}

impl Ear {
    pub(super) fn new(listening: Listening, end: CancellationToken, session: InUse) -> Self {
        Self { listening, end, _session: session }
    }
}

impl Source for Ear {
    async fn next(&mut self) -> Option<Parcel> {
        tokio::select! {
            message = self.listening.next() => message,
            () = self.end.cancelled() => None,
        }
    }
}

/// A stream of events, the first of which may be there already.
pub(super) fn events(source: impl Source, first: Option<Parcel>) -> Response<Body> {
    let first = first.map(as_event);
    let events = stream::unfold((source, first), async |(mut source, mut current)| {
        loop {
            if let Some(slice) = current.as_mut().and_then(Parcel::slice) {
                return Some((slice, (source, current)));
            }
            current = match timeout(ALIVE, source.next()).await {
                Ok(message) => Some(as_event(message?)),
                Err(_) => return Some((Ok(sign_of_life()), (source, None))),
            };
        }
    });
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Some proxies wait for more otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// One message as the whole answer.
pub(super) fn json(status: StatusCode, mut message: Parcel) -> Response<Body> {
    let length = message.len();
    let mut response = Response::new(Body::from_stream(stream::iter(std::iter::from_fn(move || message.slice()))));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    response
}

fn as_event(mut message: Parcel) -> Parcel {
    message.reword(event);
    message
}

fn event(message: Bytes) -> Bytes {
    let message = single_line(message);
    let mut event = BytesMut::with_capacity(message.len() + 24);
    event.put_slice(b"event: message\ndata: ");
    event.put(message);
    event.put_slice(b"\n\n");
    event.freeze()
}

fn sign_of_life() -> Bytes {
    Bytes::from_static(b":\n\n")
}
