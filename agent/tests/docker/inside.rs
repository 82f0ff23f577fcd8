//! What is asked of running containers on a real Docker Engine: commands, figures, output.

use std::time::{Duration, Instant};

use axum::http::{Method, StatusCode};
use dtma_agent::disks::{Disks, Reserve};
use dtma_agent::reconcile::Timing;
use serde_json::{Value, json};

use crate::host::agent::{Agent, body, words};
use crate::host::{Host, docker};

fn shell(text: &str) -> Value {
    json!({ "command": ["/bin/sh", "-c", text] })
}

async fn exec(agent: &Agent, name: &str, asked: Value) -> (u16, Value) {
    let (status, answer) = agent.post(&format!("/tools/{name}/exec"), &asked).await;
    (status.as_u16(), answer)
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_command_runs_in_the_container_as_its_user_and_with_no_more_than_it_may() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let name = host.name("one");
    let asked = json!({ "dockerImageUrl": host.with_shell(), "baseConfigOverrideJson": { "User": "1234:5678" } });
    let (status, answer) = agent.deploy(&body(&host, "one", asked)).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");

    let (status, answer) = exec(&agent, &name, shell("id -u; id -g; echo oh >&2; exit 3")).await;
    assert_eq!(status, 200, "{answer}");
    let wanted =
        json!({ "success": true, "exit_code": 3, "stdout": "1234\n5678\n", "stderr": "oh\n", "truncated": false });
    assert_eq!(answer, wanted);
    let (_, answer) =
        exec(&agent, &name, shell("cat /proc/self/status; [ -t 0 ] || [ -t 1 ] || echo no terminal")).await;
    let told = answer["stdout"].as_str().unwrap();
    let words = told.split_whitespace().collect::<Vec<_>>().join(" ");
    for wanted in ["CapEff: 0000000000000000", "CapBnd: 0000000000000000", "NoNewPrivs: 1", "no terminal"] {
        assert!(words.contains(wanted), "{wanted} in {told}");
    }
    // It is given nothing to read, so what reads ends.
    let (_, answer) = exec(&agent, &name, json!({ "command": ["cat"], "timeout_seconds": 5 })).await;
    assert_eq!((&answer["exit_code"], &answer["stdout"]), (&json!(0), &json!("")), "{answer}");

    // More than is kept, on both ways out, and never a deadlock.
    let flood =
        "dd if=/dev/zero bs=65536 count=48 2>/dev/null | tr '\\0' x; dd if=/dev/zero bs=65536 count=17 >&2 2>/dev/null";
    let (_, answer) = exec(&agent, &name, shell(flood)).await;
    assert_eq!((&answer["truncated"], &answer["exit_code"]), (&json!(true), &json!(0)));
    assert_eq!(answer["stdout"].as_str().unwrap().len(), 1024 * 1024);
    assert_eq!(answer["dropped_bytes"], 2 * 1024 * 1024 + 65_536);

    let (status, answer) = exec(&agent, &name, json!({ "command": ["/no/such/program"] })).await;
    assert_eq!((status, &answer["code"]), (422, &json!("cannot_start")), "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("no such file"), "{answer}");
    let (status, answer) = exec(&agent, &name, json!({ "command": ["/etc"] })).await;
    assert_eq!((status, &answer["code"]), (422, &json!("cannot_start")), "{answer}");
    let (status, answer) = exec(&agent, &name, shell("exit 127")).await;
    assert_eq!((status, &answer["exit_code"]), (200, &json!(127)), "a command may end like one that isn't there");

    agent.call(Method::POST, &format!("/tools/{name}/stop")).await;
    let (status, answer) = exec(&agent, &name, shell("id")).await;
    assert_eq!((status, &answer["code"]), (409, &json!("not_running")), "{answer}");
    let (status, answer) = exec(&agent, &host.name("none"), shell("id")).await;
    assert_eq!((status, &answer["code"]), (404, &json!("instance_not_found")), "{answer}");
}

fn processes(container: &str) -> usize {
    docker(&["top", container, "-eo", "pid,args"]).lines().filter(|line| line.contains("sleep 77")).count()
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_command_that_takes_too_long_is_killed_with_its_children_where_there_is_a_shell() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let asked = json!({ "dockerImageUrl": host.with_shell(), "baseConfigOverrideJson": { "User": "1234" } });
    let (status, answer) = agent.deploy(&body(&host, "one", asked)).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let name = host.name("one");
    let mut slow = shell("echo begun; sleep 77 & (sleep 77; echo) & sleep 77");
    slow["timeout_seconds"] = json!(2);
    let begun = Instant::now();
    let (status, answer) = exec(&agent, &name, slow).await;
    assert_eq!((status, &answer["code"]), (504, &json!("exec_timeout")), "{answer}");
    assert!((2..6).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    let details = &answer["details"];
    assert_eq!((&details["stdout"], &details["killed"]), (&json!("begun\n"), &json!(true)), "{answer}");
    assert_eq!(processes(&name), 0);
    assert_eq!(docker(&["inspect", &name, "-f", "{{.State.Status}}"]), "running", "the server is another matter");

    // One that leaves something behind and ends is not waited for.
    let begun = Instant::now();
    let mut leaves = shell("sleep 77 & echo left; exit 4");
    leaves["timeout_seconds"] = json!(60);
    let (status, answer) = exec(&agent, &name, leaves).await;
    assert_eq!((status, &answer["exit_code"], &answer["stdout"]), (200, &json!(4), &json!("left\n")), "{answer}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());

    // Without a shell it can't be done, and isn't claimed.
    agent.deploy(&body(&host, "bare", json!({}))).await;
    let asked = json!({ "command": ["/server", "forever"], "timeout_seconds": 1 });
    let (status, answer) = exec(&agent, &host.name("bare"), asked).await;
    assert_eq!((status, &answer["details"]["killed"]), (504, &json!(false)), "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("/restart"), "{answer}");
    let (_, answer) = agent.call(Method::POST, &format!("/tools/{}/restart", host.name("bare"))).await;
    assert_eq!(answer["data"]["state"], "running", "{answer}");
    assert!(!docker(&["top", &host.name("bare"), "-eo", "pid,args"]).contains("forever"));
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_caller_that_goes_away_does_not_keep_its_command_alive() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let (status, answer) = agent.deploy(&body(&host, "one", json!({ "dockerImageUrl": host.with_shell() }))).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let name = host.name("one");
    let mut slow = shell("exec sleep 77");
    slow["timeout_seconds"] = json!(3);
    let gone = tokio::time::timeout(Duration::from_secs(1), exec(&agent, &name, slow)).await;
    assert!(gone.is_err());
    let begun = Instant::now();
    assert_eq!(processes(&name), 1);
    while processes(&name) > 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "it is still there");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn figures_are_docker_s_and_come_once_every_second_and_in_every_list() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let timing =
        Timing { settle: Duration::from_millis(300), sample_every: Duration::from_millis(500), ..Timing::default() };
    let agent = Agent::start_with(host.engine(), state.path(), timing, Disks::new(state.path(), Reserve::default()));
    let name = host.name("one");
    let busy = json!({
        "dockerImageUrl": host.with_shell(),
        "baseConfigOverrideJson": { "Cmd": ["sh", "-c", "while :; do :; done"] },
        "resourceLimits": { "cpu": 0.5, "memory": "64m" },
    });
    let (status, answer) = agent.deploy(&body(&host, "one", busy)).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let (status, answer) = agent.call(Method::GET, &format!("/tools/{name}/stats")).await;
    let docker_says = docker(&["stats", "--no-stream", "--format", "{{.PIDs}}", &name]);
    if docker_says == "0" {
        // An engine whose control groups aren't all mounted: then that is said, and the lists just have no figures.
        eprintln!("only half tested: this Docker Engine has no figures of its containers");
        assert_eq!((status.as_u16(), &answer["code"]), (503, &json!("no_figures")), "{answer}");
        let (_, list) = agent.call(Method::GET, "/tools").await;
        assert!(list["data"][0].get("resource_usage").is_none(), "{list}");
        return;
    }
    assert_eq!(status, StatusCode::OK, "{answer}");
    let data = &answer["data"];
    let cpu = data["cpu_percent"].as_f64().unwrap();
    assert!((15.0..=75.0).contains(&cpu), "half a core is what it may use: {data}");
    assert_eq!((&data["memory_limit_bytes"], &data["pids"]), (&json!(64 << 20), &json!(2)), "{data}");
    let memory = data["memory_usage_bytes"].as_u64().unwrap();
    assert!((10_000..64 << 20).contains(&memory), "{data}");

    // In lists, sampled in the background.
    let mut published = agent.instances.watch_snapshots();
    let sampled = published.wait_for(|snapshot| {
        snapshot.instances[0].resource_usage.as_ref().is_some_and(|usage| usage.cpu_percent.is_some())
    });
    drop(tokio::time::timeout(Duration::from_secs(10), sampled).await.unwrap().unwrap());
    let (_, list) = agent.call(Method::GET, "/tools").await;
    assert_eq!(list["data"][0]["resource_usage"]["memory_limit_bytes"], 64 << 20, "{list}");
    let beat = serde_json::to_value(agent.instances.tool_statuses()).unwrap();
    assert!(beat[0]["runtime_details"]["resource_usage"]["cpu_percent"].is_f64(), "{beat}");

    // As a stream, until it stops.
    let begun = Instant::now();
    let path = format!("/tools/{name}/stats?stream=true");
    let (stream, _) = tokio::join!(agent.text(Method::GET, &path, None), async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        agent.call(Method::POST, &format!("/tools/{name}/stop")).await
    });
    let messages: Vec<&str> = stream.1.lines().filter(|line| line.starts_with("data:")).collect();
    assert!(messages.len() >= 3 && begun.elapsed() < Duration::from_secs(10), "{messages:?}");
    assert!(messages[0].contains("cpu_percent") && stream.1.contains("event: error"), "{}", stream.1);
    assert!(messages[messages.len() - 1].contains("not_running"), "{messages:?}");

    let (_, list) = agent.call(Method::GET, "/tools").await;
    assert!(list["data"][0].get("resource_usage").is_none(), "{list}");
    let (status, answer) = agent.call(Method::GET, &format!("/tools/{name}/stats")).await;
    assert_eq!((status, &answer["code"]), (StatusCode::CONFLICT, &json!("not_running")), "{answer}");
}

/// Counts up, one line each.
const COUNTS: &str = "i=0; while [ $i -lt 200000 ]; do echo line $i of many, long enough to fill a pipe soon; i=$((i+1)); done; sleep 1000";

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_slow_reader_of_a_log_loses_nothing_and_one_that_goes_away_leaves_nothing_open() {
    use futures_util::StreamExt as _;

    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let name = host.name("one");
    let asked = json!({
        "dockerImageUrl": host.with_shell(),
        "baseConfigOverrideJson": { "Cmd": ["sh", "-c", COUNTS] },
    });
    let (status, answer) = agent.deploy(&body(&host, "one", asked)).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let before = connections();
    let path = format!("/tools/{name}/logs?follow=true&tail=all&timestamps=false");
    let mut others = Vec::new();
    for _ in 0..OTHERS {
        let mut pieces = agent.ask(Method::GET, &path, None).await.into_body().into_data_stream();
        assert!(pieces.next().await.unwrap().is_ok());
        others.push(pieces);
    }
    let answer = agent.ask(Method::GET, &path, None).await;
    assert_eq!(answer.status(), StatusCode::OK);
    let mut pieces = answer.into_body().into_data_stream();
    // Nobody reads for a while; then all of it comes, in order.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (mut text, mut next) = (String::new(), 0);
    while next < 50_000 {
        let piece = tokio::time::timeout(Duration::from_secs(10), pieces.next()).await.unwrap().unwrap().unwrap();
        text.push_str(std::str::from_utf8(&piece).unwrap());
        while let Some((event, rest)) = text.split_once("\n\n") {
            assert!(event.contains(&format!("line {next} of many")), "{event} instead of line {next}");
            next += 1;
            text = rest.to_owned();
        }
    }
    // Some of those from before may have been idle, and taken.
    let followed = connections();
    assert!(followed > OTHERS, "each has a connection of its own: {followed}, and {before} before");
    drop((pieces, others));
    let begun = Instant::now();
    // The agent's loop may have opened one or two more for itself meanwhile, and keeps them.
    while connections() > before + 2 || connections() + OTHERS > followed {
        assert!(begun.elapsed() < Duration::from_secs(20), "{} connections, {before} before", connections());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// How many more follow the log.
const OTHERS: usize = 8;

/// Sockets this process has open.
fn connections() -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    open.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.to_string_lossy().starts_with("socket:"))
        .count()
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_followed_log_goes_on_over_restarts_and_new_containers_with_every_line_once() {
    use futures_util::StreamExt as _;

    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let name = host.name("one");
    let (status, answer) = agent.deploy(&body(&host, "one", json!({}))).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let path = format!("/tools/{name}/logs?follow=true");
    let mut pieces = agent.ask(Method::GET, &path, None).await.into_body().into_data_stream();
    let mut text = String::new();
    for round in 1..=4 {
        let begun = Instant::now();
        while text.matches("serving on 8080").count() < round {
            let piece = tokio::time::timeout(Duration::from_secs(20), pieces.next()).await.unwrap().unwrap().unwrap();
            text.push_str(std::str::from_utf8(&piece).unwrap());
            assert!(begun.elapsed() < Duration::from_secs(20), "round {round}: {text}");
        }
        assert_eq!(text.matches("serving on 8080").count(), round, "{text}");
        match round {
            1 => drop(agent.call(Method::POST, &format!("/tools/{name}/restart")).await),
            // Docker starts it again.
            2 => drop(docker(&["kill", &name])),
            // The agent makes another.
            3 => drop(docker(&["rm", "-f", &name])),
            _ => drop(agent.call(Method::POST, &format!("/tools/{name}/stop")).await),
        }
    }
    let rest = async { while pieces.next().await.is_some() {} };
    tokio::time::timeout(Duration::from_secs(10), rest).await.expect("it ends when the instance is stopped");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn what_is_in_a_volume_outlives_its_containers_and_goes_only_when_asked() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let name = host.name("one");
    let asked = json!({
        "dockerImageUrl": host.with_shell(), "volumes": [{ "name": "data", "path": "/data" }],
    });
    let asked = body(&host, "one", asked);
    let (status, answer) = agent.deploy(&asked).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let first = answer["data"]["container_id"].clone();
    exec(&agent, &name, shell("echo kept > /data/file")).await;
    let reads = || async { exec(&agent, &name, shell("cat /data/file")).await.1["stdout"].clone() };
    docker(&["rm", "-f", &name]);
    let mut published = agent.instances.watch_snapshots();
    let again = published.wait_for(|snapshot| {
        let view = &snapshot.instances[0];
        view.status == "running" && json!(view.container_id) != first
    });
    drop(tokio::time::timeout(Duration::from_secs(20), again).await.unwrap().unwrap());
    assert_eq!(reads().await, "kept\n", "a new container has the old data");
    agent.call(Method::DELETE, &format!("/tools/{name}")).await;
    assert_eq!(host.left().len(), 1, "only the volume is left: {:?}", host.left());
    agent.deploy(&asked).await;
    assert_eq!(reads().await, "kept\n", "a new instance has it too");
    let (status, answer) = agent.call(Method::DELETE, &format!("/tools/{name}?volumes=true")).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(host.left(), Vec::<String>::new());
    let (status, answer) = agent.deploy(&body(&host, "one", words(&["sleep"]))).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
}
