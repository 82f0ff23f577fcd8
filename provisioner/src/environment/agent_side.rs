//! What a droplet's reports change: bootstrap progress, enrolment, heartbeats, and their absence.

use dtma_api::bootstrap::{BootstrapOutcome, BootstrapProgress};
use dtma_api::environment::EnvironmentError;
use dtma_api::{CertificatePin, TokenHash};
use jiff::Timestamp;

use super::{Change, Cleanup, EnrolledAgent, Environment, Progress, State, plain_error};

/// Bearers kept for one agent: the one it uses and those whose answers may have been lost.
const BEARERS_KEPT: usize = 4;
/// Of a failed phase's output, this many bytes are kept.
const OUTPUT_KEPT: usize = 4096;
const PHASE_KEPT: usize = 64;

/// What an agent that enrols presents, digested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnrolmentClaim {
    /// Of the one-time token.
    pub token_hash: TokenHash,
    /// Of its retry key.
    pub retry_key_hash: TokenHash,
    /// Pin of its TLS key.
    pub pin: CertificatePin,
    /// Its version.
    pub version: String,
}

/// Why an enrolment is refused; every reason is final.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EnrolmentRefused {
    /// Not a token of a present attempt.
    #[error("this enrolment token is not known; its droplet may have been replaced")]
    Unknown,
    /// Too late.
    #[error("this enrolment token has expired")]
    Expired,
    /// Somebody else was first.
    #[error("this enrolment token has been used")]
    Used,
}

impl Environment {
    /// Admits an agent, giving it the bearer whose digest is `bearer`.
    ///
    /// # Errors
    /// When the token isn't the present attempt's, has expired, or has been used by an agent with another retry key.
    pub fn enrol(&self, claim: &EnrolmentClaim, bearer: TokenHash, now: Timestamp) -> Result<Change, EnrolmentRefused> {
        let attempt = self.state.attempt().ok_or(EnrolmentRefused::Unknown)?;
        if attempt.token_hash != claim.token_hash {
            return Err(EnrolmentRefused::Unknown);
        }
        if now >= attempt.token_expires_at {
            return Err(EnrolmentRefused::Expired);
        }
        let agent = match self.state.agent() {
            None => EnrolledAgent {
                pin: claim.pin,
                retry_key_hash: claim.retry_key_hash,
                bearers: vec![bearer],
                version: claim.version.clone(),
                enrolled_at: now,
            },
            Some(agent) if agent.retry_key_hash == claim.retry_key_hash && agent.pin == claim.pin => {
                let mut agent = agent.clone();
                agent.bearers.push(bearer);
                // Two requests may be under way at once, and the agent may keep either answer.
                let surplus = agent.bearers.len().saturating_sub(BEARERS_KEPT);
                agent.bearers.drain(..surplus);
                agent
            }
            Some(_) => return Err(EnrolmentRefused::Used),
        };
        let mut state = self.state.clone();
        match &mut state {
            State::Provisioning { progress, .. } | State::AwaitingHeartbeat { progress, .. } => {
                progress.agent = Some(agent);
            }
            State::Active { agent: known, .. } | State::Unresponsive { agent: known, .. } => *known = agent,
            State::PendingProvision { .. }
            | State::ErrorProvisioning { .. }
            | State::PendingDeprovision { .. }
            | State::Deprovisioning { .. }
            | State::Deprovisioned { .. }
            | State::ErrorDeprovisioning { .. } => return Err(EnrolmentRefused::Unknown),
        }
        Ok(Change::told(state, format!("Agent {} has enrolled.", claim.version)).with_phase("enrol"))
    }

    /// What a heartbeat changes; nothing for an agent that is known to report.
    pub fn heard(&self, now: Timestamp) -> Option<Change> {
        match &self.state {
            State::Provisioning { attempt, placement, progress } if progress.heard_at.is_none() => {
                let progress = Progress { heard_at: Some(now), ..progress.clone() };
                Some(Change::quiet(State::Provisioning {
                    attempt: attempt.clone(),
                    placement: placement.clone(),
                    progress,
                }))
            }
            State::AwaitingHeartbeat { attempt, droplet, progress } => {
                let agent = progress.agent.clone()?;
                let state = State::Active { attempt: attempt.clone(), droplet: *droplet, agent, ready_at: now };
                Some(Change::told(state, "The agent reports; the environment is ready."))
            }
            State::Unresponsive { attempt, droplet, agent, ready_at, .. } => {
                let state = State::Active {
                    attempt: attempt.clone(),
                    droplet: *droplet,
                    agent: agent.clone(),
                    ready_at: *ready_at,
                };
                Some(Change::told(state, "The agent reports again."))
            }
            State::Provisioning { .. }
            | State::Active { .. }
            | State::PendingProvision { .. }
            | State::ErrorProvisioning { .. }
            | State::PendingDeprovision { .. }
            | State::Deprovisioning { .. }
            | State::Deprovisioned { .. }
            | State::ErrorDeprovisioning { .. } => None,
        }
    }

    /// What silence changes: the last report came at `last_heard`, too long ago.
    pub fn silent(&self, last_heard: Timestamp, now: Timestamp) -> Option<Change> {
        let State::Active { attempt, droplet, agent, ready_at } = &self.state else { return None };
        let seconds = now.duration_since(last_heard).as_secs();
        let message = format!("The agent has not reported for {seconds} s.");
        let state = State::Unresponsive {
            attempt: attempt.clone(),
            droplet: *droplet,
            agent: agent.clone(),
            ready_at: *ready_at,
            error: plain_error("heartbeat_missing", message.clone(), now),
        };
        Some(Change::told(state, message))
    }

    /// What a bootstrap report changes. Reports that come after the agent itself has reported only repeat what is known.
    pub fn bootstrap_reported(&self, report: &BootstrapProgress, now: Timestamp) -> Option<Change> {
        let (droplet, progress) = match &self.state {
            State::Provisioning { placement, progress, .. } => (placement.abandoned_at(now), progress),
            State::AwaitingHeartbeat { droplet, progress, .. } => (Cleanup::of(droplet.id), progress),
            State::PendingProvision { .. }
            | State::Active { .. }
            | State::Unresponsive { .. }
            | State::ErrorProvisioning { .. }
            | State::PendingDeprovision { .. }
            | State::Deprovisioning { .. }
            | State::Deprovisioned { .. }
            | State::ErrorDeprovisioning { .. } => return None,
        };
        let phase = tidy(&report.phase, PHASE_KEPT);
        match report.outcome {
            BootstrapOutcome::Begun => {
                if progress.phase.as_deref() == Some(&phase) {
                    return None;
                }
                let mut state = self.state.clone();
                if let State::Provisioning { progress, .. } | State::AwaitingHeartbeat { progress, .. } = &mut state {
                    progress.phase = Some(phase.clone());
                }
                Some(Change::told(state, format!("Set-up has begun phase {phase}.")).with_phase(&phase))
            }
            BootstrapOutcome::Failed => {
                let message = format!("Setting up the droplet failed in phase {phase}.");
                let error = EnvironmentError {
                    phase: Some(phase.clone()),
                    output: Some(tail(&report.output)).filter(|output| !output.is_empty()),
                    ..plain_error("bootstrap_failed", message.clone(), now)
                };
                let state = State::ErrorProvisioning { error, leftover: Some(droplet) };
                Some(Change::told(state, message).with_phase(&phase))
            }
        }
    }
}

/// The end of a droplet's output; control characters other than line ends and tabs are not for other people's terminals.
fn tail(output: &str) -> String {
    let mut start = output.len().saturating_sub(OUTPUT_KEPT);
    while !output.is_char_boundary(start) {
        start += 1;
    }
    output.get(start..).unwrap_or_default().chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

fn tidy(text: &str, limit: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(limit).collect()
}
