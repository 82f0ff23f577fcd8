//! The provisioner: makes sure an account has exactly one droplet with a working agent on it, and none when it wants none.
//!
//! `main` wires → `http` parses, calls and answers; [`reconcile`] is the only part that talks to the cloud → [`environment`] is the
//! domain, pure → the seams [`cloud`], `store` and `owners`, each with one real adapter.

pub mod cloud;
pub mod environment;
pub mod metrics;
pub mod reconcile;
pub mod user_data;
