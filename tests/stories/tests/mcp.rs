//! Servers people use, deployed, and used through the agent by clients people use; and the official conformance suite, which has to
//! find a server through the agent as it finds it without.

use std::collections::BTreeMap;
use std::error::Error;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use axum::Router;
use axum::response::Html;
use axum::routing::get;
use reqwest::Method;
use serde_json::{Value, json};
use stack::command::Job;
use stack::forward::Forward;
use stack::prepare::{self, DEFAULT_IMAGE};
use stack::sdks::{Era, Scenario, Scores, Sdk};
use stack::{Stack, Unwatched, Workspace};
use stories::mcp::{Client, Server, Speaks, instance};
use stories::{Scene, Story, story_options, until};

const SOON: Duration = Duration::from_secs(60);
/// Written on the page that is fetched.
const WORD: &str = "quillwort";
/// A revision of each era.
const REVISIONS: [&str; 2] = ["2025-11-25", "2026-07-28"];

/// A web page on the host, for whoever can reach that address; its URL.
async fn page(host: IpAddr) -> Result<String, Box<dyn Error>> {
    let listener = tokio::net::TcpListener::bind((host, 0)).await?;
    let url = format!("http://{}/page", listener.local_addr()?);
    let body = format!("<html><body><article><h1>A page</h1><p>About the {WORD}.</p></article></body></html>");
    let routes = Router::new().route("/page", get(async move || Html(body)));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    Ok(url)
}

/// What went wrong, all of it, since one combination says little about the others.
#[derive(Default)]
struct Wrongs(Vec<String>);

impl Wrongs {
    fn note(&mut self, what: &str, begun: Instant, outcome: Result<(), Box<dyn Error>>) {
        let took = begun.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => println!("{what}: well, in {took:.1} s"),
            Err(error) => {
                println!("{what}: {error}");
                self.0.push(format!("{what}: {error}"));
            }
        }
    }

    fn verdict(self) -> Story {
        if self.0.is_empty() { Ok(()) } else { Err(self.0.join("\n").into()) }
    }
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn every_client_uses_every_server_through_the_agent() -> Story {
    let sdks = prepare::mcp(&Workspace::find(), &Unwatched).await?;
    let scene = Scene::set(DEFAULT_IMAGE).await?;
    let forward = Forward::to(scene.agent.clone()).await?;
    let page = page(scene.stack.gateway()).await?;
    let mut wrongs = Wrongs::default();
    for server in Server::all(&page, WORD) {
        let begun = Instant::now();
        let reply = scene.agent.deploy_raw(&server.deploy(&scene.stack)).await?;
        assert_eq!(reply.status, 201, "{}: {}", server.name, reply.text);
        println!("{}: deployed in {:.1} s", server.name, begun.elapsed().as_secs_f64());
        for client in std::iter::once(Client::Rust).chain(Client::PROGRAMS) {
            let begun = Instant::now();
            let outcome = client.use_through_agent(&server, &scene, &forward, &sdks).await;
            wrongs.note(&format!("{} ({}), {client}", server.name, server.speaks), begun, outcome);
        }
        let reply = scene.agent.send(Method::DELETE, &format!("/tools/{}?volumes=true", server.name), None).await?;
        assert_eq!(reply.status, 200, "{}", reply.text);
    }
    wrongs.verdict()
}

/// What the story above rests on: when it fails and this doesn't, it is what lies between.
#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn every_client_uses_every_server_with_no_agent_between() -> Story {
    let workspace = Workspace::find();
    let stack = Stack::start(story_options()).await?;
    let sdks = prepare::mcp(&workspace, &Unwatched).await?;
    let image = image_here(&stack).await?;
    let page = page(stack.gateway()).await?;
    let mut servers = Server::all(&page, WORD);
    servers.push(Server::memory());
    let moods = [("moody", None), ("moody-noise", Some("noise"))];
    servers.extend(moods.map(|(name, mood)| Server::moody(name, mood)));
    servers.extend([Server::fixture(Speaks::Stdio), Server::fixture(Speaks::Http)]);
    let mut wrongs = Wrongs::default();
    for server in servers {
        let run = server.docker_run(&stack, &image);
        let target = match server.speaks {
            Speaks::Stdio => format!("stdio:{}", json!(run)),
            Speaks::Sse => format!("sse:{}", listening(&run, "/sse").await?),
            Speaks::Http => listening(&run, "/mcp").await?,
            // The clients' SDKs have given it up.
            Speaks::Websocket => continue,
        };
        for client in Client::PROGRAMS {
            // The one combination the SDK doesn't offer: a transport of the old era has only the old beginning.
            if server.speaks == Speaks::Sse && matches!(client, Client::Program(_, Era::Auto)) {
                continue;
            }
            let begun = Instant::now();
            let outcome = client.use_directly(&server, &target, &sdks).await;
            wrongs.note(&format!("{} ({}), {client}", server.name, server.speaks), begun, outcome);
        }
    }
    stack.remove().await?;
    wrongs.verdict()
}

/// The servers' image on this machine's own engine, under a name that stays: as the droplets' images, it is there for the next run.
async fn image_here(stack: &Stack) -> Result<String, Box<dyn Error>> {
    let passing = stack.servers_image_here();
    let tag = passing.rsplit(':').next().unwrap_or_default();
    let name = format!("dtma-mcp-servers:{tag}");
    for words in [&["pull", "--quiet", &passing][..], &["tag", &passing, &name], &["rmi", &passing]] {
        docker(&std::iter::once(&"docker").chain(words).map(|&word| word.to_owned()).collect::<Vec<_>>()).await?;
    }
    Ok(name)
}

/// Runs a container in the background and waits until somebody listens; the URL of its endpoint.
async fn listening(run: &[String], path: &str) -> Result<String, Box<dyn Error>> {
    let id = docker(run).await?;
    let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    let address = docker(&["docker", "inspect", &id, "--format", format].map(str::to_owned)).await?;
    until("it listens", SOON, async || {
        Ok(tokio::net::TcpStream::connect((address.as_str(), 8080)).await.is_ok().then_some(()))
    })
    .await?;
    Ok(format!("http://{address}:8080{path}"))
}

/// Runs a command of Docker's on this machine; the last line it wrote.
async fn docker(words: &[String]) -> Result<String, Box<dyn Error>> {
    let log = tempfile::NamedTempFile::new()?;
    let [program, arguments @ ..] = words else { return Err("no command".into()) };
    Job::new(program, log.path().to_path_buf()).args(arguments).run(&Unwatched).await?;
    let told = std::fs::read_to_string(log.path())?;
    Ok(told.lines().next_back().unwrap_or_default().to_owned())
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn what_the_memory_server_was_told_survives_an_update() -> Story {
    let sdks = prepare::mcp(&Workspace::find(), &Unwatched).await?;
    let scene = Scene::set(DEFAULT_IMAGE).await?;
    let forward = Forward::to(scene.agent.clone()).await?;
    let memory = Server::memory();
    let mut spec = memory.deploy(&scene.stack);
    let reply = scene.agent.deploy_raw(&spec).await?;
    assert_eq!(reply.status, 201, "{}", reply.text);
    Client::Rust.use_through_agent(&memory, &scene, &forward, &sdks).await?;
    let before = instance(&scene, memory.name).await?.container_id;

    spec["environmentVariables"]["VERSION"] = json!("2");
    let reply = scene.agent.send(Method::PUT, "/tools/memory", Some(&spec)).await?;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let now = instance(&scene, memory.name).await?;
    assert_ne!(now.container_id, before, "it is another container");
    let path = now.mcp_url.ok_or("it has no MCP endpoint")?;
    for sdk in [Sdk::Python, Sdk::TypeScript] {
        let talk = sdks.talk(sdk, &forward.url(&path), Era::Auto, &[("read_graph", json!({}))]).await?;
        assert!(talk.answers[0].text.contains("it rains"), "{sdk:?}: {talk:?}");
    }
    Ok(())
}

/// The scores through the agent beside those without it, and every scenario that is worse.
fn compare(what: &str, direct: &Scores, through: &Scores) -> Vec<String> {
    let total = |scores: &Scores| scores.values().map(|it| it.passed.len()).sum::<usize>();
    println!("{what}: {} checks passed directly, {} through the agent", total(direct), total(through));
    let nothing = Scenario::default();
    let mut worse = Vec::new();
    for (name, expected) in direct {
        let found = through.get(name).unwrap_or(&nothing);
        if expected.passed != found.passed {
            let lost: Vec<&String> = expected.passed.iter().filter(|id| !found.passed.contains(id)).collect();
            let gained: Vec<&String> = found.passed.iter().filter(|id| !expected.passed.contains(id)).collect();
            println!("{what}, {name}: lost {lost:?}, gained {gained:?}, failed {:?}", found.failed);
            let known = KNOWN.iter().any(|(here, scenario, _)| *here == what && scenario == name);
            if !lost.is_empty() && !known {
                worse.push(format!("{what}, {name}: {lost:?} {:?}", found.failed));
            }
        }
    }
    worse
}

/// Where a server on its standard streams still scores less over the bridge, and why. Anything else that is lost is a fault.
const KNOWN: [(&str, &str, &str); 1] = [(
    "2025-11-25, stdio",
    "server-sse-multiple-streams",
    "a check that is only made of answers that come as a stream; the bridge's come as JSON",
)];

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn the_conformance_suite_finds_a_server_through_the_agent_as_it_is() -> Story {
    let sdks = prepare::mcp(&Workspace::find(), &Unwatched).await?;
    let scene = Scene::set(DEFAULT_IMAGE).await?;
    let forward = Forward::to(scene.agent.clone()).await?;
    let fixture = Server::fixture(Speaks::Http);
    let image = image_here(&scene.stack).await?;
    let url = listening(&fixture.docker_run(&scene.stack, &image), "/mcp").await?;
    let mut direct = BTreeMap::new();
    for revision in REVISIONS {
        let scores = sdks.conformance(&url, revision).await?;
        let passed = scores.values().filter(|it| it.failed.is_empty()).count();
        assert!(passed >= 20, "{revision}: the fixture itself passes {passed} scenarios only: {scores:?}");
        direct.insert(revision, scores);
    }

    let mut worse = Vec::new();
    for speaks in [Speaks::Http, Speaks::Stdio] {
        let server = Server::fixture(speaks);
        let deployed: Value = scene.agent.deploy_raw(&server.deploy(&scene.stack)).await?.json();
        let path = deployed.pointer("/data/mcp_url").and_then(Value::as_str).ok_or_else(|| deployed.to_string())?;
        for (revision, expected) in &direct {
            let through = sdks.conformance(&forward.url(path), revision).await?;
            worse.extend(compare(&format!("{revision}, {speaks}"), expected, &through));
        }
    }
    if worse.is_empty() { Ok(()) } else { Err(worse.join("\n").into()) }
}
