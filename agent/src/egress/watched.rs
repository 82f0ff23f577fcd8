//! A connection that knows when something last passed over it, so that one that is forgotten can be closed.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// When something last passed.
#[derive(Debug, Clone)]
pub(super) struct Activity(Arc<Last>);

#[derive(Debug)]
struct Last {
    began: Instant,
    /// Milliseconds from `began`.
    passed: AtomicU64,
}

impl Activity {
    fn note(&self) {
        let passed = u64::try_from(self.0.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.passed.store(passed, Ordering::Relaxed);
    }

    /// Ends once nothing has passed for `longest`.
    pub(super) async fn until_idle(&self, longest: Duration) {
        loop {
            let due = self.0.began + Duration::from_millis(self.0.passed.load(Ordering::Relaxed)) + longest;
            if Instant::now() >= due {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// A stream and its activity.
#[derive(Debug)]
pub(super) struct Watched<S> {
    stream: S,
    activity: Activity,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S) -> (Self, Activity) {
        let activity = Activity(Arc::new(Last { began: Instant::now(), passed: AtomicU64::new(0) }));
        (Self { stream, activity: activity.clone() }, activity)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if read.is_ready() {
            self.activity.note();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if written.is_ready() {
            self.activity.note();
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_once_nothing_has_passed_for_so_long_in_either_direction() {
        let longest = Duration::from_secs(10);
        let (near, mut far) = tokio::io::duplex(16);
        let (mut watched, activity) = Watched::new(near);
        let began = Instant::now();
        let idle = tokio::spawn(async move {
            activity.until_idle(longest).await;
            began.elapsed().as_secs()
        });
        tokio::time::advance(Duration::from_secs(9)).await;
        watched.write_all(b"out").await.unwrap();
        tokio::time::advance(Duration::from_secs(9)).await;
        far.write_all(b"in").await.unwrap();
        watched.read_exact(&mut [0; 2]).await.unwrap();
        assert_eq!(idle.await.unwrap(), 28);
    }
}
