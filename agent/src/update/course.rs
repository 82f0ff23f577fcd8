//! The course of an update: recover, look, fetch, check, put on trial, judge, keep or undo. Holds together whatever dies when.
//!
//! What is on the disk at each step, and what [`Course::recover`] makes of it:
//!
//! | links | memory | the process died | recovery |
//! |---|---|---|---|
//! | `current` = `good` | no trial | before a trial, or after all of it | nothing |
//! | `current` = `good` | trial of another version | before the switch, or within undoing it | the agent is started anew, as `good` |
//! | `current` ≠ `good` | whatever | within a trial | undo |
//! | `current` = `good` | trial of this version | right after it was kept | the books are finished |

use std::io;
use std::time::Duration;

use dtma_api::update::{UpdateOutcome, UpdatePhase, UpdateResult};
use dtma_release::{Channel, Envelope, KeysError, Manifest, PublicKeys, Refusal, Standing, Version};

use super::gate::{Baseline, Gate, INTERRUPTED, Look, Patience, Shortcoming, Verdict};
use super::host::{Host, HostError};
use super::memory::{Memory, Trial, result};
use super::places::{Link, Places, remove_if_there};
use super::source::{FetchError, Source, Wanted};
use super::stage::{self, StageError};
use super::vitals::Vitals;
use crate::causes::in_one_line as chain;

/// How often the agent is looked at while it is on trial.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long the old version may take to serve again before it is reported that it doesn't.
const RETURN: Duration = Duration::from_secs(60);
/// A version whose trials nobody finished so many times isn't tried again.
const MOST_UNJUDGED: u32 = 3;
/// An archive takes so many times its length while it is unpacked, and some.
const ROOM_FACTOR: u64 = 6;

/// Everything an update needs. Whoever has one has the lock.
pub(super) struct Course<'a> {
    /// Where everything is.
    pub places: &'a Places,
    /// Where releases come from.
    pub source: &'a dyn Source,
    /// The droplet.
    pub host: &'a dyn Host,
    /// The keys this build trusts.
    pub keys: &'a Result<PublicKeys, KeysError>,
    /// The builds this machine takes.
    pub target: &'a str,
    /// Whose releases are taken when no version is named.
    pub channel: Channel,
    /// How much time a trial takes.
    pub patience: Patience,
}

/// The droplet isn't as the updater left it, or its disk fails. Nothing is known to have changed; the next run recovers.
#[derive(Debug, thiserror::Error)]
pub(super) enum CourseError {
    /// There is no version in use.
    #[error("no version of the agent is installed under {0}; run install.sh of a release")]
    NotInstalled(std::path::PathBuf),
    /// The disk.
    #[error("the updater can't read or write its files")]
    Disk(#[from] io::Error),
}

/// Why an update ended before its trial.
struct Stop {
    outcome: UpdateOutcome,
    code: String,
    reason: String,
    version: Option<Version>,
}

impl Stop {
    fn refused(refusal: &Refusal, version: Option<&Version>) -> Self {
        Self {
            outcome: UpdateOutcome::Refused,
            code: refusal.code().to_owned(),
            reason: chain(refusal),
            version: version.cloned(),
        }
    }

    fn failed(code: &str, error: &(dyn std::error::Error + 'static), version: Option<&Version>) -> Self {
        Self { outcome: UpdateOutcome::Failed, code: code.to_owned(), reason: chain(error), version: version.cloned() }
    }
}

impl Course<'_> {
    /// The version that is in use, or would be if no trial were under way.
    pub(super) fn good(&self) -> Result<Version, CourseError> {
        self.places.read(Link::Good)?.ok_or_else(|| CourseError::NotInstalled(self.places.prefix.clone()))
    }

    /// Ends whatever another run has left half done. Answers what it did, where that was an undoing.
    pub(super) fn recover(&self) -> Result<Option<UpdateResult>, CourseError> {
        let good = self.good()?;
        let current = self.places.read(Link::Current)?;
        let memory = Memory::load(self.places, &good);
        if current.as_ref() != Some(&good) {
            tracing::error!(?current, %good, "a trial was left without a judge; it is undone");
            // Whatever the disk says of the memory.
            let mut memory = match memory {
                Ok(memory) => memory,
                Err(error) => {
                    self.put_back(&good)?;
                    return Err(error.into());
                }
            };
            let version = current.or_else(|| memory.trial.as_ref().map(|trial| trial.version.clone()));
            let ended = match memory.verdict_being_carried_out() {
                Some(ended) => ended,
                None => {
                    let why = "its trial was interrupted: the updater ended or the droplet went down";
                    result(UpdateOutcome::Reverted, &good, version.as_ref(), Some((INTERRUPTED, why)), self.host.now())
                }
            };
            self.revert(&mut memory, &good, ended.clone())?;
            self.close(&mut memory)?;
            return Ok(Some(ended));
        }
        let mut memory = memory?;
        match memory.trial.clone() {
            Some(trial) if trial.version == good => {
                tracing::info!(version = %good, "the books of an update that was kept are finished");
                self.book(&mut memory, &trial)?;
                self.settle_in();
            }
            Some(trial) => {
                tracing::warn!(version = %trial.version, %good, "the undoing of a trial is finished");
                self.reload_and_restart();
                self.close(&mut memory)?;
            }
            None if memory.shown.phase != UpdatePhase::Idle => self.close(&mut memory)?,
            None => {}
        }
        Ok(None)
    }

    /// Looks for a release, and changes nothing. Answers the version in use as well.
    pub(super) fn check(&self, wanted: &Wanted) -> Result<(Version, Manifest, Standing), CheckError> {
        let manifest =
            self.manifest(wanted).map_err(|stop| CheckError::Stopped { code: stop.code, reason: stop.reason })?;
        let good = self.good().map_err(CheckError::Course)?;
        let memory = Memory::load(self.places, &good).map_err(|error| CheckError::Course(error.into()))?;
        let refused =
            |refusal: Refusal| CheckError::Stopped { code: refusal.code().to_owned(), reason: chain(&refusal) };
        let standing = manifest.standing(&good, memory.accepted.as_ref()).map_err(refused)?;
        manifest.installable(self.target, self.host.now()).map_err(refused)?;
        Ok((good, manifest, standing))
    }

    /// Goes to a release. `again`: even to one that has failed here. Answers how it ended, which is also remembered.
    pub(super) fn apply(&self, wanted: &Wanted, again: bool) -> Result<UpdateResult, CourseError> {
        let good = self.good()?;
        let mut memory = Memory::load(self.places, &good)?;
        let ended = match self.prepare(&mut memory, &good, wanted, again)? {
            Ok(trial) => self.try_out(&mut memory, trial)?,
            Err(stop) => {
                let why =
                    (stop.outcome != UpdateOutcome::UpToDate).then_some((stop.code.as_str(), stop.reason.as_str()));
                let ended = result(stop.outcome, &good, stop.version.as_ref(), why, self.host.now());
                memory.ended(ended.clone());
                memory.save(self.places)?;
                ended
            }
        };
        self.tidy();
        Ok(ended)
    }

    /// Goes back to the version before, which has proved itself once and has to do it again. The one in use isn't gone to again by itself.
    pub(super) fn roll_back(&self) -> Result<UpdateResult, CourseError> {
        let good = self.good()?;
        let mut memory = Memory::load(self.places, &good)?;
        let previous = self
            .places
            .read(Link::Previous)?
            .filter(|previous| *previous != good && self.places.version_folder(previous).join("dtma-agent").exists());
        let ended = match previous {
            Some(version) => self.try_out(&mut memory, Trial { version, from: good, sha256: None, rollback: true })?,
            None => {
                let why = Some(("nothing_before", "there is no version before this one on the droplet"));
                let ended = result(UpdateOutcome::Failed, &good, None, why, self.host.now());
                memory.ended(ended.clone());
                memory.save(self.places)?;
                ended
            }
        };
        self.tidy();
        Ok(ended)
    }

    /// What was asked for can't even be begun, for want of settings. Remembered as any other end.
    pub(super) fn fail(
        &self,
        code: &str,
        why: &(dyn std::error::Error + 'static),
    ) -> Result<UpdateResult, CourseError> {
        let good = self.good()?;
        let mut memory = Memory::load(self.places, &good)?;
        let ended = result(UpdateOutcome::Failed, &good, None, Some((code, &chain(why))), self.host.now());
        memory.ended(ended.clone());
        memory.save(self.places)?;
        Ok(ended)
    }

    /// What is left over costs room and nothing else.
    fn tidy(&self) {
        self.places.tidy().unwrap_or_else(|error| tracing::warn!(%error, "versions nobody needs could not be removed"));
    }

    /// Fetches and checks; nothing in use changes. `Err` in the inner result: there is nothing to try.
    fn prepare(
        &self,
        memory: &mut Memory,
        good: &Version,
        wanted: &Wanted,
        again: bool,
    ) -> Result<Result<Trial, Stop>, CourseError> {
        let named = if let Wanted::Version(version) = wanted { Some(version) } else { None };
        memory.enter(UpdatePhase::Checking, named, self.host.now());
        memory.save(self.places)?;
        let manifest = match self.manifest(wanted) {
            Ok(manifest) => manifest,
            Err(stop) => return Ok(Err(stop)),
        };
        let version = &manifest.version;
        let artifact = match self.eligible(memory, good, &manifest, again) {
            Ok(artifact) => artifact,
            Err(stop) => return Ok(Err(stop)),
        };

        memory.enter(UpdatePhase::Downloading, Some(version), self.host.now());
        memory.save(self.places)?;
        let staging = self.places.clear_staging()?;
        if let Some(stop) = self.no_room(artifact.size, version)? {
            return Ok(Err(stop));
        }
        let path = staging.join(&artifact.file);
        if let Err(error) = self.source.archive(&manifest, &artifact, &path) {
            return Ok(Err(Stop::failed(fetch_code(&error), &error, Some(version))));
        }

        memory.enter(UpdatePhase::Installing, Some(version), self.host.now());
        memory.save(self.places)?;
        let Ok(keys) = self.keys else { return Ok(Err(self.no_keys())) };
        let unpacked = match stage::unpack(&path, &manifest, &artifact, keys, self.host) {
            Ok(unpacked) => unpacked,
            Err(error) => return Ok(Err(self.unusable(memory, &manifest, &error))),
        };
        if again {
            memory.forgive(version, artifact.sha256);
        }
        memory.taken(manifest.issued_at, good);
        self.places.adopt(&unpacked, version)?;
        Ok(Ok(Trial { version: version.clone(), from: good.clone(), sha256: Some(artifact.sha256), rollback: false }))
    }

    fn no_keys(&self) -> Stop {
        let error = match self.keys {
            Ok(_) => KeysError::None,
            Err(error) => error.clone(),
        };
        Stop::refused(&Refusal::NoKeys(error), None)
    }

    fn manifest(&self, wanted: &Wanted) -> Result<Manifest, Stop> {
        // Nothing is asked for that could not be checked.
        let Ok(keys) = self.keys else { return Err(self.no_keys()) };
        let named = if let Wanted::Version(version) = wanted { Some(version) } else { None };
        let bytes = self.source.manifest(wanted).map_err(|error| Stop::failed(fetch_code(&error), &error, named))?;
        let manifest = Envelope::open(&bytes, keys).map_err(|refusal| Stop::refused(&refusal, named))?;
        let other = match wanted {
            Wanted::Version(version) if manifest.version != *version => {
                Some(Refusal::OtherVersion { wanted: version.clone(), found: manifest.version.clone() })
            }
            Wanted::Newest(channel) if manifest.channel != *channel => {
                Some(Refusal::OtherChannel { wanted: *channel, found: manifest.channel })
            }
            _ => None,
        };
        other.map_or(Ok(manifest), |refusal| Err(Stop::refused(&refusal, named)))
    }

    fn eligible(
        &self,
        memory: &Memory,
        good: &Version,
        manifest: &Manifest,
        again: bool,
    ) -> Result<dtma_release::Artifact, Stop> {
        let version = &manifest.version;
        let refused = |refusal: Refusal| Stop::refused(&refusal, Some(version));
        let same = good.cmp_precedence(version).is_eq();
        match manifest.standing(good, memory.accepted.as_ref()).map_err(refused)? {
            Standing::Newer => {}
            // A person may want back what a person went back from.
            Standing::HasBeenTaken if again && !same => {}
            Standing::HasBeenTaken => {
                let (code, reason) = ("up_to_date".to_owned(), "this version is, or has been, in use".to_owned());
                return Err(Stop { outcome: UpdateOutcome::UpToDate, code, reason, version: Some(version.clone()) });
            }
        }
        let artifact = manifest.installable(self.target, self.host.now()).map_err(refused)?;
        let refuse = |code: &str, reason: String| Stop {
            outcome: UpdateOutcome::Refused,
            code: code.to_owned(),
            reason,
            version: Some(version.clone()),
        };
        if let Some(failure) = memory.failure_of(version, artifact.sha256).filter(|_| !again) {
            let reason = format!(
                "it has failed on this droplet before ({failure}); to try it all the same: dtma-agent update --apply {version} --again"
            );
            return Err(refuse("failed_before", reason));
        }
        let unjudged = memory.unjudged.get(&artifact.sha256.to_string()).copied().unwrap_or_default();
        if unjudged >= MOST_UNJUDGED && !again {
            let reason = format!(
                "its trial was interrupted {unjudged} times; to try it all the same: dtma-agent update --apply {version} --again"
            );
            return Err(refuse("interrupted", reason));
        }
        Ok(artifact.clone())
    }

    fn no_room(&self, size: u64, version: &Version) -> Result<Option<Stop>, CourseError> {
        let (free, needed) = (self.host.free_bytes(&self.places.prefix)?, size.saturating_mul(ROOM_FACTOR));
        Ok((free < needed).then(|| Stop {
            outcome: UpdateOutcome::Failed,
            code: "no_space".to_owned(),
            reason: format!("{free} bytes are free for it, {needed} are needed"),
            version: Some(version.clone()),
        }))
    }

    /// Why what was fetched can't be used. What can't be right in itself isn't fetched again; a bad copy may be a good one tomorrow.
    fn unusable(&self, memory: &mut Memory, manifest: &Manifest, error: &StageError) -> Stop {
        let (code, final_) = error.code();
        let reason = chain(error);
        let copy_only = matches!(error, StageError::Length { .. } | StageError::Digest { .. });
        if final_ && !copy_only {
            let digest = manifest.artifacts.iter().find(|artifact| artifact.target == self.target).map(|it| it.sha256);
            memory.blame(&manifest.version, digest, code, &reason, self.host.now());
        }
        let outcome = if final_ { UpdateOutcome::Refused } else { UpdateOutcome::Failed };
        Stop { outcome, code: code.to_owned(), reason, version: Some(manifest.version.clone()) }
    }

    /// Puts a version that lies in its place on trial, and keeps it or undoes it.
    fn try_out(&self, memory: &mut Memory, trial: Trial) -> Result<UpdateResult, CourseError> {
        let unit = self.host.unit();
        if unit.as_ref().is_ok_and(|unit| unit.stopped) {
            let why =
                Some(("not_running", "the agent is stopped, so a new version could not prove itself; start it first"));
            let ended = result(UpdateOutcome::Failed, &trial.from, Some(&trial.version), why, self.host.now());
            memory.ended(ended.clone());
            memory.save(self.places)?;
            return Ok(ended);
        }
        let before = unit.map_or(0, |unit| unit.main_pid);
        let baseline = Baseline::of(self.vitals().filter(|vitals| vitals.pid == before).as_ref());
        if let Some(digest) = trial.sha256 {
            *memory.unjudged.entry(digest.to_string()).or_default() += 1;
        }
        memory.trial = Some(trial.clone());
        memory.enter(UpdatePhase::Trial, Some(&trial.version), self.host.now());
        memory.save(self.places)?;
        remove_if_there(&self.places.last_word_file())?;
        tracing::info!(version = %trial.version, from = %trial.from, ?baseline, "put on trial");
        self.places.point(Link::Current, &trial.version)?;

        let verdict = match self.host.reload().and_then(|()| self.host.restart()) {
            Ok(()) => self.watch(Gate::new(&trial.version, baseline, before, self.patience)),
            Err(error) => {
                let code = if self.host.is_going_down() { INTERRUPTED } else { "systemd" };
                Some(Shortcoming { code, what: chain(&error) })
            }
        };
        match verdict {
            None => {
                tracing::info!(version = %trial.version, "it has proved itself");
                self.places.point(Link::Good, &trial.version)?;
                self.settle_in();
                match self.host.missing_units() {
                    Ok(missing) if missing.is_empty() => self.book(memory, &trial),
                    // A version without an updater would be the last one.
                    missing => {
                        self.places.point(Link::Good, &trial.from)?;
                        let what = match missing {
                            Ok(units) => format!("systemd can't load its {}", units.join(", ")),
                            Err(error) => chain(&error),
                        };
                        self.give_up(memory, &trial, Shortcoming { code: "bad_units", what })
                    }
                }
            }
            Some(mut shortcoming) => {
                let last_words = self.host.last_words();
                if !last_words.is_empty() {
                    shortcoming.what = format!("{}; the agent's last lines: {last_words}", shortcoming.what);
                }
                self.give_up(memory, &trial, shortcoming)
            }
        }
    }

    /// Undoes a trial whose version hasn't proved itself.
    fn give_up(&self, memory: &mut Memory, trial: &Trial, why: Shortcoming) -> Result<UpdateResult, CourseError> {
        let Shortcoming { code, what } = why;
        tracing::error!(version = %trial.version, code, what, "it has not proved itself");
        let now = self.host.now();
        let ended = |code: &str, what: &str| {
            result(UpdateOutcome::Reverted, &trial.from, Some(&trial.version), Some((code, what)), now)
        };
        // What a version couldn't do for others' sake the one before can't do now, either.
        let circumstance = matches!(code, "no_docker" | "no_heartbeat");
        // Going back by hand to what then doesn't work is nobody's release.
        let blamed = code != INTERRUPTED && !trial.rollback;
        if blamed && !circumstance {
            memory.blame(&trial.version, trial.sha256, code, &what, now);
        }
        self.revert(memory, &trial.from, ended(code, &what))?;
        let can = self.wait_for_return(code);
        let ended = if circumstance && !can {
            let what = format!("{what}; but nor can the version before, now");
            ended(INTERRUPTED, &what)
        } else {
            if blamed && circumstance {
                memory.blame(&trial.version, trial.sha256, code, &what, now);
            }
            ended(code, &what)
        };
        memory.shown.last = Some(ended.clone());
        self.close(memory)?;
        Ok(ended)
    }

    /// systemd takes over what comes with the good version besides the agent.
    fn settle_in(&self) {
        for done in [self.host.reload(), self.host.renew_guard()] {
            done.unwrap_or_else(|error| tracing::warn!(error = chain(&error), "the update is kept all the same"));
        }
    }

    /// Looks at the agent until there is a verdict; none when it has proved itself.
    fn watch(&self, mut gate: Gate) -> Option<Shortcoming> {
        let began = self.host.elapsed();
        loop {
            match self.host.unit() {
                Ok(unit) => {
                    gate.hear(Vitals::read(&self.places.last_word_file()));
                    let vitals = self.vitals();
                    let serving = vitals.as_ref().is_some_and(|vitals| self.host.serving(vitals.port));
                    let look = Look { unit, vitals, serving };
                    match gate.judge(self.host.elapsed().saturating_sub(began), &look) {
                        Verdict::Wait => {}
                        Verdict::Passed => return None,
                        Verdict::Failed(shortcoming) => return Some(shortcoming),
                    }
                }
                // That systemd doesn't answer is no version's doing.
                Err(error) => return Some(Shortcoming { code: INTERRUPTED, what: chain(&error) }),
            }
            self.host.pause(LOOK_EVERY);
        }
    }

    /// The books of a version that was kept.
    fn book(&self, memory: &mut Memory, trial: &Trial) -> Result<UpdateResult, CourseError> {
        self.places.point(Link::Previous, &trial.from)?;
        let now = self.host.now();
        let outcome = if trial.rollback { UpdateOutcome::RolledBack } else { UpdateOutcome::Updated };
        let ended = result(outcome, &trial.from, Some(&trial.version), None, now);
        if trial.rollback {
            memory.blame(&trial.from, None, "rolled_back", "a person went back from it", now);
            memory.proved(&trial.from);
        } else {
            memory.proved(&trial.version);
        }
        if let Some(digest) = trial.sha256 {
            memory.unjudged.remove(&digest.to_string());
        }
        let kept = trial.version.to_string();
        memory.shown.failed_versions.retain(|failed| failed.version != kept);
        memory.trial = None;
        memory.shown.previous_version = Some(trial.from.to_string());
        memory.ended(ended.clone());
        memory.save(self.places)?;
        Ok(ended)
    }

    /// Puts the good version back into use and has it started. First of all it is written down why, so that the agent that comes back
    /// can report it, and so that nobody tries it again whatever happens next.
    fn revert(&self, memory: &mut Memory, good: &Version, ended: UpdateResult) -> Result<(), CourseError> {
        let tried = ended.to_version.as_deref().and_then(|version| Version::parse(version).ok());
        memory.enter(UpdatePhase::Reverting, tried.as_ref(), ended.at);
        memory.shown.last = Some(ended);
        // On a full disk a link can still be changed, and that is what counts.
        let saved = memory.save(self.places);
        self.put_back(good)?;
        Ok(saved?)
    }

    fn put_back(&self, good: &Version) -> Result<(), CourseError> {
        self.places.point(Link::Current, good)?;
        self.reload_and_restart();
        Ok(())
    }

    fn reload_and_restart(&self) {
        // Each is tried whatever became of the other: an old unit is better than no agent.
        let report = |error: HostError| tracing::error!(error = chain(&error), "while the good version was put back");
        self.host.reload().unwrap_or_else(report);
        self.host.restart().unwrap_or_else(report);
    }

    /// Until the version that came back serves, and does what the other one was wanting in; for a while. Whether it does.
    fn wait_for_return(&self, code: &str) -> bool {
        let deadline = self.host.elapsed() + RETURN;
        while self.host.elapsed() < deadline {
            let unit = self.host.unit().unwrap_or_default();
            let does = |vitals: &Vitals| match code {
                "no_docker" => vitals.docker_reachable,
                "no_heartbeat" => vitals.heartbeats_taken > 0,
                _ => true,
            };
            let serves =
                |vitals: &Vitals| vitals.pid == unit.main_pid && self.host.serving(vitals.port) && does(vitals);
            if unit.active && self.vitals().as_ref().is_some_and(serves) {
                return true;
            }
            self.host.pause(LOOK_EVERY);
        }
        tracing::error!("THE VERSION THAT CAME BACK IS NOT WELL YET; systemd goes on starting it");
        false
    }

    /// Nothing is under way any more.
    fn close(&self, memory: &mut Memory) -> Result<(), CourseError> {
        memory.trial = None;
        memory.enter(UpdatePhase::Idle, None, self.host.now());
        Ok(memory.save(self.places)?)
    }

    fn vitals(&self) -> Option<Vitals> {
        Vitals::read(&self.places.vitals_file())
    }
}

/// Why nothing is known about a release.
#[derive(Debug, thiserror::Error)]
pub(super) enum CheckError {
    /// The droplet.
    #[error(transparent)]
    Course(CourseError),
    /// The release, or where it should come from.
    #[error("{reason} ({code})")]
    Stopped {
        /// A stable word.
        code: String,
        /// A sentence.
        reason: String,
    },
}

fn fetch_code(error: &FetchError) -> &'static str {
    match error {
        FetchError::Nowhere => "no_releases_url",
        FetchError::Fetch { source: self_update::Error::Io(error), .. }
            if error.kind() == io::ErrorKind::StorageFull =>
        {
            "no_space"
        }
        FetchError::Fetch { .. } => "not_fetched",
        FetchError::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => "no_space",
        FetchError::Write { .. } => "disk",
    }
}

#[cfg(test)]
mod tests;
