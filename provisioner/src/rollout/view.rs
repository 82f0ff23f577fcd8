//! A rollout as its operators see it; what the internal API answers and the command line reads.

use std::collections::{BTreeMap, HashMap};

use dtma_api::EnvironmentId;
use dtma_api::update::UpdatePhase;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Line, Rollout, RolloutId, Seen, Standing, Status, Target, TroubleKind};

/// Body of `POST /internal/rollouts`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StartRequest {
    /// Where to, such as `1.2.3`.
    pub version: String,
    /// How much of the fleet has been asked once each wave has begun, in per cent; 1, 10, 50, 100 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waves: Option<Vec<u8>>,
    /// How long each wave has to go well; 600 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soak_seconds: Option<u64>,
    /// How many agents may fail; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_failures: Option<u32>,
    /// How long an agent may take; 3600 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_seconds: Option<u64>,
}

/// Answer about one rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutAnswer {
    /// Always `true`.
    pub success: bool,
    /// For a person.
    pub message: String,
    /// The rollout.
    pub data: RolloutView,
    /// The `after` of the next page of agents; none at the end.
    #[serde(default)]
    pub next: Option<EnvironmentId>,
}

/// Answer about all rollouts, the latest first, without their agents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutList {
    /// Always `true`.
    pub success: bool,
    /// The rollouts.
    pub data: Vec<RolloutView>,
}

/// One rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutView {
    /// Its id.
    pub id: RolloutId,
    /// Where to.
    pub version: String,
    /// `running`, `paused`, `halted`, `aborted` or `completed`.
    pub status: String,
    /// Why it has halted.
    pub reason: Option<String>,
    /// The wave begun last, from 1; 0 before the first.
    pub wave: u32,
    /// The waves.
    pub waves: Vec<WaveView>,
    /// Since when all of the waves begun have settled.
    pub settled_at: Option<Timestamp>,
    /// How long each wave has to go well.
    pub soak_seconds: u64,
    /// How many agents may fail.
    pub max_failures: u32,
    /// How long an agent that was told may be unheard.
    pub silent_after_seconds: u64,
    /// How long an agent may take.
    pub deadline_seconds: u64,
    /// When it was asked for.
    pub started_at: Timestamp,
    /// When anything about it last changed.
    pub updated_at: Timestamp,
    /// When it stopped: paused, halted, aborted, completed.
    pub stopped_at: Option<Timestamp>,
    /// How many agents stand how.
    pub counts: BTreeMap<String, usize>,
    /// What happened, oldest first.
    pub history: Vec<Line>,
    /// Its agents in the order of their environments' ids; absent in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agents: Option<Vec<AgentView>>,
}

/// One wave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaveView {
    /// From 1.
    pub number: u32,
    /// How much of the fleet has been asked once it has begun.
    pub percent: u8,
    /// How many agents are in it.
    pub agents: usize,
    /// When it began.
    pub begun_at: Option<Timestamp>,
}

/// One agent of a rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentView {
    /// Its environment.
    pub environment_id: EnvironmentId,
    /// Its wave.
    pub wave: u32,
    /// `waiting`, `pending`, `updated`, `ahead`, `failed`, `silent`, `unreached`, `left_out` or `gone`.
    pub standing: String,
    /// How it failed, or what keeps it waiting: `reverted`, `refused`, `failed`, …
    pub outcome: Option<TroubleKind>,
    /// The agent's stable word for why.
    pub code: Option<String>,
    /// The same as a sentence.
    pub reason: Option<String>,
    /// What it ran when the rollout began.
    pub from_version: Option<String>,
    /// What it reported last.
    pub version: Option<String>,
    /// What its updater does, by its last report.
    pub phase: Option<UpdatePhase>,
    /// Since when its heartbeats are answered with the version.
    pub asked_at: Option<Timestamp>,
    /// When it was last heard.
    pub heard_at: Option<Timestamp>,
    /// It failed, and the rollout was resumed all the same.
    pub forgiven: bool,
}

impl Rollout {
    /// The rollout without its agents, of which `counts` says how many stand how, and `sizes` how many are in each wave.
    pub fn view(&self, counts: BTreeMap<String, usize>, sizes: &BTreeMap<u32, usize>) -> RolloutView {
        let (reason, stopped_at) = match &self.course.status {
            Status::Running => (None, None),
            Status::Halted { at, reason } => (Some(reason.clone()), Some(*at)),
            Status::Paused { at } | Status::Aborted { at } | Status::Completed { at } => (None, Some(*at)),
        };
        let begun = self.course.begun_at.iter().map(Some).chain(std::iter::repeat(None));
        let waves = (1..)
            .zip(&self.terms.waves)
            .zip(begun)
            .map(|((number, percent), begun_at)| WaveView {
                number,
                percent: *percent,
                agents: sizes.get(&number).copied().unwrap_or_default(),
                begun_at: begun_at.copied(),
            })
            .collect();
        RolloutView {
            id: self.id,
            version: self.terms.version.to_string(),
            status: self.course.status.as_str().to_owned(),
            reason,
            wave: self.course.wave,
            waves,
            settled_at: self.course.settled_at,
            soak_seconds: self.terms.soak_seconds,
            max_failures: self.terms.max_failures,
            silent_after_seconds: self.terms.silent_after_seconds,
            deadline_seconds: self.terms.deadline_seconds,
            started_at: self.started_at,
            updated_at: self.updated_at,
            stopped_at,
            counts,
            history: self.course.history.clone(),
            agents: None,
        }
    }

    /// How many agents stand how.
    pub fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for target in self.targets.values() {
            *counts.entry(target.standing.as_str().to_owned()).or_default() += 1;
        }
        counts
    }

    /// How many agents are in each wave.
    pub fn sizes(&self) -> BTreeMap<u32, usize> {
        let mut sizes = BTreeMap::new();
        for target in self.targets.values() {
            *sizes.entry(target.wave).or_default() += 1;
        }
        sizes
    }
}

impl Target {
    /// The agent as its operators see it.
    pub fn view(&self, seen: &HashMap<EnvironmentId, Seen>) -> AgentView {
        let trouble = match &self.standing {
            Standing::Failed { trouble } => Some(trouble),
            Standing::Pending { trouble, .. } => trouble.as_ref(),
            Standing::Waiting
            | Standing::Updated { .. }
            | Standing::Ahead
            | Standing::Silent { .. }
            | Standing::Unreached
            | Standing::LeftOut { .. }
            | Standing::Gone => None,
        };
        let reason = match &self.standing {
            Standing::Silent { since } => Some(format!("told to update, and not heard since {since}")),
            Standing::Unreached => Some("not heard since its wave began, so it was never told".to_owned()),
            Standing::LeftOut { why: super::LeftOut::Pinned } => Some("pinned to a version".to_owned()),
            Standing::LeftOut { why: super::LeftOut::Excluded } => Some("excluded from rollouts".to_owned()),
            Standing::Gone => Some("its environment has no agent any more".to_owned()),
            Standing::Waiting
            | Standing::Pending { .. }
            | Standing::Updated { .. }
            | Standing::Ahead
            | Standing::Failed { .. } => trouble.map(|trouble| trouble.reason.clone()),
        };
        let seen = seen.get(&self.environment);
        let report = seen.and_then(|seen| seen.report.as_ref());
        AgentView {
            environment_id: self.environment,
            wave: self.wave,
            standing: self.standing.as_str().to_owned(),
            outcome: trouble.map(|trouble| trouble.kind),
            code: trouble.map(|trouble| trouble.code.clone()),
            reason,
            from_version: self.from_version.clone(),
            version: report.map(|report| report.dtma_version.clone()),
            phase: report.and_then(|report| report.update.as_ref()).map(|update| update.phase),
            asked_at: self.asked.as_ref().map(|asked| asked.at),
            heard_at: seen.and_then(|seen| seen.reported_at),
            forgiven: self.forgiven,
        }
    }
}
