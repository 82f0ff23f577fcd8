//! What each agent is told with its next heartbeat: a table made anew with every change, so that a heartbeat only has to look into it.

use std::collections::HashMap;
use std::sync::Arc;

use dtma_api::EnvironmentId;
use dtma_release::Version;

use super::{Preference, Report, Rollout, Standing, Status};

/// The table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Orders {
    /// The version the whole fleet has gone to: told to whoever missed it.
    fleet: Option<Arc<Version>>,
    /// Those who are told otherwise: a version of their own, or none.
    each: HashMap<EnvironmentId, Option<Arc<Version>>>,
}

impl Orders {
    /// The table for an open rollout, the rollout completed last, and what was decided about single environments.
    pub fn new(
        open: Option<&Rollout>,
        completed: Option<&Rollout>,
        preferences: &HashMap<EnvironmentId, Preference>,
    ) -> Self {
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
                if matches!(target.standing, Standing::Pending { retry_at: None, .. }) {
                    each.insert(target.environment, Some(Arc::clone(&version)));
                }
            }
        }
        for (environment, preference) in preferences.iter().filter(|(_, preference)| preference.left_out().is_some()) {
            let pin = preference.pin.clone().filter(|_| !preference.excluded);
            each.insert(*environment, pin.map(Arc::new));
        }
        let fleet = completed.map(|rollout| Arc::new(rollout.terms.version.clone()));
        Self { fleet, each }
    }

    /// The version an agent is told, after this report of it: only ever a higher one than it runs.
    pub fn for_agent(&self, environment: EnvironmentId, report: &Report) -> Option<Arc<Version>> {
        let wanted = self.each.get(&environment).unwrap_or(&self.fleet).as_ref()?;
        let lower = report.version().is_none_or(|version| version.cmp_precedence(wanted).is_lt());
        lower.then(|| Arc::clone(wanted))
    }
}
