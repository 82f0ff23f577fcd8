//! Which version this is. It is stamped into the built program by whoever makes a release, so that the program that was tested as a
//! candidate becomes the release without being built again.

use std::hint::black_box;
use std::sync::LazyLock;

/// What a stamp begins with. Nothing else in the program contains it: it is only used while compiling.
const MARK: &[u8; 20] = b"\x01dtma-agent-version\x02";
/// The mark, and room for a version filled up with zeros.
const LENGTH: usize = 64;

static STAMP: [u8; LENGTH] = stamp(env!("CARGO_PKG_VERSION").as_bytes());

const fn stamp(version: &[u8]) -> [u8; LENGTH] {
    assert!(MARK.len() + version.len() < LENGTH, "a version this long has no room in the stamp");
    let mut stamp = [0; LENGTH];
    let (mark, rest) = stamp.split_at_mut(MARK.len());
    mark.copy_from_slice(MARK);
    let (text, _) = rest.split_at_mut(version.len());
    text.copy_from_slice(version);
    stamp
}

/// This agent's version.
pub fn version() -> &'static str {
    // Opaque to the compiler, which otherwise knows what was stamped when it compiled this.
    static VERSION: LazyLock<String> = LazyLock::new(|| {
        let room = black_box(&STAMP).iter().skip(MARK.len()).take_while(|byte| **byte != 0);
        room.map(|byte| char::from(*byte)).collect()
    });
    &VERSION
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_workspaces_until_another_is_stamped() {
        assert_eq!(version(), env!("CARGO_PKG_VERSION"));
    }
}
