//! What tests of every kind of channel do with one.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::Link;

const PATIENCE: Duration = Duration::from_secs(30);

pub(super) async fn within<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("it takes far too long")
}

pub(super) async fn receive(link: &mut Link) -> Result<Bytes, String> {
    within(link.from_server.recv()).await.expect("it ended without saying why").map_err(|end| end.reason)
}

/// The reason for which it ended, after which there is nothing and nothing can be sent.
pub(super) async fn end_of(mut link: Link) -> String {
    let reason = receive(&mut link).await.unwrap_err();
    assert!(within(link.from_server.recv()).await.is_none());
    within(link.to_server.closed()).await;
    reason
}
