//! The agent on a real droplet: survives what kills it, refuses what it must, and still serves the callers of the old one.

use std::time::Duration;

use dtma_api::instance::{DeployRequest, InstanceState, Transport};
use dtma_api::{AccountToolInstanceId, InstanceName, Token};
use reqwest::Method;
use serde_json::{Value, json};
use stack::prepare::{BARE_IMAGE, DEFAULT_IMAGE};
use stories::{Scene, Story, assert_contract_kept, until, until_all_run};

const SOON: Duration = Duration::from_secs(60);

fn mcp_server(scene: &Scene, name: &str) -> Result<DeployRequest, Box<dyn std::error::Error>> {
    let id = format!("id-of-{name}").parse::<AccountToolInstanceId>()?;
    let request = DeployRequest::new(&scene.stack.mcp_image(), name.parse::<InstanceName>()?, id);
    Ok(DeployRequest { mcp_transport_type: Some(Transport::Http), ..request })
}

async fn assert_adds(scene: &Scene, name: &str) -> Story {
    let reply = scene.agent.get(&format!("/tools/{name}")).await?;
    let instance = reply.decode::<dtma_api::instance::InstanceAnswer>()?.data;
    let client = scene.agent.mcp(&instance).await?;
    let sum = client.call("add", json!({ "a": 19, "b": 23 })).await?;
    assert_eq!(sum, "42");
    client.close().await?;
    Ok(())
}

const PID_OF_AGENT: [&str; 4] = ["systemctl", "show", "--property=MainPID", "dtma-agent"];

async fn until_restarted(scene: &Scene, pid_before: &str) -> Story {
    until("systemd has started the agent again", SOON, async || {
        let now = scene.on_droplet(&PID_OF_AGENT).await?;
        Ok((now != pid_before && now.trim() != "MainPID=0").then_some(()))
    })
    .await
}

async fn assert_lifecycle(scene: &Scene, name: &str) -> Story {
    let calls = [
        (Method::POST, format!("/tools/{name}/stop"), "exited"),
        (Method::POST, format!("/tools/{name}/stop"), "exited"),
        (Method::POST, format!("/tools/{name}/start"), "running"),
        (Method::POST, format!("/tools/{name}/start"), "running"),
        (Method::POST, format!("/tools/{name}/restart"), "running"),
    ];
    for (method, path, expected) in calls {
        let reply = scene.agent.send(method, &path, None).await?;
        assert_eq!(reply.status, 200, "{path}: {}", reply.text);
        let instance = scene.agent.get(&format!("/tools/{name}")).await?.json();
        assert_eq!(instance.pointer("/data/status").and_then(Value::as_str), Some(expected), "{path}: {instance}");
    }
    let path = format!("/tools/{name}");
    let reply = scene.agent.send(Method::DELETE, &path, None).await?;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let reply = scene.agent.send(Method::DELETE, &path, None).await?;
    assert_eq!(reply.status, 404, "{}", reply.text);
    Ok(())
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn tools_survive_the_agents_death_and_a_power_cut() -> Story {
    let scene = Scene::set(DEFAULT_IMAGE).await?;
    for name in ["adder", "sleeper"] {
        let deployed = scene.agent.deploy(&mcp_server(&scene, name)?).await?;
        assert_eq!(deployed.data.instance.state, InstanceState::Running);
    }
    let reply = scene.agent.send(Method::POST, "/tools/sleeper/stop", None).await?;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let container = scene.agent.get("/tools/adder").await?.json();

    let before = scene.on_droplet(&PID_OF_AGENT).await?;
    scene.on_droplet(&["systemctl", "kill", "--signal=KILL", "dtma-agent"]).await?;
    until_restarted(&scene, &before).await?;
    until("the tool is listed as running", SOON, async || {
        let now = scene.agent.get("/tools/adder").await?.json();
        Ok((now.pointer("/data/state") == Some(&json!("running"))).then_some(()))
    })
    .await?;
    let after = scene.agent.get("/tools/adder").await?.json();
    assert_eq!(after.pointer("/data/container_id"), container.pointer("/data/container_id"), "the tool wasn't touched");
    assert_adds(&scene, "adder").await?;

    scene.cut_power().await?;
    // Docker starts it before the agent is up; the server itself takes a moment longer than its container.
    until("the tool answers again", SOON, async || assert_adds(&scene, "adder").await.map(Some)).await?;
    let stopped = scene.agent.get("/tools/sleeper").await?.json();
    assert_eq!(stopped.pointer("/data/state"), Some(&json!("stopped")), "what was stopped stays stopped: {stopped}");

    assert_lifecycle(&scene, "adder").await?;
    assert_lifecycle(&scene, "sleeper").await?;
    assert_contract_kept(&scene.stack).await
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_bare_image_gets_docker_from_cloud_init_and_serves_the_same() -> Story {
    let scene = Scene::set(BARE_IMAGE).await?;
    scene.agent.deploy(&mcp_server(&scene, "adder")?).await?;
    until_all_run(&scene.agent, SOON).await?;
    assert_adds(&scene, "adder").await?;
    let reply = scene.stack.provisioner().delete(stories::AGENT, 60).await?;
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert!(scene.stack.cloud().droplets().await?.is_empty());
    Ok(())
}

fn deploy_body(image: &str, name: &str, host_config: &Value) -> Value {
    json!({
        "dockerImageUrl": image,
        "instanceNameOnToolbox": name,
        "accountToolInstanceId": format!("id-of-{name}"),
        "baseConfigOverrideJson": { "Env": ["A=1"], "HostConfig": host_config },
    })
}

/// What the old agent's callers send: no field of ours, and the agent's own port asked for.
fn old_deploy(image: &str, name: &str) -> Value {
    deploy_body(image, name, &json!({ "PortBindings": { "8080/tcp": [{ "HostPort": "30000" }] } }))
}

/// A request that must be refused: what it is, its body, the status codes and the code it may get.
struct Refused {
    what: &'static str,
    body: Value,
    status: &'static [u16],
    code: &'static str,
}

fn refusals(image: &str, taken_port: &str) -> Vec<Refused> {
    let with = |name: &str, host_config: Value| deploy_body(image, name, &host_config);
    let registry = image.split('/').next().unwrap_or_default();
    let missing = format!("{registry}/no-such-image:1");
    vec![
        Refused { what: "an empty object", body: json!({}), status: &[400], code: "invalid_request" },
        Refused {
            what: "missing fields",
            body: json!({ "dockerImageUrl": image }),
            status: &[400],
            code: "invalid_request",
        },
        Refused {
            what: "an image that doesn't exist",
            body: old_deploy(&missing, "no-image"),
            status: &[404, 422],
            code: "image_not_found",
        },
        Refused {
            what: "a taken port",
            body: with("taken", json!({ "PortBindings": { "8080/tcp": [{ "HostPort": taken_port }] } })),
            status: &[409],
            code: "port_conflict",
        },
        Refused {
            what: "privileged",
            body: with("strong", json!({ "Privileged": true })),
            status: &[422],
            code: "forbidden_option",
        },
        Refused {
            what: "the host's network",
            body: with("hosted", json!({ "NetworkMode": "host" })),
            status: &[422],
            code: "forbidden_option",
        },
        Refused {
            what: "the Docker socket",
            body: with("socket", json!({ "Binds": ["/var/run/docker.sock:/var/run/docker.sock"] })),
            status: &[422],
            code: "forbidden_option",
        },
    ]
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn what_is_refused_gets_the_contracts_answer_and_leaves_nothing() -> Story {
    let scene = Scene::set(DEFAULT_IMAGE).await?;
    let image = scene.stack.mcp_image();
    let taken = json!({ "PortBindings": { "8080/tcp": [{ "HostPort": "28080" }] } });
    let holder = deploy_body(&image, "holder", &taken);
    let reply = scene.agent.deploy_raw(&holder).await?;
    assert_eq!(reply.status, 201, "{}", reply.text);
    let before = scene.docker_inventory().await?;

    for refused in refusals(&image, "28080") {
        let reply = scene.agent.deploy_raw(&refused.body).await?;
        assert!(refused.status.contains(&reply.status), "{}: {} {}", refused.what, reply.status, reply.text);
        let answer = reply.json();
        assert_eq!(answer["success"], json!(false), "{}: {answer}", refused.what);
        assert_eq!(answer["code"], json!(refused.code), "{}: {answer}", refused.what);
        assert!(answer["error"].as_str().is_some_and(|error| error.len() > 10), "{}: {answer}", refused.what);
        if refused.code == "port_conflict" {
            assert!(
                answer["error"].as_str().is_some_and(|error| error.contains("holder")),
                "names the holder: {answer}"
            );
        }
        assert_eq!(scene.docker_inventory().await?, before, "left behind by {}", refused.what);
    }
    assert_eq!(scene.agent.status().await?.tool_instances.len(), 1, "nothing but the holder is listed");

    let request = scene.agent.request(Method::POST, "/tools").header("content-type", "application/json");
    let reply = request.body("{\"dockerImageUrl\": ").send().await?;
    assert_eq!(reply.status().as_u16(), 400);
    assert_eq!(reply.json::<Value>().await?["code"], json!("invalid_request"));

    let no_key = scene.agent.request_without_key(Method::POST, "/tools").json(&holder).send().await?;
    assert_eq!(no_key.status().as_u16(), 401);
    assert_eq!(no_key.json::<Value>().await?["success"], json!(false));
    let wrong_key = scene.agent.with_key(Token::generate()?).deploy_raw(&holder).await?;
    assert_eq!(wrong_key.status, 403, "{}", wrong_key.text);
    assert_eq!(wrong_key.json()["success"], json!(false));
    Ok(())
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn the_user_data_of_a_running_droplet_holds_no_secret_that_still_works() -> Story {
    let scene = Scene::set(DEFAULT_IMAGE).await?;
    let everything =
        scene.on_droplet(&["sh", "-c", "cat /var/lib/cloud/instance/user-data.txt /var/lib/cloud/seed/*/*"]).await?;
    let file = scene.stack.file();
    for (name, secret) in [
        ("the fleet key", &file.fleet_api_key),
        ("the internal secret", &file.internal_api_secret),
        ("the cloud's token", &file.cloud_token),
    ] {
        assert!(!everything.contains(secret.expose()), "{name} is in the user data");
    }
    // Whatever looks like one of our tokens is tried wherever a credential opens something.
    let is_token_char = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let candidates: std::collections::BTreeSet<&str> =
        everything.split(|c: char| !is_token_char(c)).filter(|word| word.len() == 43).collect();
    assert!(!candidates.is_empty(), "the enrolment token should be there, spent");
    let http = reqwest::Client::builder().no_proxy().build()?;
    let own = scene.stack.provisioner();
    for candidate in candidates {
        let enrolment = json!({
            "certificate_pin": scene.environment.agent_certificate_pin,
            "retry_key": Token::generate()?,
            "agent_version": "0.0.0",
        });
        let heartbeat = json!({ "dtma_version": "0.0.0", "system_status": {
            "cpu_load_percent": 0.0, "memory": { "total_bytes": 0, "active_bytes": 0, "free_bytes": 0, "used_bytes": 0 },
            "disk": { "mount": "/", "total_bytes": 0, "used_bytes": 0, "free_bytes": 0 } }, "tool_statuses": [] });
        for (path, body) in [("enroll", &enrolment), ("heartbeat", &heartbeat)] {
            let reply =
                http.post(format!("{}/agent/v1/{path}", own.url())).bearer_auth(candidate).json(body).send().await?;
            let (status, text) = (reply.status().as_u16(), reply.text().await?);
            assert_eq!(status, 401, "a token of the user data at {path}: {text}");
        }
        let reply = scene.agent.with_key(Token::from(candidate.to_owned())).get("/tools").await?;
        assert_eq!(reply.status, 403, "a token of the user data at the agent: {}", reply.text);
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn callers_of_the_old_agent_find_what_they_expect() -> Story {
    let scene = Scene::set(DEFAULT_IMAGE).await?;
    let agent = &scene.agent;

    // `start` before any deploy: 404 as JSON, upon which the caller deploys and starts again.
    let reply = agent.send(Method::POST, "/tools/tool%2Eone/start", None).await?;
    assert_eq!(reply.status, 404, "{}", reply.text);
    assert_eq!(reply.json()["success"], json!(false), "{}", reply.text);
    let body = old_deploy(&scene.stack.mcp_image(), "tool.one");
    let reply = agent.deploy_raw(&body).await?;
    assert_eq!(reply.status, 201, "{}", reply.text);
    let deployed = reply.json();
    let port = deployed.pointer("/data/ports/0/public_port").and_then(Value::as_u64);
    assert!(port.is_some_and(|port| port != 30_000), "the agent's own port isn't given away: {deployed}");
    assert!(deployed.pointer("/data/warnings/0").is_some(), "and the caller is told: {deployed}");
    let reply = agent.send(Method::POST, "/tools/tool%2Eone/start", None).await?;
    assert_eq!(reply.status, 200, "a URL-encoded name: {}", reply.text);
    let reply = agent.deploy_raw(&body).await?;
    assert_eq!(reply.status, 200, "the same deploy again: {}", reply.text);
    let mut other = body.clone();
    other["baseConfigOverrideJson"]["Env"] = json!(["A=2"]);
    let reply = agent.deploy_raw(&other).await?;
    assert_eq!(reply.status, 409, "another deploy of that name: {}", reply.text);

    let status = agent.get("/status").await?.json();
    let instance = &status["tool_instances"][0];
    assert_eq!(status["service"], json!("DTMA"), "{status}");
    assert_eq!(status["environment"]["hasApiKey"], json!(true), "{status}");
    assert_eq!(instance["instance_name_on_toolbox"], json!("tool.one"), "{status}");
    assert_eq!(instance["status"], json!("running"), "{status}");
    assert_eq!(instance["image"], json!(scene.stack.mcp_image()), "{status}");
    assert!(instance["created"].as_i64().is_some_and(|seconds| seconds > 1_700_000_000), "{status}");
    assert!(status.pointer("/system_metrics/memory/total_bytes").and_then(Value::as_u64).is_some_and(|it| it > 0));
    // Without a credential: that it lives, and nothing about what it runs.
    let public: Value = agent.request_without_key(Method::GET, "/status").send().await?.json().await?;
    assert!(public.get("tool_instances").is_none() && public.get("version").is_some(), "{public}");

    // A later version of the caller names containers.
    let container = instance["container_id"].as_str().ok_or("no container id")?;
    for path in [format!("/tools/{container}/stop"), format!("/tools/{}/start", container.get(..12).ok_or("short id")?)]
    {
        let reply = agent.send(Method::POST, &path, None).await?;
        assert_eq!(reply.status, 200, "{path}: {}", reply.text);
    }
    let reply = agent.get(&format!("/tools/{container}/logs?tail=10")).await?;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let reply = agent.send(Method::DELETE, &format!("/tools/{container}"), None).await?;
    assert_eq!(reply.status, 200, "{}", reply.text);

    let reply = agent.send(Method::POST, "/ssh/execute", Some(&json!({ "command": "id" }))).await?;
    assert_eq!((reply.status, reply.json()["code"].clone()), (410, json!("no_remote_shell")));
    let before = scene.on_droplet(&PID_OF_AGENT).await?;
    let reply = agent.send(Method::POST, "/restart", None).await?;
    assert_eq!(reply.status, 202, "{}", reply.text);
    until_restarted(&scene, &before).await?;
    until("the agent is back", SOON, async || Ok((agent.get("/health").await?.status == 200).then_some(()))).await?;

    // Plaintext on the same port is told what to do, with no tool behind it.
    let plain = agent.url().replace("https://", "http://");
    let reply = reqwest::Client::builder().no_proxy().build()?.get(format!("{plain}/status")).send().await?;
    assert_eq!(reply.status().as_u16(), 426);
    assert_eq!(reply.json::<Value>().await?["code"], json!("tls_required"));
    Ok(())
}
