//! What others do on the host of the engine in memory: strangers, people, Docker itself.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::{FakeEngine, Held, blank, make};
use crate::engine::{Condition, Container, ContainerId, Exit};
use crate::instance::{DeploymentId, PortProtocol, Spec};

impl FakeEngine {
    /// A container nobody told us about.
    pub(crate) fn stranger(&self, name: &str, port: Option<u16>) -> ContainerId {
        let mut world = self.world();
        world.next += 1;
        let mut container = blank(format!("stranger-{:03}", world.next), name);
        container.condition = Condition::Running { since: Timestamp::UNIX_EPOCH };
        let id = container.id.clone();
        let ports = port.map(|port| (port, PortProtocol::Tcp)).into_iter().collect();
        world.held.push(Held {
            container,
            ours: false,
            environment: BTreeMap::new(),
            image: "stranger:1".to_owned(),
            ports,
            volumes: Vec::new(),
        });
        id
    }

    /// Somebody changes a container of ours from outside.
    pub(crate) fn meddle(&self, name: &str, meddling: impl FnOnce(&mut Container)) {
        let mut world = self.world();
        let held = world.held.iter_mut().find(|held| held.ours && held.container.name == name).unwrap();
        meddling(&mut held.container);
        drop(world);
        let _ = self.changed.send(());
    }

    /// Somebody removes a container of ours from outside, if it is there.
    pub(crate) fn steal(&self, name: &str) {
        self.world().held.retain(|held| !(held.ours && held.container.name == name));
        let _ = self.changed.send(());
    }

    /// A container of ours that nobody accounts for.
    pub(crate) fn litter(&self, spec: &Spec) {
        let mut world = self.world();
        let held = make(&mut world, spec, DeploymentId(uuid::Uuid::from_u128(99)));
        world.held.push(held);
    }

    /// A container of this name is being made, and not to be seen yet.
    pub(crate) fn reserve(&self, name: &str) {
        self.world().reserved.insert(name.to_owned(), DeploymentId(uuid::Uuid::nil()));
    }

    /// Somebody starts it again when it is stopped next.
    pub(crate) fn revive(&self, name: &str) {
        self.world().revived.insert(name.to_owned());
    }

    /// It has been made, as the last one who asked for it wanted.
    pub(crate) fn finish(&self, spec: &Spec) {
        let mut world = self.world();
        let deployment = world.reserved.remove(spec.name.as_str()).unwrap();
        let held = make(&mut world, spec, deployment);
        world.held.push(held);
    }

    /// A container of ours that runs.
    pub(crate) fn here(&self, spec: &Spec) {
        self.litter(spec);
        self.meddle(spec.name.as_str(), |container| {
            container.condition = Condition::Running { since: Timestamp::UNIX_EPOCH };
        });
    }

    /// The process in a container of ours ends, and nobody starts it again.
    pub(crate) fn end(&self, id: &ContainerId, code: i64) {
        let mut world = self.world();
        let held = world.held.iter_mut().find(|held| &held.container.id == id).unwrap();
        held.container.condition = Condition::Exited(Exit { code, out_of_memory: false, error: String::new() });
        drop(world);
        let _ = self.changed.send(());
    }
}
