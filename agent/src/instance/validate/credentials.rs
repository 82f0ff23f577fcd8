//! `registryCredentials`: read apart from the spec, because they are no part of it.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;

use serde_json::{Map, Value};

use super::findings::{At, Findings};
use crate::instance::RegistryCredentials;

/// Longest name, password or token: a header has to hold it.
const MAX_LENGTH: usize = 16 * 1024;

pub(super) const KEY: &str = "registryCredentials";

/// The credentials of a deploy, if it has any. What is wrong with them goes to `findings`, and never repeats them.
pub(super) fn read(body: &Map<String, Value>, findings: &mut Findings) -> Option<RegistryCredentials> {
    let at = At::root().key(KEY);
    let given = match body.get(KEY) {
        None | Some(Value::Null) => return None,
        Some(Value::Object(given)) => given,
        Some(_) => {
            findings.fault(&at, "must be an object with username and password, or with identityToken");
            return None;
        }
    };
    let mut text = |key: &str| {
        let text = findings.text(given.get(key), &at.key(key))?;
        if text.is_empty() || text.len() > MAX_LENGTH || text.contains(char::is_control) {
            findings.fault(&at.key(key), "must be 1 to 16384 bytes without control characters");
        }
        Some(text)
    };
    let (username, password, token) = (text("username"), text("password"), text("identityToken"));
    // Not a warning as elsewhere: a misspelt password would be none at all.
    for key in given.keys().filter(|key| !["username", "password", "identityToken"].contains(&key.as_str())) {
        findings.fault(&at.key(key), "is not known here");
    }
    match (username, password, token) {
        (Some(username), Some(password), None) => {
            Some(RegistryCredentials::Password { username, password: password.into() })
        }
        (None, None, Some(token)) => Some(RegistryCredentials::IdentityToken(token.into())),
        (_, _, _) => {
            findings.fault(&at, "must have username and password, or identityToken, and not both");
            None
        }
    }
}
