//! Images: what is there, pulling, removing.

use std::collections::HashSet;
use std::time::Duration;

use bollard::Docker;
use bollard::auth::DockerCredentials;
use bollard::query_parameters::{
    CreateImageOptionsBuilder, ListContainersOptionsBuilder, ListImagesOptionsBuilder, RemoveImageOptionsBuilder,
};
use dtma_api::instance::Progress;
use futures_util::StreamExt as _;
use secrecy::ExposeSecret as _;
use tokio::time::{Instant, timeout};

use super::errors::{is_missing, sort, sort_pull};
use super::read;
use crate::engine::{EngineError, HeldImage};
use crate::instance::{ImageReference, RegistryCredentials};

/// Shortest time between two reports of a pull's progress.
const PROGRESS_PAUSE: Duration = Duration::from_millis(250);

/// Pulls an image; gives up when nothing at all has come for `idle`.
pub(super) async fn pull(
    docker: &Docker,
    image: &ImageReference,
    credentials: Option<&RegistryCredentials>,
    idle: Duration,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<(), EngineError> {
    let (name, version) = image.split();
    let options = CreateImageOptionsBuilder::new().from_image(name).tag(version).build();
    let login = credentials.map(|credentials| login(image, credentials));
    let mut answers = docker.create_image(Some(options), None, login);
    let mut layers = read::Layers::default();
    let mut told: Option<(Instant, Progress)> = None;
    loop {
        let next = timeout(idle, answers.next()).await.map_err(|_| {
            let seconds = idle.as_secs();
            EngineError::PullFailed { message: format!("the registry sent nothing for {seconds} s") }
        })?;
        let Some(answer) = next else { break };
        layers.take(answer.map_err(sort_pull)?);
        if told.is_none_or(|(at, _)| at.elapsed() >= PROGRESS_PAUSE)
            && let Some(sum) = layers.progress()
        {
            told = Some((Instant::now(), sum));
            progress(sum);
        }
    }
    // The last word, however short a time after the one before.
    if let Some(sum) = layers.progress()
        && told.is_none_or(|(_, last)| last != sum)
    {
        progress(sum);
    }
    Ok(())
}

/// As Docker takes it; it lives no longer than the call.
fn login(image: &ImageReference, credentials: &RegistryCredentials) -> DockerCredentials {
    let mut login =
        DockerCredentials { serveraddress: Some(image.registry().to_owned()), ..DockerCredentials::default() };
    match credentials {
        RegistryCredentials::Password { username, password } => {
            login.username = Some(username.clone());
            login.password = Some(password.expose_secret().to_owned());
        }
        RegistryCredentials::IdentityToken(token) => login.identitytoken = Some(token.expose_secret().to_owned()),
    }
    login
}

/// Every image, anybody's, and whether any container, anybody's, is made from it.
pub(super) async fn list(docker: &Docker) -> Result<Vec<HeldImage>, EngineError> {
    let images = docker.list_images(Some(ListImagesOptionsBuilder::new().build())).await;
    let images = images.map_err(|error| sort("list images", error))?;
    let containers = docker.list_containers(Some(ListContainersOptionsBuilder::new().all(true).build())).await;
    let containers = containers.map_err(|error| sort("list containers", error))?;
    let used: HashSet<String> = containers.into_iter().filter_map(|container| container.image_id).collect();
    let named = |names: Vec<String>| names.into_iter().filter(|name| !name.contains("<none>")).collect();
    let held = images.into_iter().map(|image| HeldImage {
        used: used.contains(&image.id),
        id: image.id,
        tags: named(image.repo_tags),
        digests: named(image.repo_digests),
        bytes: u64::try_from(image.size).unwrap_or(0),
    });
    Ok(held.collect())
}

/// Takes a name off an image, or with its id removes one without a tag. Never by force: Docker refuses while a container is made from it.
pub(super) async fn remove(docker: &Docker, name: &str) -> Result<(), EngineError> {
    let options = RemoveImageOptionsBuilder::new().force(false).noprune(false).build();
    match docker.remove_image(name, Some(options), None).await {
        Ok(_) => Ok(()),
        Err(error) if is_missing(&error) => Ok(()),
        Err(error) => Err(sort("remove an image", error)),
    }
}
