//! What every answer carries, whatever it answers: a request id, the cross-origin headers, a line in the log, a count.

use axum::extract::{Request, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_REQUEST_HEADERS, CONTENT_LENGTH, VARY,
};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use dtma_api::REQUEST_ID_HEADER;
use tokio::time::Instant;
use tracing::Instrument;
use uuid::Uuid;

use super::{ApiError, App};

/// Longer ones are replaced.
const REQUEST_ID_LENGTH: usize = 128;

/// Gives the request its id, in the log and in the answer.
pub(super) async fn identify(State(app): State<App>, request: Request, next: Next) -> Response {
    let header = request
        .headers()
        .get(REQUEST_ID_HEADER)
        .filter(|value| (1..=REQUEST_ID_LENGTH).contains(&value.len()) && value.to_str().is_ok())
        .cloned()
        .or_else(|| HeaderValue::from_str(&Uuid::new_v4().to_string()).ok());
    let id = header.as_ref().and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let span = tracing::info_span!("request", id);
    let begun = Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    let (status, ms) = (response.status().as_u16(), begun.elapsed().as_millis());
    app.metrics.http_request(status);
    span.in_scope(|| match path.as_str() {
        // Thousands a minute: their number is in the metrics.
        "/agent/v1/heartbeat" | "/health" => tracing::debug!(%method, path, status, ms, "answered"),
        _ => tracing::info!(%method, path, status, ms, "answered"),
    });
    if let Some(header) = header {
        response.headers_mut().insert(REQUEST_ID_HEADER, header);
    }
    response
}

/// Lets a handler come to its end even when its caller hangs up meanwhile: what it has written it also publishes.
pub(super) async fn to_the_end(request: Request, next: Next) -> Response {
    match tokio::spawn(next.run(request).in_current_span()).await {
        Ok(response) => response,
        Err(error) => ApiError::Handler(error).into_response(),
    }
}

/// As Express' `cors()` does with its defaults, since that is what the callers' browsers have been told so far.
pub(super) async fn cross_origin(request: Request, next: Next) -> Response {
    let preflight = request.method() == Method::OPTIONS;
    let asked_for = request.headers().get(ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let mut response = if preflight { StatusCode::NO_CONTENT.into_response() } else { next.run(request).await };
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    if preflight {
        headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET,HEAD,PUT,PATCH,POST,DELETE"));
        headers.insert(VARY, HeaderValue::from_static("Access-Control-Request-Headers"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        if let Some(asked_for) = asked_for {
            headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked_for);
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::Router;
    use axum::body::Body;
    use axum::middleware::from_fn;
    use axum::routing::post;
    use tokio::sync::Semaphore;
    use tower::ServiceExt as _;

    use super::*;

    #[tokio::test]
    async fn a_caller_who_hangs_up_does_not_stop_a_handler_half_way() {
        let (begun, written, published) =
            (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let signals = (Arc::clone(&begun), Arc::clone(&written), Arc::clone(&published));
        let handler = move || async move {
            let (begun, written, published) = signals;
            begun.add_permits(1);
            written.acquire().await.unwrap().forget();
            published.add_permits(1);
        };
        let app = Router::new().route("/", post(handler)).layer(from_fn(to_the_end));
        let request = Request::post("/").body(Body::empty()).unwrap();
        tokio::select! {
            _ = app.oneshot(request) => panic!("nobody has let it finish"),
            permit = begun.acquire() => permit.unwrap().forget(),
        }
        // The request's future is gone now, as after a hang-up.
        written.add_permits(1);
        published.acquire().await.unwrap().forget();
    }

    #[tokio::test]
    async fn a_handler_that_panics_is_a_500_that_reveals_nothing() {
        let app = Router::new()
            .route(
                "/",
                post(|| async {
                    if true {
                        panic!("inside")
                    }
                }),
            )
            .layer(from_fn(to_the_end));
        let response = app.oneshot(Request::post("/").body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let body = axum::body::to_bytes(response.into_body(), 4096).await.unwrap();
        assert!(!String::from_utf8_lossy(&body).contains("inside"));
    }
}
