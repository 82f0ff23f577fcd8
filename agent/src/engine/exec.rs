//! Running one command inside a container, beside its server.

use std::time::Duration;

use super::EngineError;

/// A command to run. It runs as the container's own user, with what the container may do and no more, without a terminal and with
/// nothing to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exec {
    /// The program and its arguments; not a shell's text.
    pub command: Vec<String>,
    /// How long it may take.
    pub patience: Duration,
    /// How many bytes of each of its outputs are kept; the first ones are.
    pub keep: usize,
}

/// What became of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executed {
    /// How it ended.
    pub end: ExecEnd,
    /// What it wrote to its standard output.
    pub stdout: Kept,
    /// What it wrote to its standard error.
    pub stderr: Kept,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecEnd {
    /// By itself.
    Exited {
        /// Its exit code; 128 + signal when it was killed.
        code: i64,
    },
    /// It didn't, within its patience.
    TimedOut {
        /// It could be killed; otherwise it may go on inside the container until that stops.
        killed: bool,
    },
}

/// The beginning of an output.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kept {
    /// What is kept.
    pub bytes: Vec<u8>,
    /// How many bytes came after that.
    pub dropped: u64,
}

impl Kept {
    /// Takes what came, up to `keep` bytes in all.
    pub(super) fn take(&mut self, bytes: &[u8], keep: usize) {
        let room = keep.saturating_sub(self.bytes.len()).min(bytes.len());
        let (kept, rest) = bytes.split_at(room);
        self.bytes.extend_from_slice(kept);
        self.dropped = self.dropped.saturating_add(rest.len() as u64);
    }
}

/// Why a command wasn't run.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// There is no running process beside which it could run.
    #[error("the container does not run")]
    NotRunning,
    /// The container has no such program, or it can't be run.
    #[error("{message}")]
    CannotStart {
        /// The engine's words.
        message: String,
    },
    /// The engine didn't do it.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_is_kept_and_the_rest_is_counted() {
        let mut kept = Kept::default();
        for piece in [&b"abc"[..], b"defg", b"hij"] {
            kept.take(piece, 5);
        }
        assert_eq!(kept, Kept { bytes: b"abcde".to_vec(), dropped: 5 });
        let mut nothing = Kept::default();
        nothing.take(b"abc", 0);
        assert_eq!(nothing, Kept { bytes: Vec::new(), dropped: 3 });
    }
}
