//! `cargo xtask bench`: what the released agent costs on a real droplet, and what one released provisioner takes, beside what they may.
//! Load comes from this machine, so what is measured and the load share its cores.

mod calls;

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use stack::command::Job;
use stack::{Stack, StackError, StackOptions, Workspace, host, prepare};

use crate::demo::{self, DemoError};
use crate::terminal::Terminal;

const CONNECTIONS: &str = "8";
const LOAD: Duration = Duration::from_secs(30);

/// One figure and its bar.
struct Measured {
    what: &'static str,
    unit: &'static str,
    value: f64,
    bar: f64,
    /// Whether more is better.
    more: bool,
}

impl Measured {
    /// 1 is the bar itself, less is better than asked for.
    fn ratio(&self) -> f64 {
        if self.more { self.bar / self.value } else { self.value / self.bar }
    }

    fn line(&self) -> String {
        let Self { what, unit, value, bar, .. } = self;
        let word = if self.ratio() <= 1.0 { "ok" } else { "MISSED" };
        format!("    {what:<44} {value:>10.2} {unit:<5} bar {bar:>9.1}   {:.2} of it  {word}", self.ratio())
    }
}

pub(crate) async fn run(terminal: &Terminal) -> Result<(), DemoError> {
    let workspace = Workspace::find();
    terminal.step("Prepare: machine, programs, release, images");
    prepare::everything(&workspace, &[prepare::DEFAULT_IMAGE.to_owned()], terminal).await?;
    host::set_up_load(&workspace, terminal).await?;
    terminal.done("ready");

    terminal.step("A droplet with one MCP server on it");
    let stack = Stack::start_prepared(StackOptions::default(), &workspace, terminal).await?;
    let (environment, _) = demo::environment(&stack, terminal).await?;
    let agent = stack.agent(&environment)?;
    demo::deploy(&stack, &agent, demo::Speaking::Http, terminal).await?;
    terminal.done("runs");

    let idle = demo::agent_memory(&stack, &environment).await?;
    terminal.step("Calls to one MCP server, directly and through the agent");
    let calls = calls::measure(&stack, &agent, &workspace, terminal).await?;
    let called = demo::agent_memory(&stack, &environment).await?;
    terminal.done(&format!("one at a time; the agent's memory {idle:.1} MB before and {called:.1} MB after"));
    for line in calls.lines() {
        terminal.line(&line);
    }

    terminal.step("GET /status over TLS, as fast as it goes");
    let log = workspace.local().join("wrk.log");
    Job::new("wrk", log.clone())
        .args(["--threads", "2", "--connections", CONNECTIONS, "--latency", "--header"])
        .args([format!("Authorization: Bearer {}", stack.fleet_key().expose())])
        .args([format!("--duration={}s", LOAD.as_secs()), format!("{}/status", agent.url())])
        .run(terminal)
        .await?;
    let loaded = demo::agent_memory(&stack, &environment).await?;
    let told = told(&log)?;
    let load = Load::read(&told).ok_or_else(|| DemoError::Unexpected(format!("not what wrk writes:\n{told}")))?;
    stack.remove().await?;
    terminal.done(&format!("{CONNECTIONS} connections for {} s", LOAD.as_secs()));

    terminal.step("Heartbeats of 10,000 agents to one provisioner on SQLite");
    let taken = heartbeats(&workspace, terminal).await?;
    terminal.done("over loopback, as fast as 160 connections can send them");

    let figures = [
        Measured { what: "agent's memory, idle", unit: "MB", value: idle, bar: 12.0, more: false },
        Measured {
            what: "a call over the stdio bridge: added to p50",
            unit: "ms",
            value: calls.bridged.p50 - calls.piped.p50,
            bar: 0.3,
            more: false,
        },
        Measured { what: "agent's memory after these calls", unit: "MB", value: called, bar: 20.0, more: false },
        Measured { what: "agent's memory after the load", unit: "MB", value: loaded, bar: 20.0, more: false },
        Measured { what: "GET /status, 8 connections", unit: "/s", value: load.rate, bar: 20_000.0, more: true },
        Measured { what: "GET /status, 99th percentile", unit: "ms", value: load.p99_ms, bar: 5.0, more: false },
        Measured { what: "heartbeats taken", unit: "/s", value: taken.per_second, bar: 5_000.0, more: true },
        Measured {
            what: "provisioner's memory with 10,000 agents",
            unit: "MB",
            value: taken.loaded_mb,
            bar: 200.0,
            more: false,
        },
    ];
    for figure in &figures {
        terminal.line(&figure.line());
    }
    if load.failed {
        return Err(DemoError::Unexpected(format!("not every request was answered with a success:\n{told}")));
    }
    Ok(())
}

/// What a program wrote.
fn told(log: &Path) -> Result<String, StackError> {
    std::fs::read_to_string(log).map_err(StackError::io(format!("read {}", log.display())))
}

/// Runs the provisioner's own measurement, which builds it as it is released.
async fn heartbeats(workspace: &Workspace, terminal: &Terminal) -> Result<Taken, DemoError> {
    let log = workspace.local().join("heartbeats.log");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    Job::new(cargo, log.clone())
        .args(["bench", "--package", "dtma-provisioner", "--bench", "heartbeats"])
        .env("CARGO_TERM_COLOR", "never")
        .in_folder(workspace.root())
        .run(terminal)
        .await?;
    let told = told(&log)?;
    Taken::read(&told).ok_or_else(|| DemoError::Unexpected(format!("not what the measurement writes:\n{told}")))
}

/// What the provisioner's measurement tells.
#[derive(Debug, PartialEq, Deserialize)]
struct Taken {
    per_second: f64,
    loaded_mb: f64,
}

impl Taken {
    fn read(text: &str) -> Option<Self> {
        let line = text.lines().find_map(|line| line.strip_prefix("HEARTBEATS "))?;
        serde_json::from_str(line).ok()
    }
}

/// What `wrk --latency` tells.
#[derive(Debug, PartialEq)]
struct Load {
    rate: f64,
    p99_ms: f64,
    failed: bool,
}

impl Load {
    fn read(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.trim().strip_prefix(name)).map(str::trim);
        let (p99, unit) = field("99%")?.split_at_checked(field("99%")?.find(|c: char| c.is_ascii_alphabetic())?)?;
        let factor = match unit {
            "us" => 0.001,
            "ms" => 1.0,
            "s" => 1_000.0,
            _ => return None,
        };
        Some(Self {
            rate: field("Requests/sec:")?.parse().ok()?,
            p99_ms: p99.parse::<f64>().ok()? * factor,
            failed: field("Socket errors:").is_some() || field("Non-2xx or 3xx responses:").is_some(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLD: &str = "\
Running 30s test @ https://172.18.0.10:30000/status
  2 threads and 8 connections
  Latency Distribution
     50%  212.00us
     99%    1.71ms
  612345 requests in 30.00s, 512.00MB read
Requests/sec:  20411.23
Transfer/sec:     17.05MB
";

    #[test]
    fn what_wrk_tells_is_read_and_failures_are_seen() {
        assert_eq!(Load::read(TOLD), Some(Load { rate: 20_411.23, p99_ms: 1.71, failed: false }));
        let failing = format!("{TOLD}  Non-2xx or 3xx responses: 7\n");
        assert!(Load::read(&failing).unwrap().failed);
        assert_eq!(Load::read("unable to connect"), None);
    }

    #[test]
    fn what_the_provisioners_measurement_tells_is_read() {
        let told = "10000 environments written in 8.2s\nHEARTBEATS {\"idle_mb\":38.4,\"loaded_mb\":51.9,\"p99_ms\":91.9,\"per_second\":9506.6}\n";
        assert_eq!(Taken::read(told), Some(Taken { per_second: 9_506.6, loaded_mb: 51.9 }));
        assert_eq!(Taken::read("error: could not compile"), None);
    }

    #[test]
    fn a_ratio_of_one_is_the_bar_whichever_way_is_better() {
        let measured = |value, more| Measured { what: "x", unit: "", value, bar: 20.0, more };
        assert!(measured(25.0, true).ratio() < 1.0 && measured(25.0, false).ratio() > 1.0);
        assert!(measured(10.0, true).line().contains("MISSED"));
        assert!(measured(20.0, false).line().contains("ok"));
    }
}
