//! The whole API over an engine in memory whose containers are on loopback, so that a real MCP server can stand behind it.

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

mod described;
mod loopback;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use axum::routing::post;
use dtma_agent::backend::LinkState;
use dtma_agent::config::PublicStatus;
use dtma_agent::disks::{Disks, Reserve};
use dtma_agent::http::callers::Callers;
use dtma_agent::http::frame::{Answered, Gate};
use dtma_agent::http::server::ServerState;
use dtma_agent::http::{App, Parts, router};
use dtma_agent::instance::SecretValues;
use dtma_agent::logs::LogRing;
use dtma_agent::mcp::{Bridges, McpProber, Proxy};
use dtma_agent::reconcile::{self, FetchedSecrets, NoSecrets, SecretSource, Secrets, SecretsWanted, Sessions, Timing};
use dtma_agent::store::ledger::Ledger;
use dtma_agent::store::vault::Vault;
use dtma_agent::system::Sample;
use dtma_agent::update::{Places, Updates};
use dtma_api::TokenHash;
use dtma_api::status::AgentStatus;
use http_body_util::BodyExt as _;
use jiff::Timestamp;
use loopback::LoopbackEngine;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

/// A backend with one secret for everybody.
struct Backend;

#[async_trait]
impl SecretSource for Backend {
    async fn fetch(&self, _: &SecretsWanted) -> Result<FetchedSecrets, NoSecrets> {
        let values = [("TOKEN".parse().unwrap(), "hunter2".to_owned().into())];
        Ok(FetchedSecrets { values: SecretValues(values.into()), expires_at: None })
    }
}

struct Agent {
    router: Router,
    engine: Arc<LoopbackEngine>,
    link: watch::Sender<LinkState>,
    shutdown: CancellationToken,
    _directory: TempDir,
}

fn agent() -> Agent {
    let directory = tempfile::tempdir().unwrap();
    let engine = Arc::new(LoopbackEngine::default());
    let shutdown = CancellationToken::new();
    let sessions = Sessions::default();
    let bridges = Bridges::new(Arc::clone(&engine) as _, sessions.clone(), shutdown.clone());
    let (instances, _) = reconcile::start(reconcile::Parts {
        engine: Arc::clone(&engine) as _,
        ledger: Ledger::open(directory.path(), Timestamp::now()).unwrap(),
        prober: Arc::new(McpProber::new(bridges.clone())),
        disks: Arc::new(Disks::new(directory.path(), Reserve { bytes: 0, percent: 0 })),
        secrets: Secrets {
            vault: Vault::new(&directory.path().join("secrets"), "main", true),
            source: Arc::new(Backend),
        },
        sessions,
        timing: Timing { observe_every: Duration::from_millis(200), ..Timing::default() },
        shutdown: shutdown.clone(),
    });
    let callers = Arc::new(Callers::new(vec![TokenHash::of("key")]));
    let link = watch::Sender::new(LinkState::Linked { taken: 1, failing: 0, problem: None });
    let app = App::new(Parts {
        updates: Updates::new(&Places::default()),
        instances,
        gate: Arc::new(Gate { callers, public_status: PublicStatus::Liveness, answered: Answered::default() }),
        logs: LogRing::default(),
        system: watch::Sender::new(Sample::default()).subscribe(),
        link: link.subscribe(),
        server: ServerState::default(),
        proxy: Proxy::new(shutdown.clone()),
        bridges,
        shutdown: shutdown.clone(),
        has_api_base_url: true,
        port: 30_000,
        started_at: Timestamp::now(),
    });
    Agent { router: router(&app), engine, link, shutdown, _directory: directory }
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// Status and code, for answers that are failures.
    fn failure(&self) -> (u16, String) {
        let body = self.json();
        assert_eq!(body["success"], false, "{body}");
        assert!(body["error"].as_str().is_some_and(|error| !error.is_empty()), "{body}");
        (self.status, body["code"].as_str().unwrap().to_owned())
    }
}

impl Agent {
    async fn call(&self, request: &str, body: impl Into<Body>) -> Answer {
        self.call_with(request, &[("authorization", "Bearer key")], body).await
    }

    async fn call_with(&self, request: &str, headers: &[(&str, &str)], body: impl Into<Body>) -> Answer {
        let (method, path) = request.split_once(' ').unwrap();
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.router.clone().oneshot(request.body(body.into()).unwrap()).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
        assert!(parts.headers.contains_key("x-request-id"));
        let media_type = parts.headers.get(header::CONTENT_TYPE).map_or("", |value| value.to_str().unwrap());
        described::check(method, path, parts.status.as_u16(), media_type, &body);
        Answer { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    /// Asks again and again, a few seconds at most, until the answer is as wanted.
    async fn until(&self, request: &str, wanted: impl Fn(&Answer) -> bool) -> Answer {
        let asking = async {
            loop {
                let answer = self.call(request, "").await;
                if wanted(&answer) {
                    return answer;
                }
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(10), asking).await.unwrap_or_else(|_| panic!("{request} is never as wanted"))
    }

    async fn deploy(&self, name: &str, transport: Option<&str>, port: u16) -> Answer {
        let body = json!({
            "dockerImageUrl": "registry.example/echo:1", "instanceNameOnToolbox": name,
            "accountToolInstanceId": format!("id-of-{name}"), "mcpTransportType": transport, "mcpPort": port,
        });
        self.call("POST /tools", body.to_string()).await
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Shakes hands, echoes everything else.
async fn mcp_server() -> u16 {
    let answer = |headers: HeaderMap, body: String| async move {
        let message: Value = serde_json::from_str(&body).unwrap();
        assert!(!headers.contains_key(header::AUTHORIZATION));
        let result = match message["method"].as_str() {
            Some("initialize") => json!({"protocolVersion": "2025-11-25", "capabilities": {}}),
            _ => message.clone(),
        };
        axum::Json(json!({"jsonrpc": "2.0", "id": message["id"], "result": result}))
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move { axum::serve(listener, Router::new().route("/mcp", post(answer))).await });
    port
}

#[tokio::test]
async fn whatever_is_asked_the_answer_is_json_with_a_stable_code() {
    let agent = agent();
    let failure = |status, code: &str| (status, code.to_owned());
    assert_eq!(agent.call("GET /nothing", "").await.failure(), failure(404, "no_such_route"));
    assert_eq!(agent.call("GET /redeploy", "").await.failure(), failure(405, "method_not_allowed"));
    for by_hand in ["POST /redeploy", "GET /update"] {
        let answer = agent.call(by_hand, "").await;
        assert_eq!(answer.failure(), failure(501, "no_updater"));
        assert!(answer.json()["error"].as_str().unwrap().contains("install.sh"));
    }
    assert_eq!(agent.call("PATCH /tools", "").await.failure(), failure(405, "method_not_allowed"));
    assert_eq!(agent.call("PUT /tools/x/mcp", "").await.failure(), failure(405, "method_not_allowed"));
    assert_eq!(agent.call("POST /tools/x/mcp", "{}").await.failure(), failure(404, "instance_not_found"));
    assert_eq!(agent.call("POST /tools/%ff/mcp", "{}").await.failure(), failure(400, "invalid_request"));
    assert_eq!(agent.call("POST /ssh/execute", r#"{"command":"id"}"#).await.failure(), failure(410, "no_remote_shell"));
    assert_eq!(agent.call("GET /logs?lines=many", "").await.failure(), failure(400, "invalid_request"));
    assert_eq!(agent.call_with("GET /tools", &[], "").await.failure(), failure(401, "credential_missing"));
    let allowed = agent.call("PATCH /tools", "").await;
    assert!(allowed.headers.contains_key(header::ALLOW));
}

#[tokio::test]
async fn the_description_is_there_for_those_who_bear_a_key() {
    let agent = agent();
    let description = agent.call("GET /openapi.json", "").await;
    assert_eq!((description.status, &description.json()), (200, described::description()));
    assert_eq!(agent.call_with("GET /openapi.json", &[], "").await.failure(), (401, "credential_missing".to_owned()));
}

#[tokio::test]
async fn the_status_has_its_shape_shows_a_deploy_at_once_and_strangers_only_that_it_lives() {
    let agent = agent();
    let status = agent.call("GET /status", "").await;
    let parsed: AgentStatus = serde_json::from_str(&status.body).unwrap();
    assert_eq!(serde_json::to_value(&parsed).unwrap(), status.json());
    assert!(parsed.tool_instances.is_empty() && parsed.environment.has_auth_token && parsed.environment.has_api_key);

    let deployed = agent.deploy("plain", None, 80).await;
    assert_eq!(deployed.status, 201, "{}", deployed.body);
    for path in ["GET /status", "GET /tools/status"] {
        let status = agent.call(path, "").await.json();
        assert_eq!(status["tool_instances"][0]["instance_name_on_toolbox"], "plain");
        assert_eq!(status["environment"]["hasApiBaseUrl"], true);
        assert_eq!((&status["service"], &status["environment"]["port"]), (&json!("DTMA"), &json!(30_000)));
    }
    let mut strangers = agent.call_with("GET /status", &[], "").await.json();
    strangers.as_object_mut().unwrap().remove("timestamp").unwrap();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(strangers, json!({"success": true, "status": "running", "version": version, "service": "DTMA"}));
}

#[tokio::test]
async fn readiness_names_every_reason() {
    let agent = agent();
    // The first look at the engine may not have happened yet.
    let ready = agent.until("GET /ready", |answer| answer.status == 200).await;
    let checks = json!({
        "docker_reachable": true, "ledger_writable": true, "enrolled": true, "egress": true, "disk_pressure": false,
    });
    assert_eq!((ready.status, ready.json()["checks"].clone()), (200, checks));

    agent.link.send_replace(LinkState::Enrolling { problem: Some("nobody answers".to_owned()) });
    let not_ready = agent.call("GET /ready", "").await;
    assert_eq!(not_ready.failure(), (503, "not_ready".to_owned()));
    assert!(not_ready.json()["error"].as_str().unwrap().contains("nobody answers"));

    agent.engine.vanish();
    let both =
        |answer: &Answer| answer.json()["details"]["reasons"].as_array().is_some_and(|reasons| reasons.len() == 2);
    let not_ready = agent.until("GET /ready", both).await;
    assert_eq!(not_ready.json()["details"]["checks"]["docker_reachable"], false);
}

#[tokio::test]
async fn an_mcp_server_is_reached_by_every_name_while_it_runs() {
    let agent = agent();
    let deployed = agent.deploy("echo", Some("http"), mcp_server().await).await;
    assert_eq!(deployed.status, 201, "{}", deployed.body);
    let data = &deployed.json()["data"];
    assert_eq!(data["mcp_url"], "/tools/echo/mcp");
    let shown = agent.call("GET /tools/echo", "").await.json();
    assert_eq!((&shown["data"]["health"], &shown["data"]["server"]["era"]), (&json!("healthy"), &json!("legacy")));
    assert_eq!(agent.call("GET /tools", "").await.json()["data"][0].get("server"), None);
    let message = r#"{"jsonrpc":"2.0","id":7,"method":"tools/call"}"#;
    for reference in ["echo", "id-of-echo", data["container_id"].as_str().unwrap()] {
        let answer = agent.call(&format!("POST /tools/{reference}/mcp"), message).await;
        assert_eq!(
            (answer.status, answer.json()["result"]["method"].clone()),
            (200, json!("tools/call")),
            "{reference}"
        );
    }

    let key = ("authorization", "Bearer key");
    let page = [key, ("host", "evil.example"), ("origin", "https://evil.example")];
    let refused = agent.call_with("POST /tools/echo/mcp", &page, message).await;
    assert_eq!(refused.failure(), (403, "origin_not_allowed".to_owned()));
    let no_key = agent.call_with("POST /tools/echo/mcp", &[], message).await;
    assert_eq!(no_key.failure(), (401, "credential_missing".to_owned()));
    let outside = agent.call("POST /tools/echo/mcp/../admin", message).await;
    assert_eq!(outside.failure(), (400, "bad_path".to_owned()));

    assert_eq!(agent.call("POST /tools/echo/stop", "").await.status, 200);
    let stopped = agent.call("POST /tools/echo/mcp", message).await;
    assert_eq!(stopped.failure(), (503, "instance_stopped".to_owned()));
    assert_eq!(agent.call("POST /tools/echo/start", "").await.status, 200);
    assert_eq!(agent.call("POST /tools/echo/mcp", message).await.status, 200);
    assert_eq!(agent.call("DELETE /tools/echo", "").await.status, 200);
    let gone = agent.call("POST /tools/echo/mcp", message).await;
    assert_eq!(gone.failure(), (404, "instance_not_found".to_owned()));
}

#[tokio::test]
async fn a_server_without_a_way_in_says_which_kind_it_is() {
    let agent = agent();
    assert_eq!(agent.deploy("plain", None, 80).await.status, 201);
    assert_eq!(agent.call("POST /tools/plain/mcp", "{}").await.failure(), (404, "not_an_mcp_server".to_owned()));
}

#[tokio::test]
async fn a_server_on_its_standard_input_is_spoken_to_as_streamable_http() {
    let agent = agent();
    assert_eq!(agent.deploy("pipe", Some("stdio"), 80).await.status, 201);
    let base = [
        ("content-type", "application/json"),
        ("accept", "application/json, text/event-stream"),
        ("authorization", "Bearer key"),
    ];
    let call = async |method: &str, more: &[(&str, &str)], message: Value| {
        let usual = base.into_iter().filter(|(name, _)| more.iter().all(|(other, _)| other != name));
        let headers: Vec<_> = usual.chain(more.iter().copied()).collect();
        agent.call_with(&format!("{method} /tools/pipe/mcp"), &headers, message.to_string()).await
    };
    let request = |id: u8, method: &str| json!({"jsonrpc": "2.0", "id": id, "method": method, "params": {"x": 1}});
    let begun = call("POST", &[], request(0, "initialize")).await;
    assert_eq!((begun.status, &begun.json()["result"]["protocolVersion"]), (200, &json!("2025-11-25")));
    let session = begun.headers["mcp-session-id"].to_str().unwrap().to_owned();
    let session = [("mcp-session-id", session.as_str())];
    let done = json!({"jsonrpc": "2.0", "method": "notifications/initialized"});
    assert_eq!(call("POST", &session, done).await.status, 202);
    assert_eq!(call("POST", &session, request(7, "echo")).await.json()["result"]["params"], json!({"x": 1}));

    let refusals = [
        (call("POST", &[], request(1, "echo")).await, 400, "session_missing"),
        (call("POST", &session, json!({})).await, 400, "invalid_message"),
        (
            call("POST", &[session[0], ("mcp-protocol-version", "x")], request(1, "m")).await,
            400,
            "version_not_supported",
        ),
        (call("POST", &[("mcp-session-id", "none")], request(1, "echo")).await, 404, "session_not_found"),
        (call("GET", &[("mcp-protocol-version", "2026-07-28")], json!(0)).await, 405, "method_not_allowed"),
        (call("OPTIONS", &[], json!(0)).await, 405, "method_not_allowed"),
        (call("POST", &[session[0], ("accept", "text/html")], request(1, "echo")).await, 406, "not_acceptable"),
        (call("POST", &[("content-type", "text/plain")], request(1, "echo")).await, 415, "not_json"),
        (call("POST", &[("content-length", "20000000")], request(1, "echo")).await, 413, "message_too_long"),
        (
            call("POST", &[("origin", "https://evil.example")], request(0, "initialize")).await,
            403,
            "origin_not_allowed",
        ),
        (agent.call_with("POST /tools/pipe/mcp/below", &base, "{}").await, 404, "no_such_route"),
    ];
    for (answer, status, code) in refusals {
        assert_eq!(answer.failure(), (status, code.to_owned()));
    }

    let crashed = call("POST", &session, request(9, "exit")).await;
    assert_eq!((crashed.status, &crashed.json()["error"]["code"]), (200, &json!(-32603)));
    let dead = call("POST", &session, request(10, "echo")).await;
    assert_eq!(dead.failure(), (404, "session_not_found".to_owned()));
    let again = call("POST", &[], request(0, "initialize")).await;
    let again = [("mcp-session-id", again.headers["mcp-session-id"].to_str().unwrap())];
    assert_eq!(call("POST", &again, request(1, "echo")).await.status, 200);
    assert_eq!(call("DELETE", &again, json!(0)).await.status, 204);

    assert_eq!(agent.call("POST /tools/pipe/stop", "").await.status, 200);
    assert_eq!(call("POST", &[], request(0, "initialize")).await.failure(), (503, "instance_stopped".to_owned()));
}

#[tokio::test]
async fn a_command_is_answered_as_it_ended_and_only_a_few_run_at_once() {
    let agent = agent();
    assert_eq!(agent.deploy("plain", None, 80).await.status, 201);
    let exec = |words: &[&str]| agent.call("POST /tools/plain/exec", json!({ "command": words }).to_string());
    let answer = exec(&["say", "it"]).await;
    let wanted = json!({
        "success": true, "exit_code": 7, "stdout": "say it", "stderr": "\u{fffd}", "truncated": true, "dropped_bytes": 3,
    });
    assert_eq!((answer.status, answer.json()), (200, wanted));
    let slow = exec(&["slow"]).await;
    assert_eq!(slow.failure(), (504, "exec_timeout".to_owned()));
    assert_eq!(slow.json()["details"]["killed"], false);
    assert!(slow.json()["error"].as_str().unwrap().contains("POST /tools/plain/restart"));
    assert_eq!(exec(&["nope"]).await.failure(), (422, "cannot_start".to_owned()));
    assert_eq!(exec(&[]).await.failure(), (400, "invalid_request".to_owned()));
    assert_eq!(agent.call("POST /tools/plain/exec", "x".repeat(300_000)).await.failure().0, 413);
    assert_eq!(agent.call("POST /tools/none/exec", "{}").await.failure(), (404, "instance_not_found".to_owned()));

    let fifth = async {
        let fifth = exec(&["say"]).await;
        agent.engine.gate.notify_one();
        fifth
    };
    let waits = || exec(&["waits"]);
    let (a, b, c, d, fifth) = tokio::join!(waits(), waits(), waits(), waits(), fifth);
    assert_eq!(fifth.failure(), (503, "busy".to_owned()));
    assert_eq!(fifth.headers[header::RETRY_AFTER], "1");
    assert_eq!([a.status, b.status, c.status, d.status], [200; 4]);
    assert_eq!(exec(&["say"]).await.status, 200);

    assert_eq!(agent.call("POST /tools/plain/stop", "").await.status, 200);
    assert_eq!(exec(&["say"]).await.failure(), (409, "not_running".to_owned()));
    assert_eq!(agent.call("GET /tools/plain/stats", "").await.failure(), (409, "not_running".to_owned()));
}

#[tokio::test]
async fn figures_of_an_instance_have_their_shape() {
    let agent = agent();
    assert_eq!(agent.deploy("plain", None, 80).await.status, 201);
    let answer = agent.call("GET /tools/plain/stats", "").await;
    let parsed: dtma_api::usage::StatsAnswer = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(serde_json::to_value(&parsed).unwrap(), answer.json());
    assert_eq!((parsed.data.cpu_percent, parsed.data.pids), (Some(0.0), 7));
    assert_eq!(agent.call("GET /tools/plain/stats?stream=maybe", "").await.failure().0, 400);

    let stopping = async {
        tokio::time::sleep(Duration::from_millis(800)).await;
        agent.call("POST /tools/plain/stop", "").await
    };
    let (stream, stopped) = tokio::join!(agent.call("GET /tools/plain/stats?stream=true", ""), stopping);
    assert_eq!((stream.status, stopped.status), (200, 200));
    assert!(stream.body.contains("memory_usage_bytes"), "{}", stream.body);
    assert!(stream.body.ends_with("\"code\":\"not_running\"}\n\n"), "{}", stream.body);
}

#[tokio::test]
async fn figures_and_metrics_are_there_for_those_who_may_see_them() {
    let agent = agent();
    assert_eq!(agent.deploy("plain", None, 80).await.status, 201);
    let system = agent.call("GET /system", "").await.json();
    assert!(system["system_metrics"]["memory"].is_object() && system["kernel"].is_string(), "{system}");
    let metrics = agent.call("GET /metrics", "").await;
    assert!(metrics.headers[header::CONTENT_TYPE].to_str().unwrap().starts_with("text/plain"));
    for line in [
        "dtma_instances{state=\"running\"",
        "dtma_instance_restarts_total{instance=\"plain\"} 0",
        "dtma_enrolled 1",
        "dtma_images_pruned_total{reason=\"age\"} 0",
        "dtma_probes_total{result=\"failed\"} 0",
        "dtma_hang_restarts_total 0",
        "dtma_instances_crash_looping 0",
    ] {
        assert!(metrics.body.contains(line), "{line} in {}", metrics.body);
    }
    let diagnostics = agent.call("GET /diagnostics/docker", "").await.json();
    assert_eq!(diagnostics["instances"][0]["state"], "running");
    assert_eq!(agent.call("GET /diagnostics/system", "").await.status, 200);
    assert_eq!(agent.call("GET /diagnostics/logs", "").await.json(), json!({"success": true, "lines": []}));
    let health = agent.call_with("GET /health", &[], "").await;
    assert_eq!((health.status, health.body.as_str()), (200, "OK"));
}

#[tokio::test]
async fn templates_are_listed_and_a_deploy_can_ask_for_one() {
    let agent = agent();
    let templates = agent.call("GET /mcp/templates", "").await.json();
    let names: Vec<_> = templates["data"].as_array().unwrap().iter().map(|template| &template["name"]).collect();
    assert_eq!(names, ["small", "standard", "large", "hardened"]);
    let body = json!({
        "dockerImageUrl": "registry.example/echo:1", "instanceNameOnToolbox": "echo", "accountToolInstanceId": "1", "template": "tiny",
    });
    let refused = agent.call("POST /tools", body.to_string()).await;
    assert_eq!(refused.failure(), (400, "invalid_request".to_owned()));
    assert!(refused.body.contains("small, standard, large, hardened"), "{}", refused.body);
}

#[tokio::test]
async fn a_validation_says_everything_and_changes_nothing() {
    let agent = agent();
    let wrong = json!({
        "dockerImageUrl": "Not An Image", "instanceNameOnToolbox": "echo", "accountToolInstanceId": "1", "surplus": true,
        "baseConfigOverrideJson": { "HostConfig": { "Privileged": true } },
    });
    let wrong = agent.call("POST /mcp/validate", wrong.to_string()).await;
    let found = &wrong.json()["data"];
    assert_eq!((wrong.status, &found["valid"], &found["spec"]), (200, &json!(false), &json!(null)));
    let errors: Vec<_> =
        found["errors"].as_array().unwrap().iter().map(|error| (&error["path"], &error["forbidden"])).collect();
    let privileged = json!("$.baseConfigOverrideJson.HostConfig.Privileged");
    assert_eq!(errors, [(&json!("$.dockerImageUrl"), &json!(false)), (&privileged, &json!(true))]);
    assert_eq!(found["warnings"][0]["path"], "$.surplus");

    let right = json!({
        "dockerImageUrl": "registry.example/echo:1", "instanceNameOnToolbox": "echo", "accountToolInstanceId": "id-of-echo",
        "template": ["small", "hardened"], "environmentVariables": { "KEY": "hunter2" },
    });
    let valid = agent.call("POST /mcp/validate", right.to_string()).await;
    assert!(!valid.body.contains("hunter2"), "{}", valid.body);
    let found = &valid.json()["data"];
    assert_eq!(
        (&found["valid"], &found["errors"], &found["outlook"]["clear"]),
        (&json!(true), &json!([]), &json!(true))
    );
    assert_eq!(found["spec"]["environment_variables"], json!(["KEY"]));
    assert_eq!(
        (&found["spec"]["limits"]["cpu"], &found["spec"]["sandbox"]["read_only_root"]),
        (&json!(0.25), &json!(true))
    );
    assert_eq!(agent.call("GET /tools", "").await.json()["data"], json!([]));

    assert_eq!(agent.deploy("echo", None, 80).await.status, 201);
    let taken = agent.call("POST /mcp/validate", right.to_string()).await.json();
    assert_eq!(
        (&taken["data"]["outlook"]["clear"], &taken["data"]["outlook"]["name"]),
        (&json!(false), &json!("other_spec"))
    );
    assert_eq!(agent.call("POST /mcp/validate", "{").await.failure(), (400, "invalid_request".to_owned()));
    assert_eq!(
        agent.call("POST /mcp/validate", vec![b' '; 2 << 20]).await.failure(),
        (413, "invalid_request".to_owned())
    );
}

#[tokio::test]
async fn a_server_is_restarted_and_read_under_mcp_as_under_tools() {
    let agent = agent();
    assert_eq!(agent.deploy("echo", None, 80).await.status, 201);
    let restarted = agent.call("POST /mcp/servers/id-of-echo/restart", "").await;
    assert_eq!((restarted.status, &restarted.json()["data"]["state"]), (200, &json!("running")));
    for path in ["GET /mcp/servers/echo/logs", "GET /tools/echo/logs"] {
        let logs = agent.call(path, "").await;
        assert_eq!((logs.status, logs.headers[header::CONTENT_TYPE].to_str().unwrap()), (200, "application/x-ndjson"));
    }
    assert_eq!(agent.call("POST /mcp/servers/no/restart", "").await.failure(), (404, "instance_not_found".to_owned()));
}

#[tokio::test]
async fn a_restart_is_accepted_and_then_happens() {
    let agent = agent();
    let accepted = agent.call("POST /restart", "").await;
    assert_eq!((accepted.status, accepted.json()["success"].clone()), (StatusCode::ACCEPTED.as_u16(), json!(true)));
    assert!(agent.shutdown.is_cancelled());
}

#[tokio::test]
async fn secrets_are_taken_and_fetched_and_never_told() {
    let agent = agent();
    let failure = |status, code: &str| (status, code.to_owned());
    let asked = |name: &str, more: Value| {
        let mut body = json!({
            "dockerImageUrl": "registry.example/echo:1", "instanceNameOnToolbox": name,
            "accountToolInstanceId": format!("id-of-{name}"),
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body.to_string()
    };
    let wrong = asked("one", json!({ "secrets": { "KEY": ["hunter3"] }, "secretsFrom": "hunter3" }));
    let refused = agent.call("POST /tools", wrong).await;
    assert_eq!(refused.failure(), failure(400, "invalid_request"));
    assert!(!refused.body.contains("hunter3"), "{}", refused.body);

    let given = asked("one", json!({ "secrets": { "KEY": "hunter3" } }));
    let looked_at = agent.call("POST /mcp/validate", given.clone()).await;
    assert_eq!(looked_at.json()["data"]["spec"]["secrets"]["names"], json!(["KEY"]), "{}", looked_at.body);
    let deployed = agent.call("POST /tools", given).await;
    assert_eq!(deployed.status, 201, "{}", deployed.body);
    let nothing = agent.call("POST /mcp/credentials/refresh/one", "").await;
    assert_eq!(nothing.failure(), failure(409, "nothing_to_fetch"));
    assert_eq!(
        agent.call("POST /mcp/credentials/refresh/nobody", "").await.failure(),
        failure(404, "instance_not_found")
    );

    let deployed = agent.call("POST /tools", asked("two", json!({ "secretsFrom": "backend" }))).await;
    assert_eq!(deployed.status, 201, "{}", deployed.body);
    let fetched = agent.call("POST /mcp/credentials/refresh/id-of-two", "").await;
    let data = &fetched.json()["data"];
    assert_eq!((fetched.status, &data["secrets"], &data["changed"]), (200, &json!(["TOKEN"]), &json!(false)));
    for answer in [looked_at, deployed, fetched, agent.call("GET /tools", "").await] {
        assert!(!answer.body.contains("hunter"), "{}", answer.body);
    }
}
