//! `cargo xtask release`: builds the agent for old systems, packs it, and says what came out.

use std::path::Path;

use stack::release::{self, ReleaseError};
use stack::{Watch, Workspace};

/// Builds and packs into `{out}/{version}/` (`target/dist` unless told otherwise), then prints version, archive, size, SHA-256 and the
/// glibc it needs.
///
/// # Errors
/// As [`release::release`].
pub(crate) async fn run(out: Option<&Path>, watch: &dyn Watch) -> Result<(), ReleaseError> {
    let release = release::release(&Workspace::find(), out, watch).await?;
    println!("version  {}", release.version);
    println!("archive  {}", release.archive.display());
    println!("size     {} bytes", release.size);
    println!("sha256   {}", release.sha256);
    match release.glibc {
        Some(glibc) => println!("glibc    {glibc} or newer"),
        None => println!("glibc    not needed"),
    }
    Ok(())
}
