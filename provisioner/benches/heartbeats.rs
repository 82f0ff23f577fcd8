//! What one provisioner on SQLite takes: a released process, ten thousand environments in its database, their agents' heartbeats over
//! loopback as fast as a bounded number of connections can send them. `cargo xtask bench` shows the figures beside their bars.
//!
//! The last line is `HEARTBEATS {…}`: heartbeats a second, their 99th percentile, and the process' memory.

// What measurements are made of may fail as loudly as tests.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use dtma_api::environment::EnvironmentEvent;
use dtma_api::{CertificatePin, EnvironmentId, TokenHash};
use dtma_provisioner::environment::{
    Attempt, DropletId, DropletSpec, EnrolledAgent, Environment, RunningDroplet, State, after,
};
use dtma_provisioner::store::Store as _;
use dtma_provisioner::store::sqlite::SqliteStore;
use jiff::Timestamp;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;
use uuid::Uuid;

const AGENTS: u32 = 10_000;
/// At one time; ten thousand agents that report once a minute have about as many in flight when answers take a second.
const CONNECTIONS: u32 = 160;
const WARM_UP: Duration = Duration::from_secs(2);
const MEASURED: Duration = Duration::from_secs(15);

/// Ended at the latest with the measurement.
struct Provisioner(Child);

impl Drop for Provisioner {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::main]
async fn main() {
    let folder = tempfile::tempdir().unwrap();
    let database = format!("sqlite:{}", folder.path().join("db.sqlite").display());
    let begun = Instant::now();
    fill(&database).await;
    println!("{AGENTS} environments written in {:?}", begun.elapsed());
    let address = free_address().await;
    let provisioner = start(folder.path(), &database, address);
    until_healthy(address).await;
    let idle = memory(&provisioner);
    let sending: Vec<_> = (0..CONNECTIONS).map(|first| tokio::spawn(report(address, first))).collect();
    let mut took = Vec::new();
    for one in sending {
        took.extend(one.await.unwrap());
    }
    took.sort_unstable();
    let rate = took.len() as f64 / MEASURED.as_secs_f64();
    let p99 = took[took.len() * 99 / 100].as_secs_f64() * 1e3;
    let figures = json!({"per_second": rate, "p99_ms": p99, "idle_mb": idle, "loaded_mb": memory(&provisioner)});
    println!("HEARTBEATS {figures}");
}

async fn fill(database: &str) {
    let store = SqliteStore::open(database).await.unwrap();
    let now = Timestamp::now();
    for number in 0..AGENTS {
        let attempt = Attempt {
            id: Uuid::new_v4(),
            number: 1,
            started_at: now,
            run_started_at: now,
            deadline: after(now, Duration::from_secs(900)),
            token_hash: TokenHash::of(&format!("token-{number}")),
            token_expires_at: now,
        };
        let agent = EnrolledAgent {
            pin: CertificatePin::of_spki(&number.to_be_bytes()),
            retry_key_hash: TokenHash::of("retry"),
            bearers: vec![TokenHash::of(&bearer(number))],
            version: "1.2.3".to_owned(),
            enrolled_at: now,
        };
        let droplet = RunningDroplet { id: DropletId(number.into()), ip: number.to_be_bytes().into() };
        let spec = DropletSpec { region: "nyc3".into(), size: "s-1vcpu-1gb".into(), image: "debian-12-x64".into() };
        let account = format!("account-{number}").parse().unwrap();
        let mut environment = Environment::new(EnvironmentId(Uuid::now_v7()), account, spec, now);
        environment.state = State::Active { attempt, droplet, agent, ready_at: now };
        let event = EnvironmentEvent { at: now, status: environment.state.status(), phase: None, message: "up".into() };
        store.insert(&environment, &event).await.unwrap();
    }
    store.close().await;
}

fn bearer(number: u32) -> String {
    format!("bearer-of-agent-{number}")
}

async fn free_address() -> SocketAddr {
    tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

fn start(folder: &Path, database: &str, address: SocketAddr) -> Provisioner {
    let log = std::fs::File::create(folder.join("log")).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_dtma-provisioner"))
        .env_clear()
        .envs([
            ("LISTEN_ADDRESS", address.ip().to_string().as_str()),
            ("PORT", address.port().to_string().as_str()),
            ("PUBLIC_URL", "http://127.0.0.1"),
            ("DATABASE_URL", database),
            ("INTERNAL_API_SECRET", "internal-internal-internal-internal"),
            ("BACKEND_TO_DTMA_API_KEY", "fleet-fleet-fleet-fleet-fleet-fleet"),
            // Nobody listens there, so no droplet is looked at.
            ("DO_API_BASE_URL", "http://127.0.0.1:1"),
            ("DO_API_TOKEN", "token"),
            ("RELEASE_KEYS", "unsigned"),
        ])
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    Provisioner(child)
}

async fn until_healthy(address: SocketAddr) {
    let looking = async {
        loop {
            if let Ok(mut stream) = TcpStream::connect(address).await {
                let mut answer = [0; 12];
                stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
                stream.read_exact(&mut answer).await.unwrap();
                assert_eq!(&answer, b"HTTP/1.1 200");
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), looking).await.expect("the provisioner serves");
}

/// Every agent whose turn it is on one connection, one after the other; how long each was kept waiting.
async fn report(address: SocketAddr, first: u32) -> Vec<Duration> {
    let body = heartbeat();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let begun = Instant::now();
    let mut took = Vec::new();
    let mut answer = vec![0; 4096];
    let mut agent = first;
    while begun.elapsed() < WARM_UP + MEASURED {
        let request = format!(
            "POST /agent/v1/heartbeat HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            bearer(agent),
            body.len()
        );
        let sent = Instant::now();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut read = 0;
        while !answer[..read].ends_with(b"\r\n\r\n") {
            let more = stream.read(&mut answer[read..]).await.unwrap();
            assert!(more > 0, "the connection was closed");
            read += more;
        }
        assert!(answer.starts_with(b"HTTP/1.1 204"), "{}", String::from_utf8_lossy(&answer[..read]));
        if (WARM_UP..WARM_UP + MEASURED).contains(&begun.elapsed()) {
            took.push(sent.elapsed());
        }
        agent = (agent + CONNECTIONS) % AGENTS;
    }
    took
}

/// As an agent with three instances sends it.
fn heartbeat() -> Arc<str> {
    let tool = |number: u32| {
        json!({
            "account_tool_instance_id": format!("tool-instance-{number}"),
            "instance_name_on_toolbox": format!("tool-{number}"),
            "status_on_toolbox": "running",
            "runtime_details": {
                "container_id": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
                "image": "registry.example.com/tools/tool:1.2.3",
                "image_digest": "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
                "health": "healthy",
                "restart_count": 0,
                "error": null,
            },
        })
    };
    let report = json!({
        "dtma_version": "1.2.3",
        "system_status": {
            "cpu_load_percent": 12.5,
            "memory": {"total_bytes": 1_024_000_000_u64, "active_bytes": 1, "free_bytes": 1, "used_bytes": 1},
            "disk": {"mount": "/", "total_bytes": 25_000_000_000_u64, "used_bytes": 1, "free_bytes": 1},
        },
        "tool_statuses": (0..3).map(tool).collect::<Vec<_>>(),
        "sent_at": Timestamp::now(),
        "agent_started_at": Timestamp::now(),
        "docker_reachable": true,
        "settings_generation": 1,
    });
    report.to_string().into()
}

/// Resident memory of the process, in MB.
fn memory(provisioner: &Provisioner) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", provisioner.0.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<f64>().unwrap() * 1024.0 / 1e6
}
