//! Faults on demand: what goes wrong, at which operation, how often. Pure.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// What goes wrong with one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Fault {
    /// Answered with that status and DigitalOcean's error body for it; nothing is done.
    Status {
        /// 400–599.
        status: u16,
    },
    /// The connection is closed without an answer.
    Drop {
        /// Before or after the request took effect.
        when: When,
    },
    /// The answer comes late.
    Delay {
        /// Whether the effect comes late too.
        when: When,
        /// Milliseconds.
        ms: u64,
    },
    /// A create is accepted, but there is no room for the droplet: it vanishes and its action ends `errored`.
    PlacementFailure,
}

/// On which side of a request's effect something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// Nothing was done yet.
    Before,
    /// It is done.
    After,
}

/// A fault that waits for requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Armed {
    /// `operationId` in DigitalOcean's API description; `*` for every operation.
    pub operation: String,
    /// What goes wrong.
    pub fault: Fault,
    /// With how many requests.
    #[serde(default = "once")]
    pub times: u32,
}

fn once() -> u32 {
    1
}

/// A fault that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Nonsense {
    /// No such operation.
    #[error("there is no operation {0}")]
    UnknownOperation(String),
    /// A status no error has.
    #[error("{0} is no error status (400–599)")]
    NoError(u16),
    /// Only creates place droplets.
    #[error("only droplets_create can fail to place a droplet")]
    NotACreate,
}

/// Faults in the order they were armed.
#[derive(Debug, Default)]
pub struct Faults(VecDeque<Armed>);

/// Operation of the creates.
pub const CREATE: &str = "droplets_create";

impl Faults {
    /// Arms one. Faults of one operation strike one after the other, each until it is used up.
    ///
    /// # Errors
    /// When it can never strike.
    pub fn arm(&mut self, armed: Armed, known: impl Fn(&str) -> bool) -> Result<(), Nonsense> {
        if armed.operation != "*" && !known(&armed.operation) {
            return Err(Nonsense::UnknownOperation(armed.operation));
        }
        match armed.fault {
            Fault::Status { status } if !(400..=599).contains(&status) => return Err(Nonsense::NoError(status)),
            Fault::PlacementFailure if armed.operation != CREATE => return Err(Nonsense::NotACreate),
            Fault::Status { .. } | Fault::Drop { .. } | Fault::Delay { .. } | Fault::PlacementFailure => {}
        }
        if armed.times > 0 {
            self.0.push_back(armed);
        }
        Ok(())
    }

    /// The fault that strikes this request, if any.
    pub fn strike(&mut self, operation: &str) -> Option<Fault> {
        let at = self.0.iter().position(|armed| armed.operation == "*" || armed.operation == operation)?;
        let armed = self.0.get_mut(at)?;
        armed.times -= 1;
        let fault = armed.fault;
        if armed.times == 0 {
            self.0.remove(at);
        }
        Some(fault)
    }

    /// Those still waiting.
    pub fn waiting(&self) -> impl Iterator<Item = &Armed> {
        self.0.iter()
    }

    /// Disarms all.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn armed(operation: &str, fault: Fault, times: u32) -> Armed {
        Armed { operation: operation.into(), fault, times }
    }

    #[test]
    fn faults_strike_their_operation_in_order_and_as_often_as_asked() {
        let mut faults = Faults::default();
        let (busy, cut) = (Fault::Status { status: 429 }, Fault::Drop { when: When::After });
        faults.arm(armed(CREATE, busy, 2), |_| true).unwrap();
        faults.arm(armed("*", cut, 1), |_| true).unwrap();
        assert_eq!(faults.strike("droplets_get"), Some(cut));
        assert_eq!([(); 3].map(|()| faults.strike(CREATE)), [Some(busy), Some(busy), None]);
        assert_eq!(faults.waiting().count(), 0);
    }

    #[test]
    fn nonsense_is_refused_when_it_is_armed() {
        let mut faults = Faults::default();
        let known = |operation: &str| operation == "droplets_get";
        let placement = armed("droplets_get", Fault::PlacementFailure, 1);
        assert_eq!(faults.arm(placement, known), Err(Nonsense::NotACreate));
        let success = armed("droplets_get", Fault::Status { status: 200 }, 1);
        assert_eq!(faults.arm(success, known), Err(Nonsense::NoError(200)));
        let unknown = armed("droplet_get", Fault::Status { status: 500 }, 1);
        assert_eq!(faults.arm(unknown, known), Err(Nonsense::UnknownOperation("droplet_get".into())));
    }

    #[test]
    fn a_fault_reads_as_the_control_endpoint_documents_it() {
        let text = r#"{"operation":"droplets_create","fault":{"kind":"drop","when":"after"},"times":3}"#;
        assert_eq!(serde_json::from_str::<Armed>(text).unwrap(), armed(CREATE, Fault::Drop { when: When::After }, 3));
        let text = r#"{"operation":"droplets_create","fault":{"kind":"placement_failure"}}"#;
        assert_eq!(serde_json::from_str::<Armed>(text).unwrap(), armed(CREATE, Fault::PlacementFailure, 1));
    }
}
