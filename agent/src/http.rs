//! The agent's HTTP API: parses requests, calls what knows, maps errors. It decides nothing about instances.

pub mod callers;
pub mod error;
pub mod frame;
pub mod server;
pub mod tls;
