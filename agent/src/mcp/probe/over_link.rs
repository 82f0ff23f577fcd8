//! One handshake over an open channel, whatever carries it, in whichever era the server speaks.

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{ATTEMPT, LEGACY, MODERN, client_info};
use crate::mcp::link::Link;

/// What servers say to a method they don't know, or not yet, or not like this: they may be of the other era.
const OTHER_ERA: [i64; 3] = [-32601, -32602, -32600];
/// Of the server's own words, what fits into a reason.
const QUOTED_CHARS: usize = 200;

/// What a server says of itself.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Shaken {
    /// The version it chose, or of those it offers the one that we would speak.
    pub(super) protocol_version: String,
    /// Its name and version: an object, or null when it doesn't say.
    pub(super) server: Value,
    /// An object by capability, or null when it doesn't say.
    pub(super) capabilities: Value,
}

/// Shakes hands with a server that hasn't been spoken to yet, within 5 seconds. The channel is good for requests afterwards; the ids 1
/// and 2 are used up. What the server sends besides its answers is passed over, except that its own requests are answered.
pub(super) async fn shake_hands(link: &mut Link) -> Result<Shaken, String> {
    let late = || Err(format!("it did not answer within {} seconds", ATTEMPT.as_secs()));
    timeout(ATTEMPT, either_era(link)).await.unwrap_or_else(|_| late())
}

async fn either_era(link: &mut Link) -> Result<Shaken, String> {
    // Legacy first: nearly every server speaks it, many of them only it.
    let refusal = match initialize(link).await? {
        Ok(result) => {
            send(link, &json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await?;
            let version = result.get("protocolVersion").and_then(Value::as_str);
            return shaken(version.ok_or("its result names no protocolVersion")?, &result);
        }
        Err(refusal) if OTHER_ERA.contains(&refusal.code) => refusal,
        Err(refusal) => return Err(refusal.reason()),
    };
    let result = discover(link)
        .await?
        .map_err(|second| format!("initialize: {}; server/discover: {}", refusal.reason(), second.reason()))?;
    let offered = result.get("supportedVersions").and_then(Value::as_array);
    let mut offered = offered.into_iter().flatten().filter_map(Value::as_str);
    let first = offered.next().ok_or("its result names no supportedVersions")?;
    let version = if first == MODERN { first } else { offered.find(|version| *version == MODERN).unwrap_or(first) };
    shaken(version, &result)
}

fn shaken(version: &str, result: &Value) -> Result<Shaken, String> {
    let member = |name| result.get(name).cloned().unwrap_or_default();
    Ok(Shaken {
        protocol_version: version.to_owned(),
        server: member("serverInfo"),
        capabilities: member("capabilities"),
    })
}

/// A JSON-RPC error for an answer.
struct Refusal {
    code: i64,
    message: String,
}

impl Refusal {
    fn reason(&self) -> String {
        format!("it answered with the error {}: {}", self.code, self.message)
    }
}

async fn initialize(link: &mut Link) -> Result<Result<Value, Refusal>, String> {
    let params = json!({"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": client_info()});
    ask(link, 1, "initialize", params).await
}

async fn discover(link: &mut Link) -> Result<Result<Value, Refusal>, String> {
    let params = json!({"_meta": {
        "io.modelcontextprotocol/protocolVersion": MODERN,
        "io.modelcontextprotocol/clientInfo": client_info(),
        "io.modelcontextprotocol/clientCapabilities": {},
    }});
    ask(link, 2, "server/discover", params).await
}

/// Asks, and waits for the answer to just that.
async fn ask(link: &mut Link, id: u32, method: &str, params: Value) -> Result<Result<Value, Refusal>, String> {
    send(link, &json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params})).await?;
    loop {
        let message = receive(link).await?;
        let theirs = message.get("id");
        if let Some(asked) = message.get("method").and_then(Value::as_str) {
            if let Some(theirs) = theirs {
                send(link, &reply(theirs, asked)).await?;
            }
        } else if theirs == Some(&json!(id)) {
            if let Some(error) = message.get("error") {
                let text = error.get("message").and_then(Value::as_str).unwrap_or_default();
                return Ok(Err(Refusal {
                    code: error.get("code").and_then(Value::as_i64).unwrap_or_default(),
                    message: text.chars().take(QUOTED_CHARS).collect(),
                }));
            }
            let result = message.get("result").filter(|result| result.is_object());
            return result.cloned().map(Ok).ok_or_else(|| "its answer is no JSON-RPC result".to_owned());
        }
    }
}

/// Our answer to a request of the server's.
fn reply(id: &Value, method: &str) -> Value {
    if method == "ping" {
        return json!({"jsonrpc": "2.0", "id": id, "result": {}});
    }
    json!({"jsonrpc": "2.0", "id": id, "error": {"code": -32601, "message": "this client only says hello"}})
}

async fn send(link: &mut Link, message: &Value) -> Result<(), String> {
    if link.to_server.send(Bytes::from(message.to_string())).await.is_ok() {
        return Ok(());
    }
    // It is gone. The last it sent is why.
    loop {
        receive(link).await?;
    }
}

async fn receive(link: &mut Link) -> Result<Value, String> {
    match link.from_server.recv().await {
        Some(Ok(message)) => {
            serde_json::from_slice(&message).map_err(|_| "it sent something that is not JSON".to_owned())
        }
        Some(Err(end)) => Err(end.reason),
        None => Err("it is gone".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::mcp::link::{DEPTH, LinkEnd};

    /// The server's side of a channel, played by the test.
    struct Server {
        from_client: mpsc::Receiver<Bytes>,
        to_client: mpsc::Sender<Result<Bytes, LinkEnd>>,
    }

    impl Server {
        fn new() -> (Self, Link) {
            let (to_server, from_client) = mpsc::channel(DEPTH);
            let (to_client, from_server) = mpsc::channel(DEPTH);
            (Self { from_client, to_client }, Link { to_server, from_server })
        }

        async fn hears(&mut self) -> Value {
            serde_json::from_slice(&self.from_client.recv().await.unwrap()).unwrap()
        }

        async fn says(&self, message: Value) {
            self.to_client.send(Ok(Bytes::from(message.to_string()))).await.unwrap();
        }
    }

    fn refusal(id: u32, code: i64) -> Value {
        json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": "no such thing"}})
    }

    #[tokio::test(start_paused = true)]
    async fn a_legacy_server_may_talk_of_other_things_meanwhile() {
        let (mut server, mut link) = Server::new();
        let play = async {
            let asked = server.hears().await;
            assert_eq!((&asked["method"], &asked["id"]), (&json!("initialize"), &json!(1)));
            assert_eq!(asked["params"]["protocolVersion"], LEGACY);
            server.says(json!({"jsonrpc": "2.0", "method": "notifications/message", "params": {}})).await;
            server.says(json!({"jsonrpc": "2.0", "id": 1, "method": "ping"})).await;
            assert_eq!(server.hears().await, json!({"jsonrpc": "2.0", "id": 1, "result": {}}));
            server.says(json!({"jsonrpc": "2.0", "id": "s", "method": "roots/list"})).await;
            assert_eq!(server.hears().await["error"]["code"], -32601);
            server.says(json!({"jsonrpc": "2.0", "id": 7, "result": {}})).await;
            let result = json!({
                "protocolVersion": "2024-11-05",
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "echo", "version": "1"},
            });
            server.says(json!({"jsonrpc": "2.0", "id": 1, "result": result})).await;
            assert_eq!(server.hears().await, json!({"jsonrpc": "2.0", "method": "notifications/initialized"}));
        };
        let (shaken, ()) = tokio::join!(shake_hands(&mut link), play);
        let expected = Shaken {
            protocol_version: "2024-11-05".to_owned(),
            server: json!({"name": "echo", "version": "1"}),
            capabilities: json!({"tools": {}}),
        };
        assert_eq!(shaken.unwrap(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_knows_no_initialize_is_asked_in_the_other_era() {
        for code in OTHER_ERA {
            let (mut server, mut link) = Server::new();
            let play = async {
                server.hears().await;
                server.says(refusal(1, code)).await;
                let asked = server.hears().await;
                assert_eq!((&asked["method"], &asked["id"]), (&json!("server/discover"), &json!(2)));
                assert_eq!(asked["params"]["_meta"]["io.modelcontextprotocol/protocolVersion"], MODERN);
                let result = json!({"supportedVersions": ["2099-01-01", MODERN], "capabilities": {}});
                server.says(json!({"jsonrpc": "2.0", "id": 2, "result": result})).await;
            };
            let (shaken, ()) = tokio::join!(shake_hands(&mut link), play);
            let shaken = shaken.unwrap();
            assert_eq!((shaken.protocol_version.as_str(), shaken.server), (MODERN, Value::Null));
            assert!(server.from_client.try_recv().is_err(), "nothing follows in this era");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_refuses_says_why() {
        let (mut server, mut link) = Server::new();
        let play = async {
            server.hears().await;
            server.says(refusal(1, -32603)).await;
        };
        let (refused, ()) = tokio::join!(shake_hands(&mut link), play);
        assert_eq!(refused.unwrap_err(), "it answered with the error -32603: no such thing");

        let (mut server, mut link) = Server::new();
        let play = async {
            server.hears().await;
            server.says(refusal(1, -32601)).await;
            server.hears().await;
            server.says(refusal(2, -32601)).await;
        };
        let (refused, ()) = tokio::join!(shake_hands(&mut link), play);
        let both = "initialize: it answered with the error -32601: no such thing; \
            server/discover: it answered with the error -32601: no such thing";
        assert_eq!(refused.unwrap_err(), both);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_no_answer_is_no_handshake() {
        for (answer, reason) in [
            (json!({"id": 1, "result": {}}), "its result names no protocolVersion"),
            (json!({"id": 1, "result": 5}), "its answer is no JSON-RPC result"),
            (json!({"id": 1}), "its answer is no JSON-RPC result"),
            (json!([]), "it did not answer within 5 seconds"),
        ] {
            let (server, mut link) = Server::new();
            server.says(answer).await;
            assert_eq!(shake_hands(&mut link).await.unwrap_err(), reason);
        }
        let (server, mut link) = Server::new();
        server.to_client.send(Ok(Bytes::from_static(b"Listening..."))).await.unwrap();
        assert_eq!(shake_hands(&mut link).await.unwrap_err(), "it sent something that is not JSON");
    }

    #[tokio::test(start_paused = true)]
    async fn a_channel_that_ends_says_why() {
        let (server, mut link) = Server::new();
        drop(server.from_client);
        server.to_client.send(Ok(Bytes::from_static(b"{}"))).await.unwrap();
        server.to_client.send(Err(LinkEnd::because("it answered 404 Not Found to a message"))).await.unwrap();
        assert_eq!(shake_hands(&mut link).await.unwrap_err(), "it answered 404 Not Found to a message");
        drop(server.to_client);
        assert_eq!(shake_hands(&mut link).await.unwrap_err(), "it is gone");
    }
}
