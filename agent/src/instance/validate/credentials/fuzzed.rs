//! What must hold of registry credentials, whatever is put in their place. See [`crate::fuzz`].

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use secrecy::ExposeSecret as _;

use super::*;

/// They are what was given, or refused; and neither a fault nor what is printed repeats one. A value that begins with this is a secret.
const SECRET: &str = "hush";

pub(crate) fn credentials(data: &[u8]) {
    let Ok(given) = serde_json::from_slice::<Value>(data) else { return };
    let body = Map::from_iter([(KEY.to_owned(), given.clone())]);
    let mut findings = Findings::default();
    let read = read(&body, &mut findings);
    let sound = findings.is_sound();
    let review = findings.review(None);
    assert_eq!(sound, review.faults.is_empty());
    for told in review.faults.iter().chain(&review.warnings) {
        assert!(!told.problem.contains(SECRET), "{told:?}");
    }
    assert!(!format!("{read:?}").contains(SECRET));
    match read.filter(|_| sound) {
        Some(RegistryCredentials::Password { username, password }) => {
            assert_eq!((&given["username"], &given["password"]), (&username.into(), &password.expose_secret().into()));
            assert!(given.get("identityToken").is_none_or(Value::is_null));
        }
        Some(RegistryCredentials::IdentityToken(token)) => {
            assert_eq!(given["identityToken"], token.expose_secret());
            assert!(given.get("password").is_none_or(Value::is_null));
        }
        None => assert!(!sound || given.is_null(), "lost without a word: {given}"),
    }
}
