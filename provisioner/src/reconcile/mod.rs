//! The loop.
pub mod plan;
