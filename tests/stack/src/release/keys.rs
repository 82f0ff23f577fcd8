//! The keys releases are signed with. They lie in a folder outside the repository: private ones as `*.key` (64 bytes, as zipsign's
//! tools write them), public ones as `*.pub` (32 bytes).

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use dtma_release::{KeysError, PublicKey, PublicKeys};
use zipsign_api::SigningKey;

/// One key signs, another lies elsewhere for the day the first is lost.
const FEWEST: usize = 2;

/// What a release is signed with, and what the agent in it trusts from then on.
pub struct ReleaseKeys {
    signing: Vec<SigningKey>,
    public: PublicKeys,
}

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseKeysError {
    /// A file can't be read or written.
    #[error("cannot {doing} {}", path.display())]
    File {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It isn't a key.
    #[error("{} is not a key: a .key file has 64 bytes, a .pub file 32", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// Too few public ones.
    #[error("{} holds {found} public keys (*.pub) where {FEWEST} are needed: one whose private half signs, and one whose private half lies elsewhere", folder.display())]
    TooFew {
        /// The folder.
        folder: PathBuf,
        /// How many.
        found: usize,
    },
    /// Nothing to sign with.
    #[error("{} holds no private key (*.key) to sign with", folder.display())]
    NoneSigns {
        /// The folder.
        folder: PathBuf,
    },
    /// A private key that isn't there, or is of no public key that is.
    #[error("{} belongs to none of the public keys beside it, so no agent would trust what it signs", path.display())]
    Unpaired {
        /// The private key.
        path: PathBuf,
    },
    /// Others may read it.
    #[error("{} can be read by others; chmod 600 it", path.display())]
    NotPrivate {
        /// The private key.
        path: PathBuf,
    },
    /// There are some already.
    #[error("{} holds keys already; nothing was changed", folder.display())]
    There {
        /// The folder.
        folder: PathBuf,
    },
    /// No random numbers.
    #[error("the system gives no random numbers: {0}")]
    Random(String),
    /// The list isn't one.
    #[error(transparent)]
    Keys(#[from] KeysError),
}

fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ReleaseKeysError {
    let path = path.to_owned();
    move |source| ReleaseKeysError::File { doing, path, source }
}

impl ReleaseKeys {
    /// The keys in a folder.
    ///
    /// # Errors
    /// When there are fewer than two public ones or no private one, or one of them isn't a key.
    pub fn load(folder: &Path) -> Result<Self, ReleaseKeysError> {
        let mut public = Vec::new();
        for path in files(folder, "pub")? {
            let bytes: [u8; 32] = exactly(&path)?;
            public.push(PublicKey::from(bytes));
        }
        let public_count = public.len();
        if public_count < FEWEST {
            return Err(ReleaseKeysError::TooFew { folder: folder.to_owned(), found: public_count });
        }
        let mut signing = Vec::new();
        for path in files(folder, "key")? {
            let mode = path.metadata().map_err(file("read", &path))?.permissions().mode();
            if mode & 0o077 != 0 {
                return Err(ReleaseKeysError::NotPrivate { path });
            }
            let bytes: [u8; 64] = exactly(&path)?;
            let key = SigningKey::from_keypair_bytes(&bytes)
                .map_err(|_| ReleaseKeysError::Malformed { path: path.clone() })?;
            if !public.contains(&PublicKey::from(key.verifying_key().to_bytes())) {
                return Err(ReleaseKeysError::Unpaired { path });
            }
            signing.push(key);
        }
        if signing.is_empty() {
            return Err(ReleaseKeysError::NoneSigns { folder: folder.to_owned() });
        }
        Ok(Self { signing, public: PublicKeys::new(public)? })
    }

    /// Makes two pairs in a folder that holds none.
    ///
    /// # Errors
    /// When there are keys already, or they can't be made.
    pub fn make(folder: &Path) -> Result<(), ReleaseKeysError> {
        std::fs::create_dir_all(folder).map_err(file("make", folder))?;
        if !files(folder, "key")?.is_empty() || !files(folder, "pub")?.is_empty() {
            return Err(ReleaseKeysError::There { folder: folder.to_owned() });
        }
        for number in 1..=FEWEST {
            let mut seed = [0; 32];
            getrandom::fill(&mut seed).map_err(|error| ReleaseKeysError::Random(error.to_string()))?;
            let key = SigningKey::from_bytes(&seed);
            write(&folder.join(format!("release-{number}.key")), &key.to_keypair_bytes(), 0o600)?;
            write(&folder.join(format!("release-{number}.pub")), key.verifying_key().as_bytes(), 0o644)?;
        }
        Ok(())
    }

    /// The public ones: what agents and provisioners are given.
    pub fn public(&self) -> &PublicKeys {
        &self.public
    }

    pub(super) fn signing(&self) -> &[SigningKey] {
        &self.signing
    }
}

/// Files of a folder with an extension, by name. A folder that isn't there holds none.
fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, ReleaseKeysError> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(file("read", folder)(error)),
    };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut paths: Vec<_> = paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect();
    paths.sort();
    Ok(paths)
}

fn exactly<const LENGTH: usize>(path: &Path) -> Result<[u8; LENGTH], ReleaseKeysError> {
    let bytes = std::fs::read(path).map_err(file("read", path))?;
    bytes.try_into().map_err(|_| ReleaseKeysError::Malformed { path: path.to_owned() })
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), ReleaseKeysError> {
    let mut options = OpenOptions::new();
    let mut opened = options.write(true).create_new(true).mode(mode).open(path).map_err(file("make", path))?;
    opened.write_all(bytes).and_then(|()| opened.sync_all()).map_err(file("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_made_once_and_private() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("keys");
        assert!(matches!(ReleaseKeys::load(&folder), Err(ReleaseKeysError::TooFew { found: 0, .. })));
        ReleaseKeys::make(&folder).unwrap();
        let keys = ReleaseKeys::load(&folder).unwrap();
        assert_eq!((keys.signing().len(), keys.public().iter().count()), (2, 2));
        assert!(matches!(ReleaseKeys::make(&folder), Err(ReleaseKeysError::There { .. })));
        assert_eq!(folder.join("release-1.key").metadata().unwrap().permissions().mode() & 0o777, 0o600);

        // The second one's private half lies elsewhere, as it should.
        std::fs::remove_file(folder.join("release-2.key")).unwrap();
        assert_eq!(ReleaseKeys::load(&folder).unwrap().signing().len(), 1);
        std::fs::remove_file(folder.join("release-1.key")).unwrap();
        assert!(matches!(ReleaseKeys::load(&folder), Err(ReleaseKeysError::NoneSigns { .. })));
    }

    #[test]
    fn keys_that_nobody_would_trust_or_everybody_could_read_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        ReleaseKeys::make(folder.path()).unwrap();
        ReleaseKeys::make(other.path()).unwrap();
        let key = folder.path().join("release-1.key");
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(ReleaseKeys::load(folder.path()), Err(ReleaseKeysError::NotPrivate { .. })));
        std::fs::copy(other.path().join("release-1.key"), &key).unwrap();
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(ReleaseKeys::load(folder.path()), Err(ReleaseKeysError::Unpaired { .. })));
        std::fs::write(&key, b"short").unwrap();
        assert!(matches!(ReleaseKeys::load(folder.path()), Err(ReleaseKeysError::Malformed { .. })));
    }
}
