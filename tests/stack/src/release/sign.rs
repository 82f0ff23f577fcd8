//! Signing: a packed release becomes one that droplets take.

use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dtma_release::{Envelope, MANIFEST_TYPE, Manifest, PublicKey, Signature, signed_bytes};
use ring::signature::Ed25519KeyPair;
use zipsign_api::SigningKey;
use zipsign_api::sign::copy_and_sign_tar;

use super::keys::ReleaseKeys;

/// Signing itself can only fail on what is no key or no archive.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The archive's own signature.
    #[error("the archive can't be signed")]
    Archive(#[from] zipsign_api::sign::SignTarError),
    /// The manifest can't be written as JSON.
    #[error("the manifest can't be written")]
    Manifest(#[from] serde_json::Error),
    /// A private key that ring doesn't take.
    #[error("a release key is not usable: {0}")]
    Key(ring::error::KeyRejected),
}

/// The archive with a signature by every key at its end; still a `.tar.gz`. Bound to its file name.
pub(super) fn archive(bytes: Vec<u8>, name: &str, keys: &ReleaseKeys) -> Result<Vec<u8>, SignError> {
    let mut signed = Cursor::new(Vec::with_capacity(bytes.len() + 1024));
    copy_and_sign_tar(&mut Cursor::new(bytes), &mut signed, keys.signing(), Some(name.as_bytes()))?;
    Ok(signed.into_inner())
}

/// The manifest in its envelope, signed by every key.
///
/// # Errors
/// See [`SignError`].
pub fn manifest(manifest: &Manifest, keys: &ReleaseKeys) -> Result<Vec<u8>, SignError> {
    let payload = serde_json::to_vec_pretty(manifest)?;
    let signed = signed_bytes(MANIFEST_TYPE, &payload);
    let sign = |key: &SigningKey| {
        let public = key.verifying_key().to_bytes();
        let pair = Ed25519KeyPair::from_seed_and_public_key(key.as_bytes(), &public).map_err(SignError::Key)?;
        let sig = STANDARD.encode(pair.sign(&signed));
        Ok(Signature { keyid: PublicKey::from(public).id(), sig })
    };
    let signatures = keys.signing().iter().map(sign).collect::<Result<Vec<_>, SignError>>()?;
    Ok(serde_json::to_vec_pretty(&Envelope::new(&payload, signatures))?)
}
