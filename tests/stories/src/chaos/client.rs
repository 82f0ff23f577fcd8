//! One caller among several: asks for all kinds of things, and keeps count of what it was promised.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use stack::Agent;
use tokio::time::Instant;

use super::dice::Dice;
use super::model::{Answer, Model, Wish};
use super::record::Record;

/// Longer than any wait that is asked for, a restart of Docker included.
const PATIENCE: Duration = Duration::from_secs(100);

/// A caller, with instances only it asks about, and some that others ask about as well.
pub(super) struct Client<'a> {
    pub(super) who: String,
    pub(super) agent: &'a Agent,
    pub(super) image: String,
    /// Its own instances, and what they are.
    pub(super) models: BTreeMap<String, Model>,
    /// Others ask about these at the same time, so nothing can be told of them but that they hold together.
    pub(super) contested: Vec<String>,
    pub(super) dice: Dice,
    pub(super) record: &'a Record<'a>,
    pub(super) heard: Heard,
}

/// What came of the requests.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Heard {
    pub(super) accepted: usize,
    pub(super) refused: usize,
    pub(super) lost: usize,
}

impl Heard {
    /// Counts an answer.
    ///
    /// # Errors
    /// When no agent may answer like that: a fault of the server's that has no code of its own.
    pub(super) fn count(&mut self, answer: &Answer) -> Result<(), String> {
        match answer {
            Answer::Said(200..=299, _) => self.accepted += 1,
            Answer::Said(500.., code) if code.is_empty() || code == "internal" => {
                return Err(format!("it was answered {answer:?}"));
            }
            Answer::Said(..) => self.refused += 1,
            Answer::Lost | Answer::Unsent => self.lost += 1,
        }
        Ok(())
    }
}

impl Client<'_> {
    /// Asks until `end`. The mistakes of the agent's that were seen.
    pub(super) async fn ask_until(&mut self, end: Instant) -> Vec<String> {
        let mut mistakes = Vec::new();
        let all: Vec<String> = self.models.keys().chain(&self.contested).cloned().collect();
        while Instant::now() < end {
            let Some(name) = self.dice.one_of(&all).cloned() else { break };
            let wish = self.wish(&name);
            let answer = self.ask(&name, wish).await;
            self.record.write(&self.who, &format!("{name} {}: {}", spoken(wish), shown(&answer)));
            if let Err(mistake) = self.heard.count(&answer) {
                mistakes.push(format!("{name}: {wish:?}: {mistake}"));
            }
            if let Some(model) = self.models.get_mut(&name)
                && let Err(mistake) = model.heard(wish, &answer)
            {
                mistakes.push(format!("{name}: {mistake}\n{}", self.record.about(&name)));
                // What it is now nobody knows.
                self.models.remove(&name);
                self.contested.push(name);
            }
            tokio::time::sleep(Duration::from_millis(self.dice.below(1200))).await;
        }
        mistakes
    }

    fn wish(&mut self, name: &str) -> Wish {
        let absent =
            self.models.get(name).is_some_and(|model| model.possible().into_iter().all(|promise| promise.is_gone()));
        let version = u32::from(self.dice.percent(30)) + 1;
        let volumes = self.dice.percent(50);
        let often = if absent { 90 } else { 15 };
        let wishes = [
            (often, Wish::Deploy(version)),
            (if absent { 5 } else { 35 }, Wish::Update(version)),
            (25, Wish::Stop),
            (25, Wish::Start),
            (10, Wish::Restart),
            (20, Wish::Delete { volumes }),
        ];
        self.dice.weighted(&wishes).unwrap_or(Wish::Start)
    }

    async fn ask(&mut self, name: &str, wish: Wish) -> Answer {
        let wait = self.dice.one_of(&[0, 1, 5, 30]).copied().unwrap_or(1);
        let (method, path) = match wish {
            Wish::Deploy(_) => (Method::POST, "/tools".to_owned()),
            Wish::Update(_) => (Method::PUT, format!("/tools/{name}")),
            Wish::Start => (Method::POST, format!("/tools/{name}/start")),
            Wish::Stop => (Method::POST, format!("/tools/{name}/stop")),
            Wish::Restart => (Method::POST, format!("/tools/{name}/restart")),
            Wish::Delete { volumes } => (Method::DELETE, format!("/tools/{name}?volumes={volumes}")),
        };
        let body = match wish {
            Wish::Deploy(version) | Wish::Update(version) => Some(deploy(name, version, &self.image)),
            Wish::Start | Wish::Stop | Wish::Restart | Wish::Delete { .. } => None,
        };
        send(self.agent, method, &path, wait, body.as_ref()).await
    }
}

/// Asks, and says what the caller can know afterwards.
pub(super) async fn send(agent: &Agent, method: Method, path: &str, wait: u32, body: Option<&Value>) -> Answer {
    let separator = if path.contains('?') { '&' } else { '?' };
    let mut request = agent.request(method, &format!("{path}{separator}wait={wait}")).timeout(PATIENCE);
    if let Some(body) = body {
        request = request.json(body);
    }
    match request.send().await {
        Err(error) if error.is_connect() => Answer::Unsent,
        Err(_) => Answer::Lost,
        Ok(response) => {
            let status = response.status().as_u16();
            // Without a body there may have been a success all the same.
            let Ok(text) = response.text().await else { return Answer::Lost };
            let body: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
            Answer::Said(status, body.get("code").and_then(Value::as_str).unwrap_or_default().to_owned())
        }
    }
}

/// Who may connect where, by name; whoever isn't named may connect anywhere.
pub(super) fn egress_of(name: &str) -> Value {
    match name {
        "beta" => json!("none"),
        "epsilon" => json!({ "allow": ["api.example:443"] }),
        _ => json!("open"),
    }
}

/// A deploy; versions of one instance differ in their environment. Names that begin with `mcp` are MCP servers, others only stay up.
pub(super) fn deploy(name: &str, version: u32, image: &str) -> Value {
    let mut body = json!({
        "dockerImageUrl": image,
        "instanceNameOnToolbox": name,
        "accountToolInstanceId": format!("id-of-{name}"),
        "environmentVariables": { "VERSION": version.to_string() },
        "volumes": [{ "name": "data", "path": "/data" }],
        "resourceLimits": { "memory": "192m" },
        "egress": egress_of(name),
    });
    let own = if name.starts_with("mcp") {
        ("mcpTransportType", json!("http"))
    } else {
        ("baseConfigOverrideJson", json!({ "Cmd": ["sleep", "100000"] }))
    };
    if let Some(body) = body.as_object_mut() {
        body.insert(own.0.to_owned(), own.1);
    }
    body
}

fn spoken(wish: Wish) -> String {
    match wish {
        Wish::Deploy(version) => format!("deploy v{version}"),
        Wish::Update(version) => format!("update to v{version}"),
        Wish::Start => "start".to_owned(),
        Wish::Stop => "stop".to_owned(),
        Wish::Restart => "restart".to_owned(),
        Wish::Delete { volumes: true } => "delete with volumes".to_owned(),
        Wish::Delete { volumes: false } => "delete".to_owned(),
    }
}

pub(super) fn shown(answer: &Answer) -> String {
    match answer {
        Answer::Unsent => "not sent".to_owned(),
        Answer::Lost => "lost".to_owned(),
        Answer::Said(status, code) => format!("{status} {code}"),
    }
}
