//! What the loop publishes after every pass. Whoever asks about instances is answered from here, without a call to Docker.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dtma_api::health::Introduction;
use dtma_api::heartbeat::{RuntimeDetails, ToolStatus};
use dtma_api::instance::{Health, InstallationStatus, InstanceView, Transport, UpdateOutcome, UpdateView};
use dtma_api::usage::ResourceUsage;
use dtma_api::{AccountToolInstanceId, GroupId, InstanceName};
use jiff::Timestamp;

use super::{HealthCounts, Upstream};
use crate::engine::{Condition, Container, ContainerId};
use crate::instance::{Failure, LastUpdate, Spec, State};
use crate::store::ledger::Entry;

/// Everything known at the end of one pass.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Every instance as lists show it, by name.
    pub instances: Vec<InstanceView>,
    /// Every instance is in it: the ledger was whole, or has been put together again.
    pub complete: bool,
    /// Whether the container engine answers.
    pub engine: EngineStatus,
    /// How the pass went.
    pub pass: PassReport,
    /// What probing came to, all in all.
    pub health: HealthCounts,
    pub(super) known: BTreeMap<InstanceName, Known>,
    pub(super) departed: BTreeMap<InstanceName, Departed>,
}

/// Whether the container engine answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EngineStatus {
    /// The last look succeeded.
    pub reachable: bool,
    /// Its version, once it has answered.
    pub version: Option<String>,
    /// Why it isn't reachable.
    pub error: Option<String>,
}

/// How a pass of the loop went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PassReport {
    /// Goes up by one with every pass; 0 before the first.
    pub sequence: u64,
    /// Why it ran.
    pub reason: &'static str,
    /// When it ended.
    pub at: Option<Timestamp>,
    /// How long it took.
    pub took: Duration,
    /// How many instances it found something to do for.
    pub started: usize,
}

/// What waiting callers look for.
#[derive(Debug, Clone)]
pub(super) struct Known {
    /// Requests before this one were for another instance that had the name before.
    pub(super) first: u64,
    /// Every request up to this one has been taken notice of.
    pub(super) asked: u64,
    /// Every request up to this one has been carried out, or has failed for good.
    pub(super) settled: u64,
    pub(super) state: State,
    /// Why the last attempt failed, also where the state doesn't say.
    pub(super) failure: Option<Failure>,
    pub(super) account_tool_instance_id: AccountToolInstanceId,
    pub(super) container: Option<ContainerId>,
    pub(super) upstream: Option<Upstream>,
    pub(super) mcp: bool,
    /// The group it is part of, and whether its members reach each other.
    pub(super) membership: (Option<GroupId>, bool),
    /// How the last update ended.
    pub(super) last_update: Option<LastUpdate>,
    /// What its server said of itself.
    pub(super) server: Option<Arc<Introduction>>,
}

/// An instance that is gone.
#[derive(Debug, Clone)]
pub(super) struct Departed {
    /// The last request it saw.
    pub(super) settled: u64,
    /// Why its deploy failed, when that is why it went.
    pub(super) failure: Option<Failure>,
    pub(super) account_tool_instance_id: AccountToolInstanceId,
    pub(super) image: String,
}

/// One instance between the ledger and the engine.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    pub(super) entry: &'a Entry,
    pub(super) container: Option<&'a Container>,
    pub(super) state: &'a State,
    pub(super) health: Health,
    pub(super) health_reason: Option<String>,
    pub(super) last_probe_at: Option<Timestamp>,
    pub(super) crash_looping: bool,
    /// How often the agent restarted it because it hung.
    pub(super) revivals: u64,
    /// Its container's last sample, whether it still runs or not.
    pub(super) usage: Option<ResourceUsage>,
    /// How many sessions have a container of their own.
    pub(super) sessions: u32,
}

impl Facts<'_> {
    /// An instance the loop hasn't seen yet.
    pub(super) fn accepted(entry: &Entry) -> InstanceView {
        let state = State::Accepted;
        let health = Health::Unknown;
        let facts = Facts {
            entry,
            container: None,
            state: &state,
            health,
            health_reason: None,
            last_probe_at: None,
            crash_looping: false,
            revivals: 0,
            usage: None,
            sessions: 0,
        };
        facts.view()
    }

    /// The instance as lists show it.
    pub(super) fn view(&self) -> InstanceView {
        let spec = &self.entry.spec;
        let id = self.container.map(|container| container.id.as_str().to_owned()).unwrap_or_default();
        let started_at = self.container.and_then(|container| match container.condition {
            Condition::Running { since } => Some(since),
            _ => None,
        });
        let restarts = self.container.map_or(0, |container| container.restart_count);
        let mode = spec.mcp.as_ref().filter(|mcp| mcp.transport == Transport::Stdio).map(|mcp| mcp.sessions);
        let error = match self.state {
            State::Failed { failure, .. } => Some(failure.message.clone()),
            _ => None,
        };
        InstanceView {
            account_tool_instance_id: Some(spec.account_tool_instance_id.clone()),
            instance_name_on_toolbox: spec.name.clone(),
            id: id.clone(),
            container_id: id,
            names: self.container.map(|container| format!("/{}", container.name)).into_iter().collect(),
            image: spec.image.to_string(),
            image_digest: self.entry.image_digest.clone(),
            status: self.container.map_or("pending", |container| container.condition.word()).to_owned(),
            state: self.state.shown(),
            status_on_toolbox: self.state.reported(),
            health: self.health,
            health_reason: self.health_reason.clone(),
            last_probe_at: self.last_probe_at,
            restart_count: restarts.saturating_add(self.revivals),
            crash_looping: self.crash_looping,
            ports: self.container.map(|container| container.ports.clone()).unwrap_or_default(),
            created: self.container.map_or(0, |container| container.created),
            started_at,
            mcp_url: spec.mcp.as_ref().map(|_| format!("/tools/{}/mcp", spec.name)),
            server: None,
            transport: spec.mcp.as_ref().map(|mcp| mcp.transport),
            session_mode: mode.map(|mode| mode.shown().0),
            sessions: mode.filter(|mode| !mode.is_shared()).map(|_| self.sessions),
            group_id: spec.group.clone(),
            last_update: self.entry.last_update.as_ref().map(shown_update),
            error,
            resource_usage: self.usage.clone().filter(|_| started_at.is_some()),
        }
    }

    /// Where its MCP endpoint is, while its process runs.
    pub(super) fn upstream(&self) -> Option<Upstream> {
        upstream(&self.entry.spec, self.container?)
    }
}

fn shown_update(update: &LastUpdate) -> UpdateView {
    UpdateView {
        at: update.at,
        outcome: if update.failure.is_some() { UpdateOutcome::RolledBack } else { UpdateOutcome::Applied },
        reason: update.failure.as_ref().map(|failure| failure.message.clone()),
    }
}

/// Where the MCP endpoint of a running container is.
pub(super) fn upstream(spec: &Spec, container: &Container) -> Option<Upstream> {
    let mcp = spec.mcp.as_ref()?;
    let Condition::Running { .. } = container.condition else { return None };
    Some(Upstream {
        instance: spec.name.clone(),
        container: container.id.clone(),
        transport: mcp.transport,
        sessions: mcp.sessions,
        address: SocketAddr::new(container.address?, mcp.port),
        path: mcp.path.clone(),
    })
}

impl Snapshot {
    pub(super) fn view(&self, name: &InstanceName) -> Option<&InstanceView> {
        let at = self.instances.binary_search_by(|view| view.instance_name_on_toolbox.cmp(name)).ok()?;
        self.instances.get(at)
    }

    /// Every instance as a heartbeat reports it, those whose deploy failed included.
    pub fn tool_statuses(&self) -> Vec<ToolStatus> {
        // Nobody has looked yet: nothing is known to be broken, and nothing to run.
        if self.pass.sequence == 0 {
            return Vec::new();
        }
        let here = self.instances.iter().map(|view| ToolStatus {
            account_tool_instance_id: view.account_tool_instance_id.clone(),
            instance_name_on_toolbox: view.instance_name_on_toolbox.clone(),
            status_on_toolbox: view.status_on_toolbox,
            runtime_details: RuntimeDetails {
                container_id: Some(view.container_id.clone()).filter(|id| !id.is_empty()),
                image: view.image.clone(),
                image_digest: view.image_digest.clone(),
                health: view.health,
                // A server's own output stays on the droplet.
                health_reason: view.health_reason.as_ref().and_then(|reason| reason.lines().next()).map(str::to_owned),
                crash_looping: view.crash_looping,
                restart_count: view.restart_count,
                error: view.error.clone(),
                resource_usage: view.resource_usage.clone(),
            },
        });
        // Redeployed: the new one's story counts.
        let away = self.departed.iter().filter(|(name, _)| !self.known.contains_key(*name));
        let failed = away.filter_map(|(name, departed)| {
            let failure = departed.failure.as_ref()?;
            Some(ToolStatus {
                account_tool_instance_id: Some(departed.account_tool_instance_id.clone()),
                instance_name_on_toolbox: name.clone(),
                status_on_toolbox: InstallationStatus::Error,
                runtime_details: RuntimeDetails {
                    container_id: None,
                    image: departed.image.clone(),
                    image_digest: None,
                    health: Health::Unknown,
                    health_reason: None,
                    crash_looping: false,
                    restart_count: 0,
                    error: Some(failure.message.clone()),
                    resource_usage: None,
                },
            })
        });
        here.chain(failed).collect()
    }
}
