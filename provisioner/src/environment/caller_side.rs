//! What the platform's callers may do: want an environment, and want it gone.

use jiff::Timestamp;

use super::{Change, Cleanup, DropletSpec, Environment, Placement, State};

/// What an `ensure` means for an environment that exists.
#[derive(Debug, Clone, PartialEq)]
pub enum EnsureDecision {
    /// It is there or on its way.
    Keep,
    /// It had failed; this starts it again.
    Restart(Box<Change>),
    /// It is being deleted and must be gone before another is made.
    Leaving,
    /// It is gone; another may be made.
    Gone,
}

impl Environment {
    /// What wanting this environment changes.
    pub fn ensure(&self, spec: DropletSpec, now: Timestamp) -> EnsureDecision {
        match &self.state {
            State::PendingProvision { .. }
            | State::Provisioning { .. }
            | State::AwaitingHeartbeat { .. }
            | State::Active { .. }
            | State::Unresponsive { .. } => EnsureDecision::Keep,
            State::ErrorProvisioning { leftover, .. } => {
                let state = State::PendingProvision {
                    tries: 0,
                    since: now,
                    not_before: None,
                    last_error: None,
                    leftover: leftover.clone(),
                };
                let mut change = Change::told(state, "Asked for again; starting afresh.");
                change.spec = Some(spec);
                change.new_run = true;
                EnsureDecision::Restart(Box::new(change))
            }
            State::PendingDeprovision { .. } | State::Deprovisioning { .. } | State::ErrorDeprovisioning { .. } => {
                EnsureDecision::Leaving
            }
            State::Deprovisioned { .. } => EnsureDecision::Gone,
        }
    }

    /// What wanting it gone changes; nothing when it is gone or going.
    pub fn deprovision(&self, now: Timestamp) -> Option<Change> {
        let cleanup = match &self.state {
            State::PendingProvision { leftover, .. } | State::ErrorProvisioning { leftover, .. } => {
                leftover.clone().unwrap_or_default()
            }
            State::Provisioning { placement, .. } => placement.abandoned_at(now),
            State::AwaitingHeartbeat { droplet, .. }
            | State::Active { droplet, .. }
            | State::Unresponsive { droplet, .. } => Cleanup::of(droplet.id),
            // Asking again hurries a retry along.
            State::ErrorDeprovisioning { cleanup, .. } => cleanup.clone(),
            State::PendingDeprovision { .. } | State::Deprovisioning { .. } | State::Deprovisioned { .. } => {
                return None;
            }
        };
        Some(Change::told(State::PendingDeprovision { cleanup }, "To be deleted."))
    }
}

impl Placement {
    /// What has to be cleaned up when the attempt is given up at `now`. A create whose answer is still out counts as doubtful from
    /// now on: its answer, or looking for the grace window, settles it.
    pub fn abandoned_at(&self, now: Timestamp) -> Cleanup {
        match self {
            Self::Asked => Cleanup { doubtful_since: Some(now), ..Cleanup::default() },
            Self::Doubtful { since } => Cleanup { doubtful_since: Some(*since), ..Cleanup::default() },
            Self::Placed { droplet, .. } => Cleanup::of(*droplet),
        }
    }
}
