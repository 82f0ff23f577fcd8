//! Callers who want different things of one name at once, and people who meddle with its container meanwhile.

use super::*;

/// Lets a caller ask, and no more: what it is answered it only sees when it is awaited.
async fn ask<F: Future>(mut asking: std::pin::Pin<Box<F>>, until: impl Fn() -> bool) -> std::pin::Pin<Box<F>> {
    while !until() {
        assert!(futures_util::poll!(&mut asking).is_pending());
        tokio::task::yield_now().await;
    }
    asking
}

#[tokio::test(start_paused = true)]
async fn a_removal_is_done_although_the_name_was_deployed_anew_before_its_caller_looked() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(examples::spec("one"), WAIT).await.unwrap();
    let one = name("one");
    let removing = Box::pin(agent.instances.remove(&one, false, WAIT));
    let removing = ask(removing, || agent.state("one") != Some(InstanceState::Running)).await;
    agent.until(|snapshot| snapshot.instances.is_empty()).await;
    assert!(agent.instances.deploy(examples::spec("one"), WAIT).await.unwrap().created);
    assert_eq!(removing.await.unwrap(), Removal::Gone);
    assert_eq!(engine.ours(), running(&["one"]));
}

#[tokio::test(start_paused = true)]
async fn a_deploy_that_failed_is_told_so_although_the_name_was_deployed_anew_before_its_caller_looked() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    engine.fail("start", refused);
    let deploying = Box::pin(agent.instances.deploy(examples::spec("one"), WAIT));
    let deploying = ask(deploying, || agent.events("one").contains(&"removed".to_owned())).await;
    agent.until(|snapshot| snapshot.instances.is_empty()).await;
    engine.heal();
    assert!(agent.instances.deploy(with_port("one", 8081), WAIT).await.unwrap().created);
    assert_eq!(failure(deploying.await).kind, FailureKind::Refused);
    let told = agent.instances.tool_statuses();
    assert_eq!(told.iter().map(|tool| tool.status_on_toolbox).collect::<Vec<_>>(), [InstallationStatus::Running]);
}

#[tokio::test(start_paused = true)]
async fn what_somebody_paused_is_woken() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(examples::spec("one"), WAIT).await.unwrap();
    engine.meddle("one", |container| container.condition = Condition::Paused);
    agent.until(|snapshot| state_in(snapshot, "one") != Some(InstanceState::Running)).await;
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    assert_eq!(engine.ours().get("one"), Some(&"running"));
    assert!(agent.events("one").contains(&"paused".to_owned()), "{:?}", agent.events("one"));
}

#[tokio::test(start_paused = true)]
async fn a_container_renamed_or_given_other_limits_from_outside_is_put_right_and_runs_on() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(examples::spec("one"), WAIT).await.unwrap();
    let before = agent.instances.get(&name("one")).unwrap();
    engine.meddle("one", |container| {
        container.name = "mine-now".to_owned();
        container.settings.limits.memory_bytes = 0;
    });
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(engine.ours(), running(&["one"]));
    let calls = engine.calls();
    let count = |verb: &str| calls.iter().filter(|call| call.starts_with(verb)).count();
    assert_eq!((count("rename"), count("adjust"), count("start"), count("remove")), (1, 1, 1, 0), "{calls:?}");
    let after = agent.instances.get(&name("one")).unwrap();
    assert_eq!((after.container_id, after.started_at), (before.container_id, before.started_at));
    assert_eq!(after.state, InstanceState::Running);
}

#[tokio::test(start_paused = true)]
async fn limits_the_engine_will_not_keep_are_not_asked_for_again_and_again() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(examples::spec("one"), WAIT).await.unwrap();
    engine.forget_adjustments();
    engine.meddle("one", |container| container.settings.limits.pids = 0);
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(engine.calls().iter().filter(|call| call.starts_with("adjust")).count(), 1);
    assert_eq!(agent.state("one"), Some(InstanceState::Running));
}

#[tokio::test(start_paused = true)]
async fn a_container_that_is_only_being_made_is_waited_for_and_no_stranger() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    engine.reserve("one");
    let agent = Agent::start(&engine, directory.path());
    let deploying = {
        let instances = agent.instances.clone();
        tokio::spawn(async move { instances.deploy(examples::spec("one"), WAIT).await })
    };
    tokio::time::sleep(Duration::from_secs(3)).await;
    engine.finish(&examples::spec("one"));
    assert!(deploying.await.unwrap().unwrap().settled);
    assert_eq!(
        (engine.ours(), engine.calls().iter().filter(|call| *call == "start container-001").count()),
        (running(&["one"]), 1)
    );
    // A name that is taken and that nobody is ever seen to have isn't waited for without end.
    engine.reserve("two");
    let failed = failure(agent.instances.deploy(examples::spec("two"), WAIT).await);
    assert_eq!(failed.kind, FailureKind::NameConflict);
}

#[tokio::test(start_paused = true)]
async fn a_stop_is_over_when_it_is_stopped_and_not_when_docker_has_been_told_so() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(examples::spec("one"), WAIT).await.unwrap();
    engine.revive("one");
    let stopped = agent.instances.stop(&name("one"), WAIT).await.unwrap();
    assert!(stopped.settled);
    assert_eq!((stopped.view.state, engine.ours()["one"]), (InstanceState::Stopped, "exited"));
}

#[tokio::test(start_paused = true)]
async fn what_is_accepted_while_the_engine_takes_its_time_can_be_found() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(examples::spec("one"), WAIT).await.unwrap();
    engine.hang("list");
    engine.steal("one");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let accepted = agent.instances.deploy(examples::spec("two"), NO_WAIT).await.unwrap();
    assert!(!accepted.settled);
    assert_eq!(agent.instances.resolve("two").unwrap(), name("two"));
    assert!(!agent.instances.stop(&name("two"), NO_WAIT).await.unwrap().settled);
}
