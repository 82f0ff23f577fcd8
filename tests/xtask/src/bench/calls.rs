//! What a call costs on its way through the agent: the same server, called directly and through it, by turns and one call after the other.
//!
//! Directly is over the pipes of the very same program, and over HTTP to a container of the same image on this machine. What calls
//! over HTTP is `wrk`, on one connection that is kept: measured is what lies between, not who calls.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use stack::command::Job;
use stack::docker::STACK_LABEL;
use stack::{Agent, Stack, StackError, Watch as _, Workspace};

use super::told;
use crate::demo::DemoError;
use crate::terminal::Terminal;

const SERVER: &str = include_str!("server.py");
/// By turns, so that whatever else this machine does meets all ways alike; each figure is the median of its rounds.
const ROUNDS: usize = 7;
const ROUND: Duration = Duration::from_secs(2);
/// Called before anything is measured: caches, buffers, the processor's clock.
const WARM_UP: usize = 200;
const VERSION: &str = "2025-06-18";
/// What comes back in every answer.
const TEXT: &str = "as it came";
const READY_LIMIT: Duration = Duration::from_secs(20);

/// What calls took one way, milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Took {
    pub(super) p50: f64,
    pub(super) p95: f64,
}

/// All ways to one server.
#[derive(Debug)]
pub(super) struct Calls {
    /// Over the pipes of its process.
    pub(super) piped: Took,
    /// The same with Docker between, `docker run --interactive`.
    pub(super) attached: Took,
    /// Through the agent, to its standard streams.
    pub(super) bridged: Took,
    /// Over HTTP to its container.
    pub(super) direct: Took,
    /// Through the agent, over HTTP.
    pub(super) proxied: Took,
}

impl Calls {
    /// For people, one way a line.
    pub(super) fn lines(&self) -> Vec<String> {
        let line = |what: &str, took: Took, beside: Option<Took>| {
            let compared = beside.map(|beside| {
                let (p50, p95) = (took.p50 - beside.p50, took.p95 - beside.p95);
                format!(
                    "   adds {p50:>6.3} and {p95:>6.3}, {:>4.1} and {:>4.1} times as long",
                    took.p50 / beside.p50,
                    took.p95 / beside.p95
                )
            });
            let Took { p50, p95 } = took;
            format!("    {what:<44} p50 {p50:>6.3} ms  p95 {p95:>6.3} ms{}", compared.unwrap_or_default())
        };
        vec![
            line("on its standard streams, over its pipes", self.piped, None),
            line("  with Docker between", self.attached, Some(self.piped)),
            line("  through the agent", self.bridged, Some(self.piped)),
            line("over HTTP, to its container", self.direct, None),
            line("  through the agent", self.proxied, Some(self.direct)),
        ]
    }
}

/// Deploys the server twice, runs it twice more on this machine, and calls all of them.
pub(super) async fn measure(
    stack: &Stack,
    agent: &Agent,
    workspace: &Workspace,
    terminal: &Terminal,
) -> Result<Calls, DemoError> {
    let bridged = Endpoint::deployed(stack, agent, "stdio").await?;
    let proxied = Endpoint::deployed(stack, agent, "http").await?;
    let (container, direct) = here(stack, workspace, terminal).await?;
    let process = docker(&["inspect", "--format={{.State.Pid}}", &container], workspace, terminal).await?;
    // In the container's file system: the same interpreter and the same library.
    let inside = ["nsenter", "--target", &process, "--mount", "--", "/usr/bin/python3.11", "-c", SERVER, "stdio"];
    let mut piped = Piped::start(&inside)?;
    let (label, image) = (format!("--label={STACK_LABEL}={}", stack.id()), image_here(stack));
    let attached = ["docker", "run", "--rm", "--interactive", &label, &image, "python3.11", "-c", SERVER, "stdio"];
    let mut attached = Piped::start(&attached)?;

    let mut rounds: [Vec<Took>; 5] = Default::default();
    for number in 1..=ROUNDS {
        terminal.now(&format!("round {number} of {ROUNDS}"));
        let took = [
            piped.calls()?,
            attached.calls()?,
            bridged.calls(workspace, terminal).await?,
            direct.calls(workspace, terminal).await?,
            proxied.calls(workspace, terminal).await?,
        ];
        for (way, took) in rounds.iter_mut().zip(took) {
            way.push(took);
        }
    }
    let [piped, attached, bridged, direct, proxied] = rounds.map(|way| middle(&way));
    Ok(Calls { piped, attached, bridged, direct, proxied })
}

fn middle(rounds: &[Took]) -> Took {
    let median = |figure: fn(&Took) -> f64| {
        let mut sorted: Vec<f64> = rounds.iter().map(figure).collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    };
    Took { p50: median(|took| took.p50), p95: median(|took| took.p95) }
}

fn introduction() -> Value {
    let client = json!({ "name": "bench", "version": "1.0.0" });
    let params = json!({ "protocolVersion": VERSION, "capabilities": {}, "clientInfo": client });
    json!({ "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params })
}

fn call() -> Value {
    json!({ "jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": { "name": "echo", "arguments": { "text": TEXT } } })
}

/// How this machine pulls the image the droplets pull.
fn image_here(stack: &Stack) -> String {
    let (theirs, ours) = stack.registries();
    stack.mcp_image().replacen(&theirs.to_string(), &ours.to_string(), 1)
}

/// The server in a container on this machine: its id, and where it listens.
async fn here(stack: &Stack, workspace: &Workspace, terminal: &Terminal) -> Result<(String, Endpoint), DemoError> {
    let (label, image) = (format!("--label={STACK_LABEL}={}", stack.id()), image_here(stack));
    let run = ["run", "--rm", "--detach", &label, &image, "python3.11", "-c", SERVER, "http"];
    let container = docker(&run, workspace, terminal).await?;
    let format = "--format={{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    let address = docker(&["inspect", format, &container], workspace, terminal).await?;
    let listening = async {
        while tokio::net::TcpStream::connect((address.as_str(), 8080)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let late = |_| DemoError::Unexpected(format!("nobody listens at {address}:8080"));
    tokio::time::timeout(READY_LIMIT, listening).await.map_err(late)?;
    Ok((container, Endpoint { url: format!("http://{address}:8080/mcp"), headers: Vec::new() }))
}

/// Runs Docker's client on this machine; the last line it wrote.
async fn docker(words: &[&str], workspace: &Workspace, terminal: &Terminal) -> Result<String, DemoError> {
    let log = workspace.local().join("bench-docker.log");
    Job::new("docker", log.clone()).args(words).run(terminal).await?;
    Ok(told(&log)?.lines().next_back().unwrap_or_default().to_owned())
}

/// Where the server is called over HTTP, and what is said of who calls.
#[derive(Debug)]
struct Endpoint {
    url: String,
    headers: Vec<String>,
}

impl Endpoint {
    /// Deploys the server and opens a session with it.
    async fn deployed(stack: &Stack, agent: &Agent, transport: &str) -> Result<Self, DemoError> {
        let name = format!("bench-{transport}");
        let body = json!({
            "dockerImageUrl": stack.mcp_image(),
            "instanceNameOnToolbox": name,
            "accountToolInstanceId": format!("id-of-{name}"),
            "mcpTransportType": transport,
            "baseConfigOverrideJson": { "Cmd": ["python3.11", "-c", SERVER, transport] },
        });
        agent.deploy_raw(&body).await?.success()?;
        let path = format!("/tools/{name}/mcp");
        let request = agent.request(Method::POST, &path).header("accept", "application/json, text/event-stream");
        let answer = request.json(&introduction()).send().await.map_err(StackError::http("begin a session"))?;
        let session = answer.headers().get("mcp-session-id").and_then(|value| value.to_str().ok());
        let mut headers = vec![format!("Authorization: Bearer {}", stack.fleet_key().expose())];
        headers.push(format!("MCP-Protocol-Version: {VERSION}"));
        headers.extend(session.map(|session| format!("Mcp-Session-Id: {session}")));
        Ok(Self { url: format!("{}{path}", agent.url()), headers })
    }

    /// Calls for one round.
    async fn calls(&self, workspace: &Workspace, terminal: &Terminal) -> Result<Took, DemoError> {
        let log = workspace.local().join("bench-calls.log");
        let script = workspace.root().join("tests/xtask/src/bench/calls.lua");
        Job::new("wrk", log.clone())
            .args(["--threads", "1", "--connections", "1", "--duration", &format!("{}s", ROUND.as_secs()), "--script"])
            .args([&script])
            .args(self.headers.iter().flat_map(|header| ["--header", header]))
            .args([&self.url, "--", &call().to_string(), TEXT])
            .run(terminal)
            .await?;
        let told = told(&log)?;
        took(&told).ok_or_else(|| DemoError::Unexpected(format!("not calls that all succeeded: {}\n{told}", self.url)))
    }
}

/// What `calls.lua` tells, if every call was answered rightly.
fn took(told: &str) -> Option<Took> {
    #[derive(Deserialize)]
    struct Told {
        p50_us: f64,
        p95_us: f64,
        calls: u64,
        failed: u64,
    }
    let line = told.lines().find_map(|line| line.strip_prefix("CALLS "))?;
    let Told { p50_us, p95_us, calls, failed } = serde_json::from_str(line).ok()?;
    (calls > 0 && failed == 0).then_some(Took { p50: p50_us / 1e3, p95: p95_us / 1e3 })
}

/// A server of which we hold the pipes. Ended when dropped.
#[derive(Debug)]
struct Piped {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Piped {
    fn start(words: &[&str]) -> Result<Self, DemoError> {
        let [program, arguments @ ..] = words else { return Err(DemoError::Unexpected("no command".to_owned())) };
        let spawned = Command::new(program).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = spawned.map_err(StackError::io(format!("start {program}")))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(DemoError::Unexpected(format!("{program} was started without pipes")));
        };
        let mut piped = Self { child, input, output: BufReader::new(output) };
        piped.ask(&introduction().to_string(), "serverInfo")?;
        let call = call().to_string();
        for _ in 0..WARM_UP {
            piped.ask(&call, TEXT)?;
        }
        Ok(piped)
    }

    fn ask(&mut self, message: &str, expected: &str) -> Result<Duration, DemoError> {
        let (line, mut answer) = (format!("{message}\n"), String::new());
        let begun = Instant::now();
        self.input.write_all(line.as_bytes()).map_err(StackError::io("write to a server"))?;
        self.output.read_line(&mut answer).map_err(StackError::io("read from a server"))?;
        let took = begun.elapsed();
        if answer.contains(expected) {
            Ok(took)
        } else {
            Err(DemoError::Unexpected(format!("not an answer: {answer}")))
        }
    }

    /// Calls for one round.
    fn calls(&mut self) -> Result<Took, DemoError> {
        let (call, begun, mut all) = (call().to_string(), Instant::now(), Vec::new());
        while begun.elapsed() < ROUND {
            all.push(self.ask(&call, TEXT)?);
        }
        all.sort_unstable();
        let percentile =
            |percent: usize| all.get(all.len() * percent / 100).map_or(f64::NAN, |it| it.as_secs_f64() * 1e3);
        Ok(Took { p50: percentile(50), p95: percentile(95) })
    }
}

impl Drop for Piped {
    fn drop(&mut self) {
        // It may be gone already, which is all that is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_calls_that_all_succeeded_count() {
        let told = |failed: u32| {
            format!("Running 2s test\nCALLS {{\"p50_us\":312.0,\"p95_us\":950.5,\"calls\":7,\"failed\":{failed}}}\n")
        };
        assert_eq!(took(&told(0)), Some(Took { p50: 0.312, p95: 0.9505 }));
        assert_eq!(took(&told(1)), None);
        assert_eq!(took("unable to connect"), None);
    }

    #[test]
    fn a_round_that_was_disturbed_doesnt_count() {
        let rounds = [(0.2, 0.9), (9.0, 0.3), (0.1, 0.4)].map(|(p50, p95)| Took { p50, p95 });
        assert_eq!(middle(&rounds), Took { p50: 0.2, p95: 0.4 });
    }
}
