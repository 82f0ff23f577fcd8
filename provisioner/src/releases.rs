//! The agent's releases on disk: which one new droplets get, whether it is what its makers signed, and which files droplets may fetch.
//!
//! The folder holds `{version}/{archive}` and `{version}/manifest.json`, and `channels/{stable,canary}.json`, each the signed manifest of
//! the channel's newest. It may be written to by whatever publishes releases; nothing in it is believed for lying there.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::SystemTime;

use dtma_release::{
    Channel, Envelope, MAX_MANIFEST_BYTES, Manifest, PublicKeys, Refusal, TARGET, Version, archive_name, channel_path,
    manifest_path,
};
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};

use crate::user_data::ReleaseRef;

const CHANNELS: &str = "channels";

/// What makes an archive in the folder a release.
#[derive(Debug, Clone)]
pub enum Trust {
    /// A manifest that one of these keys has signed, and an archive that is exactly what it says.
    Signed(PublicKeys),
    /// That it lies there. For development only: who can write to the folder owns every new droplet.
    Unsigned,
}

/// The folder.
pub struct Releases {
    folder: PathBuf,
    trust: Trust,
    /// The version new droplets get, whatever else there is.
    pinned: Option<Version>,
    /// The version the fleet has gone to, once there is one.
    proven: RwLock<Option<Version>>,
    url: String,
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
    /// A file of it can't be read.
    #[error("{file} in RELEASES_DIR can't be read")]
    Unreadable {
        /// Its path in the folder.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// What its manifest says can't be relied on.
    #[error("{file} in RELEASES_DIR can't be used: {refusal}")]
    Refused {
        /// The manifest's path in the folder.
        file: String,
        /// Why.
        refusal: Refusal,
    },
    /// The archive is another than was signed.
    #[error("the archive {file} in RELEASES_DIR is not the one its manifest was signed for: its {what} is another")]
    Altered {
        /// Its name.
        file: String,
        /// Size or SHA-256.
        what: &'static str,
    },
    /// There are no keys to check anything with.
    #[error("RELEASE_KEYS is `unsigned`, so no release can be checked, and agents update to signed ones only")]
    Unsigned,
    /// The task that read it was cut off.
    #[error("reading the releases was interrupted")]
    Interrupted(#[source] tokio::task::JoinError),
}

impl NoRelease {
    /// A stable word for it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing(_) => "missing",
            Self::Folder(_) | Self::Unreadable { .. } | Self::Interrupted(_) => "unreadable",
            Self::Refused { refusal, .. } => refusal.code(),
            Self::Altered { .. } => "bad_archive",
            Self::Unsigned => "no_keys",
        }
    }
}

impl Releases {
    /// Releases under `folder`, told to droplets as URLs under `url`.
    pub fn new(folder: PathBuf, trust: Trust, pinned: Option<Version>, url: String) -> Self {
        Self { folder, trust, pinned, proven: RwLock::default(), url, digests: Mutex::default() }
    }

    /// The whole fleet has gone to `version`: new droplets begin with it, as long as it is there.
    pub fn has_proved_itself(&self, version: Version) {
        *self.proven.write().unwrap_or_else(PoisonError::into_inner) = Some(version);
    }

    /// The release a new droplet gets: the pinned one; else the one a rollout has brought to the whole fleet; else channel stable's; else
    /// the newest there is.
    ///
    /// # Errors
    /// When there is none, or it isn't what it must be. A pinned release and channel stable's are never replaced by another one: that
    /// would be somebody else's choice.
    pub async fn current(self: &Arc<Self>) -> Result<ReleaseRef, NoRelease> {
        let releases = Arc::clone(self);
        tokio::task::spawn_blocking(move || releases.find(Timestamp::now())).await.map_err(NoRelease::Interrupted)?
    }

    /// What the makers of `version` say of it, if an agent could install it now.
    ///
    /// # Errors
    /// When it isn't there, isn't signed by a known key, has expired, or its archive is another.
    pub async fn signed(self: &Arc<Self>, version: Version) -> Result<Manifest, NoRelease> {
        let releases = Arc::clone(self);
        let look = move || {
            let Trust::Signed(keys) = &releases.trust else { return Err(NoRelease::Unsigned) };
            releases.manifest_of(&version, keys, Timestamp::now())
        };
        tokio::task::spawn_blocking(look).await.map_err(NoRelease::Interrupted)?
    }

    /// The path of a file that droplets may fetch; none for anything that isn't exactly one of a release's files or a channel's manifest.
    pub fn file(&self, folder: &str, file: &str) -> Option<PathBuf> {
        let known = if folder == CHANNELS {
            [Channel::Stable, Channel::Canary].iter().any(|channel| format!("{channel}.json") == file)
        } else {
            plain(folder) && plain(file) && Version::parse(folder).is_ok()
        };
        if !known {
            return None;
        }
        Some(self.folder.join(folder).join(file)).filter(|path| {
            // Not followed: a link could lead anywhere.
            path.symlink_metadata().is_ok_and(|data| data.is_file())
                && path.parent().is_some_and(|parent| parent.symlink_metadata().is_ok_and(|data| data.is_dir()))
        })
    }

    fn find(&self, now: Timestamp) -> Result<ReleaseRef, NoRelease> {
        if let Some(pinned) = &self.pinned {
            return self.reference(pinned, now);
        }
        let proven = self.proven.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(proven) = proven {
            match self.reference(&proven, now) {
                Ok(release) => return Ok(release),
                Err(error) => {
                    tracing::warn!(version = %proven, error = %error, "the fleet's release can't be installed any more")
                }
            }
        }
        if let Trust::Signed(keys) = &self.trust
            && let Some(manifest) = self.channel(Channel::Stable, keys)?
        {
            self.check(&manifest, &channel_path(Channel::Stable), now)?;
            return self.reference(&manifest.version, now);
        }
        self.newest(now)
    }

    /// How droplets fetch `version`, once it is known to be what it must be.
    fn reference(&self, version: &Version, now: Timestamp) -> Result<ReleaseRef, NoRelease> {
        let file = archive_name(version, TARGET);
        let sha256 = match &self.trust {
            Trust::Signed(keys) => {
                let manifest = self.manifest_of(version, keys, now)?;
                manifest.installable(TARGET, now).map_err(refused(&manifest_path(version)))?.sha256.to_string()
            }
            Trust::Unsigned => {
                let path = self.file(&version.to_string(), &file).ok_or_else(|| NoRelease::Missing(file.clone()))?;
                self.digest(&path).map_err(unreadable(&file))?
            }
        };
        let base = self.url.trim_end_matches('/');
        Ok(ReleaseRef { url: format!("{base}/{version}/{file}"), version: version.to_string(), sha256 })
    }

    fn manifest_of(&self, version: &Version, keys: &PublicKeys, now: Timestamp) -> Result<Manifest, NoRelease> {
        let path = manifest_path(version);
        let manifest = self.opened(&path, keys)?.ok_or_else(|| NoRelease::Missing(path.clone()))?;
        if manifest.version != *version {
            let refusal = Refusal::OtherVersion { wanted: version.clone(), found: manifest.version };
            return Err(NoRelease::Refused { file: path, refusal });
        }
        self.check(&manifest, &path, now)?;
        Ok(manifest)
    }

    /// A channel's manifest; none where the channel has none.
    fn channel(&self, channel: Channel, keys: &PublicKeys) -> Result<Option<Manifest>, NoRelease> {
        let path = channel_path(channel);
        let Some(manifest) = self.opened(&path, keys)? else { return Ok(None) };
        if manifest.channel != channel {
            let refusal = Refusal::OtherChannel { wanted: channel, found: manifest.channel };
            return Err(NoRelease::Refused { file: path, refusal });
        }
        Ok(Some(manifest))
    }

    /// The signed manifest at `path`; none where there is no such file.
    fn opened(&self, path: &str, keys: &PublicKeys) -> Result<Option<Manifest>, NoRelease> {
        let Some(file) = path.split_once('/').and_then(|(folder, file)| self.file(folder, file)) else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        let opened = std::fs::File::open(file).map_err(unreadable(path))?;
        // One byte more than may be, so that what is too long is seen to be.
        opened.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable(path))?;
        Envelope::open(&bytes, keys).map(Some).map_err(refused(path))
    }

    /// Whether a signed manifest is in force, and its archive the one it was signed for.
    fn check(&self, manifest: &Manifest, path: &str, now: Timestamp) -> Result<(), NoRelease> {
        let artifact = manifest.installable(TARGET, now).map_err(refused(path))?;
        let archive = self.file(&manifest.version.to_string(), &artifact.file);
        let archive = archive.ok_or_else(|| NoRelease::Missing(artifact.file.clone()))?;
        let altered = |what| NoRelease::Altered { file: artifact.file.clone(), what };
        if archive.metadata().map_err(unreadable(&artifact.file))?.len() != artifact.size {
            return Err(altered("size"));
        }
        if self.digest(&archive).map_err(unreadable(&artifact.file))? != artifact.sha256.to_string() {
            return Err(altered("SHA-256"));
        }
        Ok(())
    }

    fn newest(&self, now: Timestamp) -> Result<ReleaseRef, NoRelease> {
        let entries = std::fs::read_dir(&self.folder).map_err(NoRelease::Folder)?;
        let mut versions: Vec<Version> = entries
            .filter_map(|entry| Version::parse(entry.ok()?.file_name().to_str()?).ok())
            .filter(|version| self.file(&version.to_string(), &archive_name(version, TARGET)).is_some())
            .collect();
        versions.sort_unstable_by(|one, other| other.cmp(one));
        let mut first = None;
        for version in versions {
            match self.reference(&version, now) {
                Ok(release) => return Ok(release),
                Err(error) => {
                    tracing::debug!(%version, error = %error, "passed over");
                    first.get_or_insert(error);
                }
            }
        }
        // Why the newest can't be used says more than that none can.
        Err(first.unwrap_or_else(|| NoRelease::Missing("release".to_owned())))
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

fn unreadable(file: &str) -> impl FnOnce(std::io::Error) -> NoRelease {
    move |source| NoRelease::Unreadable { file: file.to_owned(), source }
}

fn refused(file: &str) -> impl FnOnce(Refusal) -> NoRelease {
    move |refusal| NoRelease::Refused { file: file.to_owned(), refusal }
}

/// A name that is one path component and nothing hidden.
fn plain(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'+'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(version: &str) -> String {
        archive_name(&version.parse().unwrap(), TARGET)
    }

    fn releases(folder: &Path, pinned: Option<&str>) -> Releases {
        let pinned = pinned.map(|version| version.parse().unwrap());
        Releases::new(folder.to_owned(), Trust::Unsigned, pinned, "http://p:1/releases/".to_owned())
    }

    fn find(releases: &Releases) -> Result<ReleaseRef, NoRelease> {
        releases.find(Timestamp::now())
    }

    fn release(folder: &Path, version: &str, content: &str) {
        std::fs::create_dir_all(folder.join(version)).unwrap();
        std::fs::write(folder.join(version).join(archive(version)), content).unwrap();
    }

    #[test]
    fn the_newest_version_is_the_highest_number_not_the_last_word() {
        let folder = tempfile::tempdir().unwrap();
        for version in ["0.9.0", "0.10.0", "0.10.0-rc.2", "0.11.0-rc.1", "0.11.0-rc.10"] {
            release(folder.path(), version, version);
        }
        std::fs::create_dir(folder.path().join("latest")).unwrap();
        // A version without its archive is not a release yet.
        std::fs::create_dir(folder.path().join("9.0.0")).unwrap();
        let releases = releases(folder.path(), None);
        let found = find(&releases).unwrap();
        assert_eq!(found.version, "0.11.0-rc.10");
        assert_eq!(found.url, "http://p:1/releases/0.11.0-rc.10/dtma-agent-0.11.0-rc.10-x86_64-linux-gnu.tar.gz");
        release(folder.path(), "0.11.0", "x");
        assert_eq!(find(&releases).unwrap().version, "0.11.0");
    }

    #[test]
    fn the_digest_follows_the_file() {
        let folder = tempfile::tempdir().unwrap();
        release(folder.path(), "1.0.0", "abc");
        let releases = releases(folder.path(), Some("1.0.0"));
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(find(&releases).unwrap().sha256, abc);
        release(folder.path(), "1.0.0", "longer");
        assert_ne!(find(&releases).unwrap().sha256, abc);
    }

    #[test]
    fn no_name_leads_out_of_the_folder() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("releases");
        release(&folder, "1.0.0", "abc");
        std::fs::write(outer.path().join("secret"), "s").unwrap();
        std::os::unix::fs::symlink(outer.path().join("secret"), folder.join("1.0.0/link")).unwrap();
        std::os::unix::fs::symlink(outer.path(), folder.join("2.0.0")).unwrap();
        std::fs::create_dir(folder.join("channels")).unwrap();
        std::fs::write(folder.join("channels/other.json"), "{}").unwrap();
        let releases = releases(&folder, None);
        assert!(releases.file("1.0.0", &archive("1.0.0")).is_some());
        for (version, file) in [
            ("1.0.0", "../../secret"),
            ("..", "secret"),
            ("1.0.0", "link"),
            ("2.0.0", "secret"),
            ("1.0.0", ""),
            ("", "1.0.0"),
            ("channels", "other.json"),
            ("channels", "stable.json"),
        ] {
            assert_eq!(releases.file(version, file), None, "{version}/{file}");
        }
    }

    #[test]
    fn an_absent_release_says_what_is_absent() {
        let folder = tempfile::tempdir().unwrap();
        let none = find(&releases(folder.path(), None)).unwrap_err();
        assert_eq!(none.to_string(), "RELEASES_DIR holds no release");
        let pinned = releases(folder.path(), Some("3.0.0"));
        assert!(find(&pinned).unwrap_err().to_string().contains("dtma-agent-3.0.0"));
    }
}
