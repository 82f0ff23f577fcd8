//! What each agent is told with its next heartbeat: a table made anew with every change, so that a heartbeat only has to look into it.

use std::collections::HashMap;
use std::sync::Arc;

use dtma_api::EnvironmentId;
use dtma_release::Version;
use jiff::Timestamp;

use super::{Preference, Report, Rollout, Standing, Status};

/// The table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Orders {
    /// Told to whoever isn't told otherwise: the version the whole fleet has gone to.
    fleet: Option<Order>,
    /// Those who are told otherwise: a version of their own, or none.
    each: HashMap<EnvironmentId, Option<Order>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Order {
    version: Arc<Version>,
    /// Heartbeats from before aren't answered with it. So whether an agent has been told follows from when it was heard, which is on disk.
    since: Timestamp,
}

impl Orders {
    /// The table for an open rollout, the rollout completed last, and what was decided about single environments. `offers_fleet` tells
    /// whether what the completed one brought can still be installed.
    pub fn new(
        open: Option<&Rollout>,
        completed: Option<&Rollout>,
        offers_fleet: bool,
        preferences: &HashMap<EnvironmentId, Preference>,
    ) -> Self {
        let always = |version: &Version| Order { version: Arc::new(version.clone()), since: Timestamp::MIN };
        let mut each = HashMap::new();
        for target in completed.iter().flat_map(|rollout| rollout.targets.values()) {
            // They have tried and failed; asking again every minute would only make them try every minute.
            if matches!(target.standing, Standing::Failed { .. }) {
                each.insert(target.environment, None);
            }
        }
        if let Some(open) = open.filter(|rollout| rollout.course.status == Status::Running) {
            let version = Arc::new(open.terms.version.clone());
            for target in open.targets.values() {
                if let (Standing::Pending { retry_at: None, .. }, Some(asked)) = (&target.standing, &target.asked) {
                    let order = Order { version: Arc::clone(&version), since: asked.at };
                    each.insert(target.environment, Some(order));
                }
            }
        }
        for (environment, preference) in preferences.iter().filter(|(_, preference)| preference.left_out().is_some()) {
            let pin = preference.pin.as_ref().filter(|_| !preference.excluded);
            each.insert(*environment, pin.map(always));
        }
        let fleet = completed.filter(|_| offers_fleet).map(|rollout| always(&rollout.terms.version));
        Self { fleet, each }
    }

    /// The version an agent is told in answer to this report of it, which came at `heard_at`: only ever a higher one than it runs.
    pub fn for_agent(&self, environment: EnvironmentId, report: &Report, heard_at: Timestamp) -> Option<Arc<Version>> {
        let order =
            self.each.get(&environment).unwrap_or(&self.fleet).as_ref().filter(|order| heard_at >= order.since)?;
        // What isn't a version may be anything, also something newer.
        let lower = report.version().is_some_and(|version| version.cmp_precedence(&order.version).is_lt());
        lower.then(|| Arc::clone(&order.version))
    }
}
