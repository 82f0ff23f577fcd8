//! The host's Docker Engine, as far as a stack needs it: its network, what it made there, commands inside droplets.

use std::collections::HashMap;

use bollard::Docker;
use bollard::container::LogOutput;
use bollard::exec::{CreateExecOptions, StartExecResults};
use bollard::models::{Ipam, IpamConfig, NetworkCreateRequest};
use bollard::query_parameters::{
    ListContainersOptionsBuilder, ListNetworksOptionsBuilder, ListVolumesOptionsBuilder, RemoveContainerOptionsBuilder,
    RemoveVolumeOptionsBuilder,
};
use futures_util::StreamExt as _;

use crate::error::{Result, StackError};

/// Everything a stack makes in Docker bears this label; its value is the stack's id.
pub const STACK_LABEL: &str = "dtma.stack";

/// What the local cloud's container with the metadata address bears, too. It is there as long as the stack, like its network.
const METADATA_LABEL: &str = "dtma.metadata";

/// What a command inside a droplet did.
#[derive(Debug, Clone)]
pub struct ExecOutput {
    /// Its exit code.
    pub exit_code: i64,
    /// What it wrote.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

/// What is left of a stack in Docker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leftovers {
    /// Containers in any state.
    pub containers: usize,
    /// Volumes.
    pub volumes: usize,
}

/// A connection to the engine.
#[derive(Debug, Clone)]
pub struct Engine(Docker);

impl Engine {
    /// Connects to the socket in `DOCKER_HOST`, or the usual one.
    ///
    /// # Errors
    /// When nothing answers there.
    pub async fn connect() -> Result<Self> {
        let docker = Docker::connect_with_defaults().map_err(StackError::docker("connect"))?;
        docker.negotiate_version().await.map(Self).map_err(StackError::docker("ask for its version"))
    }

    pub(crate) fn api(&self) -> &Docker {
        &self.0
    }

    /// Makes the stack's network if it isn't there, and tells its gateway: the host's own address on it.
    ///
    /// # Errors
    /// When Docker refuses.
    pub async fn network(&self, stack: &str) -> Result<String> {
        let name = network_name(stack);
        if self.0.inspect_network(&name, None).await.is_err() {
            self.make_network(stack, None).await?;
            // Droplets keep their addresses, and Docker takes a fixed address only where the subnet was asked for. So it is
            // asked for, once Docker has found a free one.
            let free = self.subnet(&name).await?;
            self.0.remove_network(&name).await.map_err(StackError::docker(format!("remove network {name}")))?;
            self.make_network(stack, Some(free)).await?;
        }
        let gateway = self.subnet(&name).await?.gateway;
        gateway.ok_or_else(|| StackError::DockerAnswer(format!("network {name} has no gateway address")))
    }

    async fn make_network(&self, stack: &str, subnet: Option<IpamConfig>) -> Result<()> {
        let name = network_name(stack);
        let request = NetworkCreateRequest {
            name: name.clone(),
            driver: Some("bridge".to_owned()),
            labels: Some(HashMap::from([(STACK_LABEL.to_owned(), stack.to_owned())])),
            ipam: subnet.map(|subnet| Ipam { config: Some(vec![subnet]), ..Ipam::default() }),
            ..NetworkCreateRequest::default()
        };
        self.0.create_network(request).await.map_err(StackError::docker(format!("create network {name}")))?;
        Ok(())
    }

    /// The network's IPv4 subnet, with its gateway.
    async fn subnet(&self, name: &str) -> Result<IpamConfig> {
        let network = self.0.inspect_network(name, None).await;
        let network = network.map_err(StackError::docker(format!("look at network {name}")))?;
        let mut configs = network.ipam.and_then(|ipam| ipam.config).unwrap_or_default().into_iter();
        configs
            .find(|config| config.subnet.as_deref().is_some_and(|subnet| !subnet.contains(':')))
            .ok_or_else(|| StackError::DockerAnswer(format!("network {name} has no IPv4 subnet")))
    }

    /// What bears the stack's label now and isn't there as long as the stack itself.
    ///
    /// # Errors
    /// When Docker can't be asked.
    pub async fn leftovers(&self, stack: &str) -> Result<Leftovers> {
        let all = self.containers(&format!("{STACK_LABEL}={stack}")).await?.len();
        let stays = self.containers_with(&[format!("{STACK_LABEL}={stack}"), METADATA_LABEL.to_owned()]).await?.len();
        Ok(Leftovers { containers: all.saturating_sub(stays), volumes: self.volumes(stack).await?.len() })
    }

    /// Removes every container, volume and network bearing the stack's label.
    ///
    /// # Errors
    /// The first thing that could not be removed; the rest is removed all the same.
    pub async fn sweep(&self, stack: &str) -> Result<()> {
        let mut outcome = Ok(());
        for container in self.containers(&format!("{STACK_LABEL}={stack}")).await? {
            let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
            let removed = self.0.remove_container(&container, Some(options)).await;
            keep_first(&mut outcome, removed, || format!("remove container {container}"));
        }
        for volume in self.volumes(stack).await? {
            let options = RemoveVolumeOptionsBuilder::new().force(true).build();
            let removed = self.0.remove_volume(&volume, Some(options)).await;
            keep_first(&mut outcome, removed, || format!("remove volume {volume}"));
        }
        let filters = HashMap::from([("label", vec![format!("{STACK_LABEL}={stack}")])]);
        let options = ListNetworksOptionsBuilder::new().filters(&filters).build();
        let networks = self.0.list_networks(Some(options)).await.map_err(StackError::docker("list networks"))?;
        for network in networks.into_iter().filter_map(|network| network.name) {
            let removed = self.0.remove_network(&network).await;
            keep_first(&mut outcome, removed, || format!("remove network {network}"));
        }
        outcome
    }

    /// Ids of every stack that left anything in Docker.
    pub(crate) async fn stacks(&self) -> Result<Vec<String>> {
        let filters = HashMap::from([("label", vec![STACK_LABEL.to_owned()])]);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
        let containers = self.0.list_containers(Some(options)).await.map_err(StackError::docker("list containers"))?;
        let options = ListNetworksOptionsBuilder::new().filters(&filters).build();
        let networks = self.0.list_networks(Some(options)).await.map_err(StackError::docker("list networks"))?;
        let labels = containers.into_iter().map(|container| container.labels);
        let labels = labels.chain(networks.into_iter().map(|network| network.labels));
        let mut ids: Vec<String> = labels.flatten().filter_map(|mut labels| labels.remove(STACK_LABEL)).collect();
        ids.sort();
        ids.dedup();
        Ok(ids)
    }

    /// Runs a command as root in the container of one droplet.
    ///
    /// # Errors
    /// When there is no such droplet, or the command can't be started.
    pub async fn exec_in_droplet(&self, stack: &str, droplet: i64, command: &[&str]) -> Result<ExecOutput> {
        let filters = [format!("{STACK_LABEL}={stack}"), format!("dtma.droplet={droplet}")];
        let containers = self.containers_with(&filters).await?;
        let container = containers
            .first()
            .ok_or_else(|| StackError::DockerAnswer(format!("droplet {droplet} has no container")))?;
        let doing = format!("run `{}` in droplet {droplet}", command.join(" "));
        let options = CreateExecOptions {
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            cmd: Some(command.to_vec()),
            ..CreateExecOptions::default()
        };
        let exec = self.0.create_exec(container, options).await.map_err(StackError::docker(doing.clone()))?;
        let started = self.0.start_exec(&exec.id, None).await.map_err(StackError::docker(doing.clone()))?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        if let StartExecResults::Attached { mut output, .. } = started {
            while let Some(chunk) = output.next().await {
                match chunk.map_err(StackError::docker(doing.clone()))? {
                    LogOutput::StdErr { message } => stderr.extend_from_slice(&message),
                    LogOutput::StdOut { message } | LogOutput::StdIn { message } | LogOutput::Console { message } => {
                        stdout.extend_from_slice(&message)
                    }
                }
            }
        }
        let ended = self.0.inspect_exec(&exec.id).await.map_err(StackError::docker(doing))?;
        Ok(ExecOutput {
            exit_code: ended.exit_code.unwrap_or(-1),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        })
    }

    async fn containers(&self, label: &str) -> Result<Vec<String>> {
        self.containers_with(&[label.to_owned()]).await
    }

    async fn containers_with(&self, labels: &[String]) -> Result<Vec<String>> {
        let filters = HashMap::from([("label", labels.to_vec())]);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
        let containers = self.0.list_containers(Some(options)).await.map_err(StackError::docker("list containers"))?;
        Ok(containers.into_iter().filter_map(|container| container.id).collect())
    }

    async fn volumes(&self, stack: &str) -> Result<Vec<String>> {
        let filters = HashMap::from([("label", vec![format!("{STACK_LABEL}={stack}")])]);
        let options = ListVolumesOptionsBuilder::new().filters(&filters).build();
        let listed = self.0.list_volumes(Some(options)).await.map_err(StackError::docker("list volumes"))?;
        Ok(listed.volumes.unwrap_or_default().into_iter().map(|volume| volume.name).collect())
    }
}

/// Name of a stack's Docker network.
pub fn network_name(stack: &str) -> String {
    format!("dtma-{stack}")
}

fn keep_first(
    outcome: &mut Result<()>,
    step: std::result::Result<(), bollard::errors::Error>,
    doing: impl FnOnce() -> String,
) {
    match step {
        // Somebody else was quicker.
        Ok(()) | Err(bollard::errors::Error::DockerResponseServerError { status_code: 404, .. }) => {}
        Err(error) if outcome.is_ok() => *outcome = Err(StackError::docker(doing())(error)),
        Err(_) => {}
    }
}
