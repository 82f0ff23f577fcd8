//! Whether a new version has proved itself. Pure: looks go in with the time since the restart, a verdict comes out.

use std::collections::BTreeSet;
use std::time::Duration;

use dtma_release::Version;
use jiff::Timestamp;

use super::vitals::Vitals;

/// How much time a version gets.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// To show everything that is asked of it for the first time.
    pub ready: Duration,
    /// How long it must have been well from then on.
    pub soak: Duration,
    /// How long something may then be missing that comes and goes by itself: Docker restarts.
    pub grace: Duration,
    /// Vitals that are older are no sign of life.
    pub stale: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            ready: Duration::from_secs(45),
            // More than a minute: what leaks or times out often ends after one.
            soak: Duration::from_secs(90),
            grace: Duration::from_secs(20),
            stale: Duration::from_secs(10),
        }
    }
}

/// How things were before: nothing is asked of a new version that the old one could not do, either.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Baseline {
    /// Docker answered.
    pub docker: bool,
    /// The backend took its heartbeats.
    pub heartbeats: bool,
    /// The instances it looked after when it ended in order; none as long as nobody knows.
    pub instances: Option<BTreeSet<String>>,
}

impl Baseline {
    /// From what the old agent said while it served.
    pub(super) fn of(vitals: Option<&Vitals>) -> Self {
        vitals.map_or_else(Self::default, |vitals| Self {
            docker: vitals.docker_reachable,
            heartbeats: vitals.reports && vitals.heartbeats_taken > 0 && vitals.heartbeats_failing == 0,
            instances: None,
        })
    }
}

/// The agent's unit as systemd has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Unit {
    /// `active`: it has said that it is ready.
    pub active: bool,
    /// `failed`: nobody starts it again.
    pub failed: bool,
    /// `inactive`: somebody has stopped it.
    pub stopped: bool,
    /// Its process; 0 when there is none.
    pub main_pid: u32,
    /// How often systemd had to start it again.
    pub restarts: u32,
}

/// One look at the agent.
#[derive(Debug, Clone)]
pub(super) struct Look {
    /// As systemd has it.
    pub unit: Unit,
    /// What it says itself.
    pub vitals: Option<Vitals>,
    /// Whether its port answers.
    pub serving: bool,
}

/// The word for a trial that came to no end: nobody's fault until it has happened a few times.
pub(super) const INTERRUPTED: &str = "interrupted";

/// Why a version hasn't proved itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shortcoming {
    /// A stable word.
    pub code: &'static str,
    /// A sentence.
    pub what: String,
}

/// What comes of a look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Look again.
    Wait,
    /// It has proved itself.
    Passed,
    /// It never will.
    Failed(Shortcoming),
}

/// The judge of one trial.
#[derive(Debug)]
pub(super) struct Gate {
    version: String,
    baseline: Baseline,
    patience: Patience,
    /// The old agent's process, which may still be ending.
    before: u32,
    pid: Option<u32>,
    /// systemd's count when it was lowest: it isn't always begun anew with a restart.
    restarts: Option<u32>,
    /// What the process on trial wrote last, and when that was first seen. By no clock that can be set.
    written: Option<(Timestamp, Duration)>,
    well_since: Option<Duration>,
    /// Since when something is missing that was there before.
    ill_since: Option<Duration>,
    /// The process on trial ended in order: somebody wanted it to.
    was_ended: bool,
}

impl Gate {
    /// A judge of `version`; `before` is the process it takes over from.
    pub(super) fn new(version: &Version, baseline: Baseline, before: u32, patience: Patience) -> Self {
        Self {
            version: version.to_string(),
            baseline,
            patience,
            before,
            pid: None,
            restarts: None,
            written: None,
            well_since: None,
            ill_since: None,
            was_ended: false,
        }
    }

    /// An agent's last word: the old one's says what callers have asked of it up to its end, the new one's that somebody ended it.
    pub(super) fn hear(&mut self, last_word: Option<Vitals>) {
        let Some(vitals) = last_word else { return };
        self.was_ended |= self.pid == Some(vitals.pid);
        if vitals.complete && vitals.pid == self.before {
            self.baseline.instances = Some(vitals.instances);
        }
    }

    /// Takes a look into account, made `elapsed` after the restart.
    pub(super) fn judge(&mut self, elapsed: Duration, look: &Look) -> Verdict {
        if let Some(shortcoming) = self.has_ended(&look.unit).or_else(|| self.has_lost_tools(look)) {
            return Verdict::Failed(shortcoming);
        }
        let missing = self.missing(elapsed, look);
        let Some(well_since) = self.well_since else {
            return match missing {
                None => {
                    self.well_since = Some(elapsed);
                    Verdict::Wait
                }
                Some(missing) if elapsed >= self.patience.ready => Verdict::Failed(missing),
                Some(_) => Verdict::Wait,
            };
        };
        let Some(missing) = missing else {
            self.ill_since = None;
            return if elapsed < well_since + self.patience.soak { Verdict::Wait } else { Verdict::Passed };
        };
        let ill_since = *self.ill_since.get_or_insert(elapsed);
        // One that hangs has had its time; systemd's watchdog would take longer to say so.
        let grace = if missing.code == "silent" { Duration::ZERO } else { self.patience.grace };
        if elapsed >= ill_since + grace { Verdict::Failed(missing) } else { Verdict::Wait }
    }

    fn has_ended(&mut self, unit: &Unit) -> Option<Shortcoming> {
        let crashed = |what: String| Some(Shortcoming { code: "crashed", what });
        if unit.main_pid == self.before && unit.main_pid != 0 {
            return None;
        }
        if self.was_ended {
            return Some(Shortcoming { code: INTERRUPTED, what: "somebody ended it while it was on trial".to_owned() });
        }
        let lowest = self.restarts.map_or(unit.restarts, |lowest| lowest.min(unit.restarts));
        self.restarts = Some(lowest);
        if unit.restarts > lowest {
            return crashed("it ended by itself and had to be started again".to_owned());
        }
        match (self.pid, unit.main_pid) {
            // Whether it starts at all is seen when its time is up: until then what systemd says may be of the one before.
            (None, 0) => None,
            (None, pid) => {
                self.pid = Some(pid);
                None
            }
            (Some(_), _) if unit.failed => crashed("it ended, and isn't started again".to_owned()),
            (Some(first), now) if first == now => None,
            (Some(_), _) => crashed("its process ended".to_owned()),
        }
    }

    fn has_lost_tools(&self, look: &Look) -> Option<Shortcoming> {
        let found = own_words(self.pid, look)?.found.as_ref()?;
        let before = self.baseline.instances.as_ref()?;
        let lost: Vec<_> = before.difference(found).map(String::as_str).collect();
        (!lost.is_empty())
            .then(|| Shortcoming { code: "tools_lost", what: format!("it no longer knows of {}", lost.join(", ")) })
    }

    /// The first thing asked of it that it doesn't show now.
    fn missing(&mut self, elapsed: Duration, look: &Look) -> Option<Shortcoming> {
        let lacks = |code, what: String| Some(Shortcoming { code, what });
        if !look.unit.active {
            return lacks("not_ready", "it has not said that it is ready".to_owned());
        }
        let Some(vitals) = own_words(self.pid, look) else {
            return lacks("silent", "it gives no sign of life".to_owned());
        };
        let written = self.written.filter(|(written_at, _)| *written_at == vitals.written_at);
        let (written_at, seen_at) = written.unwrap_or((vitals.written_at, elapsed));
        self.written = Some((written_at, seen_at));
        let age = elapsed.saturating_sub(seen_at);
        if age > self.patience.stale {
            return lacks("silent", format!("its last sign of life is {} s old", age.as_secs()));
        }
        if vitals.version != self.version {
            return lacks("other_program", format!("what runs is version {}", vitals.version));
        }
        if !look.serving {
            return lacks("not_serving", format!("its port {} does not answer", vitals.port));
        }
        if self.baseline.docker && !vitals.docker_reachable {
            return lacks("no_docker", "it does not reach the Docker Engine, which the version before did".to_owned());
        }
        if !vitals.complete {
            return lacks("no_instances", "it does not know yet which instances there are".to_owned());
        }
        if self.baseline.heartbeats && vitals.heartbeats_taken == 0 {
            return lacks(
                "no_heartbeat",
                "none of its heartbeats was taken, while those of the version before were".to_owned(),
            );
        }
        None
    }
}

/// What it says of itself, if it is this very process that says it.
fn own_words(pid: Option<u32>, look: &Look) -> Option<&Vitals> {
    look.vitals.as_ref().filter(|vitals| Some(vitals.pid) == pid && vitals.pid != 0)
}
