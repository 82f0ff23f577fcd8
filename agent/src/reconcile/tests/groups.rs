//! Groups: in order, a few at a time, and one for all where that is asked for.

use std::collections::BTreeSet;

use dtma_api::GroupId;

use super::*;
use crate::instance::GroupPlan;

fn id() -> GroupId {
    "group".parse().unwrap()
}

/// A member; with `:2` at the end of its name its image is the second one.
pub(super) fn member(text: &str) -> Spec {
    let (plain, version) = text.split_once(':').unwrap_or((text, "1"));
    let image = format!("registry.example/server:{version}").parse().unwrap();
    Spec { image, group: Some(id()), ..with_volume(plain) }
}

/// A group of these members, those in `order` one after the other.
pub(super) fn plan(members: &[&str], order: &[&str], atomic: bool) -> GroupPlan {
    let pairs = order.windows(2).map(|pair| (name(pair[1]), BTreeSet::from([name(pair[0])])));
    GroupPlan {
        id: id(),
        servers: members.iter().map(|text| member(text)).collect(),
        after: pairs.collect(),
        atomic,
        most_at_once: 2,
        warnings: Vec::new(),
    }
}

fn outcome(result: &Result<Deployment, Rejection>) -> &'static str {
    match result {
        Ok(Deployment { settled: true, .. }) => "runs",
        Ok(_) => "comes",
        Err(Rejection::Failed(failure)) => match failure.kind {
            FailureKind::MemberFailed { .. } => "member failed",
            FailureKind::Exited { .. } => "exited",
            _ => "failed",
        },
        Err(Rejection::Exists(_)) => "exists",
        Err(_) => "rejected",
    }
}

async fn deploy(agent: &Agent, plan: GroupPlan) -> BTreeMap<String, &'static str> {
    let deployment = agent.instances.deploy_group(plan, WAIT).await.unwrap();
    deployment.members.iter().map(|(name, result)| (name.to_string(), outcome(result))).collect()
}

fn all(pairs: &[(&str, &'static str)]) -> BTreeMap<String, &'static str> {
    pairs.iter().map(|(name, word)| ((*name).to_owned(), *word)).collect()
}

#[tokio::test(start_paused = true)]
async fn members_come_in_their_order_and_never_more_than_so_many_at_once() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    engine.have_image();
    let agent = Agent::start(&engine, directory.path());
    let told = deploy(&agent, plan(&["aa", "bb", "cc", "dd", "ee"], &["ee", "cc"], false)).await;
    assert_eq!(told, all(&[("aa", "runs"), ("bb", "runs"), ("cc", "runs"), ("dd", "runs"), ("ee", "runs")]));
    let (events, _) = agent.instances.events_with_history();
    let at = |text: &str, what: &str| {
        events.iter().position(|event| event.instance_name_on_toolbox.as_str() == text && event.event == what).unwrap()
    };
    assert!(at("ee", "running") < at("cc", "creating"), "{events:?}");
    let mut busy = 0;
    for event in &events {
        match event.event.as_str() {
            "creating" => busy += 1,
            "running" => busy -= 1,
            _ => {}
        }
        assert!(busy <= 2, "{events:?}");
    }
    let again = agent.instances.deploy_group(plan(&["aa", "bb"], &[], true), WAIT).await.unwrap();
    assert!(again.members.values().all(|member| member.as_ref().is_ok_and(|member| !member.created)));
    assert!(agent.instances.list().iter().all(|view| view.group_id == Some(id())));
}

#[tokio::test(start_paused = true)]
async fn one_that_fails_takes_those_after_it_along_and_nobody_else() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    engine.manner_of_image("registry.example/server:2", Manner::Exits);
    let told = deploy(&agent, plan(&["aa", "bb:2", "cc", "dd"], &["bb", "cc", "dd"], false)).await;
    assert_eq!(told, all(&[("aa", "runs"), ("bb", "exited"), ("cc", "member failed"), ("dd", "member failed")]));
    assert_eq!(engine.ours(), running(&["aa"]));
    assert_eq!(engine.volumes(), ["aa.data"]);
}

#[tokio::test(start_paused = true)]
async fn of_an_atomic_group_all_come_or_none() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    engine.manner_of_image("registry.example/server:2", Manner::Exits);
    agent.instances.deploy(member("aa"), WAIT).await.unwrap();
    let told = deploy(&agent, plan(&["aa", "bb", "cc", "dd:2"], &["bb", "dd"], true)).await;
    // One that was there before isn't this request's to take back.
    assert_eq!(told, all(&[("aa", "runs"), ("bb", "member failed"), ("cc", "member failed"), ("dd", "exited")]));
    assert_eq!(engine.ours(), running(&["aa"]));
    // One that can't even be accepted, and nothing is begun.
    let creates = || engine.calls().iter().filter(|call| call.starts_with("create")).count();
    let before = creates();
    let told = agent.instances.deploy_group(plan(&["aa:2", "ee"], &[], true), WAIT).await.unwrap();
    assert!(told.refused);
    assert_eq!(outcome(&told.members[&name("aa")]), "exists");
    assert_eq!(outcome(&told.members[&name("ee")]), "member failed");
    assert_eq!(creates(), before);
    let told = deploy(&agent, plan(&["aa:2", "ee", "ff"], &["aa", "ff"], false)).await;
    assert_eq!(told, all(&[("aa", "exists"), ("ee", "runs"), ("ff", "member failed")]));
}

#[tokio::test(start_paused = true)]
async fn a_group_is_removed_with_all_its_members_and_nobody_else() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("alone"), WAIT).await.unwrap();
    deploy(&agent, plan(&["aa", "bb"], &[], false)).await;
    let removal = agent.instances.remove_group(&id(), Some(0), WAIT).await.unwrap();
    assert_eq!((removal.gone, removal.going), (vec![name("aa"), name("bb")], vec![]));
    assert_eq!(engine.ours(), running(&["alone"]));
    let again = agent.instances.remove_group(&id(), None, WAIT).await;
    assert!(matches!(again, Err(Rejection::NoGroup(_))), "{again:?}");
}
