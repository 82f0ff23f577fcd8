//! What the loop, which follows rows, can't see: droplets without a row, rows whose droplet was taken away, agents gone silent.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::Reconciler;
use super::plan::{Known, Observed, Verdict, judge, plan};
use crate::cloud::Droplet;
use crate::environment::{Environment, State, environment_of};
use crate::store::StoreError;

/// Events are kept this long.
const EVENTS_KEPT: Duration = Duration::from_secs(7 * 24 * 60 * 60);

impl Reconciler {
    /// Sweeps until `stop`, the first time at once.
    pub(super) async fn sweep_until(self: Arc<Self>, stop: CancellationToken) {
        let period = self.pace.sweep.min(self.pace.unresponsive_after / 2).max(Duration::from_millis(10));
        let mut timer = tokio::time::interval(period);
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = timer.tick() => {}
            }
            let swept = tokio::select! {
                () = stop.cancelled() => return,
                swept = self.sweep() => swept,
            };
            if let Err(error) = swept {
                tracing::error!(error = %error, cause = %error.source, "the sweeper can't use the database");
            }
        }
    }

    async fn sweep(&self) -> Result<(), StoreError> {
        self.mark_silent().await;
        let now = Timestamp::now();
        if let Ok(before) = now.checked_sub(EVENTS_KEPT) {
            self.board.store().forget_events(before).await?;
        }
        let Some(fleet) = self.list(&self.policy.fleet_tag).await else { return Ok(()) };
        // Rows after the list: see `judge`.
        let rows: HashMap<_, _> =
            self.board.store().live().await?.into_iter().map(|environment| (environment.id, environment)).collect();
        for droplet in &fleet {
            let gone;
            let row = match environment_of(&droplet.tags) {
                Some(id) if rows.contains_key(&id) => rows.get(&id),
                Some(id) => {
                    gone = self.board.store().environment(id).await?;
                    gone.as_ref()
                }
                None => None,
            };
            if judge(droplet, row, &self.policy, now) == Verdict::Delete {
                self.delete_orphan(droplet).await;
            }
        }
        for row in rows.values() {
            self.check_droplet(row, &fleet, now).await;
        }
        Ok(())
    }

    async fn delete_orphan(&self, droplet: &Droplet) {
        match self.cloud.delete(droplet.id).await {
            Ok(()) => {
                tracing::warn!(droplet = droplet.id.0, tags = ?droplet.tags, "deleted a droplet that no environment wants");
                self.metrics.orphan_deleted();
            }
            Err(error) => tracing::warn!(droplet = droplet.id.0, error = %error, "an unwanted droplet was not deleted"),
        }
    }

    async fn check_droplet(&self, row: &Environment, fleet: &[Droplet], now: Timestamp) {
        let droplet = match &row.state {
            State::AwaitingHeartbeat { droplet, .. } | State::Unresponsive { droplet, .. } => droplet.id,
            State::PendingProvision { .. }
            | State::Provisioning { .. }
            | State::Active { .. }
            | State::ErrorProvisioning { .. }
            | State::PendingDeprovision { .. }
            | State::Deprovisioning { .. }
            | State::Deprovisioned { .. }
            | State::ErrorDeprovisioning { .. } => return,
        };
        let known = self.known(droplet, Some(fleet)).await;
        if known == Known::Gone {
            let observed = Observed { known, ..Observed::default() };
            self.apply(row, plan(row, &observed, &self.policy, now)).await;
        }
    }

    async fn mark_silent(&self) {
        let now = Timestamp::now();
        for (id, heard_at) in self.board.roll().silent(now, self.pace.unresponsive_after) {
            if let Err(error) = self.board.change(id, now, |row| row.silent(heard_at, now)).await {
                tracing::error!(environment = %id, error = ?error, "a silent agent could not be written down");
            }
        }
    }
}
