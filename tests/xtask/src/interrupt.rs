//! Being told to end. A task is given up by dropping it, which ends every program it runs and removes every stack it has started.

use tokio::signal::unix::{SignalKind, signal};

/// Resolves, with a name for it, when this process is told to end.
pub(crate) async fn interrupted() -> &'static str {
    let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hang_up)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => "Ctrl-C",
        _ = terminate.recv() => "SIGTERM",
        _ = hang_up.recv() => "SIGHUP",
    }
}
