//! Who may report, and what they reported last: every agent's bearer, by digest, in memory, so that a heartbeat costs no read of the
//! database.
//!
//! Derived from the rows and nothing else: [`Roll::note`] is told of every committed change.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use dtma_api::{EnvironmentId, TokenHash};
use jiff::Timestamp;

use crate::environment::{Environment, State};
use crate::rollout::{Report, Seen};

/// One agent that may report.
#[derive(Debug)]
pub struct Member {
    /// Its environment.
    pub environment: EnvironmentId,
    /// Milliseconds since 1970.
    heard_at: AtomicI64,
    reporting: AtomicBool,
    last: Mutex<Option<LastReport>>,
}

#[derive(Debug)]
struct LastReport {
    report: Arc<Report>,
    at: Timestamp,
}

impl Member {
    /// A heartbeat has been kept. Answers whether the row must be told, because it doesn't say `active`.
    pub fn heard(&self, now: Timestamp) -> bool {
        self.heard_at.fetch_max(now.as_millisecond(), Ordering::Relaxed);
        !self.reporting.load(Ordering::Relaxed)
    }

    /// A heartbeat that came at `at`, and is kept, said this. Answers whether the one before said something else.
    pub fn reported(&self, report: Report, at: Timestamp) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *last {
            // Two of one agent at once: the later one counts.
            Some(last) if at < last.at => false,
            Some(last) if *last.report == report => {
                last.at = at;
                false
            }
            last => {
                *last = Some(LastReport { report: Arc::new(report), at });
                true
            }
        }
    }

    fn seen(&self, enrolled: bool) -> Seen {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        Seen {
            enrolled,
            reporting: self.reporting.load(Ordering::Relaxed),
            report: last.as_ref().map(|last| Arc::clone(&last.report)),
            reported_at: last.as_ref().map(|last| last.at),
            quiet_since: self.heard_at(),
        }
    }

    fn heard_at(&self) -> Timestamp {
        Timestamp::from_millisecond(self.heard_at.load(Ordering::Relaxed)).unwrap_or(Timestamp::UNIX_EPOCH)
    }
}

#[derive(Debug, Default)]
struct Names {
    by_bearer: HashMap<[u8; 32], Arc<Member>>,
    by_environment: HashMap<EnvironmentId, (u64, Arc<Member>, Vec<TokenHash>)>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Roll {
    names: RwLock<Names>,
}

impl Roll {
    /// Takes over what `environment` says now. Silence counts from `now` at the earliest: while this process was down nobody could
    /// report. An older generation than one already noted is ignored.
    pub fn note(&self, environment: &Environment, now: Timestamp) {
        let bearers = environment.state.bearers();
        let reporting = matches!(environment.state, State::Active { .. });
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        let known = match names.by_environment.get(&environment.id) {
            Some((generation, ..)) if *generation > environment.generation => return,
            Some((_, member, old)) => Some((Arc::clone(member), old.clone())),
            None if bearers.is_empty() => return,
            None => None,
        };
        let (member, old) = known.unwrap_or_else(|| {
            let member = Member {
                environment: environment.id,
                heard_at: AtomicI64::new(now.as_millisecond()),
                reporting: AtomicBool::new(false),
                last: Mutex::default(),
            };
            (Arc::new(member), Vec::new())
        });
        for bearer in old.iter().filter(|bearer| !bearers.contains(bearer)) {
            names.by_bearer.remove(bearer.as_bytes());
        }
        for bearer in bearers {
            names.by_bearer.insert(*bearer.as_bytes(), Arc::clone(&member));
        }
        if reporting && !member.reporting.swap(reporting, Ordering::Relaxed) {
            member.heard_at.fetch_max(now.as_millisecond(), Ordering::Relaxed);
        }
        member.reporting.store(reporting, Ordering::Relaxed);
        // Kept even without bearers: an older change noted late must find that there is a newer one.
        names.by_environment.insert(environment.id, (environment.generation, member, bearers.to_vec()));
    }

    /// Whose bearer this is.
    pub fn find(&self, bearer: TokenHash) -> Option<Arc<Member>> {
        self.names.read().unwrap_or_else(PoisonError::into_inner).by_bearer.get(bearer.as_bytes()).cloned()
    }

    /// All agents there are or have been since this process began, as rollouts look at them.
    pub fn seen(&self) -> HashMap<EnvironmentId, Seen> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let seen = |(id, (_, member, bearers)): (&EnvironmentId, &(u64, Arc<Member>, Vec<TokenHash>))| {
            (*id, member.seen(!bearers.is_empty()))
        };
        names.by_environment.iter().map(seen).collect()
    }

    /// An environment's agent.
    pub fn member(&self, environment: EnvironmentId) -> Option<Arc<Member>> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        names.by_environment.get(&environment).map(|(_, member, _)| Arc::clone(member))
    }

    /// Those that were reporting and have been silent for longer than `limit`, with when they were last heard.
    pub fn silent(&self, now: Timestamp, limit: Duration) -> Vec<(EnvironmentId, Timestamp)> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        names
            .by_environment
            .values()
            .filter(|(_, member, _)| member.reporting.load(Ordering::Relaxed))
            .map(|(_, member, _)| (member.environment, member.heard_at()))
            .filter(|(_, heard_at)| {
                Duration::try_from(now.duration_since(*heard_at)).is_ok_and(|silence| silence > limit)
            })
            .collect()
    }
}
