//! A server that remembers and isn't made for more than one client: on a droplet each client gets a process of its own, and none is left
//! behind, whoever dies.

use std::collections::BTreeSet;
use std::error::Error;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use stack::forward::Forward;
use stack::prepare::{self, DEFAULT_IMAGE};
use stack::sdks::{Era, Sdk};
use stack::{Unwatched, Workspace};
use stories::mcp::instance;
use stories::mcp::session::{Outcome, Session};
use stories::{Scene, Story, until};

const SOON: Duration = Duration::from_secs(60);
/// Two minutes after a client has hung up without a goodbye, and the time until that is looked for.
const LONG: Duration = Duration::from_secs(240);
const MOST: u16 = 3;

/// Counts how often it was called, in its memory and in a file on its volume, and says where. `crash` ends it.
const SERVER: &str = r#"
import json, os, socket, sys
calls = 0
for line in sys.stdin:
    message = json.loads(line)
    method, params = message.get("method"), message.get("params", {})
    if "id" not in message:
        continue
    if method == "initialize":
        result = {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}},
                  "serverInfo": {"name": "counter", "version": "1"}}
    elif method == "tools/list":
        result = {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in ("count", "crash")]}
    elif method == "tools/call" and params["name"] == "crash":
        os._exit(3)
    elif method == "tools/call":
        calls += 1
        with open("/data/calls", "a+") as noted:
            noted.write("x")
            noted.seek(0)
            all = len(noted.read())
        result = {"content": [{"type": "text", "text": f"{socket.gethostname()} {calls} {all}"}]}
    else:
        result = {}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
"#;

fn deploy(scene: &Scene) -> Value {
    json!({
        "dockerImageUrl": scene.stack.servers_image(),
        "instanceNameOnToolbox": "counter",
        "accountToolInstanceId": "id-of-counter",
        "baseConfigOverrideJson": { "Cmd": ["python3.11", "-c", SERVER] },
        "mcpTransportType": "stdio",
        "sessionMode": "per-session",
        "maxSessions": MOST,
        "volumes": [{ "name": "data", "path": "/data" }],
        "resourceLimits": { "memory": "64m" },
    })
}

/// In which container a call was carried out, how many there were in that process, and how many on the volume.
#[derive(Debug, PartialEq, Eq)]
struct Counted {
    container: String,
    own: u32,
    all: u32,
}

fn counted(text: &str) -> Result<Counted, Box<dyn Error>> {
    let words: Vec<&str> = text.split(' ').collect();
    let [container, own, all] = words[..] else { return Err(format!("not a count: {text}").into()) };
    Ok(Counted { container: container.to_owned(), own: own.parse()?, all: all.parse()? })
}

async fn count(session: &Session, id: u64) -> Result<Counted, Box<dyn Error>> {
    let outcome = session.call(id, "count", json!({})).await;
    counted(outcome.text().ok_or_else(|| format!("{outcome:?}"))?)
}

/// The containers of sessions on the droplet, by their short ids.
async fn guests(scene: &Scene) -> Result<BTreeSet<String>, Box<dyn Error>> {
    let listed = scene.on_droplet(&["docker", "ps", "-aq", "--filter", "label=dtma.session"]).await?;
    Ok(listed.lines().map(str::to_owned).collect())
}

async fn until_guests(scene: &Scene, what: &str, number: usize) -> Story {
    until(what, SOON, async || Ok((guests(scene).await?.len() == number).then_some(()))).await
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn each_client_of_a_server_that_remembers_has_a_process_of_its_own_and_none_is_left_behind() -> Story {
    let sdks = prepare::mcp(&Workspace::find(), &Unwatched).await?;
    let scene = Scene::set(DEFAULT_IMAGE).await?;
    let empty = scene.docker_inventory().await?;
    let forward = Forward::to(scene.agent.clone()).await?;
    let reply = scene.agent.deploy_raw(&deploy(&scene)).await?;
    assert_eq!(reply.status, 201, "{}", reply.text);
    let view = instance(&scene, "counter").await?;
    assert_eq!(view.sessions, Some(0));
    let (main, path) = (view.container_id, view.mcp_url.ok_or("it has no MCP endpoint")?);
    let open = || Session::open(&scene.agent, &path, json!({}));

    // Two at once: each process counts its own client's calls, and what is on the volume is everybody's.
    let begun = Instant::now();
    let (alice, bob) = tokio::try_join!(open(), open())?;
    println!("two sessions at once, with their containers and handshakes: {:?}", begun.elapsed());
    let (first, second) = (count(&alice, 1).await?, count(&bob, 1).await?);
    assert_eq!((first.own, second.own, second.all), (1, 1, 2));
    let third = count(&alice, 2).await?;
    assert_eq!((&third.container, third.own, third.all), (&first.container, 2, 3));
    assert_eq!(guests(&scene).await?, BTreeSet::from([first.container.clone(), second.container.clone()]));
    assert!(!main.starts_with(&first.container) && !main.starts_with(&second.container));
    assert_eq!(instance(&scene, "counter").await?.sessions, Some(2));

    // There are as many as there may be, and then a sentence that says so.
    let carol = open().await?;
    let full = open().await.err().ok_or("there is no end to sessions")?.to_string();
    assert!(full.contains("503") && full.contains("too_many_sessions"), "{full}");

    // A crash is its own client's only.
    let crash = carol.call(1, "crash", json!({})).await;
    assert!(matches!(crash, Outcome::Failed(-32603, _)), "{crash:?}");
    assert!(matches!(carol.call(2, "count", json!({})).await, Outcome::Away(404, _)));
    until_guests(&scene, "the crashed one is removed", 2).await?;
    assert_eq!(count(&bob, 2).await?.own, 2);

    // A client that says goodbye takes its container with it; clients people use do.
    bob.close().await?;
    until_guests(&scene, "a session that was ended is removed", 1).await?;
    let calls = [("count", json!({})), ("count", json!({}))];
    let (url, legacy) = (forward.url(&path), Era::Legacy);
    let (python, typescript) = tokio::try_join!(
        sdks.talk(Sdk::Python, &url, legacy, &calls),
        sdks.talk(Sdk::TypeScript, &url, legacy, &calls),
    )?;
    let mut containers = BTreeSet::new();
    for talk in [python, typescript] {
        let (one, two) = (counted(&talk.answers[0].text)?, counted(&talk.answers[1].text)?);
        assert_eq!((one.own, two.own, &one.container), (1, 2, &two.container));
        containers.insert(one.container);
    }
    assert_eq!(containers.len(), 2);
    // One of them says goodbye, the other only hangs up.
    until("the programs' sessions are removed", LONG, async || Ok((guests(&scene).await?.len() == 1).then_some(())))
        .await?;

    // The agent is killed: the instance goes on, and sessions, which were in its memory, are over.
    scene.on_droplet(&["systemctl", "kill", "--signal=KILL", "dtma-agent"]).await?;
    until_guests(&scene, "what the killed agent left is removed", 0).await?;
    let stale = until("the agent answers again", SOON, async || {
        let outcome = alice.call(3, "count", json!({})).await;
        Ok((!matches!(outcome, Outcome::Wrong(_) | Outcome::Away(502 | 503, _))).then_some(outcome))
    });
    assert!(matches!(stale.await?, Outcome::Away(404, _)));
    let alice = until("a session", SOON, async || open().await.map(Some)).await?;
    let anew = count(&alice, 1).await?;
    assert_eq!((anew.own, anew.container == first.container), (1, false));
    assert!(anew.all > third.all, "the volume has not forgotten: {anew:?}");
    assert_eq!(instance(&scene, "counter").await?.container_id, main);

    let reply = scene.agent.send(Method::DELETE, "/tools/counter?volumes=true", None).await?;
    assert_eq!(reply.status, 200, "{}", reply.text);
    // The agent's network stays, as after any deploy.
    let left = scene.docker_inventory().await?;
    assert_eq!(left.lines().filter(|name| *name != "dtma").collect::<Vec<_>>(), empty.lines().collect::<Vec<_>>());
    Ok(())
}
