//! What is said of a deploy beforehand, and what becomes of it then.

use dtma_api::instance::PullPolicy;
use dtma_api::validation::NameOutlook;

use super::*;

#[tokio::test(start_paused = true)]
async fn what_stands_in_the_way_is_foreseen_and_met() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(with_port("one", 8081), WAIT).await.unwrap();
    engine.stranger("somebody", Some(8082));
    let calls = engine.calls().len();

    let same = agent.instances.foresee(&with_port("one", 8081)).await;
    assert_eq!((same.clear, same.name, same.ports_taken), (true, NameOutlook::SameSpec, vec![]));
    let other = agent.instances.foresee(&examples::spec("one")).await;
    assert_eq!((other.clear, other.name), (false, NameOutlook::OtherSpec));
    let free = agent.instances.foresee(&examples::spec("two")).await;
    assert_eq!((free.clear, free.name, free.image.here), (true, NameOutlook::Free, Some(true)));
    let same_id = Spec { account_tool_instance_id: "id-one".parse().unwrap(), ..examples::spec("two") };
    let id_taken = agent.instances.foresee(&same_id).await;
    assert_eq!((id_taken.clear, id_taken.id_taken_by), (false, Some(name("one"))));
    for (port, holder) in [(8081, "instance one"), (8082, "container somebody")] {
        let taken = agent.instances.foresee(&with_port("two", port)).await;
        assert_eq!((taken.clear, taken.ports_taken.len()), (false, 1));
        assert_eq!((taken.ports_taken[0].port, taken.ports_taken[0].holder.as_str()), (port, holder));
    }
    let looked = |call: &String| ["image", "port_holder"].contains(&call.split(' ').next().unwrap());
    assert!(engine.calls()[calls..].iter().all(looked), "looking changed something: {:?}", engine.calls());

    // Whatever was foreseen is what happens.
    assert!(!agent.instances.deploy(with_port("one", 8081), WAIT).await.unwrap().created);
    assert!(matches!(agent.instances.deploy(examples::spec("one"), WAIT).await, Err(Rejection::Exists(_))));
    assert!(matches!(agent.instances.deploy(same_id, WAIT).await, Err(Rejection::IdTaken { .. })));
    for port in [8081, 8082] {
        assert!(agent.instances.deploy(with_port("two", port), WAIT).await.is_err());
    }
    assert!(agent.instances.deploy(examples::spec("two"), WAIT).await.unwrap().created);
}

#[tokio::test(start_paused = true)]
async fn an_image_is_here_or_has_to_be_pulled_or_cannot_be_had() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    let with = |pull_policy| Spec { pull_policy, ..examples::spec("one") };
    let image = async |policy| {
        let outlook = agent.instances.foresee(&with(policy)).await;
        (outlook.image.here, outlook.image.will_pull, outlook.clear)
    };
    assert_eq!(image(PullPolicy::IfNotPresent).await, (Some(false), Some(true), true));
    assert_eq!(image(PullPolicy::Never).await, (Some(false), Some(false), false));
    engine.have_image();
    assert_eq!(image(PullPolicy::IfNotPresent).await, (Some(true), Some(false), true));
    assert_eq!(image(PullPolicy::Always).await, (Some(true), Some(true), true));
    assert_eq!(image(PullPolicy::Never).await, (Some(true), Some(false), true));
}

#[tokio::test(start_paused = true)]
async fn without_docker_little_is_foreseen_and_nothing_is_promised() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.until(|snapshot| snapshot.engine.reachable).await;
    engine.gone();
    // The loop hasn't noticed yet.
    let outlook = agent.instances.foresee(&with_port("one", 8081)).await;
    assert_eq!((outlook.clear, outlook.docker_reachable, outlook.image.here), (false, false, None));
    agent.until(|snapshot| !snapshot.engine.reachable).await;
    assert!(!agent.instances.foresee(&with_port("one", 8081)).await.clear);
}
