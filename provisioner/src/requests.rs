//! What callers want, brought about: writes the wish into the row, and waits for the loop to fulfil it.

use std::time::Duration;

use dtma_api::EnvironmentId;
use dtma_api::id::AccountId;
use jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::board::{Board, ChangeError};
use crate::environment::{DropletSpec, EnsureDecision, Environment, State};
use crate::store::StoreError;

/// How long a caller waits.
#[derive(Debug, Clone)]
pub struct Patience {
    until: Instant,
    stop: CancellationToken,
}

impl Patience {
    /// Waits for `wait`, or until the process is told to end.
    pub fn new(wait: Duration, stop: CancellationToken) -> Self {
        Self { until: Instant::now() + wait, stop }
    }

    fn over(&self) -> bool {
        Instant::now() >= self.until || self.stop.is_cancelled()
    }

    /// Waits for one more change; returns early when patience ends.
    async fn change(&self, changes: &mut tokio::sync::watch::Receiver<u64>) {
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep_until(self.until) => {}
            _ = changes.changed() => {}
        }
    }
}

/// Why a wish can't be fulfilled now.
#[derive(Debug, thiserror::Error)]
pub enum WishError {
    /// The account's environment is being deleted and was not gone in time.
    #[error("the environment is being deleted")]
    Leaving,
    /// Others change it all the time.
    #[error("the environment keeps changing")]
    Contended,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl<E> From<ChangeError<E>> for WishError {
    fn from(error: ChangeError<E>) -> Self {
        match error {
            ChangeError::Store(error) => Self::Store(error),
            ChangeError::Refused(_) | ChangeError::Missing | ChangeError::Contended => Self::Contended,
        }
    }
}

/// Makes sure the account has an environment; returns it once it is active, has failed, or patience ends.
///
/// One that is being deleted is waited for, and another made when it is gone.
///
/// # Errors
/// [`WishError::Leaving`] when patience ends before the old one is gone.
pub async fn ensure(
    board: &Board,
    account: &AccountId,
    spec: &DropletSpec,
    patience: &Patience,
) -> Result<Environment, WishError> {
    loop {
        let now = Timestamp::now();
        let Some(environment) = board.store().of_account(account).await? else {
            board.admit(account, spec.clone(), now).await?;
            continue;
        };
        match environment.ensure(spec.clone(), now) {
            EnsureDecision::Gone => {
                board.admit(account, spec.clone(), now).await?;
                continue;
            }
            EnsureDecision::Keep => {}
            EnsureDecision::Restart(_) => {
                board
                    .change(environment.id, now, |environment| match environment.ensure(spec.clone(), now) {
                        EnsureDecision::Restart(change) => Some(*change),
                        EnsureDecision::Keep | EnsureDecision::Leaving | EnsureDecision::Gone => None,
                    })
                    .await?;
            }
            EnsureDecision::Leaving => {
                let gone = |environment: &Environment| matches!(environment.state, State::Deprovisioned { .. });
                match wait_for(board, environment.id, patience, gone).await? {
                    Some(environment) if !gone(&environment) => return Err(WishError::Leaving),
                    Some(_) | None => continue,
                }
            }
        }
        let decided = |environment: &Environment| match &environment.state {
            State::PendingProvision { .. }
            | State::Provisioning { .. }
            | State::AwaitingHeartbeat { .. }
            | State::Unresponsive { .. } => false,
            State::Active { .. }
            | State::ErrorProvisioning { .. }
            | State::PendingDeprovision { .. }
            | State::Deprovisioning { .. }
            | State::Deprovisioned { .. }
            | State::ErrorDeprovisioning { .. } => true,
        };
        return match wait_for(board, environment.id, patience, decided).await? {
            Some(environment)
                if matches!(environment.ensure(spec.clone(), now), EnsureDecision::Leaving | EnsureDecision::Gone) =>
            {
                Err(WishError::Leaving)
            }
            Some(environment) => Ok(environment),
            None => Err(WishError::Contended),
        };
    }
}

/// Makes sure the account has no environment; returns it once it is gone or patience ends, and nothing if there never was one.
///
/// # Errors
/// When the database fails.
pub async fn deprovision(
    board: &Board,
    account: &AccountId,
    patience: &Patience,
) -> Result<Option<Environment>, WishError> {
    let Some(environment) = board.store().of_account(account).await? else { return Ok(None) };
    let now = Timestamp::now();
    board.change(environment.id, now, |environment| environment.deprovision(now)).await?;
    let gone = |environment: &Environment| matches!(environment.state, State::Deprovisioned { .. });
    Ok(wait_for(board, environment.id, patience, gone).await?)
}

/// The environment once `enough` is true of it, or as it is when patience ends.
async fn wait_for(
    board: &Board,
    id: EnvironmentId,
    patience: &Patience,
    enough: impl Fn(&Environment) -> bool + Send,
) -> Result<Option<Environment>, StoreError> {
    let mut changes = board.watch(id);
    loop {
        changes.mark_unchanged();
        let over = patience.over();
        let environment = board.store().environment(id).await?;
        match environment {
            Some(environment) if !over && !enough(&environment) => patience.change(&mut changes).await,
            other => return Ok(other),
        }
    }
}
