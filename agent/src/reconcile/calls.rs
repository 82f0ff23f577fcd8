//! The calls that are with a server now. One that is busy with a call may have no time for a probe, and must not be restarted under it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use dtma_api::InstanceName;

/// Who is being called, and since when.
#[derive(Debug, Clone, Default)]
pub(super) struct Calls(Arc<Mutex<UnderWay>>);

#[derive(Debug, Default)]
struct UnderWay {
    next: u64,
    /// By instance, in the order they began.
    calls: BTreeMap<InstanceName, BTreeMap<u64, Instant>>,
}

/// A call to an instance's server. It lasts until this is dropped.
#[derive(Debug)]
pub struct Call {
    calls: Calls,
    instance: InstanceName,
    number: u64,
}

impl Calls {
    pub(super) fn begin(&self, instance: &InstanceName, now: Instant) -> Call {
        let mut under_way = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = under_way.next;
        under_way.next += 1;
        under_way.calls.entry(instance.clone()).or_default().insert(number, now);
        Call { calls: self.clone(), instance: instance.clone(), number }
    }

    /// Since when each call has been with the instance's server, the oldest first.
    pub(super) fn since(&self, instance: &InstanceName) -> Vec<Instant> {
        let under_way = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        under_way.calls.get(instance).into_iter().flat_map(BTreeMap::values).copied().collect()
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut under_way = self.calls.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(calls) = under_way.calls.get_mut(&self.instance) {
            calls.remove(&self.number);
            if calls.is_empty() {
                under_way.calls.remove(&self.instance);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_call_is_under_way_until_it_is_dropped() {
        let (calls, now) = (Calls::default(), Instant::now());
        let (one, two) = ("one".parse().unwrap(), "two".parse().unwrap());
        let first = calls.begin(&one, now);
        let second = calls.begin(&one, now + Duration::from_secs(1));
        let _other = calls.begin(&two, now);
        assert_eq!(calls.since(&one), [now, now + Duration::from_secs(1)]);
        drop(first);
        assert_eq!(calls.since(&one), [now + Duration::from_secs(1)]);
        drop(second);
        assert_eq!((calls.since(&one).len(), calls.since(&two).len()), (0, 1));
    }
}
