//! A caller whose instances are one group. It asks for all of them or for none, so whatever happens all of them are there, or none.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use stack::Agent;
use tokio::time::Instant;

use super::client::{Heard, deploy, send, shown};
use super::dice::Dice;
use super::record::Record;

/// The group's id.
pub(super) const GROUP: &str = "crew";
/// Its members; each is deployed after the one before it.
pub(super) const MEMBERS: [&str; 3] = ["crew-one", "mcp-crew-two", "crew-three"];

pub(super) struct Crew<'a> {
    pub(super) agent: &'a Agent,
    pub(super) image: String,
    pub(super) dice: Dice,
    pub(super) record: &'a Record<'a>,
    pub(super) heard: Heard,
}

#[derive(Debug, Clone, Copy)]
enum Wish {
    Deploy(u32),
    Remove,
    Member(&'static str),
}

impl Crew<'_> {
    /// Asks until `end`. The mistakes of the agent's that were seen.
    pub(super) async fn ask_until(&mut self, end: Instant) -> Vec<String> {
        let mut mistakes = Vec::new();
        while Instant::now() < end {
            let version = u32::from(self.dice.percent(20)) + 1;
            let wishes = [
                (40, Wish::Deploy(version)),
                (12, Wish::Remove),
                (12, Wish::Member("stop")),
                (16, Wish::Member("start")),
                (8, Wish::Member("restart")),
            ];
            let Some(wish) = self.dice.weighted(&wishes) else { break };
            let Some(member) = self.dice.one_of(&MEMBERS).copied() else { break };
            let wait = self.dice.one_of(&[0, 1, 5, 30]).copied().unwrap_or(1);
            let (method, path, body) = match wish {
                Wish::Deploy(version) => (Method::POST, "/mcp/groups".to_owned(), Some(self.group(version))),
                Wish::Remove => (Method::DELETE, format!("/mcp/groups/{GROUP}?gracefulTimeoutMs=1000"), None),
                Wish::Member(verb) => (Method::POST, format!("/tools/{member}/{verb}"), None),
            };
            let answer = send(self.agent, method, &path, wait, body.as_ref()).await;
            let what = match wish {
                Wish::Deploy(version) => format!("{GROUP} group v{version}"),
                Wish::Remove => format!("{GROUP} group delete"),
                Wish::Member(verb) => format!("{member} {verb}"),
            };
            self.record.write("the crew", &format!("{what}: {}", shown(&answer)));
            if let Err(mistake) = self.heard.count(&answer) {
                mistakes.push(format!("{GROUP}: {what}: {mistake}"));
            }
            tokio::time::sleep(Duration::from_millis(self.dice.below(2000))).await;
        }
        mistakes
    }

    fn group(&self, version: u32) -> Value {
        json!({
            "groupId": GROUP,
            "servers": MEMBERS.map(|name| deploy(name, version, &self.image)),
            "options": { "sharedNetworking": true, "dependencyOrder": MEMBERS, "maxConcurrentDeployments": 2, "atomic": true },
        })
    }
}
