//! Releases as their makers, or somebody else, would offer them.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dtma_release::{
    Artifact, Channel, Digest, Envelope, MANIFEST_TYPE, Manifest, PublicKey, Signature, Version, archive_name,
    signed_bytes,
};
use ring::signature::Ed25519KeyPair;
use sha2::Digest as _;

use super::super::super::source::{FetchError, Source, Wanted};
use super::super::super::stage;
use super::droplet::version;
use super::{BEGAN, TARGET};

pub(super) fn key(seed: u8) -> zipsign_api::SigningKey {
    zipsign_api::SigningKey::from_bytes(&[seed; 32])
}

/// The same key, as what signs manifests wants it.
pub(super) fn pair(seed: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
}

pub(super) fn public(key: &zipsign_api::SigningKey) -> PublicKey {
    PublicKey::from(key.verifying_key().to_bytes())
}

/// A release as its makers, or somebody else, would offer it.
#[derive(Clone)]
pub(super) struct Offer {
    pub(super) manifest: Manifest,
    pub(super) archive: Vec<u8>,
    pub(super) signers: Vec<u8>,
}

impl Offer {
    pub(super) fn new(version_text: &str) -> Self {
        Self::of(version_text, version_text, 1)
    }

    /// `program` is what the program says it is.
    pub(super) fn of(version_text: &str, program: &str, archive_signer: u8) -> Self {
        let version = version(version_text);
        let name = archive_name(&version, TARGET);
        let archive = signed_archive(&name, &files(&version, program), archive_signer);
        let artifact = Artifact {
            target: TARGET.to_owned(),
            file: name,
            size: archive.len() as u64,
            sha256: Digest::from(<[u8; 32]>::from(sha2::Sha256::digest(&archive))),
        };
        let manifest = Manifest {
            channel: Channel::Stable,
            issued_at: BEGAN.parse().unwrap(),
            expires_at: "2026-09-01T00:00:00Z".parse().unwrap(),
            min_version: Version::new(1, 0, 0),
            artifacts: vec![artifact],
            version,
        };
        Self { manifest, archive, signers: vec![1] }
    }

    pub(super) fn change(mut self, change: impl FnOnce(&mut Manifest)) -> Self {
        change(&mut self.manifest);
        self
    }
}

pub(super) fn files(version: &Version, program: &str) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = stage::names().map(|name| (name.to_owned(), b"x".to_vec())).collect();
    for (name, content) in &mut files {
        match name.as_str() {
            "VERSION" => *content = format!("{version}\n").into_bytes(),
            "dtma-agent" => *content = program.as_bytes().to_vec(),
            _ => {}
        }
    }
    files
}

pub(super) fn signed_archive(name: &str, files: &[(String, Vec<u8>)], signer: u8) -> Vec<u8> {
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        tar.append_data(&mut header, name, content.as_slice()).unwrap();
    }
    let plain = tar.into_inner().unwrap().finish().unwrap();
    let mut signed = std::io::Cursor::new(Vec::new());
    zipsign_api::sign::copy_and_sign_tar(
        &mut std::io::Cursor::new(plain),
        &mut signed,
        &[key(signer)],
        Some(name.as_bytes()),
    )
    .unwrap();
    signed.into_inner()
}

impl Source for Offer {
    fn manifest(&self, _wanted: &Wanted) -> Result<Vec<u8>, FetchError> {
        let payload = serde_json::to_vec(&self.manifest).unwrap();
        let sign = |seed: &u8| {
            let sig = pair(*seed).sign(&signed_bytes(MANIFEST_TYPE, &payload));
            Signature { keyid: public(&key(*seed)).id(), sig: STANDARD.encode(sig) }
        };
        Ok(serde_json::to_vec(&Envelope::new(&payload, self.signers.iter().map(sign).collect())).unwrap())
    }

    fn archive(&self, _manifest: &Manifest, _artifact: &Artifact, to: &Path) -> Result<(), FetchError> {
        std::fs::write(to, &self.archive).map_err(|source| FetchError::Write { path: to.to_owned(), source })
    }
}
