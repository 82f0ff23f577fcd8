//! Instances that are deployed and removed together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dtma_api::{GroupId, InstanceName};
use futures_util::future::join_all;
use tokio::time::{Instant, timeout_at};

use super::{Deployment, Instances, Outcome, Rejection, accept, new_entry, set_intent};
use crate::instance::{Batch, BatchId, Confidential, Departure, GroupPlan, Intent};

/// What became of each member.
pub type Members = BTreeMap<InstanceName, Result<Deployment, Rejection>>;

/// What became of a group's deploy.
#[derive(Debug)]
pub struct GroupDeployment {
    /// What became of each member.
    pub members: Members,
    /// Nothing was begun: a member could not be accepted, and the group is atomic.
    pub refused: bool,
}

/// What became of a group's removal.
#[derive(Debug)]
pub struct GroupRemoval {
    /// Nothing is left of these.
    pub gone: Vec<InstanceName>,
    /// Of these something is left yet, or they could not be removed and are tried again.
    pub going: Vec<InstanceName>,
}

impl Instances {
    /// Brings a group's members into being, as its plan says, and waits up to `wait` until they run.
    ///
    /// # Errors
    /// When nothing at all could be recorded. What went wrong with a member is said there.
    pub async fn deploy_group(&self, plan: GroupPlan, wait: Duration) -> Result<GroupDeployment, Rejection> {
        self.deploy_group_with(plan, BTreeMap::new(), wait).await
    }

    /// The same, with what is kept in memory only of some of its members.
    ///
    /// # Errors
    /// As [`Self::deploy_group`].
    pub async fn deploy_group_with(
        &self,
        plan: GroupPlan,
        confidential: BTreeMap<InstanceName, Confidential>,
        wait: Duration,
    ) -> Result<GroupDeployment, Rejection> {
        let deadline = Instant::now() + wait;
        self.engine_answers().await?;
        let id = BatchId(uuid::Uuid::new_v4());
        let (atomic, most_at_once, mut after) = (plan.atomic, plan.most_at_once, plan.after);
        let entries = plan.servers.into_iter().map(|spec| {
            let after = after.remove(&spec.name).unwrap_or_default();
            let mut entry = new_entry(spec);
            entry.batch = Some(Batch { id, after, atomic, most_at_once });
            Arc::new(entry)
        });
        let entries: Vec<_> = entries.collect();
        let shared = Arc::clone(&self.shared);
        let accepted = self
            .record(move |desk| {
                let accepted = accept::group(desk, entries, confidential, shared.secrets.vault(), atomic)?;
                for (name, member) in &accepted {
                    if member.as_ref().is_ok_and(|member| member.created) {
                        shared.journal.write(name, "accepted", "the deploy was accepted, as one of a group");
                    }
                }
                Ok(accepted)
            })
            .await?;
        let refused = atomic && accepted.values().any(Result::is_err);
        let brought = accepted.iter().filter_map(|(name, member)| {
            member.as_ref().ok().filter(|member| member.created).map(|member| (name.clone(), member.ticket))
        });
        let brought: Vec<(InstanceName, u64)> = brought.collect();
        let members = accepted.into_iter().map(|(name, member)| async move {
            let result = match member {
                Ok(accepted) => self.deployed(&name, accepted, deadline).await,
                Err(rejection) => Err(rejection),
            };
            (name, result)
        });
        let mut members: Members = join_all(members).await.into_iter().collect();
        if atomic && members.values().any(Result::is_err) {
            // Those that ran before one failed are taken back, too.
            for (name, ticket) in brought {
                if let Some(departed) = self.departure(&name, ticket, deadline).await {
                    members.insert(name, Err(departed));
                }
            }
        }
        Ok(GroupDeployment { members, refused })
    }

    /// Waits until nothing is left of an instance that was brought by request `ticket`; why it went.
    async fn departure(&self, name: &InstanceName, ticket: u64, deadline: Instant) -> Option<Rejection> {
        let mut published = self.shared.published.subscribe();
        let departed = published
            .wait_for(|snapshot| snapshot.departed.get(name).is_some_and(|departed| departed.settled >= ticket));
        let snapshot = timeout_at(deadline, departed).await.ok()?.ok().map(|found| Arc::clone(&found))?;
        let failure = snapshot.departed.get(name)?.failure.clone();
        Some(failure.map_or_else(|| Rejection::Superseded(name.clone()), Rejection::Failed))
    }

    /// Removes every member of a group, and waits up to `wait` until nothing is left of them but their named volumes. Their servers are
    /// given `grace_seconds` to end by themselves, the agent's own patience when absent.
    ///
    /// # Errors
    /// When nobody is a member, or it could not be recorded.
    pub async fn remove_group(
        &self,
        id: &GroupId,
        grace_seconds: Option<u32>,
        wait: Duration,
    ) -> Result<GroupRemoval, Rejection> {
        let deadline = Instant::now() + wait;
        self.engine_answers().await?;
        let group = id.clone();
        let tickets = self
            .record(move |desk| {
                let members =
                    desk.contents().entries.values().filter(|entry| entry.spec.group.as_ref() == Some(&group));
                let members: Vec<(InstanceName, Intent)> =
                    members.map(|entry| (entry.spec.name.clone(), entry.intent.clone())).collect();
                if members.is_empty() {
                    return Err(Rejection::NoGroup(group));
                }
                let mut tickets = Vec::new();
                for (name, intent) in members {
                    if !matches!(intent, Intent::Remove(_)) {
                        let departure = Departure::Asked { volumes: false, grace_seconds };
                        set_intent(desk, &name, Intent::Remove(departure))?;
                    }
                    tickets.push((name.clone(), desk.take_ticket(&name)));
                }
                Ok(tickets)
            })
            .await?;
        let outcomes = tickets.into_iter().map(|(name, ticket)| async move {
            let gone = matches!(self.outcome(&name, ticket, deadline).await, Some(Outcome::Gone(_)));
            (name, gone)
        });
        let (gone, going): (Vec<_>, Vec<_>) = join_all(outcomes).await.into_iter().partition(|(_, gone)| *gone);
        let names = |members: Vec<(InstanceName, bool)>| members.into_iter().map(|(name, _)| name).collect();
        Ok(GroupRemoval { gone: names(gone), going: names(going) })
    }
}
