//! Everything the demo and the end-to-end stories need on one machine: sets the machine up, builds what runs, starts a stack
//! (Docker network, registry, local cloud, provisioner), talks to its parts the way their real callers do, and removes every
//! trace. Holds plumbing only: what should happen is asserted by the stories.

pub mod agent;
pub mod cloud;
pub mod command;
pub mod docker;
pub mod error;
pub mod forward;
pub mod host;
pub mod http;
mod image;
pub mod mcp;
mod pinned;
pub mod prepare;
pub mod process;
pub mod provisioner;
mod ready;
pub mod record;
mod registry;
pub mod release;
pub mod sdks;
pub mod sse;
pub mod stack;
pub mod watch;
pub mod workspace;

pub use agent::Agent;
pub use cloud::Cloud;
pub use error::{Result, StackError};
pub use http::Reply;
pub use provisioner::Provisioner;
pub use sdks::Sdks;
pub use stack::{Stack, StackOptions};
pub use watch::{Unwatched, Watch};
pub use workspace::Workspace;
