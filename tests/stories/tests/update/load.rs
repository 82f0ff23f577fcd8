//! Clients that call a tool without rest, and write down how it went.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dtma_api::instance::InstanceAnswer;
use serde_json::{Value, json};
use stack::Agent;
use tokio::task::JoinHandle;

use crate::droplet::Droplet;

/// How a call went.
#[derive(Debug, Clone)]
struct Call {
    begun: Instant,
    took: Duration,
    /// Why it failed.
    failed: Option<String>,
}

/// Clients at work.
pub(crate) struct Load {
    clients: Vec<JoinHandle<Vec<Call>>>,
    over: Arc<AtomicBool>,
}

/// How the calls went, all together.
pub(crate) struct Calls(Vec<Call>);

impl Load {
    /// So many clients, each with one session for as long as it lasts.
    pub(crate) async fn start(droplet: &Droplet, clients: usize) -> Result<Self, Box<dyn Error>> {
        let over = Arc::new(AtomicBool::new(false));
        let mut tasks = Vec::new();
        for _ in 0..clients {
            let instance = droplet.scene.agent.get("/tools/adder").await?.decode::<InstanceAnswer>()?.data;
            let path = format!("/tools/{}/mcp", instance.instance_name_on_toolbox);
            let session = open(&droplet.scene.agent, &path).await?;
            let (agent, over) = (droplet.scene.agent.clone(), over.clone());
            tasks.push(tokio::spawn(async move {
                let mut calls = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    let failed = add(&agent, &path, &session).await.err().map(|error| error.to_string());
                    calls.push(Call { begun, took: begun.elapsed(), failed });
                }
                calls
            }));
        }
        Ok(Self { clients: tasks, over })
    }

    /// Everybody ends the call under way.
    pub(crate) async fn end(self) -> Result<Calls, Box<dyn Error>> {
        self.over.store(true, Ordering::Relaxed);
        let mut calls = Vec::new();
        for client in self.clients {
            calls.extend(client.await?);
        }
        calls.sort_by_key(|call| call.begun);
        Ok(Calls(calls))
    }
}

impl Calls {
    /// Sessions outlive the update: after the blink everything succeeds again, and all that fails does so at one moment.
    pub(crate) fn assert_only_a_blink(&self) {
        let failed: Vec<_> = self.0.iter().filter(|call| call.failed.is_some()).collect();
        let (first, last) = (failed.first(), failed.last());
        if let (Some(first), Some(last)) = (first, last) {
            let spread = last.begun.duration_since(first.begun);
            assert!(spread < Duration::from_secs(5), "calls failed over {spread:?}: {failed:?}");
        }
        assert!(self.0.last().is_some_and(|call| call.failed.is_none()), "calls succeed again: {self}");
        assert!(self.0.len() > 100, "that was no load: {self}");
    }

    /// The longest time in which no call ended well.
    fn blink(&self) -> Duration {
        let mut ends: Vec<_> =
            self.0.iter().filter(|call| call.failed.is_none()).map(|call| call.begun + call.took).collect();
        ends.sort();
        ends.windows(2).map(|pair| pair[1].duration_since(pair[0])).max().unwrap_or_default()
    }
}

impl fmt::Display for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failed: Vec<_> = self.0.iter().filter_map(|call| call.failed.as_ref()).collect();
        let blink = self.blink();
        write!(f, "{} calls, {} failed, at most {blink:.2?} without an answer {failed:?}", self.0.len(), failed.len())
    }
}

async fn post(
    agent: &Agent,
    path: &str,
    session: Option<&str>,
    body: &Value,
) -> Result<reqwest::Response, Box<dyn Error + Send + Sync>> {
    let mut request = agent
        .request(reqwest::Method::POST, path)
        .header("Accept", "application/json, text/event-stream")
        .header("MCP-Protocol-Version", "2025-06-18")
        .json(body);
    if let Some(session) = session {
        request = request.header("Mcp-Session-Id", session);
    }
    Ok(request.send().await?.error_for_status()?)
}

async fn open(agent: &Agent, path: &str) -> Result<String, Box<dyn Error>> {
    let hello = json!({ "jsonrpc": "2.0", "id": 0, "method": "initialize", "params": {
        "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": { "name": "load", "version": "1" } } });
    let answer = post(agent, path, None, &hello).await.map_err(|error| error.to_string())?;
    let session = answer.headers().get("Mcp-Session-Id").ok_or("the server gave no session")?.to_str()?.to_owned();
    drop(answer.text().await?);
    let ready = json!({ "jsonrpc": "2.0", "method": "notifications/initialized" });
    post(agent, path, Some(&session), &ready).await.map_err(|error| error.to_string())?;
    Ok(session)
}

async fn add(agent: &Agent, path: &str, session: &str) -> Result<(), Box<dyn Error + Send + Sync>> {
    let call = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": { "name": "add", "arguments": { "a": 19, "b": 23 } } });
    let text = post(agent, path, Some(session), &call).await?.text().await?;
    if text.contains("42") { Ok(()) } else { Err(format!("that was no answer: {text}").into()) }
}
