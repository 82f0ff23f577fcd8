//! What callers are told before the engine has answered for the first time.

use super::*;
use crate::instance::Unresolved;

#[tokio::test(start_paused = true)]
async fn what_was_promised_is_found_although_the_engine_does_not_answer_yet() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    agent.kill().await;
    // As an engine does whose socket is there before it is.
    engine.hang("list");
    engine.hang("version");
    let agent = Agent::start(&engine, directory.path());
    assert_eq!(agent.instances.find("one").await, Ok(name("one")));
    let nothing = Missing::Unresolved(Unresolved::Unknown("two".to_owned()));
    assert_eq!(agent.instances.find("two").await, Err(nothing));
    assert!(matches!(agent.instances.start(&name("one"), NO_WAIT).await, Err(Rejection::EngineUnavailable)));
    assert_eq!(agent.instances.tool_statuses(), [], "nobody can say that it is broken");
    engine.release();
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
}

#[tokio::test(start_paused = true)]
async fn without_ledger_and_engine_nobody_can_say_what_is_not_there() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy(mcp("one"), WAIT).await.unwrap();
    agent.kill().await;
    std::fs::remove_file(directory.path().join("ledger.json")).unwrap();
    engine.gone();
    let agent = Agent::start(&engine, directory.path());
    assert_eq!(agent.instances.find("one").await, Err(Missing::Unseen));
    engine.heal();
    agent.until(|snapshot| snapshot.complete).await;
    assert_eq!(agent.instances.find("one").await, Ok(name("one")));
}
