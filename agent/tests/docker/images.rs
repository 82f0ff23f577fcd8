//! Images and disks on a real Docker Engine with a real registry: who may pull, when it is pulled, what is removed, and what a full disk
//! does.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::http::{Method, StatusCode};
use dtma_agent::disks::{Disks, Reserve};
use dtma_agent::reconcile::Timing;
use serde_json::{Value, json};

use crate::host::agent::{Agent, body, words};
use crate::host::{Host, docker, docker_may_fail};

fn soon() -> Timing {
    Timing { settle: Duration::from_millis(300), ..Timing::default() }
}

fn no_reserve(state: &Path) -> Disks {
    Disks::new(state, Reserve { bytes: 0, percent: 0 })
}

/// Waits until the instance runs in another container than before.
async fn replaced(agent: &Agent, name: &str, before: &Value) {
    let mut published = agent.instances.watch_snapshots();
    let again = published.wait_for(|snapshot| {
        let view = snapshot.instances.iter().find(|view| view.instance_name_on_toolbox.as_str() == name).unwrap();
        view.status == "running"
            && json!(view.container_id) != *before
            && view.state == dtma_api::instance::InstanceState::Running
    });
    drop(tokio::time::timeout(Duration::from_secs(30), again).await.unwrap().unwrap());
}

fn is_there(image: &str) -> bool {
    docker_may_fail(&["image", "inspect", image]).status.success()
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_private_image_is_pulled_with_the_deploys_own_credentials_and_they_are_found_nowhere() {
    let (mut host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let there = host.private_registry("somebody", "hunter2-is-secret");
    let agent = Agent::start(&host, state.path());
    let name = host.name("one");
    let asked = |credentials: Value| {
        let more = json!({ "dockerImageUrl": there, "registryCredentials": credentials });
        body(&host, "one", more)
    };
    for wrong in [json!(null), json!({ "username": "somebody", "password": "wrong" })] {
        let (status, answer) = agent.deploy(&asked(wrong)).await;
        assert_eq!((status.as_u16(), &answer["code"]), (422, &json!("pull_denied")), "{answer}");
        assert_eq!(host.left(), Vec::<String>::new());
    }
    for broken in [json!({ "username": "somebody" }), json!({ "identityToken": "a", "password": "b" }), json!("x")] {
        let (status, answer) = agent.deploy(&asked(broken)).await;
        assert_eq!((status.as_u16(), &answer["code"]), (400, &json!("invalid_request")), "{answer}");
    }
    let right = json!({ "username": "somebody", "password": "hunter2-is-secret" });
    let (status, answer) = agent.deploy(&asked(right.clone())).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    assert!(answer["data"]["image_digest"].as_str().unwrap().starts_with("sha256:"), "{answer}");
    let container = answer["data"]["container_id"].clone();
    let (status, again) = agent.deploy(&asked(json!({ "username": "x", "password": "y" }))).await;
    assert_eq!((status, &again["data"]["container_id"]), (StatusCode::OK, &container), "{again}");

    let (_, events) = agent.text(Method::GET, "/events?follow=false", None).await;
    let (_, status) = agent.text(Method::GET, "/status", None).await;
    let ledger = std::fs::read_to_string(state.path().join("ledger.json")).unwrap();
    for told in [answer.to_string(), events, status, ledger, host.inspect(&name).to_string()] {
        assert!(!told.contains("hunter2") && !told.contains("somebody"), "{told}");
    }

    // A new process has the image, and doesn't need them.
    agent.kill().await;
    let agent = Agent::start(&host, state.path());
    agent.call(Method::GET, &format!("/tools/{name}")).await;
    docker(&["rm", "-f", &name]);
    replaced(&agent, &name, &container).await;
    // Without the image it does, says so, and takes them again.
    let view = agent.call(Method::GET, &format!("/tools/{name}")).await.1;
    docker(&["rm", "-f", &name]);
    docker(&["rmi", &there]);
    let begun = Instant::now();
    let told = loop {
        let (_, answer) = agent.call(Method::GET, &format!("/tools/{name}")).await;
        // The agent may have been quicker and made another one before its image went.
        if answer["data"]["state"] == "failed" {
            break answer["data"]["error"].as_str().unwrap().to_owned();
        }
        if answer["data"]["state"] == "running" && answer["data"]["container_id"] != view["data"]["container_id"] {
            docker_may_fail(&["rm", "-f", &name]);
            docker_may_fail(&["rmi", &there]);
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{answer}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(told.contains("registryCredentials") && told.contains("repeat the deploy"), "{told}");
    let (status, answer) = agent.deploy(&asked(right)).await;
    assert_eq!((status, &answer["data"]["state"]), (StatusCode::OK, &json!("running")), "{answer}");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn each_pull_policy_pulls_when_it_says_and_the_digest_is_of_what_runs() {
    let (mut host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let there = host.registry();
    host.publish_variant(&there);
    let agent = Agent::start(&host, state.path());
    let deploy = async |word: &str, image: &str, policy: &str| {
        let more = json!({ "dockerImageUrl": image, "pullPolicy": policy });
        let (status, answer) = agent.deploy(&body(&host, word, more)).await;
        (status.as_u16(), answer)
    };
    let (status, answer) = deploy("never", &there, "never").await;
    assert_eq!((status, &answer["code"]), (404, &json!("image_not_found")), "{answer}");
    let (status, always) = deploy("always", &there, "always").await;
    assert_eq!(status, 201, "{always}");
    let first = always["data"]["image_digest"].as_str().unwrap().to_owned();
    assert!(first.starts_with("sha256:"));
    let (_, events) = agent.text(Method::GET, "/events?follow=false", None).await;
    let told: Vec<Value> = events
        .lines()
        .filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok())
        .filter(|event: &Value| event["progress"].is_object())
        .collect();
    let last = &told.last().unwrap_or_else(|| panic!("no progress in {events}"))["progress"];
    assert_eq!((&last["layers_done"], &last["layers_total"]), (&json!(2), &json!(2)), "{last}");
    assert!(last["total_bytes"].as_u64() > Some(1 << 20) && last["current_bytes"] == last["total_bytes"], "{last}");

    // The tag moves on. What is there is good enough for one, and never for the other.
    host.publish_variant(&there);
    let (_, kept) = deploy("kept", &there, "if-not-present").await;
    assert_eq!(kept["data"]["image_digest"], first.as_str(), "{kept}");
    docker(&["rm", "-f", &host.name("always")]);
    replaced(&agent, &host.name("always"), &always["data"]["container_id"]).await;
    let (_, answer) = agent.call(Method::GET, &format!("/tools/{}", host.name("always"))).await;
    let second = answer["data"]["image_digest"].as_str().unwrap().to_owned();
    assert_ne!(first, second);
    let image = host.inspect(&host.name("always"))["Image"].clone();
    assert!(docker(&["image", "inspect", image.as_str().unwrap()]).contains(&second), "the digest is of what runs");
    let (_, never) = deploy("never", &there, "never").await;
    assert_eq!(never["data"]["image_digest"], second.as_str(), "{never}");

    // A digest is what it says, wherever the tag is.
    let name = there.rsplit_once(':').unwrap().0;
    let (status, pinned) = deploy("pinned", &format!("{name}:1@{first}"), "always").await;
    assert_eq!((status, &pinned["data"]["image_digest"]), (201, &json!(first)), "{pinned}");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_registry_that_says_nothing_is_given_up_on_and_is_not_taken_for_docker_s_fault() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let image = format!("127.0.0.1:{}/silent:1", silent.local_addr().unwrap().port());
    let engine = host.engine().pull_idle(Duration::from_secs(2));
    let agent = Agent::start_with(engine, state.path(), soon(), no_reserve(state.path()));
    let begun = Instant::now();
    let (status, answer) = agent.deploy(&body(&host, "one", json!({ "dockerImageUrl": image }))).await;
    assert_eq!((status.as_u16(), &answer["code"]), (502, &json!("pull_failed")), "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("sent nothing for 2 s"), "{answer}");
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_short_disk_costs_the_agents_own_unused_images_and_then_refuses_with_figures() {
    let (mut host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let base = host.registry();
    let repository = base.rsplit_once(':').unwrap().0.to_owned();
    let images: Vec<String> = ["unused", "used", "strangers", "wanted"]
        .map(|word| {
            let there = format!("{repository}:{word}");
            host.publish_variant(&there);
            there
        })
        .into();
    let [unused, used, strangers, wanted] = images.try_into().unwrap();
    docker(&["pull", "-q", &strangers]);
    let free = Arc::new(AtomicU64::new(100));
    let measured = Arc::clone(&free);
    let measure = move |_: &Path| Some((100 << 20, measured.load(Ordering::Relaxed) << 20));
    let disks = Disks::measured_by(state.path(), Reserve { bytes: 50 << 20, percent: 0 }, measure);
    let agent = Agent::start_with(host.engine(), state.path(), soon(), disks);
    let deploy = async |word: &str, image: &str| {
        let (status, answer) = agent.deploy(&body(&host, word, json!({ "dockerImageUrl": image }))).await;
        (status.as_u16(), answer)
    };
    for (word, image) in [("unused", &unused), ("used", &used), ("strangers", &strangers)] {
        let (status, answer) = deploy(word, image).await;
        assert_eq!(status, 201, "{answer}");
    }
    for word in ["unused", "strangers"] {
        agent.call(Method::DELETE, &format!("/tools/{}", host.name(word))).await;
    }
    agent.call(Method::POST, &format!("/tools/{}/stop", host.name("used"))).await;
    free.store(49, Ordering::Relaxed);
    let (status, answer) = deploy("wanted", &wanted).await;
    assert_eq!((status, &answer["code"]), (507, &json!("no_space")), "{answer}");
    let told = answer["error"].as_str().unwrap();
    assert!(told.contains("49 MiB of 100 MiB are free") && told.contains("1 unused images were removed"), "{told}");
    assert_eq!([&unused, &used, &strangers, &wanted].map(|image| is_there(image)), [false, true, true, false]);
    let (_, metrics) = agent.text(Method::GET, "/metrics", None).await;
    assert!(metrics.contains("dtma_images_pruned_total{reason=\"disk_pressure\"} 1"), "{metrics}");
    // What runs goes on, and what is there can be started.
    let (status, answer) = agent.call(Method::POST, &format!("/tools/{}/start", host.name("used"))).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    free.store(100, Ordering::Relaxed);
    let (status, answer) = deploy("wanted", &wanted).await;
    assert_eq!(status, 201, "{answer}");
    docker(&["rmi", &strangers]);
}

/// A small file system of its own.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(size: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = format!("size={size},mode=0700");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder.path()).status();
        assert!(mount.unwrap().success());
        Self(folder)
    }

    /// Writes until nothing more can be written.
    fn fill(&self) {
        let filling = std::fs::write(self.0.path().join("filling"), vec![1; 8 << 20]);
        assert_eq!(filling.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    }

    fn empty(&self) {
        std::fs::remove_file(self.0.path().join("filling")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_disk_that_is_really_full_leaves_the_ledger_as_it_was_and_is_recovered_from() {
    let host = Host::new();
    let disk = SmallDisk::new("64k");
    let state = disk.0.path();
    let agent = Agent::start_with(host.engine(), state, soon(), no_reserve(state));
    let (status, answer) = agent.deploy(&body(&host, "one", words(&["sleep"]))).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let ledger = || std::fs::read(state.join("ledger.json")).unwrap();
    let before = ledger();
    disk.fill();
    let stop = format!("/tools/{}/stop", host.name("one"));
    for _ in 0..3 {
        let (status, answer) = agent.deploy(&body(&host, "two", words(&["sleep"]))).await;
        assert_eq!((status.as_u16(), &answer["code"]), (507, &json!("no_space")), "{answer}");
        let (status, answer) = agent.call(Method::POST, &stop).await;
        assert_eq!((status.as_u16(), &answer["code"]), (507, &json!("no_space")), "{answer}");
        assert!(ledger() == before, "the ledger was touched");
    }
    assert!(!state.join("ledger.json.new").exists(), "half a ledger takes the last room there is");
    let (status, answer) = agent.call(Method::GET, "/ready").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer["error"].as_str().unwrap().contains("no space left"), "{answer}");
    assert_eq!(docker(&["inspect", &host.name("one"), "-f", "{{.State.Status}}"]), "running");

    // A new process on the full disk knows what was promised.
    agent.kill().await;
    let agent = Agent::start_with(host.engine(), state, soon(), no_reserve(state));
    let (status, answer) = agent.call(Method::GET, &format!("/tools/{}", host.name("one"))).await;
    assert_eq!((status, &answer["data"]["state"]), (StatusCode::OK, &json!("running")), "{answer}");
    disk.empty();
    let (status, answer) = agent.deploy(&body(&host, "two", words(&["sleep"]))).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let (status, answer) = agent.call(Method::GET, "/ready").await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    agent.kill().await;
    let agent = Agent::start_with(host.engine(), state, soon(), no_reserve(state));
    let (_, answer) = agent.call(Method::GET, "/tools").await;
    assert_eq!(answer["data"].as_array().unwrap().len(), 2, "{answer}");
    agent.kill().await;
}
