//! Every failure the provisioner answers with, and its status.

use axum::Json;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use dtma_api::failure::Fault;
use dtma_api::{Failure, InvalidId};

use crate::accounts::NoAccount;
use crate::board::ChangeError;
use crate::environment::EnrolmentRefused;
use crate::heartbeats::NotKept;
use crate::releases::NoRelease;
use crate::requests::WishError;
use crate::rollouts::RolloutError;
use crate::store::StoreError;

/// Why a request is answered with a failure.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// An id in the path.
    #[error(transparent)]
    InvalidId(#[from] InvalidId),
    /// The path, once its percent-encoding is undone.
    #[error("the path can't be used: {0}")]
    InvalidPath(#[from] PathRejection),
    /// The query as a whole.
    #[error("the query can't be used: {0}")]
    UnreadableQuery(#[from] QueryRejection),
    /// Something in the query.
    #[error("the query parameter {name} must be {rule}")]
    InvalidQuery {
        /// Its name.
        name: &'static str,
        /// What it must be.
        rule: &'static str,
    },
    /// The body isn't JSON, or not of the right shape.
    #[error("the body can't be used: {0}")]
    InvalidJson(#[source] serde_json::Error),
    /// Fields of the body.
    #[error("the body has faults; see details")]
    InvalidRequest(Vec<Fault>),
    /// The body is too long.
    #[error("the body is too large")]
    TooLarge,
    /// The body broke off.
    #[error("the body could not be read")]
    BrokenBody,
    /// The body took too long.
    #[error("the body did not come in time")]
    SlowBody,
    /// The internal API's header is missing or wrong.
    #[error("the header X-Internal-Api-Secret is missing or wrong")]
    Forbidden,
    /// No bearer at all.
    #[error("this needs the header Authorization: Bearer …")]
    NoBearer,
    /// A bearer nobody has.
    #[error("this bearer token is not known; its droplet may have been deleted or replaced")]
    UnknownBearer,
    /// An agent that may not enrol.
    #[error(transparent)]
    Enrolment(#[from] EnrolmentRefused),
    /// Whose an agent is.
    #[error(transparent)]
    Account(#[from] NoAccount),
    /// A wish that can't be fulfilled now.
    #[error(transparent)]
    Wish(#[from] WishError),
    /// The account has none.
    #[error("there is no environment")]
    NoEnvironment,
    /// Not a file of a release.
    #[error("there is no such release file")]
    NoReleaseFile,
    /// Not a route.
    #[error("there is nothing at this path; GET / lists what there is")]
    NotFound,
    /// Not a method of this route.
    #[error("this path does not take this method")]
    WrongMethod,
    /// Agents' secrets are not served by this version.
    #[error("this provisioner does not serve tool secrets yet")]
    NoToolSecrets,
    /// A heartbeat that wasn't kept.
    #[error(transparent)]
    Heartbeat(#[from] NotKept),
    /// The operating system gave no randomness.
    #[error("the provisioner could not make a token")]
    NoRandomness,
    /// A file could not be opened.
    #[error("reading a release file")]
    ReleaseFile(#[source] std::io::Error),
    /// A request about rollouts.
    #[error(transparent)]
    Rollout(#[from] RolloutError),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A handler panicked.
    #[error("a handler has failed")]
    Handler(#[source] tokio::task::JoinError),
}

impl From<ChangeError<EnrolmentRefused>> for ApiError {
    fn from(error: ChangeError<EnrolmentRefused>) -> Self {
        match error {
            ChangeError::Refused(refused) => Self::Enrolment(refused),
            ChangeError::Missing => Self::Enrolment(EnrolmentRefused::Unknown),
            other @ (ChangeError::Contended | ChangeError::Store(_)) => Self::Wish(other.into()),
        }
    }
}

impl From<ChangeError<std::convert::Infallible>> for ApiError {
    fn from(error: ChangeError<std::convert::Infallible>) -> Self {
        Self::Wish(error.into())
    }
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> Self {
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE { Self::TooLarge } else { Self::BrokenBody }
    }
}

impl ApiError {
    /// The answer's status and code.
    fn kind(&self) -> (StatusCode, &'static str) {
        match self {
            Self::InvalidId(_) | Self::Account(NoAccount::Unusable(_)) => (StatusCode::BAD_REQUEST, "invalid_id"),
            Self::InvalidPath(_) => (StatusCode::BAD_REQUEST, "invalid_path"),
            Self::UnreadableQuery(_) | Self::InvalidQuery { .. } => (StatusCode::BAD_REQUEST, "invalid_query"),
            Self::InvalidJson(_) => (StatusCode::BAD_REQUEST, "invalid_json"),
            Self::InvalidRequest(_) => (StatusCode::BAD_REQUEST, "invalid_request"),
            Self::BrokenBody => (StatusCode::BAD_REQUEST, "broken_body"),
            Self::SlowBody => (StatusCode::REQUEST_TIMEOUT, "body_too_slow"),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large"),
            Self::Forbidden => (StatusCode::FORBIDDEN, "forbidden"),
            Self::NoBearer => (StatusCode::UNAUTHORIZED, "credential_missing"),
            Self::UnknownBearer => (StatusCode::UNAUTHORIZED, "bearer_unknown"),
            Self::Enrolment(EnrolmentRefused::Unknown) => (StatusCode::UNAUTHORIZED, "token_unknown"),
            Self::Enrolment(EnrolmentRefused::Expired) => (StatusCode::UNAUTHORIZED, "token_expired"),
            Self::Enrolment(EnrolmentRefused::Used) => (StatusCode::UNAUTHORIZED, "token_used"),
            Self::Account(NoAccount::NoSuchAgent) => (StatusCode::NOT_FOUND, "agent_not_found"),
            Self::Account(NoAccount::NotOwner) => (StatusCode::FORBIDDEN, "not_owner"),
            Self::Account(NoAccount::Owners(_)) => (StatusCode::SERVICE_UNAVAILABLE, "owners_unavailable"),
            Self::Wish(WishError::Leaving) => (StatusCode::CONFLICT, "deprovisioning"),
            Self::Wish(WishError::Contended) => (StatusCode::SERVICE_UNAVAILABLE, "busy"),
            Self::NoEnvironment => (StatusCode::NOT_FOUND, "environment_not_found"),
            Self::NoReleaseFile => (StatusCode::NOT_FOUND, "release_not_found"),
            Self::NotFound => (StatusCode::NOT_FOUND, "not_found"),
            Self::WrongMethod => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
            Self::NoToolSecrets => (StatusCode::NOT_IMPLEMENTED, "tool_secrets_not_served"),
            Self::Heartbeat(NotKept::Busy) => (StatusCode::SERVICE_UNAVAILABLE, "busy"),
            Self::Heartbeat(NotKept::Failed) => (StatusCode::SERVICE_UNAVAILABLE, "database_unavailable"),
            Self::Rollout(RolloutError::Missing) => (StatusCode::NOT_FOUND, "rollout_not_found"),
            Self::Rollout(RolloutError::AnotherOpen { .. } | RolloutError::JustStarted) => {
                (StatusCode::CONFLICT, "rollout_open")
            }
            Self::Rollout(RolloutError::Elsewhere(_)) => (StatusCode::CONFLICT, "rollout_elsewhere"),
            Self::Rollout(RolloutError::Impossible(_)) => (StatusCode::CONFLICT, "rollout_over"),
            Self::Rollout(RolloutError::Release(error)) => match error {
                NoRelease::Missing(_) => (StatusCode::UNPROCESSABLE_ENTITY, "release_unknown"),
                NoRelease::Unsigned => (StatusCode::UNPROCESSABLE_ENTITY, "releases_unsigned"),
                NoRelease::Refused { .. } | NoRelease::Altered { .. } => {
                    (StatusCode::UNPROCESSABLE_ENTITY, "release_refused")
                }
                NoRelease::Folder(_) | NoRelease::Unreadable { .. } | NoRelease::Interrupted(_) => {
                    (StatusCode::INTERNAL_SERVER_ERROR, "internal")
                }
            },
            Self::Store(error)
            | Self::Rollout(RolloutError::Store(error))
            | Self::Account(NoAccount::Store(error))
            | Self::Wish(WishError::Store(error)) => {
                if error.passing {
                    (StatusCode::SERVICE_UNAVAILABLE, "database_unavailable")
                } else {
                    (StatusCode::INTERNAL_SERVER_ERROR, "internal")
                }
            }
            Self::NoRandomness | Self::ReleaseFile(_) | Self::Handler(_) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "internal")
            }
        }
    }

    fn details(&self) -> Option<serde_json::Value> {
        match self {
            Self::InvalidRequest(faults) => serde_json::to_value(faults).ok(),
            Self::Rollout(RolloutError::Release(error)) => Some(serde_json::json!({"reason": error.code()})),
            _ => None,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, code) = self.kind();
        let error = if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(error = %self, cause = std::error::Error::source(&self), "answering 500");
            "The provisioner could not do this; its log says why.".to_owned()
        } else if code == "database_unavailable" {
            tracing::error!(error = %self, cause = std::error::Error::source(&self), "answering 503");
            "The provisioner's database can't be used at present; ask again later.".to_owned()
        } else {
            if status.is_server_error() {
                tracing::warn!(error = %self, cause = std::error::Error::source(&self), code, "answering");
            }
            let mut sentence = self.to_string();
            if let Some(first) = sentence.get(..1).map(str::to_uppercase) {
                sentence.replace_range(..1, &first);
            }
            format!("{sentence}.")
        };
        let body = Failure { details: self.details(), ..Failure::new(code, error) };
        let mut response = (status, Json(body)).into_response();
        if status == StatusCode::SERVICE_UNAVAILABLE || status == StatusCode::CONFLICT {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
        }
        response
    }
}
