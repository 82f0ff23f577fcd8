//! The machine that carries the droplets, as the cloud needs it: a few verbs on system containers.
//!
//! [`Host`] is the seam; [`DockerHost`] is its one real adapter; its folder is the only place of this crate that names bollard. Knows nothing of
//! the API, its identifiers' lifetimes, or of faults.

mod docker;
mod seed;

use std::net::Ipv4Addr;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use docker::{ConnectError, DockerHost, DockerHostOptions, DockerImages};

use crate::droplet::DropletId;

/// What is known of a droplet from its creation on. Travels in a label of its container, so that a cloud started anew finds it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The droplet.
    pub id: DropletId,
    /// Its name, which is its host name too.
    pub name: String,
    /// Slug of its region.
    pub region: String,
    /// Slug of its size.
    pub size: String,
    /// Slug of its base image.
    pub image: String,
    /// Its tags.
    pub tags: Vec<String>,
    /// When its creation was accepted.
    pub created_at: Timestamp,
}

/// A droplet found on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// What its label says.
    pub record: Record,
    /// Its address, kept as long as it lives.
    pub address: Ipv4Addr,
    /// Whether it has power.
    pub running: bool,
}

/// How a droplet is attached, and what it was given; the rest of what its metadata says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Its user data; empty when it has none.
    pub user_data: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Of the droplets' network.
    pub netmask: Ipv4Addr,
    /// Of the droplets' network.
    pub gateway: Ipv4Addr,
    /// Hardware address, empty while it has no power.
    pub mac: String,
    /// Addresses of name servers.
    pub name_servers: Vec<String>,
}

/// What can be done to a droplet's power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// Every process ends at once, as when the cable is pulled.
    Cut,
    /// The init system is asked to end everything in order; what takes too long is cut.
    Shutdown,
    /// Boots.
    On,
}

/// How a droplet is doing, whatever was asked of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vitals {
    /// It runs.
    Running,
    /// It has ended to be started again, as `reboot` typed in it asks for.
    Rebooting,
    /// It doesn't run.
    Off,
}

/// A verb the host could not carry out.
#[derive(Debug, thiserror::Error)]
#[error("{operation} of droplet {droplet} failed")]
pub struct HostError {
    /// What was tried.
    pub operation: &'static str,
    /// For which droplet.
    pub droplet: DropletId,
    /// What the host said.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// The host of droplets.
#[async_trait]
pub trait Host: Send + Sync {
    /// Makes and boots a droplet with that user data; answers with its address. Nothing is left behind when it fails.
    async fn create(&self, record: &Record, user_data: Option<&str>) -> Result<Ipv4Addr, HostError>;
    /// Changes a droplet's power. Reaching a state it is already in is a success.
    async fn power(&self, droplet: DropletId, power: Power) -> Result<(), HostError>;
    /// Plugs a droplet's network cable in or pulls it; the address stays the same.
    async fn connect(&self, droplet: DropletId, connected: bool) -> Result<(), HostError>;
    /// Removes a droplet and its disk. One that isn't there is a success.
    async fn remove(&self, droplet: DropletId) -> Result<(), HostError>;
    /// Every droplet of this cloud, running or not.
    async fn found(&self) -> Result<Vec<Found>, HostError>;
    /// What a droplet wrote on its console, and cloud-init's output after it.
    async fn console(&self, droplet: DropletId) -> Result<String, HostError>;
    /// The droplet that has this address, or calls the metadata service from it.
    async fn droplet_at(&self, address: Ipv4Addr) -> Option<DropletId>;
    /// How a droplet is attached, and what it was given.
    async fn attachment(&self, droplet: DropletId) -> Result<Attachment, HostError>;
    /// How a droplet is doing.
    async fn vitals(&self, droplet: DropletId) -> Result<Vitals, HostError>;
    /// Droplets whose vitals may have changed, from now on. Ends when the host can't tell any more; then every droplet is worth a look.
    fn stirrings(&self) -> BoxStream<'_, DropletId>;
    /// Keeps the tags a droplet has now, for a cloud started anew.
    async fn keep_tags(&self, droplet: DropletId, tags: &[String]) -> Result<(), HostError>;
    /// Name by which a person finds the droplet on the host.
    fn container_name(&self, droplet: DropletId) -> String;
}
