//! What is outside: names, the machine's own addresses, connections.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Names looked up at once. The system's resolver blocks a thread until it gives up, and the agent has few that may block.
const LOOKUPS: usize = 3;
/// How long a name may take, the wait for its turn included.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one address may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

#[async_trait]
pub(super) trait World: Send + Sync + 'static {
    /// Every address of a name, the system's favourite first.
    async fn addresses(&self, name: &str) -> io::Result<Vec<IpAddr>>;

    /// Whether it is this machine's.
    fn is_own(&self, address: IpAddr) -> bool;

    /// Connects to it.
    async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream>;
}

/// The world itself.
pub(super) struct System {
    lookups: Arc<Semaphore>,
}

impl Default for System {
    fn default() -> Self {
        Self { lookups: Arc::new(Semaphore::new(LOOKUPS)) }
    }
}

#[async_trait]
impl World for System {
    async fn addresses(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        let lookups = Arc::clone(&self.lookups);
        let name = name.to_owned();
        let lookup = async move {
            let turn = lookups.acquire_owned().await.map_err(io::Error::other)?;
            let found = tokio::task::spawn_blocking(move || {
                // Held for as long as the thread is, whoever is still waiting for it.
                let _turn = turn;
                (name.as_str(), 0).to_socket_addrs().map(|found| found.map(|at| at.ip()).collect())
            });
            found.await.map_err(io::Error::other)?
        };
        timeout(LOOKUP_TIMEOUT, lookup).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    fn is_own(&self, address: IpAddr) -> bool {
        // Only an address of this machine can be bound to; so nobody has to keep a list of them.
        UdpSocket::bind((address, 0)).is_ok()
    }

    async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(to)).await;
        let stream = stream.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_machine_knows_its_own_addresses_and_names() {
        let system = System::default();
        assert!(system.is_own("127.0.0.1".parse().unwrap()));
        assert!(!system.is_own("192.0.2.1".parse().unwrap()));
        assert!(system.addresses("localhost").await.unwrap().iter().all(IpAddr::is_loopback));
        assert_eq!(system.addresses("127.0.0.1").await.unwrap(), ["127.0.0.1".parse::<IpAddr>().unwrap()]);
    }
}
