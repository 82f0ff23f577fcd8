//! Containers of sessions: made when they are wanted and gone when they aren't, whoever dies when.

use super::*;
use crate::engine::{Container, ContainerId};
use crate::instance::{Egress, HealthGate, SessionId, SessionOf};

fn per_session(text: &str) -> Spec {
    let sessions = SessionMode::PerSession { most: 2 };
    let mcp = McpServer { transport: Transport::Stdio, port: 8080, path: "/mcp".to_owned(), sessions };
    Spec { mcp: Some(mcp), ..with_volume(text) }
}

/// A session with the server, with its container.
async fn session(agent: &Agent) -> (Place, ContainerId) {
    let upstream = agent.instances.upstream(&name("one")).unwrap();
    let mut place = agent.sessions.ask(&name("one"), &upstream.container, Some(2));
    let container = place.container().await.unwrap();
    (place, container)
}

/// Until as many containers of sessions are there.
async fn until_guests(engine: &FakeEngine, number: usize) {
    let there = async {
        while engine.guests().len() != number {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(3600), there).await.expect("it never came to that");
}

fn shown(agent: &Agent) -> Option<u32> {
    agent.instances.get(&name("one")).unwrap().sessions
}

#[tokio::test(start_paused = true)]
async fn each_session_has_a_container_as_long_as_it_lasts_and_the_instance_its_own() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    let deployed = agent.instances.deploy(per_session("one"), WAIT).await.unwrap();
    assert_eq!(shown(&agent), Some(0));
    let (first, second) = tokio::join!(session(&agent), session(&agent));
    assert_ne!(first.1, second.1);
    agent.until(|snapshot| snapshot.instances[0].sessions == Some(2)).await;
    let view = agent.instances.get(&name("one")).unwrap();
    assert_eq!(view.container_id, deployed.view.container_id);
    assert!(agent.instances.resolve(first.1.as_str()).is_err(), "a session's container is no name for the instance");

    // There may be two, so the next waits for one to be gone.
    let waits = session(&agent);
    let waits = async {
        tokio::pin!(waits);
        assert!(tokio::time::timeout(Duration::from_secs(5), &mut waits).await.is_err());
        assert_eq!(engine.guests().len(), 2);
        drop(first);
        waits.await
    };
    let third = waits.await;
    assert_eq!(engine.guests().len(), 2);
    drop((second, third));
    until_guests(&engine, 0).await;
    agent.until(|snapshot| snapshot.instances[0].sessions == Some(0)).await;
    assert_eq!(engine.ours(), running(&["one"]));
    assert_eq!(agent.instances.list()[0].restart_count, 0);
}

#[tokio::test(start_paused = true)]
async fn a_session_whose_process_ends_is_over_and_disturbs_nobody() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(per_session("one"), WAIT).await.unwrap();
    let ((mut killed, container), (other, _)) = tokio::join!(session(&agent), session(&agent));
    engine.end(&container, 137);
    assert_eq!(killed.over().await, "its process ended with exit code 137");
    until_guests(&engine, 1).await;
    assert_eq!(engine.ours(), running(&["one"]));
    assert!(!agent.events("one").iter().any(|event| event == "exited"), "the instance's own container goes on");
    drop(other);
    until_guests(&engine, 0).await;
}

#[tokio::test(start_paused = true)]
async fn who_goes_away_before_the_container_is_there_leaves_none() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(per_session("one"), WAIT).await.unwrap();
    for verb in ["create_for_session", "start"] {
        engine.hang(verb);
        let impatient = tokio::time::timeout(Duration::from_secs(3), session(&agent)).await;
        assert!(impatient.is_err(), "{verb}");
        engine.release();
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(engine.guests().len(), 0, "{verb}");
    }
    assert!(engine.calls().iter().any(|call| call.starts_with("create_for_session")));
}

#[tokio::test(start_paused = true)]
async fn a_container_that_can_not_be_had_is_said_to_whoever_asked_and_leaves_nothing() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(per_session("one"), WAIT).await.unwrap();
    let upstream = agent.instances.upstream(&name("one")).unwrap();
    for verb in ["create_for_session", "start"] {
        engine.fail(verb, refused);
        let mut place = agent.sessions.ask(&name("one"), &upstream.container, Some(2));
        assert_eq!(place.container().await, Err("Docker refused to do it: no".to_owned()), "{verb}");
        engine.heal();
        until_guests(&engine, 0).await;
    }
    assert_eq!(agent.events("one").iter().filter(|event| *event == "session_failed").count(), 2);
    let (_place, _) = session(&agent).await;
    assert_eq!(agent.state("one"), Some(InstanceState::Running));
}

#[tokio::test(start_paused = true)]
async fn a_removal_that_fails_is_tried_again() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(per_session("one"), WAIT).await.unwrap();
    let (place, _) = session(&agent).await;
    engine.fail("remove", refused);
    drop(place);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(engine.guests().len(), 1);
    engine.heal();
    until_guests(&engine, 0).await;
}

#[tokio::test(start_paused = true)]
async fn stop_restart_update_and_removal_end_all_sessions_before_they_are_done() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(per_session("one"), WAIT).await.unwrap();

    let (mut place, _) = session(&agent).await;
    agent.instances.stop(&name("one"), WAIT).await.unwrap();
    assert_eq!(
        (place.over().await.as_str(), engine.guests().len()),
        ("the instance was stopped, updated or removed", 0)
    );

    agent.instances.start(&name("one"), WAIT).await.unwrap();
    let (mut place, _) = session(&agent).await;
    agent.instances.restart(&name("one"), WAIT).await.unwrap();
    assert_eq!(place.over().await, "the instance was restarted");
    until_guests(&engine, 0).await;

    let (mut place, _) = session(&agent).await;
    let mut next = per_session("one");
    next.image = "registry.example/server:2".parse().unwrap();
    agent.instances.update(next, HealthGate::default(), WAIT).await.unwrap();
    place.over().await;
    until_guests(&engine, 0).await;

    let (mut place, _) = session(&agent).await;
    assert_eq!(agent.instances.remove(&name("one"), true, WAIT).await.unwrap(), Removal::Gone);
    place.over().await;
    assert_eq!((engine.guests().len(), engine.ours().len(), engine.volumes().len()), (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_update_that_is_rolled_back_leaves_sessions_as_they_are() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(per_session("one"), WAIT).await.unwrap();
    let (place, container) = session(&agent).await;
    engine.manner_of_image("registry.example/server:2", Manner::Exits);
    let mut next = per_session("one");
    next.image = "registry.example/server:2".parse().unwrap();
    let update = agent.instances.update(next, HealthGate::default(), WAIT).await;
    assert!(matches!(update, Err(Rejection::RolledBack { .. })), "{update:?}");
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    assert!(!engine.calls().contains(&format!("remove {}", container.as_str())));
    assert_eq!(shown(&agent), Some(1));
    drop(place);
    until_guests(&engine, 0).await;
}

#[tokio::test(start_paused = true)]
async fn death_at_any_call_for_a_session_leaves_the_instance_and_no_session() {
    for death in [Death::Before, Death::After] {
        let mut at = 0;
        loop {
            let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
            engine.stranger("stranger", None);
            let mut agent = Agent::start(&engine, directory.path());
            agent.instances.deploy(per_session("one"), WAIT).await.unwrap();
            engine.die_at(at, death);
            let life = async {
                let both = tokio::join!(session(&agent), session(&agent));
                drop(both.0);
                until_guests(&engine, 1).await;
            };
            let died = tokio::select! {
                () = life => false,
                () = engine.died.notified() => true,
            };
            engine.live();
            if died {
                agent.kill().await;
                agent = Agent::start(&engine, directory.path());
            }
            // The other session lasts until its agent dies, or its client goes away.
            until_guests(&engine, 0).await;
            assert_eq!(engine.ours(), running(&["one"]), "death {death:?} call {at}: {:?}", engine.calls());
            assert_eq!((engine.strangers(), engine.volumes().len()), (1, 1));
            let (place, _) = session(&agent).await;
            assert_eq!(agent.state("one"), Some(InstanceState::Running));
            assert!(agent.instances.remove(&name("one"), true, WAIT).await.is_ok());
            drop(place);
            assert_eq!((engine.guests().len(), engine.volumes().len()), (0, 0), "death {death:?} call {at}");
            agent.kill().await;
            if !died {
                break;
            }
            at += 1;
        }
        assert!(at >= 6, "only {at} calls");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_ledger_is_put_together_from_instances_and_never_from_sessions() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(per_session("one"), WAIT).await.unwrap();
    let _places = tokio::join!(session(&agent), session(&agent));
    let main = agent.instances.upstream(&name("one")).unwrap().container;
    agent.kill().await;
    let emptied = tempfile::tempdir().unwrap();
    let agent = Agent::start(&engine, emptied.path());
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    until_guests(&engine, 0).await;
    assert_eq!(agent.instances.upstream(&name("one")).unwrap().container, main);
    assert_eq!(engine.ours(), running(&["one"]));
}

#[tokio::test(start_paused = true)]
async fn a_session_goes_out_where_its_instance_may_for_as_long_as_it_lasts() {
    use crate::egress::Directory as _;

    let residents = super::super::residents::Residents::default();
    let mut spec = per_session("one");
    spec.network.egress = Egress::AllowList(["a.b".parse().unwrap()].into());
    let session = SessionOf { id: SessionId(uuid::Uuid::from_u128(1)), instance: name("one") };
    let (own, reached) = ([172, 30, 0, 9].into(), [172, 30, 0, 10].into());
    let container = Container { own_address: Some(own), address: Some(reached), ..blank_container() };
    residents.guest_moves_in(&session, &spec, &container);
    assert_eq!(residents.resident(own).map(|resident| resident.instance), Some(name("one")));
    assert!(residents.is_instance(own) && residents.is_instance(reached));
    assert!(residents.resident(reached).is_none());
    residents.keep_guests(|_| false);
    assert!(residents.resident(own).is_none() && !residents.is_instance(reached));
}
