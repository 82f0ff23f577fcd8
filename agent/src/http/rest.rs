//! What is left of a request's body when its answer is ready.
//!
//! A connection that is closed while the peer still sends is reset, and with it goes the answer: a caller whose body was too long, or
//! whose key was wrong, would only see a broken connection. So what nobody has read is read and forgotten first, within bounds.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::header;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Frame, SizeHint};
use tokio::time::timeout;

/// Read and forgotten at most.
const MOST: usize = 32 * 1024 * 1024;
/// For at most so long.
const LONGEST: Duration = Duration::from_secs(5);

/// A body that was lent to a handler.
pub(super) struct Rest(Arc<Mutex<Body>>);

/// What the handler has of it.
struct Lent(Arc<Mutex<Body>>);

impl Rest {
    /// Lends a request's body to its handler. Nothing, when nothing is to come, or only comes when it is asked for.
    pub(super) fn of(request: Request) -> (Request, Option<Self>) {
        if request.body().is_end_stream() || request.headers().contains_key(header::EXPECT) {
            return (request, None);
        }
        let mut rest = None;
        let request = request.map(|body| {
            let body = Arc::new(Mutex::new(body));
            rest = Some(Self(Arc::clone(&body)));
            Body::new(Lent(body))
        });
        (request, rest)
    }

    /// Reads what is left, unless somebody still does.
    pub(super) async fn discard(self) {
        let Ok(body) = Arc::try_unwrap(self.0) else { return };
        let mut body = body.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut read = 0;
        let all = async {
            while let Some(Ok(frame)) = body.frame().await
                && read < MOST
            {
                read += frame.data_ref().map_or(0, Bytes::len);
            }
        };
        // Whoever sends more, or slower, loses the answer.
        let _ = timeout(LONGEST, all).await;
    }
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut body = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Pin::new(&mut *body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).size_hint()
    }
}
