//! Who may call: the keys that are accepted, and what guessing costs.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Duration;

use axum::http::{HeaderMap, header};
use dtma_api::TokenHash;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// Refused requests that are kept waiting at once. Beyond that they are refused right away: whoever asks that often can't be slowed down
/// by waiting, and the waiting must not cost us memory.
const MAX_WAITING: usize = 256;

/// The keys callers may present, and a memory of those who presented others.
#[derive(Debug)]
pub struct Callers {
    keys: RwLock<Vec<TokenHash>>,
    failures: Mutex<Failures>,
    waiting: Semaphore,
    refused: AtomicU64,
}

/// What a request's `Authorization` header amounts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential {
    /// There is no such header.
    Absent,
    /// There is one, and it is no single bearer token.
    Malformed,
    /// A key that is accepted.
    Accepted,
    /// A key that is not.
    Wrong,
}

impl Callers {
    /// Accepts these keys.
    pub fn new(keys: Vec<TokenHash>) -> Self {
        Self {
            keys: RwLock::new(keys),
            failures: Mutex::default(),
            waiting: Semaphore::new(MAX_WAITING),
            refused: AtomicU64::new(0),
        }
    }

    /// Accepts these keys from now on, and no others.
    pub fn set_keys(&self, keys: Vec<TokenHash>) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
    }

    /// Whether any key is known.
    pub fn has_keys(&self) -> bool {
        !self.keys.read().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Wrong keys presented since the agent started.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Judges the `Authorization` header.
    pub fn judge(&self, headers: &HeaderMap) -> Credential {
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return if headers.contains_key(header::AUTHORIZATION) {
                Credential::Malformed
            } else {
                Credential::Absent
            };
        };
        let bearer = value.to_str().ok().and_then(|text| text.trim().split_once(' ')).and_then(|(scheme, token)| {
            let token = token.trim_start();
            let well_formed = scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && !token.contains(' ');
            well_formed.then_some(token)
        });
        match bearer {
            None => Credential::Malformed,
            Some(token) if self.accepts(token) => Credential::Accepted,
            Some(_) => Credential::Wrong,
        }
    }

    /// Every key is compared, each in constant time, so that time tells neither which nor how nearly.
    fn accepts(&self, presented: &str) -> bool {
        let presented = TokenHash::of(presented);
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        keys.iter().fold(false, |accepted, key| (*key == presented) | accepted)
    }

    /// Makes somebody who presented a wrong key wait, longer each time. Others, and right keys from the same address, aren't held up.
    pub async fn punish(&self, source: IpAddr) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        let Ok(_permit) = self.waiting.try_acquire() else { return };
        let delay = self.failures.lock().unwrap_or_else(PoisonError::into_inner).record(source, Instant::now());
        tokio::time::sleep(delay).await;
    }
}

/// Wrong keys per source, the latest ones only.
#[derive(Debug, Default)]
struct Failures {
    by_source: HashMap<IpAddr, Failed>,
}

#[derive(Debug, Clone, Copy)]
struct Failed {
    times: u32,
    last: Instant,
}

impl Failures {
    const MAX_SOURCES: usize = 1_024;
    const FORGET_AFTER: Duration = Duration::from_secs(15 * 60);
    const FIRST_DELAY: Duration = Duration::from_millis(100);
    const MAX_DELAY: Duration = Duration::from_secs(5);

    /// Counts one more failure and says how long its answer has to wait.
    fn record(&mut self, source: IpAddr, now: Instant) -> Duration {
        let source = network(source);
        if !self.by_source.contains_key(&source) && self.by_source.len() >= Self::MAX_SOURCES {
            self.make_room(now);
        }
        let failed = self.by_source.entry(source).or_insert(Failed { times: 0, last: now });
        if now.duration_since(failed.last) > Self::FORGET_AFTER {
            failed.times = 0;
        }
        failed.last = now;
        let delay = Self::FIRST_DELAY.saturating_mul(1_u32 << failed.times.min(16)).min(Self::MAX_DELAY);
        failed.times = failed.times.saturating_add(1);
        delay
    }

    fn make_room(&mut self, now: Instant) {
        self.by_source.retain(|_, failed| now.duration_since(failed.last) <= Self::FORGET_AFTER);
        if self.by_source.len() >= Self::MAX_SOURCES {
            let oldest = self.by_source.iter().min_by_key(|(_, failed)| failed.last).map(|(source, _)| *source);
            oldest.map(|source| self.by_source.remove(&source));
        }
    }
}

/// What one party can be told apart by: an IPv4 address, or the /64 an IPv6 address is in.
pub(super) fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(callers: &Callers, values: &[&str]) -> Credential {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::AUTHORIZATION, value.parse().unwrap());
        }
        callers.judge(&headers)
    }

    #[test]
    fn only_one_well_formed_bearer_with_a_known_key_is_accepted() {
        let callers = Callers::new(vec![TokenHash::of("one"), TokenHash::of("two")]);
        for good in ["Bearer one", "bearer two", "BEARER  one", " Bearer one "] {
            assert_eq!(judge(&callers, &[good]), Credential::Accepted, "{good}");
        }
        for wrong in ["Bearer three", "Bearer on", "Bearer onee"] {
            assert_eq!(judge(&callers, &[wrong]), Credential::Wrong, "{wrong}");
        }
        for malformed in ["", "Bearer", "Bearer ", "Basic one", "one", "Bearer one two", "Bearerone"] {
            assert_eq!(judge(&callers, &[malformed]), Credential::Malformed, "{malformed}");
        }
        assert_eq!(judge(&callers, &["Bearer one", "Bearer two"]), Credential::Malformed);
        assert_eq!(judge(&callers, &[]), Credential::Absent);
        callers.set_keys(vec![TokenHash::of("three")]);
        assert_eq!(judge(&callers, &["Bearer one"]), Credential::Wrong);
        assert_eq!(judge(&callers, &["Bearer three"]), Credential::Accepted);
    }

    #[tokio::test(start_paused = true)]
    async fn guessing_gets_slower_up_to_a_cap_and_is_forgotten() {
        let mut failures = Failures::default();
        let source: IpAddr = "203.0.113.7".parse().unwrap();
        let delays: Vec<_> = (0..8).map(|_| failures.record(source, Instant::now()).as_millis()).collect();
        assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(failures.record("203.0.113.8".parse().unwrap(), Instant::now()).as_millis(), 100);
        tokio::time::advance(Failures::FORGET_AFTER + Duration::from_secs(1)).await;
        assert_eq!(failures.record(source, Instant::now()).as_millis(), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn any_number_of_sources_takes_bounded_memory_and_an_ipv6_network_is_one() {
        let mut failures = Failures::default();
        for number in 0..5_000_u32 {
            failures.record(IpAddr::V4(number.into()), Instant::now());
        }
        assert_eq!(failures.by_source.len(), Failures::MAX_SOURCES);
        failures.record("2001:db8::1".parse().unwrap(), Instant::now());
        assert_eq!(failures.record("2001:db8::2".parse().unwrap(), Instant::now()).as_millis(), 200);
        assert_eq!(network("::ffff:203.0.113.7".parse().unwrap()), "203.0.113.7".parse::<IpAddr>().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_wrong_keys_does_not_pile_up() {
        let callers = Callers::new(Vec::new());
        let source: IpAddr = "203.0.113.7".parse().unwrap();
        let started = Instant::now();
        let mut waiting: Vec<_> = (0..MAX_WAITING).map(|_| Box::pin(callers.punish(source))).collect();
        for one in &mut waiting {
            assert!(futures_util::poll!(one).is_pending());
        }
        callers.punish(source).await;
        assert_eq!(started.elapsed(), Duration::ZERO);
        assert_eq!(callers.refused(), MAX_WAITING as u64 + 1);
    }
}
