//! Secrets on a real engine: the server has them, and nothing that Docker or the agent keeps on a disk does.

use std::path::{Path, PathBuf};
use std::process::Command;

use axum::http::{Method, StatusCode};
use dtma_agent::store::vault::Vault;
use serde_json::{Value, json};

use super::host::agent::{Agent, body};
use super::host::{Host, docker, docker_may_fail};

/// A folder in memory that the engine's host has too.
fn memory() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("dtma-secrets-").tempdir_in("/dev/shm").unwrap()
}

fn marker() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// Every file below `places` with `text` in it.
fn found(text: &str, places: &[PathBuf]) -> Vec<String> {
    let output = Command::new("grep").args(["-rlaF", text]).args(places).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// Where anything of an instance could be: the agent's state, Docker's own, and what the container has written. Layers of images, and
/// other containers', are left out: nothing of an instance gets there.
fn places(host: &Host, container: &str, state: &Path) -> Vec<PathBuf> {
    let root = PathBuf::from(docker(&["info", "--format", "{{.DockerRootDir}}"]));
    let layer = host.inspect(container)["GraphDriver"]["Data"]["UpperDir"].as_str().unwrap().to_owned();
    let mut places = vec![state.to_owned(), layer.into()];
    for entry in std::fs::read_dir(&root).unwrap() {
        let entry = entry.unwrap();
        if !["overlay2", "vfs", "tmp"].iter().any(|other| entry.file_name() == *other) {
            places.push(entry.path());
        }
    }
    assert!(places.iter().any(|place| place.ends_with("containers")), "{places:?}");
    places
}

async fn read(agent: &Agent, instance: &str, path: &str) -> String {
    let (status, answer) = agent.post(&format!("/tools/{instance}/exec"), &json!({ "command": ["cat", path] })).await;
    assert_eq!((status, &answer["exit_code"]), (StatusCode::OK, &json!(0)), "{answer}");
    answer["stdout"].as_str().unwrap().to_owned()
}

/// The environment of the server's own process: the one below Docker's init.
fn environment(host: &Host, container: &str) -> String {
    let init = host.inspect(container)["State"]["Pid"].clone();
    let children = std::fs::read_to_string(format!("/proc/{init}/task/{init}/children")).unwrap();
    let server = children.split_whitespace().next().unwrap();
    String::from_utf8_lossy(&std::fs::read(format!("/proc/{server}/environ")).unwrap()).replace('\0', "\n")
}

/// An image that just sleeps, and can be looked into.
fn asked(host: &Host, word: &str, secret: &str, more: Value) -> Value {
    let image = format!("dtma-test/{}:shell", host.scope);
    let mut body = body(host, word, json!({ "dockerImageUrl": image, "secrets": { "API_KEY": secret } }));
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_secret_is_read_in_the_container_and_found_on_no_disk() {
    let (host, state, memory) = (Host::new(), tempfile::tempdir().unwrap(), memory());
    host.with_shell();
    let vault = Vault::new(memory.path(), &host.scope, false);
    let agent = Agent::start_with_vault(&host, state.path(), vault);
    let (files, variables, control) = (marker(), marker(), marker());
    let (one, two) = (host.name("one"), host.name("two"));
    // As somebody who is nobody in particular, with a root file system that can't be written.
    let more = json!({
        "baseConfigOverrideJson": { "User": "1234:1234", "HostConfig": { "ReadonlyRootfs": true } },
        "environmentVariables": { "CONTROL": control },
    });
    let (status, answer) = agent.deploy(&asked(&host, "one", &files, more)).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let (status, answer) = agent.deploy(&asked(&host, "two", &variables, json!({ "secretsAs": "environment" }))).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");

    assert_eq!(read(&agent, &one, "/run/secrets/API_KEY").await, files);
    let (_, told) =
        agent.post(&format!("/tools/{one}/exec"), &json!({ "command": ["sh", "-c", "echo x > /run/secrets/x"] })).await;
    assert!(told["exit_code"].as_i64().unwrap() > 0, "it is read-only: {told}");
    assert!(environment(&host, &one).contains("API_KEY_FILE=/run/secrets/API_KEY"));
    assert!(environment(&host, &two).contains(&format!("API_KEY={variables}")));
    let nobody = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "find"])
        .arg(memory.path())
        .output()
        .unwrap();
    assert!(!String::from_utf8_lossy(&nobody.stdout).contains("API_KEY"), "others on the host don't get there");

    for instance in [&one, &two] {
        let everywhere = places(&host, instance, state.path());
        for secret in [&files, &variables] {
            assert_eq!(found(secret, &everywhere), Vec::<String>::new());
            assert!(!host.inspect(instance).to_string().contains(secret));
            let (_, answer) = agent.call(Method::GET, &format!("/tools/{instance}")).await;
            assert!(!answer.to_string().contains(secret));
        }
    }
    // What is no secret is found by the same search, in Docker's state and in the ledger.
    let seen = found(&control, &places(&host, &one, state.path()));
    assert!(seen.iter().any(|path| path.contains("/containers/")), "{seen:?}");
    assert!(seen.iter().any(|path| path.ends_with("ledger.json")), "{seen:?}");

    // Another value is there at once, without a new process.
    let before = host.inspect(&one)["State"]["StartedAt"].clone();
    let other = marker();
    let more = json!({
        "baseConfigOverrideJson": { "User": "1234:1234", "HostConfig": { "ReadonlyRootfs": true } },
        "environmentVariables": { "CONTROL": control },
    });
    let (status, answer) = agent.deploy(&asked(&host, "one", &other, more)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(read(&agent, &one, "/run/secrets/API_KEY").await, other);
    assert_eq!(host.inspect(&one)["State"]["StartedAt"], before);

    for instance in [&one, &two] {
        assert_eq!(agent.call(Method::DELETE, &format!("/tools/{instance}")).await.0, StatusCode::OK);
    }
    assert_eq!(std::fs::read_dir(memory.path().join(&host.scope)).unwrap().count(), 0);
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn docker_starts_nothing_whose_secrets_a_reboot_has_taken() {
    let (host, state, memory) = (Host::new(), tempfile::tempdir().unwrap(), memory());
    host.with_shell();
    let vault = || Vault::new(memory.path(), &host.scope, false);
    let agent = Agent::start_with_vault(&host, state.path(), vault());
    let one = host.name("one");
    let first = asked(&host, "one", &marker(), json!({}));
    assert_eq!(agent.deploy(&first).await.0, StatusCode::CREATED);
    agent.kill().await;
    docker(&["stop", "-t", "0", &one]);
    let folder = memory.path().join(&host.scope);
    std::fs::remove_dir_all(&folder).unwrap();
    let refused = docker_may_fail(&["start", &one]);
    assert!(!refused.status.success(), "Docker must not start it");
    assert!(!folder.exists(), "nor make an empty folder in its place");

    let agent = Agent::start_with_vault(&host, state.path(), vault());
    agent.instances.looked().await;
    let waits = || agent.instances.get(&one.parse().unwrap()).is_some_and(|view| view.error.is_some());
    host.until("it says that it waits", waits).await;
    let (_, answer) = agent.call(Method::GET, &format!("/tools/{one}")).await;
    assert_eq!(answer["data"]["state"], "needs_secrets", "{answer}");
    let value = marker();
    let mut again = first.clone();
    again["secrets"]["API_KEY"] = json!(value);
    let (status, answer) = agent.deploy(&again).await;
    assert_eq!((status, &answer["data"]["state"]), (StatusCode::OK, &json!("running")), "{answer}");
    assert_eq!(read(&agent, &one, "/run/secrets/API_KEY").await, value);
}
