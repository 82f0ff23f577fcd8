//! Base images in the Docker Engine.

use std::path::Path;

use async_trait::async_trait;
use bollard::Docker;
use bollard::errors::Error as DockerError;
use bollard::query_parameters::CreateImageOptionsBuilder;
use futures_util::TryStreamExt;

use super::{ConnectError, connect};
use crate::image::{BuildError, ImageStore};

/// Keeps base images in the Docker Engine of this machine.
pub struct DockerImages(Docker);

impl DockerImages {
    /// Connects to this machine's engine.
    ///
    /// # Errors
    /// When its address makes no sense.
    pub fn connect() -> Result<Self, ConnectError> {
        connect().map(Self)
    }

    /// Those of the engine at the other end of `docker`.
    pub(super) fn of(docker: &Docker) -> Self {
        Self(docker.clone())
    }
}

#[async_trait]
impl ImageStore for DockerImages {
    async fn has(&self, reference: &str) -> Result<bool, BuildError> {
        match self.0.inspect_image(reference).await {
            Ok(_) => Ok(true),
            Err(DockerError::DockerResponseServerError { status_code: 404, .. }) => Ok(false),
            Err(error) => {
                Err(BuildError::Store { operation: format!("looking for image {reference}"), source: error.into() })
            }
        }
    }

    async fn import(&self, archive: &Path, repository: &str, tag: &str) -> Result<(), BuildError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| BuildError::Store {
            operation: format!("importing image {repository}:{tag}"),
            source,
        };
        let file = tokio::fs::File::open(archive).await.map_err(|error| failed(error.into()))?;
        let body = bollard::body_try_stream(tokio_util::io::ReaderStream::with_capacity(file, 1 << 20));
        let options = CreateImageOptionsBuilder::default().from_src("-").repo(repository).tag(tag).build();
        let progress = self.0.create_image(Some(options), Some(body), None);
        progress.try_for_each(|_| async { Ok(()) }).await.map_err(|error| failed(error.into()))
    }
}
