//! What a stack leaves on disk about itself, so that another process can talk to it or remove it.

use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use dtma_api::Token;
use serde::{Deserialize, Serialize};

use crate::error::{Result, StackError};
use crate::process::ProcessRecord;
use crate::workspace::Workspace;

pub(crate) const FILE: &str = "record.json";

/// Whose a stack is and what it runs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The process whose end makes the stack a leftover; none for a stack that is meant to stay.
    pub(crate) owner: Option<ProcessRecord>,
    /// Its processes, in the order they were started.
    pub(crate) processes: Vec<ProcessRecord>,
}

impl Record {
    /// Nobody uses this stack any more.
    pub(crate) fn is_stale(&self) -> bool {
        self.owner.as_ref().is_some_and(|owner| !owner.is_alive())
    }

    pub(crate) fn read(folder: &Path) -> Option<Self> {
        let text = std::fs::read(folder.join(FILE)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        write_private(&folder.join(FILE), &serde_json::json!(self))
    }
}

/// Where stacks keep their records, logs and databases: a folder each.
pub(crate) fn folder_of(workspace: &Workspace, id: &str) -> PathBuf {
    folders(workspace).join(id)
}

pub(crate) fn folders(workspace: &Workspace) -> PathBuf {
    workspace.local().join("stacks")
}

/// Ids of all stacks that have a folder.
pub(crate) fn known(workspace: &Workspace) -> Vec<String> {
    let entries = std::fs::read_dir(folders(workspace)).into_iter().flatten().flatten();
    entries.filter(|entry| entry.path().is_dir()).filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// `target/local/stack.json`: how to reach the stack that `cargo xtask up` left running. Holds secrets, hence 0600.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StackFile {
    /// Base URL of the provisioner.
    pub provisioner_url: String,
    /// What its internal API wants in `X-Internal-Api-Secret`.
    pub internal_api_secret: Token,
    /// The bearer every agent accepts.
    pub fleet_api_key: Token,
    /// Base URL of the local cloud; DigitalOcean's API is under `/v2`.
    pub cloud_url: String,
    /// The local cloud's bearer.
    pub cloud_token: Token,
    /// Host and port of the registry as droplets pull from it (read-only).
    pub registry: SocketAddr,
    /// The same registry, writable, for this machine only.
    pub registry_push: SocketAddr,
    /// An image it holds, as droplets pull it.
    pub mcp_image: String,
}

impl StackFile {
    /// Where it lies.
    pub fn path(workspace: &Workspace) -> PathBuf {
        workspace.local().join("stack.json")
    }

    /// Writes it, readable by its owner alone.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write(&self, workspace: &Workspace) -> Result<()> {
        write_private(&Self::path(workspace), &serde_json::json!(self))
    }
}

fn write_private(path: &Path, value: &serde_json::Value) -> Result<()> {
    let written = || {
        let mut file = std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        file.write_all(format!("{value:#}\n").as_bytes())
    };
    written().map_err(StackError::io(format!("write {}", path.display())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_record_is_private_and_stale_once_its_owner_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let owner = ProcessRecord::of_this_process().unwrap();
        let record = Record { owner: Some(owner.clone()), processes: Vec::new() };
        record.write(folder.path()).unwrap();
        let mode = std::fs::metadata(folder.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!Record::read(folder.path()).unwrap().is_stale());

        let gone = Record { owner: Some(ProcessRecord { started: owner.started + 1, ..owner }), ..Record::default() };
        assert!(gone.is_stale());
        assert!(!Record::default().is_stale(), "a stack that is meant to stay has no owner");
    }
}
