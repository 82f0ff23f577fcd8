//! The metadata service's place on the droplets' network: a container that does nothing but have the address, and a listener of ours in its
//! network namespace. So the service answers from within this process and its traffic goes the way a cloud's would: off the droplet,
//! over its network.

use std::collections::HashMap;
use std::fs::File;
use std::net::TcpListener;
use std::os::fd::AsFd as _;

use bollard::Docker;
use bollard::errors::Error as DockerError;
use bollard::models::{ContainerCreateBody, EndpointIpamConfig, EndpointSettings, HostConfig, NetworkingConfig};
use bollard::query_parameters::{CreateContainerOptions, InspectContainerOptions, StartContainerOptions};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::{Mutex, mpsc};

use super::{STACK_LABEL, tolerate};
use crate::metadata;

/// Label of the container that has the address.
pub(super) const METADATA_LABEL: &str = "dtma.metadata";

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The address on one stack's network.
pub(super) struct Door {
    docker: Docker,
    name: String,
    stack: String,
    network: String,
    listeners: mpsc::UnboundedSender<TcpListener>,
    /// The process whose network namespace has our listener.
    open: Mutex<Option<i64>>,
}

impl Door {
    pub(super) fn new(
        docker: &Docker,
        stack: &str,
        network: &str,
        listeners: mpsc::UnboundedSender<TcpListener>,
    ) -> Self {
        Self {
            docker: docker.clone(),
            name: format!("dtma-{stack}-metadata"),
            stack: stack.to_owned(),
            network: network.to_owned(),
            listeners,
            open: Mutex::new(None),
        }
    }

    /// Sees that the address is there and that we listen at it. `image` is any image with a `sleep` in it.
    pub(super) async fn ensure(&self, image: &str) -> Result<(), Failure> {
        let mut open = self.open.lock().await;
        let process = match self.process().await? {
            Some(process) => process,
            None => {
                self.start(image).await?;
                self.process().await?.ok_or("the container with the metadata address ended at once")?
            }
        };
        if *open == Some(process) {
            return Ok(());
        }
        let listener = tokio::task::spawn_blocking(move || listen_beside(process)).await??;
        // Whoever serves ends with this process, so nobody is left to tell.
        let _ = self.listeners.send(listener);
        *open = Some(process);
        Ok(())
    }

    /// The container's process, when it runs.
    async fn process(&self) -> Result<Option<i64>, DockerError> {
        match self.docker.inspect_container(&self.name, None::<InspectContainerOptions>).await {
            Ok(container) => Ok(container.state.and_then(|state| state.pid).filter(|process| *process > 0)),
            Err(DockerError::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn start(&self, image: &str) -> Result<(), DockerError> {
        let endpoint = EndpointSettings {
            ipam_config: Some(EndpointIpamConfig {
                link_local_ips: Some(vec![metadata::ADDRESS.to_string()]),
                ..Default::default()
            }),
            ..Default::default()
        };
        let body = ContainerCreateBody {
            image: Some(image.to_owned()),
            cmd: Some(vec!["sleep".to_owned(), "infinity".to_owned()]),
            labels: Some(HashMap::from([
                (STACK_LABEL.to_owned(), self.stack.clone()),
                (METADATA_LABEL.to_owned(), "true".to_owned()),
            ])),
            host_config: Some(HostConfig { network_mode: Some(self.network.clone()), ..Default::default() }),
            networking_config: Some(NetworkingConfig {
                endpoints_config: Some(HashMap::from([(self.network.clone(), endpoint)])),
            }),
            ..Default::default()
        };
        let options = CreateContainerOptions { name: Some(self.name.clone()), ..Default::default() };
        // 409: it is there and doesn't run, as after a reboot of this machine.
        tolerate(self.docker.create_container(Some(options), body).await.map(drop), &[409])?;
        tolerate(self.docker.start_container(&self.name, None::<StartContainerOptions>).await, &[304])
    }
}

/// A listener in the network namespace of another process. The thread that goes there is thrown away: nothing else may ever run in it.
fn listen_beside(process: i64) -> Result<TcpListener, Failure> {
    let namespace = File::open(format!("/proc/{process}/ns/net"))?;
    let thread = std::thread::Builder::new().name("metadata".to_owned()).spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        let listener = TcpListener::bind((metadata::ADDRESS, 80))?;
        listener.set_nonblocking(true)?;
        Ok::<_, std::io::Error>(listener)
    })?;
    Ok(thread.join().map_err(|_| "the thread that opens the metadata address broke off")??)
}
