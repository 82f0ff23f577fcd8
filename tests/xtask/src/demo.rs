//! `cargo xtask demo`: the whole product once, on real parts, told step by step.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use dtma_api::environment::{EnsureRequest, EnvironmentEvent, EnvironmentStatus, EnvironmentView};
use dtma_api::instance::{DeployAnswer, DeployRequest, InstanceView};
use jiff::Timestamp;
use serde_json::{Value, json};
use stack::release::{self, ReleaseError};
use stack::stack::remove_stale;
use stack::{Agent, Stack, StackError, StackOptions, Watch as _, Workspace, host, prepare};

use crate::interrupt::interrupted;
use crate::terminal::{Terminal, shown};
use crate::with_causes;

/// Whose environment it is; any id would do.
const AGENT: &str = "demo-agent";
/// What the MCP server is called on the droplet.
const INSTANCE: &str = "mcp-demo";
/// And the one on its standard input and output.
const PIPED: &str = "mcp-demo-stdio";
const ACTIVE_LIMIT: Duration = Duration::from_secs(300);
const LOG_LINES: usize = 30;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Image slug of the droplet: docker-debian-12, or debian-12-x64 where cloud-init installs Docker
    #[arg(long, default_value = prepare::DEFAULT_IMAGE)]
    image: String,
}

impl Default for Options {
    fn default() -> Self {
        Self { image: prepare::DEFAULT_IMAGE.to_owned() }
    }
}

/// Why the demo ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    #[error("{0}")]
    Stack(#[from] StackError),
    #[error("{0}")]
    Release(#[from] ReleaseError),
    #[error("{0}")]
    Unexpected(String),
    #[error("interrupted ({0})")]
    Interrupted(&'static str),
}

/// What the last line tells.
#[derive(Debug, Default)]
struct Figures {
    create_to_active: Duration,
    install: Duration,
    deploy: Duration,
    tool_call: Duration,
    tool_result: String,
    droplets_left: u64,
    containers_left: usize,
}

impl Figures {
    fn line(&self) -> String {
        // Written by hand for the order of its keys.
        format!(
            "DEMO {{\"create_to_active_ms\":{},\"install_ms\":{},\"deploy_ms\":{},\"tool_call_ms\":{},\"tool_result\":{},\
             \"droplets_left\":{},\"containers_left\":{}}}",
            self.create_to_active.as_millis(),
            self.install.as_millis(),
            self.deploy.as_millis(),
            self.tool_call.as_millis(),
            Value::from(self.tool_result.as_str()),
            self.droplets_left,
            self.containers_left,
        )
    }
}

pub(crate) async fn run(options: &Options, terminal: &Terminal) -> ExitCode {
    terminal.title("From nothing to a working MCP tool call, and back to nothing");
    let begun = Instant::now();
    let workspace = Workspace::find();
    let mut running = None;
    let outcome = tokio::select! {
        outcome = told(options, &workspace, &mut running, terminal) => outcome,
        name = interrupted() => Err(DemoError::Interrupted(name)),
    };
    let outcome = match outcome {
        Ok(figures) => Ok(figures),
        Err(error) => {
            terminal.failed(&with_causes(&error));
            if let (Some(stack), false) = (&running, matches!(error, DemoError::Interrupted(_))) {
                for (name, text) in stack.logs(LOG_LINES).await.into_iter().filter(|(_, text)| !text.is_empty()) {
                    terminal.log(&name, &text);
                }
            }
            Err(())
        }
    };
    let cleaned = match running.take() {
        Some(stack) => clean_up(stack, terminal, outcome.is_ok()).await,
        None => true,
    };
    match outcome {
        Ok(figures) if cleaned => {
            terminal.line(&format!("\nDone in {}.", shown(begun.elapsed())));
            terminal.line(&figures.line());
            ExitCode::SUCCESS
        }
        Ok(_) | Err(()) => ExitCode::FAILURE,
    }
}

/// The steps. What runs is handed out through `running` as soon as it does, for whoever cleans up.
async fn told(
    options: &Options,
    workspace: &Workspace,
    running: &mut Option<Stack>,
    terminal: &Terminal,
) -> Result<Figures, DemoError> {
    terminal.step("Set up this machine");
    host::set_up(workspace, terminal).await?;
    remove_stale(workspace).await?;
    terminal.done("packages and Docker Engine are there");

    terminal.step("Build the local cloud and the provisioner");
    workspace.build(terminal).await?;
    terminal.done("built");

    terminal.step("Build the agent's release");
    let release = release::release(workspace, None, terminal).await?;
    terminal.done(&format!("dtma-agent {}, {:.1} MB, for glibc from {}", release.version, megabytes(release.size), {
        release.glibc.map_or_else(|| "any".to_owned(), |version| version.to_string())
    }));

    terminal.step("Images of the droplet and of the MCP server");
    prepare::images(workspace, std::slice::from_ref(&options.image), terminal).await?;
    terminal.done(&format!("{} and mcp-demo", options.image));

    terminal.step("Start registry, local cloud and provisioner");
    let stack_options = StackOptions { base_images: vec![options.image.clone()], ..StackOptions::default() };
    let stack = running.insert(Stack::start_prepared(stack_options, workspace, terminal).await?);
    terminal.done(&format!("all at {}", stack.gateway()));

    let mut figures = Figures::default();
    terminal.step("Ask for an environment, as an edge function does");
    let (environment, install) = environment(stack, terminal).await?;
    figures.install = install;
    figures.create_to_active = terminal.done(&format!("active at {}", environment.agent_url.as_deref().unwrap_or("?")));

    let agent = stack.agent(&environment)?;
    terminal.step("Look at the agent, over TLS pinned to the key it enrolled with");
    let status = agent.status().await?;
    let resident = agent_memory(stack, &environment).await?;
    terminal.done(&format!("version {}, {resident:.1} MB resident", status.version));

    terminal.step("Deploy a real MCP server: the Python SDK's, in an image from the registry");
    let begun = Instant::now();
    let deployed = deploy(stack, &agent, Speaking::Http, terminal).await?;
    figures.deploy = begun.elapsed();
    let endpoint = deployed.mcp_url.as_deref().unwrap_or_default();
    terminal.done(&format!("{} answers at {endpoint}", deployed.instance_name_on_toolbox));

    terminal.step("Call one of its tools with a real MCP client");
    (figures.tool_result, figures.tool_call) = call(&agent, &deployed, terminal).await?;
    terminal.done(&format!("add(19, 23) = {}", figures.tool_result));

    terminal.step("The same server on its standard input and output, which is no difference to the client");
    let piped = deploy(stack, &agent, Speaking::Stdio, terminal).await?;
    let result = call(&agent, &piped, terminal).await?.0;
    let endpoint = piped.mcp_url.as_deref().unwrap_or_default();
    terminal.done(&format!("add(19, 23) = {result} at {endpoint}"));

    terminal.step("Give the environment back");
    stack.provisioner().delete(AGENT, 120).await?.success()?;
    gone(stack).await?;
    let left = stack.leftovers().await?;
    figures.droplets_left = stack.cloud().listed_droplets().await?;
    figures.containers_left = left.containers;
    if figures.droplets_left > 0 || left.containers > 0 || left.volumes > 0 {
        let listed = figures.droplets_left;
        return Err(DemoError::Unexpected(format!("left over: {listed} droplets in the cloud, in Docker {left:?}")));
    }
    terminal.done("0 droplets in the cloud, 0 containers and 0 volumes in Docker");
    Ok(figures)
}

/// Asks, and follows the events until the environment is active. Also tells how long the agent's own installation took.
pub(crate) async fn environment(stack: &Stack, terminal: &Terminal) -> Result<(EnvironmentView, Duration), DemoError> {
    let provisioner = stack.provisioner();
    let asked = provisioner.ensure(AGENT, &EnsureRequest::default(), 0).await?;
    terminal.say(&format!("asked; environment {}", asked.environment_id));
    let mut events = provisioner.events(AGENT).await?;
    let mut install_begun = None;
    let active = async {
        while let Some(event) = events.next().await? {
            terminal.say(&told_event(&event));
            // Docker is there by then; what follows is the agent's own installation.
            if event.phase.as_deref() == Some("download") && install_begun.is_none() {
                install_begun = Some(event.at);
            }
            match event.status {
                EnvironmentStatus::Active => return Ok(event.at),
                EnvironmentStatus::ErrorProvisioning => break,
                EnvironmentStatus::PendingProvision
                | EnvironmentStatus::Provisioning
                | EnvironmentStatus::AwaitingHeartbeat
                | EnvironmentStatus::Unresponsive
                | EnvironmentStatus::PendingDeprovision
                | EnvironmentStatus::Deprovisioning
                | EnvironmentStatus::Deprovisioned
                | EnvironmentStatus::ErrorDeprovisioning => {}
            }
        }
        let reply = provisioner.get_raw(AGENT).await?;
        Err(DemoError::Unexpected(format!("the environment did not become active: {}", reply.text)))
    };
    let active_at = tokio::time::timeout(ACTIVE_LIMIT, active).await.map_err(|_| {
        DemoError::Unexpected(format!("the environment was not active after {} s", ACTIVE_LIMIT.as_secs()))
    })??;
    let install = install_begun.map_or(Duration::ZERO, |begun| between(begun, active_at));
    Ok((provisioner.get(AGENT).await?, install))
}

fn told_event(event: &EnvironmentEvent) -> String {
    match &event.phase {
        Some(phase) => format!("{:<18} {phase}: {}", event.status.as_str(), event.message),
        None => format!("{:<18} {}", event.status.as_str(), event.message),
    }
}

fn between(begun: Timestamp, ended: Timestamp) -> Duration {
    Duration::try_from(ended.duration_since(begun)).unwrap_or_default()
}

/// Resident memory of the agent's process, in MB, as systemd and the kernel see it.
pub(crate) async fn agent_memory(stack: &Stack, environment: &EnvironmentView) -> Result<f64, DemoError> {
    let Some(droplet) = environment.droplet_id else {
        return Err(DemoError::Unexpected("an active environment without a droplet".to_owned()));
    };
    let script = "awk '/^VmRSS/ { print $2 }' /proc/$(systemctl show --property=MainPID --value dtma-agent)/status";
    let output = stack.droplet_exec(droplet, &["sh", "-c", script]).await?;
    let kilobytes: f64 = output.stdout.trim().parse().map_err(|_| {
        DemoError::Unexpected(format!("no resident memory of the agent: {}{}", output.stdout, output.stderr))
    })?;
    Ok(kilobytes * 1024.0 / 1e6)
}

/// What the demo's server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Speaking {
    Http,
    Stdio,
}

impl Speaking {
    fn request(self, image: &str) -> Value {
        match self {
            Self::Http => json!({
                "dockerImageUrl": image,
                "instanceNameOnToolbox": INSTANCE,
                "accountToolInstanceId": "demo-tool-instance",
                "mcpTransportType": "http",
            }),
            Self::Stdio => json!({
                "dockerImageUrl": image,
                "instanceNameOnToolbox": PIPED,
                "accountToolInstanceId": "demo-piped-tool-instance",
                "mcpTransportType": "stdio",
                "baseConfigOverrideJson": { "Cmd": ["python3.11", "/opt/mcp-demo/server.py", "stdio"] },
            }),
        }
    }
}

/// Deploys, showing the agent's own events meanwhile.
pub(crate) async fn deploy(
    stack: &Stack,
    agent: &Agent,
    speaking: Speaking,
    terminal: &Terminal,
) -> Result<InstanceView, DemoError> {
    let request: DeployRequest = serde_json::from_value(speaking.request(&stack.mcp_image()))
        .map_err(|source| StackError::Json { what: "the demo's deploy request".to_owned(), source })?;
    let mut events = agent.events().await?;
    let deploying = agent.deploy(&request);
    let mut deploying = std::pin::pin!(deploying);
    let mut told = Vec::new();
    let mut following = true;
    let answer: DeployAnswer = loop {
        tokio::select! {
            answer = &mut deploying => break answer?,
            event = events.next(), if following => match event? {
                // What was told before comes, too.
                Some(event) if event.instance_name_on_toolbox != request.instance_name_on_toolbox => {}
                Some(event) => {
                    if let Some(progress) = event.progress {
                        let (done, known) = (megabytes(progress.current_bytes), megabytes(progress.total_bytes));
                        terminal.now(&format!("pulling {done:.1} of {known:.1} MB"));
                    }
                    if !told.contains(&event.event) {
                        terminal.say(&format!("{:<18} {}", event.event, event.message));
                        told.push(event.event);
                    }
                }
                None => following = false,
            },
        }
    };
    for warning in &answer.data.warnings {
        terminal.say(&format!("warning: {}: {}", warning.path, warning.problem));
    }
    Ok(answer.data.instance)
}

/// Calls one of the server's tools; what it answers, and how long that took.
async fn call(agent: &Agent, instance: &InstanceView, terminal: &Terminal) -> Result<(String, Duration), DemoError> {
    let client = agent.mcp(instance).await?;
    terminal.say(&format!("tools: {}", client.tools().await?.join(", ")));
    let begun = Instant::now();
    let result = client.call("add", json!({ "a": 19, "b": 23 })).await?;
    let took = begun.elapsed();
    client.close().await?;
    Ok((result, took))
}

/// The cloud's lists lag; what they show at last is what counts.
async fn gone(stack: &Stack) -> Result<(), DemoError> {
    let looking = async {
        while stack.cloud().listed_droplets().await? > 0 {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok::<(), StackError>(())
    };
    // Not gone in time is for the count after this to tell.
    match tokio::time::timeout(Duration::from_secs(15), looking).await {
        Ok(outcome) => Ok(outcome?),
        Err(_) => Ok(()),
    }
}

async fn clean_up(stack: Stack, terminal: &Terminal, all_well: bool) -> bool {
    terminal.step("Clean up");
    match stack.remove().await {
        Ok(()) => {
            terminal.done(if all_well {
                "network and processes are gone too"
            } else {
                "droplets, network and processes are gone"
            });
            true
        }
        Err(error) => {
            terminal.failed(&with_causes(&error));
            false
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people, one decimal")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_has_exactly_the_promised_keys_in_their_order() {
        let figures = Figures {
            create_to_active: Duration::from_millis(5_800),
            tool_result: "4\"2".to_owned(),
            ..Figures::default()
        };
        let expected = r#"DEMO {"create_to_active_ms":5800,"install_ms":0,"deploy_ms":0,"tool_call_ms":0,"tool_result":"4\"2","droplets_left":0,"containers_left":0}"#;
        assert_eq!(figures.line(), expected);
        let json: Value = serde_json::from_str(&figures.line()["DEMO ".len()..]).unwrap();
        assert_eq!(json["tool_result"], "4\"2");
    }
}
