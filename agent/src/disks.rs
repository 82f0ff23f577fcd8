//! How much room is left where the agent and Docker write, and how much of it is never to be used up.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// What a part of a large disk comes to at most: more room than that is room, however large the disk is.
const MOST_BY_PERCENT: u64 = 4 * 1024 * 1024 * 1024;

/// How much is kept free: the larger of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserve {
    /// Bytes.
    pub bytes: u64,
    /// Of the whole file system; 4 GiB at most.
    pub percent: u8,
}

impl Default for Reserve {
    fn default() -> Self {
        Self { bytes: 512 * 1024 * 1024, percent: 5 }
    }
}

impl Reserve {
    /// Bytes to be kept free of so many.
    fn of(self, total: u64) -> u64 {
        self.bytes.max((total / 100 * u64::from(self.percent)).min(MOST_BY_PERCENT))
    }
}

/// One file system at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// A folder on it.
    pub folder: PathBuf,
    /// Its size, bytes.
    pub total: u64,
    /// Free to an unprivileged process, bytes.
    pub free: u64,
    /// To be kept free, bytes.
    pub reserve: u64,
}

impl Room {
    /// Less is free than should be.
    pub fn is_short(&self) -> bool {
        self.free < self.reserve
    }
}

/// With figures, for a person.
impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mebibytes = |bytes: u64| bytes / (1024 * 1024);
        write!(
            f,
            "{} MiB of {} MiB are free on the disk of {}, and {} MiB are to be kept free",
            mebibytes(self.free),
            mebibytes(self.total),
            self.folder.display(),
            mebibytes(self.reserve)
        )
    }
}

/// Total and free bytes of the file system a folder is on; nothing when that can't be told.
type Measure = dyn Fn(&Path) -> Option<(u64, u64)> + Send + Sync;

/// The disks that matter: the one with the agent's state, and the one with Docker's images and volumes, which may be the same.
pub struct Disks {
    state_dir: PathBuf,
    /// Known once Docker has answered.
    data_root: Mutex<Option<PathBuf>>,
    reserve: Reserve,
    measure: Box<Measure>,
}

impl fmt::Debug for Disks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disks")
            .field("state_dir", &self.state_dir)
            .field("reserve", &self.reserve)
            .finish_non_exhaustive()
    }
}

impl Disks {
    /// The disk of `state_dir`; Docker's is learned later.
    pub fn new(state_dir: &Path, reserve: Reserve) -> Self {
        Self::measured_by(state_dir, reserve, |folder| {
            let told = rustix::fs::statvfs(folder).ok()?;
            Some((told.f_blocks.saturating_mul(told.f_frsize), told.f_bavail.saturating_mul(told.f_frsize)))
        })
    }

    /// The same with another measure than the system's: total and free bytes of the file system a folder is on.
    pub fn measured_by(
        state_dir: &Path,
        reserve: Reserve,
        measure: impl Fn(&Path) -> Option<(u64, u64)> + Send + Sync + 'static,
    ) -> Self {
        Self { state_dir: state_dir.to_owned(), data_root: Mutex::new(None), reserve, measure: Box::new(measure) }
    }

    /// Where the agent's state is.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Where Docker's data is, once that is known.
    pub fn data_root(&self) -> Option<PathBuf> {
        self.data_root.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Docker has told where its data is.
    pub fn learn_data_root(&self, folder: PathBuf) {
        *self.data_root.lock().unwrap_or_else(PoisonError::into_inner) = Some(folder);
    }

    /// The agent's disk, and Docker's. A folder that can't be looked at is left out: that it isn't known how full a disk is must not keep
    /// anybody from using it. Costs a system call for each.
    pub fn rooms(&self) -> Vec<Room> {
        let folders = [Some(self.state_dir.clone()), self.data_root()];
        let measured = folders.into_iter().flatten().filter_map(|folder| {
            let (total, free) = (self.measure)(&folder)?;
            Some(Room { folder, total, free, reserve: self.reserve.of(total) })
        });
        measured.collect()
    }

    /// A disk with less free than should be.
    pub fn short(&self) -> Option<Room> {
        self.rooms().into_iter().find(Room::is_short)
    }

    /// Docker's disk, where it is known.
    pub fn docker_room(&self) -> Option<Room> {
        let folder = self.data_root()?;
        self.rooms().into_iter().find(|room| room.folder == folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1024 * 1024 * 1024;

    #[test]
    fn the_larger_of_both_reserves_counts() {
        let reserve = Reserve::default();
        assert_eq!(reserve.of(4 * GIB), GIB / 2);
        assert_eq!(reserve.of(60 * GIB).div_ceil(GIB), 3);
        assert_eq!(reserve.of(1000 * GIB), 4 * GIB);
        assert_eq!(Reserve { bytes: 50 * GIB, percent: 5 }.of(1000 * GIB), 50 * GIB);
        assert_eq!(Reserve { bytes: 0, percent: 0 }.of(GIB), 0);
    }

    #[test]
    fn a_disk_is_short_when_less_than_the_reserve_is_free_and_says_so_with_figures() {
        let measure = |folder: &Path| match folder.to_str() {
            Some("/state") => Some((25 * GIB, 20 * GIB)),
            Some("/docker") => Some((25 * GIB, GIB)),
            _ => None,
        };
        let disks = Disks::measured_by(Path::new("/state"), Reserve::default(), measure);
        assert_eq!(disks.short(), None);
        disks.learn_data_root("/docker".into());
        let told = disks.short().unwrap().to_string();
        assert_eq!(told, "1024 MiB of 25600 MiB are free on the disk of /docker, and 1280 MiB are to be kept free");
        disks.learn_data_root("/elsewhere".into());
        assert_eq!((disks.rooms().len(), disks.docker_room()), (1, None), "what can't be looked at is left out");
    }

    #[test]
    fn the_systems_own_figures_make_sense() {
        let directory = tempfile::tempdir().unwrap();
        let disks = Disks::new(directory.path(), Reserve { bytes: 0, percent: 0 });
        let room = disks.rooms().remove(0);
        assert!(room.total > 0 && room.free <= room.total && !room.is_short(), "{room:?}");
    }
}
