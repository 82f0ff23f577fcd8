//! Probing servers that are reached over a bridge: the agent is one more client of the link all of them share, with ids of its own, so that
//! nobody is disturbed. What speaks HTTP itself is asked directly.

use std::sync::Arc;

use async_trait::async_trait;
use dtma_api::health::Introduction;
use tokio::time::{Instant, timeout_at};

use super::{HttpProber, MAX_PAGES, introduction};
use crate::mcp::bridge::{Bridge, Bridges};
use crate::mcp::link::LinkEnd;
use crate::reconcile::{Answer, ProbeFailure, Prober, Question, Upstream};

/// Probes servers whatever they speak.
#[derive(Clone)]
pub struct McpProber {
    http: HttpProber,
    bridges: Bridges,
}

impl McpProber {
    /// Over the bridges that clients use, too.
    pub fn new(bridges: Bridges) -> Self {
        Self { http: HttpProber::default(), bridges }
    }
}

#[async_trait]
impl Prober for McpProber {
    async fn probe(&self, upstream: &Upstream, question: Question) -> Result<Answer, ProbeFailure> {
        match self.bridges.to(upstream) {
            Some(bridge) => ask(&bridge, question).await,
            None => self.http.probe(upstream, question).await,
        }
    }
}

async fn ask(bridge: &Arc<Bridge>, question: Question) -> Result<Answer, ProbeFailure> {
    let until = Instant::now() + question.patience;
    let known = match timeout_at(until, bridge.handshake()).await {
        Ok(Ok(known)) => known,
        Ok(Err(end)) => return Err(ProbeFailure { reason: end.to_string() }),
        // A server that does one thing at a time may be at it for minutes. Should it hang, its clients will have given up one day.
        Err(_) if bridge.is_busy() => return Ok(Answer::CannotSay),
        Err(_) => {
            let seconds = question.patience.as_secs();
            return Err(ProbeFailure { reason: format!("it did not answer within {seconds} seconds") });
        }
    };
    let introduced = match (known.initialized(), known.discovered()) {
        (Some(result), _) => introduction::legacy(result),
        (None, Some(result)) => introduction::modern(result),
        (None, None) => None,
    };
    let Some(mut introduced) = introduced else {
        return Err(ProbeFailure { reason: "what it said of itself is not what an MCP server says".to_owned() });
    };
    if question.tools {
        // It has shaken hands, which is what was to be found out.
        introduced.tools = timeout_at(until, tools(bridge, &introduced)).await.ok().and_then(Result::ok);
    }
    Ok(Answer::Introduced(Box::new(introduced)))
}

async fn tools(bridge: &Arc<Bridge>, introduced: &Introduction) -> Result<Vec<String>, LinkEnd> {
    let mut names = Vec::new();
    if !introduction::offers_tools(introduced) {
        return Ok(names);
    }
    let mut cursor = None;
    for _ in 0..MAX_PAGES {
        cursor = introduction::add_tools(&mut names, &bridge.tools(cursor).await?);
        if cursor.is_none() {
            break;
        }
    }
    Ok(names)
}
