//! What a deploy would meet, found out without changing anything.

use std::collections::BTreeMap;
use std::sync::Arc;

use dtma_api::instance::PullPolicy;
use dtma_api::validation::{ImageOutlook, NameOutlook, Outlook, PortTaken};
use futures_util::{StreamExt as _, stream};

use super::handle::Instances;
use crate::engine::{EngineError, exact_ports};
use crate::instance::{Intent, PortProtocol, Spec};
use crate::store::ledger::Entry;

/// Ports looked up at most; each is a question to Docker, and a deploy finds out about all.
const MOST_PORTS: usize = 32;

impl Instances {
    /// Looks at name, id, ports and image as they are now. Another caller may be quicker, so this is no promise.
    pub async fn foresee(&self, spec: &Spec) -> Outlook {
        self.looked().await;
        let contents = self.shared.desk().await.contents().clone();
        let name = match contents.entries.get(&spec.name) {
            None if contents.strange.contains_key(&spec.name) => NameOutlook::OtherSpec,
            None => NameOutlook::Free,
            Some(there) => match there.intent {
                Intent::Remove(_) => NameOutlook::BeingRemoved,
                Intent::Run | Intent::Stop if there.update.is_some() => NameOutlook::BeingUpdated,
                Intent::Run | Intent::Stop if &there.spec == spec => NameOutlook::SameSpec,
                Intent::Run | Intent::Stop => NameOutlook::OtherSpec,
            },
        };
        let others = || contents.entries.values().filter(|there| there.spec.name != spec.name);
        let same_id = others().find(|there| there.spec.account_tool_instance_id == spec.account_tool_instance_id);
        let promised: BTreeMap<(u16, PortProtocol), _> = others()
            .map(Arc::as_ref)
            .flat_map(|there| promised_ports(there).map(|port| (port, &there.spec.name)))
            .collect();
        let (image, image_asked) = self.image_outlook(spec).await;
        let mut ports_taken = Vec::new();
        let mut reachable = image_asked && self.snapshot().engine.reachable;
        if reachable {
            let ours = |container: &str| contents.entries.keys().any(|name| name.as_str() == container);
            let ask = |(port, protocol): (u16, PortProtocol)| {
                let promised = promised.get(&(port, protocol));
                async move {
                    let holder = match promised {
                        Some(name) => Ok(Some(name.to_string())),
                        None => self.shared.engine.port_holder(port, protocol).await,
                    };
                    (port, protocol, holder)
                }
            };
            let asked = stream::iter(exact_ports(spec).take(MOST_PORTS).map(ask)).buffered(4);
            let asked: Vec<_> = asked.collect().await;
            for (port, protocol, holder) in asked {
                match holder {
                    Ok(Some(container)) if container != spec.name.as_str() => {
                        let what = if ours(&container) { "instance" } else { "container" };
                        let (protocol, holder) = (protocol.as_str().to_owned(), format!("{what} {container}"));
                        ports_taken.push(PortTaken { port, protocol, holder });
                    }
                    Ok(_) => {}
                    Err(error) => reachable &= answered(&error),
                }
            }
        }
        let missing = spec.pull_policy == PullPolicy::Never && image.here == Some(false);
        Outlook {
            clear: matches!(name, NameOutlook::Free | NameOutlook::SameSpec)
                && same_id.is_none()
                && ports_taken.is_empty()
                && reachable
                && !missing,
            name,
            id_taken_by: same_id.map(|there| there.spec.name.clone()),
            ports_taken,
            image,
            docker_reachable: reachable,
        }
    }

    /// What is to be said of the image, and whether Docker could be asked.
    async fn image_outlook(&self, spec: &Spec) -> (ImageOutlook, bool) {
        let found = self.shared.engine.image(&spec.image).await;
        let (here, digest, asked) = match found {
            Ok(Some(image)) => (Some(true), image.digest, true),
            Ok(None) => (Some(false), None, true),
            Err(error) => (None, None, answered(&error)),
        };
        let will_pull = match spec.pull_policy {
            PullPolicy::Always => Some(true),
            PullPolicy::IfNotPresent => here.map(|here| !here),
            PullPolicy::Never => Some(false),
        };
        (ImageOutlook { here, digest, will_pull }, asked)
    }
}

/// The ports an instance may have, in either of its versions.
fn promised_ports(entry: &Entry) -> impl Iterator<Item = (u16, PortProtocol)> + '_ {
    let next = entry.next().map(|version| version.spec);
    [Some(&entry.spec), next].into_iter().flatten().flat_map(exact_ports)
}

/// Whether an engine that failed is there at all.
fn answered(error: &EngineError) -> bool {
    tracing::debug!(error = error as &dyn std::error::Error, "a question on behalf of a validation failed");
    !matches!(error, EngineError::Unavailable { .. })
}
