//! What a registry wants to see. Only ever in memory.

use std::fmt;

use secrecy::SecretString;

/// Credentials for the registry an instance's image comes from. They are no part of its spec and are written down nowhere.
#[derive(Clone)]
pub enum RegistryCredentials {
    /// A name and a password, or a token in its place.
    Password {
        /// The name.
        username: String,
        /// The password.
        password: SecretString,
    },
    /// What a registry gave out at an earlier login.
    IdentityToken(SecretString),
}

/// Which kind, and nothing of what is in it: names are often addresses.
impl fmt::Debug for RegistryCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password(…)",
            Self::IdentityToken(_) => "IdentityToken(…)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_do_not_print() {
        let password =
            RegistryCredentials::Password { username: "somebody".to_owned(), password: "hunter2".to_owned().into() };
        let token = RegistryCredentials::IdentityToken("hunter2".to_owned().into());
        let printed = format!("{password:?} {token:#?}");
        assert!(!printed.contains("hunter2") && !printed.contains("somebody"), "{printed}");
    }
}
