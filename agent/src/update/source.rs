//! Where releases come from: a place that serves files, which need not be trusted.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use dtma_release::{Artifact, Channel, MAX_MANIFEST_BYTES, Manifest, Version, channel_path, manifest_path};
use self_update::Download;

const MANIFEST_PATIENCE: Duration = Duration::from_secs(20);
/// A droplet's line takes it in a second; a very bad one in this.
const ARCHIVE_PATIENCE: Duration = Duration::from_secs(300);

/// Which release is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The channel's newest.
    Newest(Channel),
    /// This one.
    Version(Version),
}

/// Why nothing came. Asking again later may help.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    /// Nobody said where releases are.
    #[error("nobody has said where releases come from; set DTMA_RELEASES_URL")]
    Nowhere,
    /// It couldn't be fetched.
    #[error("{url} can't be fetched")]
    Fetch {
        /// What.
        url: String,
        /// Why.
        #[source]
        source: self_update::Error,
    },
    /// It couldn't be written down.
    #[error("{path} can't be written")]
    Write {
        /// Where to.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A place that serves releases.
pub(super) trait Source {
    /// The envelope of the release that is wanted.
    fn manifest(&self, wanted: &Wanted) -> Result<Vec<u8>, FetchError>;

    /// Fetches an archive to a path. What comes may be anything, but isn't longer than announced.
    fn archive(&self, manifest: &Manifest, artifact: &Artifact, to: &Path) -> Result<(), FetchError>;
}

/// One that is asked by HTTP: the provisioner, any static host, a Space.
#[derive(Debug)]
pub(super) struct HttpSource {
    /// No slash at the end.
    pub base_url: Option<String>,
}

impl HttpSource {
    fn url(&self, path: &str) -> Result<String, FetchError> {
        self.base_url.as_ref().map(|base| format!("{base}/{path}")).ok_or(FetchError::Nowhere)
    }

    fn download(url: &str, patience: Duration, most: u64) -> Download {
        let mut download = Download::from_url(url);
        download.timeout(patience).max_download_size(most);
        download
    }
}

impl Source for HttpSource {
    fn manifest(&self, wanted: &Wanted) -> Result<Vec<u8>, FetchError> {
        let url = self.url(&match wanted {
            Wanted::Newest(channel) => channel_path(*channel),
            Wanted::Version(version) => manifest_path(version),
        })?;
        let mut bytes = Vec::new();
        Self::download(&url, MANIFEST_PATIENCE, MAX_MANIFEST_BYTES)
            .download_to(&mut bytes)
            .map_err(|source| FetchError::Fetch { url, source })?;
        Ok(bytes)
    }

    fn archive(&self, manifest: &Manifest, artifact: &Artifact, to: &Path) -> Result<(), FetchError> {
        let url = self.url(&format!("{}/{}", manifest.version, artifact.file))?;
        let failed = |source| FetchError::Write { path: to.to_owned(), source };
        let mut file = File::create(to).map_err(failed)?;
        Self::download(&url, ARCHIVE_PATIENCE, artifact.size)
            .download_to(&mut file)
            .map_err(|source| FetchError::Fetch { url, source })?;
        file.flush().map_err(failed)
    }
}
