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
use crate::process::KillOnDrop;
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
const CHANGES: [&str; 5] = [
    "ENV PYTHONPATH=/opt/mcp-demo/site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1",
    "WORKDIR /opt/mcp-demo",
    "USER 65532:65532",
    "EXPOSE 8080/tcp",
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
        let told = workspace.local_file("mcp-demo/sources")?;
        Job::new(workspace.program("local-cloud"), told.clone()).args(["sources", SUITE]).run(watch).await?;
        let told = std::fs::read_to_string(&told).map_err(StackError::io(format!("read {}", told.display())))?;
        let (options, sources): (Vec<&str>, Vec<&str>) = told.lines().partition(|line| line.starts_with("--"));
        // `extract` unpacks the packages without running their scripts: no init, no package manager, nothing to clean up after.
        Job::new("mmdebstrap", workspace.local_file("mcp-demo/mmdebstrap.log")?)
            .args(["--variant=extract", "--format=directory", "--include", PACKAGES])
            .args(options)
            .args([Path::new(SUITE), work])
            .args(sources)
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
        let process = KillOnDrop(registry::spawn(Access::Write, listen, storage, &log_folder)?);
        wait_until_ok(&format!("http://{listen}/v2/"), None, &process.0, Duration::from_secs(15)).await?;
        let reference = self.reference(listen);
        import(engine.api(), archive, &reference, watch).await?;
        push(engine.api(), &format!("{listen}/{REPOSITORY}"), &self.tag, watch).await?;
        let removed = engine.api().remove_image(&reference, None::<RemoveImageOptions>, None).await;
        removed.map(drop).map_err(StackError::docker(format!("remove image {reference}")))?;
        process.0.stop(Duration::from_secs(5)).await
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use bollard::models::{ContainerCreateBody, HostConfig};
    use bollard::query_parameters::{CreateContainerOptionsBuilder, StopContainerOptionsBuilder};
    use dtma_api::Token;

    use super::*;
    use crate::docker::STACK_LABEL;
    use crate::mcp::McpClient;
    use crate::watch::Unwatched;

    const STACK: &str = "mcp-image-test";

    /// Under the restrictions an agent puts on it: no capability, no new privileges, nothing to write to.
    async fn run(docker: &Docker, image: &str) -> (String, String) {
        let body = ContainerCreateBody {
            image: Some(image.to_owned()),
            labels: Some(HashMap::from([(STACK_LABEL.to_owned(), STACK.to_owned())])),
            host_config: Some(HostConfig {
                cap_drop: Some(vec!["ALL".to_owned()]),
                security_opt: Some(vec!["no-new-privileges".to_owned()]),
                readonly_rootfs: Some(true),
                memory: Some(128 << 20),
                ..HostConfig::default()
            }),
            ..ContainerCreateBody::default()
        };
        let options = CreateContainerOptionsBuilder::new().name(STACK).build();
        let id = docker.create_container(Some(options), body).await.unwrap().id;
        docker.start_container(&id, None).await.unwrap();
        let networks = docker.inspect_container(&id, None).await.unwrap().network_settings.unwrap().networks.unwrap();
        let ip = networks["bridge"].ip_address.clone().unwrap();
        (id, ip)
    }

    #[tokio::test]
    #[ignore = "needs Docker and root: cargo xtask test"]
    async fn the_server_runs_with_no_rights_answers_a_real_client_and_ends_when_asked_to() {
        let workspace = Workspace::find();
        let engine = Engine::connect().await.unwrap();
        engine.sweep(STACK).await.unwrap();
        let image = McpImage::of(&workspace).unwrap();
        image.ensure(&workspace, &engine, &Unwatched).await.unwrap();

        let folder = tempfile::tempdir().unwrap();
        let listen = free_port([127, 0, 0, 1].into()).unwrap();
        let process = registry::spawn(Access::ReadOnly, listen, &storage(&workspace), folder.path()).unwrap();
        wait_until_ok(&format!("http://{listen}/v2/"), None, &process, Duration::from_secs(15)).await.unwrap();
        let reference = image.reference(listen);
        let options = CreateImageOptionsBuilder::new().from_image(&reference).build();
        let pulled = engine.api().create_image(Some(options), None, None).try_collect::<Vec<_>>().await;
        process.stop(Duration::from_secs(5)).await.unwrap();
        pulled.unwrap();

        let (id, ip) = run(engine.api(), &reference).await;
        let url = format!("http://{ip}:8080/mcp");
        let http = crate::http::client().unwrap();
        let listening = async {
            while http.get(&url).send().await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), listening).await.expect("it listens");
        let client = McpClient::connect(http, &url, &Token::from("unused".to_owned())).await.unwrap();
        assert_eq!(client.tools().await.unwrap(), ["add", "echo", "clock"]);
        assert_eq!(client.call("add", serde_json::json!({ "a": 19, "b": 23 })).await.unwrap(), "42");
        let error = client.call("add", serde_json::json!({ "a": "no number" })).await.unwrap_err().to_string();
        assert!(error.contains("add"), "{error}");
        client.close().await.unwrap();

        let stop = StopContainerOptionsBuilder::new().t(10).build();
        engine.api().stop_container(&id, Some(stop)).await.unwrap();
        let ended = engine.api().inspect_container(&id, None).await.unwrap().state.unwrap();
        assert_ne!(ended.exit_code, Some(137), "it had to be killed");
        engine.sweep(STACK).await.unwrap();
        engine.api().remove_image(&reference, None::<RemoveImageOptions>, None).await.unwrap();
    }
}
