//! The whole of `/tools` on a real Docker Engine: the agent's own router, loop, ledger and adapter, in this process.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use axum::http::{Method, StatusCode};
use dtma_agent::engine::docker::DockerEngine;
use dtma_agent::engine::{Engine, LogOptions};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::host::agent::{Agent, body, words};
use crate::host::{Host, docker, docker_may_fail, free_port};

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn the_story_of_one_instance() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let one = host.name("one");
    let asked = body(
        &host,
        "one",
        json!({
            "mcpTransportType": "http",
            "environmentVariables": { "GREETING": "good day" },
            "volumes": [{ "name": "data", "path": "/data" }],
            "baseConfigOverrideJson": { "HostConfig": {
                "PortBindings": { "8080/tcp": [{ "HostPort": "30000" }] }, "Memory": "64m", "ReadonlyRootfs": true,
            }},
        }),
    );
    let (status, answer) = agent.deploy(&asked).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let data = &answer["data"];
    assert_eq!(
        (&data["state"], &data["status"], &data["health"]),
        (&json!("running"), &json!("running"), &json!("healthy"))
    );
    assert_eq!(data["warnings"].as_array().unwrap().len(), 1, "the agent's own port was replaced: {data}");
    let id = data["container_id"].as_str().unwrap().to_owned();

    // Published on loopback, on a free port, and really so.
    let port = &data["ports"][0];
    assert_eq!((&port["ip"], &port["private_port"], &port["type"]), (&json!("127.0.0.1"), &json!(8080), &json!("tcp")));
    let mut stream =
        TcpStream::connect(("127.0.0.1", u16::try_from(port["public_port"].as_u64().unwrap()).unwrap())).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).await.unwrap();
    assert!(said.ends_with("good day"), "{said}");

    // Shut in, as Docker itself sees it.
    let seen = host.inspect(&id);
    let config = &seen["HostConfig"];
    assert_eq!(config["CapDrop"], json!(["ALL"]));
    assert_eq!(config["SecurityOpt"], json!(["no-new-privileges:true"]));
    assert_eq!(
        (&config["Memory"], &config["PidsLimit"], &config["Init"]),
        (&json!(64 << 20), &json!(256), &json!(true))
    );
    assert_eq!((&config["ReadonlyRootfs"], &config["Privileged"]), (&json!(true), &json!(false)));
    assert_eq!(config["RestartPolicy"]["Name"], "unless-stopped");
    assert_eq!(config["LogConfig"]["Config"]["max-size"], "10m");
    assert!(!seen["Config"]["Labels"].to_string().contains("good day"));

    // Every name it has.
    for reference in [&one, "ati-one", &id, &id[..12], &one.replace('-', "%2D")] {
        let (status, answer) = agent.call(Method::GET, &format!("/tools/{reference}")).await;
        assert_eq!((status, &answer["data"]["container_id"]), (StatusCode::OK, &json!(id)), "{reference}");
    }
    let (_, list) = agent.call(Method::GET, "/tools").await;
    assert_eq!(list["data"].as_array().unwrap().len(), 1);
    let (_, answer) = agent.deploy(&asked).await;
    assert_eq!(answer["data"]["container_id"], id.as_str());
    let (status, answer) = agent.deploy(&body(&host, "one", json!({}))).await;
    assert_eq!((status, &answer["code"]), (StatusCode::CONFLICT, &json!("instance_exists")), "{answer}");

    // Its output.
    let (_, lines) = agent.text(Method::GET, &format!("/tools/{one}/logs?tail=10"), None).await;
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|line| line["stream"] == "stdout" && line["message"] == "serving on 8080"), "{lines:?}");
    assert!(lines.iter().any(|line| line["stream"] == "stderr" && line["timestamp"].is_string()), "{lines:?}");

    // Stopping is quick, and repeating anything is a success.
    let begun = Instant::now();
    let (status, answer) = agent.call(Method::POST, &format!("/tools/{one}/stop")).await;
    assert_eq!((status, &answer["data"]["state"]), (StatusCode::OK, &json!("stopped")), "{answer}");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    for (verb, state, word) in [
        ("stop", "stopped", "already"),
        ("start", "running", "started"),
        ("start", "running", "already"),
        ("restart", "running", "restarted"),
    ] {
        let (status, answer) = agent.call(Method::POST, &format!("/tools/{one}/{verb}")).await;
        assert_eq!((status, &answer["data"]["state"]), (StatusCode::OK, &json!(state)), "{verb}: {answer}");
        assert!(answer["message"].as_str().unwrap().contains(word), "{verb}: {answer}");
        assert_eq!(answer["data"]["container_id"], id.as_str(), "{verb}");
    }

    // The agent dies and comes back; the instance never notices and is still its own.
    agent.kill().await;
    let agent = Agent::start(&host, state.path());
    let (status, answer) = agent.call(Method::POST, &format!("/tools/{one}/stop")).await;
    assert_eq!((status, &answer["data"]["container_id"]), (StatusCode::OK, &json!(id)), "{answer}");
    agent.kill().await;
    let agent = Agent::start(&host, state.path());
    wait_until_known(&agent, &one).await;
    assert_eq!(docker(&["inspect", &id, "-f", "{{.State.Status}}"]), "exited", "what was stopped stays stopped");

    let (status, answer) = agent.call(Method::DELETE, &format!("/tools/{one}?volumes=true")).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(host.left(), Vec::<String>::new());
    for (method, path) in [(Method::DELETE, ""), (Method::POST, "/start"), (Method::GET, ""), (Method::GET, "/logs")] {
        let (status, answer) = agent.call(method, &format!("/tools/{one}{path}")).await;
        assert_eq!((status, &answer["code"]), (StatusCode::NOT_FOUND, &json!("instance_not_found")), "{path}");
    }
}

async fn wait_until_known(agent: &Agent, name: &str) {
    let mut published = agent.instances.watch_snapshots();
    let known = published.wait_for(|snapshot| {
        snapshot.instances.iter().any(|view| view.instance_name_on_toolbox.as_str() == name && view.created > 0)
    });
    drop(tokio::time::timeout(Duration::from_secs(20), known).await.unwrap().unwrap());
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn every_refusal_is_the_contracts_and_leaves_nothing() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_port = taken.local_addr().unwrap().port().to_string();
    let strangers_port = free_port();
    let stranger = host.name("stranger");
    host.stranger(&stranger, &["-p", &format!("127.0.0.1:{strangers_port}:8080")]);
    let publish = |port: &str| json!({ "baseConfigOverrideJson": { "HostConfig": { "PortBindings": { "8080/tcp": [{ "HostPort": port }] } } } });
    let nobodys = format!("127.0.0.1:{}/nobodys:1", free_port());
    let cases = [
        (body(&host, "x", json!({ "dockerImageUrl": nobodys })), 502, "pull_failed"),
        (
            body(&host, "x", json!({ "dockerImageUrl": "dtma-test/none:1", "pullPolicy": "never" })),
            404,
            "image_not_found",
        ),
        (body(&host, "stranger", json!({})), 409, "name_conflict"),
        (body(&host, "x", publish(&taken_port)), 409, "port_conflict"),
        (body(&host, "x", publish(&strangers_port.to_string())), 409, "port_conflict"),
        (body(&host, "x", words(&["exit", "3"])), 422, "exited"),
        // The init process starts, and finds nothing to run.
        (body(&host, "x", json!({ "baseConfigOverrideJson": { "Entrypoint": ["/nope"] } })), 422, "exited"),
        (body(&host, "x", json!({ "resourceLimits": { "cpu": 999 } })), 422, "container_refused"),
        (
            body(&host, "x", json!({ "baseConfigOverrideJson": { "HostConfig": { "Privileged": true } } })),
            422,
            "forbidden_option",
        ),
        (json!({}), 400, "invalid_request"),
        (json!([]), 400, "invalid_request"),
    ];
    for (asked, status, code) in cases {
        let begun = Instant::now();
        let (got, answer) = agent.deploy(&asked).await;
        assert_eq!((got.as_u16(), &answer["code"]), (status, &json!(code)), "{asked}: {answer}");
        assert_eq!(answer["success"], false);
        assert!(begun.elapsed() < Duration::from_secs(15), "{asked} took {:?}", begun.elapsed());
        let left = host.left();
        assert_eq!(left.len(), 1, "only the stranger is there after {asked}: {left:?}");
        assert_eq!(agent.instances.list().len(), 0);
        match code {
            "port_conflict" => {
                let holder = answer["details"]["holder"].as_str().unwrap();
                let by_stranger = holder == format!("container {stranger}");
                assert!(by_stranger || holder == "a process on the droplet", "{holder}");
                assert_eq!(by_stranger, asked.to_string().contains(&strangers_port.to_string()), "{holder}");
            }
            "exited" if asked.to_string().contains("nope") => assert_eq!(answer["details"]["exit_code"], 127),
            "exited" => {
                assert_eq!(answer["details"]["exit_code"], 3);
                // Docker may have started it again meanwhile.
                assert_eq!(answer["details"]["log"][0], "these are my last words");
            }
            _ => {}
        }
    }
    let (status, answer) = agent.text(Method::POST, "/tools", Some("{\"secret\": hunter2")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(answer.contains("invalid_request") && !answer.contains("hunter2"), "{answer}");
    let (status, _) = agent.text(Method::POST, "/tools", Some(&" ".repeat(2 * 1024 * 1024))).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    // The reasons can still be read, by the name of what is gone too.
    let (_, events) = agent.text(Method::GET, "/events?follow=false", None).await;
    assert!(events.contains("\"event\":\"failed\"") && events.contains("exit code 3"), "{events}");
    let (status, _) = agent.text(Method::GET, &format!("/tools/{}/events?follow=false", host.name("x")), None).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(docker(&["inspect", &stranger, "-f", "{{.State.Status}}"]), "running");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn an_image_is_pulled_with_progress_and_its_digest_is_told() {
    let (mut host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let there = host.registry();
    let agent = Agent::start(&host, state.path());
    let (status, answer) = agent.deploy(&body(&host, "one", json!({ "dockerImageUrl": there }))).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    assert!(answer["data"]["image_digest"].as_str().unwrap().starts_with("sha256:"), "{answer}");
    let (_, events) = agent.text(Method::GET, "/events?follow=false", None).await;
    for event in ["accepted", "pulling", "creating", "starting", "running"] {
        assert!(events.contains(&format!("\"event\":\"{event}\"")), "{event}: {events}");
    }
    let missing = format!("{there}-missing");
    let (status, answer) = agent.deploy(&body(&host, "two", json!({ "dockerImageUrl": missing }))).await;
    assert_eq!((status, &answer["code"]), (StatusCode::NOT_FOUND, &json!("image_not_found")), "{answer}");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn instances_cannot_reach_each_other_and_the_agent_reaches_both() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    for word in ["one", "two"] {
        let (status, answer) = agent.deploy(&body(&host, word, json!({ "mcpTransportType": "http" }))).await;
        assert_eq!(status, StatusCode::CREATED, "{answer}");
    }
    let upstream = agent.instances.upstream(&host.name("two").parse().unwrap()).unwrap();
    let address = upstream.address.ip().to_string();
    let reach = docker_may_fail(&["exec", &host.name("one"), "/server", "reach", &address, "8080"]);
    assert_eq!(reach.status.code(), Some(7), "{reach:?}");
    let reach = docker_may_fail(&["exec", &host.name("two"), "/server", "reach", &address, "8080"]);
    assert_eq!(reach.status.code(), Some(0), "the way itself works: {reach:?}");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn what_is_done_behind_the_agents_back_is_put_right_and_strangers_are_left_alone() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let (one, stranger) = (host.name("one"), host.name("stranger"));
    host.stranger(&stranger, &[]);
    agent.deploy(&body(&host, "one", words(&["sleep"]))).await;
    docker(&["rm", "-f", &one]);
    running_again(&agent, &one).await;
    docker(&["stop", "-t", "1", &one]);
    running_again(&agent, &one).await;
    // Killed, it is Docker that starts it again.
    docker(&["kill", &one]);
    running_again(&agent, &one).await;
    docker(&["rm", "-f", &stranger]);
    let (_, events) = agent.text(Method::GET, &format!("/tools/{one}/events?follow=false"), None).await;
    assert!(events.contains("vanished") && events.contains("exited"), "{events}");
    assert!(!events.contains(&stranger));

    // A lost ledger is put together again.
    agent.kill().await;
    std::fs::write(state.path().join("ledger.json"), "{}").unwrap();
    let agent = Agent::start(&host, state.path());
    wait_until_known(&agent, &one).await;
    let (status, answer) = agent.call(Method::DELETE, &format!("/tools/{one}")).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(host.left(), Vec::<String>::new());
}

/// Waits until Docker and the agent both say that it runs.
async fn running_again(agent: &Agent, name: &str) {
    let begun = Instant::now();
    let mut published = agent.instances.watch_snapshots();
    loop {
        let runs = docker_may_fail(&["inspect", name, "-f", "{{.Id}} {{.State.Running}} {{.State.StartedAt}}"]);
        let docker_says = String::from_utf8(runs.stdout).unwrap();
        let view = agent.instances.get(&name.parse().unwrap()).unwrap();
        let same = docker_says.starts_with(&view.container_id) && !view.container_id.is_empty();
        if same && docker_says.contains("true") && view.state == dtma_api::instance::InstanceState::Running {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{docker_says} {view:?}");
        let _ = tokio::time::timeout(Duration::from_millis(100), published.changed()).await;
    }
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_followed_log_goes_on_and_ends_with_the_container() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    agent.deploy(&body(&host, "one", json!({}))).await;
    let name = host.name("one").parse().unwrap();
    let mut lines = agent.instances.logs(&name, LogOptions { follow: true, ..LogOptions::default() });
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let line = tokio::time::timeout(Duration::from_secs(10), lines.next()).await.unwrap().unwrap().unwrap();
        seen.push(line.message);
    }
    seen.sort();
    assert_eq!(seen, ["serving on 8080", "this is stderr"]);
    agent.call(Method::POST, &format!("/tools/{name}/stop")).await;
    assert!(tokio::time::timeout(Duration::from_secs(10), lines.next()).await.unwrap().is_none());
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn every_verb_of_the_adapter_may_be_repeated() {
    let host = Host::new();
    let engine = DockerEngine::connect(None).unwrap().scoped(&host.scope);
    let (spec, _) = dtma_agent::instance::validate(
        &body(&host, "one", json!({ "volumes": [{ "name": "data", "path": "/data" }] })),
        &dtma_agent::instance::Policy::default(),
    )
    .unwrap();
    let deployment = dtma_agent::instance::DeploymentId(uuid::Uuid::new_v4());
    assert!(!engine.version().await.unwrap().is_empty());
    let id = engine.create(spec.name.as_str(), &spec, &deployment).await.unwrap();
    assert!(matches!(
        engine.create(spec.name.as_str(), &spec, &deployment).await,
        Err(dtma_agent::engine::EngineError::NameTaken)
    ));
    for _ in 0..2 {
        engine.start(&id).await.unwrap();
    }
    let listed = engine.list().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].id.clone(), listed[0].spec_hash.clone()), (id.clone(), spec.hash()));
    assert_eq!(listed[0].deployment, Some(deployment));
    for _ in 0..2 {
        engine.stop(&id, 1).await.unwrap();
    }
    for _ in 0..2 {
        engine.remove(&id).await.unwrap();
    }
    assert_eq!(engine.inspect(&id).await.unwrap(), None);
    assert_eq!(host.left().len(), 1, "the named volume stays");
    for _ in 0..2 {
        engine.remove_volumes(&dtma_agent::engine::Volumes::OfDeployment(deployment)).await.unwrap();
    }
    assert_eq!(host.left(), Vec::<String>::new());
}
