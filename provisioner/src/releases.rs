//! The agent's releases on disk: which is the newest, what its digest is, and which files droplets may fetch.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use crate::user_data::ReleaseRef;

const TARGET: &str = "x86_64-linux-gnu";

/// A folder with one folder per version.
pub struct Releases {
    folder: PathBuf,
    /// The version new droplets get; the newest when none is named.
    wanted: Option<String>,
    public_url: String,
    /// Digests by path, length and time of change: an archive is only read again when it is another.
    digests: Mutex<HashMap<(PathBuf, u64, SystemTime), String>>,
}

/// Why there is no release to install.
#[derive(Debug, thiserror::Error)]
pub enum NoRelease {
    /// The folder can't be read.
    #[error("RELEASES_DIR can't be read")]
    Folder(#[source] std::io::Error),
    /// It holds no release, or not the one that is wanted.
    #[error("RELEASES_DIR holds no {0}")]
    Missing(String),
    /// The archive can't be read.
    #[error("the release archive {file} can't be read")]
    Archive {
        /// Its name.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The task that read it was cut off.
    #[error("reading the releases was interrupted")]
    Interrupted(#[source] tokio::task::JoinError),
}

impl Releases {
    /// Releases under `folder`, told to droplets as URLs under `public_url`.
    pub fn new(folder: PathBuf, wanted: Option<String>, public_url: String) -> Self {
        Self { folder, wanted, public_url, digests: Mutex::default() }
    }

    /// The release a new droplet gets.
    ///
    /// # Errors
    /// When there is none, or it can't be read.
    pub async fn current(self: &Arc<Self>) -> Result<ReleaseRef, NoRelease> {
        let releases = Arc::clone(self);
        tokio::task::spawn_blocking(move || releases.find()).await.map_err(NoRelease::Interrupted)?
    }

    /// The path of a file that droplets may fetch; none for anything that isn't exactly one of a release's files.
    pub fn file(&self, version: &str, file: &str) -> Option<PathBuf> {
        if !plain(version) || !plain(file) || Version::parse(version).is_none() {
            return None;
        }
        Some(self.folder.join(version).join(file)).filter(|path| {
            // Not followed: a link could lead anywhere.
            path.symlink_metadata().is_ok_and(|data| data.is_file())
                && path.parent().is_some_and(|parent| parent.symlink_metadata().is_ok_and(|data| data.is_dir()))
        })
    }

    fn find(&self) -> Result<ReleaseRef, NoRelease> {
        let version = match &self.wanted {
            Some(version) => version.clone(),
            None => self.newest()?,
        };
        let file = archive(&version);
        let path = self.file(&version, &file).ok_or_else(|| NoRelease::Missing(file.clone()))?;
        let sha256 = self.digest(&path).map_err(|source| NoRelease::Archive { file: file.clone(), source })?;
        let base = self.public_url.trim_end_matches('/');
        Ok(ReleaseRef { url: format!("{base}/agent/v1/releases/{version}/{file}"), version, sha256 })
    }

    fn newest(&self) -> Result<String, NoRelease> {
        let entries = std::fs::read_dir(&self.folder).map_err(NoRelease::Folder)?;
        entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|version| self.file(version, &archive(version)).is_some())
            .filter_map(|version| Some((Version::parse(&version)?, version)))
            .max()
            .map(|(_, version)| version)
            .ok_or_else(|| NoRelease::Missing("release".to_owned()))
    }

    fn digest(&self, path: &Path) -> Result<String, std::io::Error> {
        let data = path.metadata()?;
        let key = (path.to_owned(), data.len(), data.modified()?);
        if let Some(known) = self.digests.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(known.clone());
        }
        let mut file = std::fs::File::open(path)?;
        let (mut hasher, mut chunk) = (Sha256::new(), vec![0; 1 << 16]);
        loop {
            let read = file.read(&mut chunk)?;
            match chunk.get(..read) {
                Some([]) | None => break,
                Some(bytes) => hasher.update(bytes),
            }
        }
        let digest = hex::encode(hasher.finalize());
        self.digests.lock().unwrap_or_else(PoisonError::into_inner).insert(key, digest.clone());
        Ok(digest)
    }
}

fn archive(version: &str) -> String {
    format!("dtma-agent-{version}-{TARGET}.tar.gz")
}

/// A name that is one path component and nothing hidden.
fn plain(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'+'))
}

/// A semantic version in its order: a pre-release comes before its release.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version {
    numbers: (u64, u64, u64),
    pre: PreRelease,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum PreRelease {
    Some(Vec<Identifier>),
    None,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Identifier {
    Number(u64),
    Word(String),
}

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let text = text.split_once('+').map_or(text, |(version, _)| version);
        let (numbers, pre) = text.split_once('-').map_or((text, None), |(numbers, pre)| (numbers, Some(pre)));
        let mut parts = numbers.split('.').map(|part| part.parse().ok());
        let numbers = (parts.next()??, parts.next()??, parts.next()??);
        if parts.next().is_some() {
            return None;
        }
        let pre = pre.map_or(PreRelease::None, |pre| {
            let identifiers = pre
                .split('.')
                .map(|part| part.parse().map_or_else(|_| Identifier::Word(part.to_owned()), Identifier::Number));
            PreRelease::Some(identifiers.collect())
        });
        Some(Self { numbers, pre })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(folder: &Path, version: &str, content: &str) {
        std::fs::create_dir_all(folder.join(version)).unwrap();
        std::fs::write(folder.join(version).join(archive(version)), content).unwrap();
    }

    #[test]
    fn the_newest_version_is_the_highest_number_not_the_last_word() {
        let folder = tempfile::tempdir().unwrap();
        for version in ["0.9.0", "0.10.0", "0.10.0-rc.2", "latest", "0.11.0-rc.1", "0.11.0-rc.10"] {
            release(folder.path(), version, version);
        }
        // A version without its archive is not a release yet.
        std::fs::create_dir(folder.path().join("9.0.0")).unwrap();
        let releases = Releases::new(folder.path().to_owned(), None, "http://p:1/".to_owned());
        let found = releases.find().unwrap();
        assert_eq!(found.version, "0.11.0-rc.10");
        assert_eq!(
            found.url,
            "http://p:1/agent/v1/releases/0.11.0-rc.10/dtma-agent-0.11.0-rc.10-x86_64-linux-gnu.tar.gz"
        );
        release(folder.path(), "0.11.0", "x");
        assert_eq!(releases.find().unwrap().version, "0.11.0");
    }

    #[test]
    fn the_digest_follows_the_file() {
        let folder = tempfile::tempdir().unwrap();
        release(folder.path(), "1.0.0", "abc");
        let releases = Releases::new(folder.path().to_owned(), Some("1.0.0".to_owned()), String::new());
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(releases.find().unwrap().sha256, abc);
        release(folder.path(), "1.0.0", "longer");
        assert_ne!(releases.find().unwrap().sha256, abc);
    }

    #[test]
    fn no_name_leads_out_of_the_folder() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("releases");
        release(&folder, "1.0.0", "abc");
        std::fs::write(outer.path().join("secret"), "s").unwrap();
        std::os::unix::fs::symlink(outer.path().join("secret"), folder.join("1.0.0/link")).unwrap();
        std::os::unix::fs::symlink(outer.path(), folder.join("2.0.0")).unwrap();
        let releases = Releases::new(folder, None, String::new());
        assert!(releases.file("1.0.0", &archive("1.0.0")).is_some());
        for (version, file) in [
            ("1.0.0", "../../secret"),
            ("..", "secret"),
            ("1.0.0", "link"),
            ("2.0.0", "secret"),
            ("1.0.0", ""),
            ("", "1.0.0"),
        ] {
            assert_eq!(releases.file(version, file), None, "{version}/{file}");
        }
    }

    #[test]
    fn an_absent_release_says_what_is_absent() {
        let folder = tempfile::tempdir().unwrap();
        let none = Releases::new(folder.path().to_owned(), None, String::new()).find().unwrap_err();
        assert_eq!(none.to_string(), "RELEASES_DIR holds no release");
        let pinned = Releases::new(folder.path().to_owned(), Some("3.0.0".to_owned()), String::new());
        assert!(pinned.find().unwrap_err().to_string().contains("dtma-agent-3.0.0"));
    }
}
