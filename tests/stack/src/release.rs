//! Building a release: the agent for an old glibc, packed with its unit and installer so that the same input gives the same bytes.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use elf::ElfBytes;
use elf::endian::AnyEndian;
use flate2::{Compression, GzBuilder};
use sha2::{Digest as _, Sha256};

use crate::command::Job;
use crate::error::StackError;
use crate::watch::Watch;
use crate::workspace::Workspace;

/// Debian 11's, the oldest system a droplet may have.
pub const OLDEST_GLIBC: Glibc = Glibc { major: 2, minor: 31 };

const TARGET: &str = "x86_64-unknown-linux-gnu";
const CARGO_ZIGBUILD: &str = "cargo-zigbuild==0.24.0";
const ZIGLANG: &str = "ziglang==0.15.2";

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

/// A packed release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// Its version, which is also its folder's name.
    pub version: String,
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

/// Builds the agent and packs it into `{out}/{version}/`, `target/dist` unless told otherwise. When nothing changed, that costs
/// cargo's look at the sources and leaves the same bytes.
///
/// # Errors
/// When the tools can't be installed, the build fails, the program needs a newer glibc than [`OLDEST_GLIBC`], or a file can't be written.
pub async fn release(workspace: &Workspace, out: Option<&Path>, watch: &dyn Watch) -> Result<Release, ReleaseError> {
    let agent = build_agent(workspace, watch).await?;
    let out = out.map_or_else(|| workspace.releases(), Path::to_path_buf);
    pack(workspace, env!("CARGO_PKG_VERSION"), &agent, &out)
}

/// Packs `agent`, any program that is to run as the agent, as release `version` into `{out}/{version}/`.
///
/// # Errors
/// When the program needs a newer glibc than [`OLDEST_GLIBC`] or a file can't be read or written.
pub fn pack(workspace: &Workspace, version: &str, agent: &Path, out: &Path) -> Result<Release, ReleaseError> {
    let program = read(agent)?;
    let glibc = newest_glibc(&program, agent)?;
    if let Some((found, symbol)) = &glibc
        && *found > OLDEST_GLIBC
    {
        return Err(ReleaseError::GlibcTooNew { found: *found, symbol: symbol.clone() });
    }

    let packaging = workspace.root().join("packaging");
    let entries = [
        ("VERSION", 0o644, format!("{version}\n").into_bytes()),
        ("dtma-agent", 0o755, program),
        ("dtma-agent.service", 0o644, read(&packaging.join("systemd/dtma-agent.service"))?),
        ("metadata-guard", 0o755, read(&packaging.join("metadata-guard.sh"))?),
        ("dtma-metadata-guard.service", 0o644, read(&packaging.join("systemd/dtma-metadata-guard.service"))?),
        ("dtma.conf.example", 0o644, read(&packaging.join("dtma.conf.example"))?),
        ("install.sh", 0o755, read(&packaging.join("install.sh"))?),
    ];
    let bytes = tar_gz(&entries).map_err(ReleaseError::file("pack", agent))?;
    let sha256 = hex::encode(Sha256::digest(&bytes));

    let name = format!("dtma-agent-{version}-x86_64-linux-gnu.tar.gz");
    let folder = out.join(version);
    std::fs::create_dir_all(&folder).map_err(ReleaseError::file("make", &folder))?;
    let archive = folder.join(&name);
    write_whole(&archive, &bytes)?;
    write_whole(&folder.join(format!("{name}.sha256")), format!("{sha256}  {name}\n").as_bytes())?;
    Ok(Release {
        version: version.to_owned(),
        archive,
        sha256,
        size: bytes.len() as u64,
        glibc: glibc.map(|(version, _)| version),
    })
}

async fn build_agent(workspace: &Workspace, watch: &dyn Watch) -> Result<PathBuf, ReleaseError> {
    let tools = install_zigbuild(workspace, watch).await?;
    let mut path = OsString::from(tools.join("bin"));
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    Job::new(cargo, workspace.local_file("release.log")?)
        .args(["zigbuild", "--release", "--package", "dtma-agent", "--bin", "dtma-agent", "--target"])
        .args([format!("{TARGET}.{OLDEST_GLIBC}")])
        .env("PATH", path)
        .in_folder(workspace.root())
        .run(watch)
        .await?;
    Ok(workspace.target().join(TARGET).join("release/dtma-agent"))
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

/// The newest glibc version among the symbols the program wants from shared libraries, with one symbol of it.
fn newest_glibc(program: &[u8], path: &Path) -> Result<Option<(Glibc, String)>, ReleaseError> {
    let unreadable = |source| ReleaseError::Symbols { path: path.to_path_buf(), source };
    if !program.starts_with(b"\x7fELF") {
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
