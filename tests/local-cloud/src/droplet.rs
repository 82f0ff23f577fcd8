//! A droplet's life as its owner sees it: pure, given `now`.
//!
//! Owns which request is possible in which state, and what is visible when: an address later than the droplet, a droplet in lists later than
//! by its id. Does nothing to containers.

use std::fmt;
use std::net::Ipv4Addr;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::action::{ActionId, ActionKind};
use crate::host::{Found, Record};

/// Number of a droplet, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DropletId(pub u64);

impl fmt::Display for DropletId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How far what is shown lags behind what is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lag {
    /// From acceptance until a droplet is in lists.
    pub list: SignedDuration,
    /// From `active` until the address is shown.
    pub address: SignedDuration,
}

impl Lag {
    /// Everything at once.
    pub const NONE: Self = Self { list: SignedDuration::ZERO, address: SignedDuration::ZERO };
}

/// `status` of a droplet in the API. A droplet of this cloud is never archived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Accepted, not running yet.
    New,
    /// It has power; it may still be booting.
    Active,
    /// No power.
    Off,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Creating,
    Placed { address: Ipv4Addr, shown_from: Timestamp, powered: bool },
}

/// One droplet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Droplet {
    /// What doesn't change, but for its tags.
    pub record: Record,
    phase: Phase,
    listed_from: Timestamp,
    pending: Option<ActionId>,
    going: bool,
}

/// A request a droplet can't take in its present state. Its text is what the API answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another action isn't done yet.
    #[error("Droplet already has a pending event.")]
    Pending,
    /// Not one of the actions this cloud carries out.
    #[error("This action is not supported by this cloud.")]
    Unsupported,
    /// `power_on` with the power on.
    #[error("Droplet is already powered on.")]
    AlreadyOn,
    /// An action that needs power, without.
    #[error("Droplet is currently powered off.")]
    AlreadyOff,
}

impl Droplet {
    /// A droplet whose creation, `action`, was accepted at `record.created_at`.
    pub fn accepted(record: Record, action: ActionId, lag: Lag) -> Self {
        let listed_from = record.created_at + lag.list;
        Self { record, phase: Phase::Creating, listed_from, pending: Some(action), going: false }
    }

    /// One that was there before this cloud was started.
    pub fn found(found: Found) -> Self {
        let created = found.record.created_at;
        let phase = Phase::Placed { address: found.address, shown_from: created, powered: found.running };
        Self { record: found.record, phase, listed_from: created, pending: None, going: false }
    }

    /// Its creation succeeded.
    pub fn placed(&mut self, address: Ipv4Addr, lag: Lag, now: Timestamp) {
        self.phase = Phase::Placed { address, shown_from: now + lag.address, powered: true };
        self.pending = None;
    }

    /// Its status.
    pub fn status(&self) -> Status {
        match self.phase {
            Phase::Creating => Status::New,
            Phase::Placed { powered: true, .. } => Status::Active,
            Phase::Placed { powered: false, .. } => Status::Off,
        }
    }

    /// Its address, once it is shown.
    pub fn address(&self, now: Timestamp) -> Option<Ipv4Addr> {
        match self.phase {
            Phase::Placed { address, shown_from, .. } if shown_from <= now => Some(address),
            Phase::Placed { .. } | Phase::Creating => None,
        }
    }

    /// Whether lists have caught up with it.
    pub fn listed(&self, now: Timestamp) -> bool {
        self.listed_from <= now
    }

    /// Whether an action is under way.
    pub fn locked(&self) -> bool {
        self.pending.is_some() || self.going
    }

    /// Takes on an action.
    ///
    /// # Errors
    /// When the state doesn't allow it; nothing changes then.
    pub fn begin(&mut self, kind: ActionKind, action: ActionId) -> Result<(), Refusal> {
        if self.locked() {
            return Err(Refusal::Pending);
        }
        let powered = self.status() == Status::Active;
        match kind {
            ActionKind::Create => return Err(Refusal::Unsupported),
            ActionKind::PowerOn if powered => return Err(Refusal::AlreadyOn),
            ActionKind::PowerOff | ActionKind::Shutdown | ActionKind::Reboot if !powered => {
                return Err(Refusal::AlreadyOff);
            }
            ActionKind::PowerOn
            | ActionKind::PowerOff
            | ActionKind::Shutdown
            | ActionKind::Reboot
            | ActionKind::PowerCycle => {}
        }
        self.pending = Some(action);
        Ok(())
    }

    /// The action it had taken on is over.
    pub fn settled(&mut self) {
        self.pending = None;
    }

    /// Its power changed.
    pub fn powered(&mut self, on: bool) {
        if let Phase::Placed { powered, .. } = &mut self.phase {
            *powered = on;
        }
    }

    /// Its deletion was accepted: true the first time.
    pub fn doom(&mut self) -> bool {
        !std::mem::replace(&mut self.going, true)
    }

    /// Its deletion failed; it stays.
    pub fn reprieve(&mut self) {
        self.going = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn accepted(lag: Lag) -> Droplet {
        let record = Record {
            id: DropletId(1),
            name: "web".into(),
            region: "nyc3".into(),
            size: "s-1vcpu-1gb".into(),
            image: "debian-12-x64".into(),
            tags: vec![],
            created_at: at(100),
        };
        Droplet::accepted(record, ActionId(1), lag)
    }

    #[test]
    fn lists_and_the_address_lag_behind() {
        let lag = Lag { list: SignedDuration::from_secs(2), address: SignedDuration::from_secs(3) };
        let mut droplet = accepted(lag);
        assert_eq!((droplet.status(), droplet.listed(at(101)), droplet.listed(at(102))), (Status::New, false, true));
        assert!(droplet.locked());
        droplet.placed(Ipv4Addr::LOCALHOST, lag, at(110));
        assert_eq!((droplet.status(), droplet.address(at(112))), (Status::Active, None));
        assert_eq!(droplet.address(at(113)), Some(Ipv4Addr::LOCALHOST));
    }

    #[test]
    fn one_action_at_a_time_and_only_a_possible_one() {
        let mut droplet = accepted(Lag::NONE);
        assert_eq!(droplet.begin(ActionKind::Reboot, ActionId(2)), Err(Refusal::Pending), "it is being created");
        droplet.placed(Ipv4Addr::LOCALHOST, Lag::NONE, at(100));
        assert_eq!(droplet.begin(ActionKind::PowerOn, ActionId(3)), Err(Refusal::AlreadyOn));
        assert_eq!(droplet.begin(ActionKind::PowerOff, ActionId(3)), Ok(()));
        assert_eq!(droplet.begin(ActionKind::PowerCycle, ActionId(4)), Err(Refusal::Pending));
        droplet.powered(false);
        droplet.settled();
        assert_eq!(droplet.status(), Status::Off);
        assert_eq!(droplet.begin(ActionKind::Shutdown, ActionId(5)), Err(Refusal::AlreadyOff));
        assert_eq!(droplet.begin(ActionKind::PowerCycle, ActionId(5)), Ok(()));
    }

    #[test]
    fn a_droplet_on_its_way_out_takes_no_action_and_is_doomed_once() {
        let mut droplet = accepted(Lag::NONE);
        droplet.placed(Ipv4Addr::LOCALHOST, Lag::NONE, at(100));
        assert!(droplet.doom());
        assert!(!droplet.doom());
        assert_eq!(droplet.begin(ActionKind::Reboot, ActionId(2)), Err(Refusal::Pending));
        droplet.reprieve();
        assert!(droplet.doom());
    }
}
