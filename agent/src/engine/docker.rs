//! Docker, through `bollard`: the only place that names it. How requests are made is in [`make`], how answers are read in [`read`], what
//! errors mean in [`errors`].

mod attach;
mod errors;
mod exec;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
mod images;
mod make;
mod network;
mod read;
mod secrets;
mod stats;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use bollard::models::ContainerCreateBody;
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, EventsOptionsBuilder, InspectContainerOptions, ListContainersOptionsBuilder,
    ListVolumesOptionsBuilder, LogsOptionsBuilder, RemoveContainerOptionsBuilder, RemoveVolumeOptions,
    RenameContainerOptionsBuilder, RestartContainerOptionsBuilder, StartContainerOptions, StopContainerOptionsBuilder,
    WaitContainerOptionsBuilder,
};
use bollard::{BollardRequest, ClientVersion, Docker};
use dtma_api::instance::Progress;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::sync::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use self::errors::{is_missing, sort};
use self::network::Networks;
use super::{
    Attached, Container, ContainerId, Engine, EngineError, Exec, ExecError, Executed, HeldImage, Image, Link, LogLine,
    LogOptions, Usage, Volumes,
};
use crate::instance::{DeploymentId, ImageReference, PortProtocol, RegistryCredentials, SessionOf, Spec};
use crate::store::vault::Vault;

/// How long Docker may take to begin its answer. Starting a container on a busy disk is the slowest.
const ANSWER_SECONDS: u64 = 120;
/// How long a pull may make no progress at all. Shorter than Docker's own answer may take, because a registry that is silent from the start
/// keeps Docker from answering, and that is the registry's fault and not Docker's.
const PULL_IDLE: Duration = Duration::from_secs(90);
/// The newest API version whose answers these files were written against.
const NEWEST_API: (usize, usize) = (1, 45);
/// How many containers are looked at side by side.
const INSPECTIONS: usize = 4;

/// A Docker Engine. It need not be there yet: it is connected to when it is needed, and again after it went away.
#[derive(Debug)]
pub struct DockerEngine {
    address: Address,
    scope: String,
    session: RwLock<Option<Docker>>,
    /// The agent's networks, as last seen.
    networks: Mutex<Networks>,
    /// Held while one is made.
    making: Mutex<()>,
    /// Read-held while a container is made that is to be on one, held alone while one is removed.
    creating: RwLock<()>,
    pull_idle: Duration,
    /// Where containers' secrets are.
    vault: Option<Vault>,
}

#[derive(Debug, Clone)]
enum Address {
    Unix(String),
    Http(String),
}

/// A `DOCKER_HOST` that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("DOCKER_HOST must be unix:///path, tcp://host:port or http://host:port, and is {0:?}")]
pub struct InvalidDockerHost(String);

impl DockerEngine {
    /// The engine at `docker_host`, or at `/var/run/docker.sock`. Nothing is connected to yet.
    ///
    /// # Errors
    /// When the address is none.
    pub fn connect(docker_host: Option<&str>) -> Result<Self, InvalidDockerHost> {
        let text = docker_host.unwrap_or("unix:///var/run/docker.sock");
        let address = match text.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => Address::Unix(path.to_owned()),
            Some(("tcp" | "http", host)) if !host.is_empty() => Address::Http(format!("http://{host}")),
            Some(_) | None => return Err(InvalidDockerHost(text.to_owned())),
        };
        Ok(Self {
            address,
            scope: "main".to_owned(),
            session: RwLock::new(None),
            networks: Mutex::default(),
            making: Mutex::default(),
            creating: RwLock::default(),
            pull_idle: PULL_IDLE,
            vault: None,
        })
    }

    /// The same engine for an agent of its own: it sees and touches only what it made under the same `scope`, and its network is its own.
    /// For more than one agent on one host.
    #[must_use]
    pub fn scoped(mut self, scope: &str) -> Self {
        scope.clone_into(&mut self.scope);
        self
    }

    /// The same engine, giving up on a pull when nothing at all has come for `idle`; 90 s unless said otherwise.
    #[must_use]
    pub fn pull_idle(mut self, idle: Duration) -> Self {
        self.pull_idle = idle;
        self
    }

    /// The same engine, with secrets for its containers in `vault`, which has to be on the engine's host.
    #[must_use]
    pub fn with_secrets_in(mut self, vault: Vault) -> Self {
        self.vault = Some(vault);
        self
    }

    /// Adds its secrets to the description of a container.
    async fn give_secrets(
        &self,
        docker: &Docker,
        body: &mut ContainerCreateBody,
        spec: &Spec,
        deployment: &DeploymentId,
    ) -> Result<(), EngineError> {
        const OPERATION: &str = "create the container";
        if spec.secrets.is_none() {
            return Ok(());
        }
        let Some(vault) = &self.vault else {
            let message = "this agent keeps no secrets".to_owned();
            return Err(EngineError::Refused { operation: OPERATION, message });
        };
        let image = if secrets::wraps(spec) {
            let about = docker.inspect_image(spec.image.as_str()).await.map_err(|error| sort(OPERATION, error))?;
            secrets::Start::of(about)
        } else {
            secrets::Start::default()
        };
        secrets::give(body, spec, &vault.folder(deployment), image);
        Ok(())
    }

    /// Sees to the network that a container is to be made on, and to its place there.
    async fn site(&self, docker: &Docker, spec: &Spec, deployment: &DeploymentId) -> Result<Site<'_>, EngineError> {
        let link = Link::home(&spec.network);
        // Alone, where it is given an address: so that nobody else is given the same.
        let (alone, with_others) = match link {
            Link::Listed => (Some(self.creating.write().await), None),
            Link::Open | Link::Closed | Link::Group(_) | Link::GroupOpen(_) => (None, Some(self.creating.read().await)),
        };
        let net = self.network(docker, &link).await?;
        let place = match link {
            Link::Listed => {
                make::Place { address: Some(self.free_address(docker, &net, *deployment).await?), proxy: net.gateway }
            }
            Link::Open | Link::Closed | Link::Group(_) | Link::GroupOpen(_) => make::Place::default(),
        };
        Ok(Site { place, _alone: alone, _with_others: with_others })
    }

    /// The connection, made and its API version agreed on when there is none.
    async fn docker(&self) -> Result<Docker, EngineError> {
        if let Some(docker) = &*self.session.read().await {
            return Ok(docker.clone());
        }
        self.agree().await.map(|(docker, _)| docker)
    }

    /// Agrees with the engine on an API version; its own version too. bollard puts no version into its URLs, and what an engine answers
    /// then changes when it is updated, so the version is put there.
    async fn agree(&self) -> Result<(Docker, String), EngineError> {
        const OPERATION: &str = "say its version";
        let newest = ClientVersion { major_version: NEWEST_API.0, minor_version: NEWEST_API.1 };
        let docker = match &self.address {
            Address::Unix(path) => Docker::connect_with_unix(path, ANSWER_SECONDS, &newest),
            Address::Http(url) => Docker::connect_with_http(url, ANSWER_SECONDS, &newest),
        };
        let docker = docker.map_err(|error| sort(OPERATION, error))?;
        let answer = docker.version().await.map_err(|error| sort(OPERATION, error))?;
        let parse = |text: Option<&str>| {
            let (major, minor) = text?.split_once('.')?;
            Some((major.parse::<usize>().ok()?, minor.parse::<usize>().ok()?))
        };
        let newest_there = parse(answer.api_version.as_deref()).unwrap_or(NEWEST_API);
        let oldest_there = parse(answer.min_api_version.as_deref()).unwrap_or(newest_there);
        let (major, minor) = NEWEST_API.min(newest_there).max(oldest_there);
        let docker = docker.with_request_modifier(move |request| versioned(request, major, minor));
        *self.session.write().await = Some(docker.clone());
        Ok((docker, answer.version.unwrap_or_default()))
    }

    fn our_labels(&self) -> Vec<String> {
        vec![format!("{}=true", make::MANAGED), format!("{}={}", make::SCOPE, self.scope)]
    }
}

/// Where a container is being made. While it lasts nobody else is given the same place, and its network isn't removed.
struct Site<'a> {
    place: make::Place,
    _alone: Option<RwLockWriteGuard<'a, ()>>,
    _with_others: Option<RwLockReadGuard<'a, ()>>,
}

async fn create(docker: &Docker, name: &str, body: ContainerCreateBody) -> Result<ContainerId, EngineError> {
    let options = CreateContainerOptionsBuilder::new().name(name).build();
    match docker.create_container(Some(options), body).await {
        Ok(answer) => Ok(ContainerId(answer.id)),
        Err(error) => {
            let missing = is_missing(&error);
            Err(match sort("create the container", error) {
                EngineError::ContainerGone { operation } if missing => {
                    EngineError::ImageNotFound { message: format!("it went away before Docker could {operation}") }
                }
                error => error,
            })
        }
    }
}

/// Puts the agreed API version in front of a request's path.
fn versioned(mut request: BollardRequest, major: usize, minor: usize) -> BollardRequest {
    let mut parts = request.uri().clone().into_parts();
    let path = parts.path_and_query.as_ref().map_or("/", |path| path.as_str());
    if let Ok(path) = format!("/v{major}.{minor}{path}").parse() {
        parts.path_and_query = Some(path);
        if let Ok(uri) = hyper::Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
    request
}

#[async_trait]
impl Engine for DockerEngine {
    async fn version(&self) -> Result<String, EngineError> {
        self.forget_networks().await;
        let (docker, version) = self.agree().await?;
        self.look_at_networks(&docker).await?;
        self.remove_empty_groups(&docker).await;
        Ok(version)
    }

    async fn list(&self) -> Result<Vec<Container>, EngineError> {
        let docker = self.docker().await?;
        self.look_at_networks(&docker).await?;
        let found = self.our_containers(&docker).await?;
        // The list says neither when a container started nor how often it was restarted.
        stream::iter(found.into_iter().filter_map(|summary| summary.id).map(ContainerId))
            .map(|id| async move { self.inspect(&id).await })
            .buffer_unordered(INSPECTIONS)
            .try_filter_map(|container| std::future::ready(Ok(container)))
            .try_collect()
            .await
    }

    async fn inspect(&self, id: &ContainerId) -> Result<Option<Container>, EngineError> {
        let docker = self.docker().await?;
        match docker.inspect_container(id.as_str(), None::<InspectContainerOptions>).await {
            Ok(answer) => Ok(Some(read::container(answer, &self.scope, &*self.networks.lock().await))),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(sort("inspect a container", error)),
        }
    }

    async fn image(&self, image: &ImageReference) -> Result<Option<Image>, EngineError> {
        match self.docker().await?.inspect_image(image.as_str()).await {
            Ok(answer) => Ok(Some(read::image(&answer, image))),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(sort("inspect an image", error)),
        }
    }

    async fn pull(
        &self,
        image: &ImageReference,
        credentials: Option<&RegistryCredentials>,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<(), EngineError> {
        images::pull(&self.docker().await?, image, credentials, self.pull_idle, progress).await
    }

    async fn images(&self) -> Result<Vec<HeldImage>, EngineError> {
        images::list(&self.docker().await?).await
    }

    async fn remove_image(&self, name: &str) -> Result<(), EngineError> {
        images::remove(&self.docker().await?, name).await
    }

    async fn data_root(&self) -> Result<Option<PathBuf>, EngineError> {
        // One behind a network address has its disk somewhere else.
        let Address::Unix(_) = self.address else { return Ok(None) };
        let about = self.docker().await?.info().await.map_err(|error| sort("tell about itself", error))?;
        Ok(about.docker_root_dir.map(PathBuf::from).filter(|path| path.is_absolute()))
    }

    async fn create(&self, name: &str, spec: &Spec, deployment: &DeploymentId) -> Result<ContainerId, EngineError> {
        let docker = self.docker().await?;
        let site = self.site(&docker, spec, deployment).await?;
        let mut body = make::container(spec, *deployment, &self.scope, site.place);
        self.give_secrets(&docker, &mut body, spec, deployment).await?;
        let id = create(&docker, name, body).await?;
        self.join_group(&docker, &id, spec, Some(&spec.name)).await?;
        Ok(id)
    }

    async fn create_for_session(
        &self,
        session: &SessionOf,
        spec: &Spec,
        deployment: &DeploymentId,
        like: &ContainerId,
    ) -> Result<ContainerId, EngineError> {
        const OPERATION: &str = "create the session's container";
        let docker = self.docker().await?;
        let model = docker.inspect_container(like.as_str(), None::<InspectContainerOptions>).await;
        let model = model.map_err(|error| sort(OPERATION, error))?;
        // What its name means may have changed since.
        let image = model.image.unwrap_or_else(|| spec.image.to_string());
        let site = self.site(&docker, spec, deployment).await?;
        let mut body = make::session_container(session, spec, *deployment, &self.scope, site.place, image);
        self.give_secrets(&docker, &mut body, spec, deployment).await?;
        let id = create(&docker, &session.id.container_name(), body).await?;
        self.join_group(&docker, &id, spec, None).await?;
        Ok(id)
    }

    async fn start(&self, id: &ContainerId) -> Result<(), EngineError> {
        let docker = self.docker().await?;
        match docker.start_container(id.as_str(), None::<StartContainerOptions>).await {
            Ok(()) => Ok(()),
            Err(error) if errors::is_paused(&error) => {
                let woken = docker.unpause_container(id.as_str()).await;
                woken.map_err(|error| sort("wake the container", error))
            }
            Err(error) => Err(sort("start the container", error)),
        }
    }

    async fn rename(&self, id: &ContainerId, name: &str) -> Result<(), EngineError> {
        let options = RenameContainerOptionsBuilder::new().name(name).build();
        let answer = self.docker().await?.rename_container(id.as_str(), options).await;
        answer.map_err(|error| sort("rename the container", error))
    }

    async fn adjust(&self, id: &ContainerId, spec: &Spec) -> Result<(), EngineError> {
        let answer = self.docker().await?.update_container(id.as_str(), make::adjustment(spec)).await;
        answer.map_err(|error| sort("change the container's limits", error))
    }

    async fn stop(&self, id: &ContainerId, grace_seconds: u32) -> Result<(), EngineError> {
        let grace = i32::try_from(grace_seconds).unwrap_or(i32::MAX);
        let options = StopContainerOptionsBuilder::new().t(grace).build();
        match self.docker().await?.stop_container(id.as_str(), Some(options)).await {
            Ok(()) => Ok(()),
            Err(error) if is_missing(&error) => Ok(()),
            Err(error) => Err(sort("stop the container", error)),
        }
    }

    async fn restart(&self, id: &ContainerId, grace_seconds: u32) -> Result<(), EngineError> {
        let grace = i32::try_from(grace_seconds).unwrap_or(i32::MAX);
        let options = RestartContainerOptionsBuilder::new().t(grace).build();
        let docker = self.docker().await?;
        let answer = docker.restart_container(id.as_str(), Some(options)).await;
        answer.map_err(|error| sort("restart the container", error))
    }

    async fn next_exit(&self, id: &ContainerId) -> Result<i64, EngineError> {
        const OPERATION: &str = "wait for the container's end";
        let options = WaitContainerOptionsBuilder::new().condition("next-exit").build();
        let docker = self.docker().await?;
        let mut answers = docker.wait_container(id.as_str(), Some(options));
        match answers.next().await {
            Some(Ok(answer)) => Ok(answer.status_code),
            // What bollard calls an error is a process that ended with one.
            Some(Err(bollard::errors::Error::DockerContainerWaitError { code, .. })) => Ok(code),
            Some(Err(error)) => Err(sort(OPERATION, error)),
            None => Err(EngineError::Unavailable { operation: OPERATION, source: "the answer broke off".into() }),
        }
    }

    async fn remove(&self, id: &ContainerId) -> Result<(), EngineError> {
        let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
        let docker = self.docker().await?;
        match docker.remove_container(id.as_str(), Some(options)).await {
            Ok(()) => {}
            Err(error) if is_missing(&error) || errors::is_being_removed(&error) => {}
            Err(error) => return Err(sort("remove the container", error)),
        }
        self.remove_empty_groups(&docker).await;
        Ok(())
    }

    async fn remove_volumes(&self, which: &Volumes) -> Result<(), EngineError> {
        let docker = self.docker().await?;
        let mut labels = self.our_labels();
        labels.push(match which {
            Volumes::OfInstance(name) => format!("{}={name}", make::INSTANCE),
            Volumes::OfDeployment(deployment) => format!("{}={}", make::DEPLOYMENT, deployment.0),
        });
        let options = ListVolumesOptionsBuilder::new().filters(&HashMap::from([("label".to_owned(), labels)])).build();
        let found = docker.list_volumes(Some(options)).await.map_err(|error| sort("list volumes", error))?;
        for volume in found.volumes.unwrap_or_default() {
            match docker.remove_volume(&volume.name, None::<RemoveVolumeOptions>).await {
                Ok(()) => {}
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(sort("remove a volume", error)),
            }
        }
        Ok(())
    }

    async fn egress_gateway(&self) -> Result<IpAddr, EngineError> {
        const OPERATION: &str = "make the network for allow-lists";
        let net = self.network(&self.docker().await?, &Link::Listed).await?;
        let gateway = net.gateway.ok_or_else(|| EngineError::Failed {
            operation: OPERATION,
            message: "the network has no gateway address".to_owned(),
        })?;
        Ok(gateway.into())
    }

    async fn port_holder(&self, port: u16, protocol: PortProtocol) -> Result<Option<String>, EngineError> {
        // Only running containers hold ports, and those are what is listed without `all`.
        let found = self
            .docker()
            .await?
            .list_containers(Some(ListContainersOptionsBuilder::new().build()))
            .await
            .map_err(|error| sort("list containers", error))?;
        Ok(found.into_iter().find(|summary| read::publishes(summary, port, protocol)).and_then(read::name))
    }

    async fn environment(&self, id: &ContainerId) -> Result<Vec<(String, String)>, EngineError> {
        let answer = self.docker().await?.inspect_container(id.as_str(), None::<InspectContainerOptions>).await;
        let answer = answer.map_err(|error| sort("inspect a container", error))?;
        let variables = answer.config.and_then(|config| config.env).unwrap_or_default();
        let pairs = variables.iter().filter_map(|variable| variable.split_once('='));
        Ok(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    async fn attach(&self, id: &ContainerId) -> Result<Attached, EngineError> {
        attach::attach(&self.docker().await?, id).await
    }

    async fn exec(&self, id: &ContainerId, exec: &Exec) -> Result<Executed, ExecError> {
        exec::run(&self.docker().await?, id, exec).await
    }

    async fn usage(&self, id: &ContainerId) -> Result<Option<Usage>, EngineError> {
        stats::read(&self.docker().await?, id).await
    }

    fn changes(&self) -> BoxStream<'static, Result<(), EngineError>> {
        const OPERATION: &str = "report changes";
        let session = match self.session.try_read() {
            Ok(session) => session.clone(),
            Err(_) => None,
        };
        let Some(docker) = session else { return stream::empty().boxed() };
        let kinds = ["create", "start", "die", "destroy", "pause", "unpause", "rename", "update", "oom"];
        let filters = HashMap::from([
            ("type".to_owned(), vec!["container".to_owned()]),
            ("label".to_owned(), self.our_labels()),
            ("event".to_owned(), kinds.map(str::to_owned).to_vec()),
        ]);
        // From a little earlier, so that nothing falls between the last look and this.
        let since = jiff::Timestamp::now().as_second().saturating_sub(2).to_string();
        let options = EventsOptionsBuilder::new().since(&since).filters(&filters).build();
        docker.events(Some(options)).map(|event| event.map(|_| ()).map_err(|error| sort(OPERATION, error))).boxed()
    }

    fn logs(&self, id: &ContainerId, options: LogOptions) -> BoxStream<'static, Result<LogLine, EngineError>> {
        const OPERATION: &str = "read logs";
        let session = match self.session.try_read() {
            Ok(session) => session.clone(),
            Err(_) => None,
        };
        let Some(docker) = session else {
            let source = "there is no connection to Docker".into();
            return stream::iter([Err(EngineError::Unavailable { operation: OPERATION, source })]).boxed();
        };
        let mut query = LogsOptionsBuilder::new().stdout(true).stderr(true).timestamps(true).follow(options.follow);
        if let Some(tail) = options.tail {
            query = query.tail(&tail.to_string());
        }
        // Docker takes whole seconds here; the rest is sorted out line by line.
        if let Some(since) = options.since.and_then(|since| i32::try_from(since.as_second()).ok()) {
            query = query.since(since);
        }
        let lines = docker.logs(id.as_str(), Some(query.build()));
        lines
            .map(|output| output.map(read::line).map_err(|error| sort(OPERATION, error)))
            .try_filter(move |line| {
                std::future::ready(options.since.is_none_or(|since| line.at.is_none_or(|at| at >= since)))
            })
            .boxed()
    }
}
