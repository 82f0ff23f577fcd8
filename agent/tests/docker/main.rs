//! The agent on a real Docker Engine: its own router, loop, ledger and adapter in this process, or the real program.

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

mod bridge;
mod engine;
mod groups;
mod health;
mod host;
mod images;
mod inside;
mod isolation;
mod killed;
mod relay;
mod schemathesis;
mod secrets;
mod sessions;
mod updates;
