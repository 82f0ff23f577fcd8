//! The standard streams of a container's process.
//!
//! Docker lets go when the process ends, also when it starts it again at once. What isn't read makes the process wait when it writes.

use bollard::Docker;
use bollard::container::LogOutput;
use bollard::query_parameters::AttachContainerOptionsBuilder;
use futures_util::{StreamExt as _, TryStreamExt as _};

use super::errors::sort;
use crate::engine::{Attached, ContainerId, EngineError};

/// Attaches to standard input and output; the standard error stays in the log, as everything does.
pub(super) async fn attach(docker: &Docker, id: &ContainerId) -> Result<Attached, EngineError> {
    const OPERATION: &str = "attach to the container";
    let options = AttachContainerOptionsBuilder::new().stream(true).stdin(true).stdout(true).build();
    let attached = docker.attach_container(id.as_str(), Some(options)).await.map_err(|error| sort(OPERATION, error))?;
    let output = attached.output.map_err(|error| sort(OPERATION, error)).try_filter_map(|piece| async {
        Ok(match piece {
            LogOutput::StdOut { message } | LogOutput::Console { message } => Some(message),
            LogOutput::StdErr { .. } | LogOutput::StdIn { .. } => None,
        })
    });
    Ok(Attached { input: attached.input, output: output.boxed() })
}
