//! axum's extractors, failing the way everything else here fails, and the body, which is read only once its sender is known.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::ApiError;

/// A whole body must be here after this long; the largest takes a slow line half a second.
const BODY_TIME: Duration = Duration::from_secs(20);

/// Values in the path.
pub(super) struct Path<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let axum::extract::Path(values) = axum::extract::Path::from_request_parts(parts, state).await?;
        Ok(Self(values))
    }
}

/// Values in the query.
pub(super) struct Query<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let axum::extract::Query(values) = axum::extract::Query::from_request_parts(parts, state).await?;
        Ok(Self(values))
    }
}

/// A body nobody has read yet: strangers can't fill our memory with theirs.
pub(super) struct Unread(Request);

impl<S: Sync> FromRequest<S> for Unread {
    type Rejection = Infallible;

    async fn from_request(request: Request, _: &S) -> Result<Self, Infallible> {
        Ok(Self(request))
    }
}

impl Unread {
    /// Reads all of it.
    ///
    /// # Errors
    /// When it is too long, comes too slowly, or breaks off.
    pub(super) async fn read(self) -> Result<Bytes, ApiError> {
        match timeout(BODY_TIME, Bytes::from_request(self.0, &())).await {
            Ok(read) => Ok(read?),
            Err(_) => Err(ApiError::SlowBody),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::extract::Request;
    use axum::http::StatusCode;
    use axum::response::IntoResponse as _;
    use futures_util::stream;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_body_that_drips_is_given_up() {
        let drops = stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Some((Ok::<_, Infallible>("{"), ()))
        });
        let request = Request::new(Body::from_stream(drops));
        let refused = Unread(request).read().await.unwrap_err().into_response();
        assert_eq!(refused.status(), StatusCode::REQUEST_TIMEOUT);
    }
}
