//! The seam to whoever knows whose an agent is. [`supabase`] is the one real adapter; without it nobody knows.

pub mod supabase;

use async_trait::async_trait;
use dtma_api::AgentId;
use dtma_api::id::AccountId;

/// Knows the platform's agents.
#[async_trait]
pub trait Owners: Send + Sync {
    /// The owner of an agent.
    ///
    /// # Errors
    /// When it can't be found out just now.
    async fn owner(&self, agent: &AgentId) -> Result<Owner, OwnersError>;
}

/// Whose an agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// This account's.
    Account(AccountId),
    /// Nobody's.
    Nobody,
    /// There is no such agent.
    NoSuchAgent,
}

/// Why an owner could not be found out.
#[derive(Debug, thiserror::Error)]
pub enum OwnersError {
    /// No answer, or an unreadable one.
    #[error("asking for an agent's owner")]
    Unanswered(#[source] reqwest::Error),
    /// An answer that isn't one.
    #[error("asking for an agent's owner was answered with {0}")]
    Refused(u16),
    /// A row we can't use.
    #[error("an agent's owner is not an account id")]
    Unusable(#[source] dtma_api::InvalidId),
}
