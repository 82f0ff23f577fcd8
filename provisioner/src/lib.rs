//! The provisioner: makes sure an account has exactly one droplet with a working agent on it, and none when it wants none.
//!
//! `main` wires → [`http`] parses, calls and answers; [`reconcile`] is the only part that talks to the cloud → [`environment`] is the
//! domain, pure → the seams [`cloud`], [`store`] and [`owners`], each with one real adapter.

pub mod accounts;
pub mod board;
pub mod cloud;
pub mod config;
pub mod environment;
pub mod heartbeats;
pub mod http;
pub mod metrics;
pub mod operator;
pub mod owners;
pub mod reconcile;
pub mod releases;
pub mod requests;
pub mod roll;
pub mod rollout;
pub mod rollouts;
pub mod store;
pub mod user_data;
