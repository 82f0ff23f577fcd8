//! Health: what hangs is found and restarted, what keeps ending is reported, and Docker's own restarts are left alone.

use super::*;
use crate::instance::HealthCheck;

const HOUR: Duration = Duration::from_secs(3600);

fn checked(text: &str, check: HealthCheck) -> Spec {
    Spec { health_check: check, ..mcp(text) }
}

fn calls(engine: &FakeEngine, verb: &str) -> usize {
    engine.calls().iter().filter(|call| call.split(' ').next() == Some(verb)).count()
}

fn view(agent: &Agent, text: &str) -> InstanceView {
    agent.instances.get(&name(text)).unwrap()
}

fn health_in(snapshot: &Snapshot, name: &str) -> Option<Health> {
    let found = snapshot.instances.iter().find(|view| view.instance_name_on_toolbox.as_str() == name);
    found.map(|view| view.health)
}

fn message(agent: &Agent, wanted: &str) -> String {
    let (events, _) = agent.instances.events_with_history();
    events.into_iter().find(|event| event.event == wanted).map(|event| event.message).unwrap_or_default()
}

fn exit(code: i64) -> Exit {
    Exit { code, out_of_memory: false, error: String::new() }
}

impl Agent {
    fn hangs(&self) {
        self.answers.well.store(false, Ordering::Relaxed);
    }

    fn answers_again(&self) {
        self.answers.well.store(true, Ordering::Relaxed);
    }

    async fn until_health(&self, text: &str, health: Health) {
        self.until(|snapshot| health_in(snapshot, text) == Some(health)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_hangs_is_found_unhealthy_restarted_and_healthy_again() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    let deployed = agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    assert!(deployed.view.last_probe_at.is_some());
    agent.hangs();
    let since = tokio::time::Instant::now();
    agent.until_health("one", Health::Unhealthy).await;
    assert!(since.elapsed() < Duration::from_secs(100), "{:?}", since.elapsed());
    let shown = view(&agent, "one");
    assert_eq!(shown.state, InstanceState::Running);
    assert_eq!(shown.health_reason.as_deref(), Some("it failed 3 probes in a row, the last because nobody there"));
    assert_eq!(agent.instances.tool_statuses()[0].runtime_details.health_reason, shown.health_reason);
    assert_eq!(calls(&engine, "restart"), 0, "not before its pause");
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Starting)).await;
    agent.answers_again();
    agent.until_health("one", Health::Healthy).await;
    assert_eq!(calls(&engine, "restart"), 1);
    let shown = view(&agent, "one");
    assert_eq!((shown.restart_count, shown.health_reason), (1, None));
    assert_eq!(shown.container_id, deployed.view.container_id);
    let events = agent.events("one");
    assert_eq!(events[events.len() - 4..], ["unhealthy", "hangs", "restarting", "healthy"], "{events:?}");
    assert!(message(&agent, "hangs").contains("for the 1 of at most 5 times"), "{}", message(&agent, "hangs"));
    let counts = agent.instances.snapshot().health;
    assert!(counts.answered >= 1 && counts.failed >= 3 && counts.restarts == 1, "{counts:?}");
    // And that is all.
    tokio::time::sleep(HOUR).await;
    assert_eq!((calls(&engine, "restart"), calls(&engine, "start")), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn one_that_hangs_every_time_is_given_up_on_until_somebody_asks() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    agent.hangs();
    tokio::time::sleep(HOUR).await;
    assert_eq!(calls(&engine, "restart"), 5);
    let shown = view(&agent, "one");
    assert_eq!((shown.state, shown.health, shown.restart_count), (InstanceState::Running, Health::Unhealthy, 5));
    let reason = shown.health_reason.unwrap();
    assert!(reason.contains("has given up") && reason.contains("POST /tools/one/restart"), "{reason}");
    assert_eq!(agent.events("one").iter().filter(|event| *event == "gave_up").count(), 1);
    // Somebody restarts it, and it hangs on: that is said, and it gets its chances again.
    let failed = agent.instances.restart(&name("one"), WAIT).await;
    assert!(matches!(failed, Err(Rejection::Failed(ref failure)) if failure.kind == FailureKind::NotAnswering));
    agent.until_health("one", Health::Unhealthy).await;
    let shown = view(&agent, "one");
    assert_eq!(shown.state, InstanceState::Failed);
    assert!(shown.health_reason.unwrap().contains("within 90 s of its start"));
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Starting)).await;
    assert_eq!(calls(&engine, "restart"), 7);
    agent.answers_again();
    agent.until_health("one", Health::Healthy).await;
    assert_eq!((view(&agent, "one").state, view(&agent, "one").error), (InstanceState::Running, None));
}

#[tokio::test(start_paused = true)]
async fn what_answers_late_after_a_failed_restart_runs_without_another_one() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent
        .instances
        .deploy(checked("one", HealthCheck { restart: false, ..HealthCheck::default() }), WAIT)
        .await
        .unwrap();
    agent.hangs();
    assert!(matches!(agent.instances.restart(&name("one"), WAIT).await, Err(Rejection::Failed(_))));
    tokio::time::sleep(HOUR).await;
    assert_eq!((view(&agent, "one").state, view(&agent, "one").health), (InstanceState::Failed, Health::Unhealthy));
    agent.answers_again();
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    assert_eq!((view(&agent, "one").health, calls(&engine, "restart")), (Health::Healthy, 1));
}

#[tokio::test(start_paused = true)]
async fn after_the_agents_death_health_is_known_again_at_once_and_nothing_is_touched() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    for one in ["one", "two", "three"] {
        agent.instances.deploy(mcp(one), WAIT).await.unwrap();
    }
    agent.kill().await;
    let before = engine.calls().len();
    let agent = Agent::start(&engine, directory.path());
    let since = tokio::time::Instant::now();
    agent
        .until(|snapshot| ["one", "two", "three"].iter().all(|one| health_in(snapshot, one) == Some(Health::Healthy)))
        .await;
    assert!(since.elapsed() <= Duration::from_secs(1), "{:?}", since.elapsed());
    assert!(view(&agent, "one").last_probe_at.is_some());
    let server = agent.instances.introduction(&name("one")).unwrap();
    assert_eq!(server.tools.as_deref(), Some(["add".to_owned()].as_slice()));
    let touched: Vec<String> = engine.calls().split_off(before);
    let changing = ["start", "stop", "restart", "create", "remove", "adjust"];
    assert!(!touched.iter().any(|call| changing.contains(&call.split(' ').next().unwrap())), "{touched:?}");
}

#[tokio::test(start_paused = true)]
async fn one_that_hung_while_the_agent_was_away_is_found_and_restarted() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    agent.kill().await;
    let agent = Agent::start(&engine, directory.path());
    agent.hangs();
    agent.until_health("one", Health::Unhealthy).await;
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Starting)).await;
    agent.answers_again();
    agent.until_health("one", Health::Healthy).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_dies_while_it_restarts_what_hangs_leaves_it_to_the_next_one() {
    for death in [Death::Before, Death::After] {
        let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
        let agent = Agent::start(&engine, directory.path());
        agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
        engine.die_at(0, death);
        agent.hangs();
        tokio::time::timeout(HOUR, engine.died.notified()).await.unwrap();
        agent.kill().await;
        engine.live();
        let agent = Agent::start(&engine, directory.path());
        // The restart that was lost has to be made by the next one; the other one has helped.
        if death == Death::Before {
            agent.hangs();
            agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Starting)).await;
            agent.answers_again();
        }
        agent.until_health("one", Health::Healthy).await;
        tokio::time::sleep(HOUR).await;
        assert_eq!(calls(&engine, "restart"), if death == Death::Before { 2 } else { 1 }, "{death:?}");
        assert_eq!(engine.ours(), running(&["one"]), "{death:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_restart_the_engine_refuses_is_tried_again() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    engine.fail("restart", refused);
    agent.hangs();
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Failed)).await;
    engine.heal();
    agent.answers_again();
    agent.until_health("one", Health::Healthy).await;
    assert_eq!((view(&agent, "one").state, view(&agent, "one").error), (InstanceState::Running, None));
}

#[tokio::test(start_paused = true)]
async fn a_stop_is_no_failure_and_what_is_stopped_is_not_probed() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    agent.hangs();
    agent.instances.stop(&name("one"), WAIT).await.unwrap();
    let asked = agent.answers.asked.load(Ordering::Relaxed);
    tokio::time::sleep(HOUR).await;
    assert_eq!(agent.answers.asked.load(Ordering::Relaxed), asked);
    let shown = view(&agent, "one");
    assert_eq!((shown.state, shown.health, shown.health_reason), (InstanceState::Stopped, Health::Unknown, None));
    assert!(!agent.events("one").contains(&"unhealthy".to_owned()));
    assert_eq!((calls(&engine, "restart"), calls(&engine, "start")), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_may_be_busy_with_a_call_is_reported_and_restarted_only_when_that_has_ended() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    let call = agent.instances.call(&name("one"));
    let other = agent.instances.call(&name("two"));
    agent.hangs();
    agent.until_health("one", Health::Unhealthy).await;
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(calls(&engine, "restart"), 0);
    assert!(view(&agent, "one").health_reason.unwrap().contains("a call it was given before is still with it"));
    drop(call);
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Starting)).await;
    assert_eq!(calls(&engine, "restart"), 1);
    drop(other);
}

#[tokio::test(start_paused = true)]
async fn a_stop_during_a_restart_wins() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    engine.hang("restart");
    agent.hangs();
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Starting)).await;
    let stop = agent.instances.stop(&name("one"), NO_WAIT).await.unwrap();
    assert!(!stop.settled);
    engine.release();
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Stopped)).await;
    tokio::time::sleep(HOUR).await;
    assert_eq!(engine.ours(), BTreeMap::from([("one".to_owned(), "exited")]));
}

#[tokio::test(start_paused = true)]
async fn what_docker_is_restarting_is_left_to_docker() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    agent.hangs();
    agent.until_health("one", Health::Unhealthy).await;
    // Between the finding and the restart it ends by itself.
    engine.meddle("one", |container| {
        container.condition = Condition::Restarting(exit(1));
        container.restart_count = 1;
    });
    tokio::time::sleep(HOUR).await;
    assert_eq!((calls(&engine, "restart"), calls(&engine, "start")), (0, 1));
    assert_eq!(view(&agent, "one").health, Health::Unknown);
}

#[tokio::test(start_paused = true)]
async fn one_that_ends_again_and_again_is_reported_with_its_last_words_and_left_to_docker() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    // Whether it is an MCP server or not.
    agent.instances.deploy(examples::spec("one"), WAIT).await.unwrap();
    let looping = |snapshot: &Snapshot| {
        let view = &snapshot.instances[0];
        view.crash_looping && view.health_reason.as_ref().is_some_and(|reason| reason.contains("last words"))
    };
    for count in 1..=3 {
        engine.meddle("one", |container| {
            container.condition = Condition::Restarting(exit(0));
            container.restart_count = count;
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    agent.until(looping).await;
    let shown = view(&agent, "one");
    assert_eq!((shown.health, shown.restart_count), (Health::Unhealthy, 3));
    let reason = shown.health_reason.unwrap();
    assert!(reason.contains("3 times within 10 minutes, the last time with exit code 0"), "{reason}");
    assert_eq!(message(&agent, "crash_looping"), reason);
    // What it wrote stays on the droplet.
    let told = agent.instances.tool_statuses().remove(0).runtime_details;
    assert!(told.crash_looping && !told.health_reason.as_ref().unwrap().contains("last words"), "{told:?}");
    tokio::time::sleep(HOUR).await;
    assert_eq!((calls(&engine, "restart"), calls(&engine, "start")), (0, 1), "Docker does that");
    assert_eq!(agent.events("one").iter().filter(|event| *event == "crash_looping").count(), 1);
    let since = Timestamp::now() - jiff::SignedDuration::from_mins(2);
    engine.meddle("one", |container| container.condition = Condition::Running { since });
    agent.until(|snapshot| !snapshot.instances[0].crash_looping).await;
    assert_eq!(view(&agent, "one").health_reason, None);
    assert!(agent.events("one").contains(&"stable".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_deploy_passes_the_gate_of_its_health_check() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    let check = HealthCheck { success_threshold: 4, start_period_seconds: 20, ..HealthCheck::default() };
    agent.instances.deploy(checked("one", check), WAIT).await.unwrap();
    assert!(agent.answers.asked.load(Ordering::Relaxed) >= 4);
    agent.hangs();
    let since = tokio::time::Instant::now();
    let failed = failure(agent.instances.deploy(checked("two", check), WAIT).await);
    assert!(failed.message.contains("within 20 s of its start"), "{}", failed.message);
    assert!((20..30).contains(&since.elapsed().as_secs()), "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn one_that_is_not_to_be_checked_counts_by_staying_up() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.hangs();
    let off = HealthCheck { enabled: false, ..HealthCheck::default() };
    agent.instances.deploy(checked("one", off), WAIT).await.unwrap();
    tokio::time::sleep(HOUR).await;
    assert_eq!(agent.answers.asked.load(Ordering::Relaxed), 0);
    let shown = view(&agent, "one");
    assert_eq!((shown.state, shown.health, shown.last_probe_at), (InstanceState::Running, Health::Unknown, None));
}

#[tokio::test(start_paused = true)]
async fn one_that_can_not_be_asked_counts_by_staying_up() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    let mut stdio = mcp("one");
    stdio.mcp.as_mut().unwrap().transport = Transport::Stdio;
    agent.instances.deploy(stdio, WAIT).await.unwrap();
    tokio::time::sleep(HOUR).await;
    let shown = view(&agent, "one");
    assert_eq!((shown.state, shown.health, shown.health_reason), (InstanceState::Running, Health::Unknown, None));
    assert_eq!((shown.last_probe_at, agent.instances.introduction(&name("one"))), (None, None));
    let counts = agent.instances.snapshot().health;
    assert!(counts.cannot_say > 0 && counts.answered == 0 && counts.failed == 0, "{counts:?}");
    assert_eq!((calls(&engine, "restart"), calls(&engine, "start")), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn an_update_that_fails_before_the_old_version_stops_leaves_its_health_as_it_was() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    let missing = Spec { image: "registry.example/missing:1".parse().unwrap(), ..mcp("one") };
    let gate = crate::instance::HealthGate::default();
    assert!(matches!(agent.instances.update(missing, gate, WAIT).await, Err(Rejection::RolledBack { .. })));
    let shown = view(&agent, "one");
    assert_eq!((shown.state, shown.health), (InstanceState::Running, Health::Healthy));
}

#[tokio::test(start_paused = true)]
async fn after_an_update_the_new_version_is_the_one_that_is_known() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    let next = Spec { image: "registry.example/server:2".parse().unwrap(), ..mcp("one") };
    let gate = crate::instance::HealthGate::default();
    let updated = agent.instances.update(next, gate, WAIT).await.unwrap();
    assert_eq!((updated.view.state, updated.view.health), (InstanceState::Running, Health::Healthy));
    agent.hangs();
    agent.until_health("one", Health::Unhealthy).await;
}
