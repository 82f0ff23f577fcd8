//! Which addresses of a network droplets get.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::str::FromStr;

use crate::droplet::DropletId;

/// An IPv4 network in CIDR notation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    base: u32,
    prefix: u8,
}

/// A text that is no IPv4 network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an IPv4 network looks like 10.1.2.0/24, with a prefix of 8 to 30")]
pub struct InvalidSubnet;

impl FromStr for Subnet {
    type Err = InvalidSubnet;

    fn from_str(text: &str) -> Result<Self, InvalidSubnet> {
        let (address, prefix) = text.split_once('/').ok_or(InvalidSubnet)?;
        let address: Ipv4Addr = address.parse().map_err(|_| InvalidSubnet)?;
        let prefix: u8 = prefix.parse().map_err(|_| InvalidSubnet)?;
        if !(8..=30).contains(&prefix) {
            return Err(InvalidSubnet);
        }
        Ok(Self { base: u32::from(address) & (u32::MAX << (32 - prefix)), prefix })
    }
}

impl Subnet {
    /// The first address a machine can have.
    pub fn first(self) -> Ipv4Addr {
        Ipv4Addr::from(self.hosts().start)
    }

    /// The mask: 255.255.255.0 for a /24.
    pub fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::MAX << (32 - self.prefix))
    }

    /// Addresses a machine can have, the network's own and its broadcast address left out.
    fn hosts(self) -> std::ops::Range<u32> {
        self.base + 1..self.base + (u32::MAX >> self.prefix)
    }
}

impl std::fmt::Display for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.prefix)
    }
}

/// Hands out addresses in turn, so that one that was given back stays unused for as long as possible: a caller that still talks to
/// a removed droplet's address must not reach another droplet.
#[derive(Debug)]
pub struct AddressPool {
    subnet: Subnet,
    reserved: BTreeSet<Ipv4Addr>,
    leases: BTreeMap<DropletId, Ipv4Addr>,
    last: u32,
}

impl AddressPool {
    /// A pool over `subnet` that never hands out `reserved`.
    pub fn new(subnet: Subnet, reserved: BTreeSet<Ipv4Addr>) -> Self {
        // The first few are the gateway's and whatever the network's owner gave fixed addresses to.
        Self { subnet, reserved, leases: BTreeMap::new(), last: subnet.hosts().start.saturating_add(8) }
    }

    /// The next free address, now `droplet`'s; `None` when all are taken.
    pub fn lease(&mut self, droplet: DropletId) -> Option<Ipv4Addr> {
        let hosts = self.subnet.hosts();
        let after = self.last.saturating_add(1).clamp(hosts.start, hosts.end);
        let taken: BTreeSet<Ipv4Addr> = self.leases.values().chain(&self.reserved).copied().collect();
        let free = (after..hosts.end)
            .chain(hosts.start..after)
            .map(Ipv4Addr::from)
            .find(|address| !taken.contains(address))?;
        self.restore(droplet, free);
        Some(free)
    }

    /// Notes that `droplet` has had that address since before this pool was made.
    pub fn restore(&mut self, droplet: DropletId, address: Ipv4Addr) {
        self.leases.insert(droplet, address);
        self.last = address.into();
    }

    /// The address `droplet` has.
    pub fn of(&self, droplet: DropletId) -> Option<Ipv4Addr> {
        self.leases.get(&droplet).copied()
    }

    /// The droplet whose address fits.
    pub fn holder(&self, fits: impl Fn(Ipv4Addr) -> bool) -> Option<DropletId> {
        self.leases.iter().find(|(_, address)| fits(**address)).map(|(droplet, _)| *droplet)
    }

    /// Makes the address of `droplet` available again.
    pub fn release(&mut self, droplet: DropletId) {
        self.leases.remove(&droplet);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_in_turn_and_a_freed_one_comes_last() {
        let subnet: Subnet = "10.9.8.77/28".parse().unwrap();
        assert_eq!(subnet.to_string(), "10.9.8.64/28");
        let gateway = Ipv4Addr::new(10, 9, 8, 65);
        let mut pool = AddressPool::new(subnet, BTreeSet::from([gateway]));
        let first = pool.lease(DropletId(0)).unwrap();
        pool.release(DropletId(0));
        let seen: Vec<_> = (1..).map_while(|droplet| pool.lease(DropletId(droplet))).collect();
        assert_eq!(seen.len(), 13, "fourteen hosts less the gateway");
        assert_eq!(seen.last(), Some(&first));
        assert!(!seen.contains(&gateway));
        assert_eq!(pool.of(DropletId(13)), Some(first));
        assert_eq!(pool.holder(|address| address == first), Some(DropletId(13)));
        assert_eq!(pool.holder(|address| address == gateway), None);
        assert_eq!(subnet.first(), gateway);
        assert_eq!(subnet.mask(), Ipv4Addr::new(255, 255, 255, 240));
    }

    #[test]
    fn nonsense_is_no_network() {
        for text in ["", "10.0.0.0", "10.0.0.0/33", "10.0.0.0/31", "fd00::/64", "ten/8"] {
            assert_eq!(text.parse::<Subnet>(), Err(InvalidSubnet), "{text}");
        }
    }
}
