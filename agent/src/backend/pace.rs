//! How long to wait before the next call: jittered, so that a fleet doesn't call in step, and longer after failures.

use std::time::Duration;

/// `base`, a tenth more or less. `chance` is from 0 to 1.
pub fn jittered(base: Duration, chance: f64) -> Duration {
    base.mul_f64(0.9 + 0.2 * chance.clamp(0.0, 1.0))
}

/// The wait after `failures` in a row: `first`, doubling, never more than `longest`; between half and all of it by `chance`, so that
/// those who failed together don't come back together.
pub fn backoff(failures: u32, first: Duration, longest: Duration, chance: f64) -> Duration {
    let doubled = first.saturating_mul(1_u32 << failures.saturating_sub(1).min(16));
    doubled.min(longest).mul_f64(0.5 + 0.5 * chance.clamp(0.0, 1.0))
}

/// A number from 0 to 1 from the system's randomness; one half where there is none.
pub fn chance() -> f64 {
    getrandom::u32().map_or(0.5, |number| f64::from(number) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_stay_within_their_bounds() {
        let minute = Duration::from_secs(60);
        assert_eq!(jittered(minute, 0.0), Duration::from_secs(54));
        assert_eq!(jittered(minute, 1.0), Duration::from_secs(66));
        let waits: Vec<_> =
            (1..=9).map(|failures| backoff(failures, Duration::from_millis(500), minute, 1.0).as_millis()).collect();
        assert_eq!(waits, [500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]);
        assert_eq!(backoff(u32::MAX, minute, minute, 0.0), Duration::from_secs(30));
        assert!((0.0..=1.0).contains(&chance()));
    }
}
