//! Putting a lost ledger together again from what the containers bear.

use std::collections::BTreeMap;
use std::sync::Arc;

use dtma_api::InstanceName;
use jiff::Timestamp;

use crate::engine::{Condition, Container, Engine, EngineError};
use crate::instance::{DeploymentId, Intent, Spec};
use crate::store::ledger::{Contents, Entry};

/// A ledger that promises what `containers` show. Environment values aren't in the labels, so they are asked of the engine. What was
/// stopped stays stopped; a deploy that had not come as far as a started container goes on. Containers whose labels can't be read are
/// set apart, so that nothing ever touches them.
pub(super) async fn contents(
    engine: &dyn Engine,
    containers: &[Container],
    now: Timestamp,
) -> Result<Contents, EngineError> {
    let mut contents = Contents::default();
    let mut chosen: BTreeMap<&InstanceName, &Container> = BTreeMap::new();
    for container in containers {
        match &container.instance {
            Some(name) => {
                let best = chosen.entry(name).or_insert(container);
                if rank(container) < rank(best) {
                    *best = container;
                }
            }
            None => {
                contents.unreadable.insert(container.id.as_str().to_owned());
            }
        }
    }
    for (name, container) in chosen {
        match entry(engine, name, container, now).await? {
            Some(mut entry) => {
                let versions = containers.iter().filter(|other| other.instance.as_ref() == Some(name)).count();
                if versions > 1 && entry.intent == Intent::Stop {
                    // Two versions, and neither runs: they were about to change places. Nobody stops an instance in between.
                    entry.intent = Intent::Run;
                }
                contents.entries.insert(name.clone(), Arc::new(entry));
            }
            None => {
                tracing::error!(
                    instance = %name,
                    container = container.id.as_str(),
                    "this container bears our labels and they can't be read; it is left alone, remove it by hand"
                );
                contents.unreadable.insert(container.id.as_str().to_owned());
            }
        }
    }
    Ok(contents)
}

fn rank(container: &Container) -> u8 {
    match container.condition {
        Condition::Running { .. } => 0,
        Condition::Restarting(_) | Condition::Paused => 1,
        Condition::Exited(_) => 2,
        Condition::Created => 3,
        Condition::Removing | Condition::Dead => 4,
    }
}

async fn entry(
    engine: &dyn Engine,
    name: &InstanceName,
    container: &Container,
    now: Timestamp,
) -> Result<Option<Entry>, EngineError> {
    let Ok(mut spec) = serde_json::from_str::<Spec>(&container.spec_label) else { return Ok(None) };
    if &spec.name != name {
        return Ok(None);
    }
    if !spec.process.environment.0.is_empty() {
        let values: BTreeMap<String, String> = engine.environment(&container.id).await?.into_iter().collect();
        for (variable, value) in &mut spec.process.environment.0 {
            *value = values.get(variable).cloned().unwrap_or_default();
        }
    }
    let (intent, proven) = match &container.condition {
        Condition::Running { .. } | Condition::Restarting(_) | Condition::Paused => (Intent::Run, true),
        Condition::Created => (Intent::Run, false),
        Condition::Exited(_) | Condition::Removing | Condition::Dead => (Intent::Stop, true),
    };
    let entry = Entry {
        spec_hash: container.spec_hash.clone(),
        deployment: container.deployment.unwrap_or(DeploymentId(uuid::Uuid::nil())),
        intent,
        proven,
        image_digest: None,
        accepted_at: now,
        batch: None,
        update: None,
        last_update: None,
        spec,
    };
    Ok(Some(entry))
}
