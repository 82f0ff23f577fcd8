//! Servers people use and clients people use, for stories about what lies between them: which server is started how, what it is asked,
//! and what a right answer is.

pub mod load;
pub mod session;

use std::error::Error;
use std::fmt;

use dtma_api::instance::{InstanceAnswer, InstanceView};
use serde_json::{Value, json};
use stack::forward::Forward;
use stack::sdks::{Era, Sdk};
use stack::{Sdks, Stack};

use crate::Scene;

const EVERYTHING: &str = "/opt/mcp-servers/node_modules/@modelcontextprotocol/server-everything/dist/index.js";
/// Where the memory server keeps what it was told: on the volume.
const REMEMBERED: &str = "/data/memory.jsonl";
const MEMORY: &str = "/opt/mcp-servers/node_modules/@modelcontextprotocol/server-memory/dist/index.js";
/// A repository with one commit in it, made where the server may write.
const GIT: &str = "git init -q /data/repo && cd /data/repo && git -c user.name=story -c user.email=story@example.com commit -q \
                   --allow-empty -m 'the first of its kind' && exec python3.11 -m mcp_server_git --repository /data/repo";
const PORT: u16 = 8080;

/// What a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaks {
    /// Over its standard streams.
    Stdio,
    /// HTTP+SSE as before 2025.
    Sse,
    /// Streamable HTTP.
    Http,
    /// A websocket, as some servers do though no revision of the protocol has it.
    Websocket,
}

impl Speaks {
    fn transport(self) -> &'static str {
        match self {
            Self::Stdio => "stdio",
            Self::Sse => "sse",
            Self::Http => "http",
            Self::Websocket => "websocket",
        }
    }

    fn path(self) -> &'static str {
        match self {
            Self::Stdio | Self::Http => "/mcp",
            Self::Sse => "/sse",
            Self::Websocket => "/ws",
        }
    }
}

impl fmt::Display for Speaks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.transport())
    }
}

/// One server, and what is asked of it.
#[derive(Debug, Clone)]
pub struct Server {
    /// Name of the instance.
    pub name: &'static str,
    /// How it is reached.
    pub speaks: Speaks,
    /// How it is started, in the image of [`Stack::servers_image`].
    pub command: Vec<String>,
    /// A tool it has, and what it is called with.
    pub call: (&'static str, Value),
    /// What is in a right answer.
    pub answer: String,
}

impl Server {
    fn new(name: &'static str, speaks: Speaks, command: &[&str], call: (&'static str, Value), answer: &str) -> Self {
        let command = command.iter().map(|&word| word.to_owned()).collect();
        Self { name, speaks, command, call, answer: answer.to_owned() }
    }

    /// Every server and transport; `page` is a web page that instances can reach and `word` is written there.
    pub fn all(page: &str, word: &str) -> Vec<Self> {
        let python = |module: &'static str| ["python3.11", "-m", module];
        let sum = || ("get-sum", json!({ "a": 19, "b": 23 }));
        let noon = json!({ "source_timezone": "Asia/Kolkata", "time": "12:00", "target_timezone": "Asia/Tokyo" });
        let mut time = python("mcp_server_time").to_vec();
        time.push("--local-timezone=UTC");
        // Where it finds Node it wants npm as well, to install a script it can do without.
        let mut fetch = vec!["env", "PATH=/usr/bin:/bin"];
        fetch.extend(python("mcp_server_fetch"));
        fetch.extend(["--allow-private-ips", "--ignore-robots-txt"]);
        vec![
            Self::new("time", Speaks::Stdio, &time, ("convert_time", noon), "T15:30:00+09:00"),
            Self::new(
                "git",
                Speaks::Stdio,
                &["sh", "-c", GIT],
                ("git_log", json!({ "repo_path": "/data/repo" })),
                "the first of its kind",
            ),
            Self::new("fetch", Speaks::Stdio, &fetch, ("fetch", json!({ "url": page })), word),
            Self::new("everything-stdio", Speaks::Stdio, &["node", EVERYTHING, "stdio"], sum(), "is 42"),
            Self::new("everything-sse", Speaks::Sse, &["node", EVERYTHING, "sse"], sum(), "is 42"),
            Self::new("everything-http", Speaks::Http, &["node", EVERYTHING, "streamableHttp"], sum(), "is 42"),
            Self::new(
                "websocket",
                Speaks::Websocket,
                &["python3.11", "/opt/mcp-servers/over_websocket.py"],
                ("join", json!({ "words": ["one", "frame", "each"] })),
                "one-frame-each",
            ),
        ]
    }

    /// The one that remembers, in `/data`.
    pub fn memory() -> Self {
        let entity = json!({ "name": "droplet", "entityType": "machine", "observations": ["it rains"] });
        let call = ("create_entities", json!({ "entities": [entity] }));
        Self::new("memory", Speaks::Stdio, &["node", MEMORY], call, "it rains")
    }

    /// The one the conformance suite is made for.
    pub fn fixture(speaks: Speaks) -> Self {
        let (name, how) = match speaks {
            Speaks::Stdio => ("fixture-stdio", "stdio"),
            Speaks::Sse | Speaks::Http | Speaks::Websocket => ("fixture-http", "http"),
        };
        let command = ["python3.11", "/opt/mcp-servers/fixture.py", how];
        Self::new(name, speaks, &command, ("test_simple_text", json!({})), "simple text response")
    }

    /// The one that misbehaves on request; and from the start, where it is given a mood.
    pub fn moody(name: &'static str, mood: Option<&str>) -> Self {
        let mut command = vec!["python3.11", "/opt/mcp-servers/moody.py"];
        command.extend(mood);
        Self::new(name, Speaks::Stdio, &command, ("echo", json!({ "text": "as ever" })), "as ever")
    }

    /// A deploy of it.
    pub fn deploy(&self, stack: &Stack) -> Value {
        json!({
            "dockerImageUrl": stack.servers_image(),
            "instanceNameOnToolbox": self.name,
            "accountToolInstanceId": format!("id-of-{}", self.name),
            "baseConfigOverrideJson": { "Cmd": self.command },
            "mcpTransportType": self.speaks.transport(),
            "mcpEndpointPath": self.speaks.path(),
            "mcpPort": PORT,
            "environmentVariables": { "PORT": PORT.to_string(), "MEMORY_FILE_PATH": REMEMBERED, "TALLY": "/data/tally" },
            "volumes": [{ "name": "data", "path": "/data" }],
            "resourceLimits": { "memory": "256m" },
        })
    }

    /// `docker run` and its arguments, for running it with no agent between: kept in the foreground where it speaks over its standard
    /// streams, in the background otherwise.
    pub fn docker_run(&self, stack: &Stack, image: &str) -> Vec<String> {
        let how = if self.speaks == Speaks::Stdio { "--interactive" } else { "--detach" };
        let (label, port) = (format!("{}={}", stack::docker::STACK_LABEL, stack.id()), format!("PORT={PORT}"));
        let memory = format!("MEMORY_FILE_PATH={REMEMBERED}");
        // A volume nobody knows, so that it is the server's to write to.
        let words = [
            "docker", "run", "--rm", how, "--label", &label, "--env", &port, "--env", &memory, "--volume", "/data",
            image,
        ];
        words.into_iter().map(str::to_owned).chain(self.command.clone()).collect()
    }
}

/// Whose client, and how it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// The Rust SDK's, in this process.
    Rust,
    /// One that is a program of its own.
    Program(Sdk, Era),
}

impl Client {
    /// Those of another language.
    pub const PROGRAMS: [Self; 4] = [
        Self::Program(Sdk::Python, Era::Auto),
        Self::Program(Sdk::Python, Era::Legacy),
        Self::Program(Sdk::TypeScript, Era::Auto),
        Self::Program(Sdk::TypeScript, Era::Legacy),
    ];

    /// Connects through the agent, looks for the tool, calls it, and looks at the answer.
    ///
    /// # Errors
    /// When one of these goes wrong.
    pub async fn use_through_agent(
        self,
        server: &Server,
        scene: &Scene,
        forward: &Forward,
        sdks: &Sdks,
    ) -> Result<(), Box<dyn Error>> {
        let instance = instance(scene, server.name).await?;
        match self {
            Self::Rust => {
                let client = scene.agent.mcp(&instance).await?;
                let tools = client.tools().await?;
                let text = client.call(server.call.0, server.call.1.clone()).await?;
                client.close().await?;
                judge(server, &tools, &text)
            }
            Self::Program(sdk, era) => {
                let path = instance.mcp_url.as_deref().ok_or("it has no MCP endpoint")?;
                talk(server, sdk, era, &forward.url(path), sdks).await
            }
        }
    }

    /// The same with no agent between, for those that can. `target` is what [`Sdks::talk`] takes.
    ///
    /// # Errors
    /// When one of these goes wrong.
    pub async fn use_directly(self, server: &Server, target: &str, sdks: &Sdks) -> Result<(), Box<dyn Error>> {
        match self {
            Self::Rust => Err("the Rust client is used through an agent only".into()),
            Self::Program(sdk, era) => talk(server, sdk, era, target, sdks).await,
        }
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rust => f.write_str("Rust"),
            Self::Program(sdk, era) => write!(f, "{sdk:?}, {era:?}"),
        }
    }
}

/// What the agent says of an instance.
///
/// # Errors
/// When it says nothing.
pub async fn instance(scene: &Scene, name: &str) -> Result<InstanceView, Box<dyn Error>> {
    Ok(scene.agent.get(&format!("/tools/{name}")).await?.decode::<InstanceAnswer>()?.data)
}

async fn talk(server: &Server, sdk: Sdk, era: Era, target: &str, sdks: &Sdks) -> Result<(), Box<dyn Error>> {
    let talk = sdks.talk(sdk, target, era, &[(server.call.0, server.call.1.clone())]).await?;
    let answer = talk.answers.first().ok_or("no answer at all")?;
    if answer.error {
        return Err(format!("the tool failed: {}", answer.text).into());
    }
    judge(server, &talk.tools, &answer.text)
}

fn judge(server: &Server, tools: &[String], text: &str) -> Result<(), Box<dyn Error>> {
    let tool = server.call.0;
    if !tools.iter().any(|known| known == tool) {
        return Err(format!("{tool} isn't among its tools: {tools:?}").into());
    }
    if !text.contains(&server.answer) {
        return Err(format!("{tool} answered `{text}`, without `{}`", server.answer).into());
    }
    Ok(())
}
