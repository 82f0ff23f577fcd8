//! A DigitalOcean-compatible API whose droplets are system containers on this machine.
//!
//! One code path for the cloud: whatever speaks DigitalOcean's API v2 can be pointed at this server and gets droplets that really boot, with
//! systemd, cloud-init and a Docker Engine of their own. What makes a cloud hard to use is here too: lists that lag, addresses that come
//! late, rate limits, and faults on demand.

pub mod action;
pub mod droplet;
pub mod host;
pub mod image;
pub mod subnet;
