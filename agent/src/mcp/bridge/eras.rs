//! Which process of a server requests of the newer era go to.
//!
//! The instance's own process is shaken hands with in the older era. A server that knows only that is asked in its own words; one that takes
//! both eras over one link is asked as its clients ask. But there are servers that know both and keep to the one their process was
//! addressed in first: to these another process is made, beside the instance's own, when the first client of the newer era comes, and it goes
//! when none has come for a while.
//!
//! A server says which it is when it is asked, in the older conversation, for what only the newer era has. One that doesn't know the method
//! says just that. Only one that has something else against it is worth another process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use tokio::time::{Instant, timeout};

use super::budget::Budget;
use super::envelope::{INVALID_PARAMS, METHOD_NOT_FOUND};
use super::line::Line;
use super::{Bridge, HANDSHAKE, Refused, dial_line, handshake, lock};
use crate::mcp::link::{Dial, LinkEnd};

/// How long a server may take to say whether it knows the newer era.
const ASKED: Duration = Duration::from_secs(5);
/// What could not be found out is tried again after this.
pub(super) const AGAIN: Duration = Duration::from_secs(5 * 60);
/// A process that no client of the newer era has used for so long goes.
pub(super) const UNUSED: Duration = Duration::from_secs(5 * 60);
/// How often it is asked whether it answers, and how long it may be busy with something else.
const PROOF: Duration = Duration::from_secs(60);
const BUSY: Duration = Duration::from_secs(5 * 60);

/// Where a request of the newer era goes.
#[derive(Debug, Clone)]
pub(super) struct Way {
    pub(super) line: Arc<Line>,
    /// It is to be put into the older era's words.
    pub(super) translated: bool,
}

/// What the server makes of the newer era.
#[derive(Debug, Clone)]
enum Speaks {
    /// It doesn't know it, or nobody could find out until then.
    Not { until: Option<Instant> },
    /// Over the same link as the older.
    Too,
    /// In another process, which is this one.
    Apart(Arc<Line>),
}

type Finding = Shared<BoxFuture<'static, Speaks>>;

/// What is known so far.
#[derive(Default)]
pub(super) struct Eras {
    known: Mutex<Option<Known>>,
    /// The server has once ended when it was asked.
    ended_upon_it: Arc<AtomicBool>,
}

struct Known {
    finding: Finding,
    used: Instant,
}

impl Known {
    /// Unless it isn't so any more.
    fn holds(&self, now: Instant) -> bool {
        match self.finding.clone().now_or_never() {
            None | Some(Speaks::Too | Speaks::Not { until: None }) => true,
            Some(Speaks::Not { until: Some(until) }) => now < until,
            Some(Speaks::Apart(line)) => line.ended().is_none(),
        }
    }

    fn apart(&self) -> Option<Arc<Line>> {
        match self.finding.clone().now_or_never() {
            Some(Speaks::Apart(line)) if line.ended().is_none() => Some(line),
            Some(_) | None => None,
        }
    }
}

impl Eras {
    /// The other process, if there is one.
    fn apart(&self) -> Option<Arc<Line>> {
        let mut known = lock(&self.known);
        let known = known.as_mut()?;
        known.used = Instant::now();
        known.apart()
    }

    /// Lets go of a process that nobody has used for long, and of one that has ended.
    pub(super) fn expire(&self, now: Instant) {
        let mut known = lock(&self.known);
        let over = known.as_ref().is_some_and(|known| {
            let idle = now.saturating_duration_since(known.used) >= UNUSED;
            match known.finding.clone().now_or_never() {
                // Its container goes with the last who holds the link.
                Some(Speaks::Apart(line)) => line.ended().is_some() || (idle && line.under_way() == 0),
                Some(_) | None => false,
            }
        });
        if over {
            *known = None;
        }
    }

    /// Ends the link to the other process.
    pub(super) fn part(&self, end: LinkEnd) {
        let apart = lock(&self.known).as_ref().and_then(Known::apart);
        if let Some(line) = apart {
            line.end(end);
        }
    }

    /// There is another process.
    pub(super) fn is_of_use(&self) -> bool {
        lock(&self.known).as_ref().is_some_and(|known| known.apart().is_some())
    }
}

impl Bridge {
    /// Where requests of the newer era go.
    pub(super) async fn way(&self) -> Result<Way, Refused> {
        if let Some(line) = self.eras.apart() {
            return Ok(Way { line, translated: false });
        }
        let (line, known) = self.common_in_time().await?;
        if known.is_none_or(|known| known.initialized().is_none()) {
            return Ok(Way { line, translated: false });
        }
        let finding = {
            let mut known = lock(&self.eras.known);
            let now = Instant::now();
            match &*known {
                Some(known) if known.holds(now) => known.finding.clone(),
                Some(_) | None => {
                    let finding = self.find_out(&line);
                    *known = Some(Known { finding: finding.clone(), used: now });
                    finding
                }
            }
        };
        Ok(match finding.await {
            Speaks::Not { .. } => Way { line, translated: true },
            Speaks::Too => Way { line, translated: false },
            Speaks::Apart(line) => Way { line, translated: false },
        })
    }

    /// In a task of its own: whoever waits for it may go away.
    fn find_out(&self, common: &Arc<Line>) -> Finding {
        let (common, another, instance) = (Arc::clone(common), self.another.clone(), self.instance.clone());
        let (budget, ended_upon_it) = (self.budget.clone(), Arc::clone(&self.eras.ended_upon_it));
        let found = tokio::spawn(async move {
            let later = || Speaks::Not { until: Some(Instant::now() + AGAIN) };
            match timeout(ASKED, handshake::ask_for_newer_era(&common)).await {
                Ok(Ok(Ok(()))) => Speaks::Too,
                Ok(Ok(Err(METHOD_NOT_FOUND | INVALID_PARAMS))) => Speaks::Not { until: None },
                // Once, it may just have been restarted. Twice, it was too much for it, and its clients have suffered enough.
                Ok(Err(_)) if ended_upon_it.swap(true, Ordering::Relaxed) => Speaks::Not { until: None },
                Ok(Err(_)) => later(),
                Err(_) => later(),
                Ok(Ok(Err(_))) => match another {
                    None => Speaks::Not { until: None },
                    Some(dial) => match another_process(dial.as_ref(), &instance, budget).await {
                        Ok(found) => found,
                        Err(end) => {
                            tracing::warn!(instance, %end, "there is no process for the newer era of the protocol");
                            later()
                        }
                    },
                },
            }
        });
        // Only the end of the agent ends it earlier.
        found.map(|ended| ended.unwrap_or(Speaks::Not { until: None })).boxed().shared()
    }
}

async fn another_process(dial: &dyn Dial, instance: &str, budget: Budget) -> Result<Speaks, LinkEnd> {
    let line = dial_line(dial, instance, false, budget).await?;
    let asked = timeout(HANDSHAKE, handshake::ask_for_newer_era(&line)).await;
    match asked.unwrap_or_else(|_| Err(LinkEnd::because("it does not answer")))? {
        Ok(()) => {
            tracing::info!(instance, "a process of its own serves clients of the newer era of the protocol");
            tokio::spawn(watch(Arc::downgrade(&line)));
            Ok(Speaks::Apart(line))
        }
        Err(_) => Ok(Speaks::Not { until: None }),
    }
}

/// Nobody else sees to it that this process answers. One that doesn't is let go of, and the next client gets another.
async fn watch(line: Weak<Line>) {
    loop {
        tokio::time::sleep(PROOF).await;
        let Some(line) = line.upgrade() else { return };
        match timeout(BUSY, handshake::ask_for_newer_era(&line)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return,
            Err(_) => return line.end(LinkEnd::because("it does not answer any more")),
        }
    }
}
