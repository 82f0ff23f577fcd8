//! How many connections there are, and whose: nobody may hold so many that others get none.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Connections served at once; each takes two descriptors.
const MOST: usize = 512;
/// Of which one address may hold this many.
const MOST_OF_ONE: usize = 64;
/// Shortest time between two lines of log about what one address was refused.
const LOG_PAUSE: Duration = Duration::from_secs(1);

/// Connections, by who holds them. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Connections(Arc<Held>);

#[derive(Debug, Default)]
struct Held {
    by: Mutex<HashMap<IpAddr, Holder>>,
    turned_away: AtomicU64,
}

#[derive(Debug, Default)]
struct Holder {
    open: usize,
    logged: Option<Instant>,
    unlogged: u64,
}

/// One connection; dropped, it is over.
#[derive(Debug)]
pub(super) struct Place {
    connections: Connections,
    address: IpAddr,
}

impl Connections {
    fn with<T>(&self, act: impl FnOnce(&mut HashMap<IpAddr, Holder>) -> T) -> T {
        act(&mut self.0.by.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A place for one more connection from `address`, if there is one.
    pub(super) fn admit(&self, address: IpAddr) -> Option<Place> {
        let admitted = self.with(|by| {
            let total: usize = by.values().map(|holder| holder.open).sum();
            let holder = by.entry(address).or_default();
            let admitted = total < MOST && holder.open < MOST_OF_ONE;
            holder.open += usize::from(admitted);
            admitted
        });
        if !admitted {
            self.0.turned_away.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(Place { connections: self.clone(), address })
    }

    /// Whether something refused to `address` is to be logged now; how many such things weren't since the last that was.
    pub(super) fn may_log(&self, address: IpAddr) -> Option<u64> {
        let now = Instant::now();
        self.with(|by| {
            let holder = by.get_mut(&address)?;
            if holder.logged.is_some_and(|at| now.duration_since(at) < LOG_PAUSE) {
                holder.unlogged += 1;
                return None;
            }
            holder.logged = Some(now);
            Some(std::mem::take(&mut holder.unlogged))
        })
    }

    /// Connections open now.
    pub(super) fn open(&self) -> usize {
        self.with(|by| by.values().map(|holder| holder.open).sum())
    }

    /// Connections closed for being too many.
    pub(super) fn turned_away(&self) -> u64 {
        self.0.turned_away.load(Ordering::Relaxed)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.with(|by| {
            let Some(holder) = by.get_mut(&self.address) else { return };
            holder.open = holder.open.saturating_sub(1);
            // Addresses come and go with containers; only what is needed to keep the log short outlives a connection, and not for long.
            if by.len() > MOST {
                by.retain(|_, holder| holder.open > 0);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([172, 20, 0, last])
    }

    #[test]
    fn one_address_cannot_take_all_places_and_gets_them_back() {
        let connections = Connections::default();
        let mut held: Vec<_> = (0..MOST_OF_ONE).map(|_| connections.admit(address(2)).unwrap()).collect();
        assert!(connections.admit(address(2)).is_none());
        assert!(connections.admit(address(3)).is_some());
        held.pop();
        assert!(connections.admit(address(2)).is_some());
        assert_eq!((connections.open(), connections.turned_away()), (MOST_OF_ONE - 1, 1));
        for last in 10..=255 {
            held.extend((0..MOST_OF_ONE).map_while(|_| connections.admit(address(last))));
        }
        assert_eq!(connections.open(), MOST);
        drop(held);
        assert_eq!(connections.open(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_refused_again_and_again_is_logged_once_a_second_with_a_count() {
        let connections = Connections::default();
        let _place = connections.admit(address(2)).unwrap();
        let logged: Vec<_> = (0..4).map(|_| connections.may_log(address(2))).collect();
        assert_eq!(logged, [Some(0), None, None, None]);
        tokio::time::advance(LOG_PAUSE).await;
        assert_eq!(connections.may_log(address(2)), Some(3));
        assert_eq!(connections.may_log(address(9)), None, "nobody is connected from there");
    }
}
