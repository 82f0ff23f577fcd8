//! Droplets as system containers of this machine's Docker Engine.
//!
//! What must hold: every container and volume bears `dtma.stack` and `dtma.droplet`; a droplet's address is given explicitly, so that it
//! survives power cuts and pulled cables; nothing of a droplet outlives [`Host::remove`], its control groups included.

mod container;
mod images;
mod metadata;
mod stirrings;

use std::collections::{BTreeSet, HashMap};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use bollard::Docker;
use bollard::errors::Error as DockerError;
use bollard::models::{NetworkConnectRequest, NetworkDisconnectRequest, VolumeCreateRequest};
use bollard::query_parameters::{
    CreateContainerOptions, DownloadFromContainerOptionsBuilder, InspectContainerOptions, InspectNetworkOptions,
    KillContainerOptionsBuilder, ListContainersOptionsBuilder, ListVolumesOptionsBuilder, LogsOptionsBuilder,
    RemoveContainerOptionsBuilder, RemoveVolumeOptions, StartContainerOptions, StopContainerOptionsBuilder,
    UploadToContainerOptionsBuilder,
};
use futures_util::TryStreamExt;
use futures_util::stream::BoxStream;
use tokio::sync::{Mutex, mpsc};

use self::container::{Engine, SystemContainer, fixed_address, link_local};
pub use self::images::DockerImages;
use self::metadata::{Door, METADATA_LABEL};
use super::seed::{Seed, reachable_name_servers};
use super::{Attachment, Found, Host, HostError, Power, Record, Vitals};
use crate::droplet::DropletId;
use crate::image::{self, PackageSource};
use crate::subnet::{AddressPool, Subnet};

const STACK_LABEL: &str = "dtma.stack";
const DROPLET_LABEL: &str = "dtma.droplet";
const RECORD_LABEL: &str = "dtma.droplet.record";
const ADDRESS_LABEL: &str = "dtma.droplet.address";

/// How long an orderly shutdown may take before the power is cut.
const SHUTDOWN_SECONDS: i32 = 60;

/// Bound on one answer of the engine. Longer than an orderly shutdown, and than the import of a root file system.
const ENGINE_TIMEOUT: Duration = Duration::from_secs(180);

/// How a [`DockerHost`] makes droplets.
#[derive(Debug, Clone)]
pub struct DockerHostOptions {
    /// Names this cloud's containers and volumes among others'.
    pub stack: String,
    /// Docker network the droplets are on. Made with an explicit subnet: the engine refuses fixed addresses on any other.
    pub network: String,
    /// Registry (`host:port`) droplets may pull from without TLS.
    pub registry: Option<String>,
    /// Where base images' packages come from; part of the images' names.
    pub packages: PackageSource,
    /// Folder for the lock and the passing files of base-image builds.
    pub image_cache: PathBuf,
    /// Takes the listeners at the droplets' metadata address, to be served by [`crate::metadata::serve`]. Without it nobody has that address.
    pub metadata: Option<mpsc::UnboundedSender<std::net::TcpListener>>,
}

/// The Docker Engine of this machine.
pub struct DockerHost {
    docker: Docker,
    options: DockerHostOptions,
    engine: Engine,
    addresses: Mutex<AddressPool>,
    subnet: Subnet,
    gateway: Ipv4Addr,
    door: Option<Door>,
}

/// Why the Docker Engine could not be used.
#[derive(Debug, thiserror::Error)]
#[error("{operation} failed")]
pub struct ConnectError {
    operation: String,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl ConnectError {
    fn new(operation: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { operation: operation.into(), source: source.into() }
    }
}

/// This machine's Docker Engine, as `DOCKER_HOST` or the usual socket has it.
fn connect() -> Result<Docker, ConnectError> {
    let docker =
        Docker::connect_with_defaults().map_err(|error| ConnectError::new("connecting to the Docker Engine", error))?;
    Ok(docker.with_timeout(ENGINE_TIMEOUT))
}

impl DockerHost {
    /// Connects and learns what kind of engine it is.
    ///
    /// # Errors
    /// When the engine doesn't answer or the network isn't there or has no IPv4 subnet.
    pub async fn connect(options: DockerHostOptions) -> Result<Self, ConnectError> {
        let docker = connect()?;
        let info =
            docker.info().await.map_err(|error| ConnectError::new("asking the Docker Engine about itself", error))?;
        let looking = |error: Box<dyn std::error::Error + Send + Sync>| {
            ConnectError::new(format!("looking at Docker network {}", options.network), error)
        };
        let network = docker
            .inspect_network(&options.network, None::<InspectNetworkOptions>)
            .await
            .map_err(|error| looking(error.into()))?;
        let configs = network.ipam.and_then(|ipam| ipam.config).unwrap_or_default();
        let (subnet, gateway) = configs
            .iter()
            .find_map(|config| {
                let subnet = config.subnet.as_deref()?.parse::<Subnet>().ok()?;
                Some((subnet, config.gateway.as_deref().and_then(|gateway| gateway.parse().ok())))
            })
            .ok_or_else(|| looking("it has no IPv4 subnet".into()))?;
        // Docker doesn't tell the one it chose itself, which is the first.
        let gateway = gateway.unwrap_or_else(|| subnet.first());
        let door = options.metadata.clone();
        let door = door.map(|listeners| Door::new(&docker, &options.stack, &options.network, listeners));
        let addresses = Mutex::new(AddressPool::new(subnet, BTreeSet::from([gateway])));
        let host = Self { docker, engine: Engine::of(&info), addresses, subnet, gateway, door, options };
        let found = host.found().await.map_err(|error| ConnectError::new("looking for droplets", error))?;
        if let Some(recipe) = found.first().and_then(|found| image::find(&found.record.image)) {
            let image = recipe.reference(&host.options.packages);
            host.open_door(&image).await.map_err(|error| ConnectError::new("opening the metadata address", error))?;
        }
        for found in found {
            host.addresses.lock().await.restore(found.record.id, found.address);
        }
        Ok(host)
    }

    async fn open_door(&self, image: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        match &self.door {
            Some(door) => door.ensure(image).await,
            None => Ok(()),
        }
    }

    /// Removes every container and volume of `stack`, whoever made them. Answers with how many droplets there were.
    ///
    /// # Errors
    /// When the engine doesn't answer or refuses.
    pub async fn destroy(stack: &str) -> Result<usize, ConnectError> {
        let docker = connect()?;
        let failed = |error| ConnectError::new(format!("removing what stack {stack} left"), error);
        let label = stack_filter(stack);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&label).build();
        let containers = docker.list_containers(Some(options)).await.map_err(failed)?;
        let mut droplets = 0;
        for container in containers {
            let bears = |label| container.labels.as_ref().is_some_and(|labels| labels.contains_key(label));
            droplets += usize::from(bears(DROPLET_LABEL));
            if let Some(id) = container.id.as_deref().filter(|_| bears(DROPLET_LABEL) || bears(METADATA_LABEL)) {
                tolerate(remove_container(&docker, id).await, &[404, 409]).map_err(failed)?;
            }
        }
        let volumes = docker
            .list_volumes(Some(ListVolumesOptionsBuilder::default().filters(&label).build()))
            .await
            .map_err(failed)?;
        for volume in volumes.volumes.unwrap_or_default() {
            if volume.labels.contains_key(DROPLET_LABEL) {
                tolerate(docker.remove_volume(&volume.name, None::<RemoveVolumeOptions>).await, &[404])
                    .map_err(failed)?;
            }
        }
        Ok(droplets)
    }

    /// The steps of [`Host::create`]; on an error the caller removes what they made.
    async fn make(
        &self,
        record: &Record,
        user_data: Option<&str>,
        address: Ipv4Addr,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let recipe = image::find(&record.image).ok_or_else(|| format!("there is no base image {}", record.image))?;
        let image = {
            let store = DockerImages::of(&self.docker);
            image::ensure(recipe, &self.options.packages, &store, &self.options.image_cache).await?.reference
        };
        self.open_door(&image).await?;
        let labels = self.labels(record, address)?;
        let volume = self.volume_name(record.id);
        self.docker
            .create_volume(VolumeCreateRequest {
                name: Some(volume.clone()),
                labels: Some(labels.clone()),
                ..Default::default()
            })
            .await?;
        let body = SystemContainer {
            image,
            host_name: &record.name,
            network: &self.options.network,
            address,
            docker_volume: &volume,
            labels,
            engine: self.engine,
        }
        .body();
        let name = self.container_name(record.id);
        let options = CreateContainerOptions { name: Some(name.clone()), ..Default::default() };
        let created = self.docker.create_container(Some(options), body).await?;
        let mut machine_id = [0_u8; 16];
        getrandom::fill(&mut machine_id)?;
        let seed = Seed {
            record,
            user_data,
            machine_id: &hex::encode(machine_id),
            registry: self.options.registry.as_deref(),
            name_servers: &name_servers().await,
            control_group: self.engine.nested_control_group(&created.id),
        };
        let upload = UploadToContainerOptionsBuilder::default().path("/").build();
        self.docker.upload_to_container(&name, Some(upload), bollard::body_full(seed.archive()?.into())).await?;
        self.docker.start_container(&name, None::<StartContainerOptions>).await?;
        Ok(())
    }

    fn labels(&self, record: &Record, address: Ipv4Addr) -> Result<HashMap<String, String>, serde_json::Error> {
        Ok(HashMap::from([
            (STACK_LABEL.to_owned(), self.options.stack.clone()),
            (DROPLET_LABEL.to_owned(), record.id.to_string()),
            (RECORD_LABEL.to_owned(), serde_json::to_string(record)?),
            (ADDRESS_LABEL.to_owned(), address.to_string()),
        ]))
    }

    fn volume_name(&self, droplet: DropletId) -> String {
        format!("{}-docker", self.container_name(droplet))
    }

    async fn address_of(&self, droplet: DropletId) -> Result<Ipv4Addr, HostError> {
        let lease = self.addresses.lock().await.of(droplet);
        lease.ok_or_else(|| failure("finding the address", droplet)("it has none".into()))
    }

    async fn is_connected(&self, droplet: DropletId) -> Result<bool, DockerError> {
        let container =
            self.docker.inspect_container(&self.container_name(droplet), None::<InspectContainerOptions>).await?;
        let networks = container.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
        Ok(networks.contains_key(&self.options.network))
    }

    /// The record with the tags the droplet was given since, where it was given or lost any.
    async fn with_later_tags(&self, mut record: Record) -> Result<Record, HostError> {
        let failed = failure("reading the tags", record.id);
        let text = self.file(record.id, stirrings::TAGS_FILE).await.map_err(failed)?;
        if !text.is_empty() {
            record.tags = serde_json::from_str(&text).map_err(|error| failed(error.into()))?;
        }
        Ok(record)
    }

    /// A text file of a droplet, running or not; nothing when it isn't there.
    async fn file(&self, droplet: DropletId, path: &str) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
        let options = DownloadFromContainerOptionsBuilder::default().path(path).build();
        let download = self.docker.download_from_container(&self.container_name(droplet), Some(options));
        let chunks: Vec<_> = match download.try_collect().await {
            Err(DockerError::DockerResponseServerError { status_code: 404, .. }) => return Ok(String::new()),
            other => other?,
        };
        let bytes = chunks.concat();
        let mut text = String::new();
        for entry in tar::Archive::new(bytes.as_slice()).entries()? {
            let mut contents = Vec::new();
            std::io::Read::read_to_end(&mut entry?, &mut contents)?;
            text.push_str(&String::from_utf8_lossy(&contents));
        }
        Ok(text)
    }
}

#[async_trait]
impl Host for DockerHost {
    async fn create(&self, record: &Record, user_data: Option<&str>) -> Result<Ipv4Addr, HostError> {
        let failed = failure("creation", record.id);
        let address = self
            .addresses
            .lock()
            .await
            .lease(record.id)
            .ok_or_else(|| failed("the network has no free address".into()))?;
        match self.make(record, user_data, address).await {
            Ok(()) => Ok(address),
            Err(error) => {
                if let Err(left) = self.remove(record.id).await {
                    tracing::warn!(droplet = %record.id, error = %left, "a failed creation left something behind");
                }
                Err(failed(error))
            }
        }
    }

    async fn power(&self, droplet: DropletId, power: Power) -> Result<(), HostError> {
        let name = self.container_name(droplet);
        let result = match power {
            Power::Cut => {
                let options = KillContainerOptionsBuilder::default().signal("SIGKILL").build();
                // 409: it isn't running.
                tolerate(self.docker.kill_container(&name, Some(options)).await, &[409])
            }
            Power::Shutdown => {
                let options = StopContainerOptionsBuilder::default().t(SHUTDOWN_SECONDS).build();
                tolerate(self.docker.stop_container(&name, Some(options)).await, &[304])
            }
            Power::On => tolerate(self.docker.start_container(&name, None::<StartContainerOptions>).await, &[304]),
        };
        result.map_err(|error| failure("changing the power", droplet)(error.into()))
    }

    async fn connect(&self, droplet: DropletId, connected: bool) -> Result<(), HostError> {
        let failed = failure("plugging the network", droplet);
        if self.is_connected(droplet).await.map_err(|error| failed(error.into()))? == connected {
            return Ok(());
        }
        let container = self.container_name(droplet);
        let result = if connected {
            let endpoint_config = Some(fixed_address(self.address_of(droplet).await?));
            self.docker
                .connect_network(&self.options.network, NetworkConnectRequest { container, endpoint_config })
                .await
        } else {
            let request = NetworkDisconnectRequest { container, force: Some(true) };
            self.docker.disconnect_network(&self.options.network, request).await
        };
        result.map_err(|error| failed(error.into()))
    }

    async fn remove(&self, droplet: DropletId) -> Result<(), HostError> {
        let failed = failure("removal", droplet);
        tolerate(remove_container(&self.docker, &self.container_name(droplet)).await, &[404])
            .map_err(|error| failed(error.into()))?;
        tolerate(self.docker.remove_volume(&self.volume_name(droplet), None::<RemoveVolumeOptions>).await, &[404])
            .map_err(|error| failed(error.into()))?;
        self.addresses.lock().await.release(droplet);
        Ok(())
    }

    async fn found(&self) -> Result<Vec<Found>, HostError> {
        let options =
            ListContainersOptionsBuilder::default().all(true).filters(&stack_filter(&self.options.stack)).build();
        let containers = self
            .docker
            .list_containers(Some(options))
            .await
            .map_err(|error| failure("finding", DropletId(0))(error.into()))?;
        let mut found = Vec::new();
        for container in containers {
            let labels = container.labels.unwrap_or_default();
            let record = labels.get(RECORD_LABEL).and_then(|text| serde_json::from_str::<Record>(text).ok());
            let address = labels.get(ADDRESS_LABEL).and_then(|text| text.parse().ok());
            if let (Some(record), Some(address)) = (record, address) {
                let state = container.state.map(|state| state.to_string()).unwrap_or_default();
                if state == "created" {
                    // Its maker died before it could boot; nobody was ever told it runs.
                    self.remove(record.id).await?;
                } else {
                    // One that was rebooting when its cloud ended has power: it is only waiting to be started again.
                    let running = state == "running" || stirrings::rebooting(container.status.as_deref());
                    found.push(Found { record: self.with_later_tags(record).await?, address, running });
                }
            }
        }
        Ok(found)
    }

    async fn console(&self, droplet: DropletId) -> Result<String, HostError> {
        let failed = failure("reading the console", droplet);
        let options = LogsOptionsBuilder::default().stdout(true).stderr(true).tail("2000").build();
        let chunks: Vec<_> = self
            .docker
            .logs(&self.container_name(droplet), Some(options))
            .map_ok(bollard::container::LogOutput::into_bytes)
            .try_collect()
            .await
            .map_err(|error| failed(error.into()))?;
        let boot = String::from_utf8_lossy(&chunks.concat()).replace('\r', "");
        let output = self.file(droplet, "/var/log/cloud-init-output.log").await.map_err(failed)?;
        Ok(format!("{boot}\n--- /var/log/cloud-init-output.log\n{output}"))
    }

    async fn vitals(&self, droplet: DropletId) -> Result<Vitals, HostError> {
        let inspected =
            self.docker.inspect_container(&self.container_name(droplet), None::<InspectContainerOptions>).await;
        let container = inspected.map_err(|error| failure("looking at the power", droplet)(error.into()))?;
        Ok(stirrings::vitals(container.state.as_ref()))
    }

    fn stirrings(&self) -> BoxStream<'_, DropletId> {
        stirrings::stirrings(&self.docker, &self.options.stack)
    }

    async fn keep_tags(&self, droplet: DropletId, tags: &[String]) -> Result<(), HostError> {
        let failed = failure("keeping the tags", droplet);
        let archive = stirrings::tags_archive(tags).map_err(|error| failed(error.into()))?;
        let upload = UploadToContainerOptionsBuilder::default().path("/").build();
        let body = bollard::body_full(archive.into());
        let uploaded = self.docker.upload_to_container(&self.container_name(droplet), Some(upload), body).await;
        uploaded.map_err(|error| failed(error.into()))
    }

    async fn droplet_at(&self, address: Ipv4Addr) -> Option<DropletId> {
        self.addresses.lock().await.holder(|own| own == address || link_local(own) == address)
    }

    async fn attachment(&self, droplet: DropletId) -> Result<Attachment, HostError> {
        let failed = failure("looking at the attachment", droplet);
        let name = self.container_name(droplet);
        let container = self.docker.inspect_container(&name, None::<InspectContainerOptions>).await;
        let container = container.map_err(|error| failed(error.into()))?;
        let mut networks = container.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
        let endpoint = networks.remove(&self.options.network);
        Ok(Attachment {
            user_data: self.file(droplet, &format!("/{}", super::seed::USER_DATA)).await.map_err(failed)?,
            address: self.address_of(droplet).await?,
            netmask: self.subnet.mask(),
            gateway: self.gateway,
            mac: endpoint.and_then(|endpoint| endpoint.mac_address).unwrap_or_default(),
            name_servers: name_servers().await,
        })
    }

    fn container_name(&self, droplet: DropletId) -> String {
        format!("dtma-{}-{droplet}", self.options.stack)
    }
}

/// Name servers a droplet's containers can reach.
async fn name_servers() -> Vec<String> {
    reachable_name_servers(&tokio::fs::read_to_string("/etc/resolv.conf").await.unwrap_or_default())
}

fn stack_filter(stack: &str) -> HashMap<String, Vec<String>> {
    HashMap::from([("label".to_owned(), vec![format!("{STACK_LABEL}={stack}")])])
}

async fn remove_container(docker: &Docker, container: &str) -> Result<(), DockerError> {
    let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
    docker.remove_container(container, Some(options)).await
}

/// Takes these statuses for a success: they say that what was asked for is so already.
fn tolerate(result: Result<(), DockerError>, statuses: &[u16]) -> Result<(), DockerError> {
    match result {
        Err(DockerError::DockerResponseServerError { status_code, .. }) if statuses.contains(&status_code) => Ok(()),
        other => other,
    }
}

fn failure(
    operation: &'static str,
    droplet: DropletId,
) -> impl Fn(Box<dyn std::error::Error + Send + Sync>) -> HostError + Copy {
    move |source| HostError { operation, droplet, source }
}
