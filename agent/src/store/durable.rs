//! Files that are either the old version or the new one, whatever happens while they are written.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

/// Replaces `path` with `contents`, readable by the owner only. On return the file and its name are on the disk.
///
/// # Errors
/// Whatever the file system says; the old file is then still there, whole.
pub fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    replace_with_mode(path, contents, 0o600)
}

/// The same, for a file with other permissions.
///
/// # Errors
/// As [`replace`].
pub fn replace_with_mode(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let directory = path.parent().ok_or_else(|| io::Error::other("the path has no parent directory"))?;
    let mut name = path.file_name().ok_or_else(|| io::Error::other("the path has no file name"))?.to_owned();
    name.push(".new");
    let draft = directory.join(name);
    // A draft left by a process that died is worthless, and its mode may be anything.
    if let Err(error) = std::fs::remove_file(&draft)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let written = write(&draft, contents, mode).and_then(|()| std::fs::rename(&draft, path));
    if let Err(error) = written {
        // On a full disk half a draft takes the room that others need. That it is there is no worse than before, should this fail too.
        let _ = std::fs::remove_file(&draft);
        return Err(error);
    }
    File::open(directory)?.sync_all()
}

fn write(draft: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(draft)?;
    // Whatever the process's mask takes away.
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(contents)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_is_private_and_a_stale_draft_does_not_matter() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(directory.path().join("file.new"), "half a dra").unwrap();
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_the_old_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        replace(&path, b"one").unwrap();
        // A directory in the draft's place can't be removed as a file.
        std::fs::create_dir(directory.path().join("file.new")).unwrap();
        assert!(replace(&path, b"two").is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
    }
}
