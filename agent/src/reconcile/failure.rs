//! From the engine's errors to reasons a caller can act on.

use crate::engine::EngineError;
use crate::instance::{Failure, FailureKind, Spec};

impl Failure {
    /// One without a server's last lines.
    pub(super) fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), log: Vec::new() }
    }
}

/// What an engine error means for a job.
#[derive(Debug)]
pub(super) enum Meaning {
    /// The instance can't be had like this.
    Failed(Failure),
    /// Nothing is wrong with the instance: look again and plan anew.
    LookAgain,
    /// Another container, perhaps a stranger's, has the name.
    NameTaken,
    /// Somebody has the port.
    PortTaken(Option<u16>),
}

/// Sorts an engine error.
pub(super) fn meaning(error: &EngineError, spec: &Spec) -> Meaning {
    let image = &spec.image;
    let failed = |kind, message: String| Meaning::Failed(Failure::new(kind, message));
    match error {
        EngineError::Unavailable { .. } | EngineError::ContainerGone { .. } | EngineError::NetworkGone { .. } => {
            Meaning::LookAgain
        }
        EngineError::NameTaken => Meaning::NameTaken,
        EngineError::PortTaken { port } => Meaning::PortTaken(*port),
        EngineError::ImageNotFound { message } => {
            failed(FailureKind::ImageNotFound, format!("the image {image} was not found: {message}"))
        }
        EngineError::PullDenied { message } => failed(
            FailureKind::PullDenied,
            format!("the registry refused to give {image}; it may not exist, or may need a login: {message}"),
        ),
        EngineError::PullFailed { message } => {
            failed(FailureKind::PullFailed, format!("the image {image} could not be pulled: {message}"))
        }
        EngineError::NoSpace { operation } => {
            failed(FailureKind::NoSpace, format!("the droplet's disk is full: no space left to {operation}"))
        }
        EngineError::Refused { operation, message } => {
            failed(FailureKind::Refused, format!("Docker refused to {operation}: {message}"))
        }
        EngineError::Failed { operation, message } => {
            failed(FailureKind::EngineFailed, format!("Docker failed to {operation}: {message}"))
        }
    }
}
