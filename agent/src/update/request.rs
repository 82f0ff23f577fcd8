//! What the agent asks the updater for. The agent is the weaker of the two: whatever it writes can only choose among releases that are
//! checked in the same way, never say where from or with what key.

use std::io::{self, Read as _};
use std::path::Path;

use dtma_release::Version;
use serde::{Deserialize, Serialize};

use super::places::open_of_the_agents;

/// A request is a line.
const MAX_BYTES: u64 = 4096;

/// One request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    /// Which version; none for the newest of the channel.
    #[serde(default)]
    pub version: Option<Version>,
}

/// Takes the request that lies there; none when there is none. What can't be read is taken, too, and is an error.
pub(super) fn take(path: &Path) -> io::Result<Option<Request>> {
    let file = match open_of_the_agents(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            remove(path)?;
            return Err(error);
        }
    };
    let mut bytes = Vec::new();
    let read = file.take(MAX_BYTES).read_to_end(&mut bytes);
    // First of all: a request that stays would start the updater again and again.
    remove(path)?;
    read?;
    Ok(Some(serde_json::from_slice(&bytes)?))
}

fn remove(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(there) if there.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_taken_once_whatever_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("update-request.json");
        assert_eq!(take(&path).unwrap(), None);
        std::fs::write(&path, r#"{"version": "1.2.3", "url": "http://ignored"}"#).unwrap();
        assert_eq!(take(&path).unwrap(), Some(Request { version: Some(Version::new(1, 2, 3)) }));
        assert_eq!(take(&path).unwrap(), None);
        std::fs::write(&path, "{}").unwrap();
        assert_eq!(take(&path).unwrap(), Some(Request { version: None }));
        for bad in ["", "[", r#"{"version": "../.."}"#, &"x".repeat(10_000)] {
            std::fs::write(&path, bad).unwrap();
            assert!(take(&path).is_err(), "{bad}");
            assert!(!path.exists());
        }
    }

    #[test]
    fn links_folders_and_pipes_in_its_place_are_removed_and_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("secret");
        std::fs::write(&secret, r#"{"version": "6.6.6"}"#).unwrap();
        let path = folder.path().join("update-request.json");
        std::os::unix::fs::symlink(&secret, &path).unwrap();
        assert!(take(&path).is_err());
        assert!(path.symlink_metadata().is_err() && secret.exists());
        std::fs::create_dir_all(path.join("a")).unwrap();
        assert!(take(&path).is_err());
        assert!(!path.exists());
        // Opening a pipe nobody writes to would hang.
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        assert!(take(&path).is_err());
        assert!(!path.exists());
    }
}
