//! What must hold of who is let where, whatever lists and wishes are. See [`crate::fuzz`].

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::rule::{listed, reachable};
use crate::instance::Destination;
use crate::instance::network::{Reach, Wanted};

/// Lines: the host and the port that are wanted, then places that are allowed, and addresses that the host turns out to have.
pub(crate) fn egress(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.lines().map(str::trim);
    let (host, port) = lines.next().unwrap_or_default().rsplit_once(' ').unwrap_or_default();
    let (Some(wanted), Ok(port)) = (Wanted::parse(host), port.parse::<u16>()) else { return };
    let lines: Vec<&str> = lines.take(16).collect();
    let allowed: BTreeSet<Destination> = lines.iter().filter_map(|line| line.parse().ok()).collect();
    for destination in &allowed {
        assert_eq!(&destination.to_string().parse::<Destination>().unwrap(), destination);
        let json = serde_json::to_string(destination).unwrap();
        assert_eq!(&serde_json::from_str::<Destination>(&json).unwrap(), destination);
    }
    if let Wanted::Name(name) = &wanted {
        // What a resolver might take for a number isn't a name.
        assert!(name.parse::<IpAddr>().is_err() && !name.ends_with('.') && name == &name.to_ascii_lowercase());
        assert!(!name.rsplit('.').next().unwrap().starts_with(|c: char| c.is_ascii_digit()), "{name}");
    }
    if listed(&allowed, &wanted, port).is_ok() {
        let by = |destination: &Destination| {
            let text = destination.to_string();
            let (host, allowed_port) = text.rsplit_once(':').unwrap();
            let same = match &wanted {
                Wanted::Name(name) => host == name || host.strip_prefix('*').is_some_and(|end| name.ends_with(end)),
                Wanted::Address(address) => host.trim_matches(['[', ']']).parse() == Ok(*address),
            };
            same && allowed_port == port.to_string()
        };
        assert!(allowed.iter().any(by), "{wanted:?} is let through by {allowed:?}");
    }
    let addresses: Vec<IpAddr> = lines.iter().filter_map(|line| line.parse().ok()).collect();
    let instance = IpAddr::from(Ipv4Addr::new(172, 18, 0, 9));
    let own = IpAddr::from(Ipv4Addr::new(203, 0, 113, 7));
    let Ok(let_to) = reachable(&addresses, port, &allowed, |at| at == instance, |at| at == own) else { return };
    for at in let_to {
        assert!(at.port() == port && addresses.iter().any(|address| address.to_canonical() == at.ip()), "{at}");
        assert_ne!(at.ip(), instance);
        let named = allowed.iter().any(|destination| destination.to_string() == at.to_string());
        assert!(named || at.ip() != own, "the droplet's own address");
        match Reach::of(at.ip()) {
            Reach::Public => {}
            Reach::Private => assert!(named, "{at} is private, and nothing names it"),
            Reach::Never => panic!("{at} is let to"),
        }
        assert!(!is_local(at), "{at}");
    }
}

/// Told apart without the code that is tested.
fn is_local(at: SocketAddr) -> bool {
    let v4 = |address: Ipv4Addr| {
        let first = address.octets()[0];
        first == 127 || first == 0 || first >= 224 || address.octets()[..2] == [169, 254]
    };
    match at.ip() {
        IpAddr::V4(address) => v4(address),
        IpAddr::V6(address) => {
            let mapped = address.to_ipv4_mapped().is_some_and(v4);
            mapped || address.segments()[..7] == [0; 7] || matches!(address.segments()[0], 0xfe80..=0xfebf | 0xff00..)
        }
    }
}
