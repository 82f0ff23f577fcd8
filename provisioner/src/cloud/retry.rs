//! When a request that may safely be repeated is repeated, and after how long.

use std::time::Duration;

/// Requests sent at most, the first included.
pub(super) const TRIES: u32 = 4;
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// A longer wait than this is left to the loop, which then knows that the cloud is not answering.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// The wait before try number `next` (2, 3, …), or none when it is not worth it. `jitter` is uniform over 0..=255.
pub(super) fn wait_before(next: u32, asked_for: Option<Duration>, jitter: u8) -> Option<Duration> {
    if next > TRIES || asked_for.is_some_and(|wait| wait > LONGEST_WAIT) {
        return None;
    }
    let doubled = FIRST_WAIT.saturating_mul(1 << next.saturating_sub(2).min(8));
    // Half to one and a half times, so that many waiting at once don't come back at once.
    let spread = doubled.mul_f64(0.5 + f64::from(jitter) / 255.0);
    Some(asked_for.unwrap_or_default().max(spread).min(LONGEST_WAIT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_are_spread_and_end() {
        assert_eq!(wait_before(2, None, 0), Some(Duration::from_millis(100)));
        assert_eq!(wait_before(2, None, 255), Some(Duration::from_millis(300)));
        assert_eq!(wait_before(4, None, 0), Some(Duration::from_millis(400)));
        assert_eq!(wait_before(5, None, 0), None);
    }

    #[test]
    fn the_clouds_own_wait_counts_unless_it_is_too_long() {
        assert_eq!(wait_before(2, Some(Duration::from_secs(3)), 0), Some(Duration::from_secs(3)));
        assert_eq!(wait_before(2, Some(Duration::from_secs(60)), 0), None);
    }
}
