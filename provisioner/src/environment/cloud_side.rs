//! What the cloud's answers change.

use dtma_api::environment::EnvironmentError;
use jiff::Timestamp;
use uuid::Uuid;

use super::{Attempt, Change, Cleanup, DropletId, Environment, Placement, State};

/// What came of the one create of an attempt.
#[derive(Debug, Clone, PartialEq)]
pub enum CreateOutcome {
    /// Accepted.
    Placed {
        /// The new droplet.
        droplet: DropletId,
        /// The action that makes it.
        action: Option<i64>,
    },
    /// Certainly no droplet, and another try would be answered the same.
    Refused(EnvironmentError),
    /// Certainly no droplet; another try may pass, not before the given time.
    NotNow {
        /// Why.
        error: EnvironmentError,
        /// When to try again.
        not_before: Timestamp,
        /// Until when trying goes on before it counts as refused.
        give_up_at: Timestamp,
    },
    /// There may be a droplet or not.
    Doubtful,
}

impl Environment {
    /// Applies the create's answer to wherever the environment stands by now: it may have been deprovisioned, or have failed, while
    /// the answer was out.
    pub fn create_answered(&self, attempt: Uuid, outcome: &CreateOutcome, now: Timestamp) -> Option<Change> {
        match &self.state {
            State::Provisioning { attempt: current, placement: Placement::Asked, progress }
                if current.id == attempt =>
            {
                Some(match outcome {
                    CreateOutcome::Placed { droplet, action } => Change::told(
                        State::Provisioning {
                            attempt: current.clone(),
                            placement: Placement::Placed { droplet: *droplet, action: *action },
                            progress: progress.clone(),
                        },
                        format!("The cloud is making droplet {droplet}."),
                    ),
                    CreateOutcome::Refused(error) => refused(error.clone()),
                    CreateOutcome::NotNow { error, give_up_at, .. } if now >= *give_up_at => refused(error.clone()),
                    CreateOutcome::NotNow { error, not_before, .. } => {
                        let message = error.message.clone();
                        // Not counted as a try: nothing was begun.
                        let state = State::PendingProvision {
                            tries: current.number.saturating_sub(1),
                            since: current.run_started_at,
                            not_before: Some(*not_before),
                            last_error: Some(error.clone()),
                            leftover: None,
                        };
                        Change::told(state, format!("The cloud can't make a droplet just now: {message}"))
                    }
                    CreateOutcome::Doubtful => doubtful(current, progress.clone(), now),
                })
            }
            _ => self.late_answer(outcome, now),
        }
    }

    /// The environment gave the attempt up before the answer came: what it must clean up is better known now.
    fn late_answer(&self, outcome: &CreateOutcome, now: Timestamp) -> Option<Change> {
        let mut state = self.state.clone();
        let cleanup = state.cleanup_mut()?;
        match outcome {
            CreateOutcome::Placed { droplet, .. } => {
                cleanup.droplet = Some(*droplet);
                cleanup.doubtful_since = None;
                cleanup.delete_asked_at = None;
            }
            CreateOutcome::Refused(_) | CreateOutcome::NotNow { .. } => cleanup.doubtful_since = None,
            // The request may have reached the cloud as late as now.
            CreateOutcome::Doubtful => cleanup.doubtful_since = Some(now),
        }
        Some(Change::quiet(state))
    }
}

/// The create's answer is lost: look before doing anything else.
pub(crate) fn doubtful(attempt: &Attempt, progress: super::Progress, now: Timestamp) -> Change {
    Change::told(
        State::Provisioning { attempt: attempt.clone(), placement: Placement::Doubtful { since: now }, progress },
        "It is not known whether the cloud made the droplet; looking for it by its tag.",
    )
}

/// The cloud said no, and nothing was made.
fn refused(error: EnvironmentError) -> Change {
    let message = error.message.clone();
    Change::told(State::ErrorProvisioning { error, leftover: None }, message)
}

/// The attempt's droplet is lost or useless: clean up and try again, until `max_tries` tries are used up.
pub(crate) fn try_again(
    attempt: &Attempt,
    error: EnvironmentError,
    leftover: Option<Cleanup>,
    not_before: Timestamp,
    max_tries: u32,
) -> Change {
    let message = error.message.clone();
    if attempt.number >= max_tries {
        return Change::told(
            State::ErrorProvisioning { error, leftover },
            format!("{message} Given up after {} tries.", attempt.number),
        );
    }
    let state = State::PendingProvision {
        tries: attempt.number,
        since: attempt.run_started_at,
        not_before: Some(not_before),
        last_error: Some(error),
        leftover,
    };
    Change::told(state, format!("{message} Trying again."))
}
