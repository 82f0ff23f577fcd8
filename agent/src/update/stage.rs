//! From an archive somebody sent to a version that can be put on trial. Everything about it is checked before it gets its place.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use dtma_release::{Artifact, Digest, Manifest, PublicKeys, Version};
use self_update::{ArchiveKind, Compression, Extract};
use sha2::{Digest as _, Sha256};

use super::host::{Host, Unrunnable};
use super::places::sync;

/// Every file of a release, and whether it is a program. One that a later version adds is no fault; one that is missing is.
const FILES: [(&str, bool); 11] = [
    ("VERSION", false),
    ("dtma-agent", true),
    ("dtma-agent.service", false),
    ("dtma-update.service", false),
    ("dtma-update.path", false),
    ("dtma-update.timer", false),
    ("dtma-update-undo.service", false),
    ("metadata-guard", true),
    ("dtma-metadata-guard.service", false),
    ("dtma.conf.example", false),
    ("install.sh", true),
];

/// Their names.
#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    FILES.iter().map(|(name, _)| *name)
}

/// More files than this are no release.
const MAX_FILES: usize = 100;

/// Why an archive isn't a version.
#[derive(Debug, thiserror::Error)]
pub(super) enum StageError {
    /// It is shorter than announced. (Longer isn't fetched.)
    #[error("the archive has {found} bytes where its manifest says {announced}")]
    Length {
        /// What came.
        found: u64,
        /// What was to come.
        announced: u64,
    },
    /// Other bytes.
    #[error("the archive has SHA-256 {found} where its manifest says {announced}")]
    Digest {
        /// What came.
        found: Digest,
        /// What was to come.
        announced: Digest,
    },
    /// The archive's own signature.
    #[error("the archive is signed by none of the keys this agent trusts")]
    Signature(#[source] Box<self_update::Error>),
    /// It can't be unpacked.
    #[error("the archive can't be unpacked")]
    Unpack(#[source] Box<self_update::Error>),
    /// Its contents aren't a release.
    #[error("the archive is no release: {why}")]
    Contents {
        /// Why.
        why: String,
    },
    /// It is the program of another version.
    #[error("the program in it says it is '{says}' where '{expected}' was announced")]
    OtherProgram {
        /// What it says.
        says: String,
        /// What it should say.
        expected: String,
    },
    /// It isn't a program this machine runs.
    #[error("the program in it can't run here")]
    NoProgram(#[source] Unrunnable),
    /// Something on this side: a full disk, most likely.
    #[error("the release can't be unpacked on this disk")]
    Disk(#[from] io::Error),
}

impl StageError {
    /// A stable word, and whether it is the release's fault.
    pub(super) fn code(&self) -> (&'static str, bool) {
        match self {
            Self::Length { .. } => ("truncated", true),
            Self::Digest { .. } => ("wrong_digest", true),
            Self::Signature(_) => ("wrong_archive_key", true),
            Self::Unpack(error) => match **error {
                self_update::Error::Io(ref error) if is_full(error) => ("no_space", false),
                _ => ("bad_archive", true),
            },
            Self::Contents { .. } => ("bad_archive", true),
            Self::OtherProgram { .. } => ("other_program", true),
            Self::NoProgram(Unrunnable::Foreign(_)) => ("wrong_architecture", true),
            Self::NoProgram(Unrunnable::Broken(_)) => ("not_runnable", true),
            Self::Disk(error) if is_full(error) => ("no_space", false),
            Self::Disk(_) => ("disk", false),
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What a program of this version and target answers to `--version`.
pub(super) fn introduction(version: &str, target: &str) -> String {
    format!("dtma-agent {version} ({target})")
}

/// Checks the archive at `path`, unpacks it beside itself, and checks what came out. Answers the folder that can be adopted.
///
/// # Errors
/// See [`StageError`]; nothing outside the folder of `path` has changed.
pub(super) fn unpack(
    path: &Path,
    manifest: &Manifest,
    artifact: &Artifact,
    keys: &PublicKeys,
    host: &dyn Host,
) -> Result<PathBuf, StageError> {
    let (found, length) = digest(path)?;
    if length != artifact.size {
        return Err(StageError::Length { found: length, announced: artifact.size });
    }
    if found != artifact.sha256 {
        return Err(StageError::Digest { found, announced: artifact.sha256 });
    }
    // With no keys this would verify nothing and succeed; `PublicKeys` is never empty.
    let trusted: Vec<_> = keys.iter().map(|key| *key.as_bytes()).collect();
    self_update::verify_signature(path, &trusted).map_err(|error| StageError::Signature(Box::new(error)))?;

    let folder = path.with_file_name("unpacked");
    std::fs::create_dir(&folder)?;
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755))?;
    Extract::from_source(path)
        .archive(ArchiveKind::Tar(Some(Compression::Gz)))
        .extract_into(&folder)
        .map_err(|error| StageError::Unpack(Box::new(error)))?;
    contents(&folder, &manifest.version)?;
    program(&folder.join("dtma-agent"), &manifest.version, &artifact.target, host)?;
    Ok(folder)
}

fn digest(path: &Path) -> io::Result<(Digest, u64)> {
    let mut file = File::open(path)?;
    let (mut hasher, mut chunk, mut length) = (Sha256::new(), vec![0; 1 << 16], 0);
    loop {
        let read = file.read(&mut chunk)?;
        let Some(bytes) = chunk.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
        hasher.update(bytes);
        length += bytes.len() as u64;
    }
    Ok((Digest::from(<[u8; 32]>::from(hasher.finalize())), length))
}

/// Plain files in one folder, all that are needed among them, with the modes they should have, on the disk.
fn contents(folder: &Path, version: &Version) -> Result<(), StageError> {
    let wrong = |why: String| StageError::Contents { why };
    let mut missing: BTreeSet<_> = FILES.iter().map(|(name, _)| *name).collect();
    let mut count = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_str().ok_or_else(|| wrong("a name in it is no text".to_owned()))?;
        if !entry.file_type()?.is_file() {
            return Err(wrong(format!("{name} is no plain file")));
        }
        count += 1;
        if count > MAX_FILES {
            return Err(wrong("far too many files".to_owned()));
        }
        missing.remove(name);
        let known = FILES.iter().any(|(known, program)| *program && *known == name);
        // A later version may bring other programs.
        let program = known || entry.metadata()?.permissions().mode() & 0o100 != 0;
        let mode = if program { 0o755 } else { 0o644 };
        std::fs::set_permissions(entry.path(), std::fs::Permissions::from_mode(mode))?;
        sync(&entry.path())?;
    }
    if !missing.is_empty() {
        return Err(wrong(format!("without {}", missing.into_iter().collect::<Vec<_>>().join(", "))));
    }
    let says = std::fs::read_to_string(folder.join("VERSION"))?;
    if says.trim() != version.to_string() {
        return Err(wrong(format!("its VERSION says '{}', its manifest {version}", says.trim().escape_debug())));
    }
    Ok(sync(folder)?)
}

/// The program is one for this machine, starts, and says it is what was announced.
fn program(path: &Path, version: &Version, target: &str, host: &dyn Host) -> Result<(), StageError> {
    let says = host.introduce(path).map_err(StageError::NoProgram)?;
    let expected = introduction(&version.to_string(), target);
    if says.trim() != expected {
        let says = says.trim().chars().filter(|c| !c.is_control()).take(100).collect();
        return Err(StageError::OtherProgram { says, expected });
    }
    Ok(())
}
