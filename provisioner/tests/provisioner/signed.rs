//! Releases as their makers publish them: archive, signed manifest, channels.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dtma_release::{
    Artifact, Channel, Digest, Envelope, MANIFEST_TYPE, Manifest, PublicKey, PublicKeys, Signature, TARGET, Version,
    archive_name, channel_path, manifest_path, signed_bytes,
};
use jiff::Timestamp;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use sha2::Digest as _;

/// Whoever makes releases, and where.
pub(crate) struct Maker {
    pair: Ed25519KeyPair,
    folder: PathBuf,
}

impl Maker {
    pub(crate) fn new(seed: u8, folder: &Path) -> Self {
        Self { pair: Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap(), folder: folder.to_owned() }
    }

    pub(crate) fn keys(&self) -> PublicKeys {
        let bytes: [u8; 32] = self.pair.public_key().as_ref().try_into().unwrap();
        PublicKeys::new(vec![PublicKey::from(bytes)]).unwrap()
    }

    /// An archive of any content, and what is said of it.
    pub(crate) fn archive(&self, version: &str, content: &str) -> Manifest {
        let version: Version = version.parse().unwrap();
        let file = archive_name(&version, TARGET);
        self.write(&format!("{version}/{file}"), content.as_bytes());
        let sha256: [u8; 32] = sha2::Sha256::digest(content).into();
        Manifest {
            channel: Channel::Stable,
            min_version: Version::new(0, 0, 1),
            issued_at: Timestamp::now(),
            expires_at: Timestamp::now() + jiff::SignedDuration::from_hours(24),
            artifacts: vec![Artifact {
                target: TARGET.to_owned(),
                file,
                size: content.len() as u64,
                sha256: Digest::from(sha256),
            }],
            version,
        }
    }

    pub(crate) fn envelope(&self, manifest: &Manifest) -> Vec<u8> {
        let payload = serde_json::to_vec(manifest).unwrap();
        let sig = STANDARD.encode(self.pair.sign(&signed_bytes(MANIFEST_TYPE, &payload)));
        serde_json::to_vec(&Envelope::new(&payload, vec![Signature { keyid: "test".to_owned(), sig }])).unwrap()
    }

    pub(crate) fn write(&self, path: &str, bytes: &[u8]) {
        let path = self.folder.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    pub(crate) fn sign(&self, manifest: &Manifest) {
        self.write(&manifest_path(&manifest.version), &self.envelope(manifest));
    }

    pub(crate) fn publish(&self, manifest: &Manifest) {
        self.write(&channel_path(manifest.channel), &self.envelope(manifest));
    }

    /// A whole release.
    pub(crate) fn release(&self, version: &str) -> Manifest {
        let manifest = self.archive(version, &format!("archive of {version}"));
        self.sign(&manifest);
        manifest
    }
}
