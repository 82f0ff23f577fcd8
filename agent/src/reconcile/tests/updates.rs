//! Updates: the old version is kept until the new one has shown that it works, whatever comes between.

use super::*;
use crate::instance::HealthGate;

const GATE: HealthGate = HealthGate { timeout_seconds: 30, successes: 3 };

fn next(text: &str) -> Spec {
    Spec { image: "registry.example/server:2".parse().unwrap(), ..mcp(text) }
}

fn image(agent: &Agent, text: &str) -> String {
    agent.instances.get(&name(text)).unwrap().image
}

fn rolled_back(result: Result<Settled, Rejection>) -> crate::instance::Failure {
    match result {
        Err(Rejection::RolledBack { failure, .. }) => failure,
        other => panic!("it should have been rolled back: {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn the_new_version_takes_over_when_it_has_shown_that_it_works() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    let old = agent.instances.get(&name("one")).unwrap();
    let updated = agent.instances.update(next("one"), GATE, WAIT).await.unwrap();
    assert_eq!((updated.settled, updated.already), (true, false));
    assert_eq!(updated.view.image, "registry.example/server:2");
    assert_ne!(updated.view.container_id, old.container_id);
    assert_eq!(updated.view.names, ["/one"]);
    assert_eq!(engine.ours(), running(&["one"]));
    // Everything that takes time happens while the old one still serves.
    let calls = engine.calls();
    let at = |wanted: &str| calls.iter().rposition(|call| call.starts_with(wanted)).unwrap();
    assert!(at("pull") < at("create") && at("create") < at("stop") && at("stop") < at("start"), "{calls:?}");
    assert!(at("start") < at("remove") && at("remove") < at("rename"), "{calls:?}");
    let again = agent.instances.update(next("one"), GATE, WAIT).await.unwrap();
    assert!(again.already, "the same again finds it done");
    assert_eq!(engine.calls().iter().filter(|call| call.starts_with("create")).count(), 2);
}

#[tokio::test(start_paused = true)]
async fn each_step_failing_in_turn_brings_the_old_version_back() {
    for verb in ["pull", "create", "start"] {
        let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
        let agent = Agent::start(&engine, directory.path());
        agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
        let old = agent.instances.get(&name("one")).unwrap().container_id;
        engine.fail(verb, refused);
        let updating = Box::pin(agent.instances.update(next("one"), GATE, WAIT));
        let healing = async {
            agent.until(|_| agent.events("one").contains(&"failed".to_owned())).await;
            engine.heal();
            std::future::pending::<()>().await;
        };
        let result = tokio::select! { result = updating => result, () = healing => unreachable!() };
        assert_eq!(rolled_back(result).kind, FailureKind::Refused, "{verb}");
        let view = agent.instances.get(&name("one")).unwrap();
        assert_eq!((view.state, view.container_id), (InstanceState::Running, old), "{verb}");
        assert_eq!(view.image, "registry.example/server:1");
        assert_eq!(engine.ours(), running(&["one"]), "{verb}");
        let told = view.last_update.unwrap();
        assert_eq!(told.outcome, dtma_api::instance::UpdateOutcome::RolledBack);
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_version_that_ends_or_never_answers_is_taken_back_with_its_last_words() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    engine.manner_of_image("registry.example/server:2", Manner::Exits);
    let why = rolled_back(agent.instances.update(next("one"), GATE, WAIT).await);
    assert_eq!((why.kind, why.log), (FailureKind::Exited { code: Some(3) }, vec!["last words".to_owned()]));
    engine.manner_of_image("registry.example/server:2", Manner::Stays);
    agent.answers.well.store(false, Ordering::Relaxed);
    let updating = agent.instances.update(next("one"), GATE, WAIT);
    let answering = async {
        agent.until(|_| agent.events("one").iter().filter(|event| *event == "failed").count() == 2).await;
        agent.answers.well.store(true, Ordering::Relaxed);
        std::future::pending::<()>().await;
    };
    let begun = tokio::time::Instant::now();
    let result = tokio::select! { result = updating => result, () = answering => unreachable!() };
    assert_eq!(rolled_back(result).kind, FailureKind::NotAnswering);
    assert!((30..40).contains(&begun.elapsed().as_secs()), "the gate's own time counts: {:?}", begun.elapsed());
    assert_eq!(image(&agent, "one"), "registry.example/server:1");
    assert_eq!(engine.ours(), running(&["one"]));
}

#[tokio::test(start_paused = true)]
async fn while_an_update_is_under_way_others_are_told_so_and_a_removal_wins() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    engine.hang("pull");
    let pending = agent.instances.update(next("one"), GATE, NO_WAIT).await.unwrap();
    assert!(!pending.settled);
    assert_eq!(pending.view.state, InstanceState::Updating);
    let other = Spec { image: "registry.example/server:3".parse().unwrap(), ..mcp("one") };
    let instances = &agent.instances;
    assert!(matches!(instances.update(other, GATE, WAIT).await, Err(Rejection::Busy(_))));
    assert!(matches!(instances.deploy(mcp("one"), WAIT).await, Err(Rejection::Busy(_))));
    for result in [
        instances.start(&name("one"), WAIT).await,
        instances.stop(&name("one"), WAIT).await,
        instances.restart(&name("one"), WAIT).await,
    ] {
        assert!(matches!(result, Err(Rejection::Busy(_))), "{result:?}");
    }
    // The same update again waits for the same outcome.
    let joined = Box::pin(instances.update(next("one"), GATE, WAIT));
    let (joined, removed) = tokio::join!(joined, async {
        tokio::task::yield_now().await;
        instances.remove(&name("one"), false, WAIT).await
    });
    assert_eq!(removed.unwrap(), Removal::Gone);
    assert!(matches!(joined, Err(Rejection::Superseded(_))), "{joined:?}");
    assert!(engine.ours().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_stopped_instance_runs_after_its_update_and_is_stopped_again_if_that_fails() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    agent.instances.stop(&name("one"), WAIT).await.unwrap();
    engine.manner_of_image("registry.example/server:2", Manner::Exits);
    rolled_back(agent.instances.update(next("one"), GATE, WAIT).await);
    assert_eq!(agent.state("one"), Some(InstanceState::Stopped));
    engine.manner_of_image("registry.example/server:2", Manner::Stays);
    assert!(agent.instances.update(next("one"), GATE, WAIT).await.unwrap().settled);
    assert_eq!(agent.state("one"), Some(InstanceState::Running));
}

#[tokio::test(start_paused = true)]
async fn the_ports_of_both_versions_are_promised_and_an_id_is_kept() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(with_port("one", 8081), WAIT).await.unwrap();
    agent.instances.deploy(with_port("two", 8082), WAIT).await.unwrap();
    let taken = agent.instances.update(with_port("one", 8082), GATE, WAIT).await;
    assert!(matches!(taken, Err(Rejection::PortTaken { port: 8082, .. })), "{taken:?}");
    let other_id = Spec { account_tool_instance_id: "another".parse().unwrap(), ..with_port("one", 8081) };
    let refused = agent.instances.update(other_id, GATE, WAIT).await;
    assert!(matches!(refused, Err(Rejection::OtherId { .. })), "{refused:?}");
    // Its own port is no obstacle, though the old version holds it until the new one is started.
    let same_port = Spec { labels: [("a".to_owned(), "b".to_owned())].into(), ..with_port("one", 8081) };
    assert!(agent.instances.update(same_port, GATE, WAIT).await.unwrap().settled);
    let nobody = agent.instances.update(with_port("three", 8083), GATE, WAIT).await;
    assert!(matches!(nobody, Err(Rejection::NotFound(_))), "{nobody:?}");
}

#[tokio::test(start_paused = true)]
async fn a_ledger_lost_when_neither_version_runs_does_not_leave_the_instance_stopped() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    // Pulled, created, the old one stopped; the new one is about to be started.
    engine.die_at(3, Death::Before);
    tokio::select! {
        result = agent.instances.update(next("one"), GATE, WAIT) => panic!("it should have died: {result:?}"),
        () = engine.died.notified() => {}
    }
    agent.kill().await;
    engine.live();
    assert!(engine.ours().values().all(|word| *word != "running"), "{:?}", engine.ours());
    std::fs::remove_file(directory.path().join("ledger.json")).unwrap();
    let agent = Agent::start(&engine, directory.path());
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(engine.ours(), running(&["one"]));
    agent.kill().await;
}
