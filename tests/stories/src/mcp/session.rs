//! A client that can see what an SDK's hides: every message that comes in answer to one of its own, as it was on the wire.

use std::error::Error;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use stack::Agent;

/// Longer than anything is asked to take.
const PATIENCE: Duration = Duration::from_secs(60);
const SESSION: &str = "mcp-session-id";
const VERSION: &str = "2025-11-25";

/// One session of the older era at one endpoint.
#[derive(Debug)]
pub struct Session {
    agent: Agent,
    path: String,
    id: String,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The result, and what came before it.
    Answered {
        /// JSON-RPC's `result`.
        result: Value,
        /// Notifications, and requests of the server.
        before: Vec<Value>,
    },
    /// A JSON-RPC error: its code and its message.
    Failed(i64, String),
    /// No session any more, or no server: the status and the code that say so.
    Away(u16, String),
    /// Anything that must not be: no answer, several, or somebody else's.
    Wrong(String),
}

impl Outcome {
    /// The text of a tool's answer.
    pub fn text(&self) -> Option<&str> {
        let Self::Answered { result, .. } = self else { return None };
        result.pointer("/content/0/text").and_then(Value::as_str)
    }
}

impl Session {
    /// Shakes hands, telling the server what this client is capable of.
    ///
    /// # Errors
    /// When there is no server, or it doesn't agree.
    pub async fn open(agent: &Agent, path: &str, capabilities: Value) -> Result<Self, Box<dyn Error>> {
        let mut session = Self { agent: agent.clone(), path: path.to_owned(), id: String::new() };
        let params = json!({
            "protocolVersion": VERSION, "capabilities": capabilities, "clientInfo": { "name": "story", "version": "1" },
        });
        let hello = json!({ "jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params });
        let response = session.post(&hello).send().await?;
        let status = response.status();
        session.id = response.headers().get(SESSION).and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
        let text = response.text().await?;
        if !status.is_success() || session.id.is_empty() {
            return Err(format!("initialize: {status}, session `{}`: {text}", session.id).into());
        }
        let outcome = judged(0, messages(&text));
        if !matches!(outcome, Outcome::Answered { .. }) {
            return Err(format!("initialize: {outcome:?}").into());
        }
        session.tell(json!({ "method": "notifications/initialized" })).await?;
        Ok(session)
    }

    /// Calls a tool under this id and waits for the whole answer.
    pub async fn call(&self, id: u64, tool: &str, arguments: Value) -> Outcome {
        let response = match self.post(&tool_call(id, tool, &arguments)).send().await {
            Ok(response) => response,
            Err(error) => return Outcome::Wrong(format!("call {id}: {error:?}")),
        };
        let status = response.status();
        match response.text().await {
            Ok(text) if status == StatusCode::OK => judged(id, messages(&text)),
            Ok(text) => {
                let body: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
                match body.pointer("/error/code").and_then(Value::as_i64) {
                    Some(code) if status != StatusCode::NOT_FOUND => Outcome::Failed(code, text),
                    _ => Outcome::Away(status.as_u16(), text),
                }
            }
            Err(error) => Outcome::Wrong(format!("call {id} broke off: {error:?}")),
        }
    }

    /// The same, answering whatever the server asks meanwhile with the result `reply`.
    ///
    /// # Errors
    /// When the answer breaks off, or one of ours isn't accepted.
    pub async fn call_and_reply(
        &self,
        id: u64,
        tool: &str,
        arguments: Value,
        reply: impl Fn(&Value) -> Value,
    ) -> Result<Outcome, Box<dyn Error>> {
        let mut response = self.post(&tool_call(id, tool, &arguments)).send().await?.error_for_status()?;
        let (mut text, mut replied) = (String::new(), 0);
        while let Some(chunk) = response.chunk().await? {
            text.push_str(std::str::from_utf8(&chunk)?);
            let asked = |message: &Value| message.get("method").is_some() && message.get("id").is_some();
            let questions: Vec<Value> = message_lines(&text).filter(asked).skip(replied).collect();
            for question in questions {
                self.tell(json!({ "id": question.get("id"), "result": reply(&question) })).await?;
                replied += 1;
            }
        }
        Ok(judged(id, messages(&text)))
    }

    /// Sends something that has no answer: a notification, or an answer of our own.
    ///
    /// # Errors
    /// When it isn't accepted.
    pub async fn tell(&self, mut message: Value) -> Result<(), Box<dyn Error>> {
        if let Some(message) = message.as_object_mut() {
            message.insert("jsonrpc".to_owned(), json!("2.0"));
        }
        let response = self.post(&message).send().await?;
        match response.status() {
            StatusCode::ACCEPTED => Ok(()),
            status => Err(format!("{message}: {status} {}", response.text().await?).into()),
        }
    }

    /// Says goodbye.
    ///
    /// # Errors
    /// When it isn't heard.
    pub async fn close(self) -> Result<(), Box<dyn Error>> {
        self.request(Method::DELETE).send().await?.error_for_status()?;
        Ok(())
    }

    fn post(&self, message: &Value) -> reqwest::RequestBuilder {
        let request = self.request(Method::POST).header("accept", "application/json, text/event-stream");
        request.header("mcp-protocol-version", VERSION).json(message)
    }

    fn request(&self, method: Method) -> reqwest::RequestBuilder {
        let request = self.agent.request(method, &self.path).timeout(PATIENCE);
        if self.id.is_empty() { request } else { request.header(SESSION, &self.id) }
    }
}

fn tool_call(id: u64, tool: &str, arguments: &Value) -> Value {
    let params = json!({ "name": tool, "arguments": arguments, "_meta": { "progressToken": format!("token-{id}") } });
    json!({ "jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params })
}

/// The messages in a body: one, or a stream of events with one each.
fn messages(body: &str) -> Vec<Value> {
    if let Ok(message) = serde_json::from_str(body) {
        return vec![message];
    }
    message_lines(body).collect()
}

/// The messages in some lines of server-sent events.
pub fn message_lines(lines: &str) -> impl Iterator<Item = Value> {
    let data = lines.lines().filter_map(|line| line.strip_prefix("data:"));
    data.filter_map(|data| serde_json::from_str(data.trim()).ok())
}

/// One answer, to this request, as the last thing.
fn judged(id: u64, mut messages: Vec<Value>) -> Outcome {
    let answers = messages.iter().filter(|message| message.get("method").is_none()).count();
    let Some(last) = messages.pop().filter(|_| answers == 1) else {
        return Outcome::Wrong(format!("call {id} got {answers} answers: {messages:?}"));
    };
    if last.get("id") != Some(&json!(id)) {
        return Outcome::Wrong(format!("call {id} got what isn't its answer: {last}"));
    }
    if let Some(code) = last.pointer("/error/code").and_then(Value::as_i64) {
        return Outcome::Failed(
            code,
            last.pointer("/error/message").and_then(Value::as_str).unwrap_or_default().to_owned(),
        );
    }
    match last.get("result") {
        Some(result) => Outcome::Answered { result: result.clone(), before: messages },
        None => Outcome::Wrong(format!("call {id} got neither result nor error: {last}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(id: u64) -> Value {
        json!({ "jsonrpc": "2.0", "id": id, "result": { "content": [{ "type": "text", "text": "x" }] } })
    }

    #[test]
    fn one_answer_of_ones_own_is_right_and_everything_else_is_wrong() {
        assert_eq!(judged(7, vec![answer(7)]).text(), Some("x"));
        let notice = json!({ "jsonrpc": "2.0", "method": "notifications/progress" });
        let Outcome::Answered { before, .. } = judged(7, vec![notice.clone(), answer(7)]) else { panic!() };
        assert_eq!(before, std::slice::from_ref(&notice));
        for wrong in
            [vec![], vec![notice.clone()], vec![answer(8)], vec![answer(7), answer(7)], vec![answer(7), notice]]
        {
            assert!(matches!(judged(7, wrong.clone()), Outcome::Wrong(_)), "{wrong:?}");
        }
        let failed = json!({ "jsonrpc": "2.0", "id": 7, "error": { "code": -32603, "message": "gone" } });
        assert_eq!(judged(7, vec![failed]), Outcome::Failed(-32603, "gone".to_owned()));
    }

    #[test]
    fn a_body_is_one_message_or_a_stream_of_them() {
        assert_eq!(messages(&answer(1).to_string()), [answer(1)]);
        let stream = format!(": alive\n\nevent: message\ndata: {}\n\nid: 2\ndata: {}\n\n", answer(1), answer(2));
        assert_eq!(messages(&stream), [answer(1), answer(2)]);
    }
}
