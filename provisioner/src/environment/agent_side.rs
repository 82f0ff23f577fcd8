//! What a droplet's reports change: bootstrap progress, enrolment, heartbeats, and their absence.

use dtma_api::bootstrap::{BootstrapOutcome, BootstrapProgress};
use dtma_api::environment::EnvironmentError;
use dtma_api::{CertificatePin, TokenHash};
use jiff::{SignedDuration, Timestamp};

use super::{Change, Cleanup, EnrolledAgent, Environment, Progress, State, plain_error};

/// Bearers kept for one agent: the one it uses and those whose answers may have been lost.
const BEARERS_KEPT: usize = 4;
/// Of a failed phase's output, this many bytes are kept.
const OUTPUT_KEPT: usize = 4096;
const PHASE_KEPT: usize = 64;
/// Of one attempt's phases, watchers are told so many; set-up has half a dozen. After that a droplet that goes on reporting has only
/// its latest phase noted, every [`NOTED_EVERY`] at most, so that it can't fill the database before its deadline.
const PHASES_TOLD: u32 = 32;
const NOTED_EVERY: SignedDuration = SignedDuration::from_secs(10);

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
        Ok(if self.state.agent().is_none() {
            Change::told(state, format!("Agent {} has enrolled.", claim.version)).with_phase("enrol")
        } else {
            // It asks again because an answer was lost; however often, watchers have heard of it.
            Change::quiet(state)
        })
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
                let told = progress.phases_told;
                if told > PHASES_TOLD && now.duration_since(self.updated_at) < NOTED_EVERY {
                    return None;
                }
                let mut state = self.state.clone();
                if let State::Provisioning { progress, .. } | State::AwaitingHeartbeat { progress, .. } = &mut state {
                    progress.phase = Some(phase.clone());
                    progress.phases_told = told.saturating_add(1).min(PHASES_TOLD + 1);
                }
                Some(match told {
                    ..PHASES_TOLD => Change::told(state, format!("Set-up has begun phase {phase}.")).with_phase(&phase),
                    PHASES_TOLD => Change::told(state, "Set-up begins phase after phase; no more of them are told."),
                    _ => Change::quiet(state),
                })
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

#[cfg(test)]
mod tests {
    use dtma_api::EnvironmentId;
    use uuid::Uuid;

    use super::*;
    use crate::environment::{Attempt, DropletId, DropletSpec, RunningDroplet};

    fn at(millisecond: i64) -> Timestamp {
        Timestamp::from_millisecond(millisecond).unwrap()
    }

    fn awaiting() -> Environment {
        let attempt = Attempt {
            id: Uuid::from_u128(1),
            number: 1,
            started_at: at(0),
            run_started_at: at(0),
            deadline: at(900_000),
            token_hash: TokenHash::of("token"),
            token_expires_at: at(900_000),
        };
        let droplet = RunningDroplet { id: DropletId(7), ip: [192, 0, 2, 7].into() };
        let spec = DropletSpec { region: "nyc3".into(), size: "s-1vcpu-1gb".into(), image: "debian-12-x64".into() };
        let id = EnvironmentId(Uuid::from_u128(2));
        let state = State::AwaitingHeartbeat { attempt, droplet, progress: Progress::default() };
        Environment { state, ..Environment::new(id, "account".parse().unwrap(), spec, at(0)) }
    }

    fn report(phase: &str, outcome: BootstrapOutcome) -> BootstrapProgress {
        BootstrapProgress { phase: phase.to_owned(), outcome, output: "why".to_owned() }
    }

    #[test]
    fn a_droplet_that_reports_without_end_is_told_of_and_written_down_within_bounds() {
        let mut environment = awaiting();
        let (mut events, mut writes) = (Vec::new(), 0);
        // Two phases by turns, a hundred times a second, until the deadline.
        for turn in 0..90_000 {
            let phase = if turn % 2 == 0 { "install" } else { "start" };
            let now = at(turn * 10);
            if let Some(change) = environment.bootstrap_reported(&report(phase, BootstrapOutcome::Begun), now) {
                writes += 1;
                let (next, event) = environment.changed(change, now);
                environment = next;
                events.extend(event);
            }
        }
        assert_eq!(events.len(), 33);
        assert_eq!(events[0].message, "Set-up has begun phase install.");
        assert!(events[32].message.contains("no more"), "{:?}", events[32]);
        assert!((100..130).contains(&writes), "{writes}");
        let State::AwaitingHeartbeat { progress, .. } = &environment.state else { panic!("{environment:?}") };
        assert!(progress.phase.is_some());

        let failed = report("start", BootstrapOutcome::Failed);
        let change = environment.bootstrap_reported(&failed, at(900_000)).expect("its end is told all the same");
        let (ended, event) = environment.changed(change, at(900_000));
        assert_eq!(event.unwrap().phase.as_deref(), Some("start"));
        assert_eq!(ended.error().unwrap().output.as_deref(), Some("why"));
    }

    #[test]
    fn an_agent_that_enrols_again_and_again_is_told_of_once() {
        let mut environment = awaiting();
        let claim = EnrolmentClaim {
            token_hash: TokenHash::of("token"),
            retry_key_hash: TokenHash::of("retry"),
            pin: CertificatePin::of_spki(b"key"),
            version: "1.2.3".to_owned(),
        };
        let mut events = 0;
        for turn in 0..100 {
            let change = environment.enrol(&claim, TokenHash::of(&turn.to_string()), at(turn)).unwrap();
            let (next, event) = environment.changed(change, at(turn));
            environment = next;
            events += usize::from(event.is_some());
        }
        assert_eq!((events, environment.state.bearers().len()), (1, BEARERS_KEPT));
    }
}
