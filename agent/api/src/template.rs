//! Templates: what a deploy can ask for by name instead of spelling it out.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::instance::Egress;

/// Which templates a deploy asks for (`template`): one, or one of each kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TemplateNames {
    /// One.
    One(String),
    /// One of each kind.
    Several(Vec<String>),
}

/// Answer of `GET /mcp/templates`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateList {
    /// Always `true`.
    pub success: bool,
    /// Every template this agent has.
    pub data: Vec<TemplateView>,
}

/// One template. What a deploy says itself goes over it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateView {
    /// What `template` in a deploy names it by.
    pub name: String,
    /// What it decides.
    pub kind: TemplateKind,
    /// What it is for.
    pub description: String,
    /// The limits it sets; in templates of the kind `resources` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsView>,
    /// How it shuts the server in; in templates of the kind `hardening` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<SandboxView>,
    /// Where the server may connect to; in templates of the kind `hardening` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
}

/// What a template decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TemplateKind {
    /// How much an instance may use.
    Resources,
    /// How it is shut in.
    Hardening,
}

/// Upper bounds of one instance.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LimitsView {
    /// Bytes of memory; there is no swap on top.
    pub memory_bytes: u64,
    /// Cores.
    pub cpu: f64,
    /// Processes and threads.
    pub pids: u32,
}

/// How an instance is shut in beyond what every container gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SandboxView {
    /// The root file system can't be written.
    pub read_only_root: bool,
    /// Paths in the container held in memory, with Docker's mount options.
    pub tmpfs: BTreeMap<String, String>,
    /// Capabilities given back, the kernel's names without `CAP_`; all others are dropped.
    pub capabilities: Vec<String>,
    /// Bytes of `/dev/shm`; Docker's default when absent.
    pub shm_bytes: Option<u64>,
}
