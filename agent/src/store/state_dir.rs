//! The state directory: private to the agent's user, and one agent's at a time.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// The directory everything durable lies in. While this exists, no other agent can open the same one.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Holding the file is holding the lock; the kernel lets go of it when the process ends, however it ends.
    _lock: File,
}

/// Why a state directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// It could not be made.
    #[error("the state directory {path} could not be created; set DTMA_STATE_DIR to one the agent may write to")]
    Create {
        /// The directory.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// It could not be looked at.
    #[error("the state directory {path} could not be read")]
    Inspect {
        /// The directory.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// Others may look into it.
    #[error("the state directory {path} must be the agent's alone: chown it to the agent's user and chmod 700 it")]
    NotPrivate {
        /// The directory.
        path: PathBuf,
    },
    /// Another agent has it.
    #[error("another agent is using the state directory {path}")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// Its lock file could not be opened.
    #[error("the state directory {path} could not be locked; the agent must be able to write there")]
    Lock {
        /// The directory.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: io::Error,
    },
}

impl StateDir {
    /// Opens the directory, making it where it is missing, and locks it for this process.
    ///
    /// # Errors
    /// See [`StateDirError`]; each says what to do.
    pub fn open(path: &Path) -> Result<Self, StateDirError> {
        let path = path.to_owned();
        if let Err(source) = DirBuilder::new().recursive(true).mode(0o700).create(&path) {
            return Err(StateDirError::Create { path, source });
        }
        let metadata = match std::fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(source) => return Err(StateDirError::Inspect { path, source }),
        };
        if metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
            return Err(StateDirError::NotPrivate { path });
        }
        let lock = match OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path.join("lock"))
        {
            Ok(lock) => lock,
            Err(source) => return Err(StateDirError::Lock { path, source }),
        };
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path, _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StateDirError::InUse { path }),
            Err(error) => Err(StateDirError::Lock { path, source: error.into() }),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_missing_directory_is_made_private() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a/b");
        let state = StateDir::open(&path).unwrap();
        assert_eq!(std::fs::metadata(state.path()).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_directory_others_can_read_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o750)).unwrap();
        assert!(matches!(StateDir::open(directory.path()), Err(StateDirError::NotPrivate { .. })));
    }

    #[test]
    fn two_agents_cannot_have_the_same_directory_but_one_may_follow_the_other() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        let first = StateDir::open(&path).unwrap();
        assert!(matches!(StateDir::open(&path), Err(StateDirError::InUse { .. })));
        drop(first);
        assert!(StateDir::open(&path).is_ok());
    }
}
