//! DSSE: some bytes, what they are, and who signed both. What is signed is exactly what is later parsed, byte by byte.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::manifest::Manifest;
use crate::{MAX_MANIFEST_BYTES, PublicKeys, Refusal};

/// What the bytes in an envelope are. A format that older agents must not misread gets another number.
pub const MANIFEST_TYPE: &str = "application/vnd.dtma.release.v1+json";

/// A manifest with its signatures, as it lies beside an archive: `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Envelope {
    /// The manifest's JSON, in base64.
    pub payload: String,
    /// [`MANIFEST_TYPE`].
    pub payload_type: String,
    /// At least one, by one of the known keys.
    pub signatures: Vec<Signature>,
}

/// One signature of an envelope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// Which key, as a hint: [`crate::PublicKey::id`].
    pub keyid: String,
    /// The ed25519 signature of [`signed_bytes`], in base64.
    pub sig: String,
}

/// What a signature is of: DSSE's pre-authentication encoding, so that a signature of one kind of document is never one of another.
pub fn signed_bytes(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}

impl Envelope {
    /// Puts a payload and its signatures together.
    pub fn new(payload: &[u8], signatures: Vec<Signature>) -> Self {
        Self { payload: STANDARD.encode(payload), payload_type: MANIFEST_TYPE.to_owned(), signatures }
    }

    /// The manifest in `bytes`, if one of `keys` has signed it. Nothing of an envelope is believed before that.
    ///
    /// # Errors
    /// [`Refusal::NotUnderstood`], [`Refusal::NotSigned`] or [`Refusal::WrongKey`].
    pub fn open(bytes: &[u8], keys: &PublicKeys) -> Result<Manifest, Refusal> {
        if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_MANIFEST_BYTES) {
            return Err(Refusal::not_understood("it is far too long"));
        }
        let envelope: Self = serde_json::from_slice(bytes).map_err(Refusal::not_understood)?;
        let payload = STANDARD.decode(&envelope.payload).map_err(Refusal::not_understood)?;
        if envelope.signatures.is_empty() {
            return Err(Refusal::NotSigned);
        }
        let signed = signed_bytes(&envelope.payload_type, &payload);
        let good = envelope.signatures.iter().filter_map(|signature| STANDARD.decode(&signature.sig).ok());
        if !good.into_iter().any(|signature| keys.iter().any(|key| key.verifies(&signed, &signature))) {
            let named = envelope.signatures.iter().map(|signature| printable(&signature.keyid)).collect::<Vec<_>>();
            return Err(Refusal::WrongKey { named: named.join(", ") });
        }
        if envelope.payload_type != MANIFEST_TYPE {
            return Err(Refusal::not_understood(format!(
                "it is of the type {}, this version reads {MANIFEST_TYPE}",
                printable(&envelope.payload_type)
            )));
        }
        serde_json::from_slice(&payload).map_err(Refusal::not_understood)
    }
}

/// A few harmless characters of what a stranger wrote.
fn printable(text: &str) -> String {
    text.chars().filter(char::is_ascii_graphic).take(64).collect()
}

#[cfg(test)]
mod tests {
    use ring::signature::{Ed25519KeyPair, KeyPair as _};
    use serde_json::{Value, json};

    use super::*;
    use crate::PublicKey;

    struct Signer(Ed25519KeyPair);

    impl Signer {
        fn new(seed: u8) -> Self {
            Self(Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap())
        }

        fn public(&self) -> PublicKey {
            let bytes: [u8; 32] = self.0.public_key().as_ref().try_into().unwrap();
            PublicKey::from(bytes)
        }

        fn sign(&self, payload: &[u8]) -> Signature {
            let sig = STANDARD.encode(self.0.sign(&signed_bytes(MANIFEST_TYPE, payload)));
            Signature { keyid: self.public().id(), sig }
        }
    }

    fn payload() -> Vec<u8> {
        let manifest = json!({
            "channel": "stable", "version": "1.4.0", "issued_at": "2026-03-01T00:00:00Z", "expires_at": "2026-06-01T00:00:00Z",
            "min_version": "1.0.0", "artifacts": [], "a_later_field": { "is": "ignored" },
        });
        serde_json::to_vec(&manifest).unwrap()
    }

    fn bytes(envelope: &Envelope) -> Vec<u8> {
        serde_json::to_vec(envelope).unwrap()
    }

    fn code(result: Result<Manifest, Refusal>) -> &'static str {
        result.unwrap_err().code()
    }

    #[test]
    fn one_signature_by_one_known_key_is_enough() {
        let (first, second, stranger) = (Signer::new(1), Signer::new(2), Signer::new(3));
        let keys = PublicKeys::new(vec![first.public(), second.public()]).unwrap();
        for signers in [vec![&first], vec![&second], vec![&stranger, &second]] {
            let signatures = signers.iter().map(|signer| signer.sign(&payload())).collect();
            let manifest = Envelope::open(&bytes(&Envelope::new(&payload(), signatures)), &keys).unwrap();
            assert_eq!(manifest.version.to_string(), "1.4.0");
        }
    }

    #[test]
    fn unsigned_wrongly_signed_and_changed_manifests_are_told_apart_and_refused() {
        let (known, stranger) = (Signer::new(1), Signer::new(3));
        let keys = PublicKeys::new(vec![known.public()]).unwrap();
        let open = |envelope: &Envelope| Envelope::open(&bytes(envelope), &keys);
        assert_eq!(code(open(&Envelope::new(&payload(), vec![]))), "not_signed");
        assert_eq!(code(open(&Envelope::new(&payload(), vec![stranger.sign(&payload())]))), "wrong_key");
        let mut named_after_another = stranger.sign(&payload());
        named_after_another.keyid = known.public().id();
        assert_eq!(code(open(&Envelope::new(&payload(), vec![named_after_another]))), "wrong_key");
        let changed = String::from_utf8(payload()).unwrap().replace("1.4.0", "1.5.0");
        assert_eq!(code(open(&Envelope::new(changed.as_bytes(), vec![known.sign(&payload())]))), "wrong_key");
        let mut cut = known.sign(&payload());
        cut.sig.truncate(40);
        assert_eq!(code(open(&Envelope::new(&payload(), vec![cut]))), "wrong_key");
    }

    #[test]
    fn a_signature_of_another_kind_of_document_is_none_of_a_manifest() {
        let known = Signer::new(1);
        let keys = PublicKeys::new(vec![known.public()]).unwrap();
        let sig = STANDARD.encode(known.0.sign(&signed_bytes("text/plain", &payload())));
        let signature = Signature { keyid: known.public().id(), sig };
        let mut envelope = Envelope::new(&payload(), vec![signature]);
        assert_eq!(code(Envelope::open(&bytes(&envelope), &keys)), "wrong_key");
        envelope.payload_type = "text/plain".to_owned();
        assert_eq!(code(Envelope::open(&bytes(&envelope), &keys)), "not_understood");
    }

    #[test]
    fn what_is_no_envelope_is_refused_whatever_it_is() {
        let keys = PublicKeys::new(vec![Signer::new(1).public()]).unwrap();
        let whole = serde_json::to_value(Envelope::new(&payload(), vec![Signer::new(1).sign(&payload())])).unwrap();
        let mut without_payload = whole.clone();
        without_payload.as_object_mut().unwrap().remove("payload");
        let mut no_base64 = whole;
        no_base64["payload"] = Value::from("***");
        for bad in [json!(null), json!([]), json!({}), without_payload, no_base64] {
            assert_eq!(code(Envelope::open(&serde_json::to_vec(&bad).unwrap(), &keys)), "not_understood", "{bad}");
        }
        let long = vec![b' '; usize::try_from(MAX_MANIFEST_BYTES).unwrap() + 1];
        assert_eq!(code(Envelope::open(&long, &keys)), "not_understood");
    }
}
