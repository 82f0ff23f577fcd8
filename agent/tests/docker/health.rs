//! Health on a real Docker Engine, probed as the program probes it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::{Method, StatusCode};
use dtma_agent::disks::{Disks, Reserve};
use dtma_agent::mcp::McpProber;
use dtma_agent::reconcile::Timing;
use serde_json::{Value, json};

use crate::host::agent::{Agent, body, words};
use crate::host::{Host, docker};

const LIMIT: Duration = Duration::from_secs(60);

fn start(host: &Host, state: &Path) -> Agent {
    let timing =
        Timing { settle: Duration::from_millis(300), hung_first: Duration::from_millis(500), ..Timing::default() };
    let disks = Disks::new(state, Reserve { bytes: 0, percent: 0 });
    Agent::start_asking(|bridges| Arc::new(McpProber::new(bridges.clone())), host.engine(), state, timing, disks)
}

/// The instance, once it is as it has to be some time.
async fn until(agent: &Agent, name: &str, what: &str, reached: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let (_, answer) = agent.call(Method::GET, &format!("/tools/{name}")).await;
        if reached(&answer["data"]) {
            return answer["data"].clone();
        }
        assert!(begun.elapsed() < LIMIT, "{what}: not in time: {answer}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn events(agent: &Agent) -> Vec<String> {
    agent.instances.events_with_history().0.into_iter().map(|event| event.event).collect()
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_server_that_hangs_is_found_out_restarted_and_well_again() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = start(&host, state.path());
    let one = host.name("one");
    let mut deploy = body(&host, "one", words(&["mcp", "8080"]));
    deploy["mcpTransportType"] = json!("http");
    deploy["healthCheck"] =
        json!({ "intervalSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 2, "startPeriodSeconds": 3 });
    let (status, deployed) = agent.deploy(&deploy).await;
    assert_eq!(status, StatusCode::CREATED, "{deployed}");
    assert_eq!((&deployed["data"]["health"], &deployed["data"]["health_reason"]), (&json!("healthy"), &Value::Null));
    let known = until(&agent, &one, "its tools", |view| view["server"]["tools"] == json!(["add"])).await;
    let expected = json!({ "era": "legacy", "protocol_version": "2025-06-18", "name": "small", "version": "1",
        "capabilities": { "tools": {} }, "tools": ["add"] });
    assert_eq!(known["server"], expected);
    let (_, list) = agent.call(Method::GET, "/tools").await;
    assert_eq!(list["data"][0].get("server"), None, "lists don't carry it");

    // It is there, it accepts, and it never answers.
    docker(&["kill", "--signal", "USR1", &one]);
    let ill = until(&agent, &one, "unhealthy", |view| view["health"] == "unhealthy").await;
    let reason = ill["health_reason"].as_str().unwrap();
    assert!(reason.contains("2 probes in a row") && reason.contains("did not answer within 1 seconds"), "{reason}");
    assert_eq!(ill["status"], "running");
    let well = until(&agent, &one, "well again", |view| view["health"] == "healthy").await;
    assert_eq!((&well["restart_count"], &well["container_id"]), (&json!(1), &deployed["data"]["container_id"]));
    assert_ne!(well["started_at"], deployed["data"]["started_at"]);
    let told = events(&agent);
    let at =
        |wanted: &str| told.iter().position(|event| event == wanted).unwrap_or_else(|| panic!("{wanted}: {told:?}"));
    assert!(
        at("unhealthy") < at("hangs") && at("hangs") < at("restarting") && at("restarting") < at("healthy"),
        "{told:?}"
    );

    // The next agent process finds it well, and leaves it as it is.
    agent.kill().await;
    let agent = start(&host, state.path());
    let found = until(&agent, &one, "known again", |view| view["health"] == "healthy").await;
    assert_eq!((&found["started_at"], &found["restart_count"]), (&well["started_at"], &json!(0)));
    let (status, answer) = agent.call(Method::DELETE, &format!("/tools/{one}")).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_server_that_ends_without_an_error_is_reported_with_its_last_words() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = start(&host, state.path());
    // At its deploy.
    let (status, refused) = agent.deploy(&body(&host, "never", words(&["exit", "0"]))).await;
    assert!(status.is_client_error(), "{status} {refused}");
    assert!(refused["error"].as_str().unwrap().contains("exit code 0"), "{refused}");
    assert!(refused["details"]["log"].to_string().contains("these are my last words"), "{refused}");
    // And later.
    let one = host.name("one");
    let (status, deployed) = agent.deploy(&body(&host, "one", words(&["brief", "900"]))).await;
    assert_eq!(status, StatusCode::CREATED, "{deployed}");
    let said = |view: &Value| {
        let reason = view["health_reason"].as_str().unwrap_or_default();
        reason.contains("exit code 0") && reason.contains("these are my last words")
    };
    let looping = until(&agent, &one, "reported", |view| view["crash_looping"] == true && said(view)).await;
    assert_eq!(looping["health"], "unhealthy");
    assert!(looping["restart_count"].as_u64().unwrap() >= 3, "{looping}");
    assert!(events(&agent).contains(&"crash_looping".to_owned()));
    // Docker goes on restarting it, as it was told to; nobody else does.
    let seen = host.inspect(&one);
    assert_eq!(seen["HostConfig"]["RestartPolicy"]["Name"], "unless-stopped");
    assert!(seen["RestartCount"].as_u64().unwrap() >= looping["restart_count"].as_u64().unwrap(), "{seen}");
    assert!(!events(&agent).iter().any(|event| event == "restarting" || event == "hangs"));
    let (status, answer) = agent.call(Method::DELETE, &format!("/tools/{one}")).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(host.left(), Vec::<String>::new());
}
