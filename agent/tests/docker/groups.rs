//! `/mcp/groups` on a real Docker Engine.

use axum::http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::host::agent::{Agent, body, words};
use crate::host::{Host, docker};

fn server(host: &Host, word: &str) -> Value {
    body(host, word, json!({ "mcpTransportType": "http", "volumes": [{ "name": "data", "path": "/data" }] }))
}

async fn post(agent: &Agent, group: &Value) -> (StatusCode, Value) {
    let (status, text) = agent.text(Method::POST, "/mcp/groups", Some(&group.to_string())).await;
    (status, serde_json::from_str(&text).unwrap())
}

fn networks(host: &Host) -> Vec<String> {
    let label = format!("label=dtma.scope={}", host.scope);
    docker(&["network", "ls", "--format", "{{.Name}}", "--filter", &label]).lines().map(str::to_owned).collect()
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_group_is_deployed_in_order_looked_at_and_removed_with_its_network() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let id = host.name("team");
    let group = json!({
        "groupId": id,
        "servers": [server(&host, "web"), server(&host, "store"), body(&host, "worker", words(&["serve", "8080"]))],
        "options": { "sharedNetworking": true, "dependencyOrder": [host.name("store"), host.name("web")],
            "maxConcurrentDeployments": 1 },
    });
    let (status, answer) = post(&agent, &group).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let data = &answer["data"];
    assert_eq!((&data["totalServers"], &data["successfulDeployments"]), (&json!(3), &json!(3)), "{answer}");
    assert_eq!((&data["groupId"], &data["errors"]), (&json!(id), &json!({})), "{answer}");
    let started = |word: &str| host.inspect(&host.name(word))["State"]["StartedAt"].as_str().unwrap().to_owned();
    assert!(started("store") < started("web"), "the store comes first");
    let (status, again) = post(&agent, &group).await;
    assert_eq!(status, StatusCode::OK, "{again}");

    let (status, seen) = agent.call(Method::GET, &format!("/mcp/health/{id}")).await;
    assert_eq!((status, &seen["data"]["collectiveStatus"]), (StatusCode::OK, &json!("healthy")), "{seen}");
    let stop = format!("/tools/{}/stop", host.name("web"));
    assert_eq!(agent.call(Method::POST, &stop).await.0, StatusCode::OK);
    let (_, seen) = agent.call(Method::GET, "/mcp/status").await;
    assert_eq!(seen["data"]["groups"][0]["collectiveStatus"], "degraded", "{seen}");
    assert_eq!(seen["data"]["groups"][0]["runningServers"], 2, "{seen}");
    assert_eq!(seen["data"]["summary"]["totalServers"], 3, "{seen}");

    // An update leaves its member in the group and on the group's network.
    let name = host.name("store");
    let next =
        body(&host, "store", json!({ "mcpTransportType": "http", "environmentVariables": { "GREETING": "new" } }));
    let (status, updated) = agent.text(Method::PUT, &format!("/tools/{name}"), Some(&next.to_string())).await;
    assert_eq!(status, StatusCode::OK, "{updated}");
    let updated: Value = serde_json::from_str(&updated).unwrap();
    assert_eq!(updated["data"]["group_id"], json!(id), "{updated}");
    let attached = |word: &str| {
        let seen = host.inspect(&host.name(word))["NetworkSettings"]["Networks"].as_object().unwrap().clone();
        seen.keys().cloned().collect::<Vec<_>>()
    };
    assert_eq!(attached("store"), attached("worker"));

    let (status, removed) = agent.call(Method::DELETE, &format!("/mcp/groups/{id}?gracefulTimeoutMs=500")).await;
    assert_eq!(status, StatusCode::OK, "{removed}");
    assert_eq!(removed["data"]["removedServers"].as_array().unwrap().len(), 3, "{removed}");
    let (status, gone) = agent.call(Method::DELETE, &format!("/mcp/groups/{id}")).await;
    assert_eq!((status, &gone["code"]), (StatusCode::NOT_FOUND, &json!("group_not_found")), "{gone}");
    host.until("the group's network is gone", || networks(&host).iter().all(|name| !name.contains("team"))).await;
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn of_a_group_that_can_not_be_had_the_atomic_one_leaves_nothing_and_the_other_what_runs() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let id = host.name("team");
    let mut ends = body(&host, "ends", words(&["exit", "3"]));
    ends["volumes"] = json!([{ "name": "data", "path": "/data" }]);
    let mut group = json!({
        "groupId": id,
        "servers": [server(&host, "first"), ends, server(&host, "last")],
        "options": { "sharedNetworking": true, "atomic": true,
            "dependencyOrder": [host.name("first"), host.name("ends"), host.name("last")] },
    });
    let (status, answer) = post(&agent, &group).await;
    assert_eq!((status, &answer["code"]), (StatusCode::CONFLICT, &json!("group_rolled_back")), "{answer}");
    let errors = &answer["details"]["errors"];
    assert_eq!(errors[host.name("ends")]["code"], "exited", "{answer}");
    assert!(errors[host.name("ends")]["details"]["log"].to_string().contains("last words"), "{answer}");
    for word in ["first", "last"] {
        assert_eq!(errors[host.name(word)]["code"], "member_failed", "{answer}");
    }
    assert_eq!(host.left(), Vec::<String>::new());
    host.until("the group's network is gone", || networks(&host).iter().all(|name| !name.contains("team"))).await;

    group["options"]["atomic"] = json!(false);
    let (status, answer) = post(&agent, &group).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    assert_eq!(answer["data"]["successfulDeployments"], 1, "{answer}");
    assert_eq!(answer["data"]["deployedServers"][0]["instance_name_on_toolbox"], json!(host.name("first")), "{answer}");
    assert_eq!(answer["data"]["errors"].as_object().unwrap().len(), 2, "{answer}");
    let (status, removed) = agent.call(Method::DELETE, &format!("/mcp/groups/{id}?forceRemove=true")).await;
    assert_eq!(status, StatusCode::OK, "{removed}");
}
