//! DigitalOcean's two rate limits per token: a sliding hour, and a burst within a minute. Pure, given `now`.

use std::collections::VecDeque;

use jiff::{SignedDuration, Timestamp};

/// How many requests are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// In any hour.
    pub hour: usize,
    /// In any minute.
    pub minute: usize,
}

impl Default for Limits {
    /// DigitalOcean's.
    fn default() -> Self {
        Self { hour: 5_000, minute: 250 }
    }
}

/// What became of one request, and what its answer's headers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// `ratelimit-limit`.
    pub limit: usize,
    /// `ratelimit-remaining`.
    pub remaining: usize,
    /// `ratelimit-reset`: when the oldest request counted leaves the hour.
    pub reset: Timestamp,
    /// Whether and why it isn't taken.
    pub refused: Option<Refused>,
}

/// Which limit a request ran into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The hour's: only the reset time tells when to try again.
    Hour,
    /// The minute's: `retry-after` tells, in seconds.
    Minute {
        /// Seconds until one more is taken.
        retry_after: i64,
    },
}

const HOUR: SignedDuration = SignedDuration::from_hours(1);
const MINUTE: SignedDuration = SignedDuration::from_mins(1);

/// Counts the requests of one token.
#[derive(Debug)]
pub struct Limiter {
    limits: Limits,
    taken: VecDeque<Timestamp>,
}

impl Limiter {
    /// Nothing counted yet.
    pub fn new(limits: Limits) -> Self {
        Self { limits, taken: VecDeque::new() }
    }

    /// Counts a request unless it is over a limit. Refused ones don't count.
    pub fn take(&mut self, now: Timestamp) -> Verdict {
        while self.taken.front().is_some_and(|first| *first + HOUR <= now) {
            self.taken.pop_front();
        }
        let burst: Vec<_> = self.taken.iter().rev().take_while(|at| **at + MINUTE > now).collect();
        let refused = if self.taken.len() >= self.limits.hour {
            Some(Refused::Hour)
        } else if burst.len() >= self.limits.minute {
            let wait = burst.last().map_or(MINUTE, |oldest| (**oldest + MINUTE).duration_since(now));
            Some(Refused::Minute { retry_after: wait.as_secs() + i64::from(wait.subsec_nanos() > 0) })
        } else {
            self.taken.push_back(now);
            None
        };
        Verdict {
            limit: self.limits.hour,
            remaining: self.limits.hour.saturating_sub(self.taken.len()),
            reset: self.taken.front().map_or(now, |first| *first + HOUR),
            refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_burst_is_refused_with_the_seconds_to_wait_and_then_taken_again() {
        let mut limiter = Limiter::new(Limits { hour: 100, minute: 2 });
        assert_eq!(limiter.take(at(10)).refused, None);
        let second = limiter.take(at(30));
        assert_eq!((second.remaining, second.reset, second.refused), (98, at(3610), None));
        let third = limiter.take(at(40));
        assert_eq!((third.remaining, third.refused), (98, Some(Refused::Minute { retry_after: 30 })));
        assert_eq!(limiter.take(at(70)).refused, None);
    }

    #[test]
    fn the_hour_slides() {
        let mut limiter = Limiter::new(Limits { hour: 2, minute: 10 });
        limiter.take(at(0));
        limiter.take(at(1800));
        assert_eq!(limiter.take(at(1801)).refused, Some(Refused::Hour));
        assert_eq!(limiter.take(at(3600)).refused, None);
        assert_eq!(limiter.take(at(3601)).refused, Some(Refused::Hour));
    }
}
