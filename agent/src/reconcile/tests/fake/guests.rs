//! Containers of sessions of the engine in memory.

use std::collections::BTreeMap;

use super::{FakeEngine, World, blank, gone, make};
use crate::engine::{Container, ContainerId, EngineError};
use crate::instance::{DeploymentId, SessionOf, Spec};

impl FakeEngine {
    pub(super) async fn created_for_session(
        &self,
        session: &SessionOf,
        spec: &Spec,
        deployment: &DeploymentId,
        like: &ContainerId,
    ) -> Result<ContainerId, EngineError> {
        let create = |world: &mut World| {
            if !world.held.iter().any(|held| &held.container.id == like) {
                return Err(gone("create"));
            }
            let name = session.id.container_name();
            assert!(!world.held.iter().any(|held| held.container.name == name), "a session has two containers");
            let mut held = make(world, spec, *deployment);
            held.ports.clear();
            held.container = Container {
                session: Some(session.clone()),
                links: held.container.links,
                settings: held.container.settings,
                deployment: Some(*deployment),
                ..blank(held.container.id.0, &name)
            };
            let id = held.container.id.clone();
            world.held.push(held);
            Ok(id)
        };
        self.call("create_for_session", session.instance.as_ref(), create).await
    }

    /// Containers of sessions, by name: the condition's word.
    pub(crate) fn guests(&self) -> BTreeMap<String, &'static str> {
        let world = self.world();
        let guests = world.held.iter().filter(|held| held.container.session.is_some());
        guests.map(|held| (held.container.name.clone(), held.container.condition.word())).collect()
    }
}
