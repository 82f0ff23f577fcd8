//! A DigitalOcean-compatible API whose droplets are system containers on this machine.
//!
//! One code path for the cloud: whatever speaks DigitalOcean's API v2 can be pointed at this server and gets droplets that really boot, with
//! systemd, cloud-init and a Docker Engine of their own. What makes a cloud hard to use is here too: lists that lag, addresses that come
//! late, rate limits, and faults on demand.
//!
//! [`server`] hands a request to [`gate`] (token, limits, faults), which hands it to [`api`]; [`control`] is what tests steer by.
//! [`cloud`] accepts in its [`ledger`] and carries out on a [`host`]; [`image`] makes what droplets are made from. What a droplet asks about
//! itself is answered by [`metadata`].

pub mod action;
pub mod api;
pub mod catalogue;
pub mod cloud;
pub mod contract;
pub mod control;
pub mod droplet;
pub mod faults;
pub mod gate;
pub mod host;
pub mod image;
pub mod ledger;
pub mod limits;
pub mod metadata;
pub mod order;
pub mod server;
pub mod subnet;
