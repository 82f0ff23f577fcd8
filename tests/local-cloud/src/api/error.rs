//! DigitalOcean's error answers.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::cloud::ActError;
use crate::ledger::OverLimit;
use crate::order::Broken;

/// A request that got an error for an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// No token, or another one.
    #[error("Unable to authenticate you.")]
    Unauthorized,
    /// No such thing.
    #[error("The resource you requested could not be found.")]
    NotFound,
    /// Not JSON, or not of the shape asked for.
    #[error("{0}")]
    BadRequest(String),
    /// Understood, and against a rule.
    #[error("{0}")]
    Unprocessable(String),
    /// A tag that can't be: DigitalOcean answers these in a shape of their own.
    #[error("Error validating resource tag: \"tag-name \\\"{0}\\\" contains invalid characters\"")]
    InvalidTag(String),
    /// Over the rate limit.
    #[error("API rate limit exceeded.")]
    TooManyRequests,
    /// Armed as a fault, with its status.
    #[error("{}", words(*.0))]
    Fault(StatusCode),
}

impl ApiError {
    /// The answer's status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::BadRequest(_) | Self::InvalidTag(_) => StatusCode::BAD_REQUEST,
            Self::Unprocessable(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::TooManyRequests => StatusCode::TOO_MANY_REQUESTS,
            Self::Fault(status) => *status,
        }
    }
}

/// DigitalOcean's `id` of an error.
fn id(status: StatusCode) -> String {
    match status {
        StatusCode::UNAUTHORIZED => "unauthorized".to_owned(),
        StatusCode::FORBIDDEN => "forbidden".to_owned(),
        StatusCode::NOT_FOUND => "not_found".to_owned(),
        StatusCode::UNPROCESSABLE_ENTITY => "unprocessable_entity".to_owned(),
        StatusCode::TOO_MANY_REQUESTS => "too_many_requests".to_owned(),
        StatusCode::INTERNAL_SERVER_ERROR => "server_error".to_owned(),
        other => other.canonical_reason().unwrap_or("error").to_lowercase().replace([' ', '-'], "_"),
    }
}

fn words(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "Unable to authenticate you.",
        StatusCode::FORBIDDEN => "You are not authorized to perform this operation",
        StatusCode::NOT_FOUND => "The resource you requested could not be found.",
        StatusCode::TOO_MANY_REQUESTS => "API rate limit exceeded.",
        StatusCode::INTERNAL_SERVER_ERROR => "Unexpected server-side error",
        other => other.canonical_reason().unwrap_or("Unexpected error"),
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status();
        let body = match &self {
            Self::InvalidTag(_) => json!({
                "error": self.to_string(), "messages": null,
                "root_causes": [format!("rpc error: code = InvalidArgument desc = {self}")],
            }),
            Self::Unauthorized
            | Self::NotFound
            | Self::BadRequest(_)
            | Self::Unprocessable(_)
            | Self::TooManyRequests
            | Self::Fault(_) => json!({ "id": id(status), "message": self.to_string() }),
        };
        (status, Json(body)).into_response()
    }
}

impl From<OverLimit> for ApiError {
    fn from(error: OverLimit) -> Self {
        Self::Unprocessable(error.to_string())
    }
}

impl From<Broken> for ApiError {
    fn from(error: Broken) -> Self {
        Self::Unprocessable(error.to_string())
    }
}

impl From<ActError> for ApiError {
    fn from(error: ActError) -> Self {
        match error {
            ActError::Unknown => Self::NotFound,
            ActError::Refused(refusal) => Self::Unprocessable(refusal.to_string()),
        }
    }
}
