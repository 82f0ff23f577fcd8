//! The way out for instances whose egress is a list: a forward proxy on the gateway address of their own network, which has no other way out.
//!
//! Owns who may be let where, and the connections that were let. It knows an instance by the address it calls from, which Docker gives to no
//! other container while that one exists, and takes no other word for it. Everything it can't decide it refuses. Names are looked up here
//! and nowhere else, once for each connection, and what is connected to is the address that was judged.

mod connections;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
mod rule;
mod serve;
mod watched;
mod world;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dtma_api::InstanceName;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

use self::connections::Connections;
use self::world::{System, World};
use crate::instance::Destination;

/// Where the proxy listens, on the gateway address of the network for allow-lists.
pub const PORT: u16 = 3128;

/// Whose an address is.
pub trait Directory: Send + Sync + 'static {
    /// The instance that calls from this address and may go where its list says.
    fn resident(&self, address: IpAddr) -> Option<Resident>;

    /// Whether any instance is reached at this address.
    fn is_instance(&self, address: IpAddr) -> bool;
}

/// An instance that may go where its list says.
#[derive(Debug, Clone)]
pub struct Resident {
    /// Which.
    pub instance: InstanceName,
    /// Its list.
    pub allowed: Arc<BTreeSet<Destination>>,
}

/// How the proxy is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum EgressState {
    /// No instance has needed it so far.
    #[default]
    Unneeded,
    /// It listens.
    Open(SocketAddr),
    /// It is needed and isn't there, so that the instances that need it reach nothing.
    Closed {
        /// Why.
        problem: String,
    },
}

/// The proxy's address could not be had.
#[derive(Debug, thiserror::Error)]
#[error("the egress proxy can't listen on {address}: {source}")]
pub struct CannotListen {
    address: SocketAddr,
    source: io::Error,
}

/// What the proxy has done since the agent started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EgressFigures {
    /// Connections open now.
    pub open: usize,
    /// Requests let through to where they wanted.
    pub permitted: u64,
    /// Requests refused because a list, or the proxy itself, doesn't let them.
    pub refused: u64,
    /// Requests let through that came to nothing: no such name, nobody there.
    pub failed: u64,
    /// Connections closed for being too many.
    pub turned_away: u64,
}

/// The proxy. Cheap to clone; nothing listens before [`Self::open`].
#[derive(Clone)]
pub struct EgressProxy(Arc<Shared>);

struct Shared {
    directory: Box<dyn Directory>,
    world: Box<dyn World>,
    connections: Connections,
    counts: Counts,
    state: Mutex<EgressState>,
    door: tokio::sync::Mutex<Option<Door>>,
    shutdown: CancellationToken,
}

#[derive(Default)]
struct Counts {
    permitted: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
}

/// What listens; dropped, it doesn't any more. Connections it has let in stay.
struct Door {
    address: SocketAddr,
    _open: DropGuard,
}

impl EgressProxy {
    /// A proxy for the instances in `directory`. All of it ends when `shutdown` says so.
    pub fn new(directory: impl Directory, shutdown: CancellationToken) -> Self {
        Self::over(directory, System::default(), shutdown)
    }

    fn over(directory: impl Directory, world: impl World, shutdown: CancellationToken) -> Self {
        Self(Arc::new(Shared {
            directory: Box::new(directory),
            world: Box::new(world),
            connections: Connections::default(),
            counts: Counts::default(),
            state: Mutex::default(),
            door: tokio::sync::Mutex::new(None),
            shutdown,
        }))
    }

    /// Sees that the proxy listens at `address`, and nowhere else.
    ///
    /// # Errors
    /// When the address can't be had. Nothing listens then, and [`Self::state`] says why.
    pub async fn open(&self, address: SocketAddr) -> Result<(), CannotListen> {
        let mut door = self.0.door.lock().await;
        if door.as_ref().is_some_and(|door| door.address == address) {
            return Ok(());
        }
        *door = None;
        let listener = match TcpListener::bind(address).await {
            Ok(listener) => listener,
            Err(source) => {
                let error = CannotListen { address, source };
                self.closed(error.to_string());
                return Err(error);
            }
        };
        let open = self.0.shutdown.child_token();
        tokio::spawn(serve::accept(Arc::downgrade(&self.0), listener, open.clone()));
        tracing::info!(%address, "the egress proxy listens");
        *door = Some(Door { address, _open: open.drop_guard() });
        self.set(EgressState::Open(address));
        Ok(())
    }

    /// It is needed and can't be opened; [`Self::state`] says so from now on, unless it is open all the same.
    pub fn closed(&self, problem: String) {
        tracing::error!(problem, "the egress proxy is closed: instances with an allow-list reach nothing");
        self.set(EgressState::Closed { problem });
    }

    fn set(&self, state: EgressState) {
        *self.0.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// How it is doing.
    pub fn state(&self) -> EgressState {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What it has done.
    pub fn figures(&self) -> EgressFigures {
        let counts = &self.0.counts;
        EgressFigures {
            open: self.0.connections.open(),
            permitted: counts.permitted.load(Ordering::Relaxed),
            refused: counts.refused.load(Ordering::Relaxed),
            failed: counts.failed.load(Ordering::Relaxed),
            turned_away: self.0.connections.turned_away(),
        }
    }
}

#[cfg(test)]
mod tests;
