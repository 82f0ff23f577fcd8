//! What callers put into the path and the query.

#[cfg(any(test, fuzzing))]
pub(in crate::http) mod fuzzed;

use std::collections::HashMap;
use std::time::Duration;

use axum::extract::{FromRequestParts, Path, Query};
use axum::http::request;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use dtma_api::InstanceName;
use dtma_api::failure::Fault;
use jiff::Timestamp;

use super::super::App;
use super::super::error::ApiError;
use super::invalid;
use crate::instance::Unresolved;
use crate::reconcile::Missing;

/// How long a caller waits unless it says so.
const DEFAULT_WAIT: u64 = 120;
/// Longest time a caller may wait: edge functions are ended after about 150 s without a byte.
const MAX_WAIT: u64 = 140;

/// The instance a path's `{ref}` names.
pub(in crate::http) struct Named(pub(in crate::http) InstanceName);

impl FromRequestParts<App> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut request::Parts, app: &App) -> Result<Self, ApiError> {
        let reference = reference(parts, app).await?;
        app.parts().instances.find(&reference).await.map(Self).map_err(unresolved)
    }
}

/// A path's `{ref}`, decoded.
pub(in crate::http) async fn reference(parts: &mut request::Parts, app: &App) -> Result<String, ApiError> {
    let Path(reference) = Path::<String>::from_request_parts(parts, app)
        .await
        .map_err(|rejection| ApiError::new(StatusCode::BAD_REQUEST, "invalid_request", rejection.body_text()))?;
    Ok(reference)
}

pub(in crate::http) fn unresolved(missing: Missing) -> ApiError {
    let (status, code) = match missing {
        Missing::Unresolved(Unresolved::Unknown(_)) => (StatusCode::NOT_FOUND, "instance_not_found"),
        Missing::Unresolved(Unresolved::Ambiguous(_)) => (StatusCode::CONFLICT, "ambiguous_reference"),
        Missing::Unseen => {
            return ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "docker_unavailable", missing.to_string())
                .with_header(header::RETRY_AFTER, HeaderValue::from_static("5"));
        }
    };
    ApiError::new(status, code, missing.to_string())
}

/// The query. Unknown parameters are ignored.
pub(in crate::http) struct Parameters(HashMap<String, String>);

impl FromRequestParts<App> for Parameters {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut request::Parts, _: &App) -> Result<Self, ApiError> {
        Self::of(&parts.uri)
    }
}

fn fault(name: &str, problem: &str) -> ApiError {
    invalid(vec![Fault { path: format!("?{name}"), problem: problem.to_owned() }])
}

impl Parameters {
    fn of(uri: &Uri) -> Result<Self, ApiError> {
        match Query::<HashMap<String, String>>::try_from_uri(uri) {
            Ok(Query(parameters)) => Ok(Self(parameters)),
            Err(_) => Err(fault("", "is not a query")),
        }
    }

    fn given(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|text| !text.is_empty())
    }

    /// `wait`: seconds, cut to the longest there is.
    pub(in crate::http) fn wait(&self) -> Result<Duration, ApiError> {
        let seconds = match self.given("wait") {
            None => DEFAULT_WAIT,
            Some(text) => text.parse().map_err(|_| fault("wait", "must be whole seconds, 0 to 140"))?,
        };
        Ok(Duration::from_secs(seconds.min(MAX_WAIT)))
    }

    /// A switch that is off unless said otherwise.
    pub(in crate::http) fn flag(&self, name: &str) -> Result<bool, ApiError> {
        self.flag_or(name, false)
    }

    pub(in crate::http) fn flag_or(&self, name: &str, default: bool) -> Result<bool, ApiError> {
        match self.0.get(name).map(String::as_str) {
            None => Ok(default),
            Some("" | "true" | "1") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(_) => Err(fault(name, "must be true or false")),
        }
    }

    /// A count, or `all`, which is as if it weren't there.
    pub(in crate::http) fn count(&self, name: &str) -> Result<Option<u32>, ApiError> {
        match self.given(name) {
            None | Some("all") => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| fault(name, "must be a number of lines, or all")),
        }
    }

    pub(in crate::http) fn has(&self, name: &str) -> bool {
        self.given(name).is_some()
    }

    /// A time: RFC 3339, or Unix seconds.
    pub(in crate::http) fn time(&self, name: &str) -> Result<Option<Timestamp>, ApiError> {
        let Some(text) = self.given(name) else { return Ok(None) };
        let seconds = || text.parse::<i64>().ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
        let time = text.parse::<Timestamp>().ok().or_else(seconds);
        time.map(Some).ok_or_else(|| fault(name, "must be a time as in 2026-01-31T12:00:00Z, or Unix seconds"))
    }
}
