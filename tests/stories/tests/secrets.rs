//! Secrets leave no trace: whatever is done with them, they are in the droplet's memory and in nothing that outlives it.

use std::error::Error;
use std::time::Duration;

use dtma_api::TokenHash;
use reqwest::Method;
use serde_json::{Value, json};
use stack::Stack;
use stories::backend::Backend;
use stories::mcp::instance;
use stories::traces::{self, Marked};
use stories::{Scene, Story, story_options, until};

const SOON: Duration = Duration::from_secs(60);
/// Where values are, and nowhere else.
const VAULT: &str = "/run/dtma/secrets/";
/// What a secret is called in all three.
const NAME: &str = "API_KEY";

/// A server that shows that it has a secret, without telling it: its output is in Docker's log if it is one on standard streams.
const KEEPER: &str = r#"
import hashlib, os, sys
from mcp.server import MCPServer
from mcp.server.transport_security import TransportSecuritySettings

server = MCPServer("keeper", version="1.0.0", log_level="WARNING")

@server.tool()
def file(name: str, challenge: str) -> str:
    """The digest of a challenge and the secret that is a file."""
    with open(f"/run/secrets/{name}", encoding="utf-8") as secret:
        return hashlib.sha256((challenge + secret.read()).encode()).hexdigest()

@server.tool()
def variable(name: str, challenge: str) -> str:
    """The digest of a challenge and the secret that is a variable."""
    return hashlib.sha256((challenge + os.environ[name]).encode()).hexdigest()

if sys.argv[1] == "stdio":
    server.run("stdio")
else:
    unchecked = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    server.run("streamable-http", host="0.0.0.0", port=8080, transport_security=unchecked)
"#;

/// A deploy of it, with what it is told of secrets.
fn keeper(scene: &Scene, name: &str, transport: &str, secrets: &Value) -> Value {
    let mut body = json!({
        "dockerImageUrl": scene.stack.mcp_image(),
        "instanceNameOnToolbox": name,
        "accountToolInstanceId": format!("id-of-{name}"),
        "mcpTransportType": transport,
        "baseConfigOverrideJson": { "Cmd": ["python3.11", "-c", KEEPER, transport] },
    });
    if let (Some(body), Some(secrets)) = (body.as_object_mut(), secrets.as_object()) {
        body.extend(secrets.clone());
    }
    body
}

fn inline(secret: &Marked) -> Value {
    json!({ "secrets": { NAME: secret.value() } })
}

async fn sent(scene: &Scene, method: Method, path: &str, body: &Value, status: u16) -> Story {
    let reply = scene.agent.send(method, path, Some(body)).await?;
    assert_eq!(reply.status, status, "{path}: {}", reply.text);
    Ok(())
}

/// The server behind the endpoint knows the value, as a file or as a variable.
async fn assert_has(scene: &Scene, name: &str, how: &str, secret: &Marked) -> Story {
    let client = scene.agent.mcp(&instance(scene, name).await?).await?;
    let challenge = Marked::new()?.value();
    let proof = client.call(how, json!({ "name": NAME, "challenge": challenge })).await?;
    client.close().await?;
    if proof == TokenHash::of(&format!("{challenge}{}", secret.value())).to_string() {
        return Ok(());
    }
    Err(format!("{name} hasn't got the value as a {how}").into())
}

async fn state(scene: &Scene, name: &str) -> Result<String, Box<dyn Error>> {
    let told = scene.agent.get(&format!("/tools/{name}")).await?.json();
    let state = told.pointer("/data/state").and_then(Value::as_str);
    state.map(str::to_owned).ok_or_else(|| told.to_string().into())
}

/// Writes a value where it must not be, in every form, and sees that each is found: in the writable layer of a container, in the journal,
/// in what Docker has written down of a container, and in its log.
async fn assert_the_search_finds(scene: &Scene, container: &str, canary: &Marked) -> Story {
    let before = traces::on_disk(scene, &[canary]).await?;
    assert!(
        before.iter().any(|place| place == "docker inspect, containers"),
        "as a variable of a container: {before:?}"
    );
    assert!(before.iter().any(|place| place.ends_with("/config.v2.json")), "{before:?}");
    assert!(before.iter().any(|place| place.ends_with("ledger.json")), "{before:?}");
    assert!(!before.iter().any(|place| place == "journal"), "nobody has logged it yet: {before:?}");

    let quoted = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
    for (form, text) in canary.forms() {
        let write = format!("printf %s {} > /canary.{form}", quoted(&text));
        scene.on_droplet(&["docker", "exec", "--user=0", container, "sh", "-c", &write]).await?;
    }
    let log = format!("printf '%s\\n' {} | systemd-cat", quoted(&canary.value()));
    scene.on_droplet(&["sh", "-c", &log]).await?;
    let print = format!("printf '%s\\n' {} > /proc/1/fd/2", quoted(&canary.value()));
    scene.on_droplet(&["docker", "exec", container, "sh", "-c", &print]).await?;

    let found = traces::on_disk(scene, &[canary]).await?;
    for (form, _) in canary.forms() {
        let layer = found
            .iter()
            .any(|place| place.starts_with("/var/lib/docker/") && place.ends_with(&format!("/canary.{form}")));
        assert!(layer, "the file with the value as {form}: {found:?}");
    }
    for place in ["journal", "docker logs", "docker events"] {
        assert!(found.iter().any(|it| it == place), "{place}: {found:?}");
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn secrets_are_in_memory_only_and_a_power_cut_takes_them() -> Story {
    let stack = Stack::start(story_options()).await?;
    let backend = Backend::before(&stack).await?;
    let scene = Scene::on(stack).await?;
    let [file, newer, variable, fetched, refreshed, canary] =
        [Marked::new()?, Marked::new()?, Marked::new()?, Marked::new()?, Marked::new()?, Marked::new()?];
    let all = [&file, &newer, &variable, &fetched, &refreshed];

    let as_variable = json!({ "secrets": { NAME: variable.value() }, "secretsAs": "environment" });
    backend.has("fetches", NAME, fetched.value());
    for (name, transport, secrets) in [
        ("files", "http", inline(&file)),
        ("variables", "stdio", as_variable.clone()),
        ("fetches", "http", json!({ "secretsFrom": "backend" })),
        ("plain", "http", json!({ "environmentVariables": { "CANARY": canary.value() } })),
    ] {
        sent(&scene, Method::POST, "/tools", &keeper(&scene, name, transport, &secrets), 201).await?;
    }
    assert_has(&scene, "files", "file", &file).await?;
    assert_has(&scene, "variables", "variable", &variable).await?;
    assert_has(&scene, "fetches", "file", &fetched).await?;

    sent(&scene, Method::PUT, "/tools/files", &keeper(&scene, "files", "http", &inline(&newer)), 200).await?;
    assert_has(&scene, "files", "file", &newer).await?;
    backend.has("fetches", NAME, refreshed.value());
    sent(&scene, Method::POST, "/mcp/credentials/refresh/fetches", &json!({}), 200).await?;
    assert_has(&scene, "fetches", "file", &refreshed).await?;
    scene.on_droplet(&["systemctl", "restart", "dtma-agent"]).await?;
    until("they are all back", SOON, async || {
        assert_has(&scene, "files", "file", &newer).await?;
        assert_has(&scene, "variables", "variable", &variable).await?;
        assert_has(&scene, "fetches", "file", &refreshed).await.map(Some)
    })
    .await?;

    assert_eq!(traces::on_disk(&scene, &all).await?, Vec::<String>::new());
    for present in [&newer, &variable, &refreshed] {
        let places = traces::in_memory(&scene, &[present]).await?;
        assert!(!places.is_empty() && places.iter().all(|place| place.starts_with(VAULT)), "{places:?}");
    }
    assert_eq!(traces::in_memory(&scene, &[&file, &fetched]).await?, Vec::<String>::new(), "what was replaced is gone");
    assert_eq!(scene.on_droplet(&["stat", "--file-system", "--format=%T", VAULT]).await?.trim(), "tmpfs");
    assert_eq!(scene.on_droplet(&["stat", "--format=%U %a", VAULT]).await?.trim(), "dtma 700");
    let container = instance(&scene, "plain").await?.container_id;
    assert_the_search_finds(&scene, &container, &canary).await?;

    scene.cut_power().await?;
    until("what the backend has is fetched again", SOON, async || {
        assert_has(&scene, "fetches", "file", &refreshed).await.map(Some)
    })
    .await?;
    for name in ["files", "variables"] {
        until("what came with the deploy is missed", SOON, async || {
            Ok((state(&scene, name).await? == "needs_secrets").then_some(()))
        })
        .await?;
    }
    assert_eq!(traces::on_disk(&scene, &all).await?, Vec::<String>::new());
    assert_eq!(traces::in_memory(&scene, &[&file, &newer, &variable, &fetched]).await?, Vec::<String>::new());

    // The same deploys bring them back.
    for (name, transport, secrets) in [("files", "http", inline(&newer)), ("variables", "stdio", as_variable)] {
        sent(&scene, Method::POST, "/tools", &keeper(&scene, name, transport, &secrets), 200).await?;
    }
    assert_has(&scene, "files", "file", &newer).await?;
    assert_has(&scene, "variables", "variable", &variable).await
}
