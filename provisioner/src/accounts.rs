//! Whose an agent is: the account its environment belongs to.
//!
//! Where the platform can be asked, its word counts; else the `userId` of the first call, kept in the store; else the agent is its own
//! account.

use std::sync::Arc;

use dtma_api::id::AccountId;
use dtma_api::{AgentId, InvalidId};
use jiff::Timestamp;

use crate::environment::State;
use crate::owners::{Owner, Owners, OwnersError};
use crate::store::{Binding, Store, StoreError};

/// Finds accounts.
pub struct Accounts {
    /// Where bindings are kept.
    pub store: Arc<dyn Store>,
    /// Who knows the platform's agents, where somebody does.
    pub owners: Option<Arc<dyn Owners>>,
}

/// Why an agent has no account here.
#[derive(Debug, thiserror::Error)]
pub enum NoAccount {
    /// The platform doesn't know it.
    #[error("there is no such agent")]
    NoSuchAgent,
    /// The caller named somebody else than its owner.
    #[error("the given userId does not own this agent")]
    NotOwner,
    /// The platform could not be asked.
    #[error(transparent)]
    Owners(#[from] OwnersError),
    /// The agent's id can't be an account's.
    #[error(transparent)]
    Unusable(#[from] InvalidId),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Accounts {
    /// The account of an agent somebody wants an environment for, on behalf of `user`, and remembers it.
    ///
    /// # Errors
    /// When the agent isn't known, or `user` isn't its owner, or that can't be found out.
    pub async fn for_ensure(
        &self,
        agent: &AgentId,
        user: Option<&AccountId>,
        now: Timestamp,
    ) -> Result<AccountId, NoAccount> {
        let known = self.store.binding(agent).await?;
        let binding = match &self.owners {
            Some(owners) => match owners.owner(agent).await? {
                Owner::Account(account) => Binding { account, owner_known: true },
                Owner::Nobody => own_account(agent)?,
                Owner::NoSuchAgent => return Err(NoAccount::NoSuchAgent),
            },
            None => match (&known, user) {
                (Some(known), Some(user)) if !known.owner_known && !self.in_use(&known.account).await? => {
                    // It was its own account for want of anybody's word, and nothing of it is left to take over.
                    Binding { account: user.clone(), owner_known: true }
                }
                (Some(known), _) => known.clone(),
                (None, Some(user)) => Binding { account: user.clone(), owner_known: true },
                (None, None) => own_account(agent)?,
            },
        };
        if user.is_some_and(|user| *user != binding.account) {
            return Err(NoAccount::NotOwner);
        }
        if known.as_ref() != Some(&binding) {
            self.store.bind(agent, &binding, now).await?;
        }
        Ok(binding.account)
    }

    /// The account of an agent whose environment is asked about or to be deleted. What was remembered counts first, so that the
    /// environment of an agent that the platform has forgotten can still be deleted.
    ///
    /// # Errors
    /// When nobody knows the agent.
    pub async fn of(&self, agent: &AgentId) -> Result<AccountId, NoAccount> {
        if let Some(binding) = self.store.binding(agent).await? {
            return Ok(binding.account);
        }
        let Some(owners) = &self.owners else { return Err(NoAccount::NoSuchAgent) };
        match owners.owner(agent).await? {
            Owner::Account(account) => Ok(account),
            Owner::Nobody => Ok(own_account(agent)?.account),
            Owner::NoSuchAgent => Err(NoAccount::NoSuchAgent),
        }
    }

    async fn in_use(&self, account: &AccountId) -> Result<bool, StoreError> {
        let environment = self.store.of_account(account).await?;
        Ok(environment.is_some_and(|environment| !matches!(environment.state, State::Deprovisioned { .. })))
    }
}

fn own_account(agent: &AgentId) -> Result<Binding, InvalidId> {
    Ok(Binding { account: agent.as_str().parse()?, owner_known: false })
}
