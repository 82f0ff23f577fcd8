//! Whether a process keeps ending, from what the engine shows of it at each look. Pure: it is given `now`.
//!
//! Docker starts such a process again and again, which is its business; callers are told, with the process's own last words.

use std::collections::VecDeque;

use jiff::{SignedDuration, Timestamp};

use crate::engine::{Condition, Container, ContainerId, Exit};

/// So many ends within [`WINDOW`] are a loop.
const ENDS: usize = 3;
/// Longer than that many of the longest pauses Docker makes between two starts, which is a minute.
const WINDOW: SignedDuration = SignedDuration::from_secs(600);
/// A process that has been up for so long has come to stay.
const UPTIME: SignedDuration = SignedDuration::from_secs(60);
/// Ends that are remembered.
const REMEMBERED: usize = 100;
/// Time between two looks at its last lines.
const WORDS_AGE: SignedDuration = SignedDuration::from_secs(30);

/// The ends of one instance's process.
#[derive(Debug, Default)]
pub(in crate::reconcile) struct Crashes {
    container: Option<ContainerId>,
    /// The engine's count of restarts, as last seen.
    counted: u64,
    ends: VecDeque<Timestamp>,
    last: Option<Exit>,
    looping: bool,
    words: Words,
}

/// Its last lines.
#[derive(Debug, Default)]
struct Words {
    lines: Vec<String>,
    /// When they were asked for.
    asked_at: Option<Timestamp>,
    told: bool,
}

impl Crashes {
    /// What the engine shows of an instance that is to run; none when it isn't, or there is nothing. Whether a loop has ended with its
    /// staying up.
    pub(in crate::reconcile) fn observe(&mut self, container: Option<&Container>, now: Timestamp) -> bool {
        let Some(container) = container else {
            *self = Self::default();
            return false;
        };
        let up = matches!(container.condition, Condition::Running { since } if now.duration_since(since) >= UPTIME);
        let counted = container.restart_count;
        let ends = if self.container.as_ref() != Some(&container.id) {
            *self = Self { container: Some(container.id.clone()), ..Self::default() };
            // It may have gone on for long while no agent was there to see it.
            if up { 0 } else { counted }
        } else if counted < self.counted {
            // Somebody started it by hand.
            self.ends.clear();
            0
        } else {
            counted - self.counted
        };
        self.counted = counted;
        for _ in 0..ends.min(REMEMBERED as u64) {
            self.ends.push_back(now);
        }
        while self.ends.len() > REMEMBERED || self.ends.front().is_some_and(|at| now.duration_since(*at) > WINDOW) {
            self.ends.pop_front();
        }
        if let Condition::Restarting(exit) | Condition::Exited(exit) = &container.condition {
            self.last = Some(exit.clone());
        }
        let was = std::mem::replace(&mut self.looping, self.ends.len() >= ENDS && !up);
        if !self.looping {
            self.words = Words::default();
        }
        was && up
    }

    /// The container whose last lines are to be read now, if any.
    pub(in crate::reconcile) fn wants_words(&mut self, now: Timestamp) -> Option<ContainerId> {
        let fresh = self.words.asked_at.is_some_and(|at| now.duration_since(at) < WORDS_AGE);
        if !self.looping || fresh {
            return None;
        }
        self.words.asked_at = Some(now);
        self.container.clone()
    }

    /// Its last lines, oldest first. What callers are to be told, unless they have been.
    pub(in crate::reconcile) fn tell(&mut self, container: &ContainerId, lines: Vec<String>) -> Option<String> {
        if !self.looping || self.container.as_ref() != Some(container) {
            return None;
        }
        self.words.lines = lines;
        let first = !std::mem::replace(&mut self.words.told, true);
        self.reason().filter(|_| first)
    }

    /// Why it isn't healthy: none when it doesn't keep ending. The first line says it all but its last words.
    pub(in crate::reconcile) fn reason(&self) -> Option<String> {
        if !self.looping {
            return None;
        }
        let times = self.ends.len();
        let minutes = WINDOW.as_mins();
        let how = match &self.last {
            None => String::new(),
            Some(Exit { out_of_memory: true, code, .. }) => {
                format!(", the last time with exit code {code} because it used up its memory limit")
            }
            Some(Exit { code: 0, .. }) => {
                ", the last time with exit code 0, as if its work were done; a server has to stay up".to_owned()
            }
            Some(Exit { code, error, .. }) if error.is_empty() => format!(", the last time with exit code {code}"),
            Some(Exit { code, error, .. }) => format!(", the last time with exit code {code}: {error}"),
        };
        let mut reason = format!("its process keeps ending: {times} times within {minutes} minutes{how}");
        if self.words.lines.is_empty() {
            reason.push_str("; it wrote nothing");
        } else {
            reason.push_str("; its last lines:");
        }
        for line in &self.words.lines {
            reason.push('\n');
            reason.push_str(line);
        }
        Some(reason)
    }

    pub(in crate::reconcile) fn is_looping(&self) -> bool {
        self.looping
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reconcile::tests::blank_container;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + second).unwrap()
    }

    fn seen(restart_count: u64, condition: Condition) -> Container {
        Container { restart_count, condition, ..blank_container() }
    }

    fn ended(code: i64) -> Condition {
        Condition::Restarting(Exit { code, out_of_memory: false, error: String::new() })
    }

    #[test]
    fn one_that_ends_at_once_without_an_error_is_reported_with_its_last_words_once() {
        let mut crashes = Crashes::default();
        assert!(!crashes.observe(Some(&seen(0, Condition::Running { since: at(0) })), at(0)));
        for (count, second) in [(1, 1), (2, 2)] {
            crashes.observe(Some(&seen(count, ended(0))), at(second));
            assert!(!crashes.is_looping() && crashes.wants_words(at(second)).is_none());
        }
        crashes.observe(Some(&seen(3, ended(0))), at(4));
        assert!(crashes.is_looping());
        let container = crashes.wants_words(at(4)).unwrap();
        assert_eq!(crashes.wants_words(at(5)), None, "they are being read");
        let told = crashes.tell(&container, vec!["bye".to_owned(), "bye again".to_owned()]).unwrap();
        assert!(told.contains("3 times within 10 minutes, the last time with exit code 0"), "{told}");
        assert!(told.ends_with("its last lines:\nbye\nbye again"), "{told}");
        // Later words replace them, and nobody is told again.
        assert_eq!(crashes.wants_words(at(34)), Some(container.clone()));
        assert_eq!(crashes.tell(&container, vec!["other".to_owned()]), None);
        assert!(crashes.reason().unwrap().ends_with("\nother"));
    }

    #[test]
    fn several_ends_between_two_looks_count_and_staying_up_ends_it() {
        let mut crashes = Crashes::default();
        crashes.observe(Some(&seen(0, Condition::Running { since: at(0) })), at(0));
        crashes.observe(Some(&seen(5, Condition::Running { since: at(29) })), at(30));
        assert!(crashes.is_looping());
        assert!(!crashes.observe(Some(&seen(5, Condition::Running { since: at(29) })), at(88)));
        assert!(crashes.observe(Some(&seen(5, Condition::Running { since: at(29) })), at(89)));
        assert_eq!((crashes.is_looping(), crashes.reason()), (false, None));
    }

    #[test]
    fn ends_that_are_far_apart_are_no_loop() {
        let mut crashes = Crashes::default();
        for (count, second) in [(0, 0), (1, 1), (2, 300), (3, 700), (4, 1200)] {
            crashes.observe(Some(&seen(count, ended(1))), at(second));
            assert!(!crashes.is_looping(), "{second}");
        }
    }

    #[test]
    fn an_agent_that_was_away_sees_it_at_its_first_look_and_one_that_had_trouble_long_ago_is_well() {
        let mut crashes = Crashes::default();
        crashes.observe(Some(&seen(7, Condition::Running { since: at(0) })), at(1));
        assert!(crashes.is_looping());
        let mut crashes = Crashes::default();
        crashes.observe(Some(&seen(7, Condition::Running { since: at(0) })), at(61));
        assert!(!crashes.is_looping());
    }

    #[test]
    fn a_stop_and_a_start_by_hand_begin_anew() {
        let mut crashes = Crashes::default();
        crashes.observe(Some(&seen(3, ended(1))), at(0));
        assert!(crashes.is_looping());
        crashes.observe(Some(&seen(0, Condition::Running { since: at(5) })), at(6));
        assert!(!crashes.is_looping());
        crashes.observe(Some(&seen(3, ended(1))), at(9));
        assert!(crashes.is_looping());
        crashes.observe(None, at(10));
        assert!(!crashes.is_looping());
    }
}
