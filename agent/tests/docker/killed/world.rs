//! One agent's world: the real program on the real Docker Engine, between them a relay, and a comparison of what the agent promised
//! with what Docker holds.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::host::{Host, docker, docker_may_fail, free_port};
use crate::relay::{Relay, ask_docker};

/// How long an agent may take to have everything in order again after its start.
const RECOVERY: Duration = Duration::from_secs(40);
/// How long one request may take, a pull and a start on a busy machine included.
const REQUEST: Duration = Duration::from_secs(60);
/// What an MCP server answers to `initialize`; the test server says whatever it is given.
const HANDSHAKE: &str = r#"{"jsonrpc":"2.0","id":1,"result":{"protocolVersion":"2025-11-25"}}"#;

/// See the module.
pub(crate) struct World {
    pub(crate) host: Host,
    pub(crate) relay: Relay,
    /// The image to deploy: on the engine, or in a registry only.
    pub(crate) image: String,
    directory: TempDir,
    agent: Option<Agent>,
    http: reqwest::Client,
    /// Instances deleted without their volumes.
    kept: BTreeSet<String>,
}

struct Agent {
    child: Child,
    url: String,
}

/// What an instance is wanted to be, in the ledger's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Promise {
    /// `run`, `stop` or `remove`.
    pub(crate) intent: String,
    pub(crate) spec_hash: String,
    /// The value of `VERSION` in its environment.
    pub(crate) version: String,
    /// Another version is being tried, or taken back.
    pub(crate) updating: bool,
}

impl World {
    pub(crate) async fn new() -> Self {
        let host = Host::new();
        // On the disk, not in memory: fsync has to take its time.
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let (relay, image) = (Relay::start().await, host.image.clone());
        Self { host, relay, image, directory, agent: None, http, kept: BTreeSet::new() }
    }

    /// The same, whose image is in a registry and not on the engine.
    pub(crate) async fn with_registry() -> Self {
        let mut world = Self::new().await;
        world.image = world.host.registry();
        world
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// Starts the agent, and waits until it is ready.
    pub(crate) async fn start(&mut self) {
        assert!(self.agent.is_none());
        let log = OpenOptions::new().create(true).append(true).open(self.directory.path().join("log")).unwrap();
        let port = free_port();
        let child = Command::new(env!("CARGO_BIN_EXE_dtma-agent"))
            .env_clear()
            .env("DTMA_STATE_DIR", self.state_dir())
            .env("DOCKER_HOST", self.relay.docker_host())
            .env("DTMA_SCOPE", &self.host.scope)
            .env("DTMA_TLS", "off")
            .env("OFFLINE_MODE", "true")
            // However full this machine is.
            .env("DTMA_DISK_RESERVE_MB", "0")
            .env("DTMA_DISK_RESERVE_PERCENT", "0")
            .env("BACKEND_TO_DTMA_API_KEY", "fleet")
            .env("PORT", port.to_string())
            .kill_on_drop(true)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.agent = Some(Agent { child, url: format!("http://127.0.0.1:{port}") });
        let begun = Instant::now();
        while self.send(Method::GET, "/ready", None).await.map(|(status, _)| status) != Some(200) {
            assert!(begun.elapsed() < RECOVERY, "the agent isn't ready; its log:\n{}", self.log());
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Kills the agent, from any thread; when it returns, the agent does nothing any more.
    pub(crate) fn killer(&self) -> impl FnOnce() + Send + 'static {
        let pid = self.agent.as_ref().unwrap().child.id().unwrap();
        move || {
            let _ = kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), Signal::KILL);
            let gone = || {
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
            };
            while !gone() {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    /// Makes sure that the agent is dead, and takes note of it.
    pub(crate) async fn bury(&mut self) {
        self.killer()();
        self.agent.take().unwrap().child.wait().await.unwrap();
    }

    /// Status and answer; nothing when the agent died meanwhile.
    pub(crate) async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Option<(u16, Value)> {
        let url = format!("{}{path}", self.agent.as_ref()?.url);
        let mut request = self.http.request(method, url).bearer_auth("fleet");
        if let Some(body) = body {
            request = request.json(body);
        }
        let exchange = async {
            let response = request.send().await.ok()?;
            let status = response.status().as_u16();
            let text = response.text().await.ok()?;
            Some((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
        };
        timeout(REQUEST, exchange).await.unwrap_or_else(|_| panic!("no answer from the agent:\n{}", self.log()))
    }

    /// The answer to a request that has to succeed with this status.
    pub(crate) async fn must(&self, method: Method, path: &str, body: Option<&Value>, status: u16) -> Value {
        let answer = self.send(method.clone(), path, body).await;
        let Some((got, answer)) = answer else { panic!("{method} {path}: no answer\n{}", self.log()) };
        assert_eq!(got, status, "{method} {path}: {answer}\n{}", self.log());
        answer
    }

    /// A deploy of an MCP server with a volume. Versions but the first have another volume, too; the one called `broken` ends at once.
    pub(crate) fn deploy_body(&self, word: &str, version: &str) -> Value {
        let mut body = json!({
            "dockerImageUrl": self.image,
            "instanceNameOnToolbox": self.host.name(word),
            "accountToolInstanceId": format!("ati-{word}"),
            "mcpTransportType": "http",
            "environmentVariables": { "GREETING": HANDSHAKE, "VERSION": version },
            "volumes": [{ "name": "data", "path": "/data" }],
        });
        if version != "1" {
            body["volumes"].as_array_mut().unwrap().push(json!({ "name": "more", "path": "/more" }));
        }
        if version == "broken" {
            body["baseConfigOverrideJson"] = json!({ "Cmd": ["exit", "3"] });
        }
        body
    }

    /// A deploy of a server on its standard streams whose sessions have containers of their own.
    pub(crate) fn per_session_body(&self, word: &str) -> Value {
        let mut body = self.deploy_body(word, "1");
        body["mcpTransportType"] = json!("stdio");
        body["sessionMode"] = json!("per-session");
        body["baseConfigOverrideJson"] = json!({ "Cmd": ["lines"] });
        body
    }

    /// Begins a session; its id, unless the agent died meanwhile.
    pub(crate) async fn begin_session(&self, word: &str) -> Option<String> {
        let params = json!({ "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": { "name": "x", "version": "1" } });
        let hello = json!({ "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params });
        let asked =
            self.at_mcp(Method::POST, word)?.header("accept", "application/json, text/event-stream").json(&hello);
        let answer = timeout(REQUEST, asked.send()).await.expect("an answer in time").ok()?;
        let session = answer.headers().get("mcp-session-id").map(|id| id.to_str().unwrap().to_owned());
        let text = answer.text().await.ok()?;
        Some(session.unwrap_or_else(|| panic!("no session: {text}\n{}", self.log())))
    }

    /// Ends it, and waits until its container is gone.
    pub(crate) async fn end_session(&self, word: &str, session: &str) -> Option<(u16, Value)> {
        let asked = self.at_mcp(Method::DELETE, word)?.header("mcp-session-id", session);
        let status = timeout(REQUEST, asked.send()).await.expect("an answer in time").ok()?.status().as_u16();
        let begun = Instant::now();
        loop {
            let containers = self.listed("containers/json?all=true&").await;
            let mut labels = containers.as_array().unwrap().iter().map(|container| &container["Labels"]);
            if labels.all(|labels| labels["dtma.session"].is_null()) {
                return Some((status, Value::Null));
            }
            // It may have been killed.
            self.send(Method::GET, "/health", None).await?;
            assert!(begun.elapsed() < RECOVERY, "the session's container is not removed\n{}", self.log());
            sleep(Duration::from_millis(10)).await;
        }
    }

    fn at_mcp(&self, method: Method, word: &str) -> Option<reqwest::RequestBuilder> {
        let url = format!("{}/tools/{}/mcp", self.agent.as_ref()?.url, self.host.name(word));
        Some(self.http.request(method, url).bearer_auth("fleet"))
    }

    /// What the agent says, for a person.
    pub(crate) fn log(&self) -> String {
        let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines.iter().skip(lines.len().saturating_sub(60)).map(|line| format!("{line}\n")).collect()
    }

    /// What the ledger promises, read from the disk.
    pub(crate) fn promises(&self) -> BTreeMap<String, Promise> {
        let Ok(text) = std::fs::read_to_string(self.state_dir().join("ledger.json")) else { return BTreeMap::new() };
        let contents: Value = serde_json::from_str(text.split_once('\n').unwrap().1).unwrap();
        let entries = contents["entries"].as_object().unwrap().iter().map(|(name, entry)| {
            let intent = match &entry["intent"] {
                Value::String(intent) => intent.clone(),
                other => other.as_object().unwrap().keys().next().unwrap().clone(),
            };
            let spec_hash = entry["spec_hash"].as_str().unwrap().to_owned();
            let version = entry["spec"]["process"]["environment"]["VERSION"].as_str().unwrap_or_default().to_owned();
            (name.clone(), Promise { intent, spec_hash, version, updating: !entry["update"].is_null() })
        });
        entries.collect()
    }

    /// Waits until what is promised, what the agent says and what Docker holds are the same, and nothing is left over; what it is.
    pub(crate) async fn agreement(&self) -> BTreeMap<String, Promise> {
        let begun = Instant::now();
        loop {
            let difference = match self.difference().await {
                Ok(promises) => return promises,
                Err(difference) => difference,
            };
            assert!(
                begun.elapsed() < RECOVERY,
                "after {RECOVERY:?} there is still a difference: {difference}\n{}",
                self.log()
            );
            sleep(Duration::from_millis(25)).await;
        }
    }

    /// In which way promises, answers and Docker differ, if they do.
    async fn difference(&self) -> Result<BTreeMap<String, Promise>, String> {
        let promises = self.promises();
        let (_, told) = self.send(Method::GET, "/tools", None).await.ok_or("the agent is gone")?;
        let told = told["data"].as_array().ok_or("GET /tools gives no list")?;
        let containers = self.listed("containers/json?all=true&").await;
        let containers = containers.as_array().ok_or("Docker gives no list")?;
        let names = told.iter().filter_map(|view| view["instance_name_on_toolbox"].as_str());
        let names: BTreeSet<&str> = names.collect();
        if names != promises.keys().map(String::as_str).collect() {
            return Err(format!("GET /tools shows {names:?}, promised are {promises:?}"));
        }
        for (name, promise) in &promises {
            let view = told.iter().find(|view| view["instance_name_on_toolbox"] == name.as_str()).unwrap();
            let own = |container: &&Value| container["Labels"]["dtma.instance"] == name.as_str();
            let own: Vec<&Value> = containers.iter().filter(own).collect();
            let expected: &[&str] = match promise.intent.as_str() {
                "run" => &["running"],
                "stop" => &["stopped"],
                _ => return Err(format!("{name} is still being removed")),
            };
            if promise.updating {
                return Err(format!("{name} is still being updated"));
            }
            let state = view["state"].as_str().unwrap_or_default();
            if !expected.contains(&state) {
                return Err(format!("{name} is to {}, and the agent says {state}", promise.intent));
            }
            let fits = |container: &Value| {
                let runs = container["State"] == "running";
                container["Names"] == json!([format!("/{name}")])
                    && container["Labels"]["dtma.spec-hash"] == promise.spec_hash.as_str()
                    && container["Id"] == view["container_id"]
                    && runs == (promise.intent == "run")
            };
            let right = match own.as_slice() {
                [container] => fits(container),
                // Stopped before it was ever made.
                [] => promise.intent == "stop",
                _ => false,
            };
            if !right {
                return Err(format!(
                    "{name} is to {}, and Docker holds {own:?}; the agent says {view}",
                    promise.intent
                ));
            }
        }
        let strays = containers.iter().filter(|container| {
            container["Labels"]["dtma.instance"].as_str().is_none_or(|name| !promises.contains_key(name))
        });
        let strays: Vec<&Value> = strays.map(|container| &container["Names"]).collect();
        if !strays.is_empty() {
            return Err(format!("containers left over: {strays:?}"));
        }
        let volumes = self.listed("volumes?").await;
        let strays = volumes["Volumes"].as_array().into_iter().flatten().filter(|volume| {
            let owner = volume["Labels"]["dtma.instance"].as_str().unwrap_or_default();
            let word = volume["Name"].as_str().and_then(|name| name.rsplit('.').next());
            match promises.get(owner) {
                Some(promise) => promise.version == "1" && word == Some("more"),
                None => !self.kept.contains(owner),
            }
        });
        let strays: Vec<&Value> = strays.map(|volume| &volume["Name"]).collect();
        if !strays.is_empty() {
            return Err(format!("volumes left over: {strays:?}"));
        }
        Ok(promises)
    }

    /// Docker's list of what bears this world's label.
    async fn listed(&self, what: &str) -> Value {
        let filters = json!({ "label": [format!("dtma.scope={}", self.host.scope)] }).to_string();
        let encoded: String = filters.bytes().map(|byte| format!("%{byte:02X}")).collect();
        ask_docker(Method::GET, &format!("/v1.41/{what}filters={encoded}"), None).await.1
    }

    /// The volumes of deleted instances that stayed because nobody wanted them gone.
    pub(crate) fn keep_volumes_of(&mut self, word: &str) {
        self.kept.insert(self.host.name(word));
    }

    /// The instance still does what it is told.
    pub(crate) async fn stop_and_start(&self, word: &str) {
        let path = format!("/tools/{}", self.host.name(word));
        for verb in ["stop", "start"] {
            self.must(Method::POST, &format!("{path}/{verb}"), None, 200).await;
        }
    }

    /// Removes it with its volumes.
    pub(crate) async fn remove(&mut self, word: &str) {
        let path = format!("/tools/{}?volumes=true", self.host.name(word));
        self.must(Method::DELETE, &path, None, 200).await;
        self.kept.remove(&self.host.name(word));
    }

    /// No container, no volume; nothing but the agent's own network, with nobody on it. A group's network goes a moment later.
    pub(crate) async fn nothing_left(&self) {
        assert_eq!(self.host.left(), Vec::<String>::new());
        let own = format!("dtma-{}", self.host.scope);
        let begun = Instant::now();
        while self.networks().await.iter().any(|name| *name != own) {
            assert!(begun.elapsed() < RECOVERY, "networks left: {:?}\n{}", self.networks().await, self.log());
            sleep(Duration::from_millis(25)).await;
        }
    }

    /// Names of the networks bearing this world's label.
    pub(crate) async fn networks(&self) -> Vec<String> {
        let networks = self.listed("networks?").await;
        let names = networks.as_array().unwrap().iter().filter_map(|network| network["Name"].as_str());
        names.map(str::to_owned).collect()
    }

    /// Volumes of deleted instances go, too. Where an image has to be pulled, it and the agent's network are as on a new droplet again.
    pub(crate) async fn afresh(&mut self) {
        let label = format!("label=dtma.scope={}", self.host.scope);
        for volume in docker(&["volume", "ls", "-q", "--filter", &label]).split_whitespace() {
            docker(&["volume", "rm", volume]);
        }
        self.kept.clear();
        if self.image != self.host.image {
            if self.agent.is_some() {
                self.bury().await;
            }
            docker_may_fail(&["network", "rm", &format!("dtma-{}", self.host.scope)]);
            docker_may_fail(&["rmi", &self.image]);
        }
        if self.agent.is_none() {
            self.start().await;
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            let _ = agent.child.start_kill();
            // The host's corner is swept next; nothing must be made there meanwhile.
            while matches!(agent.child.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
