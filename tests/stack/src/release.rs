//! Making a release: the agent built for an old glibc, packed with its units and installer, signed. The same input gives the same bytes.

mod keys;
mod sign;

pub use keys::{ReleaseKeys, ReleaseKeysError};
pub use sign::{SignError, manifest as sign_manifest};

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use dtma_release::{Artifact, Channel, Digest, Manifest, TARGET, Version, archive_name, channel_path, manifest_path};
use elf::ElfBytes;
use elf::endian::AnyEndian;
use flate2::{Compression, GzBuilder};
use jiff::{SignedDuration, Timestamp};
use sha2::{Digest as _, Sha256};

use crate::command::Job;
use crate::error::StackError;
use crate::watch::Watch;
use crate::workspace::Workspace;

/// Debian 11's, the oldest system a droplet may have.
pub const OLDEST_GLIBC: Glibc = Glibc { major: 2, minor: 31 };

const RUST_TARGET: &str = "x86_64-unknown-linux-gnu";
const CARGO_ZIGBUILD: &str = "cargo-zigbuild==0.24.0";
const ZIGLANG: &str = "ziglang==0.15.2";

const ELF: &[u8] = b"\x7fELF";
/// As in `agent/src/version.rs`.
const MARK: &[u8] = b"\x01dtma-agent-version\x02";
const STAMP_LENGTH: usize = 64;

const UNITS: [&str; 6] = [
    "dtma-agent.service",
    "dtma-metadata-guard.service",
    "dtma-update.service",
    "dtma-update.path",
    "dtma-update.timer",
    "dtma-update-undo.service",
];

/// 2000-01-01T00:00:00Z for every entry: when it was packed must not change the bytes, and tar complains about 1970.
const PACKED_AT: u64 = 946_684_800;

/// A glibc version, as symbols name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Glibc {
    /// The 2 of 2.31.
    pub major: u32,
    /// The 31 of 2.31.
    pub minor: u32,
}

impl fmt::Display for Glibc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// How a release is made.
#[derive(Debug, Clone)]
pub struct Terms {
    /// Its version; the workspace's own unless a test needs another.
    pub version: Version,
    /// Whom it is for.
    pub channel: Channel,
    /// When it is signed. The commit's time unless told otherwise, so that the same commit gives the same bytes.
    pub issued_at: Timestamp,
    /// How long it may be installed from then on.
    pub lifetime: SignedDuration,
    /// The oldest version that can go to it in one step.
    pub min_version: Version,
}

impl Terms {
    /// How long a release may be installed unless its makers say otherwise: half a year.
    pub const LIFETIME: SignedDuration = SignedDuration::from_hours(24 * 182);

    /// A stable release of the workspace's version, issued when its commit was made; without git, now.
    pub fn of(workspace: &Workspace) -> Self {
        let version = Version::parse(env!("CARGO_PKG_VERSION")).unwrap_or_else(|_| Version::new(0, 0, 0));
        Self {
            version,
            channel: Channel::Stable,
            issued_at: committed_at(workspace).unwrap_or_else(Timestamp::now),
            lifetime: Self::LIFETIME,
            min_version: Version::new(0, 1, 0),
        }
    }
}

/// When the present commit was made.
fn committed_at(workspace: &Workspace) -> Option<Timestamp> {
    let command = ["log", "-1", "--format=%cI"];
    let output = std::process::Command::new("git").args(command).current_dir(workspace.root()).output().ok()?;
    String::from_utf8_lossy(&output.stdout).trim().parse().ok()
}

/// A packed and signed release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// Its version, which is also its folder's name.
    pub version: String,
    /// What the signed manifest beside the archive says.
    pub manifest: Manifest,
    /// The `.tar.gz`; beside it lies the same name with `.sha256` added, as `sha256sum` writes it.
    pub archive: PathBuf,
    /// SHA-256 of the archive, lower-case hexadecimal.
    pub sha256: String,
    /// Bytes of the archive.
    pub size: u64,
    /// The newest glibc the agent in it asks for; none when it is static or a script.
    pub glibc: Option<Glibc>,
}

/// Why there is no release.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// The cross-compiling tools could not be installed, or the agent could not be built.
    #[error("cannot build the agent: {0}")]
    Build(#[from] StackError),
    /// A file could not be read or written.
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
    /// The built program can't be looked into.
    #[error("cannot read the symbols of {}", path.display())]
    Symbols {
        /// The program.
        path: PathBuf,
        /// Why not.
        #[source]
        source: elf::ParseError,
    },
    /// There are no keys to sign with.
    #[error("cannot sign the release")]
    Keys(#[from] ReleaseKeysError),
    /// Signing failed.
    #[error("cannot sign the release")]
    Sign(#[from] SignError),
    /// The program isn't an agent.
    #[error("the program has no room for a version, or more than one; is it the agent?")]
    NoStamp,
    /// Built twice, it wasn't the same.
    #[error(
        "built again from the index in another folder it has SHA-256 {second}, not {first}; commit or add what was changed, or find what differs"
    )]
    NotReproducible {
        /// As built here.
        first: String,
        /// As built elsewhere.
        second: String,
    },
    /// It would not start on the oldest system a droplet may have.
    #[error("the agent asks for glibc {found}, droplets may have {OLDEST_GLIBC}: it uses {symbol}")]
    GlibcTooNew {
        /// What it asks for.
        found: Glibc,
        /// A symbol of that version.
        symbol: String,
    },
}

impl ReleaseError {
    fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::File { doing, path, source }
    }
}

/// The keys releases of this working tree are signed with unless others are named: for the local cloud only. Made when there are none.
///
/// # Errors
/// When they can't be made or read.
pub fn development_keys(workspace: &Workspace) -> Result<ReleaseKeys, ReleaseError> {
    let folder = workspace.local().join("release-keys");
    if !folder.exists() {
        // Whole or not at all: two tests may come here at once.
        let draft = tempfile::tempdir_in(workspace.local_folder()?).map_err(ReleaseError::file("make", &folder))?;
        ReleaseKeys::make(draft.path())?;
        match std::fs::rename(draft.path(), &folder) {
            Err(error) if !folder.exists() => return Err(ReleaseError::file("make", &folder)(error)),
            _ => {}
        }
    }
    Ok(ReleaseKeys::load(&folder)?)
}

/// Builds the agent, packs and signs it with [`development_keys`], into `{out}/{version}/`, `target/dist` unless told otherwise. When
/// nothing changed, that costs cargo's look at the sources and leaves the same bytes.
///
/// # Errors
/// As [`make`].
pub async fn release(workspace: &Workspace, out: Option<&Path>, watch: &dyn Watch) -> Result<Release, ReleaseError> {
    make(workspace, &Terms::of(workspace), &development_keys(workspace)?, out, watch).await
}

/// Builds the agent, which from then on trusts the public half of `keys`, packs it, and signs it.
///
/// # Errors
/// When the tools can't be installed, the build fails, the program needs a newer glibc than [`OLDEST_GLIBC`], or a file can't be written.
pub async fn make(
    workspace: &Workspace,
    terms: &Terms,
    keys: &ReleaseKeys,
    out: Option<&Path>,
    watch: &dyn Watch,
) -> Result<Release, ReleaseError> {
    let agent = build_agent(workspace, keys, watch).await?;
    let out = out.map_or_else(|| workspace.releases(), Path::to_path_buf);
    pack(workspace, terms, &agent, keys, &out)
}

/// Makes the same release again from another folder, with nothing built before.
///
/// # Errors
/// As [`make`], and [`ReleaseError::NotReproducible`].
pub async fn again_elsewhere(
    workspace: &Workspace,
    terms: &Terms,
    keys: &ReleaseKeys,
    made: &Release,
    watch: &dyn Watch,
) -> Result<(), ReleaseError> {
    let folder = tempfile::tempdir().map_err(ReleaseError::file("make", Path::new("a folder elsewhere")))?;
    let elsewhere = Workspace::at(&folder.path().join("sources"));
    Job::new("git", workspace.local_file("release-again.log")?)
        .args(["checkout-index", "--all"])
        .args([format!("--prefix={}/", elsewhere.root().display())])
        .in_folder(workspace.root())
        .run(watch)
        .await?;
    let again = make(&elsewhere, terms, keys, None, watch).await?;
    if again.sha256 == made.sha256 {
        return Ok(());
    }
    Err(ReleaseError::NotReproducible { first: made.sha256.clone(), second: again.sha256 })
}

/// Packs `agent`, any program that is to run as the agent, and signs it, into `{out}/{version}/` and as the newest of its channel.
///
/// # Errors
/// When the program needs a newer glibc than [`OLDEST_GLIBC`] or a file can't be read or written.
pub fn pack(
    workspace: &Workspace,
    terms: &Terms,
    agent: &Path,
    keys: &ReleaseKeys,
    out: &Path,
) -> Result<Release, ReleaseError> {
    pack_with(workspace, terms, agent, &[], keys, out)
}

/// As [`pack`], with more files in the archive, each with its mode.
///
/// # Errors
/// As [`pack`].
pub fn pack_with(
    workspace: &Workspace,
    terms: &Terms,
    agent: &Path,
    more: &[(&str, u32, Vec<u8>)],
    keys: &ReleaseKeys,
    out: &Path,
) -> Result<Release, ReleaseError> {
    let version = &terms.version;
    let mut program = read(agent)?;
    let glibc = newest_glibc(&program, agent)?;
    if let Some((found, symbol)) = &glibc
        && *found > OLDEST_GLIBC
    {
        return Err(ReleaseError::GlibcTooNew { found: *found, symbol: symbol.clone() });
    }

    if program.starts_with(ELF) {
        stamp(&mut program, version)?;
    }
    let packaging = workspace.root().join("packaging");
    let mut entries = vec![
        ("VERSION", 0o644, format!("{version}\n").into_bytes()),
        ("dtma-agent", 0o755, program),
        ("metadata-guard", 0o755, read(&packaging.join("metadata-guard.sh"))?),
        ("dtma.conf.example", 0o644, read(&packaging.join("dtma.conf.example"))?),
        ("install.sh", 0o755, read(&packaging.join("install.sh"))?),
    ];
    for unit in UNITS {
        entries.push((unit, 0o644, read(&packaging.join("systemd").join(unit))?));
    }
    entries.extend(more.iter().cloned());
    let name = archive_name(version, TARGET);
    let bytes = tar_gz(&entries).map_err(ReleaseError::file("pack", agent))?;
    let bytes = sign::archive(bytes, &name, keys)?;
    let digest = Digest::from(<[u8; 32]>::from(Sha256::digest(&bytes)));
    let (size, sha256) = (bytes.len() as u64, digest.to_string());
    let manifest = Manifest {
        channel: terms.channel,
        version: version.clone(),
        issued_at: terms.issued_at,
        expires_at: terms.issued_at.saturating_add(terms.lifetime).unwrap_or(Timestamp::MAX),
        min_version: terms.min_version.clone(),
        artifacts: vec![Artifact { target: TARGET.to_owned(), file: name.clone(), size, sha256: digest }],
    };
    let envelope = sign_manifest(&manifest, keys)?;

    let folder = out.join(version.to_string());
    let channels = out.join("channels");
    for folder in [&folder, &channels] {
        std::fs::create_dir_all(folder).map_err(ReleaseError::file("make", folder))?;
    }
    let archive = folder.join(&name);
    write_whole(&archive, &bytes)?;
    write_whole(&folder.join(format!("{name}.sha256")), format!("{sha256}  {name}\n").as_bytes())?;
    // What points to the archive comes after it.
    write_whole(&out.join(manifest_path(version)), &envelope)?;
    write_whole(&out.join(channel_path(terms.channel)), &envelope)?;
    let glibc = glibc.map(|(version, _)| version);
    Ok(Release { version: version.to_string(), manifest, archive, sha256, size, glibc })
}

async fn build_agent(workspace: &Workspace, keys: &ReleaseKeys, watch: &dyn Watch) -> Result<PathBuf, ReleaseError> {
    let tools = install_zigbuild(workspace, watch).await?;
    let mut path = OsString::from(tools.join("bin"));
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    Job::new(cargo, workspace.local_file("release.log")?)
        .args(["zigbuild", "--release", "--package", "dtma-agent", "--bin", "dtma-agent", "--target"])
        .args([format!("{RUST_TARGET}.{OLDEST_GLIBC}")])
        .env("PATH", path)
        .env("DTMA_RELEASE_KEYS", keys.public().to_string())
        .env("RUSTFLAGS", nameless_paths(workspace))
        .in_folder(workspace.root())
        .run(watch)
        .await?;
    Ok(built_agent(workspace))
}

/// The program of the release built last.
pub fn built_agent(workspace: &Workspace) -> PathBuf {
    workspace.target().join(RUST_TARGET).join("release/dtma-agent")
}

/// Where the sources lay must not change the bytes: panics name files.
fn nameless_paths(workspace: &Workspace) -> OsString {
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
    let cargo_home = std::env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    let rustup_home = std::env::var_os("RUSTUP_HOME").map_or_else(|| home.join(".rustup"), PathBuf::from);
    let mut flags = OsString::new();
    for (from, to) in [(workspace.root(), "/dtma"), (&*cargo_home, "/cargo"), (&*rustup_home, "/rustup")] {
        flags.push(if flags.is_empty() { "" } else { " " });
        flags.push("--remap-path-prefix=");
        flags.push(from);
        flags.push("=");
        flags.push(to);
    }
    flags
}

/// A Python environment of its own holding the pinned cargo-zigbuild and zig.
async fn install_zigbuild(workspace: &Workspace, watch: &dyn Watch) -> Result<PathBuf, ReleaseError> {
    let folder = workspace.target().join("tools").join(format!("{CARGO_ZIGBUILD}-{ZIGLANG}").replace("==", "-"));
    // Written last, so that an interrupted installation is not taken for one.
    let complete = folder.join("complete");
    if complete.exists() {
        return Ok(folder);
    }
    let log = workspace.local_file("release-tools.log")?;
    Job::new("python3", log.clone()).args(["-m", "venv", "--clear"]).args([&folder]).run(watch).await?;
    Job::new(folder.join("bin/python3"), log)
        .args(["-m", "pip", "install", "--disable-pip-version-check", "--only-binary=:all:", CARGO_ZIGBUILD, ZIGLANG])
        .run(watch)
        .await?;
    std::fs::write(&complete, "").map_err(ReleaseError::file("write", &complete))?;
    Ok(folder)
}

/// Writes the version into the program, where `agent/src/version.rs` has left room for it.
///
/// # Errors
/// When there isn't exactly one such room, or it is too small.
pub fn stamp(program: &mut [u8], version: &Version) -> Result<(), ReleaseError> {
    let version = version.to_string();
    let mut places = program.windows(MARK.len()).enumerate().filter(|(_, bytes)| *bytes == MARK).map(|(at, _)| at);
    let (place, another) = (places.next(), places.next());
    let room = place.filter(|_| another.is_none()).and_then(|at| program.get_mut(at + MARK.len()..at + STAMP_LENGTH));
    // One zero stays at the end.
    let room = room.filter(|room| version.len() < room.len()).ok_or(ReleaseError::NoStamp)?;
    room.fill(0);
    for (place, byte) in room.iter_mut().zip(version.bytes()) {
        *place = byte;
    }
    Ok(())
}

/// The newest glibc version among the symbols the program wants from shared libraries, with one symbol of it.
fn newest_glibc(program: &[u8], path: &Path) -> Result<Option<(Glibc, String)>, ReleaseError> {
    let unreadable = |source| ReleaseError::Symbols { path: path.to_path_buf(), source };
    if !program.starts_with(ELF) {
        return Ok(None); // a script, packed by a test
    }
    let file = ElfBytes::<AnyEndian>::minimal_parse(program).map_err(unreadable)?;
    let Some((symbols, names)) = file.dynamic_symbol_table().map_err(unreadable)? else { return Ok(None) };
    let Some(versions) = file.symbol_version_table().map_err(unreadable)? else { return Ok(None) };
    let mut newest: Option<(Glibc, String)> = None;
    for (index, symbol) in symbols.iter().enumerate() {
        let Some(required) = versions.get_requirement(index).map_err(unreadable)? else { continue };
        let Some(glibc) = parse_glibc(required.name) else { continue };
        if newest.as_ref().is_none_or(|(so_far, _)| glibc > *so_far) {
            let name = names.get(symbol.st_name as usize).map_err(unreadable)?;
            newest = Some((glibc, name.to_owned()));
        }
    }
    Ok(newest)
}

/// `GLIBC_2.17` and `GLIBC_2.2.5`; `GCC_3.0` and `GLIBC_PRIVATE` are none.
fn parse_glibc(version: &str) -> Option<Glibc> {
    let mut parts = version.strip_prefix("GLIBC_")?.split('.');
    Some(Glibc { major: parts.next()?.parse().ok()?, minor: parts.next()?.parse().ok()? })
}

fn tar_gz(entries: &[(&str, u32, Vec<u8>)]) -> io::Result<Vec<u8>> {
    let gz = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    let mut tar = tar::Builder::new(gz);
    for (name, mode, bytes) in entries {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(*mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(PACKED_AT);
        tar.append_data(&mut header, name, bytes.as_slice())?;
    }
    tar.into_inner()?.finish()
}

fn read(path: &Path) -> Result<Vec<u8>, ReleaseError> {
    std::fs::read(path).map_err(ReleaseError::file("read", path))
}

/// Replaces the file in one step, because a provisioner may be serving it. A file that already holds this is left alone.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), ReleaseError> {
    if std::fs::read(path).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(path);
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(ReleaseError::file("write into", folder))?;
    file.write_all(bytes).map_err(ReleaseError::file("write", path))?;
    make_readable(file.path()).map_err(ReleaseError::file("write", path))?;
    file.persist(path).map_err(|error| error.error).map_err(ReleaseError::file("replace", path))?;
    Ok(())
}

/// Temporary files are private; a release is for everybody.
fn make_readable(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;

    use super::*;

    /// A program that is certainly there and certainly needs glibc: this test.
    fn some_program() -> PathBuf {
        std::env::current_exe().unwrap()
    }

    fn unpacked(archive: &Path) -> BTreeMap<String, (u32, u64, Vec<u8>)> {
        let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(std::fs::File::open(archive).unwrap()));
        tar.entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).unwrap();
                let header = entry.header();
                assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
                let name = entry.path().unwrap().to_str().unwrap().to_owned();
                (name, (header.mode().unwrap(), header.mtime().unwrap(), bytes))
            })
            .collect()
    }

    #[test]
    fn glibc_versions_are_read_from_symbols_and_compared_as_numbers() {
        assert_eq!(parse_glibc("GLIBC_2.17"), Some(Glibc { major: 2, minor: 17 }));
        assert_eq!(parse_glibc("GLIBC_2.2.5"), Some(Glibc { major: 2, minor: 2 }));
        assert_eq!(parse_glibc("GLIBC_PRIVATE"), None);
        assert_eq!(parse_glibc("GCC_3.0"), None);
        assert!(Glibc { major: 2, minor: 4 } < OLDEST_GLIBC);

        let program = std::fs::read(some_program()).unwrap();
        let (version, symbol) = newest_glibc(&program, Path::new("test")).unwrap().unwrap();
        assert!(version >= Glibc { major: 2, minor: 2 }, "{version} {symbol}");
        assert_eq!(newest_glibc(b"#!/bin/sh", Path::new("x")).unwrap(), None);
        assert!(matches!(newest_glibc(b"\x7fELF, but no more", Path::new("x")), Err(ReleaseError::Symbols { .. })));
    }

    #[test]
    fn a_version_is_stamped_where_there_is_room_for_it_and_only_there() {
        let version = |text: &str| Version::parse(text).unwrap();
        let mut program = [b"before", MARK, b"0.1.0", &[0; 39], b"after"].concat();
        stamp(&mut program, &version("12.0.0-rc.1")).unwrap();
        assert_eq!(program, [b"before", MARK, b"12.0.0-rc.1", &[0; 33], b"after"].concat());
        stamp(&mut program, &version("0.1.1")).unwrap();
        assert_eq!(program, [b"before", MARK, b"0.1.1", &[0; 39], b"after"].concat());

        let long = version(&format!("1.0.0-{}", "x".repeat(60)));
        let mut twice = [&*program, &*program].concat();
        let mut cut = program.get(..40).unwrap().to_vec();
        assert!(matches!(stamp(&mut program, &long), Err(ReleaseError::NoStamp)));
        for wrong in [&mut b"no agent".to_vec(), &mut twice, &mut cut] {
            assert!(matches!(stamp(wrong, &version("1.0.0")), Err(ReleaseError::NoStamp)));
        }
    }

    #[test]
    fn the_same_content_gives_the_same_bytes_with_nobodys_name_or_clock_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let entries = [("VERSION", 0o644, b"1.2.3\n".to_vec()), ("dtma-agent", 0o755, vec![7; 100_000])];
        let once = tar_gz(&entries).unwrap();
        assert_eq!(once, tar_gz(&entries).unwrap());
        let archive = folder.path().join("a.tar.gz");
        write_whole(&archive, &once).unwrap();
        let files = unpacked(&archive);
        assert_eq!(files["VERSION"], (0o644, PACKED_AT, b"1.2.3\n".to_vec()));
        assert_eq!(files["dtma-agent"].0, 0o755);
    }

    #[test]
    fn a_file_is_replaced_whole_and_left_alone_when_it_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_whole(&path, b"one").unwrap();
        let written = std::fs::metadata(&path).unwrap().modified().unwrap();
        write_whole(&path, b"one").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), written);
        write_whole(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
