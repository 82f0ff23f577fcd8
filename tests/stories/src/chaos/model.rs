//! What one instance may be by what its callers were told. A request whose answer was lost may have been accepted or not, so it is a set;
//! an answer that fits nothing in it is a mistake of the agent's.

use std::collections::BTreeSet;

/// What a caller asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// A deploy of this version.
    Deploy(u32),
    /// An update to this version.
    Update(u32),
    Start,
    Stop,
    Restart,
    Delete {
        volumes: bool,
    },
}

/// What the caller is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// Nothing reached the agent.
    Unsent,
    /// It may have been accepted.
    Lost,
    /// This status, and the code where it is no success.
    Said(u16, String),
}

/// What an instance is, as far as it was promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Promise {
    /// There is none.
    Absent,
    /// It is on its way out, which takes a while; until then it can be asked to go once more.
    Leaving,
    /// There is one of this version.
    Present {
        version: u32,
        runs: bool,
        /// It has run once; until then a failure takes it back.
        proven: bool,
    },
}

impl Promise {
    /// Nothing is left of it in the end.
    pub(super) fn is_gone(&self) -> bool {
        match self {
            Self::Absent | Self::Leaving => true,
            Self::Present { .. } => false,
        }
    }
}

/// Every promise that fits what was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Model {
    possible: BTreeSet<Promise>,
    /// Volumes of it may be there even when it isn't.
    pub(super) volumes_kept: bool,
}

impl Default for Model {
    fn default() -> Self {
        Self { possible: [Promise::Absent].into(), volumes_kept: false }
    }
}

impl Model {
    /// What it may be. One that never ran is taken back when it fails, so it may also be gone.
    pub(super) fn possible(&self) -> BTreeSet<Promise> {
        let mut all = self.possible.clone();
        if all.iter().any(|promise| matches!(promise, Promise::Present { runs: true, proven: false, .. })) {
            all.insert(Promise::Absent);
        }
        all
    }

    /// Takes note of an answer.
    ///
    /// # Errors
    /// When no promise there was goes with it.
    pub(super) fn heard(&mut self, wish: Wish, answer: &Answer) -> Result<(), String> {
        let before = self.possible();
        let after = match answer {
            Answer::Unsent => return Ok(()),
            Answer::Lost => before.iter().copied().chain(before.iter().filter_map(|was| granted(wish, *was))).collect(),
            Answer::Said(status, code) => said(wish, *status, code, &before),
        };
        if after.is_empty() {
            return Err(format!("{wish:?} was answered {answer:?}, which goes with nothing it could be: {before:?}"));
        }
        match wish {
            Wish::Delete { volumes: true } if matches!(answer, Answer::Said(200 | 202, _)) => self.volumes_kept = false,
            Wish::Delete { .. } => self.volumes_kept = true,
            Wish::Deploy(_) | Wish::Update(_) | Wish::Start | Wish::Stop | Wish::Restart => {}
        }
        self.possible = after;
        Ok(())
    }
}

/// What it is promised to be when the wish is accepted; nothing when it can't be.
fn granted(wish: Wish, was: Promise) -> Option<Promise> {
    match (wish, was) {
        (Wish::Deploy(version), Promise::Absent | Promise::Leaving) => {
            Some(Promise::Present { version, runs: true, proven: false })
        }
        (Wish::Deploy(version), Promise::Present { version: there, .. }) => (version == there).then_some(was),
        (Wish::Update(version), Promise::Present { proven, .. }) => {
            Some(Promise::Present { version, runs: true, proven })
        }
        (Wish::Start | Wish::Restart, Promise::Present { version, proven, .. }) => {
            Some(Promise::Present { version, runs: true, proven })
        }
        (Wish::Stop, Promise::Present { version, proven, .. }) => {
            Some(Promise::Present { version, runs: false, proven })
        }
        (Wish::Delete { .. }, Promise::Present { .. } | Promise::Leaving) => Some(Promise::Leaving),
        (Wish::Update(_) | Wish::Start | Wish::Restart | Wish::Stop | Wish::Delete { .. }, Promise::Absent)
        | (Wish::Update(_) | Wish::Start | Wish::Restart | Wish::Stop, Promise::Leaving) => None,
    }
}

fn said(wish: Wish, status: u16, code: &str, before: &BTreeSet<Promise>) -> BTreeSet<Promise> {
    let accepted = || before.iter().filter_map(|was| granted(wish, *was));
    let present = || before.iter().copied().filter(|was| !was.is_gone());
    match status {
        // It has been seen to be as asked.
        200 | 201 => accepted()
            .filter(|_| status == 200 || before.iter().any(Promise::is_gone))
            .map(|now| match now {
                Promise::Leaving => Promise::Absent,
                Promise::Present { version, runs: true, .. } => Promise::Present { version, runs: true, proven: true },
                now => now,
            })
            .collect(),
        // The new version may fail yet, and then it is what it was.
        202 if matches!(wish, Wish::Update(_)) => accepted().chain(present()).collect(),
        202 => accepted().collect(),
        404 if code == "instance_not_found" => before.iter().copied().filter(Promise::is_gone).collect(),
        // Another version is there.
        409 if code == "instance_exists" => present().filter(|was| granted(wish, *was).is_none()).collect(),
        409 if code == "update_rolled_back" => present().collect(),
        // It is on its way out, or to another version, and nothing was written down.
        409 if code == "busy" => before.clone(),
        503 if code == "docker_unavailable" => before.clone(),
        // A deploy that failed is taken back, and answered when it has been.
        _ if matches!(wish, Wish::Deploy(_)) => before.clone(),
        // It was tried, and what is wanted may have been written down.
        _ => before.iter().copied().chain(accepted()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(status: u16, code: &str) -> Answer {
        Answer::Said(status, code.to_owned())
    }

    fn heard(all: &[(Wish, Answer)]) -> Result<Model, String> {
        let mut model = Model::default();
        for (wish, answer) in all {
            model.heard(*wish, answer)?;
        }
        Ok(model)
    }

    const RUNNING: Promise = Promise::Present { version: 1, runs: true, proven: true };
    const STOPPED: Promise = Promise::Present { version: 1, runs: false, proven: true };
    const BEGUN: Promise = Promise::Present { version: 1, runs: true, proven: false };

    #[test]
    fn what_was_accepted_is_all_there_can_be() {
        let deployed = (Wish::Deploy(1), said(201, ""));
        assert_eq!(heard(std::slice::from_ref(&deployed)).unwrap().possible(), [RUNNING].into());
        let stopped = [deployed.clone(), (Wish::Stop, said(200, ""))];
        assert_eq!(heard(&stopped).unwrap().possible(), [STOPPED].into());
        let deleted = [deployed, (Wish::Delete { volumes: false }, said(202, ""))];
        let model = heard(&deleted).unwrap();
        assert_eq!((model.possible(), model.volumes_kept), ([Promise::Leaving].into(), true));
    }

    #[test]
    fn what_is_leaving_can_be_asked_to_go_again() {
        let leaving = [(Wish::Deploy(1), said(201, "")), (Wish::Delete { volumes: false }, said(202, ""))];
        let after = |wish: Wish, answer: Answer| heard(&[leaving.as_slice(), &[(wish, answer)]].concat());
        let again = after(Wish::Delete { volumes: true }, said(200, "")).unwrap();
        assert_eq!((again.possible(), again.volumes_kept), ([Promise::Absent].into(), false));
        let gone = after(Wish::Start, said(404, "instance_not_found")).unwrap();
        assert_eq!(gone.possible(), [Promise::Leaving].into());
        assert_eq!(after(Wish::Stop, said(409, "busy")).unwrap().possible(), [Promise::Leaving].into());
        assert!(after(Wish::Start, said(200, "")).is_err(), "started while it left");
        assert!(heard(&[(Wish::Delete { volumes: true }, said(200, ""))]).is_err(), "never there");
    }

    #[test]
    fn a_lost_answer_means_either_and_the_next_one_may_settle_it() {
        let lost = [(Wish::Deploy(1), said(201, "")), (Wish::Stop, Answer::Lost)];
        assert_eq!(heard(&lost).unwrap().possible(), [RUNNING, STOPPED].into());
        let settled = [lost.as_slice(), &[(Wish::Start, said(200, ""))]].concat();
        assert_eq!(heard(&settled).unwrap().possible(), [RUNNING].into());
        assert_eq!(heard(&[(Wish::Deploy(1), Answer::Lost)]).unwrap().possible(), [Promise::Absent, BEGUN].into());
        assert_eq!(heard(&[(Wish::Deploy(1), Answer::Unsent)]).unwrap(), Model::default());
    }

    #[test]
    fn an_update_brings_the_new_version_or_leaves_the_old() {
        let stopped = [(Wish::Deploy(1), said(201, "")), (Wish::Stop, said(200, ""))];
        let after =
            |answer: Answer| heard(&[stopped.as_slice(), &[(Wish::Update(2), answer)]].concat()).unwrap().possible();
        let new = Promise::Present { version: 2, runs: true, proven: true };
        assert_eq!(after(said(200, "")), [new].into());
        assert_eq!(after(said(202, "")), [STOPPED, new].into());
        assert_eq!(after(Answer::Lost), [STOPPED, new].into());
        assert_eq!(after(said(409, "update_rolled_back")), [STOPPED].into());
        assert_eq!(after(said(409, "busy")), [STOPPED].into());
    }

    #[test]
    fn a_deploy_whose_end_nobody_saw_may_be_taken_back() {
        let begun = heard(&[(Wish::Deploy(1), said(202, ""))]).unwrap();
        assert_eq!(begun.possible(), [Promise::Absent, BEGUN].into());
    }

    #[test]
    fn an_answer_that_goes_with_nothing_is_a_mistake() {
        let twice = [(Wish::Deploy(1), said(201, "")), (Wish::Deploy(1), said(201, ""))];
        assert!(heard(&twice).is_err(), "made twice");
        let forgotten = [(Wish::Deploy(1), said(201, "")), (Wish::Stop, said(404, "instance_not_found"))];
        assert!(heard(&forgotten).is_err(), "forgotten");
        assert!(heard(&[(Wish::Stop, said(200, ""))]).is_err(), "never there");
        let other = [(Wish::Deploy(1), said(201, "")), (Wish::Deploy(2), said(200, ""))];
        assert!(heard(&other).is_err(), "another version is not the same");
    }
}
