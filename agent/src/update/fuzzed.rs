//! What must hold of what the updater, which is root, reads: a manifest from anybody, a request and vitals from the agent. See
//! [`crate::fuzz`].

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use dtma_release::{Envelope, Manifest, PublicKey, PublicKeys, TARGET, Version};
use jiff::Timestamp;

use super::request::Request;
use super::vitals::Vitals;

/// Nothing is taken that the one key there is hasn't signed; a manifest somebody did sign is judged without surprises; a request can only
/// name a version, and its folder is one folder.
pub(crate) fn release(data: &[u8]) {
    let keys = PublicKeys::new(vec![PublicKey::from([7; 32])]).unwrap();
    assert!(Envelope::open(data, &keys).is_err(), "nobody has the private half of this key");
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(data) {
        let now = manifest.issued_at;
        if let Ok(artifact) = manifest.installable(TARGET, now) {
            assert!(now < manifest.expires_at && artifact.size <= dtma_release::MAX_ARCHIVE_BYTES);
            one_component(&artifact.file);
        }
        let _ = manifest.standing(&Version::new(0, 1, 0), None);
        one_component(&manifest.version.to_string());
        let again: Manifest = serde_json::from_slice(&serde_json::to_vec(&manifest).unwrap()).unwrap();
        assert_eq!(again, manifest);
    }
    if let Ok(Request { version: Some(version) }) = serde_json::from_slice(data) {
        one_component(&version.to_string());
    }
    if let Ok(vitals) = serde_json::from_slice::<Vitals>(data) {
        assert!(vitals.written_at <= Timestamp::MAX);
    }
}

fn one_component(name: &str) {
    assert!(!name.is_empty() && !name.starts_with('.') && !name.contains('/'), "{name}");
}
