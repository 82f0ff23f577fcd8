//! What was done and heard, in order, one short line each.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A log that several write to at once.
pub(super) struct Record<'a> {
    begun: Instant,
    lines: Mutex<Vec<String>>,
    tell: &'a (dyn Fn(&str) + Sync),
}

impl<'a> Record<'a> {
    /// Everything is also told to `tell` as it happens.
    pub(super) fn new(tell: &'a (dyn Fn(&str) + Sync)) -> Self {
        Self { begun: Instant::now(), lines: Mutex::new(Vec::new()), tell }
    }

    fn lines(&self) -> MutexGuard<'_, Vec<String>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a line; `who` did or heard `what`.
    pub(super) fn write(&self, who: &str, what: &str) {
        let line = format!("{:7.2} {who:<9} {what}", self.begun.elapsed().as_secs_f64());
        (self.tell)(&line);
        self.lines().push(line);
    }

    /// Since the beginning.
    pub(super) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// The last lines about one instance, with what was done to all of them.
    pub(super) fn about(&self, name: &str) -> String {
        let lines = self.lines();
        let about: Vec<&String> = lines
            .iter()
            .filter(|line| line.split([' ', '\'']).any(|word| word == name || word == "everything"))
            .collect();
        let start = about.len().saturating_sub(40);
        about.iter().skip(start).map(|line| format!("    {line}\n")).collect()
    }
}
