//! The agent: runs MCP server containers on one droplet and hands out one authenticated endpoint for each.
//!
//! `main` wires what is here together and decides nothing. `http` parses, calls and maps errors; `reconcile` is the only one to change
//! containers; `store` is the only one to write files; `engine` is the only one to speak to Docker; `egress` is the only way out for
//! instances whose egress is a list; `backend` is the only one to speak
//! to whoever sent us; `update` asks for another version of the agent, and holds the updater that brings it; `config` is the only one to read the environment.

pub mod backend;
pub mod causes;
pub mod config;
pub mod disks;
pub mod egress;
pub mod engine;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod http;
pub mod instance;
pub mod logs;
pub mod mcp;
pub mod reconcile;
pub mod store;
pub mod system;
pub mod update;
mod version;

pub use version::version;

/// The builds of releases this one is of.
pub const TARGET: &str =
    if cfg!(all(target_arch = "x86_64", target_os = "linux")) { dtma_release::TARGET } else { "no-releases-for-this" };
