//! Sessions with containers of their own on a real engine: what they are made like, who sees what, and that none is left, whoever dies.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::{Method, StatusCode};
use dtma_agent::disks::{Disks, Reserve};
use dtma_agent::egress::{self, EgressState};
use dtma_agent::mcp::McpProber;
use dtma_agent::reconcile::Timing;
use dtma_agent::store::vault::Vault;
use rmcp::ClientLifecycleMode;
use rmcp::model::ProtocolVersion;
use serde_json::{Value, json};

use crate::bridge::{Client, LIMIT, SERVER, call, client_beginning, failed_at_once};
use crate::host::agent::{Agent, body};
use crate::host::{Host, docker, docker_may_fail};

/// Probed as the program probes, with secrets in memory.
fn start(host: &Host, state: &Path, secrets: &Path) -> Agent {
    let timing = Timing { settle: Duration::from_millis(300), ..Timing::default() };
    let disks = Disks::new(state, Reserve { bytes: 0, percent: 0 });
    let vault = Vault::new(secrets, &host.scope, false);
    let engine = host.engine().with_secrets_in(vault.clone());
    Agent::start_all(|bridges| Arc::new(McpProber::new(bridges.clone())), engine, state, timing, disks, vault)
}

/// A client of the era with sessions.
async fn client(agent: &Agent, name: &str) -> Client {
    let begun = Instant::now();
    let client = client_beginning(agent, name, ClientLifecycleMode::Initialize).await;
    println!("a session began after {:?}", begun.elapsed());
    client
}

/// Where it was called, and how often.
async fn count(client: &Client) -> (String, u32) {
    let answer = call(client, "count").await.unwrap();
    let (container, calls) = answer.split_once(' ').unwrap();
    (container.to_owned(), calls.parse().unwrap())
}

/// The containers of sessions that are there, by their short ids.
fn guests(host: &Host) -> BTreeSet<String> {
    let (scope, session) = (format!("label=dtma.scope={}", host.scope), "label=dtma.session");
    docker(&["ps", "-aq", "--filter", &scope, "--filter", session]).lines().map(str::to_owned).collect()
}

async fn until_guests(host: &Host, wanted: &[&str]) {
    let wanted: BTreeSet<String> = wanted.iter().map(|id| (*id).to_owned()).collect();
    let begun = Instant::now();
    while guests(host) != wanted {
        assert!(begun.elapsed() < LIMIT, "{:?} instead of {wanted:?}", guests(host));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// How many sessions the agent says there are, once it is this many.
async fn until_shown(agent: &Agent, name: &str, sessions: u32) {
    let begun = Instant::now();
    loop {
        let (_, shown) = agent.call(Method::GET, &format!("/tools/{name}")).await;
        assert_eq!(shown["data"]["session_mode"], "per-session", "{shown}");
        if shown["data"]["sessions"] == sessions {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "{shown}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What a message is answered with.
async fn post(agent: &Agent, name: &str, headers: &[(&str, &str)], message: &Value) -> (StatusCode, Value) {
    let (address, key) = agent.listen().await;
    let mut asked = reqwest::Client::new()
        .post(format!("http://{address}/tools/{name}/mcp"))
        .bearer_auth(key)
        .header("accept", "application/json, text/event-stream")
        .json(message);
    for (header, value) in headers {
        asked = asked.header(*header, *value);
    }
    let answer = asked.send().await.unwrap();
    (answer.status(), answer.json().await.unwrap())
}

async fn initialize(agent: &Agent, name: &str) -> (StatusCode, Value) {
    let params =
        json!({ "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": { "name": "x", "version": "1" } });
    post(agent, name, &[], &json!({ "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params })).await
}

/// Where a client of the era without sessions is answered, and how often anybody was there.
async fn count_without_session(agent: &Agent, name: &str) -> String {
    let meta = json!({ "io.modelcontextprotocol/protocolVersion": "2026-07-28" });
    let params = json!({ "name": "count", "arguments": {}, "_meta": meta });
    let headers = [("mcp-protocol-version", "2026-07-28"), ("mcp-method", "tools/call"), ("mcp-name", "count")];
    let message = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params });
    let (status, answer) = post(agent, name, &headers, &message).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer["result"]["content"][0]["text"].as_str().unwrap().to_owned()
}

/// A server that remembers, with everything that a session's container has to have in common with it.
fn deploys(host: &Host, more: Value) -> Value {
    let mut asked = json!({
        "dockerImageUrl": host.with_shell(),
        "mcpTransportType": "stdio",
        "sessionMode": "per-session",
        "maxSessions": 2,
        "baseConfigOverrideJson": { "Cmd": ["sh", "-c", SERVER] },
        "resourceLimits": { "memory": "64m" },
        "volumes": [{ "name": "data", "path": "/data" }],
        "secrets": { "TOKEN": "hunter2" },
        "egress": "none",
    });
    asked.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body(host, "each", asked)
}

/// What the engine has to say of a container, but for what is its own.
fn made(host: &Host, container: &str) -> Value {
    let found = host.inspect(container);
    let mut settings = found["HostConfig"].clone();
    settings.as_object_mut().unwrap().remove("RestartPolicy");
    // Docker's order of these is chance.
    let mut mounts = found["Mounts"].as_array().unwrap().clone();
    mounts.sort_by_key(|mount| mount["Destination"].to_string());
    json!({
        "image": found["Image"], "settings": settings, "command": found["Config"]["Cmd"], "variables": found["Config"]["Env"],
        "mounts": mounts,
    })
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn each_session_has_a_container_of_its_own_until_it_ends_in_whatever_way() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let secrets = tempfile::Builder::new().prefix("dtma-secrets-").tempdir_in("/dev/shm").unwrap();
    let agent = start(&host, state.path(), secrets.path());
    let name = host.name("each");
    let (status, answer) = agent.deploy(&deploys(&host, json!({}))).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    assert_eq!((&answer["data"]["session_mode"], &answer["data"]["sessions"]), (&json!("per-session"), &json!(0)));
    let main = answer["data"]["container_id"].as_str().unwrap()[..12].to_owned();

    // Two at once, each with a memory of its own.
    let (alice, bob) = tokio::join!(client(&agent, &name), client(&agent, &name));
    let ((in_one, first), (in_other, second)) = (count(&alice).await, count(&bob).await);
    assert_eq!((count(&alice).await, first, second), ((in_one.clone(), 2), 1, 1));
    assert_eq!(BTreeSet::from([&in_one, &in_other, &main]).len(), 3);
    until_guests(&host, &[&in_one, &in_other]).await;
    until_shown(&agent, &name, 2).await;
    assert!(call(&alice, "who").await.unwrap().ends_with(" 1"), "its server saw one handshake, its client's");

    // Made like the instance's own, and never to be taken for it.
    assert_eq!(made(&host, &in_one), made(&host, &main));
    let labels = host.inspect(&in_one)["Config"]["Labels"].clone();
    assert_eq!((&labels["dtma.session-of"], labels.get("dtma.instance")), (&json!(name), None), "{labels}");
    assert_eq!(docker(&["exec", &in_one, "cat", "/run/secrets/TOKEN"]), "hunter2");
    let address = |container: &str| {
        let networks = host.inspect(container)["NetworkSettings"]["Networks"].clone();
        networks[format!("dtma-{}.closed", host.scope)]["IPAddress"].as_str().unwrap().to_owned()
    };
    assert_ne!(address(&in_one), address(&main));
    assert_eq!(agent.call(Method::GET, &format!("/tools/{in_one}")).await.0, StatusCode::NOT_FOUND);

    // One more is refused before anything is made.
    let (status, refused) = initialize(&agent, &name).await;
    assert_eq!((status, &refused["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("too_many_sessions")), "{refused}");
    until_guests(&host, &[&in_one, &in_other]).await;

    // Who has no session speaks with the instance's own.
    assert_eq!(count_without_session(&agent, &name).await, format!("{main} 1"));

    // Killed by hand under a call, with a call of the other under way.
    let (hung, ()) = tokio::join!(call(&alice, "hang"), async {
        count(&bob).await;
        docker(&["kill", &in_one]);
    });
    failed_at_once(hung);
    until_guests(&host, &[&in_other]).await;
    assert_eq!(count(&bob).await, (in_other.clone(), 3));
    drop(alice);
    // Its server ends by itself.
    let dave = client(&agent, &name).await;
    failed_at_once(call(&dave, "die").await);
    until_guests(&host, &[&in_other]).await;
    // Removed by hand.
    let erin = client(&agent, &name).await;
    docker(&["rm", "-f", &count(&erin).await.0]);
    until_shown(&agent, &name, 1).await;
    // Its client says goodbye.
    let frank = client(&agent, &name).await;
    frank.cancel().await.unwrap();
    until_guests(&host, &[&in_other]).await;

    // The agent dies, and with it every session; the instance goes on.
    agent.kill().await;
    let agent = start(&host, state.path(), secrets.path());
    until_guests(&host, &[]).await;
    let begun = Instant::now();
    while agent.call(Method::GET, &format!("/tools/{name}")).await.1["data"]["state"] != "running" {
        assert!(begun.elapsed() < LIMIT);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(host.inspect(&name)["Id"].as_str().unwrap().starts_with(&main));
    let grace = client(&agent, &name).await;
    assert_eq!(count(&grace).await.1, 1);

    // Stopped, started, updated: sessions are of what was before.
    let (status, answer) = agent.call(Method::POST, &format!("/tools/{name}/stop")).await;
    assert_eq!((status, guests(&host).len()), (StatusCode::OK, 0), "{answer}");
    assert_eq!(initialize(&agent, &name).await.1["code"], "instance_stopped");
    agent.call(Method::POST, &format!("/tools/{name}/start")).await;
    let heidi = client(&agent, &name).await;
    let before = count(&heidi).await.0;
    let next = deploys(&host, json!({ "environmentVariables": { "VERSION": "2" } }));
    let (status, answer) = agent.text(Method::PUT, &format!("/tools/{name}"), Some(&next.to_string())).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    // Her session is answered with 404, and she begins anew.
    let (after, calls) = count(&heidi).await;
    assert_eq!((after != before, calls), (true, 1));
    until_guests(&host, &[&after]).await;
    let variables = host.inspect(&after)["Config"]["Env"].clone();
    assert!(variables.as_array().unwrap().contains(&json!("VERSION=2")), "{variables}");

    // Removed with what sessions had in common with it.
    let (status, answer) = agent.call(Method::DELETE, &format!("/tools/{name}?volumes=true")).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn members_of_a_group_reach_the_instance_and_not_its_sessions_by_its_name() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let secrets = tempfile::Builder::new().prefix("dtma-secrets-").tempdir_in("/dev/shm").unwrap();
    let agent = start(&host, state.path(), secrets.path());
    let (name, other) = (host.name("each"), host.name("other"));
    let group = json!({
        "groupId": host.name("team"),
        "servers": [deploys(&host, json!({})), body(&host, "other", json!({}))],
        "options": { "sharedNetworking": true },
    });
    let (status, answer) = agent.post("/mcp/groups", &group).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let alice = client(&agent, &name).await;
    let own = count(&alice).await.0;
    let network = format!("dtma-{}.group.{}", host.scope, host.name("team"));
    let address = |container: &str| {
        host.inspect(container)["NetworkSettings"]["Networks"][&network]["IPAddress"].as_str().unwrap().to_owned()
    };
    let (of_instance, of_session) = (address(&name), address(&own));
    assert_ne!(of_instance, of_session);
    for _ in 0..4 {
        assert_eq!(docker(&["exec", &other, "/server", "resolve", &name]), of_instance);
    }
    let (status, answer) = agent.call(Method::DELETE, &format!("/mcp/groups/{}", host.name("team"))).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    agent.call(Method::DELETE, &format!("/tools/{name}?volumes=true")).await;
    assert_eq!(guests(&host).len(), 0);
    docker(&["volume", "rm", &format!("dtma-{}.{name}.data", host.scope)]);
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_session_may_go_where_its_instance_may() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let secrets = tempfile::Builder::new().prefix("dtma-secrets-").tempdir_in("/dev/shm").unwrap();
    let agent = start(&host, state.path(), secrets.path());
    let name = host.name("each");
    host.stranger(&host.name("server"), &["-e", "GREETING=out there"]);
    let seen = host.inspect(&host.name("server"));
    let server = seen["NetworkSettings"]["IPAddress"].as_str().unwrap().to_owned();
    let listed = json!({ "allow": [format!("{server}:8080")] });
    let more =
        json!({ "egress": listed, "dockerImageUrl": host.image, "baseConfigOverrideJson": { "Cmd": ["lines"] } });
    let (status, answer) = agent.deploy(&deploys(&host, more)).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let alice = client(&agent, &name).await;
    let own = guests(&host).pop_first().unwrap();
    let EgressState::Open(proxy) = agent.instances.egress().state() else { panic!("the proxy is needed") };
    let ask = async |port: u16| {
        let request = format!("GET http://{server}:{port}/ HTTP/1.1|Host: x|Connection: close||");
        let (own, proxy) = (own.clone(), proxy.ip().to_string());
        // Elsewhere, because the agent's proxy has to go on meanwhile.
        let asked = tokio::task::spawn_blocking(move || {
            docker_may_fail(&["exec", &own, "/server", "ask", &proxy, &egress::PORT.to_string(), &request])
        });
        String::from_utf8_lossy(&asked.await.unwrap().stdout).trim().to_owned()
    };
    let (allowed, other) = (ask(8080).await, ask(8081).await);
    assert!(allowed.starts_with("HTTP/1.1 200") && allowed.ends_with("out there"), "{allowed}");
    assert!(other.starts_with("HTTP/1.1 403"), "{other}");
    drop(alice);
    assert_eq!(agent.call(Method::DELETE, &format!("/tools/{name}?volumes=true")).await.0, StatusCode::OK);
    docker(&["rm", "-f", &host.name("server")]);
    assert_eq!(host.left(), Vec::<String>::new());
}

/// Knows both eras, and keeps to the one it is addressed in first. Its one tool says where it was called, and in which era.
const TWO_MINDED: &str = r#"
era=
while IFS= read -r line; do
  id=${line#*\"id\":}; id=${id%%[,\}]*}
  say() { printf '{"jsonrpc":"2.0","id":%s,%s}\n' "$id" "$1"; }
  case "$line" in
    *'"id":'*) ;;
    *) continue ;;
  esac
  case "$line" in
    *'"method":"server/discover"'*) begins=newer ;;
    *'"method":"initialize"'*) begins=older ;;
    *) begins=$era ;;
  esac
  era=${era:-$begins}
  if [ "$begins" != "$era" ]; then
    say '"error":{"code":-32600,"message":"this connection is of the other era"}'
    continue
  fi
  case "$line" in
    *'"method":"initialize"'*)
      say '"result":{"protocolVersion":"2025-11-25","capabilities":{"tools":{}},"serverInfo":{"name":"two","version":"1"}}' ;;
    *'"method":"server/discover"'*)
      say '"result":{"resultType":"complete","ttlMs":0,"cacheScope":"private","supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}' ;;
    *'"method":"tools/call"'*)
      say "\"result\":{\"resultType\":\"complete\",\"content\":[{\"type\":\"text\",\"text\":\"$HOSTNAME $era\"}]}" ;;
    *) say '"result":{}' ;;
  esac
done
"#;

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_server_that_keeps_to_one_era_has_a_container_for_each_and_the_instances_is_the_older_one() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let secrets = tempfile::Builder::new().prefix("dtma-secrets-").tempdir_in("/dev/shm").unwrap();
    let agent = start(&host, state.path(), secrets.path());
    let name = host.name("each");
    let more = json!({ "sessionMode": "shared", "maxSessions": null, "baseConfigOverrideJson": { "Cmd": ["sh", "-c", TWO_MINDED] } });
    let (status, answer) = agent.deploy(&deploys(&host, more)).await;
    assert_eq!((status, &answer["data"]["session_mode"]), (StatusCode::CREATED, &json!("shared")), "{answer}");
    let main = answer["data"]["container_id"].as_str().unwrap()[..12].to_owned();
    let preferred_versions = vec![ProtocolVersion::V_2026_07_28];
    let newer = || ClientLifecycleMode::Discover { preferred_versions: preferred_versions.clone() };

    let old = client(&agent, &name).await;
    assert_eq!(call(&old, "where").await.unwrap(), format!("{main} older"));
    assert_eq!(guests(&host).len(), 0, "nobody needs another yet");
    let (alice, bob) = (client_beginning(&agent, &name, newer()).await, client_beginning(&agent, &name, newer()).await);
    let other = guests(&host).pop_first().unwrap();
    assert_eq!(guests(&host).len(), 1, "both have the same");
    for new in [&alice, &bob] {
        assert_eq!(call(new, "where").await.unwrap(), format!("{other} newer"));
    }
    assert_eq!(call(&old, "where").await.unwrap(), format!("{main} older"));

    // Killed by hand, it is made anew for whoever comes next.
    docker(&["kill", &other]);
    let begun = Instant::now();
    let again = loop {
        match call(&alice, "where").await {
            Ok(again) => break again,
            Err(error) => assert!(begun.elapsed() < LIMIT, "it never works again: {error}"),
        }
    };
    assert!(again.ends_with(" newer") && !again.starts_with(&other), "{again}");
    assert_eq!(call(&old, "where").await.unwrap(), format!("{main} older"));

    agent.kill().await;
    let agent = start(&host, state.path(), secrets.path());
    until_guests(&host, &[]).await;
    assert_eq!(agent.call(Method::DELETE, &format!("/tools/{name}?volumes=true")).await.0, StatusCode::OK);
    assert_eq!(host.left(), Vec::<String>::new());
}
