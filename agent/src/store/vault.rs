//! The vault: the values of instances' secrets, in a file system in memory, and what is known of them.
//!
//! - **Where.** `{DTMA_SECRETS_DIR}/{scope}/{deployment}/files/{NAME}`, by default under `/run/dtma`, which systemd makes for the agent and
//!   keeps while the agent is restarted or replaced (`RuntimeDirectoryPreserve=`): running containers have the folder mounted, and a folder
//!   made anew in its place would be another one. A reboot empties it. Folders are those of a *version* of an instance (one accepted
//!   deploy or update), so that the old one keeps its values until the new one has shown that it works.
//! - **In memory.** The file system is asked what it is; on anything but tmpfs or ramfs nothing is written, unless the operator allows it.
//! - **Who reads.** The folder of all is the agent's alone, so nobody else on the host gets further. Below it, files are readable for
//!   everybody, because the user of a container's process can be any; a container gets its own folder only, read-only, by Docker's mount.
//! - **How they change.** A file is replaced by renaming within its folder, so whoever opens it reads the old value or the new one.
//! - **What isn't here.** No digest, no length, no copy of a value anywhere else. `fetched.json` beside `files` holds names and times.

use std::collections::{BTreeSet, HashSet};
use std::fs::{DirBuilder, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::instance::{DeploymentId, SecretName, SecretValues};

/// `f_type` of file systems that are in memory: `TMPFS_MAGIC` and `RAMFS_MAGIC` of statfs(2).
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// The folder of all secrets of one agent. Cheap to clone. All of it blocks, but only on memory.
#[derive(Debug, Clone)]
pub struct Vault(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    on_disk: bool,
    /// Whose folders are there, once that has been looked up.
    kept: Mutex<Option<HashSet<DeploymentId>>>,
}

/// What is there for one version of an instance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held {
    /// What the secrets are called.
    pub names: BTreeSet<SecretName>,
    /// Those that were fetched.
    pub fetched: Option<Fetched>,
}

/// When secrets were fetched, and which.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    /// When.
    pub at: Timestamp,
    /// When the first of them is of no use any more.
    pub expires_at: Option<Timestamp>,
    /// Which.
    pub names: BTreeSet<SecretName>,
}

/// What writing changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// The folder wasn't there before.
    pub made: bool,
    /// A value is another than before, or there are others.
    pub changed: bool,
}

/// Why secrets can't be kept.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// They would be on a disk.
    #[error(
        "secrets are kept in memory only, and {path} is not: mount a tmpfs there, set DTMA_SECRETS_DIR to a folder on one, or \
         DTMA_SECRETS_ON_DISK=allow"
    )]
    NotInMemory {
        /// The folder.
        path: PathBuf,
    },
    /// Others may look into it.
    #[error("the folder for secrets {path} must be the agent's alone: chown it to the agent's user and chmod 700 it")]
    NotPrivate {
        /// The folder.
        path: PathBuf,
    },
    /// The system won't.
    #[error("{path} could not be {operation}; DTMA_SECRETS_DIR has to be a folder the agent may write to")]
    Io {
        /// What was to be done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: io::Error,
    },
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VaultError {
    move |source| VaultError::Io { operation, path: path.to_owned(), source }
}

impl Vault {
    /// The vault of the agent with this scope below `folder`. Nothing is looked at or made before there is a secret. `on_disk`: never mind
    /// that it isn't in memory.
    pub fn new(folder: &Path, scope: &str, on_disk: bool) -> Self {
        Self(Arc::new(Inner { root: folder.join(scope), on_disk, kept: Mutex::new(None) }))
    }

    /// What is mounted into the containers of one version.
    pub fn folder(&self, deployment: &DeploymentId) -> PathBuf {
        self.place(deployment).join("files")
    }

    fn place(&self, deployment: &DeploymentId) -> PathBuf {
        self.0.root.join(deployment.0.to_string())
    }

    /// Sees that secrets can be kept here.
    ///
    /// # Errors
    /// See [`VaultError`]; nothing has been written then.
    pub fn open(&self) -> Result<(), VaultError> {
        let root = &self.0.root;
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(failed("created", root))?;
        let about = std::fs::metadata(root).map_err(failed("read", root))?;
        if about.uid() != rustix::process::geteuid().as_raw() || about.mode() & 0o077 != 0 {
            return Err(VaultError::NotPrivate { path: root.clone() });
        }
        let system = rustix::fs::statfs(root).map_err(|error| failed("read", root)(error.into()))?;
        let kind = u64::try_from(system.f_type).unwrap_or_default();
        if !self.0.on_disk && !IN_MEMORY.contains(&kind) {
            return Err(VaultError::NotInMemory { path: root.clone() });
        }
        Ok(())
    }

    /// Keeps secrets that a deploy brought, beside those that are there.
    ///
    /// # Errors
    /// See [`VaultError`].
    pub fn give(&self, deployment: &DeploymentId, values: &SecretValues) -> Result<Written, VaultError> {
        let mut written = self.make(deployment)?;
        written.changed |= self.write_all(deployment, values, |_| true)?;
        Ok(written)
    }

    /// Keeps secrets that were fetched, in place of those fetched before. Those that came with the deploy, which are called `given`, stay.
    ///
    /// # Errors
    /// See [`VaultError`].
    pub fn give_fetched(
        &self,
        deployment: &DeploymentId,
        given: &BTreeSet<SecretName>,
        values: &SecretValues,
        at: Timestamp,
        expires_at: Option<Timestamp>,
    ) -> Result<Written, VaultError> {
        let mut written = self.make(deployment)?;
        let before = self.held(deployment)?.and_then(|held| held.fetched);
        written.changed |= self.write_all(deployment, values, |name| !given.contains(name))?;
        let names: BTreeSet<SecretName> = values.0.keys().filter(|name| !given.contains(*name)).cloned().collect();
        let gone = before.into_iter().flat_map(|fetched| fetched.names).filter(|name| !names.contains(name));
        for name in gone.filter(|name| !given.contains(name)) {
            let path = self.folder(deployment).join(name.as_str());
            written.changed |= removed(std::fs::remove_file(&path)).map_err(failed("removed", &path))?;
        }
        // After the values: that something was fetched is only said when it is there.
        let note = self.place(deployment).join("fetched.json");
        let fetched = Fetched { at, expires_at, names };
        let text = serde_json::to_vec(&fetched).map_err(|error| failed("written", &note)(error.into()))?;
        replace(&note, &text, 0o600).map_err(failed("written", &note))?;
        Ok(written)
    }

    /// What is there for one version; none where nothing ever was, or a reboot has emptied it.
    ///
    /// # Errors
    /// When the system won't say.
    pub fn held(&self, deployment: &DeploymentId) -> Result<Option<Held>, VaultError> {
        let folder = self.folder(deployment);
        let listed = match std::fs::read_dir(&folder) {
            Ok(listed) => listed,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", &folder)(error)),
        };
        let mut held = Held::default();
        for entry in listed {
            let entry = entry.map_err(failed("read", &folder))?;
            // A draft left by a death begins with a dot, which no name does.
            held.names.extend(entry.file_name().to_str().and_then(|name| name.parse().ok()));
        }
        // A note that can't be read is as good as none: what it is about is fetched again.
        let note = std::fs::read(self.place(deployment).join("fetched.json")).ok();
        held.fetched = note.and_then(|text| serde_json::from_slice(&text).ok());
        Ok(Some(held))
    }

    /// Removes the secrets of every version that isn't `wanted`.
    ///
    /// # Errors
    /// When the system won't; what is left is tried again the next time.
    pub fn keep(&self, wanted: impl Fn(&DeploymentId) -> bool) -> Result<(), VaultError> {
        let mut kept = self.kept()?;
        let Some(known) = kept.as_mut() else { return Ok(()) };
        let unwanted: Vec<DeploymentId> = known.iter().filter(|deployment| !wanted(deployment)).copied().collect();
        for deployment in unwanted {
            let place = self.place(&deployment);
            removed(std::fs::remove_dir_all(&place)).map_err(failed("removed", &place))?;
            known.remove(&deployment);
        }
        Ok(())
    }

    /// Whose folders are there. Looked up once: nobody else makes or removes them.
    fn kept(&self) -> Result<std::sync::MutexGuard<'_, Option<HashSet<DeploymentId>>>, VaultError> {
        let mut kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.is_none() {
            let root = &self.0.root;
            let listed = match std::fs::read_dir(root) {
                Ok(listed) => listed.collect::<Result<Vec<_>, _>>().map_err(failed("read", root))?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
                Err(error) => return Err(failed("read", root)(error)),
            };
            let ids = listed.iter().filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(DeploymentId));
            *kept = Some(ids.collect());
        }
        Ok(kept)
    }

    fn make(&self, deployment: &DeploymentId) -> Result<Written, VaultError> {
        self.open()?;
        if let Some(kept) = self.kept()?.as_mut() {
            kept.insert(*deployment);
        }
        let (place, folder) = (self.place(deployment), self.folder(deployment));
        let made = !folder.is_dir();
        if made {
            DirBuilder::new().recursive(true).mode(0o700).create(&place).map_err(failed("created", &place))?;
            DirBuilder::new().recursive(true).create(&folder).map_err(failed("created", &folder))?;
        }
        // Whoever a container's process is; whatever the agent's own umask, and also when it died before it came to this.
        std::fs::set_permissions(&folder, Permissions::from_mode(0o755)).map_err(failed("opened", &folder))?;
        Ok(Written { made, changed: made })
    }

    fn write_all(
        &self,
        deployment: &DeploymentId,
        values: &SecretValues,
        which: impl Fn(&SecretName) -> bool,
    ) -> Result<bool, VaultError> {
        let folder = self.folder(deployment);
        let mut changed = false;
        for name in values.0.keys().filter(|name| which(name)) {
            let path = folder.join(name.as_str());
            let value = values.expose(name).unwrap_or_default().as_bytes();
            if std::fs::read(&path).is_ok_and(|before| before == value) {
                continue;
            }
            replace(&path, value, 0o444).map_err(failed("written", &path))?;
            changed = true;
        }
        Ok(changed)
    }
}

/// Whether something was removed; that it was gone already is no failure.
fn removed(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Unlike [`super::durable::replace`] without waiting for a disk: there is none.
fn replace(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let folder = path.parent().ok_or_else(|| io::Error::other("the path has no parent directory"))?;
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().ok_or_else(|| io::Error::other("the path has no file name"))?);
    let draft = folder.join(name);
    removed(std::fs::remove_file(&draft))?;
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
        file.write_all(contents)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        std::fs::rename(&draft, path)
    };
    write().inspect_err(|_| drop(std::fs::remove_file(&draft)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: DeploymentId = DeploymentId(uuid::Uuid::from_u128(1));
    const TWO: DeploymentId = DeploymentId(uuid::Uuid::from_u128(2));

    fn values(all: &[(&str, &str)]) -> SecretValues {
        SecretValues(all.iter().map(|(name, value)| (name.parse().unwrap(), (*value).to_owned().into())).collect())
    }

    fn names(all: &[&str]) -> BTreeSet<SecretName> {
        all.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn read(vault: &Vault, name: &str) -> String {
        std::fs::read_to_string(vault.folder(&ONE).join(name)).unwrap()
    }

    #[test]
    fn a_value_is_replaced_in_the_folder_that_is_mounted() {
        let directory = tempfile::tempdir().unwrap();
        let vault = Vault::new(directory.path(), "main", true);
        assert_eq!(vault.held(&ONE).unwrap(), None);
        assert_eq!(
            vault.give(&ONE, &values(&[("A", "1"), ("B", "2")])).unwrap(),
            Written { made: true, changed: true }
        );
        let folder = std::fs::metadata(vault.folder(&ONE)).unwrap();
        assert_eq!(vault.give(&ONE, &values(&[("A", "1")])).unwrap(), Written::default());
        assert_eq!(vault.give(&ONE, &values(&[("A", "3")])).unwrap(), Written { made: false, changed: true });
        assert_eq!((read(&vault, "A"), read(&vault, "B")), ("3".into(), "2".into()));
        let again = std::fs::metadata(vault.folder(&ONE)).unwrap();
        assert_eq!(folder.ino(), again.ino(), "a mount would show the old one");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&vault.folder(&ONE)), 0o755);
        assert_eq!(mode(&vault.folder(&ONE).join("A")), 0o444);
        assert_eq!(mode(&directory.path().join("main")), 0o700, "and nobody else on the host gets there");
    }

    #[test]
    fn what_is_fetched_replaces_what_was_fetched_and_leaves_what_was_given() {
        let directory = tempfile::tempdir().unwrap();
        let vault = Vault::new(directory.path(), "main", true);
        vault.give(&ONE, &values(&[("GIVEN", "1")])).unwrap();
        let fetch = |all: &[(&str, &str)]| {
            vault.give_fetched(&ONE, &names(&["GIVEN"]), &values(all), Timestamp::UNIX_EPOCH, None).unwrap()
        };
        assert!(fetch(&[("A", "1"), ("B", "1"), ("GIVEN", "not this")]).changed);
        assert!(fetch(&[("B", "1")]).changed, "A is gone");
        assert!(!fetch(&[("B", "1")]).changed);
        // Another process finds the same.
        let held = Vault::new(directory.path(), "main", true).held(&ONE).unwrap().unwrap();
        assert_eq!(held.names, names(&["B", "GIVEN"]));
        assert_eq!(held.fetched.unwrap().names, names(&["B"]));
        assert_eq!(read(&vault, "GIVEN"), "1");
        let note = std::fs::read_to_string(directory.path().join(format!("main/{}/fetched.json", ONE.0))).unwrap();
        assert!(note.contains("\"B\"") && !note.contains("not this"), "{note}");
    }

    #[test]
    fn only_what_is_wanted_is_kept_also_of_what_an_earlier_process_left() {
        let directory = tempfile::tempdir().unwrap();
        let vault = || Vault::new(directory.path(), "main", true);
        for deployment in [&ONE, &TWO] {
            vault().give(deployment, &values(&[("A", "1")])).unwrap();
        }
        let later = vault();
        later.keep(|deployment| *deployment == TWO).unwrap();
        assert_eq!((later.held(&ONE).unwrap().is_some(), later.held(&TWO).unwrap().is_some()), (false, true));
        later.keep(|_| false).unwrap();
        assert_eq!(std::fs::read_dir(directory.path().join("main")).unwrap().count(), 0);
    }

    #[test]
    fn nothing_is_written_to_a_disk_or_where_others_can_look() {
        // Sources are on a disk, wherever temporary files are.
        let on_disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let vault = Vault::new(on_disk.path(), "main", false);
        let refused = vault.give(&ONE, &values(&[("A", "hunter2")]));
        assert!(matches!(refused, Err(VaultError::NotInMemory { .. })), "{refused:?}");
        assert!(refused.unwrap_err().to_string().contains("DTMA_SECRETS_ON_DISK"));
        assert_eq!(vault.held(&ONE).unwrap(), None);

        let open = Vault::new(on_disk.path(), "open", true);
        std::fs::create_dir(on_disk.path().join("open")).unwrap();
        std::fs::set_permissions(on_disk.path().join("open"), Permissions::from_mode(0o755)).unwrap();
        let refused = open.give(&ONE, &values(&[("A", "hunter2")]));
        assert!(matches!(refused, Err(VaultError::NotPrivate { .. })), "{refused:?}");
    }

    #[test]
    fn memory_is_known_as_such() {
        let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
            eprintln!("skipped: there is no /dev/shm");
            return;
        };
        Vault::new(directory.path(), "main", false).give(&ONE, &values(&[("A", "1")])).unwrap();
    }
}
