//! A real Docker registry (Debian's `docker-registry`) over one storage folder, in up to two processes: a writable one on
//! loopback for whoever builds images, and a read-only one on the droplets' network.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::error::{Result, StackError};
use crate::host::program;
use crate::process::ProcessRecord;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Write,
    ReadOnly,
}

/// Starts a registry process; it writes its settings and its log to `folder`.
pub(crate) fn spawn(access: Access, listen: SocketAddr, storage: &Path, folder: &Path) -> Result<ProcessRecord> {
    let name = match access {
        Access::Write => "registry",
        Access::ReadOnly => "registry-read-only",
    };
    let settings = folder.join(format!("{name}.yml"));
    std::fs::write(&settings, settings_for(access, listen, storage))
        .map_err(StackError::io(format!("write {}", settings.display())))?;
    let program = program("docker-registry").unwrap_or_else(|| PathBuf::from("docker-registry"));
    let log = folder.join(format!("{name}.log"));
    // Its tracing would look for a collector on this machine.
    let env = [("OTEL_TRACES_EXPORTER".to_owned(), "none".to_owned())];
    ProcessRecord::spawn(name, &program, [Path::new("serve"), &settings], env, folder, &log)
}

fn settings_for(access: Access, listen: SocketAddr, storage: &Path) -> String {
    let read_only = access == Access::ReadOnly;
    format!(
        "version: 0.1\n\
         log:\n  level: warn\n  accesslog:\n    disabled: true\n\
         storage:\n  \
           filesystem:\n    rootdirectory: {storage:?}\n  \
           cache:\n    blobdescriptor: inmemory\n  \
           maintenance:\n    uploadpurging:\n      enabled: false\n    readonly:\n      enabled: {read_only}\n\
         http:\n  addr: \"{listen}\"\n  secret: one process per address, nothing to share\n"
    )
}

/// Whether the storage holds this image already.
pub(crate) fn holds(storage: &Path, repository: &str, tag: &str) -> bool {
    storage.join("docker/registry/v2/repositories").join(repository).join("_manifests/tags").join(tag).exists()
}
