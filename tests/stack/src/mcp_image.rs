//! The image of the MCP server that the demo and the stories deploy: Debian's Python, the SDK from PyPI, `server.py`. Built
//! once per recipe and kept in the registry's storage.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::Docker;
use bollard::auth::DockerCredentials;
use bollard::query_parameters::{CreateImageOptionsBuilder, PushImageOptionsBuilder, RemoveImageOptions};
use futures_util::{StreamExt as _, TryStreamExt as _};
use sha2::{Digest as _, Sha256};
use tokio_util::io::ReaderStream;

use crate::command::Job;
use crate::docker::Engine;
use crate::error::{Result, StackError};
use crate::ready::{free_port, wait_until_ok};
use crate::registry::{self, Access};
use crate::watch::Watch;
use crate::workspace::Workspace;

/// Its name in the registry.
pub(crate) const REPOSITORY: &str = "mcp-demo";

const SUITE: &str = "bookworm";
const PACKAGES: &str = "dash,coreutils,python3.11-minimal,libpython3.11-stdlib";
/// Wheels the SDK's packages come as; pip tries them in this order.
const PLATFORMS: [&str; 3] = ["manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64"];
/// Unneeded by a server, and half the size.
const UNNEEDED: [&str; 15] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/bug",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/python3.11/pydoc_data",
    "usr/lib/python3.11/ensurepip",
    "usr/lib/python3.11/lib2to3",
    "usr/lib/python3.11/idlelib",
    "var/lib/apt",
    "var/lib/dpkg",
    "var/cache",
    "opt/mcp-demo/site/bin",
];
const CHANGES: [&str; 6] = [
    "ENV PYTHONPATH=/opt/mcp-demo/site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1",
    "WORKDIR /opt/mcp-demo",
    "USER 65532:65532",
    "EXPOSE 8080/tcp",
    "STOPSIGNAL SIGTERM",
    r#"CMD ["/usr/bin/python3.11", "/opt/mcp-demo/server.py"]"#,
];

/// The recipe, and with it the image's tag.
#[derive(Debug, Clone)]
pub(crate) struct McpImage {
    sources: PathBuf,
    tag: String,
}

impl McpImage {
    /// Reads the recipe.
    pub(crate) fn of(workspace: &Workspace) -> Result<Self> {
        let sources = workspace.root().join("tests/stack/images/mcp-demo");
        let mut recipe = Sha256::new();
        for part in [SUITE, PACKAGES].iter().chain(&PLATFORMS).chain(&UNNEEDED).chain(&CHANGES) {
            recipe.update(part);
            recipe.update([0]);
        }
        for name in ["server.py", "requirements.txt"] {
            let file = sources.join(name);
            recipe.update(std::fs::read(&file).map_err(StackError::io(format!("read {}", file.display())))?);
            recipe.update([0]);
        }
        let mut tag = hex::encode(recipe.finalize());
        tag.truncate(16);
        Ok(Self { sources, tag })
    }

    /// How `registry` (host and port) calls it.
    pub(crate) fn reference(&self, registry: SocketAddr) -> String {
        format!("{registry}/{REPOSITORY}:{}", self.tag)
    }

    /// Makes sure the registry's storage holds it.
    pub(crate) async fn ensure(&self, workspace: &Workspace, engine: &Engine, watch: &dyn Watch) -> Result<()> {
        let storage = storage(workspace);
        if registry::holds(&storage, REPOSITORY, &self.tag) {
            return Ok(());
        }
        watch.say("building the MCP server's image (Debian's Python, the SDK from PyPI)");
        let work = workspace.local_file("mcp-demo/root")?;
        remove_folder(&work)?;
        self.fill(&work, workspace, watch).await?;
        let archive = workspace.local_file("mcp-demo/root.tar")?;
        Job::new("tar", workspace.local_file("mcp-demo/tar.log")?)
            .args(["--create", "--numeric-owner", "--sort=name", "--file"])
            .args([&archive])
            .args([Path::new("--directory"), &work, Path::new(".")])
            .run(watch)
            .await?;
        self.publish(&archive, &storage, workspace, engine, watch).await?;
        remove_folder(&work)?;
        std::fs::remove_file(&archive).map_err(StackError::io(format!("remove {}", archive.display())))
    }

    /// The root file system, as a folder.
    async fn fill(&self, work: &Path, workspace: &Workspace, watch: &dyn Watch) -> Result<()> {
        // `extract` unpacks the packages without running their scripts: no init, no package manager, nothing to clean up after.
        Job::new("mmdebstrap", workspace.local_file("mcp-demo/mmdebstrap.log")?)
            .args(["--variant=extract", "--format=directory", "--include", PACKAGES, SUITE])
            .args([work])
            .run(watch)
            .await?;
        let app = work.join("opt/mcp-demo");
        std::fs::create_dir_all(&app).map_err(StackError::io(format!("make {}", app.display())))?;
        let pip = Job::new("python3", workspace.local_file("mcp-demo/pip.log")?)
            .args(["-m", "pip", "install", "--no-compile", "--no-deps", "--root-user-action=ignore"])
            .args(["--implementation=cp", "--python-version=3.11", "--only-binary=:all:", "--progress-bar=off"])
            .args(PLATFORMS.iter().flat_map(|platform| ["--platform", platform]))
            .args([Path::new("--target"), &app.join("site"), Path::new("--requirement")])
            .args([self.sources.join("requirements.txt")]);
        pip.run(watch).await?;
        std::fs::copy(self.sources.join("server.py"), app.join("server.py"))
            .map_err(StackError::io("copy server.py"))?;
        for path in UNNEEDED {
            remove_folder(&work.join(path))?;
        }
        std::fs::write(work.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nserver:x:65532:65532::/opt/mcp-demo:/bin/sh\n")
            .map_err(StackError::io("write etc/passwd"))?;
        // Compiled here because the server may not write there; "unchecked" because the archive's times don't matter then.
        Job::new("chroot", workspace.local_file("mcp-demo/compile.log")?)
            .args([work, Path::new("/usr/bin/python3.11")])
            .args([
                "-m",
                "compileall",
                "-q",
                "--invalidation-mode",
                "unchecked-hash",
                "/opt/mcp-demo",
                "/usr/lib/python3.11",
            ])
            .run(watch)
            .await
    }

    async fn publish(
        &self,
        archive: &Path,
        storage: &Path,
        workspace: &Workspace,
        engine: &Engine,
        watch: &dyn Watch,
    ) -> Result<()> {
        let listen = free_port([127, 0, 0, 1].into())?;
        let log_folder = workspace.local().join("mcp-demo");
        let process = registry::spawn(Access::Write, listen, storage, &log_folder)?;
        let pushed = async {
            wait_until_ok(&format!("http://{listen}/v2/"), &process, Duration::from_secs(15)).await?;
            let reference = self.reference(listen);
            import(engine.api(), archive, &reference, watch).await?;
            push(engine.api(), &format!("{listen}/{REPOSITORY}"), &self.tag, watch).await?;
            let removed = engine.api().remove_image(&reference, None::<RemoveImageOptions>, None).await;
            removed.map(drop).map_err(StackError::docker(format!("remove image {reference}")))
        };
        let outcome = pushed.await;
        process.stop(Duration::from_secs(5)).await?;
        outcome
    }
}

/// Where the registry keeps its images, all stacks together.
pub(crate) fn storage(workspace: &Workspace) -> PathBuf {
    workspace.local().join("registry")
}

async fn import(docker: &Docker, archive: &Path, reference: &str, watch: &dyn Watch) -> Result<()> {
    let doing = format!("import {reference}");
    let file = tokio::fs::File::open(archive).await;
    let file = file.map_err(StackError::io(format!("read {}", archive.display())))?;
    let body = bollard::body_try_stream(ReaderStream::new(file));
    let changes = CHANGES.iter().map(|change| (*change).to_owned()).collect();
    let options = CreateImageOptionsBuilder::new().from_src("-").repo(reference).changes(changes).build();
    watch.now("importing the image");
    let steps: Vec<_> =
        docker.create_image(Some(options), Some(body), None).try_collect().await.map_err(StackError::docker(doing))?;
    drop(steps);
    Ok(())
}

async fn push(docker: &Docker, repository: &str, tag: &str, watch: &dyn Watch) -> Result<()> {
    let doing = format!("push {repository}:{tag}");
    let options = PushImageOptionsBuilder::new().tag(tag).build();
    let mut steps = std::pin::pin!(docker.push_image(repository, Some(options), Some(DockerCredentials::default())));
    while let Some(step) = steps.next().await {
        let step = step.map_err(StackError::docker(doing.clone()))?;
        if let Some(error) = step.error_detail {
            return Err(StackError::DockerAnswer(format!("{doing}: {}", error.message.unwrap_or_default())));
        }
        if let Some(detail) = step.progress_detail {
            let megabytes = detail.current.unwrap_or_default() / 1_000_000;
            watch.now(&format!("pushing the image, {megabytes} MB of a layer"));
        }
    }
    Ok(())
}

fn remove_folder(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(StackError::io(format!("remove {}", folder.display()))(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}
