//! What an instance writes: the lines of `GET /tools/{ref}/logs`.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What an answer consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum OutputItem {
    /// A line of output.
    Line(OutputLine),
    /// Why no more come, where that isn't because there are no more.
    BrokenOff(BrokenOff),
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OutputLine {
    /// When Docker received it; absent with `timestamps=false`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<Timestamp>,
    /// Where it was written.
    pub stream: OutputStream,
    /// The line without its end; bytes that aren't UTF-8 are replaced.
    pub message: String,
}

/// Where a line was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// The last line of an answer that broke off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BrokenOff {
    /// Why.
    pub error: String,
}
