//! A container's standard streams while its process runs.

use std::fmt;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use tokio::io::AsyncWrite;

use super::EngineError;

/// Attached to a running process. Dropping it lets go of the process and leaves it as it is.
pub struct Attached {
    /// Its standard input.
    pub input: Pin<Box<dyn AsyncWrite + Send>>,
    /// What it writes on its standard output from now on, in pieces as they come. Ends with the process.
    pub output: BoxStream<'static, Result<Bytes, EngineError>>,
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached").finish_non_exhaustive()
    }
}
