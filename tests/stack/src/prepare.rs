//! Everything that has to be there before a stack can start, step by step, so that whoever shows them can time them.

use crate::command::Job;
use crate::docker::Engine;
use crate::error::Result;
use crate::host;
use crate::image::Image;
use crate::release::{self, ReleaseError};
use crate::sdks::Sdks;
use crate::watch::Watch;
use crate::workspace::Workspace;

/// The image a droplet is made from unless something else is asked for: Debian 12 with Docker.
pub const DEFAULT_IMAGE: &str = "docker-debian-12";

/// Debian 12 as it comes; cloud-init installs Docker.
pub const BARE_IMAGE: &str = "debian-12-x64";

/// All of it: host, programs, release, the droplets' base images, the MCP server's image. About a second when nothing changed.
///
/// # Errors
/// The first step that failed.
pub async fn everything(
    workspace: &Workspace,
    base_images: &[String],
    watch: &dyn Watch,
) -> std::result::Result<(), ReleaseError> {
    host::set_up(workspace, watch).await?;
    workspace.build(watch).await?;
    release::release(workspace, None, watch).await?;
    images(workspace, base_images, watch).await?;
    Ok(())
}

/// The droplets' base images that aren't there yet (a minute each), and the MCP server's.
///
/// # Errors
/// When one can't be built.
pub async fn images(workspace: &Workspace, base_images: &[String], watch: &dyn Watch) -> Result<()> {
    Job::new(workspace.program("local-cloud"), workspace.local_file("base-images.log")?)
        .args(["image"])
        .args(base_images)
        .in_folder(workspace.root())
        .run(watch)
        .await?;
    Image::demo(workspace)?.ensure(workspace, &Engine::connect().await?, watch).await
}

/// What stories about MCP's transports need besides: the image with the servers people use, and the clients and the conformance suite
/// of the two official SDKs. Two minutes when nothing is there, nothing when it is.
///
/// # Errors
/// When one can't be had.
pub async fn mcp(workspace: &Workspace, watch: &dyn Watch) -> Result<Sdks> {
    Image::servers(workspace)?.ensure(workspace, &Engine::connect().await?, watch).await?;
    Sdks::ensure(workspace, watch).await
}
