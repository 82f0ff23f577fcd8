//! Twenty agents that speak the real wire to the real process, steered with its own command line: a bad release stops at the first of
//! them, a good one reaches all, and the process may be killed at any moment.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dtma_api::environment::EnvironmentEvent;
use dtma_api::{CertificatePin, EnvironmentId, TokenHash};
use dtma_provisioner::environment::{Attempt, DropletId, EnrolledAgent, Environment, RunningDroplet, State, after};
use dtma_provisioner::store::Store as _;
use dtma_provisioner::store::sqlite::SqliteStore;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::rig::{FLEET_KEY, SECRET, heartbeat, spec};
use super::signed::Maker;

const AGENTS: u32 = 20;
const PATIENCE: Duration = Duration::from_secs(90);
/// Between an agent's heartbeats.
const BEAT: Duration = Duration::from_millis(80);

/// What agents do with a version.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It proves itself.
    Good,
    /// It crashes on trial, and the version before comes back.
    Crashes,
    /// The droplet isn't heard any more.
    Silence,
}

/// One agent: what it runs, and what came of every version it was told.
struct Agent {
    bearer: String,
    version: String,
    update: Value,
    trial: Option<(String, Fate)>,
    told: Vec<String>,
    told_at: Option<Timestamp>,
    silent: bool,
}

impl Agent {
    fn new(number: u32) -> Self {
        Self {
            bearer: bearer(number),
            version: "1.0.0".to_owned(),
            update: json!({"phase": "idle"}),
            trial: None,
            told: Vec::new(),
            told_at: None,
            silent: false,
        }
    }

    fn report(&self) -> Value {
        let mut report = heartbeat();
        report["dtma_version"] = json!(self.version);
        report["settings_generation"] = json!(1);
        report["update"] = self.update.clone();
        report
    }

    /// One step on: a trial comes to its end with the beat after the one that reported it.
    fn live(&mut self, directed: Option<&str>, fates: &BTreeMap<&str, Fate>) {
        if let Some((version, fate)) = self.trial.take() {
            let before = self.version.clone();
            let at = Timestamp::now();
            match fate {
                Fate::Good => {
                    self.version = version.clone();
                    let last = json!({"outcome": "updated", "from_version": before, "to_version": version, "at": at});
                    self.update = json!({"phase": "idle", "last": last});
                }
                Fate::Crashes => {
                    let (code, reason) = ("crashed", "it ended 3 times within 10 s: cannot open the ledger");
                    let last = json!({
                        "outcome": "reverted", "from_version": before, "to_version": version, "code": code,
                        "reason": reason, "at": at,
                    });
                    let failed = json!([{"version": version, "code": code, "reason": reason, "at": at}]);
                    self.update = json!({"phase": "idle", "last": last, "failed_versions": failed});
                }
                Fate::Silence => self.silent = true,
            }
        } else if let Some(version) = directed.filter(|version| self.told.last().map(String::as_str) != Some(*version))
        {
            self.told.push(version.to_owned());
            self.told_at = Some(Timestamp::now());
            self.trial = Some((version.to_owned(), fates[version]));
            self.update = json!({"phase": "trial", "target_version": version, "since": Timestamp::now()});
        }
    }
}

fn bearer(number: u32) -> String {
    format!("bearer-of-agent-number-{number}")
}

/// Ended at the latest with the test.
struct Process(Child);

impl Drop for Process {
    /// SIGKILL, and gone when this returns.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Fleet {
    folder: tempfile::TempDir,
    port: u16,
    keys: String,
    http: reqwest::Client,
    agents: Arc<Vec<Mutex<Agent>>>,
    enough: CancellationToken,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.enough.cancel();
    }
}

impl Fleet {
    /// Twenty active environments in the database, their agents reporting, and the releases that agents meet these fates with.
    async fn start(fates: &'static [(&'static str, Fate)]) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().unwrap();
        fill(&folder.path().join("db.sqlite")).await;
        let maker = Maker::new(1, &folder.path().join("releases"));
        maker.publish(&maker.release("1.0.0"));
        for (version, _) in fates {
            maker.release(version);
        }
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build().unwrap();
        let agents: Arc<Vec<Mutex<Agent>>> =
            Arc::new((0..AGENTS).map(|number| Mutex::new(Agent::new(number))).collect());
        let enough = CancellationToken::new();
        let fleet = Self { folder, port, keys: maker.keys().to_string(), http, agents, enough };
        for number in 0..AGENTS as usize {
            tokio::spawn(live(
                fleet.http.clone(),
                fleet.url("/agent/v1/heartbeat"),
                Arc::clone(&fleet.agents),
                number,
                fates.iter().copied().collect(),
                fleet.enough.clone(),
            ));
        }
        fleet
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        let database = format!("sqlite:{}", self.folder.path().join("db.sqlite").display());
        [
            ("LISTEN_ADDRESS", "127.0.0.1"),
            ("PORT", &self.port.to_string()),
            ("PUBLIC_URL", "http://127.0.0.1"),
            ("DATABASE_URL", &database),
            ("INTERNAL_API_SECRET", SECRET),
            ("BACKEND_TO_DTMA_API_KEY", FLEET_KEY),
            // Nobody listens there, so no droplet is looked at.
            ("DO_API_BASE_URL", "http://127.0.0.1:1"),
            ("DO_API_TOKEN", "token"),
            ("RELEASE_KEYS", &self.keys),
            ("HEARTBEAT_INTERVAL_SECONDS", "1"),
            ("UNRESPONSIVE_AFTER_SECONDS", "6"),
        ]
        .map(|(name, value)| (name, value.to_owned()))
        .to_vec()
    }

    async fn serve(&self) -> Process {
        let log = std::fs::File::options().create(true).append(true).open(self.log()).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_dtma-provisioner"))
            .env_clear()
            .envs(self.environment())
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let process = Process(child);
        let healthy = async {
            while self.http.get(self.url("/health")).send().await.is_err() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, healthy).await.expect("it serves");
        process
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// `dtma-provisioner rollout …`, as somebody at a terminal beside the server runs it.
    async fn command(&self, arguments: &[&str]) -> Output {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_dtma-provisioner"));
        command.arg("rollout").args(arguments).env_clear().envs(self.environment()).stdin(Stdio::null());
        command.current_dir(self.folder.path()).kill_on_drop(true);
        timeout(PATIENCE, command.output()).await.expect("the command ends").unwrap()
    }

    async fn status(&self) -> Option<Value> {
        let url = self.url("/internal/rollouts");
        let list: Value = self.internal(url).await?;
        let id = list["data"][0]["id"].as_str()?;
        let one = self.internal(self.url(&format!("/internal/rollouts/{id}"))).await?;
        Some(one["data"].clone())
    }

    async fn internal(&self, url: String) -> Option<Value> {
        self.http.get(url).header("x-internal-api-secret", SECRET).send().await.ok()?.json().await.ok()
    }

    /// Resolves once every agent has reported to the process that serves now.
    async fn all_active(&self) {
        let looking = async {
            loop {
                let page = self.http.get(self.url("/metrics")).header("x-internal-api-secret", SECRET).send().await;
                let page = page.unwrap().text().await.unwrap();
                if page.lines().any(|line| line == format!("dtma_environments{{status=\"active\"}} {AGENTS}")) {
                    return;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, looking).await.expect("all agents report");
    }

    async fn until(&self, what: &str, enough: impl Fn(&Value) -> bool) -> Value {
        let looking = async {
            loop {
                if let Some(status) = self.status().await.filter(&enough) {
                    return status;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        match timeout(PATIENCE, looking).await {
            Ok(status) => status,
            Err(_) => panic!("no {what}: {:#}\n{}", self.status().await.unwrap_or_default(), read(&self.log())),
        }
    }

    /// How many agents run what.
    fn versions(&self) -> BTreeMap<String, usize> {
        let mut versions = BTreeMap::new();
        for agent in self.agents.iter() {
            *versions.entry(agent.lock().unwrap().version.clone()).or_default() += 1;
        }
        versions
    }

    /// Those who were ever told a version.
    fn told(&self, version: &str) -> BTreeSet<usize> {
        let told = |(number, agent): (usize, &Mutex<Agent>)| {
            agent.lock().unwrap().told.iter().any(|told| told == version).then_some(number)
        };
        self.agents.iter().enumerate().filter_map(told).collect()
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn live(
    http: reqwest::Client,
    url: String,
    agents: Arc<Vec<Mutex<Agent>>>,
    number: usize,
    fates: BTreeMap<&'static str, Fate>,
    enough: CancellationToken,
) {
    while !enough.is_cancelled() {
        let (bearer, report) = {
            let agent = agents[number].lock().unwrap();
            if agent.silent {
                return;
            }
            (agent.bearer.clone(), agent.report())
        };
        let answer = http.post(&url).bearer_auth(bearer).json(&report).send().await;
        // Nobody there, or killed before it answered: as in life, the next beat comes all the same.
        if let Ok(answer) = answer
            && answer.status().is_success()
        {
            let directives: Value = answer.json().await.unwrap_or_default();
            agents[number].lock().unwrap().live(directives["desired_version"].as_str(), &fates);
        }
        sleep(BEAT).await;
    }
}

async fn fill(database: &Path) {
    let store = SqliteStore::open(&format!("sqlite:{}", database.display())).await.unwrap();
    let now = Timestamp::now();
    for number in 0..AGENTS {
        let account = format!("account-{number}").parse().unwrap();
        let mut environment = Environment::new(EnvironmentId(Uuid::now_v7()), account, spec(), now);
        let attempt = Attempt {
            id: Uuid::new_v4(),
            number: 1,
            started_at: now,
            run_started_at: now,
            deadline: after(now, Duration::from_secs(900)),
            token_hash: TokenHash::of(&format!("token-{number}")),
            token_expires_at: now,
        };
        let agent = EnrolledAgent {
            pin: CertificatePin::of_spki(&number.to_be_bytes()),
            retry_key_hash: TokenHash::of(&format!("retry-{number}")),
            bearers: vec![TokenHash::of(&bearer(number))],
            version: "1.0.0".to_owned(),
            enrolled_at: now,
        };
        let droplet = RunningDroplet { id: DropletId(i64::from(number) + 1), ip: [192, 0, 2, 1].into() };
        environment.state = State::Active { attempt, droplet, agent, ready_at: now };
        let event =
            EnvironmentEvent { at: now, status: environment.state.status(), phase: None, message: "up".to_owned() };
        store.insert(&environment, &event).await.unwrap();
    }
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_release_halts_at_the_first_of_twenty_agents_and_a_good_one_reaches_all() {
    let fleet = Fleet::start(&[("1.1.0", Fate::Crashes), ("1.2.0", Fate::Good)]).await;
    let _process = fleet.serve().await;
    fleet.all_active().await;
    assert_eq!(text(&fleet.command(&["status"]).await.stdout), "There has been no rollout.\n");
    assert_eq!(fleet.command(&["pause"]).await.status.code(), Some(1));
    let unknown = fleet.command(&["start", "7.0.0"]).await;
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stderr).contains("(release_unknown)"), "{}", text(&unknown.stderr));

    let bad = fleet.command(&["start", "1.1.0", "--soak", "0", "--wait"]).await;
    let (out, err) = (text(&bad.stdout), text(&bad.stderr));
    assert_eq!(bad.status.code(), Some(3), "{out}{err}");
    let reason = "1 of 1 agents of wave 1 reverted: crashed: it ended 3 times within 10 s: cannot open the ledger";
    assert!(out.contains(&format!("Halted: {reason}")), "{out}");
    assert_eq!(fleet.told("1.1.0").len(), 1);
    let status = fleet.command(&["status", "--json"]).await;
    assert_eq!(status.status.code(), Some(3));
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!((status["status"].as_str(), status["reason"].as_str()), (Some("halted"), Some(reason)));
    assert_eq!(status["counts"], json!({"failed": 1, "waiting": 19}));
    assert_eq!(status["agents"].as_array().unwrap().len(), 20);

    let second = fleet.command(&["start", "1.2.0"]).await;
    assert_eq!(second.status.code(), Some(1));
    assert!(text(&second.stderr).contains("(rollout_open)"), "{}", text(&second.stderr));
    assert_eq!(fleet.command(&["abort"]).await.status.code(), Some(0));

    let good = fleet.command(&["start", "1.2.0", "--soak", "0", "--wait"]).await;
    let (out, err) = (text(&good.stdout), text(&good.stderr));
    assert_eq!(good.status.code(), Some(0), "{out}{err}\n{}", read(&fleet.log()));
    for line in
        ["Wave 1 of 4 has begun: 1 agent is asked", "Wave 4 of 4 has begun: 10 agents", "Completed: 20 of 20 agents"]
    {
        assert!(out.contains(line), "{out}");
    }
    assert_eq!(fleet.versions(), BTreeMap::from([("1.2.0".to_owned(), 20)]));
    assert_eq!(fleet.told("1.1.0").len(), 1);
    let ready = fleet.internal(fleet.url("/ready")).await.unwrap();
    assert_eq!(ready["agent_version"], "1.2.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_again_and_again_a_good_release_reaches_all_and_no_wave_begins_too_early() {
    let fleet = Fleet::start(&[("1.1.0", Fate::Good)]).await;
    let mut process = Some(fleet.serve().await);
    fleet.all_active().await;
    let started = fleet.command(&["start", "1.1.0", "--soak", "1"]).await;
    assert_eq!(started.status.code(), Some(0), "{}", text(&started.stderr));
    // Killed whenever something has happened that hadn't before, so before, between and after all of its steps.
    let (mut seen, mut kills) = (Value::Null, 0);
    while seen["status"] != "completed" {
        let so_far =
            |status: &Value| (status["wave"].clone(), status["counts"].clone(), status["settled_at"].is_null());
        let before = so_far(&seen);
        seen = fleet.until("progress", |status| status["status"] != "running" || so_far(status) != before).await;
        assert_ne!(seen["status"], "halted", "{seen:#}");
        drop(process.take());
        kills += 1;
        process = Some(fleet.serve().await);
    }
    // Every wave takes a second at least, and after every kill it is looked at anew.
    assert!(kills > 4, "{kills}");
    assert_eq!(fleet.versions(), BTreeMap::from([("1.1.0".to_owned(), 20)]));
    // Whenever a wave began, no more had been told than the waves before it have agents.
    let told_at: Vec<Timestamp> = fleet.agents.iter().map(|agent| agent.lock().unwrap().told_at.unwrap()).collect();
    for (wave, most) in [(0, 0), (1, 1), (2, 2), (3, 10)] {
        let begun_at: Timestamp = seen["waves"][wave]["begun_at"].as_str().unwrap().parse().unwrap();
        let told = told_at.iter().filter(|at| **at < begun_at).count();
        assert_eq!(told, most, "before wave {}", wave + 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_after_the_first_agent_was_told_it_halts_all_the_same() {
    for fate in [Fate::Crashes, Fate::Silence] {
        let fates: &'static [(&str, Fate)] =
            if fate == Fate::Crashes { &[("1.1.0", Fate::Crashes)] } else { &[("1.1.0", Fate::Silence)] };
        let fleet = Fleet::start(fates).await;
        let process = fleet.serve().await;
        fleet.all_active().await;
        let started = fleet.command(&["start", "1.1.0", "--soak", "0"]).await;
        assert_eq!(started.status.code(), Some(0), "{}", text(&started.stderr));
        let told = async {
            while fleet.told("1.1.0").is_empty() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, told).await.unwrap();
        drop(process);
        let process = fleet.serve().await;
        let halted = fleet.until("halt", |status| status["status"] == "halted").await;
        let what = if fate == Fate::Crashes { "reverted" } else { "fell silent" };
        let reason = halted["reason"].as_str().unwrap().to_owned();
        assert!(reason.starts_with(&format!("1 of 1 agents of wave 1 {what}")), "{reason}");
        // And it stays so.
        drop(process);
        let _process = fleet.serve().await;
        let again = fleet.until("answer", |_| true).await;
        assert_eq!((again["status"].as_str(), again["reason"].as_str()), (Some("halted"), Some(reason.as_str())));
        assert_eq!(fleet.told("1.1.0").len(), 1);
    }
}
