//! The agent's own handshake with a server that several clients share: made once for each process of the server, and what it says is what
//! every client is told. A client that comes or goes changes nothing for the others.

use std::sync::Arc;

use serde_json::{Value, json};

use super::envelope::{self, Envelope, INTERNAL_ERROR, Kind};
use super::line::Line;
use super::switchboard::Owner;
use crate::mcp::era::{LEGACY, MODERN, NEWEST_LEGACY, client_info, modern_meta};
use crate::mcp::link::LinkEnd;

/// What a server says to the agent itself is read and kept, so it has to be shorter than what it says to its clients.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// A page of its tools isn't kept.
const MAX_PAGE_BYTES: usize = 4 * 1024 * 1024;

/// What a server says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    initialized: Initialized,
    discovered: Option<Value>,
}

#[derive(Debug, Clone, PartialEq)]
enum Initialized {
    /// The result of `initialize`.
    Yes(Value),
    /// Its answer instead, for clients that know no other way.
    Refused { code: i64, message: String },
}

impl Known {
    /// The result of `initialize`, from a server that has it.
    pub fn initialized(&self) -> Option<&Value> {
        match &self.initialized {
            Initialized::Yes(result) => Some(result),
            Initialized::Refused { .. } => None,
        }
    }

    /// The result of `server/discover`, from a server that has only that.
    pub fn discovered(&self) -> Option<&Value> {
        self.discovered.as_ref()
    }

    /// What a client is told that asks for the version `wanted`: what the server told us, in the client's version where that is older, as the
    /// server itself would do it. `Err` with an error response from a server that can't be initialised.
    pub(super) fn answer(&self, id: &str, wanted: Option<&str>) -> Result<bytes::Bytes, bytes::Bytes> {
        let result = match &self.initialized {
            Initialized::Yes(result) => result,
            Initialized::Refused { code, message } => return Err(envelope::error(id, *code, message)),
        };
        let place = |version: &str| LEGACY.iter().position(|known| *known == version);
        let agreed = result.get("protocolVersion").and_then(Value::as_str).unwrap_or(NEWEST_LEGACY);
        let agreed = match wanted.and_then(|wanted| place(wanted).zip(place(agreed)).map(|both| (wanted, both))) {
            Some((wanted, (asked, had))) if asked < had => wanted,
            Some(_) | None => agreed,
        };
        let mut result = result.clone();
        if let Some(fields) = result.as_object_mut() {
            fields.insert("protocolVersion".to_owned(), json!(agreed));
        }
        Ok(envelope::result(id, &result.to_string()))
    }
}

/// What came instead of a result.
struct Refused {
    code: i64,
    message: String,
}

/// Shakes hands. The server may ask for whatever a client may be able to do; whether the client at hand can, is looked at then.
pub(super) async fn shake_hands(line: &Arc<Line>) -> Result<Known, LinkEnd> {
    let refused = match ask(line, "initialize", initialize()).await? {
        Ok(result) if result.get("protocolVersion").is_some_and(Value::is_string) => {
            let done = json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }).to_string();
            let done = Envelope::read(done.as_bytes()).map_err(|error| LinkEnd::because(error.to_string()))?;
            line.notify(Owner::Agent, &done).await?;
            return Ok(Known { initialized: Initialized::Yes(result), discovered: None });
        }
        Ok(_) => return Err(LinkEnd::because("the result of its initialize names no protocolVersion")),
        Err(refused) => refused,
    };
    match ask(line, "server/discover", discover()).await? {
        Ok(result) => {
            let Refused { code, message } = refused;
            Ok(Known { initialized: Initialized::Refused { code, message }, discovered: Some(result) })
        }
        Err(second) => Err(LinkEnd::because(format!(
            "the server answered initialize with the error {}: {}, and server/discover with the error {}: {}",
            refused.code, refused.message, second.code, second.message
        ))),
    }
}

/// Makes the server answer something, whatever. An error is an answer, too.
pub(super) async fn prove(line: &Arc<Line>, known: &Known) -> Result<(), LinkEnd> {
    let asked = match known.initialized {
        Initialized::Yes(_) => ask(line, "ping", json!({})).await,
        Initialized::Refused { .. } => ask(line, "server/discover", discover()).await,
    };
    asked.map(|_| ())
}

/// Asks for what only the newer era has. `Err` inside with the code of the error that came instead; a server that answers whatever it is asked
/// doesn't know the method either.
pub(super) async fn ask_for_newer_era(line: &Arc<Line>) -> Result<Result<(), i64>, LinkEnd> {
    let asked = ask(line, "server/discover", discover()).await?;
    let names_it = |result: &Value| {
        let versions = result.get("supportedVersions").and_then(Value::as_array);
        versions.is_some_and(|versions| versions.iter().any(|version| version == MODERN))
    };
    Ok(match asked {
        Ok(result) if names_it(&result) => Ok(()),
        Ok(_) => Err(envelope::METHOD_NOT_FOUND),
        Err(refused) => Err(refused.code),
    })
}

/// A page of the server's tools: the result of `tools/list`; `cursor` is where the page before ended.
pub(super) async fn tools(line: &Arc<Line>, known: &Known, cursor: Option<Value>) -> Result<Value, LinkEnd> {
    let mut params = match known.initialized {
        Initialized::Yes(_) => json!({}),
        Initialized::Refused { .. } => discover(),
    };
    if let (Some(cursor), Some(params)) = (cursor, params.as_object_mut()) {
        params.insert("cursor".to_owned(), cursor);
    }
    let page = ask(line, "tools/list", params).await?;
    page.map_err(|refused| LinkEnd::because(format!("it answered tools/list with the error {}", refused.code)))
}

fn initialize() -> Value {
    json!({
        "protocolVersion": NEWEST_LEGACY,
        "capabilities": { "sampling": {}, "elicitation": {}, "roots": { "listChanged": true } },
        "clientInfo": client_info(),
    })
}

fn discover() -> Value {
    json!({ "_meta": modern_meta() })
}

async fn ask(line: &Arc<Line>, method: &str, params: Value) -> Result<Result<Value, Refused>, LinkEnd> {
    let request = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params }).to_string();
    let request = Envelope::read(request.as_bytes()).map_err(|error| LinkEnd::because(error.to_string()))?;
    let pending = line.call(Owner::Agent, &request).await.map_err(|not_sent| LinkEnd::because(not_sent.to_string()))?;
    let answer = pending.answer().await;
    // An answer we made up because there was none is not the server's.
    if let Some(end) = line.ended() {
        return Err(end.clone());
    }
    let most = if method == "tools/list" { MAX_PAGE_BYTES } else { MAX_ANSWER_BYTES };
    if answer.len() > most {
        return Err(LinkEnd::because(format!("its answer to {method} is longer than {most} bytes")));
    }
    let kind = Envelope::read(&answer).map(|envelope| envelope.kind);
    let answer: Value = match (kind, serde_json::from_slice(&answer)) {
        (Ok(Kind::Response), Ok(answer)) => answer,
        _ => return Err(LinkEnd::because(format!("its answer to {method} can't be read"))),
    };
    Ok(match answer.get("error") {
        Some(error) => {
            let text = error.get("message").and_then(Value::as_str).unwrap_or_default();
            let code = error.get("code").and_then(Value::as_i64).unwrap_or(INTERNAL_ERROR);
            Err(Refused { code, message: text.chars().take(200).collect() })
        }
        None => Ok(answer.get("result").cloned().unwrap_or_default()),
    })
}
