//! The port itself, over real sockets: those who say nothing, drip, or never listen take nothing from anybody else.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use dtma_api::environment::EnvironmentStatus;
use dtma_provisioner::http::server::{Limits, Server};
use dtma_provisioner::metrics::Metrics;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::rig::{Rig, SECRET};

const ME: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const ANOTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
const PATIENCE: Duration = Duration::from_secs(20);

struct Port {
    rig: Rig,
    address: SocketAddr,
    metrics: Arc<Metrics>,
    task: JoinHandle<()>,
}

/// Limits a test can wait for.
fn short() -> Limits {
    Limits {
        opening: Duration::from_millis(300),
        idle: Duration::from_millis(300),
        stall: Duration::from_millis(300),
        ..Limits::default()
    }
}

impl Port {
    async fn open(limits: Limits) -> Self {
        let rig = Rig::start().await;
        let metrics = Arc::new(Metrics::default());
        let server = Server::bind(SocketAddr::from((ME, 0)), limits, Arc::clone(&metrics)).await.unwrap();
        let address = server.local_address().unwrap();
        let task = tokio::spawn(server.run(rig.router.clone(), rig.stop.clone()));
        Self { rig, address, metrics, task }
    }

    async fn connect(&self, from: IpAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((from, 0))).unwrap();
        socket.connect(self.address).await.unwrap()
    }

    /// One request on a connection of its own; nothing when it was closed unanswered.
    async fn ask(&self, from: IpAddr, path: &str) -> Option<String> {
        let mut stream = self.connect(from).await;
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let mut answer = String::new();
        let exchange = async {
            stream.write_all(request.as_bytes()).await?;
            stream.read_to_string(&mut answer).await
        };
        let _ = timeout(PATIENCE, exchange).await.expect("answered or closed");
        Some(answer).filter(|answer| !answer.is_empty())
    }

    fn count(&self, name: &str) -> u64 {
        let page = self.metrics.page(&Default::default(), None);
        let line = page.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    async fn until_open(&self, count: u64) {
        let looking = async {
            while self.count("dtma_connections ") != count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let waited = timeout(PATIENCE, looking).await;
        waited.unwrap_or_else(|_| panic!("{} are open and not {count}", self.count("dtma_connections ")));
    }
}

/// Until the other side closes; what it sent.
async fn rest(stream: &mut TcpStream) -> String {
    let mut answer = String::new();
    // A reset is as good an end as any.
    let _ = timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("closed");
    answer
}

#[tokio::test]
async fn a_head_that_drips_is_cut_off_and_holds_nobody_up() {
    let port = Port::open(short()).await;
    let (mut reader, mut writer) = port.connect(ME).await.into_split();
    let begun = Instant::now();
    let dripping = tokio::spawn(async move {
        writer.write_all(b"GET /health HTTP/1.1\r\n").await.unwrap();
        while writer.write_all(b"x-y: z\r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(port.ask(ME, "/health").await.unwrap().starts_with("HTTP/1.1 200"));
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, reader.read_to_end(&mut answer)).await.expect("closed");
    assert!(begun.elapsed() >= short().opening);
    dripping.await.unwrap();
    port.until_open(0).await;
}

#[tokio::test]
async fn the_next_head_must_come_in_time_too() {
    let port = Port::open(short()).await;
    let mut stream = port.connect(ME).await;
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea").await.unwrap();
    let begun = Instant::now();
    assert!(rest(&mut stream).await.starts_with("HTTP/1.1 200"));
    assert!(begun.elapsed() >= short().idle);
}

#[tokio::test]
async fn a_thousand_idle_connections_shut_nobody_else_out_and_do_not_stay() {
    let limits = Limits { opening: Duration::from_secs(3), ..Limits::of_this_process() };
    let many = limits.per_network.min(1000);
    let port = Port::open(Limits { per_network: many, ..limits }).await;
    let mut idle = Vec::new();
    for _ in 0..many {
        idle.push(port.connect(ME).await);
    }
    port.until_open(many as u64).await;
    assert_eq!(port.ask(ME, "/health").await, None, "one party has its share and no more");
    assert!(port.count("dtma_connections_turned_away_total") >= 1);
    assert!(port.ask(ANOTHER, "/health").await.unwrap().starts_with("HTTP/1.1 200"));
    port.until_open(0).await;
    assert!(port.ask(ME, "/health").await.unwrap().starts_with("HTTP/1.1 200"));
    for mut stream in idle {
        assert_eq!(rest(&mut stream).await, "");
    }
}

#[tokio::test]
async fn once_half_the_places_are_taken_no_connection_is_kept_for_later() {
    let port = Port::open(Limits { connections: 4, per_network: 4, ..Limits::default() }).await;
    let request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut kept = Vec::new();
    for _ in 0..2 {
        let mut stream = port.connect(ME).await;
        stream.write_all(request).await.unwrap();
        let mut head = [0; 256];
        let read = timeout(PATIENCE, stream.read(&mut head)).await.unwrap().unwrap();
        assert!(!String::from_utf8_lossy(&head[..read]).contains("connection: close"));
        kept.push(stream);
    }
    let mut third = port.connect(ME).await;
    third.write_all(request).await.unwrap();
    let answer = rest(&mut third).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"), "{answer}");
    port.until_open(2).await;
    drop(kept);
    port.until_open(0).await;
}

#[tokio::test]
async fn who_asks_for_much_and_never_listens_is_let_go() {
    let port = Port::open(short()).await;
    let archive = "dtma-agent-1.2.3-x86_64-linux-gnu.tar.gz";
    let releases = port.rig.folder.path().join("releases/1.2.3");
    std::fs::File::create(releases.join(archive)).unwrap().set_len(64 << 20).unwrap();
    let mut deaf = port.connect(ME).await;
    let request = format!("GET /agent/v1/releases/1.2.3/{archive} HTTP/1.1\r\nhost: x\r\n\r\n");
    deaf.write_all(request.as_bytes()).await.unwrap();
    port.until_open(1).await;
    port.until_open(0).await;
    assert!(port.ask(ME, "/health").await.unwrap().starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn at_the_end_those_who_wait_are_answered_and_the_idle_are_let_go() {
    let port = Port::open(Limits::default()).await;
    let mut waiting = port.connect(ME).await;
    let request = format!(
        "POST /internal/agents/agent-1/ensure-tool-environment?wait=60 HTTP/1.1\r\nhost: x\r\n\
         x-internal-api-secret: {SECRET}\r\ncontent-length: 0\r\n\r\n"
    );
    waiting.write_all(request.as_bytes()).await.unwrap();
    port.rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    let mut idle = port.connect(ME).await;
    idle.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut head = [0; 1024];
    assert!(timeout(PATIENCE, idle.read(&mut head)).await.unwrap().unwrap() > 0);

    port.rig.stop.cancel();
    assert!(rest(&mut waiting).await.starts_with("HTTP/1.1 202"), "it was told how things stand");
    assert_eq!(rest(&mut idle).await, "");
    timeout(PATIENCE, port.task).await.expect("the server ends").unwrap();
    assert!(TcpStream::connect(port.address).await.is_err(), "nobody else is let in");
}

#[tokio::test]
async fn at_the_end_those_who_never_finish_are_cut_off() {
    let port = Port::open(Limits { grace: Duration::from_millis(200), ..Limits::default() }).await;
    let mut slow = port.connect(ME).await;
    let request = format!(
        "POST /internal/agents/a/ensure-tool-environment HTTP/1.1\r\nhost: x\r\nx-internal-api-secret: {SECRET}\r\n\
         content-length: 100\r\n\r\n{{"
    );
    slow.write_all(request.as_bytes()).await.unwrap();
    port.until_open(1).await;
    port.rig.stop.cancel();
    timeout(PATIENCE, port.task).await.expect("the server ends").unwrap();
    assert_eq!(rest(&mut slow).await, "");
}
