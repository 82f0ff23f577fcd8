//! A droplet of files and a made-up systemd, which starts what `current` leads to.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::time::Duration;

use dtma_api::update::UpdatePhase;
use dtma_release::Version;
use jiff::{SignedDuration, Timestamp};

use super::super::super::gate::Unit;
use super::super::super::host::{Host, HostError, Unrunnable};
use super::super::super::memory::Memory;
use super::super::super::places::{Link, Places};
use super::super::super::stage;
use super::super::super::vitals::Vitals;
use super::{BEGAN, TARGET};

/// What a version does once it is started.
#[derive(Debug, Clone, Default)]
pub(super) struct Conduct {
    pub(super) never_ready: bool,
    pub(super) ends_after: Option<u64>,
    pub(super) hangs_after: Option<u64>,
    pub(super) without_docker: bool,
    pub(super) without_heartbeats: bool,
    pub(super) forgets: bool,
    pub(super) fills_disk: bool,
    pub(super) is_ended_after: Option<u64>,
    pub(super) without_units: bool,
}

/// A droplet on which systemd starts what `current` leads to.
pub(super) struct Droplet {
    pub(super) folder: tempfile::TempDir,
    pub(super) places: Places,
    clock: RefCell<Duration>,
    pub(super) agent: RefCell<Agent>,
    conduct: BTreeMap<Version, Conduct>,
    /// What the unit's file was read from.
    loaded: RefCell<Option<Version>>,
    pub(super) starts: RefCell<Vec<Version>>,
    /// systemd doesn't begin to count anew with a restart.
    pub(super) counts_on: bool,
    /// From the first restart on.
    pub(super) docker_goes: bool,
    /// systemd takes no version on trial, perhaps because all of it is going down.
    pub(super) refuses: bool,
    pub(super) goes_down: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Agent {
    pub(super) version: Version,
    pid: u32,
    since: Duration,
    pub(super) restarts: u32,
}

pub(super) fn version(text: &str) -> Version {
    text.parse().unwrap()
}

impl Droplet {
    /// Version 1.0.0 serves.
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let places = Places {
            prefix: root.join("opt"),
            memory: root.join("memory"),
            agent_state: root.join("state"),
            agent_run: root.join("run"),
            ..Places::default()
        };
        for path in [&places.prefix, &places.memory, &places.agent_state, &places.agent_run] {
            std::fs::create_dir(path).unwrap();
        }
        let good = version("1.0.0");
        std::fs::create_dir_all(places.version_folder(&good)).unwrap();
        std::fs::write(places.version_folder(&good).join("dtma-agent"), "1.0.0").unwrap();
        places.point(Link::Current, &good).unwrap();
        places.point(Link::Good, &good).unwrap();
        let droplet = Self {
            folder,
            places,
            clock: RefCell::new(Duration::from_secs(1000)),
            agent: RefCell::new(Agent { version: good.clone(), pid: 100, since: Duration::ZERO, restarts: 0 }),
            conduct: BTreeMap::new(),
            loaded: RefCell::new(Some(good)),
            starts: RefCell::default(),
            counts_on: false,
            docker_goes: false,
            refuses: false,
            goes_down: false,
        };
        droplet.live();
        droplet
    }

    pub(super) fn with(mut self, version_text: &str, conduct: Conduct) -> Self {
        self.conduct.insert(version(version_text), conduct);
        self
    }

    fn conduct(&self, version: &Version) -> Conduct {
        self.conduct.get(version).cloned().unwrap_or_default()
    }

    fn age(&self) -> u64 {
        self.clock.borrow().saturating_sub(self.agent.borrow().since).as_secs()
    }

    /// The agent does what it would have done up to now.
    fn live(&self) -> Unit {
        let conduct = self.conduct(&self.agent.borrow().version);
        if conduct.ends_after.is_some_and(|after| self.age() >= after) {
            let mut agent = self.agent.borrow_mut();
            agent.restarts += 1;
            agent.pid += 1;
            agent.since = *self.clock.borrow();
        }
        if conduct.is_ended_after.is_some_and(|after| self.age() >= after) {
            let last_word = Vitals { pid: self.agent.borrow().pid, ..Vitals::default() };
            last_word.write_last(&self.places).unwrap();
            let mut agent = self.agent.borrow_mut();
            agent.pid += 1;
            agent.since = *self.clock.borrow();
        }
        let agent = self.agent.borrow().clone();
        let (age, hangs) = (self.age(), conduct.hangs_after.unwrap_or(u64::MAX));
        let ready = !conduct.never_ready && age >= 1;
        if ready {
            let names = BTreeSet::from(["one".to_owned(), "two".to_owned()]);
            let found = if conduct.forgets { BTreeSet::from(["one".to_owned()]) } else { names.clone() };
            let until = agent.since.saturating_add(Duration::from_secs(hangs)).min(*self.clock.borrow());
            let written_at = BEGAN.parse::<Timestamp>().unwrap() + SignedDuration::try_from(until).unwrap();
            let vitals = Vitals {
                pid: agent.pid,
                version: agent.version.to_string(),
                written_at,
                port: 30_000,
                docker_reachable: !(conduct.without_docker || self.docker_goes && !self.starts.borrow().is_empty()),
                reports: true,
                heartbeats_taken: u64::from(!conduct.without_heartbeats),
                heartbeats_failing: 0,
                complete: true,
                instances: names,
                found: Some(found),
            };
            vitals.write(&self.places).unwrap();
        }
        Unit { active: ready, failed: false, stopped: false, main_pid: agent.pid, restarts: agent.restarts }
    }

    pub(super) fn memory(&self) -> Memory {
        Memory::load(&self.places, &version("1.0.0")).unwrap()
    }

    pub(super) fn links(&self) -> (String, String) {
        let read = |link| self.places.read(link).unwrap().unwrap().to_string();
        (read(Link::Current), read(Link::Good))
    }

    /// What is in use is what is good, is loaded, and runs.
    pub(super) fn assert_settled(&self, expected: &str) {
        assert_eq!(self.links(), (expected.to_owned(), expected.to_owned()));
        assert_eq!(self.loaded.borrow().as_ref().unwrap().to_string(), expected, "the unit that is loaded");
        assert_eq!(self.agent.borrow().version.to_string(), expected, "the version that runs");
        let memory = self.memory();
        assert_eq!((memory.trial, memory.shown.phase), (None, UpdatePhase::Idle));
    }
}

impl Host for Droplet {
    fn unit(&self) -> Result<Unit, HostError> {
        Ok(self.live())
    }

    fn reload(&self) -> Result<(), HostError> {
        if self.refuses && self.places.read(Link::Current).unwrap() != self.places.read(Link::Good).unwrap() {
            return Err(HostError::refused());
        }
        *self.loaded.borrow_mut() = self.places.read(Link::Current).unwrap();
        Ok(())
    }

    fn restart(&self) -> Result<(), HostError> {
        let last_word = Vitals::read(&self.places.vitals_file());
        last_word.unwrap_or_default().write_last(&self.places).unwrap();
        let started = self.places.read(Link::Current).unwrap().unwrap();
        self.starts.borrow_mut().push(started.clone());
        let pid = self.agent.borrow().pid + 100;
        let since = *self.clock.borrow();
        let restarts = if self.counts_on { self.agent.borrow().restarts } else { 0 };
        self.places.fuse.fill_disk(self.conduct(&started).fills_disk);
        *self.agent.borrow_mut() = Agent { version: started, pid, since, restarts };
        Ok(())
    }

    fn is_going_down(&self) -> bool {
        self.goes_down
    }

    fn missing_units(&self) -> Result<Vec<String>, HostError> {
        let good = self.places.read(Link::Good).unwrap().unwrap();
        Ok(self.conduct(&good).without_units.then(|| "dtma-update.path".to_owned()).into_iter().collect())
    }

    fn renew_guard(&self) -> Result<(), HostError> {
        Ok(())
    }

    fn serving(&self, port: u16) -> bool {
        let conduct = self.conduct(&self.agent.borrow().version);
        port == 30_000 && !conduct.never_ready && conduct.hangs_after.is_none_or(|after| self.age() < after)
    }

    /// Programs here are texts: the version they say they are.
    fn introduce(&self, program: &Path) -> Result<String, Unrunnable> {
        match std::fs::read_to_string(program).unwrap().as_str() {
            "foreign" => Err(Unrunnable::Foreign("machine 183".to_owned())),
            "broken" => Err(Unrunnable::Broken("it ended with 1".to_owned())),
            version => Ok(stage::introduction(version, TARGET)),
        }
    }

    fn last_words(&self) -> String {
        "the last words".to_owned()
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        Ok(1 << 30)
    }

    fn now(&self) -> Timestamp {
        BEGAN.parse::<Timestamp>().unwrap() + SignedDuration::try_from(*self.clock.borrow()).unwrap()
    }

    fn elapsed(&self) -> Duration {
        *self.clock.borrow()
    }

    fn pause(&self, time: Duration) {
        *self.clock.borrow_mut() += time;
    }
}
