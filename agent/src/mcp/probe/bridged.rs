//! Probing servers that are reached over a bridge: on the link all clients share the agent is one more, with ids of its own, so that nobody is
//! disturbed; where each has its own, the agent opens one, too. What speaks streamable HTTP itself is asked directly.

use std::sync::Arc;

use async_trait::async_trait;
use dtma_api::health::Introduction;
use tokio::time::{Instant, timeout_at};

use super::{HttpProber, MAX_PAGES, introduction};
use crate::mcp::bridge::{Acquaintance, Bridge, Bridges};
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
    let met = timeout_at(until, bridge.handshake()).await.unwrap_or_else(|_| {
        let seconds = question.patience.as_secs();
        Err(LinkEnd::because(format!("it did not answer within {seconds} seconds")))
    });
    let met = met.map_err(|end| ProbeFailure { reason: end.to_string() })?;
    let known = met.known();
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
        introduced.tools = timeout_at(until, tools(&met, &introduced)).await.ok().and_then(Result::ok);
    }
    Ok(Answer::Introduced(Box::new(introduced)))
}

async fn tools(met: &Acquaintance, introduced: &Introduction) -> Result<Vec<String>, LinkEnd> {
    let mut names = Vec::new();
    if !introduction::offers_tools(introduced) {
        return Ok(names);
    }
    let mut cursor = None;
    for _ in 0..MAX_PAGES {
        cursor = introduction::add_tools(&mut names, &met.tools(cursor).await?);
        if cursor.is_none() {
            break;
        }
    }
    Ok(names)
}
