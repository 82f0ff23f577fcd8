//! What must hold of a ledger, whatever lies in its place. See [`crate::fuzz`].

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use super::*;

/// Bytes are refused with a reason, or read as what is written again the same. The same bytes are also tried as entries with a header that
/// is right, since chance never finds a checksum.
pub(crate) fn ledger(data: &[u8]) {
    for bytes in [data.to_vec(), with_header(data)] {
        match parse(&bytes) {
            Err(problem) => assert!(!problem.is_empty()),
            Ok((generation, contents)) => {
                let written = render(generation, &contents).unwrap();
                assert_eq!(parse(&written).unwrap(), (generation, contents.clone()));
                assert_eq!(render(generation, &contents).unwrap(), written);
                // A byte less or changed is noticed.
                for length in [written.len() / 2, written.len() - 2] {
                    assert!(parse(&written[..length]).is_err(), "{length} bytes were believed");
                }
                for (name, entry) in &contents.entries {
                    assert_eq!(name, &entry.spec.name, "an entry under another's name");
                }
            }
        }
    }
}

/// A whole ledger with this body.
pub(crate) fn with_header(body: &[u8]) -> Vec<u8> {
    let body = body.trim_ascii();
    let header = Header { format: FORMAT, generation: 3, sha256: hex::encode(Sha256::digest(body)) };
    [serde_json::to_vec(&header).unwrap().as_slice(), b"\n", body, b"\n"].concat()
}
