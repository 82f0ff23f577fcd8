//! The proxy over real connections, in a world where names lead wherever a test wants.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::*;

const SOON: Duration = Duration::from_secs(10);
const HOME: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Where the calls of these tests come from lives one instance, or none.
struct OneHouse(Option<&'static [&'static str]>);

impl Directory for OneHouse {
    fn resident(&self, address: IpAddr) -> Option<Resident> {
        let allowed = self.0.filter(|_| address == HOME)?;
        let allowed = Arc::new(allowed.iter().map(|text| text.parse().unwrap()).collect());
        Some(Resident { instance: "one".parse().unwrap(), allowed })
    }

    fn is_instance(&self, address: IpAddr) -> bool {
        address == IpAddr::from([172, 20, 0, 9])
    }
}

/// Names and their addresses; whatever is connected to is the server at `server`.
struct Elsewhere {
    names: BTreeMap<&'static str, &'static str>,
    server: SocketAddr,
    connected: Arc<Mutex<Vec<SocketAddr>>>,
}

#[async_trait]
impl World for Elsewhere {
    async fn addresses(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        match self.names.get(name) {
            Some(address) => Ok(vec![address.parse().unwrap()]),
            None => Err(io::Error::other("no such name")),
        }
    }

    fn is_own(&self, address: IpAddr) -> bool {
        address == IpAddr::from([203, 0, 113, 7])
    }

    async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        if to.ip() == IpAddr::from([203, 0, 113, 99]) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        self.connected.lock().unwrap().push(to);
        TcpStream::connect(self.server).await
    }
}

struct Scene {
    proxy: EgressProxy,
    at: SocketAddr,
    connected: Arc<Mutex<Vec<SocketAddr>>>,
    shutdown: CancellationToken,
}

/// A proxy for one instance with that list, or for nobody. The server behind it says back what it was asked.
async fn scene(allowed: Option<&'static [&'static str]>) -> Scene {
    let server = TcpListener::bind((HOME, 0)).await.unwrap();
    let names = [
        ("api.example.com", "203.0.113.5"),
        ("sub.example.org", "203.0.113.6"),
        ("rebound.example.org", "169.254.169.254"),
        ("own.example.org", "203.0.113.7"),
        ("private.example.org", "10.1.2.3"),
        ("neighbour.example.org", "172.20.0.9"),
        ("down.example.org", "203.0.113.99"),
    ];
    let connected = Arc::default();
    let world =
        Elsewhere { names: names.into(), server: server.local_addr().unwrap(), connected: Arc::clone(&connected) };
    tokio::spawn(async move {
        while let Ok((mut peer, _)) = server.accept().await {
            tokio::spawn(async move {
                let mut asked = vec![0; 4096];
                let length = peer.read(&mut asked).await.unwrap_or(0);
                let asked = String::from_utf8_lossy(&asked[..length]).into_owned();
                let head = "HTTP/1.1 200 OK\r\nconnection: close\r\nkeep-alive: x";
                let answer = format!("{head}\r\ncontent-length: {}\r\n\r\n{asked}", asked.len());
                let _ = peer.write_all(answer.as_bytes()).await;
            });
        }
    });
    let shutdown = CancellationToken::new();
    let proxy = EgressProxy::over(OneHouse(allowed), world, shutdown.clone());
    // The system chooses the port; asking for it by number would race with others.
    let free = TcpListener::bind((HOME, 0)).await.unwrap().local_addr().unwrap();
    proxy.open(free).await.unwrap();
    Scene { proxy, at: free, connected, shutdown }
}

/// The head of an answer, and nothing after it.
async fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(SOON, stream.read_u8()).await.unwrap().unwrap());
    }
    String::from_utf8(head).unwrap()
}

impl Scene {
    async fn ask(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.at).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = timeout(SOON, stream.read_to_end(&mut answer)).await.expect("an answer, and its end");
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn connect(&self, to: &str) -> String {
        self.ask(&format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n")).await
    }
}

#[tokio::test]
async fn a_tunnel_to_what_is_listed_carries_bytes_as_they_come() {
    let scene = scene(Some(&["api.example.com"])).await;
    let mut stream = TcpStream::connect(scene.at).await.unwrap();
    stream.write_all(b"CONNECT API.example.com:443 HTTP/1.1\r\nHost: nonsense\r\n\r\n").await.unwrap();
    let head = head(&mut stream).await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    // What some programs would take for the tunnel's end, or for its contents.
    assert!(!head.contains("close") && !head.contains("content-length"), "{head}");
    stream.write_all(b"\x16\x03not http").await.unwrap();
    let mut answer = Vec::new();
    timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert!(answer.ends_with(b"\r\n\r\n\x16\x03not http"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(*scene.connected.lock().unwrap(), ["203.0.113.5:443".parse().unwrap()]);
    let figures = scene.proxy.figures();
    assert_eq!((figures.permitted, figures.refused, figures.failed), (1, 0, 0));
}

#[tokio::test]
async fn a_plain_exchange_reaches_its_server_as_if_asked_directly() {
    let scene = scene(Some(&["api.example.com:80"])).await;
    let answer = scene
        .ask(
            "GET http://api.example.com/path?query HTTP/1.1\r\nHost: elsewhere.example.com\r\nProxy-Authorization: Basic x\r\n\
             Proxy-Connection: keep-alive\r\nX-Own: kept\r\nConnection: x-drop\r\nX-Drop: 1\r\n\r\n",
        )
        .await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    let (_, asked) = answer.split_once("\r\n\r\n").unwrap();
    assert!(asked.starts_with("GET /path?query HTTP/1.1\r\n"), "{asked}");
    assert!(asked.contains("host: api.example.com\r\n") && asked.contains("x-own: kept\r\n"), "{asked}");
    for kept_back in ["proxy-", "x-drop", "elsewhere"] {
        assert!(!asked.to_lowercase().contains(kept_back), "{kept_back}: {asked}");
    }
    let answer = scene.ask("POST http://api.example.com/ HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
}

#[tokio::test]
async fn what_is_not_listed_is_refused_with_a_sentence_and_nothing_is_connected_to() {
    let scene = scene(Some(&["api.example.com", "*.example.org", "203.0.113.8:443", "172.20.0.9:443"])).await;
    for (to, why) in [
        ("other.example.com:443", "other.example.com:443 is not in this instance's egress list"),
        ("api.example.com:80", "is not in this instance's egress list"),
        ("example.org:443", "is not in this instance's egress list"),
        ("203.0.113.5:443", "is not in this instance's egress list"),
        ("169.254.169.254:80", "is not in this instance's egress list"),
        ("rebound.example.org:443", "169.254.169.254 is an address of the droplet itself or of its link"),
        ("own.example.org:443", "203.0.113.7 is not a public address"),
        ("private.example.org:443", "has to name the address itself and port 443"),
        ("neighbour.example.org:443", "172.20.0.9 is another instance's address"),
        ("172.20.0.9:443", "172.20.0.9 is another instance's address"),
    ] {
        let answer = scene.connect(to).await;
        assert!(answer.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{to}: {answer}");
        assert!(answer.contains(why), "{to}: {answer}");
    }
    let plain = scene.ask("GET http://other.example.com/ HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(plain.starts_with("HTTP/1.1 403 "), "{plain}");
    assert_eq!(*scene.connected.lock().unwrap(), []);
    assert_eq!(scene.proxy.figures().refused, 11);
}

#[tokio::test]
async fn nobody_the_directory_does_not_know_gets_anywhere() {
    let scene = scene(None).await;
    let answer = scene.connect("api.example.com:443").await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert!(answer.contains("no instance whose egress is a list calls from this address"), "{answer}");
    assert_eq!(*scene.connected.lock().unwrap(), []);
}

#[tokio::test]
async fn what_makes_no_sense_or_comes_to_nothing_says_so() {
    let scene = scene(Some(&["down.example.org", "missing.example.org", "api.example.com"])).await;
    for (request, status, why) in [
        ("GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n", 400, "this is a forward proxy"),
        ("GET https://api.example.com/ HTTP/1.1\r\nHost: x\r\n\r\n", 400, "this is a forward proxy"),
        ("CONNECT api.example.com HTTP/1.1\r\nHost: x\r\n\r\n", 400, "this is a forward proxy"),
        ("CONNECT 127.1:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "neither a name nor an address"),
        ("CONNECT missing.example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n", 502, "could not be looked up"),
        ("CONNECT down.example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n", 502, "203.0.113.99:443 did not accept"),
    ] {
        let answer = scene.ask(request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(why), "{request}: {answer}");
    }
    assert_eq!(scene.proxy.figures().failed, 2);
}

#[tokio::test]
async fn the_proxy_moves_to_another_address_and_says_where_it_is_or_why_it_is_not() {
    let scene = scene(Some(&["api.example.com"])).await;
    assert_eq!(scene.proxy.state(), EgressState::Open(scene.at));
    scene.proxy.open(scene.at).await.unwrap();
    let other = SocketAddr::from(([127, 0, 0, 2], scene.at.port()));
    scene.proxy.open(other).await.unwrap();
    assert_eq!(scene.proxy.state(), EgressState::Open(other));
    let gone = async { while TcpStream::connect(scene.at).await.is_ok() {} };
    timeout(SOON, gone).await.expect("nobody listens where it was");

    let nobodys = SocketAddr::from(([192, 0, 2, 1], PORT));
    let error = scene.proxy.open(nobodys).await.unwrap_err().to_string();
    assert!(error.contains("192.0.2.1:3128"), "{error}");
    assert_eq!(scene.proxy.state(), EgressState::Closed { problem: error });
    let gone = async { while TcpStream::connect(other).await.is_ok() {} };
    timeout(SOON, gone).await.expect("it fails closed");
}

#[tokio::test]
async fn tunnels_end_with_the_agent() {
    let scene = scene(Some(&["api.example.com"])).await;
    let mut stream = TcpStream::connect(scene.at).await.unwrap();
    stream.write_all(b"CONNECT api.example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    head(&mut stream).await;
    assert_eq!(scene.proxy.figures().open, 1);
    scene.shutdown.cancel();
    let ended = timeout(SOON, stream.read(&mut [0; 1])).await.unwrap();
    assert!(matches!(ended, Ok(0) | Err(_)));
    timeout(SOON, async {
        while scene.proxy.figures().open > 0 {
            tokio::task::yield_now().await
        }
    })
    .await
    .unwrap();
}
