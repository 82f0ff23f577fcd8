//! Who this agent is: its TLS key, and what it was given when it enrolled. One file, `identity.json`, replaced as a whole.

use std::io;
use std::path::PathBuf;

use dtma_api::enrolment::{AgentSettings, EnrolmentAnswer};
use dtma_api::{CertificatePin, EnvironmentId, Token};
use rcgen::{CertificateParams, DnType, KeyPair, PublicKeyData as _};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use super::{StateDir, durable};

/// The identity on disk and in memory; they only ever differ while [`Identity::enrolled`] is writing.
#[derive(Debug)]
pub struct Identity {
    path: PathBuf,
    record: Record,
    pin: CertificatePin,
}

/// What enrolment brought. Kept because the one-time token is then spent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Enrolment {
    /// The environment this agent serves.
    pub environment_id: EnvironmentId,
    /// Its own bearer towards the provisioner.
    pub bearer_token: Token,
    /// The latest settings it was given.
    pub settings: AgentSettings,
}

impl From<EnrolmentAnswer> for Enrolment {
    fn from(answer: EnrolmentAnswer) -> Self {
        Self { environment_id: answer.environment_id, bearer_token: answer.bearer_token, settings: answer.settings }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// For a later agent that has to read an older file.
    format: u32,
    #[serde(serialize_with = "in_full")]
    tls_key_pem: SecretString,
    tls_certificate_pem: String,
    retry_key: Token,
    enrolment: Option<Enrolment>,
}

const FORMAT: u32 = 1;

fn in_full<S: serde::Serializer>(secret: &SecretString, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(secret.expose_secret())
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file is there and can't be read.
    #[error("the agent's identity could not be read from {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// The file is not one of ours, or damaged. Made anew it would break the pin callers hold, so that is left to a person.
    #[error("{path} is damaged; put a good copy back, or remove it and enrol this droplet again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No key or certificate could be made.
    #[error("a TLS key could not be made")]
    MakeKey(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It could not be written.
    #[error("the agent's identity could not be written to {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: io::Error,
    },
}

impl Identity {
    /// Reads the identity in this directory; makes and stores one when there is none.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub fn load_or_make(state: &StateDir) -> Result<Self, IdentityError> {
        let path = state.path().join("identity.json");
        match std::fs::read(&path) {
            Ok(bytes) => Self::parse(path, &bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::make(path),
            Err(source) => Err(IdentityError::Read { path, source }),
        }
    }

    fn parse(path: PathBuf, bytes: &[u8]) -> Result<Self, IdentityError> {
        let parsed = serde_json::from_slice::<Record>(bytes).map_err(Into::into).and_then(|record| {
            if record.format != FORMAT {
                return Err(format!("format {} is not known to this version", record.format).into());
            }
            let key = KeyPair::from_pem(record.tls_key_pem.expose_secret())?;
            Ok((record, CertificatePin::of_spki(&key.subject_public_key_info())))
        });
        match parsed {
            Ok((record, pin)) => Ok(Self { path, record, pin }),
            Err(source) => Err(IdentityError::Damaged { path, source }),
        }
    }

    fn make(path: PathBuf) -> Result<Self, IdentityError> {
        let key = KeyPair::generate().map_err(|error| IdentityError::MakeKey(error.into()))?;
        let certificate = certificate(&key).map_err(|error| IdentityError::MakeKey(error.into()))?;
        let retry_key = Token::generate().map_err(|error| IdentityError::MakeKey(error.into()))?;
        let record = Record {
            format: FORMAT,
            tls_key_pem: SecretString::from(key.serialize_pem()),
            tls_certificate_pem: certificate,
            retry_key,
            enrolment: None,
        };
        let identity = Self { path, record, pin: CertificatePin::of_spki(&key.subject_public_key_info()) };
        identity.write()?;
        Ok(identity)
    }

    /// Pin of the TLS key.
    pub fn pin(&self) -> CertificatePin {
        self.pin
    }

    /// The TLS key, PKCS #8 PEM.
    pub fn tls_key_pem(&self) -> &SecretString {
        &self.record.tls_key_pem
    }

    /// The self-signed certificate of that key, PEM.
    pub fn tls_certificate_pem(&self) -> &str {
        &self.record.tls_certificate_pem
    }

    /// The secret that lets this agent, and nobody else, enrol a second time with the same one-time token.
    pub fn retry_key(&self) -> &Token {
        &self.record.retry_key
    }

    /// What enrolment brought, once there was one.
    pub fn enrolment(&self) -> Option<&Enrolment> {
        self.record.enrolment.as_ref()
    }

    /// Stores what enrolment brought. On return it is on disk, so it may be used.
    ///
    /// # Errors
    /// When it can't be written; nothing has changed then.
    pub fn enrolled(&mut self, enrolment: Enrolment) -> Result<(), IdentityError> {
        let before = self.record.enrolment.replace(enrolment);
        let written = self.write();
        if written.is_err() {
            self.record.enrolment = before;
        }
        written
    }

    fn write(&self) -> Result<(), IdentityError> {
        let text = serde_json::to_vec_pretty(&self.record).map_err(io::Error::from);
        text.and_then(|text| durable::replace(&self.path, &text))
            .map_err(|source| IdentityError::Write { path: self.path.clone(), source })
    }
}

/// A certificate that says as little as it can: callers trust the key by its pin, not by anything written here.
fn certificate(key: &KeyPair) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::new(["dtma-agent".to_owned()])?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "dtma-agent");
    Ok(params.self_signed(key)?.pem())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use uuid::Uuid;

    use super::*;

    fn enrolment() -> Enrolment {
        Enrolment {
            environment_id: EnvironmentId(Uuid::from_u128(7)),
            bearer_token: Token::from("bearer".to_owned()),
            settings: AgentSettings {
                generation: 3,
                caller_key_sha256s: vec![Token::from("key".to_owned()).hash()],
                heartbeat_interval_seconds: 60,
            },
        }
    }

    #[test]
    fn an_identity_is_made_once_and_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(&directory.path().join("state")).unwrap();
        let mut made = Identity::load_or_make(&state).unwrap();
        made.enrolled(enrolment()).unwrap();
        let found = Identity::load_or_make(&state).unwrap();
        assert_eq!(found.pin(), made.pin());
        assert_eq!(found.retry_key().expose(), made.retry_key().expose());
        let found = found.enrolment().unwrap();
        assert_eq!(found.bearer_token.expose(), "bearer");
        assert_eq!(found.settings, enrolment().settings);
        let mode = std::fs::metadata(directory.path().join("state/identity.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_identity_is_not_quietly_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(&directory.path().join("state")).unwrap();
        for bad in ["", "{}", r#"{"format":2,"tls_key_pem":"","tls_certificate_pem":"","retry_key":""}"#] {
            std::fs::write(directory.path().join("state/identity.json"), bad).unwrap();
            assert!(matches!(Identity::load_or_make(&state), Err(IdentityError::Damaged { .. })), "{bad}");
        }
    }

    #[test]
    fn an_enrolment_that_cannot_be_stored_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(&directory.path().join("state")).unwrap();
        let mut identity = Identity::load_or_make(&state).unwrap();
        std::fs::create_dir(directory.path().join("state/identity.json.new")).unwrap();
        assert!(identity.enrolled(enrolment()).is_err());
        assert!(identity.enrolment().is_none());
    }

    #[test]
    fn nothing_secret_shows_when_it_is_printed() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(&directory.path().join("state")).unwrap();
        let mut identity = Identity::load_or_make(&state).unwrap();
        identity.enrolled(enrolment()).unwrap();
        let printed = format!("{identity:?}");
        assert!(!printed.contains("PRIVATE KEY") && !printed.contains("\"bearer\""), "{printed}");
        assert!(!printed.contains(identity.retry_key().expose()));
    }
}
