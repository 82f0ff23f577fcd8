//! `POST /tools/{ref}/exec` on the wire.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Body of `POST /tools/{ref}/exec`. The agent reads the JSON itself, so that it can name every fault at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ExecRequest {
    /// The program and its arguments, 1 to 256 texts and at most 64 KiB in all; not a shell's text: `["/bin/sh", "-c", "…"]` is one.
    #[schemars(length(min = 1, max = 256))]
    pub command: Vec<String>,
    /// How long it may take, seconds, 1 to 120; 30 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 120))]
    pub timeout_seconds: Option<u64>,
}

/// Answer of `POST /tools/{ref}/exec`: the command ran and ended, however it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ExecAnswer {
    /// Always `true`: the command was run. Whether it did what it should is in `exit_code`.
    pub success: bool,
    /// Its exit code; 128 + signal when it was killed.
    pub exit_code: i64,
    /// Its standard output, at most the first 1 MiB; bytes that aren't UTF-8 are replaced.
    pub stdout: String,
    /// Its standard error, likewise.
    pub stderr: String,
    /// It wrote more than is here.
    pub truncated: bool,
    /// How many bytes of both outputs are missing; absent when none are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped_bytes: Option<u64>,
}

/// `details` of the 504 `exec_timeout` answer of `POST /tools/{ref}/exec`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ExecTimeout {
    /// How long it was waited for, seconds.
    pub timeout_seconds: u64,
    /// What it wrote to its standard output until then, as in [`ExecAnswer::stdout`].
    pub stdout: String,
    /// What it wrote to its standard error until then, likewise.
    pub stderr: String,
    /// It wrote more than is here.
    pub truncated: bool,
    /// `true` when it was killed, its children too; `false` when it may still run inside the container, because there is no shell in it
    /// to kill it with. A restart of the instance ends it.
    pub killed: bool,
}
