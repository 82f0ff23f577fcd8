//! The network the agent's containers are on: that it is there, and there once.

use std::collections::HashMap;
use std::future::Future;

use bollard::Docker;
use bollard::errors::Error;
use bollard::query_parameters::ListNetworksOptionsBuilder;

use super::errors::{is_in_use, is_missing, is_network_unclear, sort};
use super::{DockerEngine, make};
use crate::engine::EngineError;

const OPERATION: &str = "make the agent's network";

impl DockerEngine {
    /// Sees that the agent's network is there, unless it is known to be.
    pub(super) async fn ensure_network(&self, docker: &Docker) -> Result<(), EngineError> {
        let mut ready = self.network_ready.lock().await;
        if *ready {
            return Ok(());
        }
        if self.networks(docker).await?.is_empty() {
            docker.create_network(make::network(&self.scope)).await.map_err(|error| sort(OPERATION, error))?;
        }
        // Docker takes any number of networks of one name, and attaches nothing to a name that several have. A second one comes of an
        // agent that died while Docker was making the first.
        let mut all = self.networks(docker).await?;
        for id in all.split_off(1.min(all.len())) {
            tracing::warn!(network = id, "there is more than one network of the agent; removing this one");
            match docker.remove_network(&id).await {
                Ok(()) => {}
                Err(error) if is_missing(&error) || is_in_use(&error) => {}
                Err(error) => return Err(sort(OPERATION, error)),
            }
        }
        *ready = true;
        Ok(())
    }

    /// The agent's networks, the one to keep first: containers are on it, or it is the oldest.
    async fn networks(&self, docker: &Docker) -> Result<Vec<String>, EngineError> {
        let name = make::network_name(&self.scope);
        let filters = HashMap::from([("name".to_owned(), vec![name.clone()])]);
        let options = ListNetworksOptionsBuilder::new().filters(&filters).build();
        let found = docker.list_networks(Some(options)).await.map_err(|error| sort(OPERATION, error))?;
        // Docker's filter also finds names that only begin like this.
        let found: Vec<_> = found.into_iter().filter(|network| network.name.as_deref() == Some(&name)).collect();
        if found.iter().any(|network| network.labels.as_ref().is_none_or(|labels| !labels.contains_key(make::MANAGED)))
        {
            let message = format!("a network called {name} exists that this agent did not make");
            return Err(EngineError::Refused { operation: OPERATION, message });
        }
        let mut ranked = Vec::with_capacity(found.len());
        let several = found.len() > 1;
        for network in found {
            let id = network.id.unwrap_or_default();
            let used = several && self.is_used(docker, &id).await?;
            ranked.push((!used, network.created, id));
        }
        ranked.sort();
        Ok(ranked.into_iter().map(|(_, _, id)| id).collect())
    }

    async fn is_used(&self, docker: &Docker, id: &str) -> Result<bool, EngineError> {
        match docker.inspect_network(id, None).await {
            Ok(network) => Ok(network.containers.is_some_and(|containers| !containers.is_empty())),
            Err(error) if is_missing(&error) => Ok(false),
            Err(error) => Err(sort(OPERATION, error)),
        }
    }

    /// Does what puts a container onto the network. Where that is gone, because somebody removed it, or there are two, it is put right, and
    /// it is done once more.
    pub(super) async fn on_network<T, F>(
        &self,
        docker: &Docker,
        act: impl Fn() -> F + Send,
    ) -> Result<Result<T, Error>, EngineError>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        match act().await {
            Err(error) if is_network_unclear(&error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the agent's network is not as it should be");
                *self.network_ready.lock().await = false;
                self.ensure_network(docker).await?;
                Ok(act().await)
            }
            answer => Ok(answer),
        }
    }
}
