//! `PUT /tools/{ref}` on a real Docker Engine.

use axum::http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::host::agent::{Agent, body, words};
use crate::host::{Host, docker};

async fn put(agent: &Agent, name: &str, body: &Value) -> (StatusCode, Value) {
    let (status, text) = agent.text(Method::PUT, &format!("/tools/{name}"), Some(&body.to_string())).await;
    (status, serde_json::from_str(&text).unwrap())
}

fn server(host: &Host, greeting: &str) -> Value {
    let more = json!({
        "mcpTransportType": "http",
        "environmentVariables": { "GREETING": greeting },
        "volumes": [{ "name": "data", "path": "/data" }],
        "baseConfigOverrideJson": { "HostConfig": { "PortBindings": { "8080/tcp": [{ "HostPort": host.port().to_string() }] } } },
    });
    body(host, "one", more)
}

fn greeting(host: &Host) -> Value {
    let seen = host.inspect(&host.name("one"));
    let all = seen["Config"]["Env"].as_array().unwrap().clone();
    all.into_iter().find(|variable| variable.as_str().is_some_and(|text| text.starts_with("GREETING="))).unwrap()
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn an_update_takes_over_with_the_same_port_and_volume_and_leaves_nothing_of_the_old() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let one = host.name("one");
    let (status, deployed) = agent.deploy(&server(&host, "first")).await;
    assert_eq!(status, StatusCode::CREATED, "{deployed}");
    let mut next = server(&host, "second");
    next["healthGate"] = json!({ "timeout_seconds": 20, "successes": 3 });
    let (status, updated) = put(&agent, &one, &next).await;
    assert_eq!(status, StatusCode::OK, "{updated}");
    assert_eq!(updated["data"]["state"], "running");
    assert_eq!(updated["data"]["last_update"]["outcome"], "applied");
    assert_ne!(updated["data"]["container_id"], deployed["data"]["container_id"]);
    assert_eq!(updated["data"]["ports"], deployed["data"]["ports"]);
    assert_eq!(updated["data"]["names"], json!([format!("/{one}")]));
    assert_eq!(greeting(&host), "GREETING=second");
    let left = host.left();
    assert_eq!(left.len(), 3, "one container, one volume, one endpoint: {left:?}");
    let (status, again) = put(&agent, &one, &next).await;
    assert_eq!((status, &again["data"]["container_id"]), (StatusCode::OK, &updated["data"]["container_id"]));
    for verb in ["stop", "start", "restart"] {
        let (status, answer) = agent.call(Method::POST, &format!("/tools/{one}/{verb}")).await;
        assert_eq!(status, StatusCode::OK, "{verb}: {answer}");
    }
    let (status, answer) = agent.call(Method::DELETE, &format!("/tools/{one}?volumes=true")).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_new_version_that_fails_is_taken_back_with_its_last_words() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let one = host.name("one");
    let (status, deployed) = agent.deploy(&server(&host, "first")).await;
    assert_eq!(status, StatusCode::CREATED, "{deployed}");
    let with = |changes: Value| {
        let mut next = server(&host, "second");
        next.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        next
    };
    let mut ends = words(&["exit", "3"]);
    ends["volumes"] = json!([{ "name": "more", "path": "/more" }]);
    let cases = [
        (
            "an image nobody has",
            with(json!({ "dockerImageUrl": "127.0.0.1:9/none:1", "pullPolicy": "always" })),
            "pull_failed",
        ),
        ("a program that ends", with(ends), "exited"),
        (
            "a server that never answers",
            with(json!({ "mcpPort": 81, "healthGate": { "timeout_seconds": 2 } })),
            "not_answering",
        ),
        (
            "a program that isn't there",
            with(json!({ "baseConfigOverrideJson": { "Entrypoint": ["/nothing"] } })),
            "exited",
        ),
    ];
    let before = host.left();
    for (what, next, cause) in cases {
        let (status, answer) = put(&agent, &one, &next).await;
        assert_eq!((status, &answer["code"]), (StatusCode::CONFLICT, &json!("update_rolled_back")), "{what}: {answer}");
        assert_eq!(answer["details"]["cause"], cause, "{what}: {answer}");
        if what == "a program that ends" {
            assert!(answer["details"]["log"].to_string().contains("last words"), "{answer}");
        }
        let (_, view) = agent.call(Method::GET, &format!("/tools/{one}")).await;
        assert_eq!(
            (&view["data"]["state"], &view["data"]["health"]),
            (&json!("running"), &json!("healthy")),
            "{what}: {view}"
        );
        assert_eq!(view["data"]["container_id"], deployed["data"]["container_id"], "{what}");
        assert_eq!(view["data"]["last_update"]["outcome"], "rolled_back", "{what}");
        assert_eq!(host.left(), before, "{what}");
    }
    assert_eq!(greeting(&host), "GREETING=first");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn what_is_changed_about_a_container_behind_the_agents_back_is_put_right_without_a_restart() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let one = host.name("one");
    let (status, deployed) = agent.deploy(&server(&host, "first")).await;
    assert_eq!(status, StatusCode::CREATED, "{deployed}");
    let id = deployed["data"]["container_id"].as_str().unwrap();
    let as_made = host.inspect(id);
    docker(&[
        "update",
        "--memory",
        "100m",
        "--memory-swap",
        "200m",
        "--pids-limit",
        "999",
        "--cpus",
        "0.5",
        "--restart",
        "no",
        id,
    ]);
    docker(&["rename", id, &host.name("other")]);
    docker(&["pause", id]);
    host.until("it is as it was", || {
        let now = host.inspect(id);
        let same = |path: &str| now.pointer(path) == as_made.pointer(path);
        [
            "/HostConfig/Memory",
            "/HostConfig/MemorySwap",
            "/HostConfig/PidsLimit",
            "/HostConfig/NanoCpus",
            "/HostConfig/RestartPolicy",
        ]
        .into_iter()
        .chain(["/Name", "/State/Status", "/State/StartedAt"])
        .all(same)
    })
    .await;
    let (_, view) = agent.call(Method::GET, &format!("/tools/{one}")).await;
    assert_eq!(view["data"]["container_id"], id);
}
