//! The public keys releases are checked with. There is no empty list of them: nothing signed by nobody is ever accepted.

use std::fmt;

/// An ed25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// The key's bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// How signatures name it: the first sixteen hexadecimal digits. A hint only; what counts is whether it verifies.
    pub fn id(&self) -> String {
        let mut id = hex::encode(self.0);
        id.truncate(16);
        id
    }

    pub(crate) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, &self.0).verify(message, signature).is_ok()
    }
}

impl From<[u8; 32]> for PublicKey {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

/// One or more keys, any of which is trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKeys(Vec<PublicKey>);

/// Why there are no keys to check with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    /// The list is empty.
    #[error("there is no public key to check releases with, so none can be trusted")]
    None,
    /// One of them is none.
    #[error("release key {number} is not an ed25519 public key: 64 hexadecimal digits")]
    Malformed {
        /// Which, from 1.
        number: usize,
    },
    /// The same one twice: a spare key that isn't one.
    #[error("release key {number} is there twice")]
    Repeated {
        /// Which, from 1.
        number: usize,
    },
}

impl PublicKeys {
    /// Reads keys of 64 hexadecimal digits each, separated by commas or white space.
    ///
    /// # Errors
    /// When there is none, or one of them isn't a key.
    pub fn parse(text: &str) -> Result<Self, KeysError> {
        let words = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty());
        let mut keys = Vec::new();
        for (number, word) in (1..).zip(words) {
            let mut bytes = [0; 32];
            hex::decode_to_slice(word, &mut bytes).map_err(|_| KeysError::Malformed { number })?;
            let key = PublicKey(bytes);
            if keys.contains(&key) {
                return Err(KeysError::Repeated { number });
            }
            keys.push(key);
        }
        if keys.is_empty() { Err(KeysError::None) } else { Ok(Self(keys)) }
    }

    /// These keys; the same one twice is one.
    ///
    /// # Errors
    /// When there is none.
    pub fn new(mut keys: Vec<PublicKey>) -> Result<Self, KeysError> {
        keys.sort_unstable();
        keys.dedup();
        if keys.is_empty() { Err(KeysError::None) } else { Ok(Self(keys)) }
    }

    /// All of them; at least one.
    pub fn iter(&self) -> impl Iterator<Item = &PublicKey> {
        self.0.iter()
    }
}

impl fmt::Display for PublicKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys: Vec<_> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&keys.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_list_is_an_error_and_never_a_list_that_accepts_everything() {
        for nothing in ["", " ", ",", " ,\n"] {
            assert_eq!(PublicKeys::parse(nothing), Err(KeysError::None), "{nothing:?}");
        }
        assert_eq!(PublicKeys::new(Vec::new()), Err(KeysError::None));
    }

    #[test]
    fn keys_are_read_as_they_are_written() {
        let text = format!("{},{}", "ab".repeat(32), "cd".repeat(32));
        let keys = PublicKeys::parse(&text).unwrap();
        assert_eq!(keys.to_string(), text);
        assert_eq!(PublicKeys::parse(&text.replace(',', "\n")).unwrap(), keys);
        assert_eq!(keys.iter().next().unwrap().id(), "abababababababab");
        assert_eq!(PublicKeys::parse(&format!("{text},{}", "ab".repeat(31))), Err(KeysError::Malformed { number: 3 }));
        assert_eq!(PublicKeys::parse(&format!("{text},{}", "ab".repeat(32))), Err(KeysError::Repeated { number: 3 }));
    }
}
