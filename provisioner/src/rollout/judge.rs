//! Where one agent stands, by what it reports and by its silence.

use std::cmp::Ordering;
use std::time::Duration;

use dtma_release::Version;
use jiff::Timestamp;

use super::{Asked, LeftOut, Seen, Standing, Target, Terms, Trouble, TroubleKind, elapsed};
use crate::environment::after;

/// What keeps an agent from trying (no network, a full disk), or its trial from coming to an end (a power cut), may pass. It may try so
/// often, so long after; agents themselves take five minutes before they try again.
const TRIES: u32 = 3;
const RETRY_AFTER: Duration = Duration::from_secs(300);

/// Who is to be told is told so much later: the step has to be on disk and published first, and a heartbeat that was handled before that
/// must not count as one that was answered with the version.
pub(super) const LEAD: Duration = Duration::from_secs(1);

/// What an agent is judged by besides its own reports.
pub(super) struct Circumstances<'a> {
    pub(super) terms: &'a Terms,
    /// Nobody is told anything while it doesn't run, so nobody is late.
    pub(super) running: bool,
    pub(super) now: Timestamp,
}

impl Target {
    /// Nothing more is expected of it.
    pub(super) fn has_settled(&self) -> bool {
        match self.standing {
            Standing::Waiting | Standing::Pending { .. } => false,
            Standing::Updated { .. }
            | Standing::Ahead
            | Standing::Failed { .. }
            | Standing::Silent { .. }
            | Standing::Unreached
            | Standing::LeftOut { .. }
            | Standing::Gone => true,
        }
    }

    /// It speaks against the version.
    pub(super) fn counts_against(&self) -> bool {
        matches!(self.standing, Standing::Failed { .. } | Standing::Silent { .. }) && !self.forgiven
    }

    /// It was asked and runs the version now, or it failed and somebody has said to go on all the same.
    pub(super) fn vouches(&self) -> bool {
        let updated = matches!(self.standing, Standing::Updated { .. }) && self.asked.is_some();
        updated || self.forgiven
    }

    /// Its wave begins.
    pub(super) fn ask(&self, seen: Option<&Seen>, now: Timestamp) -> Self {
        let known_result = seen.and_then(|seen| seen.report.as_ref()?.last_result());
        let asked = Some(Asked { at: after(now, LEAD), known_result, tries: 0 });
        Self { asked, standing: Standing::Pending { retry_at: None, trouble: None }, ..self.clone() }
    }

    /// This agent as it stands now.
    pub(super) fn judged(&self, seen: Option<&Seen>, left_out: Option<LeftOut>, around: &Circumstances<'_>) -> Self {
        let mut next = self.clone();
        next.standing = next.standing_now(seen, left_out, around);
        if matches!(next.standing, Standing::Updated { .. }) && !matches!(self.standing, Standing::Updated { .. }) {
            next.forgiven = false;
        }
        next
    }

    fn standing_now(&mut self, seen: Option<&Seen>, left_out: Option<LeftOut>, around: &Circumstances<'_>) -> Standing {
        let Some(seen) = seen.filter(|seen| seen.enrolled) else { return Standing::Gone };
        let reported = self.by_report(seen, around);
        match reported {
            // Whatever it went to since then, it wasn't this rollout that sent it there.
            Standing::Ahead => return Standing::Ahead,
            Standing::Updated { .. } => return self.unless_silent(reported, seen, around),
            _ => {}
        }
        if let Some(why) = left_out {
            return Standing::LeftOut { why };
        }
        if matches!(reported, Standing::Failed { .. } | Standing::Waiting) {
            return reported;
        }
        if let Some(away) = self.away_still(seen) {
            return away;
        }
        if self.standing.is_away()
            && let Some(asked) = &mut self.asked
        {
            // It is told from now on, and wasn't meanwhile: its time begins anew.
            asked.at = after(around.now, LEAD);
            asked.tries = 0;
            return reported;
        }
        match self.unless_silent(reported, seen, around) {
            Standing::Pending { retry_at, trouble } => self.in_time(retry_at, trouble, seen, around),
            other => other,
        }
    }

    /// What the agent itself says.
    fn by_report(&mut self, seen: &Seen, around: &Circumstances<'_>) -> Standing {
        let (wanted, now) = (&around.terms.version, around.now);
        let version = seen.report.as_ref().and_then(|report| report.version());
        match version.as_ref().map(|version| version.cmp_precedence(wanted)) {
            Some(Ordering::Greater) => return Standing::Ahead,
            Some(Ordering::Equal) if seen.report.as_ref().is_some_and(|report| report.has_proved(wanted)) => {
                return match self.standing {
                    Standing::Updated { at } => Standing::Updated { at },
                    _ => Standing::Updated { at: now },
                };
            }
            Some(Ordering::Equal | Ordering::Less) | None => {}
        }
        let Some(asked) = &mut self.asked else { return Standing::Waiting };
        let pending = match &self.standing {
            Standing::Failed { trouble } => return Standing::Failed { trouble: trouble.clone() },
            Standing::Pending { retry_at, trouble } => {
                Standing::Pending { retry_at: *retry_at, trouble: trouble.clone() }
            }
            Standing::Updated { at } => match gone_back(seen, wanted, version.as_ref(), now) {
                Some(trouble) => return Standing::Failed { trouble },
                None => Standing::Updated { at: *at },
            },
            Standing::Waiting
            | Standing::Ahead
            | Standing::Silent { .. }
            | Standing::Unreached
            | Standing::LeftOut { .. }
            | Standing::Gone => Standing::Pending { retry_at: None, trouble: None },
        };
        let trouble = seen.report.as_ref().and_then(|report| report.trouble(wanted, asked.known_result, now));
        match trouble {
            Some(trouble) if trouble.may_pass() && asked.tries + 1 < TRIES => {
                asked.tries += 1;
                asked.known_result = seen.report.as_ref().and_then(|report| report.last_result());
                Standing::Pending { retry_at: Some(after(now, RETRY_AFTER)), trouble: Some(trouble) }
            }
            Some(trouble) => Standing::Failed { trouble },
            None => pending,
        }
    }

    /// It wasn't heard since it fell silent, or since it was to be told: neither another look nor a restart of this process makes it come
    /// back.
    fn away_still(&self, seen: &Seen) -> Option<Standing> {
        let heard_again = match (&self.standing, &self.asked) {
            (Standing::Silent { since }, _) => seen.reported_at.is_some_and(|at| at > *since),
            (Standing::Unreached, Some(asked)) => seen.reported_at.is_some_and(|at| at >= asked.at),
            _ => true,
        };
        (!heard_again).then(|| self.standing.clone())
    }

    /// `standing`, unless the agent was told and isn't heard any more. One that was never told can't have fallen silent over it.
    fn unless_silent(&self, standing: Standing, seen: &Seen, around: &Circumstances<'_>) -> Standing {
        let Some(asked) = &self.asked else { return standing };
        let limit = around.terms.silent_after();
        let told = seen.reported_at.is_some_and(|reported_at| reported_at >= asked.at);
        if told && elapsed(seen.quiet_since, around.now) > limit {
            let since = seen.reported_at.unwrap_or(seen.quiet_since);
            return Standing::Silent { since };
        }
        let pending = matches!(standing, Standing::Pending { .. });
        if pending && !told && elapsed(seen.quiet_since.max(asked.at), around.now) > limit {
            return Standing::Unreached;
        }
        standing
    }

    /// Still pending, or too late.
    fn in_time(
        &mut self,
        retry_at: Option<Timestamp>,
        trouble: Option<Trouble>,
        seen: &Seen,
        around: &Circumstances<'_>,
    ) -> Standing {
        let (terms, now) = (around.terms, around.now);
        let Some(asked) = self.asked.as_mut().filter(|_| around.running) else {
            return Standing::Pending { retry_at, trouble };
        };
        match retry_at {
            Some(at) if now >= at => {
                asked.at = after(now, LEAD);
                return Standing::Pending { retry_at: None, trouble };
            }
            Some(_) => return Standing::Pending { retry_at, trouble },
            None => {}
        }
        // How long it had had when it was heard last: what it did since then is for its next report to say, also where nobody could hear it.
        let waited = elapsed(asked.at, seen.reported_at.unwrap_or(asked.at));
        let late = |kind, code: &str, reason| {
            let trouble = Trouble { kind, code: code.to_owned(), reason, at: now };
            Standing::Failed { trouble }
        };
        let report = seen.report.as_ref();
        if let Some(report) = report.filter(|_| waited > terms.silent_after()) {
            let version = &report.dtma_version;
            if report.version().is_none() {
                let reason = format!("it calls its version {version:?}, which is none, so it isn't told another");
                return late(TroubleKind::Unsupported, "no_version", reason);
            }
            if report.update.is_none() {
                let reason = format!("agent {version} says nothing of updates: it is too old, or has no updater");
                return late(TroubleKind::Unsupported, "no_updater", reason);
            }
        }
        if waited > terms.deadline() {
            let phase = report.and_then(|report| report.update.as_ref()).map(|update| update.phase);
            let phase = phase.and_then(|phase| serde_json::to_value(phase).ok());
            let phase = phase.as_ref().and_then(|phase| phase.as_str()).unwrap_or("unknown");
            let reason = format!("told {} s ago, and its updater is {phase}", waited.as_secs());
            return late(TroubleKind::TimedOut, "timed_out", reason);
        }
        Standing::Pending { retry_at, trouble }
    }
}

impl Standing {
    /// Nobody tells it anything, for reasons that may pass.
    fn is_away(&self) -> bool {
        match self {
            Self::Ahead | Self::Silent { .. } | Self::Unreached | Self::LeftOut { .. } | Self::Gone => true,
            Self::Waiting | Self::Pending { .. } | Self::Updated { .. } | Self::Failed { .. } => false,
        }
    }
}

/// Why an agent that ran the version runs an older one now; none while it is still about to say.
fn gone_back(seen: &Seen, wanted: &Version, version: Option<&Version>, now: Timestamp) -> Option<Trouble> {
    let report = seen.report.as_ref()?;
    if let Some(trouble) = report.trouble(wanted, None, now) {
        return Some(trouble);
    }
    // A report that was under way while the new version's first ones came says that something is being done.
    let version = version.filter(|version| version.cmp_precedence(wanted).is_lt() && report.is_idle())?;
    Some(Trouble {
        kind: TroubleKind::Reverted,
        code: "went_back".to_owned(),
        reason: format!("it ran the version and reports {version} again, without a reason"),
        at: now,
    })
}
