//! An environment as its callers see it.

use std::net::IpAddr;

use dtma_api::environment::{EnvironmentError, EnvironmentView};
use dtma_api::{AGENT_PORT, AgentId};

use super::{Environment, RunningDroplet, State};

impl Environment {
    /// The view for a caller that asked on behalf of `agent`.
    pub fn view(&self, agent: Option<AgentId>) -> EnvironmentView {
        let running = self.running();
        EnvironmentView {
            agent_id: agent,
            environment_id: self.id,
            account_id: self.account.clone(),
            droplet_id: self.state.droplet().map(|droplet| droplet.0),
            status: self.state.status(),
            ip_address: running.map(|droplet| IpAddr::V4(droplet.ip)),
            agent_url: running.map(|droplet| format!("https://{}:{AGENT_PORT}", droplet.ip)),
            agent_certificate_pin: self.state.agent().map(|agent| agent.pin),
            region: self.spec.region.clone(),
            size: self.spec.size.clone(),
            created_at: self.created_at,
            ready_at: match &self.state {
                State::Active { ready_at, .. } | State::Unresponsive { ready_at, .. } => Some(*ready_at),
                State::PendingProvision { .. }
                | State::Provisioning { .. }
                | State::AwaitingHeartbeat { .. }
                | State::ErrorProvisioning { .. }
                | State::PendingDeprovision { .. }
                | State::Deprovisioning { .. }
                | State::Deprovisioned { .. }
                | State::ErrorDeprovisioning { .. } => None,
            },
            error: self.error().cloned(),
        }
    }

    /// What is wrong with it at present.
    pub fn error(&self) -> Option<&EnvironmentError> {
        match &self.state {
            State::PendingProvision { last_error, .. } => last_error.as_ref(),
            State::Unresponsive { error, .. }
            | State::ErrorProvisioning { error, .. }
            | State::ErrorDeprovisioning { error, .. } => Some(error),
            State::Provisioning { .. }
            | State::AwaitingHeartbeat { .. }
            | State::Active { .. }
            | State::PendingDeprovision { .. }
            | State::Deprovisioning { .. }
            | State::Deprovisioned { .. } => None,
        }
    }

    /// Whether it stands in an `error_…` state.
    pub fn failed(&self) -> bool {
        matches!(self.state, State::ErrorProvisioning { .. } | State::ErrorDeprovisioning { .. })
    }

    fn running(&self) -> Option<RunningDroplet> {
        match &self.state {
            State::AwaitingHeartbeat { droplet, .. }
            | State::Active { droplet, .. }
            | State::Unresponsive { droplet, .. } => Some(*droplet),
            State::PendingProvision { .. }
            | State::Provisioning { .. }
            | State::ErrorProvisioning { .. }
            | State::PendingDeprovision { .. }
            | State::Deprovisioning { .. }
            | State::Deprovisioned { .. }
            | State::ErrorDeprovisioning { .. } => None,
        }
    }
}
