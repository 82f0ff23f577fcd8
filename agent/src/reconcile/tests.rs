//! The loop over an engine in memory: what callers are told, what is left, and what survives the agent's death at any point.

mod deaths;
mod fake;
mod first_look;
mod foreseen;
mod groups;
mod health;
mod images;
mod networks;
mod properties;
mod rivals;
mod secrets;
mod sessions;
mod taken_back;
mod updates;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use dtma_api::health::Era;
use dtma_api::instance::{Health, InstallationStatus, InstanceState, InstanceView, Transport};
use futures_util::FutureExt as _;
use jiff::Timestamp;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::fake::{Death, FakeEngine, Manner};
use super::*;
use crate::engine::{Condition, EngineError, Exit};
use crate::instance::spec::examples;
use crate::instance::{FailureKind, HostPort, McpServer, Port, PortProtocol, SessionMode, Spec, Volume};
use crate::store::ledger::Ledger;

const WAIT: Duration = Duration::from_secs(120);
const NO_WAIT: Duration = Duration::ZERO;

/// Answers as it is told.
struct Answers {
    well: AtomicBool,
    /// How often it has been asked.
    asked: AtomicUsize,
}

impl Answers {
    fn new() -> Self {
        Self { well: AtomicBool::new(true), asked: AtomicUsize::new(0) }
    }
}

#[async_trait]
impl Prober for Answers {
    async fn probe(&self, upstream: &Upstream, question: Question) -> Result<Answer, ProbeFailure> {
        if upstream.transport == Transport::Stdio {
            return Ok(Answer::CannotSay);
        }
        self.asked.fetch_add(1, Ordering::Relaxed);
        if self.well.load(Ordering::Relaxed) {
            Ok(Answer::Introduced(Box::new(introduction(question.tools))))
        } else {
            Err(ProbeFailure { reason: "nobody there".into() })
        }
    }
}

pub(super) fn introduction(tools: bool) -> Introduction {
    Introduction {
        era: Era::Legacy,
        protocol_version: "2025-11-25".to_owned(),
        name: Some("fake".to_owned()),
        version: None,
        capabilities: serde_json::json!({"tools": {}}),
        tools: tools.then(|| vec!["add".to_owned()]),
    }
}

/// A container as the engine shows it, not started yet.
pub(super) fn blank_container() -> crate::engine::Container {
    fake::blank("container".to_owned(), "one")
}

/// One agent process: the loop over `engine` with its ledger in `directory`.
struct Agent {
    instances: Instances,
    task: JoinHandle<()>,
    shutdown: CancellationToken,
    answers: Arc<Answers>,
    sessions: Sessions,
}

impl Agent {
    fn start(engine: &Arc<FakeEngine>, directory: &Path) -> Self {
        Self::start_with(engine, directory, Arc::new(secrets::Backend::default()))
    }

    fn start_with(engine: &Arc<FakeEngine>, directory: &Path, source: Arc<secrets::Backend>) -> Self {
        let answers = Arc::new(Answers::new());
        let sessions = Sessions::default();
        let shutdown = CancellationToken::new();
        let (instances, task) = start(Parts {
            engine: Arc::clone(engine) as Arc<dyn crate::engine::Engine>,
            ledger: Ledger::open(directory, Timestamp::UNIX_EPOCH).unwrap(),
            prober: Arc::clone(&answers) as Arc<dyn Prober>,
            disks: Arc::clone(&engine.disks),
            secrets: Secrets { vault: secrets::vault(directory), source },
            sessions: sessions.clone(),
            timing: Timing::default(),
            shutdown: shutdown.clone(),
        });
        Self { instances, task, shutdown, answers, sessions }
    }

    /// As `kill -9` ends it.
    async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
        // A write that is under way in a thread would end with a process. Here it has to be over before the next agent's.
        drop(self.instances.shared.desk().await);
    }

    /// Waits until `reached`, which it has to be at some time.
    async fn until(&self, reached: impl Fn(&Snapshot) -> bool) {
        let mut published = self.instances.watch_snapshots();
        let found = published.wait_for(|snapshot| reached(snapshot)).map(|found| found.map(|_| ()).unwrap());
        tokio::time::timeout(Duration::from_secs(3600), found).await.expect("it never came to that");
    }

    fn state(&self, name: &str) -> Option<InstanceState> {
        self.instances.get(&name.parse().unwrap()).map(|view| view.state)
    }

    fn events(&self, name: &str) -> Vec<String> {
        let (events, _) = self.instances.events_with_history();
        let of_one = events.into_iter().filter(|event| event.instance_name_on_toolbox.as_str() == name);
        of_one.map(|event| event.event).collect()
    }
}

fn state_in(snapshot: &Snapshot, name: &str) -> Option<InstanceState> {
    let found = snapshot.instances.iter().find(|view| view.instance_name_on_toolbox.as_str() == name);
    found.map(|view| view.state)
}

fn mcp(name: &str) -> Spec {
    let mcp =
        McpServer { transport: Transport::Http, port: 8080, path: "/mcp".to_owned(), sessions: SessionMode::Shared };
    Spec { mcp: Some(mcp), ..examples::spec(name) }
}

fn with_port(name: &str, port: u16) -> Spec {
    let port = Port { container: 80, protocol: PortProtocol::Tcp, host: HostPort::Exactly(port) };
    Spec { ports: vec![port], ..examples::spec(name) }
}

fn with_volume(name: &str) -> Spec {
    Spec { volumes: vec![Volume { name: "data".into(), path: "/data".into() }], ..examples::spec(name) }
}

fn name(text: &str) -> InstanceName {
    text.parse().unwrap()
}

fn failure(result: Result<Deployment, Rejection>) -> crate::instance::Failure {
    match result {
        Err(Rejection::Failed(failure)) => failure,
        other => panic!("it should have failed: {other:?}"),
    }
}

fn refused() -> EngineError {
    EngineError::Refused { operation: "do it", message: "no".to_owned() }
}

fn running(names: &[&str]) -> BTreeMap<String, &'static str> {
    names.iter().map(|name| ((*name).to_owned(), "running")).collect()
}

#[tokio::test(start_paused = true)]
async fn a_deploy_is_answered_when_the_server_runs_and_answers() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    let deployed = agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    assert!(deployed.created && deployed.settled);
    assert_eq!((deployed.view.state, deployed.view.health), (InstanceState::Running, Health::Healthy));
    assert_eq!(deployed.view.status_on_toolbox, InstallationStatus::Running);
    assert_eq!(deployed.view.image_digest.as_deref(), Some("sha256:abc"));
    assert_eq!(deployed.view.mcp_url.as_deref(), Some("/tools/one/mcp"));
    assert_eq!(engine.ours(), running(&["one"]));
    let events = agent.events("one");
    assert_eq!(events, ["accepted", "pulling", "pulling", "creating", "starting", "probing", "running"]);
    let upstream = agent.instances.upstream(&name("one")).unwrap();
    assert_eq!(upstream.address.to_string(), "172.30.0.2:8080");
    let container = deployed.view.container_id;
    for reference in ["one", "id-one", &container] {
        assert_eq!(agent.instances.resolve(reference), Ok(name("one")), "{reference}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_same_deploy_again_finds_the_first_and_another_is_told_to_update() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    let (one, two) = tokio::join!(agent.instances.deploy(mcp("one"), WAIT), agent.instances.deploy(mcp("one"), WAIT),);
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one.view.container_id, two.view.container_id);
    assert!(one.created != two.created && two.settled);
    let mut other = mcp("one");
    other.limits.pids = 64;
    assert!(matches!(agent.instances.deploy(other, WAIT).await, Err(Rejection::Exists(_))));
    let mut same_id = mcp("two");
    same_id.account_tool_instance_id = mcp("one").account_tool_instance_id;
    assert!(matches!(agent.instances.deploy(same_id, WAIT).await, Err(Rejection::IdTaken { .. })));
    assert_eq!(engine.ours(), running(&["one"]));
}

#[tokio::test(start_paused = true)]
async fn each_step_failing_in_turn_leaves_nothing_and_says_why() {
    let verbs = ["image", "pull", "create", "start", "inspect"];
    for verb in verbs {
        let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
        let agent = Agent::start(&engine, directory.path());
        engine.fail(verb, refused);
        let failed = failure(agent.instances.deploy(with_volume("one"), WAIT).await);
        assert_eq!(failed.kind, FailureKind::Refused, "{verb}");
        assert!(engine.ours().is_empty() && engine.volumes().is_empty(), "{verb} left something");
        assert_eq!(agent.state("one"), None, "{verb}");
        assert!(agent.events("one").contains(&"failed".to_owned()), "{verb}");
        let reported = agent.instances.tool_statuses();
        assert_eq!(reported[0].status_on_toolbox, InstallationStatus::Error, "{verb}");
        assert!(reported[0].runtime_details.error.as_ref().unwrap().contains("no"), "{verb}");
        // And nothing in the ledger either: the next process knows nothing of it.
        agent.kill().await;
        engine.heal();
        let agent = Agent::start(&engine, directory.path());
        let again = agent.instances.deploy(with_volume("one"), WAIT).await.unwrap();
        assert!(again.created, "{verb}");
        assert_eq!(agent.instances.tool_statuses().len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_nobody_has_is_not_found() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    let missing = Spec { image: "registry.example/missing:1".parse().unwrap(), ..examples::spec("one") };
    let failed = failure(agent.instances.deploy(missing.clone(), WAIT).await);
    assert_eq!(failed.kind, FailureKind::ImageNotFound);
    let never = Spec { pull_policy: dtma_api::instance::PullPolicy::Never, ..examples::spec("one") };
    assert_eq!(failure(agent.instances.deploy(never, WAIT).await).kind, FailureKind::ImageNotFound);
    assert!(!engine.calls().iter().any(|call| call.starts_with("pull registry.example/server")));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ends_at_once_is_undone_with_its_last_words() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    engine.manner("one", Manner::Exits);
    let failed = failure(agent.instances.deploy(examples::spec("one"), WAIT).await);
    assert_eq!(failed.kind, FailureKind::Exited { code: Some(3) });
    assert_eq!(failed.log, ["last words"]);
    assert!(engine.ours().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_answers_is_undone_and_one_that_takes_its_time_is_not() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.answers.well.store(false, Ordering::Relaxed);
    let failed = failure(agent.instances.deploy(mcp("one"), WAIT).await);
    assert_eq!(failed.kind, FailureKind::NotAnswering);
    assert!(failed.message.contains("nobody there"), "{}", failed.message);
    assert!(engine.ours().is_empty());
    let slow = tokio::spawn({
        let instances = agent.instances.clone();
        async move { instances.deploy(mcp("slow"), WAIT).await }
    });
    agent.until(|snapshot| state_in(snapshot, "slow") == Some(InstanceState::Starting)).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    agent.answers.well.store(true, Ordering::Relaxed);
    assert!(slow.await.unwrap().unwrap().settled);
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_waits_no_longer_is_told_that_work_goes_on() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    engine.hang("pull");
    let deployed = agent.instances.deploy(mcp("one"), Duration::from_secs(5)).await.unwrap();
    assert!(deployed.created && !deployed.settled);
    assert_eq!((deployed.view.state, deployed.view.status.as_str()), (InstanceState::Pulling, "pending"));
    // One that hangs holds up no other.
    engine.have_image();
    assert!(agent.instances.deploy(mcp("two"), WAIT).await.unwrap().settled);
    // And it can be called off.
    assert_eq!(agent.instances.remove(&name("one"), false, WAIT).await.unwrap(), Removal::Gone);
    assert_eq!(engine.ours(), running(&["two"]));
}

#[tokio::test(start_paused = true)]
async fn stop_start_and_restart_may_be_repeated() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    let one = name("one");
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    assert!(agent.instances.start(&one, WAIT).await.unwrap().already);
    let stopped = agent.instances.stop(&one, WAIT).await.unwrap();
    assert!(!stopped.already && stopped.settled);
    assert_eq!((stopped.view.state, stopped.view.status.as_str()), (InstanceState::Stopped, "exited"));
    assert!(agent.instances.stop(&one, WAIT).await.unwrap().already);
    assert!(agent.instances.upstream(&one).is_err());
    let started = agent.instances.start(&one, WAIT).await.unwrap();
    assert!(!started.already && started.settled);
    let before = started.view.started_at;
    let restarted = agent.instances.restart(&one, WAIT).await.unwrap();
    assert!(restarted.settled && restarted.view.started_at != before);
    assert!(matches!(agent.instances.start(&name("nobody"), WAIT).await, Err(Rejection::NotFound(_))));
}

#[tokio::test(start_paused = true)]
async fn what_was_stopped_stays_stopped_over_the_agents_death() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    for one in ["one", "two"] {
        agent.instances.deploy(mcp(one), WAIT).await.unwrap();
    }
    agent.instances.stop(&name("one"), WAIT).await.unwrap();
    agent.kill().await;
    let agent = Agent::start(&engine, directory.path());
    agent
        .until(|snapshot| snapshot.pass.sequence > 3 || state_in(snapshot, "two") == Some(InstanceState::Running))
        .await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!((agent.state("one"), agent.state("two")), (Some(InstanceState::Stopped), Some(InstanceState::Running)));
    // Nothing was touched to find that out.
    assert_eq!(engine.calls().iter().filter(|call| call.starts_with("start")).count(), 2);
    assert_eq!(agent.instances.remove(&name("one"), false, WAIT).await.unwrap(), Removal::Gone);
}

#[tokio::test(start_paused = true)]
async fn removing_keeps_named_volumes_unless_told_otherwise() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(with_volume("one"), WAIT).await.unwrap();
    agent.instances.remove(&name("one"), false, WAIT).await.unwrap();
    assert_eq!(engine.volumes(), ["one.data"]);
    // A failed deploy over an older volume leaves that volume alone.
    engine.fail("start", refused);
    failure(agent.instances.deploy(with_volume("one"), WAIT).await);
    assert_eq!(engine.volumes(), ["one.data"]);
    engine.heal();
    agent.instances.deploy(with_volume("one"), WAIT).await.unwrap();
    agent.instances.remove(&name("one"), true, WAIT).await.unwrap();
    assert_eq!(engine.volumes(), Vec::<String>::new());
    assert!(matches!(agent.instances.remove(&name("one"), true, WAIT).await, Err(Rejection::NotFound(_))));
}

#[tokio::test(start_paused = true)]
async fn strangers_keep_their_names_and_ports() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    engine.stranger("taken", Some(8081));
    let failed = failure(agent.instances.deploy(examples::spec("taken"), WAIT).await);
    assert_eq!(failed.kind, FailureKind::NameConflict);
    let failed = failure(agent.instances.deploy(with_port("one", 8081), WAIT).await);
    assert_eq!(failed.kind, FailureKind::PortConflict { holder: "container taken".into() });
    agent.instances.deploy(with_port("one", 8082), WAIT).await.unwrap();
    match agent.instances.deploy(with_port("two", 8082), WAIT).await {
        Err(Rejection::PortTaken { port: 8082, holder }) => assert_eq!(holder, "instance one"),
        other => panic!("{other:?}"),
    }
    engine.fail("start", || EngineError::PortTaken { port: Some(8083) });
    let failed = failure(agent.instances.deploy(with_port("two", 8083), WAIT).await);
    assert_eq!(failed.kind, FailureKind::PortConflict { holder: "a process on the droplet".into() });
    assert_eq!((engine.ours(), engine.strangers()), (running(&["one"]), 1));
}

#[tokio::test(start_paused = true)]
async fn what_happens_behind_the_agents_back_is_put_right() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    let first = agent.instances.get(&name("one")).unwrap().container_id;
    let since = tokio::time::Instant::now();
    engine.steal("one");
    agent
        .until(|snapshot| {
            snapshot.instances.iter().any(|view| view.state == InstanceState::Running && view.container_id != first)
        })
        .await;
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    let exit = || Exit { code: 137, out_of_memory: false, error: String::new() };
    engine.meddle("one", |container| container.condition = Condition::Exited(exit()));
    agent.until(|snapshot| state_in(snapshot, "one") != Some(InstanceState::Running)).await;
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    let events = agent.events("one");
    assert!(events.contains(&"vanished".to_owned()) && events.contains(&"exited".to_owned()), "{events:?}");
    // Docker is about to start it again: nothing to do.
    let before = engine.calls().iter().filter(|call| call.starts_with("start")).count();
    engine.meddle("one", |container| container.condition = Condition::Restarting(exit()));
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Starting)).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(engine.calls().iter().filter(|call| call.starts_with("start")).count(), before);
    assert_eq!(agent.instances.tool_statuses()[0].status_on_toolbox, InstallationStatus::ErrorRuntime);
}

#[tokio::test(start_paused = true)]
async fn something_that_had_run_is_tried_again_with_growing_pauses_and_at_once_when_asked() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    engine.fail("start", refused);
    let exit = Exit { code: 1, out_of_memory: false, error: String::new() };
    engine.meddle("one", |container| container.condition = Condition::Exited(exit));
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Failed)).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let tries = engine.calls().iter().filter(|call| call.starts_with("start")).count();
    assert!((10..25).contains(&tries), "{tries} tries within an hour");
    assert!(matches!(agent.instances.start(&name("one"), WAIT).await, Err(Rejection::Failed(_))));
    engine.heal();
    assert!(agent.instances.start(&name("one"), WAIT).await.unwrap().settled);
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_goes_away_is_waited_for() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    engine.gone();
    engine.steal("one");
    agent.until(|snapshot| !snapshot.engine.reachable).await;
    assert!(matches!(agent.instances.deploy(mcp("two"), WAIT).await, Err(Rejection::EngineUnavailable)));
    assert!(agent.instances.engine_status().error.is_some());
    engine.heal();
    agent
        .until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running) && snapshot.engine.reachable)
        .await;
    assert_eq!(engine.ours(), running(&["one"]));
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_goes_away_in_the_middle_of_a_deploy_finishes_it_later() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.until(|snapshot| snapshot.engine.reachable).await;
    engine.fail("create", || EngineError::Unavailable { operation: "create", source: "broken pipe".into() });
    let deploy = agent.instances.deploy(mcp("one"), WAIT);
    let heal = async {
        tokio::time::sleep(Duration::from_secs(20)).await;
        engine.heal();
    };
    let (deployed, ()) = tokio::join!(deploy, heal);
    assert!(deployed.unwrap().settled);
}

#[tokio::test(start_paused = true)]
async fn a_stop_in_the_middle_of_a_deploy_wins() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.answers.well.store(false, Ordering::Relaxed);
    let deploy = tokio::spawn({
        let instances = agent.instances.clone();
        async move { instances.deploy(mcp("one"), WAIT).await }
    });
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Starting)).await;
    assert!(agent.instances.stop(&name("one"), WAIT).await.unwrap().settled);
    assert!(matches!(deploy.await.unwrap(), Err(Rejection::Superseded(_))));
    assert_eq!(engine.ours(), BTreeMap::from([("one".to_owned(), "exited")]));
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_refuses_requests_and_changes_nothing() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    // A folder where the draft goes: nothing can be written any more.
    std::fs::create_dir(directory.path().join("ledger.json.new")).unwrap();
    assert!(matches!(agent.instances.deploy(mcp("two"), WAIT).await, Err(Rejection::Ledger(_))));
    assert!(matches!(agent.instances.stop(&name("one"), WAIT).await, Err(Rejection::Ledger(_))));
    assert!(agent.instances.ledger_writable().is_err());
    assert_eq!(engine.ours(), running(&["one"]));
    std::fs::remove_dir(directory.path().join("ledger.json.new")).unwrap();
    tokio::time::sleep(Duration::from_secs(31)).await;
    assert_eq!(agent.instances.ledger_writable(), Ok(()));
    agent.instances.stop(&name("one"), WAIT).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lost_or_damaged_ledger_is_put_together_from_the_containers() {
    for damage in [None, Some("{\"format\":1}\nnonsense")] {
        let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
        engine.stranger("stranger", None);
        let agent = Agent::start(&engine, directory.path());
        let mut spec = mcp("one");
        spec.process.environment.0.insert("KEY".into(), "value".into());
        agent.instances.deploy(spec.clone(), WAIT).await.unwrap();
        agent.instances.deploy(mcp("two"), WAIT).await.unwrap();
        agent.instances.stop(&name("two"), WAIT).await.unwrap();
        agent.kill().await;
        engine.meddle("two", |container| "unreadable".clone_into(&mut container.spec_label));
        engine.litter(&mcp("three"));
        let ledger = directory.path().join("ledger.json");
        match damage {
            None => std::fs::remove_file(&ledger).unwrap(),
            Some(bytes) => std::fs::write(&ledger, bytes).unwrap(),
        }
        let agent = Agent::start(&engine, directory.path());
        agent.until(|snapshot| state_in(snapshot, "three") == Some(InstanceState::Running)).await;
        // The same deploy finds the same instance: its environment was found again too.
        let again = agent.instances.deploy(spec, WAIT).await.unwrap();
        assert!(!again.created && again.settled);
        // What can't be read is left alone.
        tokio::time::sleep(Duration::from_secs(120)).await;
        assert_eq!(engine.ours().get("two"), Some(&"exited"));
        assert_eq!(agent.state("two"), None);
        let kept = std::fs::read_dir(directory.path()).unwrap().filter_map(Result::ok);
        let kept = kept.filter(|file| file.file_name().to_string_lossy().starts_with("ledger.damaged-"));
        assert_eq!(kept.count(), usize::from(damage.is_some()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_container_of_ours_that_no_instance_owns_is_removed() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    engine.litter(&mcp("two"));
    engine.stranger("three", None);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((engine.ours(), engine.strangers()), (running(&["one"]), 1));
}

#[tokio::test(start_paused = true)]
async fn it_ends_when_told_and_leaves_the_containers() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    agent.instances.deploy(mcp("two"), NO_WAIT).await.unwrap();
    agent.shutdown.cancel();
    agent.task.await.unwrap();
    assert_eq!(engine.ours().get("one"), Some(&"running"));
}
