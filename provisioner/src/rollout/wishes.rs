//! What somebody may ask of a rollout. Repeating a request is no error; one that can't be met says why.

use jiff::Timestamp;

use super::judge::LEAD;
use super::{Rollout, Standing, Status, Step, Target};
use crate::environment::after;

/// Why a request can't be met.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Impossible {
    /// It is over.
    #[error("this rollout is {0}; start another one")]
    Over(&'static str),
}

impl Rollout {
    /// Tells nobody anything more for the time being. What has halted by itself stays so.
    ///
    /// # Errors
    /// When it is over.
    pub fn pause(&self, now: Timestamp) -> Result<Option<Step>, Impossible> {
        match self.course.status {
            Status::Running => {
                let mut course = self.course.clone();
                course.status = Status::Paused { at: now };
                course.tell(now, "Paused.");
                Ok(Some(Step { course, targets: Vec::new() }))
            }
            Status::Paused { .. } | Status::Halted { .. } => Ok(None),
            Status::Aborted { .. } | Status::Completed { .. } => Err(self.over()),
        }
    }

    /// Goes on. Failures so far don't count any more, and nobody is late for the time that nobody was told anything.
    ///
    /// # Errors
    /// When it is over.
    pub fn resume(&self, now: Timestamp) -> Result<Option<Step>, Impossible> {
        match self.course.status {
            Status::Running => return Ok(None),
            Status::Paused { .. } | Status::Halted { .. } => {}
            Status::Aborted { .. } | Status::Completed { .. } => return Err(self.over()),
        }
        // A pause isn't the moment at which somebody has looked at failures and found them bearable.
        let forgives = matches!(self.course.status, Status::Halted { .. });
        let mut targets = Vec::new();
        let mut forgiven = 0_usize;
        for target in self.targets.values() {
            let mut next =
                Target { forgiven: target.forgiven || (forgives && target.counts_against()), ..target.clone() };
            forgiven += usize::from(next.forgiven != target.forgiven);
            if let (Standing::Pending { .. }, Some(asked)) = (&next.standing, &mut next.asked) {
                asked.at = after(now, LEAD);
            }
            if next != *target {
                targets.push(next);
            }
        }
        let mut course = self.course.clone();
        course.status = Status::Running;
        course.settled_at = None;
        course.tell(
            now,
            match forgiven {
                0 => "Resumed.".to_owned(),
                forgiven => format!("Resumed; the {forgiven} failures so far don't count."),
            },
        );
        Ok(Some(Step { course, targets }))
    }

    /// Ends it. Agents that are updating at this moment finish what they do.
    ///
    /// # Errors
    /// When it has completed.
    pub fn abort(&self, now: Timestamp) -> Result<Option<Step>, Impossible> {
        match self.course.status {
            Status::Running | Status::Paused { .. } | Status::Halted { .. } => {
                let mut course = self.course.clone();
                course.status = Status::Aborted { at: now };
                course.tell(now, "Aborted.");
                Ok(Some(Step { course, targets: Vec::new() }))
            }
            Status::Aborted { .. } => Ok(None),
            Status::Completed { .. } => Err(self.over()),
        }
    }

    fn over(&self) -> Impossible {
        Impossible::Over(self.course.status.as_str())
    }
}
