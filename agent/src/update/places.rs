//! Where versions and the updater's memory lie, and the few changes that are made there, each of which happens or doesn't.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

use dtma_release::Version;
use rustix::fs::{FlockOperation, OFlags, flock};

/// Everything the updater reads and writes.
#[derive(Debug, Clone)]
pub struct Places {
    /// Programs and links: `/opt/dtma`, root's.
    pub prefix: PathBuf,
    /// The updater's memory: `/var/lib/dtma-update`, root's, readable by everybody.
    pub memory: PathBuf,
    /// The agent's state: `/var/lib/dtma`, where its requests lie.
    pub agent_state: PathBuf,
    /// The agent's runtime folder: `/run/dtma`, where its vitals lie.
    pub agent_run: PathBuf,
    /// Lets a test end the process, so to speak, before any one change.
    #[cfg(test)]
    pub(super) fuse: Fuse,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            prefix: "/opt/dtma".into(),
            memory: "/var/lib/dtma-update".into(),
            agent_state: "/var/lib/dtma".into(),
            agent_run: "/run/dtma".into(),
            #[cfg(test)]
            fuse: Fuse::default(),
        }
    }
}

/// Blows once after a number of changes.
#[cfg(test)]
#[derive(Debug, Clone, Default)]
pub(super) struct Fuse(std::rc::Rc<std::cell::Cell<Option<usize>>>, std::rc::Rc<std::cell::Cell<bool>>);

#[cfg(test)]
impl Fuse {
    /// So many changes happen, and then no more.
    pub(super) fn set(&self, changes: Option<usize>) {
        self.0.set(changes);
    }

    /// No file can be written any more; links can.
    pub(super) fn fill_disk(&self, full: bool) {
        self.1.set(full);
    }

    fn burn(&self) -> io::Result<()> {
        match self.0.get() {
            None => Ok(()),
            Some(0) => Err(io::Error::other("killed")),
            Some(left) => {
                self.0.set(Some(left - 1));
                Ok(())
            }
        }
    }
}

/// A link that names a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Link {
    /// What systemd starts.
    Current,
    /// What has proved itself.
    Good,
    /// What was good before.
    Previous,
}

impl Link {
    fn name(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Good => "good",
            Self::Previous => "previous",
        }
    }
}

/// While this exists nobody else updates this droplet. The kernel lets go of it however the process ends.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Places {
    /// Takes the lock; none when another updater has it.
    pub(super) fn lock(&self) -> io::Result<Option<Lock>> {
        DirBuilder::new().recursive(true).mode(0o755).create(&self.memory)?;
        let path = self.memory.join("lock");
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
        // Whoever may open it may hold it.
        file.set_permissions(Permissions::from_mode(0o600))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The updater's memory as a file.
    pub fn memory_file(&self) -> PathBuf {
        self.memory.join("state.json")
    }

    /// The agent's request as a file.
    pub fn request_file(&self) -> PathBuf {
        self.agent_state.join("update-request.json")
    }

    /// The agent's vitals as a file.
    pub fn vitals_file(&self) -> PathBuf {
        self.agent_run.join("vitals.json")
    }

    /// The last vitals of an agent that ended in order.
    pub fn last_word_file(&self) -> PathBuf {
        self.agent_run.join("last-word.json")
    }

    /// What a person wants of the updater, as a file.
    pub(super) fn order_file(&self) -> PathBuf {
        self.memory.join("order.json")
    }

    /// Where a version lies.
    pub(super) fn version_folder(&self, version: &Version) -> PathBuf {
        self.prefix.join("versions").join(version.to_string())
    }

    /// Where a release is fetched to and unpacked. Nothing in it has been believed yet.
    pub(super) fn staging(&self) -> PathBuf {
        self.prefix.join("versions/.unverified")
    }

    /// The version a link names; none when there is no such link.
    pub(super) fn read(&self, link: Link) -> io::Result<Option<Version>> {
        let path = self.prefix.join(link.name());
        let target = match std::fs::read_link(&path) {
            Ok(target) => target,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let odd = || {
            io::Error::other(format!("{} leads to {}, which is no version's folder", path.display(), target.display()))
        };
        let Some(Component::Normal(name)) = target.components().next_back() else { return Err(odd()) };
        name.to_str().and_then(|name| Version::parse(name).ok()).map(Some).ok_or_else(odd)
    }

    /// Makes a link name a version, in one step.
    pub(super) fn point(&self, link: Link, version: &Version) -> io::Result<()> {
        self.change()?;
        let draft = self.prefix.join(format!("{}.new", link.name()));
        remove_if_there(&draft)?;
        std::os::unix::fs::symlink(Path::new("versions").join(version.to_string()), &draft)?;
        std::fs::rename(&draft, self.prefix.join(link.name()))?;
        sync(&self.prefix)
    }

    /// Gives what was staged its place. What was there, and is in no use, goes.
    pub(super) fn adopt(&self, unpacked: &Path, version: &Version) -> io::Result<()> {
        self.change()?;
        let folder = self.version_folder(version);
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::rename(unpacked, &folder)?;
        sync(&self.prefix.join("versions"))
    }

    /// Removes the versions that no link names, and whatever was staged.
    pub(super) fn tidy(&self) -> io::Result<()> {
        self.change()?;
        let mut used = Vec::new();
        for link in [Link::Current, Link::Good, Link::Previous] {
            used.extend(self.read(link)?);
        }
        for entry in std::fs::read_dir(self.prefix.join("versions"))? {
            let entry = entry?;
            let version = entry.file_name().to_str().and_then(|name| Version::parse(name).ok());
            if version.is_none_or(|version| !used.contains(&version)) && entry.file_type()?.is_dir() {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }

    /// An empty folder to stage in.
    pub(super) fn clear_staging(&self) -> io::Result<PathBuf> {
        let staging = self.staging();
        if staging.exists() {
            std::fs::remove_dir_all(&staging)?;
        }
        DirBuilder::new().mode(0o755).recursive(true).create(&staging)?;
        Ok(staging)
    }

    /// Called before a file is written.
    #[cfg_attr(not(test), allow(clippy::unused_self, clippy::unnecessary_wraps))]
    pub(super) fn write(&self) -> io::Result<()> {
        #[cfg(test)]
        if self.fuse.1.get() {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.change()
    }

    /// Called before every change that has to survive.
    #[cfg_attr(not(test), allow(clippy::unused_self, clippy::unnecessary_wraps))]
    pub(super) fn change(&self) -> io::Result<()> {
        #[cfg(test)]
        self.fuse.burn()?;
        Ok(())
    }
}

/// Opens a file in a folder that belongs to the agent's user, for root: through no link, and without waiting for a pipe's other end.
pub(super) fn open_of_the_agents(path: &Path) -> io::Result<File> {
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits()).map_err(io::Error::other)?;
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// Removes a file that need not be there.
pub(super) fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Brings a folder's or a file's contents to the disk.
pub(super) fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
