//! Who may be let where: a pure judgement of names first and of addresses then.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use crate::instance::Destination;
use crate::instance::network::{Reach, Wanted};

/// Why a request isn't let through, as its sender is told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("no instance whose egress is a list calls from this address")]
    Stranger,
    #[error("{host}:{port} is not in this instance's egress list")]
    NotListed { host: String, port: u16 },
    #[error("{address} is an address of the droplet itself or of its link, where no instance is let")]
    Never { address: IpAddr },
    #[error("{address} is another instance's address; instances reach each other in a group that shares a network")]
    Instance { address: IpAddr },
    #[error(
        "{address} is not a public address; to be let there, its egress list has to name the address itself and port {port}"
    )]
    Private { address: IpAddr, port: u16 },
}

/// Whether the list has the place a program wants to go to.
pub(super) fn listed(allowed: &BTreeSet<Destination>, wanted: &Wanted, port: u16) -> Result<(), Refusal> {
    if allowed.iter().any(|destination| destination.permits(wanted, port)) {
        return Ok(());
    }
    let host = match wanted {
        Wanted::Name(name) => name.clone(),
        Wanted::Address(address) => address.to_string(),
    };
    Err(Refusal::NotListed { host, port })
}

/// What of `addresses` may be connected to. A name that is listed may still lead where nobody is let: whoever runs the name decides what
/// addresses it has.
pub(super) fn reachable(
    addresses: &[IpAddr],
    port: u16,
    allowed: &BTreeSet<Destination>,
    is_instance: impl Fn(IpAddr) -> bool,
    is_own: impl Fn(IpAddr) -> bool,
) -> Result<Vec<SocketAddr>, Refusal> {
    let mut refusal = None;
    let mut reachable = Vec::new();
    for address in addresses.iter().map(IpAddr::to_canonical) {
        let at = SocketAddr::new(address, port);
        let named = allowed.iter().any(|destination| destination.names(at));
        let judged = match Reach::of(address) {
            Reach::Never => Err(Refusal::Never { address }),
            Reach::Public | Reach::Private if is_instance(address) => Err(Refusal::Instance { address }),
            Reach::Private if !named => Err(Refusal::Private { address, port }),
            Reach::Public if !named && is_own(address) => Err(Refusal::Private { address, port }),
            Reach::Public | Reach::Private => Ok(at),
        };
        match judged {
            Ok(at) => reachable.push(at),
            Err(why) => refusal = refusal.or(Some(why)),
        }
    }
    match refusal {
        Some(refusal) if reachable.is_empty() => Err(refusal),
        Some(_) | None => Ok(reachable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(destinations: &[&str]) -> BTreeSet<Destination> {
        destinations.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn judge(addresses: &[&str], allowed: &[&str]) -> Result<Vec<SocketAddr>, Refusal> {
        let addresses: Vec<IpAddr> = addresses.iter().map(|text| text.parse().unwrap()).collect();
        let is = |text: &'static str| move |address: IpAddr| address.to_string() == text;
        reachable(&addresses, 443, &list(allowed), is("172.18.0.9"), is("203.0.113.7"))
    }

    #[test]
    fn a_list_lets_through_what_it_names_and_nothing_else() {
        let allowed = list(&["api.example.com", "*.example.org:8443"]);
        let check = |host: &str, port| listed(&allowed, &Wanted::parse(host).unwrap(), port);
        assert_eq!(check("api.example.com", 443), Ok(()));
        assert_eq!(check("x.example.org", 8443), Ok(()));
        for (host, port) in [("api.example.com", 80), ("example.com", 443), ("1.1.1.1", 443)] {
            assert_eq!(check(host, port), Err(Refusal::NotListed { host: host.to_owned(), port }));
        }
    }

    #[test]
    fn a_name_leads_to_public_addresses_only_unless_the_list_names_the_address() {
        let public = Ok(vec!["1.1.1.1:443".parse().unwrap()]);
        assert_eq!(judge(&["1.1.1.1"], &["a.b"]), public);
        assert_eq!(judge(&["127.0.0.1", "1.1.1.1", "10.0.0.1"], &["a.b"]), public, "what is left is let through");
        for address in ["10.1.2.3", "172.18.0.1", "100.64.0.1", "fd00::1", "203.0.113.7"] {
            let refused = Err(Refusal::Private { address: address.parse().unwrap(), port: 443 });
            assert_eq!(judge(&[address], &["a.b"]), refused, "{address}");
        }
        assert_eq!(judge(&["10.1.2.3"], &["a.b", "10.1.2.3:443"]), Ok(vec!["10.1.2.3:443".parse().unwrap()]));
        assert!(judge(&["10.1.2.3"], &["a.b", "10.1.2.3:5432"]).is_err(), "another port isn't named");
    }

    #[test]
    fn nothing_in_a_list_leads_to_the_droplets_link_or_to_another_instance() {
        for address in ["169.254.169.254", "127.0.0.1", "::1", "::ffff:169.254.169.254", "fe80::1", "0.0.0.0"] {
            assert!(matches!(judge(&[address], &["a.b"]), Err(Refusal::Never { .. })), "{address}");
        }
        let refused = judge(&["172.18.0.9"], &["172.18.0.9:443"]);
        assert_eq!(refused, Err(Refusal::Instance { address: "172.18.0.9".parse().unwrap() }));
    }

    #[test]
    fn a_name_without_addresses_is_not_a_refusal() {
        assert_eq!(judge(&[], &["a.b"]), Ok(vec![]));
    }
}
