//! What a release of the agent is, and what makes one trustworthy.
//!
//! A release is an archive of a few files, and a [`Manifest`] that says what the archive must be. The manifest travels in a signed
//! [`Envelope`] (DSSE, as in TUF and in-toto); the archive carries a signature of its own. Owns the format, the check of signatures,
//! and the rules of freshness; fetches nothing and keeps nothing. The droplet's updater, the provisioner, and whoever makes a
//! release all go by this one crate.

mod envelope;
mod keys;
mod manifest;
mod refusal;

pub use envelope::{Envelope, MANIFEST_TYPE, Signature, signed_bytes};
pub use keys::{KeysError, PublicKey, PublicKeys};
pub use manifest::{Accepted, Artifact, Channel, Digest, Manifest, Standing, UnknownChannel};
pub use refusal::Refusal;
pub use semver::Version;

/// The only target there are builds for.
pub const TARGET: &str = "x86_64-linux-gnu";

/// A larger manifest isn't read.
pub const MAX_MANIFEST_BYTES: u64 = 64 * 1024;

/// A larger archive isn't fetched, whatever its manifest says.
pub const MAX_ARCHIVE_BYTES: u64 = 64 * 1024 * 1024;

/// Name of a version's archive.
pub fn archive_name(version: &Version, target: &str) -> String {
    format!("dtma-agent-{version}-{target}.tar.gz")
}

/// Where a version's manifest is, below the place releases are served from.
pub fn manifest_path(version: &Version) -> String {
    format!("{version}/manifest.json")
}

/// Where a channel's newest manifest is, below the place releases are served from.
pub fn channel_path(channel: Channel) -> String {
    format!("channels/{channel}.json")
}
