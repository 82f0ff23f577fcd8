//! Builds a missing base image.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::process::Command;

use super::recipe::CUSTOMISE;
use super::{PackageSource, Recipe};

/// Manual pages, translations and documentation: half a minute of unpacking over a few droplets, and nothing reads them.
const PATHS_LEFT_OUT: [&str; 4] = ["/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*", "/usr/share/info/*"];

/// Where finished images are kept.
#[async_trait]
pub trait ImageStore: Send + Sync {
    /// Whether an image of that reference is there.
    async fn has(&self, reference: &str) -> Result<bool, BuildError>;
    /// Makes an image from a root file system in a tar archive.
    async fn import(&self, archive: &Path, repository: &str, tag: &str) -> Result<(), BuildError>;
}

/// Why a base image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file or folder could not be made.
    #[error("preparing {} failed", path.display())]
    Scratch {
        /// What was being made.
        path: PathBuf,
        #[source]
        /// What the system said.
        source: std::io::Error,
    },
    /// `mmdebstrap` isn't installed or could not be started.
    #[error("starting mmdebstrap failed (Debian and Ubuntu: apt-get install mmdebstrap)")]
    Start(#[source] std::io::Error),
    /// `mmdebstrap` ended with an error.
    #[error("mmdebstrap failed for {slug}:\n{output}")]
    Bootstrap {
        /// The image.
        slug: &'static str,
        /// Its last lines.
        output: String,
    },
    /// The store refused.
    #[error("{operation} failed")]
    Store {
        /// What was asked of it.
        operation: String,
        #[source]
        /// Its answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What [`ensure`] came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// Reference of the image in the store.
    pub reference: String,
    /// How long the build took; `None` when the image was there.
    pub took: Option<Duration>,
}

/// Makes sure the image of `recipe` is in `store`. Only one process builds at a time; a second one waits and finds it done.
/// `scratch` is a folder for the lock and the archive, which is removed again.
///
/// # Errors
/// When `mmdebstrap` or the store fails; nothing is left behind then.
pub async fn ensure(
    recipe: &Recipe,
    source: &PackageSource,
    store: &dyn ImageStore,
    scratch: &Path,
) -> Result<Built, BuildError> {
    let reference = recipe.reference(source);
    if store.has(&reference).await? {
        return Ok(Built { reference, took: None });
    }
    make_folder(scratch)?;
    let _lock = lock(scratch.join(format!("{}.lock", recipe.slug))).await?;
    if store.has(&reference).await? {
        return Ok(Built { reference, took: None });
    }
    let started = Instant::now();
    let work = Work::new(scratch.join(format!("{}.build", recipe.slug)))?;
    work.write("customise.sh", CUSTOMISE)?;
    if !source.authorities.is_empty() {
        make_folder(&work.0.join("ca-certificates"))?;
    }
    for (name, pem) in &source.authorities {
        work.write(&format!("ca-certificates/{name}"), pem)?;
    }
    let archive = work.0.join("root.tar");
    bootstrap(recipe, source, &work.0, &archive).await?;
    let (repository, tag) = reference.rsplit_once(':').unwrap_or((&reference, "latest"));
    store.import(&archive, repository, tag).await?;
    Ok(Built { reference, took: Some(started.elapsed()) })
}

async fn bootstrap(recipe: &Recipe, source: &PackageSource, work: &Path, archive: &Path) -> Result<(), BuildError> {
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--mode=root", "--variant=minbase", "--format=tar"])
        .arg(format!("--include={}", recipe.include()))
        .arg(format!("--customize-hook=sh '{}' \"$1\"", work.join("customise.sh").display()));
    for path in PATHS_LEFT_OUT {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    command.args(source.options()).arg(recipe.suite).arg(archive).args(source.lines(recipe.suite));
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await.map_err(BuildError::Start)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.lines().collect();
    let last = lines.split_at(lines.len().saturating_sub(30)).1;
    Err(BuildError::Bootstrap { slug: recipe.slug, output: last.join("\n") })
}

/// A folder that goes away with its contents.
struct Work(PathBuf);

impl Work {
    fn new(path: PathBuf) -> Result<Self, BuildError> {
        // A build that was killed leaves its folder; the lock says nobody is using it.
        let _ = std::fs::remove_dir_all(&path);
        make_folder(&path)?;
        Ok(Self(path))
    }

    fn write(&self, name: &str, text: &str) -> Result<(), BuildError> {
        let path = self.0.join(name);
        std::fs::write(&path, text).map_err(|source| BuildError::Scratch { path, source })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "removing a build's folder failed");
        }
    }
}

fn make_folder(path: &Path) -> Result<(), BuildError> {
    std::fs::create_dir_all(path).map_err(|source| BuildError::Scratch { path: path.to_owned(), source })
}

/// An exclusive lock, given back when the file is dropped or its process dies.
async fn lock(path: PathBuf) -> Result<std::fs::File, BuildError> {
    let shown = path.clone();
    let locked = tokio::task::spawn_blocking(move || {
        let file = std::fs::File::create(&path)?;
        file.lock()?;
        Ok::<_, std::io::Error>(file)
    });
    match locked.await {
        Ok(file) => file.map_err(|source| BuildError::Scratch { path: shown, source }),
        Err(join) => Err(BuildError::Scratch { path: shown, source: std::io::Error::other(join) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::find;

    struct Full;

    #[async_trait]
    impl ImageStore for Full {
        async fn has(&self, _: &str) -> Result<bool, BuildError> {
            Ok(true)
        }

        async fn import(&self, archive: &Path, _: &str, _: &str) -> Result<(), BuildError> {
            panic!("{} must not be imported: the image is there", archive.display());
        }
    }

    #[tokio::test]
    async fn an_image_that_is_there_is_not_built_again() {
        let source = PackageSource::default();
        let recipe = find("debian-12-x64").unwrap();
        let built = ensure(recipe, &source, &Full, Path::new("/nonexistent")).await.unwrap();
        assert_eq!(built, Built { reference: recipe.reference(&source), took: None });
    }
}
