//! The agent's listening socket, which systemd keeps while the agent is restarted: whoever connects meanwhile waits a moment and isn't
//! refused.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;

use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::net::TcpListener;

const NAME: &str = "agent-port";

/// The socket on `port`: the one systemd has kept, where there is one, else a new one that it keeps from now on.
///
/// # Errors
/// When the port can't be had.
pub(crate) fn listen(port: u16) -> io::Result<TcpListener> {
    let kept = ListenFd::from_env().take_tcp_listener(0).ok().flatten();
    // Another port may have been set since.
    let kept = kept.filter(|kept| kept.local_addr().is_ok_and(|address| address.port() == port));
    if let Some(kept) = kept {
        kept.set_nonblocking(true)?;
        return TcpListener::from_std(kept);
    }
    let listener = std::net::TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?;
    listener.set_nonblocking(true)?;
    // Whatever systemd kept before is of no use any more.
    let drop_old = NotifyState::FdStoreRemove;
    let replaced = sd_notify::notify(&[drop_old, NotifyState::FdName(NAME)]).and_then(|()| {
        sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(NAME)], &[listener.as_fd()])
    });
    if let Err(error) = replaced {
        tracing::warn!(%error, "systemd could not be given the socket; a restart will turn callers away for a moment");
    }
    TcpListener::from_std(listener)
}
