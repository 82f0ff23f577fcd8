//! Where things lie in the working tree, and building the programs a stack runs.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::command::Job;
use crate::error::{Result, StackError};
use crate::watch::Watch;

/// The working tree and its target directory.
#[derive(Debug, Clone)]
pub struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// The working tree this crate was built from; its target directory is cargo's, moved by `CARGO_TARGET_DIR` as usual.
    pub fn find() -> Self {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = here.ancestors().nth(2).unwrap_or(here).to_path_buf();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        Self { root, target }
    }

    /// A working tree elsewhere, with a target directory of its own.
    pub(crate) fn at(root: &Path) -> Self {
        Self { root: root.to_owned(), target: root.join("target") }
    }

    /// The working tree.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Cargo's target directory.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// A short name no other working tree on this machine has.
    pub fn short_name(&self) -> String {
        let mut name = hex::encode(Sha256::digest(self.root.as_os_str().as_encoded_bytes()));
        name.truncate(6);
        name
    }

    /// Everything a stack leaves on disk: images, logs, records.
    pub fn local(&self) -> PathBuf {
        self.target.join("local")
    }

    /// Release archives, one folder per version.
    pub fn releases(&self) -> PathBuf {
        self.target.join("dist")
    }

    /// DigitalOcean's description of its API, where it is: `$DO_OPENAPI`, or in `shared` beside the repository.
    pub fn cloud_contract(&self) -> Option<PathBuf> {
        let beside = || self.root.join("../shared/data/digitalocean-subset.openapi.yaml");
        let path = std::env::var_os("DO_OPENAPI").map_or_else(beside, PathBuf::from);
        path.is_file().then_some(path)
    }

    /// Where a program built by [`Workspace::build`] lies.
    pub fn program(&self, name: &str) -> PathBuf {
        self.target.join("debug").join(name)
    }

    /// [`Workspace::local`], made if needed.
    pub(crate) fn local_folder(&self) -> Result<PathBuf> {
        let folder = self.local();
        std::fs::create_dir_all(&folder).map_err(StackError::io(format!("make {}", folder.display())))?;
        Ok(folder)
    }

    /// `path` under `target/local`, its folder made if needed.
    pub(crate) fn local_file(&self, path: &str) -> Result<PathBuf> {
        let file = self.local().join(path);
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder).map_err(StackError::io(format!("make {}", folder.display())))?;
        }
        Ok(file)
    }

    /// Builds the local cloud and the provisioner in the dev profile. A fraction of a second when nothing changed. Names programs
    /// rather than packages, as the alias `cargo xtask` does, so that all are built with the workspace's features and share them.
    ///
    /// # Errors
    /// When cargo fails; with the compiler's last lines.
    pub async fn build(&self, watch: &dyn Watch) -> Result<()> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        Job::new(&cargo, self.local_file("build.log")?)
            .args(["build", "--bin", "local-cloud", "--bin", "dtma-provisioner"])
            .in_folder(&self.root)
            .run(watch)
            .await
    }
}
