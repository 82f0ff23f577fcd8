//! Bringing an existing instance to another spec, with the old one kept until the new one has shown that it works.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dtma_api::InstanceName;
use dtma_api::instance::PullPolicy;
use tokio::time::Instant;

use super::{Instances, Outcome, Rejection, Settled, accept, set_intent};
use crate::instance::{Confidential, Course, DeploymentId, HealthGate, Intent, Spec, State, Update};
use crate::reconcile::desk::Desk;
use crate::reconcile::plan::Nudge;
use crate::reconcile::status::Facts;
use crate::store::ledger::Entry;
use crate::store::vault::Vault;

/// What became of the wish for an update.
struct Accepted {
    ticket: u64,
    /// The update that is waited for; none when the instance is to be like that already.
    deployment: Option<DeploymentId>,
    pending: Arc<Entry>,
}

impl Instances {
    /// Brings the instance to `spec` and waits up to `wait` until it runs like that. A stopped instance runs afterwards.
    ///
    /// # Errors
    /// When it can't be accepted, or the new version failed: the old one is then what it was before.
    pub async fn update(&self, spec: Spec, gate: HealthGate, wait: Duration) -> Result<Settled, Rejection> {
        self.update_with(spec, gate, Confidential::default(), wait).await
    }

    /// The same, with what is kept in memory only: credentials for the registry the new version's image comes from, which replace those
    /// given before, and the values of its secrets.
    ///
    /// # Errors
    /// As [`Self::update`].
    pub async fn update_with(
        &self,
        spec: Spec,
        gate: HealthGate,
        confidential: impl Into<Confidential> + Send,
        wait: Duration,
    ) -> Result<Settled, Rejection> {
        let confidential = confidential.into();
        let deadline = Instant::now() + wait;
        self.engine_answers().await?;
        let name = spec.name.clone();
        let ran = self.state(&name) == Some(State::Running);
        let (shared, asked) = (Arc::clone(&self.shared), name.clone());
        let accepted = self
            .record(move |desk| {
                let before = desk.contents().entries.get(&asked).and_then(|entry| entry.update.clone());
                let vault = shared.secrets.vault();
                if !confidential.secrets.0.is_empty() {
                    vault.open().map_err(Rejection::Vault)?;
                }
                let accepted = accept_update(desk, spec, gate, confidential, vault)?;
                if accepted.deployment.is_some() && before.is_none() {
                    shared.journal.write(
                        &asked,
                        "updating",
                        "the update was accepted; the old version is kept until the new one works",
                    );
                }
                Ok(accepted)
            })
            .await?;
        let pending = || self.get(&name).unwrap_or_else(|| Facts::accepted(&accepted.pending));
        let Some(outcome) = self.outcome(&name, accepted.ticket, deadline).await else {
            return Ok(Settled { view: pending(), already: false, settled: false });
        };
        let (state, view, last_update) = match outcome {
            Outcome::Gone(failure) => {
                return Err(failure.map_or(Rejection::Superseded(name), Rejection::Failed));
            }
            Outcome::Here { state, view, last_update, .. } => (state, view, last_update),
        };
        if let Some(asked) = accepted.deployment {
            let ended = last_update.filter(|last| last.deployment == asked);
            let ended = ended.ok_or_else(|| Rejection::Superseded(name.clone()))?;
            if let Some(failure) = ended.failure {
                // That the old version has trouble too is in the instance's state.
                return Err(Rejection::RolledBack { name, failure });
            }
        }
        match state {
            State::Failed { failure, .. } => Err(Rejection::Failed(failure)),
            State::Running => Ok(Settled { view: *view, already: ran && accepted.deployment.is_none(), settled: true }),
            _ => Ok(Settled { view: *view, already: false, settled: false }),
        }
    }
}

fn accept_update(
    desk: &mut Desk,
    spec: Spec,
    gate: HealthGate,
    confidential: Confidential,
    vault: &Vault,
) -> Result<Accepted, Rejection> {
    let name = spec.name.clone();
    let entry = desk.contents().entries.get(&name).cloned().ok_or_else(|| Rejection::NotFound(name.clone()))?;
    let before = entry.intent.clone();
    if matches!(before, Intent::Remove(_)) {
        return Err(Rejection::BeingRemoved(name));
    }
    if spec.account_tool_instance_id != entry.spec.account_tool_instance_id {
        return Err(Rejection::OtherId { id: entry.spec.account_tool_instance_id.clone(), name });
    }
    match &entry.update {
        Some(update) if update.spec == spec && update.course == Course::Forth => {
            accept::take_confidential(desk, &name, confidential, vault)?;
            let ticket = desk.take_ticket(&name);
            return Ok(Accepted { ticket, deployment: Some(update.deployment), pending: entry });
        }
        Some(_) => return Err(Rejection::Busy(name)),
        None => {}
    }
    // The same spec is another version only when the registry is to be asked what it is now.
    if spec == entry.spec && (spec.pull_policy != PullPolicy::Always || !entry.proven) {
        set_intent(desk, &name, Intent::Run)?;
        desk.nudge(&name, Nudge::Start);
        accept::take_confidential(desk, &name, confidential, vault)?;
        return Ok(Accepted { ticket: desk.take_ticket(&name), deployment: None, pending: entry });
    }
    if !entry.proven {
        return Err(Rejection::Busy(name));
    }
    accept::ports_are_free(desk.contents(), &spec)?;
    let deployment = DeploymentId(uuid::Uuid::new_v4());
    let update = Update { spec_hash: spec.hash(), deployment, gate, before, course: Course::Forth, spec };
    let mut changed = Entry::clone(&entry);
    changed.intent = Intent::Run;
    changed.update = Some(Box::new(update));
    let changed = Arc::new(changed);
    let mut contents = desk.contents().clone();
    contents.entries.insert(name.clone(), Arc::clone(&changed));
    let confidential = BTreeMap::from([(name.clone(), confidential)]);
    accept::commit_with(desk, contents, confidential, vault)?;
    Ok(Accepted { ticket: desk.take_ticket(&name), deployment: Some(deployment), pending: changed })
}

/// The name of an instance whose update is under way, which excludes everything but its removal.
pub(super) fn not_updating(entry: &Entry) -> Result<(), Rejection> {
    let name = |entry: &Entry| -> InstanceName { entry.spec.name.clone() };
    if entry.update.is_some() { Err(Rejection::Busy(name(entry))) } else { Ok(()) }
}
