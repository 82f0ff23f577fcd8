//! Acting: which jobs to start and to call off, and what follows when one ends.

use std::sync::Arc;

use dtma_api::InstanceName;
use jiff::Timestamp;
use tokio::task::JoinError;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::batch::{self, AtWork};
use super::handle::with_entry;
use super::health::{self, Moment};
use super::plan::{self, Goal, Job, Step, Subject};
use super::run::{Loop, Track, Underway};
use super::status::Departed;
use super::work::{Outcome, Reached, Work, open_egress};
use crate::egress::EgressState;
use crate::engine::{ContainerId, Settings};
use crate::instance::{Departure, Egress, Failure, FailureKind, Intent, Spec, State};
use crate::store::ledger::{Contents, Entry, LedgerError};

/// How many instances that went are remembered.
const DEPARTED_KEPT: usize = 64;
/// Time between two attempts to open the egress proxy.
const EGRESS_PAUSE: std::time::Duration = std::time::Duration::from_secs(2);

impl Loop {
    /// Compares what is wanted with what is there, and starts what is to be done. How much was started.
    pub(super) async fn apply(&mut self) -> usize {
        let shared = Arc::clone(&self.shared);
        let mut desk = shared.desk().await;
        let contents = desk.contents().clone();
        // A ledger that has yet to be put together again says nothing about what is wanted.
        if !self.recover {
            shared.secrets.sweep(&contents);
        }
        let (now, moment) = (Instant::now(), Moment::now());
        let mut jobs = Vec::new();
        let mut at_work = AtWork::default();
        for (name, entry) in &contents.entries {
            if self.tracks.get(name).is_some_and(|track| track.job.is_some()) {
                at_work.count(entry);
            }
        }
        for (name, entry) in &contents.entries {
            let track = self.tracks.entry(name.clone()).or_default();
            let ticket = desk.ticket(name);
            track.asked = ticket;
            if let Some(underway) = &track.job {
                // What was begun for another purpose is called off; it ends at its next step.
                if underway.purpose != entry.purpose() {
                    underway.cancel.cancel();
                }
                track.look_away();
                continue;
            }
            if track.unsure || at_work.holds_up(entry, &contents) {
                continue;
            }
            // What is stopped or removed is so with all its sessions, which share its volumes and networks.
            if entry.intent != Intent::Run && self.keeping.has_any_of(name) {
                continue;
            }
            if ticket > track.settled {
                // Somebody asked anew: no more patience with what failed before.
                track.not_before = None;
                track.supervisor.forgive();
            }
            let containers = self.observed.get(name).map_or(&[][..], Vec::as_slice);
            track.look_after(entry, containers, &self.timing, moment, &shared.journal);
            let wanted = Settings::of(&entry.spec);
            if plan::current(entry, containers).is_none_or(|container| container.settings == wanted) {
                track.adjusted = false;
            }
            let subject = Subject {
                entry,
                containers,
                nudge: desk.nudge_for(name),
                hung: track.supervisor.is_to_be_restarted(moment.instant),
                failing: track.failure.is_some() && !track.is_left_to_checks(entry, containers),
                not_before: track.not_before.map(Instant::into_std),
                adjusted: track.adjusted,
            };
            match plan::plan(&subject, now.into_std()) {
                Some(job) => {
                    track.adjusted |= job.steps.contains(&Step::Adjust);
                    at_work.count(entry);
                    jobs.push((Arc::clone(entry), job, ticket));
                }
                None => track.settled = ticket,
            }
            desk.take_nudge(name);
        }
        drop(desk);
        self.tracks.retain(|name, track| track.job.is_some() || contents.entries.contains_key(name));
        self.discard_orphans(&contents);
        self.keep_the_way_out(&contents);
        let started = jobs.len();
        for (entry, job, ticket) in jobs {
            if job.goal == Goal::Revived {
                self.restarting(&job.instance);
            }
            // Somebody wants all of it anew, not only what hangs.
            if job.goal == Goal::Running && job.steps.contains(&Step::Restart) {
                self.sessions.all_over(&job.instance, "the instance was restarted");
            }
            self.launch(entry, job, ticket);
        }
        started + self.keep_sessions(&contents)
    }

    fn launch(&mut self, entry: Arc<Entry>, job: Job, ticket: u64) {
        let cancel = CancellationToken::new();
        let name = job.instance.clone();
        let has = |step: &Step| job.steps.contains(step);
        let state = match job.goal {
            Goal::Gone => Some(State::Removing),
            Goal::Stopped => Some(State::Stopping),
            Goal::Updated | Goal::Reverted => Some(State::Updating),
            Goal::Running if has(&Step::Fetch) => Some(State::Pulling),
            Goal::Running if has(&Step::Start) || has(&Step::Restart) => Some(State::Starting),
            Goal::Running => Some(State::Probing),
            Goal::Revived => Some(State::Starting),
            Goal::Tidy => None,
        };
        let underway = Underway { ticket, purpose: entry.purpose(), job: job.clone(), state, cancel: cancel.clone() };
        self.tracks.entry(name.clone()).or_default().job = Some(underway);
        let work = Work {
            job,
            entry,
            shared: Arc::clone(&self.shared),
            prober: Arc::clone(&self.prober),
            timing: self.timing,
            gates: Arc::clone(&self.gates),
            cancel,
            reports: self.reports.clone(),
        };
        let running = name.clone();
        let handle = self.jobs.spawn(async move { (running, Box::pin(work.carry_out()).await) });
        self.job_names.insert(handle.id(), name);
    }

    /// Opens the egress proxy for instances that run already, as after the agent's own restart; work opens it for those it starts.
    fn keep_the_way_out(&mut self, contents: &Contents) {
        let needed = contents.entries.values().any(|entry| matches!(entry.spec.network.egress, Egress::AllowList(_)));
        let open = matches!(self.shared.egress.state(), EgressState::Open(_));
        if !needed || open || self.egress_work.as_ref().is_some_and(|work| !work.is_finished()) {
            return;
        }
        // Docker may still be bringing the bridge up.
        self.observe_at = self.observe_at.min(Instant::now() + EGRESS_PAUSE);
        let shared = Arc::clone(&self.shared);
        self.egress_work = Some(tokio::spawn(async move {
            if let Err(error) = open_egress(&shared).await {
                shared.egress.closed(error.to_string());
            }
            tokio::time::sleep(EGRESS_PAUSE).await;
        }));
    }

    /// Removes containers of ours that belong to no instance of the ledger. They are left of a create that was under way when the agent
    /// died and whose deploy was taken back meanwhile: an entry is only forgotten when its containers are gone.
    fn discard_orphans(&mut self, contents: &Contents) {
        if self.recover || self.orphan_work.as_ref().is_some_and(|work| !work.is_finished()) {
            return;
        }
        let owned = |name: &InstanceName| {
            let wanted = contents.entries.contains_key(name) || contents.strange.contains_key(name);
            wanted || self.tracks.contains_key(name)
        };
        let strays = self
            .observed
            .iter()
            .filter(|(name, _)| !owned(name))
            .flat_map(|(_, containers)| containers)
            .chain(&self.nameless);
        let strays: Vec<ContainerId> = strays
            .filter(|container| !contents.unreadable.contains(container.id.as_str()))
            .map(|container| container.id.clone())
            .collect();
        if strays.is_empty() {
            return;
        }
        let engine = Arc::clone(&self.engine);
        self.observed.retain(|name, _| {
            contents.entries.contains_key(name) || contents.strange.contains_key(name) || self.tracks.contains_key(name)
        });
        self.nameless.retain(|container| contents.unreadable.contains(container.id.as_str()));
        self.orphan_work = Some(tokio::spawn(async move {
            for container in strays {
                tracing::warn!(container = container.as_str(), "removing a container of ours that no instance owns");
                if let Err(error) = engine.remove(&container).await {
                    tracing::error!(error = &error as &dyn std::error::Error, "it could not be removed");
                }
            }
        }));
    }

    /// A job says how far it is.
    pub(super) fn reported(&mut self, name: &InstanceName, state: State) {
        if let Some(underway) = self.tracks.get_mut(name).and_then(|track| track.job.as_mut()) {
            underway.state = Some(state);
        }
    }

    /// A job broke off by itself, which is a fault in the agent.
    pub(super) async fn broke(&mut self, error: &JoinError) {
        let Some(name) = self.job_names.remove(&error.id()) else { return };
        tracing::error!(instance = %name, error = error as &dyn std::error::Error, "work on an instance broke off");
        let failure = Failure::new(FailureKind::EngineFailed, "the agent failed inside; its log has more");
        self.ended(name, Outcome::Failed(failure)).await;
    }

    /// A job has ended.
    pub(super) async fn ended(&mut self, name: InstanceName, outcome: Outcome) {
        let Some(track) = self.tracks.get_mut(&name) else { return };
        let Some(underway) = track.job.take() else { return };
        let wanted = self.shared.desk().await.contents().entries.get(&name).cloned();
        let Some(entry) = wanted.filter(|entry| entry.purpose() == underway.purpose) else {
            return self.look_again(&name, underway.cancel.is_cancelled());
        };
        match outcome {
            Outcome::LookAgain => self.look_again(&name, underway.cancel.is_cancelled()),
            Outcome::Reached(reached) => self.reached(name, &entry, underway, *reached).await,
            Outcome::Failed(failure) => self.failed(name, &entry, &underway, failure).await,
        }
    }

    fn look_again(&mut self, name: &InstanceName, at_once: bool) {
        if let Some(track) = self.tracks.get_mut(name) {
            track.unsure = true;
        }
        let pause = if at_once { std::time::Duration::ZERO } else { self.timing.observe_pause };
        self.observe_at = self.observe_at.min(Instant::now() + pause);
    }

    async fn reached(&mut self, name: InstanceName, entry: &Entry, underway: Underway, reached: Reached) {
        let Some(track) = self.tracks.get_mut(&name) else { return };
        track.failure = None;
        track.tries = 0;
        track.not_before = None;
        match underway.job.goal {
            Goal::Gone => return self.gone(name, entry, underway.ticket).await,
            Goal::Updated => {
                take_health(track, entry.next().unwrap_or(entry.present()).spec, &reached);
                return self.updated(&name, reached.image_digest).await;
            }
            Goal::Reverted => return self.reverted(&name).await,
            // The next look tells whether more is to be done.
            Goal::Tidy => return self.look_again(&name, true),
            Goal::Running => take_health(track, &entry.spec, &reached),
            Goal::Stopped | Goal::Revived => {}
        }
        let Some(container) = reached.container else { return self.look_again(&name, true) };
        track.settled = underway.ticket;
        self.observed.insert(name.clone(), vec![container]);
        if underway.job.goal == Goal::Stopped {
            self.shared.journal.write(&name, "stopped", "it is stopped");
            return;
        }
        if underway.job.goal == Goal::Revived {
            return;
        }
        let digest = reached.image_digest.or_else(|| entry.image_digest.clone());
        if !entry.proven || digest != entry.image_digest {
            self.note_entry(&name, |entry| {
                entry.proven = true;
                entry.image_digest = digest;
            })
            .await;
        }
        self.shared.journal.write(&name, "running", "it runs");
    }

    /// The next version is the present one from now on. The old one's container is in the way, and goes as whatever is.
    async fn updated(&mut self, name: &InstanceName, image_digest: Option<String>) {
        self.note_entry(name, |entry| entry.take_over(image_digest, Timestamp::now())).await;
        self.shared.journal.write(name, "updated", "the new version works and has taken over");
        self.look_again(name, true);
    }

    /// Nothing is left of the next version. The old one is brought back as whatever should run and doesn't.
    async fn reverted(&mut self, name: &InstanceName) {
        self.note_entry(name, |entry| entry.settle_back(Timestamp::now())).await;
        self.shared.journal.write(name, "rolled_back", "the new version was taken back; the old one serves again");
        self.look_again(name, true);
    }

    async fn gone(&mut self, name: InstanceName, entry: &Entry, ticket: u64) {
        self.observed.remove(&name);
        self.tracks.remove(&name);
        let forgotten = name.clone();
        // A request that came in meanwhile finds nothing left either.
        let (settled, written) = match self.shared.change(move |desk| desk.forget(&forgotten)).await {
            Ok((last, written)) => (last.max(ticket), written),
            Err(error) => (ticket, Err(error)),
        };
        self.noted(written);
        let failure = match &entry.intent {
            Intent::Remove(Departure::Undone(failure)) => Some(failure.clone()),
            Intent::Remove(Departure::Asked { .. }) | Intent::Run | Intent::Stop => None,
        };
        self.shared.journal.write(&name, "removed", "nothing is left of it");
        while self.departed.len() >= DEPARTED_KEPT {
            let oldest = self.departed.iter().min_by_key(|(_, departed)| departed.settled);
            let Some(oldest) = oldest.map(|(name, _)| name.clone()) else { break };
            self.departed.remove(&oldest);
        }
        let departed = Departed {
            settled,
            failure,
            account_tool_instance_id: entry.spec.account_tool_instance_id.clone(),
            image: entry.spec.image.to_string(),
        };
        self.departed.insert(name, departed);
    }

    async fn failed(&mut self, name: InstanceName, entry: &Entry, underway: &Underway, failure: Failure) {
        self.shared.journal.write(&name, "failed", failure.message.clone());
        if underway.job.goal == Goal::Running && !entry.proven {
            // Its first deploy: all it made is taken back, and the caller is answered when that is done.
            let undone = name.clone();
            self.note(move |contents| *contents = batch::undo(contents, &undone, failure)).await;
            return self.look_again(&name, true);
        }
        if underway.job.goal == Goal::Updated {
            self.note_entry(&name, |entry| entry.turn_back(failure)).await;
            return self.look_again(&name, true);
        }
        let timing = self.timing;
        if let Some(track) = self.tracks.get_mut(&name) {
            track.settled = underway.ticket;
            let silence = (failure.kind == FailureKind::NotAnswering).then(|| failure.message.clone());
            // An instance that runs isn't failing because something beside it could not be put right.
            track.failure = Some(failure).filter(|_| underway.job.goal != Goal::Tidy);
            track.not_before = Some(Instant::now() + retry_pause(&timing, track.tries));
            track.tries = track.tries.saturating_add(1);
            if underway.job.goal == Goal::Running
                && let Some(reason) = silence.filter(|_| health::is_checked(&entry.spec))
            {
                // It runs: the health check restarts it, and sees when it answers after all.
                track.not_before = None;
                track.supervisor.condemn(reason);
            }
        }
        self.look_again(&name, true);
    }

    /// Writes down what has happened to one instance, if it is still there.
    async fn note_entry(&self, name: &InstanceName, change: impl FnOnce(&mut Entry) + Send + 'static) {
        let name = name.clone();
        self.note(move |contents| {
            if let Some(changed) = with_entry(contents, &name, change) {
                *contents = changed;
            }
        })
        .await;
    }

    /// Writes down what has happened. That it can't be written doesn't make it less true: see [`crate::store::ledger::Ledger::note`].
    pub(super) async fn note(&self, change: impl FnOnce(&mut Contents) + Send + 'static) {
        let result = self
            .shared
            .change(move |desk| {
                let mut contents = desk.contents().clone();
                change(&mut contents);
                desk.note(contents)
            })
            .await
            .and_then(|result| result);
        self.noted(result);
    }

    fn noted(&self, result: Result<(), LedgerError>) {
        match result {
            Ok(()) => self.shared.forget_write_problem(),
            Err(error) => self.shared.note_write_problem(&error),
        }
    }

    /// Tries again to write what could not be written.
    pub(super) async fn save_what_is_not(&self) {
        let unsaved = !self.shared.desk().await.is_saved();
        if unsaved || self.shared.write_problem().is_some() {
            self.note(|_| {}).await;
        }
    }
}

/// What the work has found out of the server's health.
fn take_health(track: &mut Track, spec: &Spec, reached: &Reached) {
    let process = reached.container.as_ref().and_then(|container| health::process(spec, container));
    if let (Some(process), Some(answer)) = (process, &reached.answer) {
        track.supervisor.prove(process, &spec.health_check, answer, Moment::now());
    }
}

/// How long to wait after the failure number `tries`, counted from 0.
pub(super) fn retry_pause(timing: &super::Timing, tries: u32) -> std::time::Duration {
    let doubled = 2_u32.checked_pow(tries.min(16)).and_then(|factor| timing.retry_first.checked_mul(factor));
    doubled.unwrap_or(timing.retry_max).min(timing.retry_max)
}
