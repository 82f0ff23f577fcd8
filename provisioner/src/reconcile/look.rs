//! Looking at the cloud, with as few requests as the situation allows.

use futures_util::future::join_all;

use super::Reconciler;
use super::plan::{Known, Observed};
use crate::cloud::{ActionStatus, CloudError, Droplet, Power};
use crate::environment::{DropletId, Environment, Placement, State, attempt_tag};

/// A droplet that is `new`, or in no list, for longer than this may have failed: it is asked after by its id, and so is its create action.
const LONG_NEW_SECONDS: i64 = 20;

/// Whether a look can move an environment in this state on.
pub(super) fn needed(state: &State) -> bool {
    match state {
        State::Provisioning { .. } | State::Deprovisioning { .. } => true,
        State::PendingProvision { leftover, .. } | State::ErrorProvisioning { leftover, .. } => leftover.is_some(),
        // The agent moves these on; the sweeper looks whether their droplets are still there.
        State::AwaitingHeartbeat { .. }
        | State::Active { .. }
        | State::Unresponsive { .. }
        | State::PendingDeprovision { .. }
        | State::Deprovisioned { .. }
        | State::ErrorDeprovisioning { .. } => false,
    }
}

impl Reconciler {
    /// What is seen of each environment's droplets, in order. With `crowd`, one list of the fleet serves them all.
    pub(super) async fn look(&self, rows: &[Environment], crowd: bool) -> Vec<Observed> {
        let fleet = if crowd { self.list(&self.policy.fleet_tag).await } else { None };
        join_all(rows.iter().map(|row| self.look_at(row, fleet.as_deref()))).await
    }

    async fn look_at(&self, row: &Environment, fleet: Option<&[Droplet]>) -> Observed {
        match &row.state {
            State::Provisioning { attempt, placement, .. } => match placement {
                Placement::Asked => Observed::default(),
                Placement::Doubtful { .. } => {
                    let tagged = match fleet {
                        Some(fleet) => Some(fleet.to_vec()),
                        None => self.list(&attempt_tag(attempt.id)).await,
                    };
                    Observed { tagged, ..Observed::default() }
                }
                Placement::Placed { droplet, action } => {
                    let long = jiff::Timestamp::now().duration_since(attempt.started_at).as_secs() >= LONG_NEW_SECONDS;
                    let listed = fleet.is_none_or(|fleet| fleet.iter().any(|listed| listed.id == *droplet));
                    // Lists lag behind: one that is missing there is most likely just new, and asking after each of many would use up
                    // the allowance they all wait for.
                    let known = if listed || long { self.known(*droplet, fleet).await } else { Known::Unseen };
                    let up = matches!(known, Known::Present(Droplet { power: Power::Active, public_ip: Some(_), .. }));
                    let action = match action {
                        Some(action) if up || long => self.action(*action).await,
                        Some(_) | None => None,
                    };
                    Observed { known, tagged: None, action }
                }
            },
            state => {
                let Some(cleanup) = state.cleanup() else { return Observed::default() };
                let known = match cleanup.droplet {
                    Some(id) => self.known(id, fleet).await,
                    None => Known::Unseen,
                };
                // While the known one is there, it alone is worth a request.
                let tagged = match (&known, fleet) {
                    (Known::Present(_), _) => None,
                    (Known::Gone | Known::Unseen, Some(fleet)) => Some(fleet.to_vec()),
                    (Known::Gone | Known::Unseen, None) => self.list(&row.tag()).await,
                };
                Observed { known, tagged, action: None }
            }
        }
    }

    /// A droplet by id: from the list if it is there, else asked for, since a list may lag.
    pub(super) async fn known(&self, id: DropletId, fleet: Option<&[Droplet]>) -> Known {
        if let Some(droplet) = fleet.and_then(|fleet| fleet.iter().find(|droplet| droplet.id == id)) {
            return Known::Present(droplet.clone());
        }
        match self.cloud.droplet(id).await {
            Ok(Some(droplet)) => Known::Present(droplet),
            Ok(None) => Known::Gone,
            Err(error) => {
                unanswered(&error);
                Known::Unseen
            }
        }
    }

    pub(super) async fn list(&self, tag: &str) -> Option<Vec<Droplet>> {
        self.cloud.tagged(tag).await.inspect_err(unanswered).ok()
    }

    async fn action(&self, id: i64) -> Option<ActionStatus> {
        self.cloud.action(id).await.inspect_err(unanswered).ok().flatten()
    }
}

fn unanswered(error: &CloudError) {
    tracing::warn!(error = %error, cause = std::error::Error::source(error), "the cloud gave no answer; looking again later");
}
