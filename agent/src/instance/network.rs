//! What an instance may reach: the world, a list of it, or nothing, and beside it the other members of its group.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use dtma_api::GroupId;
use serde::{Deserialize, Serialize};

/// What an instance may reach beyond itself. Nothing of this is about who reaches it: the agent does, and nobody else.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Where it may connect to.
    #[serde(default)]
    pub egress: Egress,
    /// The group whose members reach each other and it, by their names; none shares nothing with anybody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupId>,
}

impl Network {
    /// It is what an instance gets that asks for nothing.
    pub fn is_default(&self) -> bool {
        self == &Self::default()
    }
}

/// Where an instance may connect to, other members of its group apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Egress {
    /// Wherever the droplet's network leads, but for the metadata service and other instances.
    #[default]
    Open,
    /// Nowhere.
    None,
    /// Only there, and only through the agent's proxy.
    AllowList(BTreeSet<Destination>),
}

/// One place an instance may connect to: a host and a port. As text `api.example.com:443`, `*.example.com:443`, `10.1.2.3:5432` or
/// `[2001:db8::1]:443`; read without a port it is 443's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Destination {
    host: Host,
    port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Host {
    /// This name, lower case, no dot at its end.
    Name(String),
    /// Every name that ends in a dot and this.
    Below(String),
    /// This address.
    Address(IpAddr),
}

/// What a program asks to be connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// A name, lower case, no dot at its end.
    Name(String),
    /// An address.
    Address(IpAddr),
}

/// Why a text is no destination; the message says what would be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidDestination {
    /// It isn't formed like one.
    #[error(
        "must be host:port, the host a name, *.name or an address (IPv6 in brackets), the port 1 to 65535 or left out for 443"
    )]
    Form,
    /// Nobody may be let there.
    #[error("is an address of the machine itself, of its link or of many at once, where no instance may be let")]
    Unreachable,
}

const DEFAULT_PORT: u16 = 443;

/// Variables by which programs find a proxy; the agent's own where egress is a list.
pub const PROXY_VARIABLES: [&str; 7] =
    ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "NODE_USE_ENV_PROXY"];

impl Destination {
    /// Whether this lets a program go where it wants to. For a name that says nothing yet about the addresses it may turn out to have.
    pub fn permits(&self, wanted: &Wanted, port: u16) -> bool {
        if port != self.port {
            return false;
        }
        match (&self.host, wanted) {
            (Host::Name(allowed), Wanted::Name(name)) => allowed == name,
            (Host::Below(allowed), Wanted::Name(name)) => {
                name.strip_suffix(allowed.as_str()).is_some_and(|rest| rest.ends_with('.'))
            }
            (Host::Address(allowed), Wanted::Address(address)) => *allowed == plain(*address),
            (Host::Name(_) | Host::Below(_), Wanted::Address(_)) | (Host::Address(_), Wanted::Name(_)) => false,
        }
    }

    /// Whether it names this very address and port.
    pub fn names(&self, address: SocketAddr) -> bool {
        self.permits(&Wanted::Address(address.ip()), address.port())
    }
}

impl Wanted {
    /// A host as a program writes it: a name, or an address (IPv6 with or without brackets).
    pub fn parse(text: &str) -> Option<Self> {
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        if let Ok(address) = bare.parse::<IpAddr>() {
            return Some(Self::Address(plain(address)));
        }
        name(text).map(Self::Name)
    }
}

/// An IPv4 address that is written as an IPv6 one is the IPv4 one.
fn plain(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// A host name in lower case. The last label has a letter in it: what has none is read as an address by some.
fn name(text: &str) -> Option<String> {
    let text = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let valid = text.len() <= 253
        && text.split('.').all(label)
        && text.rsplit('.').next().is_some_and(|last| last.starts_with(|c: char| c.is_ascii_alphabetic()));
    valid.then_some(text)
}

/// What an address is, as far as it matters for who may be let there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Anybody's, out in the world.
    Public,
    /// In a network that isn't the world's: only when a list names the very address.
    Private,
    /// Of the machine itself, of its link (the metadata service is there), or of many at once: never.
    Never,
}

impl Reach {
    /// What this address is, by its number alone.
    pub fn of(address: IpAddr) -> Self {
        match plain(address) {
            IpAddr::V4(address) => Self::of_v4(address),
            IpAddr::V6(address) => {
                let [first, second, .., high, low] = address.segments();
                if address.is_loopback()
                    || address.is_unspecified()
                    || address.is_multicast()
                    || address.is_unicast_link_local()
                {
                    return Self::Never;
                }
                let embedded = || {
                    let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
                    Self::of_v4(Ipv4Addr::new(a, b, c, d))
                };
                match (first, second) {
                    // Translated to IPv4 on the way (NAT64), so what counts is where it ends.
                    (0x64, 0xff9b) => embedded(),
                    // ::a.b.c.d, as old as useless.
                    (0, 0) => Self::Never,
                    (0xfc00..=0xfdff, _) | (0xfec0..=0xfeff, _) => Self::Private,
                    // Tunnels whose other end is an IPv4 address in the number (6to4, Teredo).
                    (0x2002, _) | (0x2001, 0) => Self::Private,
                    _ => Self::Public,
                }
            }
        }
    }

    fn of_v4(address: Ipv4Addr) -> Self {
        let [first, second, third, _] = address.octets();
        if address.is_loopback()
            || address.is_link_local()
            || address.is_multicast()
            || address.is_broadcast()
            || first == 0
            || first >= 240
        {
            return Self::Never;
        }
        let shared = first == 100 && (64..128).contains(&second);
        let special = (first, second, third) == (192, 0, 0) || (first == 198 && (18..20).contains(&second));
        if address.is_private() || shared || special { Self::Private } else { Self::Public }
    }
}

impl TryFrom<String> for Destination {
    type Error = InvalidDestination;

    fn try_from(text: String) -> Result<Self, InvalidDestination> {
        text.parse()
    }
}

impl FromStr for Destination {
    type Err = InvalidDestination;

    fn from_str(text: &str) -> Result<Self, InvalidDestination> {
        let (host, port) = match text.rsplit_once(':') {
            // A colon within brackets is no port's, and an IPv6 address without brackets has no port to tell.
            Some((_, port)) if port.ends_with(']') => (text, None),
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        };
        let port = match port {
            None => DEFAULT_PORT,
            Some(port) if port.bytes().all(|b| b.is_ascii_digit()) => {
                port.parse().ok().filter(|port| *port > 0).ok_or(InvalidDestination::Form)?
            }
            Some(_) => return Err(InvalidDestination::Form),
        };
        if let Some(below) = host.strip_prefix("*.") {
            let host = name(below).map(Host::Below).ok_or(InvalidDestination::Form)?;
            return Ok(Self { host, port });
        }
        if host.contains(':') && !host.starts_with('[') {
            return Err(InvalidDestination::Form);
        }
        let host = match Wanted::parse(host).ok_or(InvalidDestination::Form)? {
            Wanted::Name(name) => Host::Name(name),
            Wanted::Address(address) if Reach::of(address) == Reach::Never => {
                return Err(InvalidDestination::Unreachable);
            }
            Wanted::Address(address) => Host::Address(address),
        };
        Ok(Self { host, port })
    }
}

impl From<Destination> for String {
    fn from(destination: Destination) -> Self {
        destination.to_string()
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Name(name) => write!(f, "{name}:{}", self.port),
            Host::Below(name) => write!(f, "*.{name}:{}", self.port),
            Host::Address(address) => SocketAddr::new(*address, self.port).fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destination(text: &str) -> Destination {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn a_destination_is_read_and_written_the_same_every_time() {
        for (text, written) in [
            ("api.github.com:443", "api.github.com:443"),
            ("api.github.com", "api.github.com:443"),
            ("API.GitHub.com.:8443", "api.github.com:8443"),
            ("*.example.com", "*.example.com:443"),
            ("10.1.2.3:5432", "10.1.2.3:5432"),
            ("[2001:db8::1]:80", "[2001:db8::1]:80"),
            ("[2001:db8::1]", "[2001:db8::1]:443"),
            ("[::ffff:10.1.2.3]:1", "10.1.2.3:1"),
            ("_dmarc.example.com:1", "_dmarc.example.com:1"),
        ] {
            assert_eq!(destination(text).to_string(), written);
            assert_eq!(destination(written), destination(text));
        }
    }

    #[test]
    fn what_is_no_destination_is_refused() {
        for text in [
            "",
            "*",
            "*:443",
            "*.",
            "*.*.com",
            "a..b",
            "a b",
            "https://example.com",
            "example.com/path",
            "example.com:",
            "example.com:0",
            "example.com:65536",
            "example.com:+1",
            "-a.com",
            "2001:db8::1",
            "2001:db8::1:443",
            "[2001:db8::1]443",
            "10.1.2",
            "0x7f.1",
            "127.1",
            "2130706433",
            "user@example.com",
            "exämple.com",
            &format!("{}.com", "a".repeat(64)),
        ] {
            assert_eq!(text.parse::<Destination>(), Err(InvalidDestination::Form), "{text:?}");
        }
        for text in [
            "127.0.0.1:80",
            "[::1]:80",
            "[::ffff:127.0.0.1]:80",
            "0.0.0.0:80",
            "169.254.169.254:80",
            "[::ffff:169.254.169.254]:80",
            "[64:ff9b::a9fe:a9fe]:80",
            "[fe80::1]:80",
            "224.0.0.1:80",
            "255.255.255.255:80",
            "[ff02::1]:80",
        ] {
            assert_eq!(text.parse::<Destination>(), Err(InvalidDestination::Unreachable), "{text:?}");
        }
    }

    #[test]
    fn a_star_stands_for_what_is_below_a_name_and_not_for_the_name() {
        let permits = |list: &str, host: &str, port| destination(list).permits(&Wanted::parse(host).unwrap(), port);
        assert!(permits("*.example.com", "a.example.com", 443));
        assert!(permits("*.example.com", "A.B.Example.COM.", 443));
        assert!(!permits("*.example.com", "example.com", 443));
        assert!(!permits("*.example.com", "badexample.com", 443));
        assert!(!permits("*.example.com", "a.example.com", 80));
        assert!(permits("example.com", "example.com", 443));
        assert!(!permits("example.com", "a.example.com", 443));
        assert!(permits("10.1.2.3:5", "10.1.2.3", 5));
        assert!(permits("10.1.2.3:5", "[::ffff:10.1.2.3]", 5));
        assert!(!permits("example.com", "10.1.2.3", 443));
    }

    #[test]
    fn addresses_are_sorted_by_whose_they_are() {
        for (address, reach) in [
            ("1.1.1.1", Reach::Public),
            ("2606:4700::1111", Reach::Public),
            ("10.0.0.1", Reach::Private),
            ("172.31.255.255", Reach::Private),
            ("172.32.0.1", Reach::Public),
            ("192.168.1.1", Reach::Private),
            ("100.64.0.1", Reach::Private),
            ("fd00::1", Reach::Private),
            ("64:ff9b::a00:1", Reach::Private),
            ("64:ff9b::101:101", Reach::Public),
            ("2002:7f00:1::", Reach::Private),
            ("127.9.9.9", Reach::Never),
            ("169.254.0.1", Reach::Never),
            ("0.1.2.3", Reach::Never),
            ("240.0.0.1", Reach::Never),
            ("::ffff:127.0.0.1", Reach::Never),
            ("::", Reach::Never),
            ("::7f00:1", Reach::Never),
            ("fe80::1", Reach::Never),
        ] {
            assert_eq!(Reach::of(address.parse().unwrap()), reach, "{address}");
        }
    }

    #[test]
    fn what_asks_for_nothing_is_left_out_of_what_is_written() {
        assert_eq!(serde_json::from_str::<Network>("{}").unwrap(), Network::default());
        let list = Egress::AllowList(BTreeSet::from([destination("a.b")]));
        let network = Network { egress: list, group: Some("team".parse().unwrap()) };
        let text = serde_json::to_string(&network).unwrap();
        assert_eq!(text, r#"{"egress":{"allow_list":["a.b:443"]},"group":"team"}"#);
        assert_eq!(serde_json::from_str::<Network>(&text).unwrap(), network);
    }
}
