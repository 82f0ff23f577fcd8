//! Releases as their makers, or somebody else, would offer them, and the place that serves them.

use std::collections::HashMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use dtma_release::{Manifest, TARGET, Version, archive_name, channel_path, manifest_path};
use futures_util::{StreamExt as _, stream};
use stack::release::{self, ReleaseKeys, Terms};
use stack::{Stack, Workspace};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// What is served under a path.
#[derive(Debug, Clone)]
enum Served {
    Whole(Bytes),
    /// Half of it, and then nothing for ever.
    Stuck(Bytes),
    /// All of it, and then more, for ever.
    Endless(Bytes),
}

type Files = Arc<Mutex<HashMap<String, Served>>>;

/// A static host, until it is dropped.
pub(crate) struct Host {
    files: Files,
    url: String,
    task: JoinHandle<()>,
}

impl Host {
    pub(crate) async fn start(stack: &Stack) -> Result<Self, Box<dyn Error>> {
        let listener = TcpListener::bind((stack.gateway(), 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        let files = Files::default();
        let routes = Router::new().fallback(serve).with_state(files.clone());
        let task = tokio::spawn(async move {
            // It never ends by itself, and what a single connection suffers is no error here.
            drop(axum::serve(listener, routes).await);
        });
        Ok(Self { files, url, task })
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    fn put(&self, path: String, served: Served) {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).insert(format!("/{path}"), served);
    }

    /// Offers a release as it is.
    pub(crate) fn offer(&self, offer: &Offer) {
        self.publish(offer, Served::Whole(offer.archive.clone()));
    }

    /// Offers one whose archive never comes to its end.
    pub(crate) fn offer_stuck(&self, offer: &Offer) {
        self.publish(offer, Served::Stuck(offer.archive.clone()));
    }

    /// Offers one whose archive doesn't end where it should.
    pub(crate) fn offer_endless(&self, offer: &Offer) {
        self.publish(offer, Served::Endless(offer.archive.clone()));
    }

    fn publish(&self, offer: &Offer, archive: Served) {
        let version = &offer.manifest.version;
        self.put(format!("{version}/{}", archive_name(version, TARGET)), archive);
        self.put(manifest_path(version), Served::Whole(offer.envelope.clone()));
        self.put(channel_path(offer.manifest.channel), Served::Whole(offer.envelope.clone()));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(State(files): State<Files>, uri: Uri) -> Response {
    let served = files.lock().unwrap_or_else(PoisonError::into_inner).get(uri.path()).cloned();
    match served {
        None => StatusCode::NOT_FOUND.into_response(),
        Some(Served::Whole(bytes)) => bytes.into_response(),
        Some(Served::Stuck(bytes)) => {
            let half = bytes.slice(..bytes.len() / 2);
            let body = stream::iter([Ok::<_, std::io::Error>(half)]).chain(stream::pending());
            Body::from_stream(body).into_response()
        }
        Some(Served::Endless(bytes)) => {
            let more = stream::repeat_with(|| Ok(Bytes::from_static(&[0; 65_536])));
            Body::from_stream(stream::iter([Ok::<_, std::io::Error>(bytes)]).chain(more)).into_response()
        }
    }
}

/// A release.
#[derive(Debug, Clone)]
pub(crate) struct Offer {
    pub(crate) manifest: Manifest,
    pub(crate) envelope: Bytes,
    pub(crate) archive: Bytes,
}

/// Where releases are made.
pub(crate) struct Makers {
    workspace: Workspace,
    pub(crate) keys: ReleaseKeys,
    folder: tempfile::TempDir,
}

impl Makers {
    pub(crate) fn new() -> Result<Self, Box<dyn Error>> {
        let workspace = Workspace::find();
        let keys = release::development_keys(&workspace)?;
        Ok(Self { workspace, keys, folder: tempfile::tempdir()? })
    }

    /// Where all that is made lies, as a provisioner takes it.
    pub(crate) fn dist(&self) -> PathBuf {
        self.folder.path().join("dist")
    }

    pub(crate) fn terms(&self, version: &str) -> Terms {
        Terms { version: version.parse().unwrap_or_else(|_| Version::new(0, 0, 0)), ..Terms::of(&self.workspace) }
    }

    /// The real agent, as another version.
    pub(crate) fn real(&self, terms: &Terms) -> Result<Offer, Box<dyn Error>> {
        self.pack(terms, &release::built_agent(&self.workspace), &[])
    }

    /// The real agent as another version, started by a script that has its own ideas of it.
    pub(crate) fn mistreated(&self, terms: &Terms, script: &str) -> Result<Offer, Box<dyn Error>> {
        let mut real = std::fs::read(release::built_agent(&self.workspace))?;
        release::stamp(&mut real, &terms.version)?;
        let script = format!("#!/bin/sh\n[ \"$1\" = --version ] || {{\n{script}\n}}\nexec \"$0.real\" \"$@\"\n");
        self.pack(terms, &self.written("script", script.as_bytes())?, &[("dtma-agent.real", 0o755, real)])
    }

    /// Any program in place of the agent.
    pub(crate) fn program(&self, terms: &Terms, program: &[u8]) -> Result<Offer, Box<dyn Error>> {
        self.pack(terms, &self.written("program", program)?, &[])
    }

    /// The same manifest, changed and signed by `keys`.
    pub(crate) fn changed(
        &self,
        offer: &Offer,
        keys: &ReleaseKeys,
        change: impl FnOnce(&mut Manifest),
    ) -> Result<Offer, Box<dyn Error>> {
        let mut manifest = offer.manifest.clone();
        change(&mut manifest);
        let envelope = release::sign_manifest(&manifest, keys)?.into();
        Ok(Offer { manifest, envelope, archive: offer.archive.clone() })
    }

    fn written(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, Box<dyn Error>> {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes)?;
        Ok(path)
    }

    fn pack(&self, terms: &Terms, program: &Path, more: &[(&str, u32, Vec<u8>)]) -> Result<Offer, Box<dyn Error>> {
        let out = self.dist();
        let release = release::pack_with(&self.workspace, terms, program, more, &self.keys, &out)?;
        let envelope = std::fs::read(out.join(manifest_path(&terms.version)))?.into();
        Ok(Offer { manifest: release.manifest, envelope, archive: std::fs::read(release.archive)?.into() })
    }
}
