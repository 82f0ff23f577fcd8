//! Images: credentials for pulling them, room for them, and taking away what nobody needs.

use super::*;
use crate::instance::RegistryCredentials;

const PRIVATE: &str = "registry.example/private:1";

fn with_image(name: &str, image: &str) -> Spec {
    Spec { image: image.parse().unwrap(), ..examples::spec(name) }
}

fn password(text: &str) -> Option<RegistryCredentials> {
    Some(RegistryCredentials::Password { username: "somebody".to_owned(), password: text.to_owned().into() })
}

/// An agent that keeps unused images for no time at all.
fn impatient(engine: &Arc<FakeEngine>, directory: &Path) -> Agent {
    let answers = Arc::new(Answers::new());
    let shutdown = CancellationToken::new();
    let (instances, task) = start(Parts {
        engine: Arc::clone(engine) as Arc<dyn crate::engine::Engine>,
        ledger: Ledger::open(directory, Timestamp::UNIX_EPOCH).unwrap(),
        prober: Arc::clone(&answers) as Arc<dyn Prober>,
        disks: Arc::clone(&engine.disks),
        secrets: Secrets { vault: secrets::vault(directory), source: Arc::new(secrets::Backend::default()) },
        sessions: Sessions::default(),
        timing: Timing { image_max_age: Duration::ZERO, ..Timing::default() },
        shutdown: shutdown.clone(),
    });
    Agent { instances, task, shutdown, answers, sessions: Sessions::default() }
}

/// Long enough for more than one look at every image.
async fn hours() {
    tokio::time::sleep(Duration::from_secs(3 * 3600)).await;
}

fn pulls(engine: &FakeEngine) -> usize {
    engine.calls().iter().filter(|call| call.starts_with("pull ")).count()
}

#[tokio::test(start_paused = true)]
async fn credentials_are_used_for_pulling_and_are_no_part_of_the_spec() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    engine.publish(PRIVATE, Some("hunter2"));
    let agent = Agent::start(&engine, directory.path());
    let spec = with_image("one", PRIVATE);
    for wrong in [None, password("wrong")] {
        let denied = failure(agent.instances.deploy_with(spec.clone(), wrong, WAIT).await);
        assert_eq!(denied.kind, FailureKind::PullDenied);
        assert!(!denied.message.contains("repeat the deploy"), "{}", denied.message);
    }
    let made = agent.instances.deploy_with(spec.clone(), password("hunter2"), WAIT).await.unwrap();
    assert!(made.created && made.settled);
    for same in [None, password("another")] {
        let again = agent.instances.deploy_with(spec.clone(), same, WAIT).await.unwrap();
        assert_eq!((again.created, again.view.container_id), (false, made.view.container_id.clone()));
    }
    let ledger = std::fs::read_to_string(directory.path().join("ledger.json")).unwrap();
    let (events, _) = agent.instances.events_with_history();
    for told in [ledger, format!("{events:?} {:?}", agent.instances.snapshot())] {
        assert!(!told.contains("hunter2") && !told.contains("somebody"), "{told}");
    }
}

#[tokio::test(start_paused = true)]
async fn lost_credentials_are_asked_for_only_when_they_are_needed() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    engine.publish(PRIVATE, Some("hunter2"));
    let agent = Agent::start(&engine, directory.path());
    let spec = with_image("one", PRIVATE);
    agent.instances.deploy_with(spec.clone(), password("hunter2"), WAIT).await.unwrap();
    agent.kill().await;

    // The image is there: a new container needs no registry.
    let agent = Agent::start(&engine, directory.path());
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    engine.steal("one");
    agent.until(|snapshot| snapshot.instances[0].status == "pending").await;
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    assert_eq!(pulls(&engine), 1);

    // It isn't any more.
    engine.forget_images();
    engine.steal("one");
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Failed)).await;
    let told = agent.instances.get(&name("one")).unwrap().error.unwrap();
    assert!(told.contains("repeat the deploy") && told.contains("registryCredentials"), "{told}");
    let again = agent.instances.deploy_with(spec, password("hunter2"), WAIT).await.unwrap();
    assert!(!again.created && again.view.state == InstanceState::Running, "{again:?}");
    agent.instances.remove(&name("one"), false, WAIT).await.unwrap();
    // Removed, it has no secrets and needs none.
    let denied = failure(agent.instances.deploy(with_image("one", "registry.example/missing:1"), WAIT).await);
    assert_eq!(denied.kind, FailureKind::ImageNotFound);
}

#[tokio::test(start_paused = true)]
async fn an_image_goes_when_nobody_has_used_it_for_long_and_nobody_elses_ever_does() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    engine.publish("registry.example/two:1", None);
    engine.publish("registry.example/stopped:1", None);
    engine.have("somebody/else:1");
    engine.have("registry.example/server:1");
    let agent = impatient(&engine, directory.path());
    // The first was there; its deploy doesn't make it the agent's, not even when it is pulled again.
    let always = Spec { pull_policy: dtma_api::instance::PullPolicy::Always, ..examples::spec("one") };
    agent.instances.deploy(always, WAIT).await.unwrap();
    agent.instances.deploy(with_image("two", "registry.example/two:1"), WAIT).await.unwrap();
    agent.instances.deploy(with_image("three", "registry.example/stopped:1"), WAIT).await.unwrap();
    agent.instances.stop(&name("three"), WAIT).await.unwrap();
    hours().await;
    assert_eq!(engine.image_names().len(), 4, "all are in use, or not the agent's");
    for gone in ["one", "two"] {
        agent.instances.remove(&name(gone), false, WAIT).await.unwrap();
    }
    hours().await;
    assert_eq!(engine.image_names(), ["registry.example/server:1", "registry.example/stopped:1", "somebody/else:1"]);
    assert_eq!(agent.instances.pruned(), Pruned { by_age: 1, for_room: 0 });

    // What an entry names stays even when somebody took its container away and the agent is a new one.
    agent.kill().await;
    engine.steal("three");
    let agent = impatient(&engine, directory.path());
    hours().await;
    assert_eq!(engine.image_names().len(), 3);
    agent.instances.remove(&name("three"), false, WAIT).await.unwrap();
    hours().await;
    assert_eq!(engine.image_names(), ["registry.example/server:1", "somebody/else:1"]);
}

#[tokio::test(start_paused = true)]
async fn a_short_disk_costs_unused_images_first_and_refuses_only_then() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    for image in ["aa", "bb", "cc", "dd"] {
        engine.publish(&format!("registry.example/{image}:1"), None);
    }
    let agent = Agent::start(&engine, directory.path());
    let deploy = |word: &str| agent.instances.deploy(with_image(word, &format!("registry.example/{word}:1")), WAIT);
    // Three images fit; with a fourth the disk is short.
    for word in ["aa", "bb", "cc"] {
        deploy(word).await.unwrap();
        if word != "cc" {
            agent.instances.remove(&name(word), false, WAIT).await.unwrap();
        }
    }
    engine.have("somebody/else:1");
    let made = deploy("dd").await.unwrap();
    assert_eq!(made.view.state, InstanceState::Running);
    let there = engine.image_names();
    assert!(!there.contains(&"registry.example/aa:1".to_owned()), "the oldest went: {there:?}");
    assert!(there.contains(&"somebody/else:1".to_owned()) && there.contains(&"registry.example/cc:1".to_owned()));
    assert_eq!(agent.instances.pruned().for_room, 1);

    // Nothing left to remove: refused, with figures, and nothing is left of the deploy.
    agent.instances.remove(&name("dd"), false, WAIT).await.unwrap();
    for stranger in ["x:1", "y:1", "z:1"] {
        engine.have(stranger);
    }
    let before = pulls(&engine);
    let refused = failure(deploy("aa").await);
    assert_eq!(refused.kind, FailureKind::NoSpace);
    assert!(refused.message.contains("MiB are free on the disk of"), "{}", refused.message);
    assert_eq!((pulls(&engine), agent.state("aa"), agent.state("cc")), (before, None, Some(InstanceState::Running)));
    assert!(engine.image_names().iter().all(|name| !name.starts_with("registry.example/") || name.contains("/cc:")));
}

#[tokio::test(start_paused = true)]
async fn a_deploy_waits_for_the_end_of_its_images_removal() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = impatient(&engine, directory.path());
    agent.instances.deploy(examples::spec("one"), WAIT).await.unwrap();
    agent.instances.remove(&name("one"), false, WAIT).await.unwrap();
    engine.hang("remove_image");
    hours().await;
    assert!(engine.calls().iter().any(|call| call.starts_with("remove_image ")));
    // The image can still be seen, and is not believed in.
    let waiting = agent.instances.deploy(examples::spec("one"), Duration::from_secs(5)).await.unwrap();
    assert!(!waiting.settled);
    assert_eq!(pulls(&engine), 1);
    assert!(
        !engine
            .calls()
            .iter()
            .rev()
            .take_while(|call| !call.starts_with("remove_image"))
            .any(|call| call.starts_with("create"))
    );
    engine.release();
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    assert_eq!(pulls(&engine), 2, "it was pulled anew");
}

#[tokio::test(start_paused = true)]
async fn each_member_of_a_group_has_credentials_of_its_own() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    engine.publish(PRIVATE, Some("hunter2"));
    let agent = Agent::start(&engine, directory.path());
    let mut plan = groups::plan(&["one", "two", "three"], &[], false);
    for server in &mut plan.servers {
        server.image = PRIVATE.parse().unwrap();
    }
    let given = [("one", "hunter2"), ("two", "wrong")].map(|(of, text)| (name(of), password(text).into()));
    let deployment = agent.instances.deploy_group_with(plan, given.into(), WAIT).await.unwrap();
    let runs = |of: &str| deployment.members[&name(of)].is_ok();
    // Whoever comes after the first finds its image, so whether they need theirs is open; without any of it nobody runs.
    assert!(runs("one"));
    let ledger = std::fs::read_to_string(directory.path().join("ledger.json")).unwrap();
    assert!(
        ledger.contains("with_credentials") && !ledger.contains("hunter2") && !ledger.contains("wrong"),
        "{ledger}"
    );
}

#[tokio::test(start_paused = true)]
async fn an_update_brings_credentials_of_its_own_and_an_image_that_stays_while_it_is_tried() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    engine.publish(PRIVATE, Some("hunter2"));
    let agent = impatient(&engine, directory.path());
    agent.instances.deploy(examples::spec("one"), WAIT).await.unwrap();
    let gate = crate::instance::HealthGate { timeout_seconds: 30, successes: 1 };
    let next = with_image("one", PRIVATE);
    let denied = agent.instances.update(next.clone(), gate, WAIT).await;
    assert!(matches!(denied, Err(Rejection::RolledBack { .. })), "{denied:?}");
    // Nobody starts the new version, but it is promised.
    engine.hang("create");
    let waiting = agent.instances.update_with(next.clone(), gate, password("hunter2"), Duration::from_secs(5)).await;
    assert!(!waiting.unwrap().settled);
    hours().await;
    assert!(engine.image_names().contains(&PRIVATE.to_owned()), "{:?}", engine.image_names());
    engine.release();
    agent.until(|snapshot| snapshot.instances[0].image == PRIVATE && snapshot.instances[0].status == "running").await;
    hours().await;
    assert_eq!(engine.image_names(), [PRIVATE], "the old version's image goes");
}
