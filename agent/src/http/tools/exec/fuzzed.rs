//! What must hold of a command's body, whatever it is. See [`crate::fuzz`].

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use super::*;

/// A command is one that Docker can be given, with an end to its patience; or what is wrong with it is named.
pub(crate) fn exec(data: &[u8]) {
    let Ok(body) = serde_json::from_slice::<Value>(data) else { return };
    match Asked::read(&body) {
        Ok(Asked { command, timeout_seconds }) => {
            assert!(!command[0].is_empty() && command.len() <= MAX_ARGUMENTS);
            assert!(command.iter().map(String::len).sum::<usize>() <= MAX_COMMAND);
            assert!(command.iter().all(|text| !text.contains('\0')), "Docker would cut it off: {command:?}");
            assert!((1..=MAX_TIMEOUT).contains(&timeout_seconds), "{timeout_seconds}");
            assert_eq!(body["command"], serde_json::json!(command), "not what was asked for");
        }
        Err(faults) => {
            assert!(!faults.is_empty(), "refused without a reason");
            assert!(faults.iter().all(|fault| fault.path.starts_with('$') && !fault.problem.is_empty()), "{faults:?}");
        }
    }
}
