//! The agent's side of an update: it asks, and tells others how things stand. It can't do more, because it isn't root.

use std::io;
use std::path::Path;
use std::time::Duration;

use dtma_api::update::{UpdateOutcome, UpdatePhase, UpdateState};
use dtma_release::Version;
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use tokio::sync::watch;

use super::places::Places;
use super::request::Request;
use crate::store::durable;

/// How often the updater's memory is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// What failed for want of a network or of room is asked for again after this, for as long as the backend wants it.
const AGAIN: SignedDuration = SignedDuration::from_mins(5);
/// What was refused may have been signed anew.
const AGAIN_REFUSED: SignedDuration = SignedDuration::from_mins(30);
/// A larger memory isn't read.
const MAX_BYTES: u64 = 1024 * 1024;

/// Why the updater wasn't asked.
#[derive(Debug, thiserror::Error)]
pub enum NotAsked {
    /// There is none.
    #[error(
        "this agent was not installed with its updater; to update it by hand, unpack a newer release on the droplet and run \
         'sudo bash install.sh': that makes it current and restarts the agent, and tools keep running"
    )]
    NoUpdater,
    /// The request could not be written.
    #[error("the request for an update could not be written; the droplet's disk may be full")]
    NotWritten(#[source] io::Error),
}

/// The agent's way to the updater. Clones share what is known.
#[derive(Debug, Clone)]
pub struct Updates {
    memory_file: std::path::PathBuf,
    request_file: std::path::PathBuf,
    /// Counts what has changed; whoever waits for it reads the state anew.
    changes: watch::Sender<u64>,
}

/// What of the updater's memory is everybody's.
#[derive(Deserialize)]
struct Shown {
    #[serde(default)]
    shown: UpdateState,
}

impl Updates {
    /// The way to the updater of this droplet.
    pub fn new(places: &Places) -> Self {
        Self { memory_file: places.memory_file(), request_file: places.request_file(), changes: watch::Sender::new(0) }
    }

    /// How updates stand; none where there is no updater.
    pub fn state(&self) -> Option<UpdateState> {
        if !self.is_there() {
            return None;
        }
        let mut state = read(&self.memory_file).unwrap_or_default();
        if state.phase == UpdatePhase::Idle && self.request_file.exists() {
            state.phase = UpdatePhase::Requested;
        }
        Some(state)
    }

    /// The updater's folder comes with its installation.
    fn is_there(&self) -> bool {
        self.memory_file.parent().is_some_and(Path::is_dir)
    }

    /// Asks the updater to go to `version`, or to the newest of its channel. On return the request is on the disk.
    ///
    /// # Errors
    /// See [`NotAsked`].
    pub fn ask(&self, version: Option<Version>) -> Result<(), NotAsked> {
        if !self.is_there() {
            return Err(NotAsked::NoUpdater);
        }
        let request = serde_json::to_vec(&Request { version }).map_err(|error| NotAsked::NotWritten(error.into()))?;
        durable::replace(&self.request_file, &request).map_err(NotAsked::NotWritten)
    }

    /// The backend wants `desired` to run here, and says so in every answer. Asks the updater if that is due.
    pub fn want(&self, desired: &str) {
        let Some(state) = self.state() else { return };
        let Ok(version) = Version::parse(desired) else {
            tracing::warn!(desired, "the backend wants a version that is none");
            return;
        };
        if !due(&version, crate::version(), &state, Timestamp::now()) {
            return;
        }
        match self.ask(Some(version)) {
            Ok(()) => tracing::info!(desired, "the updater is asked for another version of the agent"),
            Err(error) => tracing::error!(%error, desired, "the updater could not be asked"),
        }
    }

    /// Changes whenever the updater has done something.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Looks after the updater's memory for as long as it is polled.
    pub async fn watch(self) {
        let mut known = stamp(&self.memory_file);
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = stamp(&self.memory_file);
            if now != known {
                known = now;
                self.changes.send_modify(|count| *count += 1);
            }
        }
    }
}

/// Changes with every writing: each is another file.
fn stamp(path: &Path) -> Option<(u64, Option<std::time::SystemTime>)> {
    use std::os::unix::fs::MetadataExt as _;
    path.metadata().ok().map(|data| (data.ino(), data.modified().ok()))
}

fn read(path: &Path) -> Option<UpdateState> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path).ok()?.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice::<Shown>(&bytes).ok().map(|memory| memory.shown)
}

/// Whether the updater should be asked for `desired` now.
fn due(desired: &Version, running: &str, state: &UpdateState, now: Timestamp) -> bool {
    let text = desired.to_string();
    if text == running || state.failed_versions.iter().any(|failed| failed.version == text) {
        return false;
    }
    if state.phase != UpdatePhase::Idle {
        return false;
    }
    let Some(last) = state.last.as_ref().filter(|last| last.to_version.as_deref() == Some(&text)) else { return true };
    let age = now.duration_since(last.at);
    // The clock was set back.
    if age.is_negative() {
        return true;
    }
    // Reverted and not among the failed versions: interrupted, which is nobody's fault so far.
    age >= if last.outcome == UpdateOutcome::Refused { AGAIN_REFUSED } else { AGAIN }
}

#[cfg(test)]
mod tests {
    use dtma_api::update::{FailedVersion, UpdateResult};

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn ended(outcome: UpdateOutcome) -> UpdateState {
        let last = UpdateResult {
            outcome,
            from_version: "1.0.0".to_owned(),
            to_version: Some("1.1.0".to_owned()),
            code: None,
            reason: None,
            at: at("2026-01-01T00:00:00Z"),
        };
        UpdateState { last: Some(last), ..UpdateState::default() }
    }

    #[test]
    fn the_updater_is_asked_once_and_for_what_failed_never_again() {
        let (desired, now) = (Version::new(1, 1, 0), at("2026-01-01T00:01:00Z"));
        let idle = UpdateState::default();
        assert!(due(&desired, "1.0.0", &idle, now));
        assert!(!due(&desired, "1.1.0", &idle, now));
        for phase in [UpdatePhase::Requested, UpdatePhase::Trial, UpdatePhase::Unknown] {
            assert!(!due(&desired, "1.0.0", &UpdateState { phase, ..UpdateState::default() }, now), "{phase:?}");
        }
        let failed = FailedVersion {
            version: "1.1.0".to_owned(),
            code: "crashed".to_owned(),
            reason: String::new(),
            at: at("2020-01-01T00:00:00Z"),
        };
        let failed = UpdateState { failed_versions: vec![failed], ..UpdateState::default() };
        assert!(!due(&desired, "1.0.0", &failed, now));
        assert!(due(&Version::new(1, 1, 1), "1.0.0", &failed, now));
    }

    #[test]
    fn what_something_else_kept_from_happening_is_asked_for_again_after_a_while() {
        let desired = Version::new(1, 1, 0);
        for (outcome, after) in [(UpdateOutcome::Failed, 5), (UpdateOutcome::Refused, 30), (UpdateOutcome::Reverted, 5)]
        {
            let state = ended(outcome);
            let after = at("2026-01-01T00:00:00Z").saturating_add(SignedDuration::from_mins(after)).unwrap();
            assert!(!due(&desired, "1.0.0", &state, after - SignedDuration::from_secs(1)), "{outcome:?}");
            assert!(due(&desired, "1.0.0", &state, after), "{outcome:?}");
            // Another version is none of its business.
            assert!(due(&Version::new(1, 1, 1), "1.0.0", &state, at("2026-01-01T00:00:01Z")));
        }
    }

    #[test]
    fn a_request_is_on_the_disk_and_shown_until_it_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let places =
            Places { memory: folder.path().join("update"), agent_state: folder.path().to_owned(), ..Places::default() };
        let updates = Updates::new(&places);
        assert!(matches!(updates.ask(None), Err(NotAsked::NoUpdater)));
        assert_eq!(updates.state(), None);
        std::fs::create_dir(&places.memory).unwrap();
        assert_eq!(updates.state().unwrap().phase, UpdatePhase::Idle);
        updates.ask(Some(Version::new(1, 2, 3))).unwrap();
        assert_eq!(updates.state().unwrap().phase, UpdatePhase::Requested);
        let taken = super::super::request::take(&places.request_file()).unwrap();
        assert_eq!(taken, Some(Request { version: Some(Version::new(1, 2, 3)) }));
        assert_eq!(updates.state().unwrap().phase, UpdatePhase::Idle);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_is_told_when_the_updater_has_done_something() {
        let folder = tempfile::tempdir().unwrap();
        let places = Places { memory: folder.path().to_owned(), ..Places::default() };
        let updates = Updates::new(&places);
        let mut changes = updates.changes();
        let watching = tokio::spawn(updates.clone().watch());
        tokio::task::yield_now().await;
        std::fs::write(places.memory_file(), r#"{"shown": {"phase": "trial"}, "of_a_newer_version": 1}"#).unwrap();
        changes.changed().await.unwrap();
        assert_eq!(updates.state().unwrap().phase, UpdatePhase::Trial);
        watching.abort();
    }
}
