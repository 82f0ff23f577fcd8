//! A server on its standard input and output in a real container, reached by the official client over streamable HTTP.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::{Method, StatusCode};
use dtma_agent::disks::{Disks, Reserve};
use dtma_agent::mcp::McpProber;
use dtma_agent::reconcile::Timing;
use rmcp::model::{CallToolRequestParams, ErrorCode, ProtocolVersion};
use rmcp::service::{RunningService, ServiceError};
use rmcp::transport::StreamableHttpClientTransport;
use rmcp::transport::streamable_http_client::StreamableHttpClientTransportConfig;
use rmcp::{ClientLifecycleMode, ClientServiceExt as _, RoleClient};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::host::agent::{Agent, body};
use crate::host::{Host, docker};

pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// An MCP server that needs nothing but a shell. Its tools: `hang` never answers, `die` ends it, `large` answers with so many bytes, and
/// `count` says in which container it was called and how often, and whatever else its process's number and which `initialize` it has seen.
pub(crate) const SERVER: &str = r#"
seen=0
calls=0
echo "starting up, and saying so where messages belong"
while IFS= read -r line; do
  id=${line#*\"id\":}; id=${id%%[,\}]*}
  say() { printf '{"jsonrpc":"2.0","id":%s,"result":%s}\n' "$id" "$1"; }
  case "$line" in
    *'"method":"initialize"'*)
      seen=$((seen + 1))
      say '{"protocolVersion":"2025-11-25","capabilities":{"tools":{}},"serverInfo":{"name":"shell","version":"1"}}' ;;
    *'"method":"tools/list"'*)
      say '{"tools":[{"name":"who","inputSchema":{"type":"object"}}]}' ;;
    *'"name":"hang"'*) ;;
    *'"name":"die"'*) exit 3 ;;
    *'"name":"count"'*)
      calls=$((calls + 1))
      say "{\"content\":[{\"type\":\"text\",\"text\":\"$HOSTNAME $calls\"}]}" ;;
    *'"name":"large"'*)
      printf '{"jsonrpc":"2.0","id":%s,"result":{"content":[{"type":"text","text":"' "$id"
      dd if=/dev/zero bs=1048576 count=8 2>/dev/null | tr '\0' x
      printf '"}]}}\n' ;;
    *'"method":"tools/call"'*) say "{\"content\":[{\"type\":\"text\",\"text\":\"$$ $seen\"}]}" ;;
    *'"method":"ping"'*) say '{}' ;;
    *'"id":'*) printf '{"jsonrpc":"2.0","id":%s,"error":{"code":-32601,"message":"Method not found"}}\n' "$id" ;;
  esac
done
"#;

/// Probed as the program probes.
fn start(host: &Host, state: &Path) -> Agent {
    let timing = Timing { settle: Duration::from_millis(300), ..Timing::default() };
    let disks = Disks::new(state, Reserve { bytes: 0, percent: 0 });
    Agent::start_asking(|bridges| Arc::new(McpProber::new(bridges.clone())), host.engine(), state, timing, disks)
}

pub(crate) type Client = RunningService<RoleClient, ()>;

async fn client(agent: &Agent, name: &str) -> Client {
    let lifecycle =
        ClientLifecycleMode::Auto { preferred_versions: vec![ProtocolVersion::V_2026_07_28], legacy_version: None };
    client_beginning(agent, name, lifecycle).await
}

pub(crate) async fn client_beginning(agent: &Agent, name: &str, lifecycle: ClientLifecycleMode) -> Client {
    static PROVIDER: std::sync::Once = std::sync::Once::new();
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
    let (address, key) = agent.listen().await;
    let mut config = StreamableHttpClientTransportConfig::with_uri(format!("http://{address}/tools/{name}/mcp"));
    config.auth_header = Some(key.to_owned());
    let transport = StreamableHttpClientTransport::with_client(reqwest::Client::new(), config);
    timeout(LIMIT, ().serve_with_lifecycle(transport, lifecycle)).await.unwrap().unwrap()
}

pub(crate) async fn call(client: &Client, tool: &'static str) -> Result<String, ServiceError> {
    let answer = timeout(LIMIT, client.call_tool(CallToolRequestParams::new(tool))).await.unwrap()?;
    let answer = serde_json::to_value(&answer).unwrap();
    Ok(answer["content"][0]["text"].as_str().unwrap().to_owned())
}

/// Again and again until it works, as a patient caller does.
async fn call_again(client: &Client, tool: &'static str) -> String {
    let begun = Instant::now();
    loop {
        match call(client, tool).await {
            Ok(answer) => return answer,
            Err(error) => assert!(begun.elapsed() < LIMIT, "it never works again: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn deploys(host: &Host, more: Value) -> Value {
    let mut asked = json!({
        "dockerImageUrl": host.with_shell(),
        "mcpTransportType": "stdio",
        "baseConfigOverrideJson": { "Cmd": ["sh", "-c", SERVER] },
    });
    asked.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body(host, "shell", asked)
}

pub(crate) fn failed_at_once(result: Result<String, ServiceError>) {
    match result {
        Err(ServiceError::McpError(error)) => assert_eq!(error.code, ErrorCode::INTERNAL_ERROR, "{error:?}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_server_on_its_standard_input_serves_many_and_survives_its_own_end_a_restart_and_the_agents() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = start(&host, state.path());
    let name = host.name("shell");
    let (status, answer) = agent.deploy(&deploys(&host, json!({}))).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    assert_eq!(answer["data"]["health"], "healthy", "the gate is a handshake: {answer}");
    let begun = Instant::now();
    loop {
        let (_, shown) = agent.call(Method::GET, &format!("/tools/{name}")).await;
        if shown["data"]["server"]["tools"] == json!(["who"]) {
            assert_eq!(shown["data"]["server"]["name"], "shell", "{shown}");
            break;
        }
        assert!(begun.elapsed() < LIMIT, "its tools are never shown: {shown}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(answer["data"]["mcp_url"], format!("/tools/{name}/mcp"));

    let (alice, bob) = (client(&agent, &name).await, client(&agent, &name).await);
    let tools = timeout(LIMIT, alice.list_all_tools()).await.unwrap().unwrap();
    assert_eq!(tools.iter().map(|tool| tool.name.as_ref()).collect::<Vec<_>>(), ["who"]);
    let first = call(&alice, "who").await.unwrap();
    assert_eq!(call(&bob, "who").await.unwrap(), first);
    assert!(first.ends_with(" 1"), "both share one process and one handshake: {first}");
    assert_eq!(call(&bob, "large").await.unwrap().len(), 8 * 1024 * 1024);

    // Its process is killed under a call.
    let (hung, ()) = tokio::join!(call(&alice, "hang"), async {
        let reads = || docker(&["logs", &name]).contains("saying so");
        host.until("the server speaks", reads).await;
        // It has the call when it answers another that came after it.
        call(&bob, "who").await.unwrap();
        docker(&["kill", &name]);
    });
    failed_at_once(hung);
    let again = call_again(&alice, "who").await;
    assert!(again.ends_with(" 1"), "a new process, a new handshake: {again}");
    assert_eq!(call_again(&bob, "who").await, again);

    // It ends by itself, and Docker starts it again.
    failed_at_once(call(&alice, "die").await);
    assert!(call_again(&alice, "who").await.ends_with(" 1"));

    // The agent restarts it.
    let (status, answer) = agent.call(Method::POST, &format!("/tools/{name}/restart")).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert!(call_again(&bob, "who").await.ends_with(" 1"));

    // The agent itself dies; the process goes on and is shaken hands with once more.
    agent.kill().await;
    drop((alice, bob));
    let agent = start(&host, state.path());
    let carol = client(&agent, &name).await;
    assert!(call_again(&carol, "who").await.ends_with(" 2"));

    let (status, _) = agent.call(Method::DELETE, &format!("/tools/{name}")).await;
    assert_eq!(status, StatusCode::OK);
    assert!(call(&carol, "who").await.is_err());
    assert_eq!(host.left(), Vec::<String>::new());
}
