//! One allowance for everything sent with one token: the cloud counts requests per token, whatever they are for.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The cloud allows 250 requests a minute; stay below, since others may use the token too.
const PER_SECOND: f64 = 4.0;
/// Requests that may go out at once after a quiet time.
const BURST: f64 = 10.0;
/// The cloud's clock and ours differ; never stand still for longer than this on its word.
const LONGEST_HOLD: Duration = Duration::from_secs(60);

/// A token bucket that the cloud's own headers can shut for a while.
#[derive(Debug)]
pub struct Limiter {
    bucket: Mutex<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    allowance: f64,
    counted_at: Instant,
    shut_until: Instant,
}

impl Limiter {
    /// A full bucket.
    pub fn new() -> Self {
        let now = Instant::now();
        Self { bucket: Mutex::new(Bucket { allowance: BURST, counted_at: now, shut_until: now }) }
    }

    /// Waits until one more request may go out.
    pub async fn turn(&self) {
        while let Some(wait) = self.take(Instant::now()) {
            tokio::time::sleep(wait).await;
        }
    }

    /// Sends nothing for `wait`, at most a minute.
    pub fn shut_for(&self, wait: Duration) {
        let until = Instant::now() + wait.min(LONGEST_HOLD);
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.shut_until = bucket.shut_until.max(until);
    }

    /// Takes one turn, or says how long to wait before asking again.
    fn take(&self, now: Instant) -> Option<Duration> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let earned = now.saturating_duration_since(bucket.counted_at).as_secs_f64() * PER_SECOND;
        bucket.allowance = (bucket.allowance + earned).min(BURST);
        bucket.counted_at = now;
        if now < bucket.shut_until {
            return Some(bucket.shut_until - now);
        }
        if bucket.allowance < 1.0 {
            return Some(Duration::from_secs_f64((1.0 - bucket.allowance) / PER_SECOND).max(Duration::from_millis(1)));
        }
        bucket.allowance -= 1.0;
        None
    }
}

impl Default for Limiter {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_minute_never_holds_more_than_the_cloud_allows() {
        let limiter = Limiter::new();
        let start = Instant::now();
        let mut turns = 0_u32;
        while start.elapsed() < Duration::from_secs(60) {
            limiter.turn().await;
            turns += 1;
        }
        assert!((230..=250).contains(&turns), "{turns}");
        // Once the burst is used up the rate alone counts.
        let again = Instant::now();
        for _ in 0..40 {
            limiter.turn().await;
        }
        assert!(again.elapsed() >= Duration::from_secs(9), "{:?}", again.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn shut_by_the_cloud_it_waits_but_never_longer_than_a_minute() {
        let limiter = Limiter::new();
        let start = Instant::now();
        limiter.shut_for(Duration::from_secs(7));
        limiter.turn().await;
        assert_eq!(start.elapsed().as_secs(), 7);
        limiter.shut_for(Duration::from_secs(86_400));
        limiter.turn().await;
        assert_eq!(start.elapsed().as_secs(), 67);
    }
}
