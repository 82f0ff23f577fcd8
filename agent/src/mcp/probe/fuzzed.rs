//! What must hold of an MCP server's answer to the handshake, whatever it sends. See [`crate::fuzz`].

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use super::*;

/// An answer on a stream is found as soon as it is whole, and stays what it was found to be. The first byte chooses the status.
pub(crate) fn probe(data: &[u8]) {
    let Some((status, received)) = data.split_first() else { return };
    let received = &received[..received.len().min(4096)];
    let status = [StatusCode::OK, StatusCode::ACCEPTED, StatusCode::BAD_REQUEST, StatusCode::BAD_GATEWAY]
        [usize::from(status % 4)];
    if let Ok(message) = serde_json::from_slice::<Value>(received) {
        judged(status, &message);
    }
    let Some(message) = event_with_answer(received, FIRST) else { return };
    judged(status, &message);
    let first = (0..received.len()).find_map(|end| event_with_answer(&received[..end], FIRST));
    if let Some(first) = first {
        assert_eq!(first, message, "what came later changed the answer");
    }
}

fn judged(status: StatusCode, message: &Value) {
    match judge(status, message, FIRST) {
        Ok(result) => {
            assert!(status.is_success() && message["id"] == json!(1) && message.get("error").is_none());
            assert_eq!(result, message["result"]);
            introduced(&result);
        }
        // It is for a person, and comes from a stranger.
        Err(answer) => assert!(answer.reason().chars().count() < 400),
    }
}

/// Whatever a server says of itself, what is kept of it is bounded.
fn introduced(result: &Value) {
    for said in [introduction::legacy(result), introduction::modern(result)].into_iter().flatten() {
        let kept = serde_json::to_vec(&said).unwrap();
        assert!(kept.len() < introduction::MAX_CAPABILITIES + 8 * 1024, "{} bytes", kept.len());
    }
    let mut names = Vec::new();
    introduction::add_tools(&mut names, result);
    assert!(names.len() <= introduction::MAX_TOOLS);
    assert!(names.iter().all(|name| name.chars().count() <= introduction::MAX_NAME));
}
