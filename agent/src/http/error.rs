//! The one shape in which a request fails.

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use dtma_api::Failure;
use serde_json::Value;

/// A failed request: the status code and the body that goes with it.
#[derive(Debug, Clone)]
pub struct ApiError {
    status: StatusCode,
    failure: Failure,
    /// Boxed, because errors travel in results and few have one.
    header: Option<Box<(HeaderName, HeaderValue)>>,
}

impl ApiError {
    /// A failure with a stable `code` and a sentence a person can act on. Never put anything internal into either.
    pub fn new(status: StatusCode, code: &str, error: impl Into<String>) -> Self {
        Self { status, failure: Failure::new(code, error), header: None }
    }

    /// Its code.
    pub fn code(&self) -> &str {
        &self.failure.code
    }

    /// Its body, to be told among others.
    pub fn into_failure(self) -> Failure {
        self.failure
    }

    /// The same with `details`.
    pub fn with_details(mut self, details: Value) -> Self {
        self.failure.details = Some(details);
        self
    }

    /// The same with a header on the answer, such as `retry-after`.
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.header = Some(Box::new((name, value)));
        self
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.failure)).into_response();
        if let Some(header) = self.header {
            let (name, value) = *header;
            response.headers_mut().insert(name, value);
        }
        response
    }
}
