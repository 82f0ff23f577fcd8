//! The seam to the cloud: the six things the loop needs of it. [`digitalocean`] is the one real adapter.

pub mod digitalocean;
mod limiter;
mod retry;

use std::net::Ipv4Addr;
use std::time::Duration;

use async_trait::async_trait;
use secrecy::SecretString;

pub use limiter::Limiter;

use crate::environment::{DropletId, DropletSpec};

/// What the loop asks of a cloud.
#[async_trait]
pub trait Cloud: Send + Sync {
    /// Asks for one droplet. Sent at most once: never repeated, whatever comes back.
    ///
    /// # Errors
    /// [`CreateError`] tells a certain no from a doubtful answer.
    async fn create(&self, request: &CreateRequest) -> Result<Created, CreateError>;

    /// One droplet by id, or none when the cloud knows no such droplet. Not subject to the lists' lag.
    ///
    /// # Errors
    /// When the cloud gave no usable answer, after repeats.
    async fn droplet(&self, id: DropletId) -> Result<Option<Droplet>, CloudError>;

    /// Every droplet bearing `tag`; may lag behind creation and deletion by seconds.
    ///
    /// # Errors
    /// When the cloud gave no usable answer, after repeats; never a part of the list.
    async fn tagged(&self, tag: &str) -> Result<Vec<Droplet>, CloudError>;

    /// How far an action is, or none when the cloud knows no such action.
    ///
    /// # Errors
    /// When the cloud gave no usable answer, after repeats.
    async fn action(&self, id: i64) -> Result<Option<ActionStatus>, CloudError>;

    /// Asks for a droplet to be deleted; one that is gone is a success. Says nothing about when it will be gone.
    ///
    /// # Errors
    /// When the cloud refused or gave no usable answer, after repeats.
    async fn delete(&self, id: DropletId) -> Result<(), CloudError>;
}

/// A droplet to be made.
#[derive(Debug)]
pub struct CreateRequest {
    /// Host name: letters, digits, dots and dashes.
    pub name: String,
    /// Kind of droplet.
    pub spec: DropletSpec,
    /// Tags it is born with.
    pub tags: Vec<String>,
    /// Its user data.
    pub user_data: SecretString,
}

/// The cloud's acceptance of a create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    /// The new droplet.
    pub droplet: DropletId,
    /// The action that makes it.
    pub action: Option<i64>,
}

/// A droplet as the cloud tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Droplet {
    /// Its id.
    pub id: DropletId,
    /// Whether it is up.
    pub power: Power,
    /// Its public address, once it has one.
    pub public_ip: Option<Ipv4Addr>,
    /// Its tags.
    pub tags: Vec<String>,
    /// When it was made, by the cloud's clock.
    pub created_at: jiff::Timestamp,
}

/// What a droplet's status says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// Being made.
    New,
    /// Powered on. Not the same as booted.
    Active,
    /// `off`, `archive`, or a word we don't know.
    Other,
}

/// How far an action is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActionStatus {
    /// Under way.
    InProgress,
    /// Done.
    Completed,
    /// Failed.
    Errored,
}

/// The cloud's own words about a failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// Its error id, such as `unprocessable_entity`.
    pub id: String,
    /// Its sentence.
    pub message: String,
    /// Its request id, for its support.
    pub request_id: Option<String>,
    /// How long it asked us to wait.
    pub retry_after: Option<Duration>,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}: {}", self.status, self.id, self.message)?;
        self.request_id.as_ref().map_or(Ok(()), |id| write!(f, " (request {id})"))
    }
}

/// Why a question to the cloud, or a delete, came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum CloudError {
    /// It answered, with a failure.
    #[error("{operation}: the cloud answered {refusal}")]
    Refused {
        /// What was asked.
        operation: &'static str,
        /// The answer.
        refusal: Refusal,
    },
    /// No answer.
    #[error("{operation}: the cloud could not be reached")]
    Unreachable {
        /// What was asked.
        operation: &'static str,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// An answer that makes no sense.
    #[error("{operation}: the cloud's answer could not be read")]
    Unreadable {
        /// What was asked.
        operation: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A list that does not end.
    #[error("{operation}: the cloud's list has more than {pages} pages")]
    Endless {
        /// What was asked.
        operation: &'static str,
        /// How many were read.
        pages: usize,
    },
}

/// Why a create did not give a droplet's id, told apart by what may exist now.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// A definite no: there is no droplet.
    #[error("the cloud refused: {0}")]
    Refused(Refusal),
    /// Too many requests: there is no droplet, and later there may be one.
    #[error("the cloud asks to wait: {0}")]
    RateLimited(Refusal),
    /// The request never left: there is no droplet.
    #[error("the cloud could not be reached")]
    NotSent(#[source] reqwest::Error),
    /// Lost after it was sent, timed out, a server fault, or an unreadable answer: there may be a droplet.
    #[error("it is not known whether the cloud made a droplet: {reason}")]
    Doubtful {
        /// What came back.
        reason: String,
    },
}
