//! The images on the host of the engine in memory, what its registry has, and what containers use.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use jiff::Timestamp;
use secrecy::ExposeSecret as _;

use super::{FakeEngine, World, is_running};
use crate::engine::{ContainerId, EngineError, HeldImage, Usage};
use crate::instance::RegistryCredentials;

impl FakeEngine {
    /// The image is there, so that nothing has to be pulled.
    pub(crate) fn have_image(&self) {
        self.have("registry.example/server:1");
    }

    /// Somebody has brought this image.
    pub(crate) fn have(&self, reference: &str) {
        self.world().images.insert(reference.to_owned(), image(reference));
        self.measure();
    }

    /// There is this image in the registry, for those with this password if it says one.
    pub(crate) fn publish(&self, reference: &str, password: Option<&str>) {
        let mut world = self.world();
        world.registry.insert(reference.to_owned());
        if let Some(password) = password {
            world.wanted.insert(reference.to_owned(), password.to_owned());
        }
    }

    /// Somebody removes all images.
    pub(crate) fn forget_images(&self) {
        self.world().images.clear();
        self.measure();
    }

    /// Names of all images on the host.
    pub(crate) fn image_names(&self) -> Vec<String> {
        self.world().images.keys().cloned().collect()
    }

    pub(super) fn measure(&self) {
        self.filled.store(self.world().images.len() as u64, Ordering::Relaxed);
    }

    /// Half a core, all the time.
    pub(super) async fn used_by(&self, id: &ContainerId) -> Result<Option<Usage>, EngineError> {
        // Not among the calls: sampling goes on in the background of every test.
        let fault = self.world().faults.get("usage").cloned();
        match fault {
            Some(fault) => Err(fault()),
            None if self.world().hangs.contains("usage") => std::future::pending().await,
            None => Ok(is_running(&mut self.world(), id).then(|| {
                let seconds = self.epoch.elapsed().as_secs();
                Usage {
                    at: Timestamp::from_second(seconds.cast_signed()).unwrap(),
                    cpu_nanos: seconds * 500_000_000,
                    memory_bytes: 1,
                    memory_limit_bytes: 2,
                    network_rx_bytes: 0,
                    network_tx_bytes: 0,
                    block_read_bytes: 0,
                    block_write_bytes: 0,
                    pids: 1,
                }
            })),
        }
    }
}

pub(super) fn image(reference: &str) -> HeldImage {
    HeldImage {
        id: format!("sha256:{reference}"),
        tags: vec![reference.to_owned()],
        digests: Vec::new(),
        bytes: 1,
        used: false,
    }
}

pub(super) fn held(world: &World) -> Vec<HeldImage> {
    let used: BTreeSet<&String> = world.held.iter().map(|held| &held.image).collect();
    let images = world.images.values().cloned();
    images.map(|image| HeldImage { used: image.tags.iter().any(|tag| used.contains(tag)), ..image }).collect()
}

/// What a registry is shown.
pub(super) fn shown(credentials: Option<&RegistryCredentials>) -> Option<String> {
    match credentials? {
        RegistryCredentials::Password { password, .. } => Some(password.expose_secret().to_owned()),
        RegistryCredentials::IdentityToken(token) => Some(token.expose_secret().to_owned()),
    }
}
