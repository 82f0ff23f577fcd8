//! An agent that was taken back to a version older than the one that wrote its ledger.

use serde_json::{Value, json};

use super::*;
use crate::instance::{Confidential, SecretSources, SecretValues};

fn with_key(text: &str) -> Spec {
    let secrets = SecretSources { given: [("KEY".parse().unwrap())].into(), ..SecretSources::default() };
    Spec { secrets, ..mcp(text) }
}

fn given(value: &str) -> Confidential {
    let values = [("KEY".parse().unwrap(), value.to_owned().into())];
    Confidential { registry: None, secrets: SecretValues(values.into()) }
}

/// Changes the ledger as another agent would.
fn rewrite(directory: &Path, change: impl FnOnce(&mut Value)) {
    let path = directory.join("ledger.json");
    let text = std::fs::read(&path).unwrap();
    let mut body: Value = serde_json::from_slice(text.splitn(2, |byte| *byte == b'\n').nth(1).unwrap()).unwrap();
    change(&mut body);
    std::fs::write(&path, crate::store::ledger::fuzzed::with_header(body.to_string().as_bytes())).unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_instance_this_agent_can_not_read_is_left_alone_until_one_comes_that_can() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy_with(with_key("one"), given("1"), WAIT).await.unwrap();
    agent.instances.deploy(mcp("two"), WAIT).await.unwrap();
    agent.kill().await;
    rewrite(directory.path(), |body| {
        body["entries"]["one"]["intent"] = json!("hibernate");
        body["entries"]["two"]["last_update"] = json!({
            "deployment": uuid::Uuid::nil(), "at": "2030-01-01T00:00:00Z",
            "failure": {"kind": {"melted": {"degrees": 900}}, "message": "it melted"},
        });
        body["of_the_future"] = json!(1);
    });

    let agent = Agent::start(&engine, directory.path());
    agent.until(|snapshot| state_in(snapshot, "two") == Some(InstanceState::Running)).await;
    assert!(agent.instances.snapshot().complete, "nothing had to be put together again");
    assert_eq!(agent.state("one"), None);
    let refused = agent.instances.deploy_with(with_key("one"), given("2"), WAIT).await;
    assert!(matches!(refused, Err(Rejection::Unread(_))), "{refused:?}");
    agent.instances.stop(&name("two"), WAIT).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(engine.ours(), BTreeMap::from([("one".to_owned(), "running"), ("two".to_owned(), "exited")]));
    agent.kill().await;

    rewrite(directory.path(), |body| {
        assert_eq!(body["entries"]["one"]["intent"], "hibernate");
        assert_eq!(body["entries"]["two"]["last_update"]["failure"]["kind"], json!({"melted": {"degrees": 900}}));
        body["entries"]["one"]["intent"] = json!("run");
    });
    let agent = Agent::start(&engine, directory.path());
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    // With its secret, which nobody had to give again.
    agent.instances.restart(&name("one"), WAIT).await.unwrap();
    assert_eq!(engine.calls().iter().filter(|call| call.starts_with("create")).count(), 2);
}
