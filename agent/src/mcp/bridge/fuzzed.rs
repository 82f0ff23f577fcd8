//! What must hold of what a server writes on its standard output, and of changing a message on its way. See [`crate::fuzz`].

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::envelope::{Envelope, Kind, single_line};
use super::switchboard::{Abilities, Delivery, Owner, SessionKey, Switchboard};

/// A changed message says the same, but for what was changed; and whatever comes from a server, an answer goes to who asked, once.
pub(crate) fn message(data: &[u8]) {
    let mut board = Switchboard::new(40, false);
    let session = SessionKey(1);
    board.open(session, Abilities::ANY);
    let question = br#"{"jsonrpc":"2.0","id":"q","method":"tools/call","params":{"_meta":{"progressToken":5}}}"#;
    let (call, _) = board.request(Owner::Session(session), &Envelope::read(question).unwrap()).unwrap();
    let mut answers = 0;
    for line in data.split(|byte| *byte == b'\n').take(64) {
        for delivery in board.take(line, Instant::now()).unwrap_or_default() {
            match delivery {
                Delivery::Answer(to, message) => {
                    answers += 1;
                    let message = Envelope::read(&message).unwrap();
                    assert_eq!((to, message.kind, message.id), (call, Kind::Response, "\"q\""));
                }
                Delivery::Related(_, message) | Delivery::Session(_, message) | Delivery::Ask(_, _, message) => {
                    assert_ne!(Envelope::read(&message).unwrap().kind, Kind::Response);
                }
                Delivery::Server(message) => assert_eq!(Envelope::read(&message).unwrap().kind, Kind::Response),
            }
        }
        changed(line);
    }
    assert!(answers <= 1);
}

fn changed(message: &[u8]) {
    let Ok(envelope) = Envelope::read(message) else { return };
    assert_eq!(envelope.with(&[]), message);
    let on_one_line = single_line(Bytes::copy_from_slice(message));
    assert!(!on_one_line.contains(&b'\n') && !on_one_line.contains(&b'\r'));
    // Numbers too large for any type are messages all the same, and no values.
    let Ok(mut wanted) = serde_json::from_slice::<Value>(message) else { return };
    assert_eq!(serde_json::from_slice::<Value>(&on_one_line).unwrap(), wanted);
    if envelope.kind == Kind::Notification {
        return;
    }
    let mut replaced = vec![(envelope.id, "77")];
    wanted["id"] = json!(77);
    if let Some(token) = envelope.meta.progress_token {
        replaced.push((token.get(), "88"));
        wanted["params"]["_meta"]["progressToken"] = json!(88);
    }
    assert_eq!(serde_json::from_slice::<Value>(&envelope.with(&replaced)).unwrap(), wanted);
}
