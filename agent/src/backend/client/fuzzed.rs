//! What must hold of what a backend answers. See [`crate::fuzz`].

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use super::super::link::heartbeat_interval;
use super::super::pace::jittered;
use super::*;

/// An answer is understood or not; what is understood survives being written down, prints no token, and can be lived by.
pub(crate) fn answer(data: &[u8]) {
    if let Ok(answer) = parse::<EnrolmentAnswer>("enrol", data) {
        hidden(&answer.bearer_token, &format!("{answer:?}"));
        let again: EnrolmentAnswer = parse("enrol", &serde_json::to_vec(&answer).unwrap()).unwrap();
        assert_eq!((again.environment_id, again.settings), (answer.environment_id, answer.settings.clone()));
        lived_by(answer.settings.heartbeat_interval_seconds);
    }
    if let Ok(directives) = parse::<Directives>("take a heartbeat", data) {
        if let Some(token) = &directives.bearer_token {
            hidden(token, &format!("{directives:?}"));
        }
        if let Some(settings) = &directives.settings {
            lived_by(settings.heartbeat_interval_seconds);
        }
    }
    assert!(excerpt(data).chars().count() <= 200);
}

fn lived_by(seconds: u64) {
    let wait = jittered(heartbeat_interval(seconds), 1.0);
    assert!(wait >= Duration::from_secs(1) && wait <= Duration::from_secs(2 * 3600), "{wait:?}");
}

fn hidden(token: &Token, printed: &str) {
    // Shorter ones may be part of any text.
    assert!(token.expose().len() < 20 || !printed.contains(token.expose()), "a token is in {printed}");
}
