//! What instances may reach, as far as the loop has to do with it.

use super::*;
use crate::egress::EgressState;
use crate::engine::Link;
use crate::instance::{Egress, FailureKind};

fn listed(name: &str) -> Spec {
    let mut spec = examples::spec(name);
    spec.network.egress = Egress::AllowList(["api.example.com".parse().unwrap()].into());
    spec
}

#[tokio::test(start_paused = true)]
async fn an_instance_whose_only_way_out_cannot_be_opened_is_not_made_and_says_why() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    assert_eq!(agent.instances.egress().state(), EgressState::Unneeded);
    let failure = failure(agent.instances.deploy(listed("one"), WAIT).await);
    assert_eq!(failure.kind, FailureKind::EgressUnavailable);
    assert!(failure.message.contains("the egress proxy can't listen on 192.0.2.1:3128"), "{}", failure.message);
    assert!(!engine.calls().iter().any(|call| call.starts_with("create")), "{:?}", engine.calls());
    assert!(agent.instances.list().is_empty());
    assert!(matches!(agent.instances.egress().state(), EgressState::Closed { .. }));
    // Nobody else is any the worse for it.
    agent.instances.deploy(examples::spec("two"), WAIT).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_way_out_is_tried_again_for_instances_that_run_already() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    engine.here(&listed("one"));
    agent.instances.deploy(examples::spec("two"), WAIT).await.unwrap();
    agent.kill().await;
    std::fs::remove_file(directory.path().join("ledger.json")).unwrap();
    let agent = Agent::start(&engine, directory.path());
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    let asked = || engine.calls().iter().filter(|call| call.starts_with("egress_gateway")).count();
    let (first, mut published) = (asked(), agent.instances.watch_snapshots());
    while asked() < first + 2 {
        published.changed().await.unwrap();
    }
    assert!(matches!(agent.instances.egress().state(), EgressState::Closed { .. }));
}

#[tokio::test(start_paused = true)]
async fn a_network_that_vanishes_under_an_instance_is_put_right() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    let mut spec = examples::spec("one");
    spec.network.group = Some("team".parse().unwrap());
    let before = agent.instances.deploy(spec, WAIT).await.unwrap().view.container_id;
    engine.meddle("one", |container| {
        assert!(container.links.remove(&Link::Group("team".parse().unwrap())));
    });
    agent
        .until(|snapshot| {
            let view = snapshot.instances.first().unwrap();
            view.state == InstanceState::Running && view.container_id != before && !view.container_id.is_empty()
        })
        .await;
    assert_eq!(engine.ours(), running(&["one"]));
}
