//! Secrets of an instance: what they are called, where they come from, and how its server is given them.
//!
//! What a [`Spec`](super::Spec) holds are names and sources only; values are in [`SecretValues`], which can't print itself and isn't
//! serialised. So ledger, labels and hashes never have anything to do with a value, and a deploy that brings other values is the same deploy.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use super::RegistryCredentials;

/// Where an instance's secrets come from, and how it is given them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretSources {
    /// Those that come with the deploy.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub given: BTreeSet<SecretName>,
    /// The backend has more, whatever they are called.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub from_backend: bool,
    /// OAuth providers whose access tokens it needs; the backend has them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub providers: BTreeSet<Provider>,
    /// How its server finds them.
    #[serde(default, skip_serializing_if = "SecretForm::is_default")]
    pub form: SecretForm,
}

impl SecretSources {
    /// It has none.
    pub fn is_none(&self) -> bool {
        self.given.is_empty() && !self.is_fetched()
    }

    /// Some of them have to be fetched.
    pub fn is_fetched(&self) -> bool {
        self.from_backend || !self.providers.is_empty()
    }

    /// The names that are known before anything has been fetched.
    pub fn promised(&self) -> BTreeSet<SecretName> {
        self.given.iter().cloned().chain(self.providers.iter().flat_map(Provider::names)).collect()
    }
}

/// How a server finds its secrets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretForm {
    /// As files under `/run/secrets`, which always hold the present values.
    #[default]
    Files,
    /// As environment variables too, as they were when its process started.
    Environment,
}

impl SecretForm {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What a secret is called: the name of its file, and of its variable.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretName(String);

/// A text that is no secret's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be 1 to 128 letters, digits and _ and not begin with a digit or with _dtma")]
pub struct InvalidSecretName;

impl SecretName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SecretName {
    type Error = InvalidSecretName;

    fn try_from(text: String) -> Result<Self, InvalidSecretName> {
        let first = |byte: &u8| byte.is_ascii_alphabetic() || *byte == b'_';
        let valid = text.len() <= 128
            && text.as_bytes().first().is_some_and(first)
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && !text.starts_with("_dtma");
        if valid { Ok(Self(text)) } else { Err(InvalidSecretName) }
    }
}

impl FromStr for SecretName {
    type Err = InvalidSecretName;
    fn from_str(text: &str) -> Result<Self, InvalidSecretName> {
        Self::try_from(text.to_owned())
    }
}

impl From<SecretName> for String {
    fn from(name: SecretName) -> Self {
        name.0
    }
}

impl fmt::Display for SecretName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An OAuth provider, as the backend calls it: `github`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Provider(String);

/// A text that is no provider's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be 1 to 64 of a-z 0-9 _ - and begin with a letter")]
pub struct InvalidProvider;

impl Provider {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What its access token is called: `OAUTH_{PROVIDER}_ACCESS_TOKEN`, and what programs of that provider's world look for.
    pub fn names(&self) -> Vec<SecretName> {
        let own = format!("OAUTH_{}_ACCESS_TOKEN", self.0.to_ascii_uppercase().replace('-', "_"));
        let known: &[&str] = match self.0.as_str() {
            "github" => &["GITHUB_TOKEN", "GITHUB_PERSONAL_ACCESS_TOKEN"],
            "gitlab" => &["GITLAB_TOKEN"],
            "slack" => &["SLACK_TOKEN"],
            "notion" => &["NOTION_TOKEN"],
            "huggingface" => &["HF_TOKEN"],
            "digitalocean" => &["DIGITALOCEAN_ACCESS_TOKEN"],
            _ => &[],
        };
        std::iter::once(own).chain(known.iter().map(|name| (*name).to_owned())).map(SecretName).collect()
    }
}

impl TryFrom<String> for Provider {
    type Error = InvalidProvider;

    fn try_from(text: String) -> Result<Self, InvalidProvider> {
        let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_' || byte == b'-';
        let valid =
            text.len() <= 64 && text.as_bytes().first().is_some_and(u8::is_ascii_lowercase) && text.bytes().all(letter);
        if valid { Ok(Self(text)) } else { Err(InvalidProvider) }
    }
}

impl From<Provider> for String {
    fn from(provider: Provider) -> Self {
        provider.0
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Secrets with their values.
#[derive(Clone, Default)]
pub struct SecretValues(pub BTreeMap<SecretName, SecretString>);

impl SecretValues {
    /// Longest value, bytes: larger ones are files that belong into a volume, and a variable has to hold them.
    pub const MAX_LENGTH: usize = 64 * 1024;

    /// Why a text can't be a secret's value. Nothing of it is repeated.
    pub fn problem(value: &str) -> Option<&'static str> {
        (value.is_empty() || value.len() > Self::MAX_LENGTH || value.contains('\0'))
            .then_some("must be 1 to 65536 bytes without NUL")
    }

    /// A value, for where it is handed over.
    pub fn expose(&self, name: &SecretName) -> Option<&str> {
        self.0.get(name).map(|value| value.expose_secret())
    }
}

/// What they are called, and nothing of what they are.
impl fmt::Debug for SecretValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// What comes with a deploy and is kept in memory only.
#[derive(Debug, Clone, Default)]
pub struct Confidential {
    /// For the registry its image comes from.
    pub registry: Option<RegistryCredentials>,
    /// The instance's own secrets.
    pub secrets: SecretValues,
}

impl From<Option<RegistryCredentials>> for Confidential {
    fn from(registry: Option<RegistryCredentials>) -> Self {
        Self { registry, secrets: SecretValues::default() }
    }
}

/// How long after they were fetched, secrets that expire then and then are fetched again: when four fifths of their lifetime are over, or
/// five minutes before its end where that is sooner, but never before half of it is over.
pub fn fetched_again_after(now: Timestamp, expires_at: Timestamp) -> std::time::Duration {
    const MARGIN: SignedDuration = SignedDuration::from_mins(5);
    let lifetime = expires_at.duration_since(now).max(SignedDuration::ZERO);
    let wait = (lifetime * 4 / 5).min(lifetime.saturating_sub(MARGIN)).max(lifetime / 2);
    std::time::Duration::try_from(wait).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn values_do_not_print() {
        let values = SecretValues([("TOKEN".parse().unwrap(), "hunter2".to_owned().into())].into());
        let confidential = Confidential { registry: None, secrets: values };
        let printed = format!("{confidential:?} {confidential:#?}");
        assert!(printed.contains("TOKEN") && !printed.contains("hunter2"), "{printed}");
    }

    #[test]
    fn names_are_those_of_variables() {
        for good in ["A", "_a", "GITHUB_TOKEN", "a1", &"x".repeat(128)] {
            assert!(SecretName::from_str(good).is_ok(), "{good}");
        }
        for bad in ["", "1A", "A-B", "a.b", "..", "a/b", "ä", "A=B", "_dtma_x", &"x".repeat(129)] {
            assert!(SecretName::from_str(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_providers_token_has_its_own_name_and_those_programs_look_for() {
        let names = |provider: &str| -> Vec<String> {
            Provider::try_from(provider.to_owned()).unwrap().names().into_iter().map(String::from).collect()
        };
        assert_eq!(names("github"), ["OAUTH_GITHUB_ACCESS_TOKEN", "GITHUB_TOKEN", "GITHUB_PERSONAL_ACCESS_TOKEN"]);
        assert_eq!(names("my-idp"), ["OAUTH_MY_IDP_ACCESS_TOKEN"]);
        for (provider, name) in [("a-b", "a_b"), ("x", "x-1")] {
            for text in [provider, name] {
                assert!(names(text).iter().all(|name| SecretName::from_str(name).is_ok()));
            }
        }
        for bad in ["", "GitHub", "1x", "a b", "a/b"] {
            assert!(Provider::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_expires_is_fetched_again_well_before() {
        let after = |seconds: i64| fetched_again_after(Timestamp::UNIX_EPOCH, Timestamp::from_second(seconds).unwrap());
        assert_eq!(after(3600), Duration::from_secs(2880));
        assert_eq!(after(900), Duration::from_secs(600));
        assert_eq!(after(120), Duration::from_secs(60));
        assert_eq!(after(0), Duration::ZERO);
        assert_eq!(after(-5), Duration::ZERO);
    }

    #[test]
    fn sources_that_say_nothing_are_none() {
        assert!(SecretSources::default().is_none());
        let from_backend = SecretSources { from_backend: true, ..SecretSources::default() };
        assert!(!from_backend.is_none() && from_backend.is_fetched() && from_backend.promised().is_empty());
    }
}
