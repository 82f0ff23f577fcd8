//! The way to an instance's MCP endpoint, and the proof that one is there. Messages pass through unread: whatever era or extension
//! client and server speak is theirs.

pub mod bridge;
mod era;
pub mod link;
pub mod origin;
mod probe;
mod proxy;

use std::time::Duration;

use axum::body::Body;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

#[cfg(any(test, fuzzing))]
pub(crate) use bridge::fuzzed::message as fuzzed_message;
pub use bridge::{Bridge, Bridges, Known, Refused, Sharing};
#[cfg(any(test, fuzzing))]
pub(crate) use probe::fuzzed::probe as fuzzed_probe;
pub use probe::{HttpProber, McpProber};
pub(crate) use proxy::drop_hop_by_hop;
pub use proxy::{Forwarding, Obstacle, Proxy};

/// A container is on this host: a connection is made at once or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Shorter than the 5 s after which common servers (uvicorn, Node) hang up, so that a message doesn't meet a connection being closed.
const POOL_IDLE: Duration = Duration::from_secs(3);
/// The longest message either way; also what is asked of bridges.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

type HttpClient = Client<HttpConnector, Body>;

fn http_client() -> HttpClient {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(POOL_IDLE)
        .pool_max_idle_per_host(4)
        .build(connector)
}
