//! The provisioner with its real router, real database and real cloud client; only the cloud itself is a fake that can be told to fail.

// Clippy's allowances for tests cover test functions, and not what they share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod ages;
mod cloud_client;
mod crash;
mod crowd;
mod deprovision;
mod enrolment;
mod ensure;
mod fake_cloud;
mod fleet;
mod http_shape;
mod kills;
mod listener;
mod plan_properties;
mod releases;
mod rig;
mod rollouts;
mod signed;
mod store;
mod trouble;
