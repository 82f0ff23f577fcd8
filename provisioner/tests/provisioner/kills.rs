//! The real process, ended by SIGKILL at twenty random moments while ten accounts want and give back their environments: at the end
//! each has exactly one droplet, and the cloud has no other.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::{Path as Segment, Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::rig::{FLEET_KEY, FLEET_TAG, SECRET};

const ACCOUNTS: usize = 10;
const KILLS: usize = 20;
const PATIENCE: Duration = Duration::from_secs(120);

/// The part of DigitalOcean's API that the provisioner uses, over droplets that are only remembered.
#[derive(Default)]
struct Remembered {
    droplets: BTreeMap<i64, Value>,
    made: i64,
}

type Cloud = Arc<Mutex<Remembered>>;

async fn create(State(cloud): State<Cloud>, Json(order): Json<Value>) -> (StatusCode, Json<Value>) {
    let id = {
        let mut cloud = cloud.lock().unwrap();
        cloud.made += 1;
        let id = cloud.made;
        let droplet = json!({
            "id": id, "status": "active", "tags": order["tags"], "created_at": Timestamp::now(),
            "networks": {"v4": [{"type": "public", "ip_address": format!("192.0.2.{}", id % 250)}]},
        });
        cloud.droplets.insert(id, droplet);
        id
    };
    // The droplet is there, and whoever asked may be gone before it is told.
    sleep(Duration::from_millis(30)).await;
    let links = json!({"actions": [{"id": id, "rel": "create", "href": "x"}]});
    (StatusCode::ACCEPTED, Json(json!({"droplet": {"id": id}, "links": links})))
}

async fn list(State(cloud): State<Cloud>, Query(query): Query<BTreeMap<String, String>>) -> Json<Value> {
    let tag = json!(query["tag_name"]);
    let cloud = cloud.lock().unwrap();
    let tagged: Vec<&Value> =
        cloud.droplets.values().filter(|droplet| droplet["tags"].as_array().unwrap().contains(&tag)).collect();
    Json(json!({"droplets": tagged, "links": {}}))
}

async fn show(State(cloud): State<Cloud>, Segment(id): Segment<i64>) -> (StatusCode, Json<Value>) {
    match cloud.lock().unwrap().droplets.get(&id) {
        Some(droplet) => (StatusCode::OK, Json(json!({"droplet": droplet}))),
        None => (StatusCode::NOT_FOUND, Json(json!({"id": "not_found", "message": "gone"}))),
    }
}

async fn destroy(State(cloud): State<Cloud>, Segment(id): Segment<i64>) -> StatusCode {
    sleep(Duration::from_millis(10)).await;
    match cloud.lock().unwrap().droplets.remove(&id) {
        Some(_) => StatusCode::NO_CONTENT,
        None => StatusCode::NOT_FOUND,
    }
}

async fn action(Segment(id): Segment<i64>) -> Json<Value> {
    Json(json!({"action": {"id": id, "status": "completed"}}))
}

async fn serve(cloud: &Cloud) -> SocketAddr {
    let router = Router::new()
        .route("/v2/droplets", post(create).get(list))
        .route("/v2/droplets/{id}", get(show).delete(destroy))
        .route("/v2/actions/{id}", get(action))
        .with_state(Arc::clone(cloud));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(axum::serve(listener, router).into_future());
    address
}

/// Ended at the latest with the test.
struct Process(Child);

impl Process {
    fn start(folder: &Path, cloud: SocketAddr, port: u16) -> Self {
        let log = std::fs::File::options().create(true).append(true).open(folder.join("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_dtma-provisioner"))
            .env_clear()
            .envs([
                ("LISTEN_ADDRESS", "127.0.0.1"),
                ("PORT", &port.to_string()),
                ("PUBLIC_URL", "http://127.0.0.1"),
                ("INTERNAL_API_SECRET", SECRET),
                ("BACKEND_TO_DTMA_API_KEY", FLEET_KEY),
                ("FLEET_TAG", FLEET_TAG),
                ("DO_API_BASE_URL", &format!("http://{cloud}")),
                ("DO_API_TOKEN", "token"),
                ("RELEASE_KEYS", "unsigned"),
                ("LOOKUP_GRACE_SECONDS", "1"),
                ("ORPHAN_AGE_SECONDS", "1"),
                ("RECONCILE_INTERVAL_SECONDS", "1"),
            ])
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Process {
    /// SIGKILL, and gone when this returns.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Random enough, and told by its seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

struct Caller {
    http: reqwest::Client,
    base: String,
}

impl Caller {
    /// Nothing while there is no process to answer.
    async fn send(&self, method: reqwest::Method, account: usize, what: &str) -> Option<Value> {
        let url = format!("{}/internal/agents/agent-{account}/{what}", self.base);
        let request = self.http.request(method, url).header("x-internal-api-secret", SECRET);
        request.send().await.ok()?.json().await.ok()
    }

    async fn ensure(&self, account: usize) -> Option<Value> {
        self.send(reqwest::Method::POST, account, "ensure-tool-environment?wait=0").await
    }

    async fn delete(&self, account: usize) -> Option<Value> {
        self.send(reqwest::Method::DELETE, account, "tool-environment?wait=0").await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a minute: cargo xtask test"]
async fn killed_twenty_times_it_ends_with_one_droplet_for_each_account_and_no_other() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let seed = Timestamp::now().as_nanosecond() as u64 | 1;
    println!("seed {seed}");
    let folder = tempfile::tempdir().unwrap();
    let releases = folder.path().join("releases/1.2.3");
    std::fs::create_dir_all(&releases).unwrap();
    std::fs::write(releases.join("dtma-agent-1.2.3-x86_64-linux-gnu.tar.gz"), "archive").unwrap();
    let cloud = Cloud::default();
    let address = serve(&cloud).await;
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build().unwrap();
    let caller = Arc::new(Caller { http, base: format!("http://127.0.0.1:{port}") });

    let enough = CancellationToken::new();
    let callers: Vec<_> = (0..ACCOUNTS)
        .map(|account| {
            let (caller, enough) = (Arc::clone(&caller), enough.clone());
            let mut dice = Dice(seed.wrapping_mul(2 * account as u64 + 3));
            tokio::spawn(async move {
                while !enough.is_cancelled() {
                    // Wanted twice as often as not.
                    match dice.below(3) {
                        0 => caller.delete(account).await,
                        _ => caller.ensure(account).await,
                    };
                    sleep(Duration::from_millis(dice.below(150))).await;
                }
            })
        })
        .collect();
    let mut dice = Dice(seed);
    for _ in 0..KILLS {
        let process = Process::start(folder.path(), address, port);
        sleep(Duration::from_millis(50 + dice.below(700))).await;
        drop(process);
    }
    enough.cancel();
    for one in callers {
        one.await.unwrap();
    }

    let _last = Process::start(folder.path(), address, port);
    let begun = Instant::now();
    let settled = async {
        loop {
            let mut wanted = BTreeSet::new();
            for account in 0..ACCOUNTS {
                let answer = caller.ensure(account).await.unwrap_or_default();
                if answer["data"]["status"] == "awaiting_heartbeat" {
                    wanted.extend(answer["data"]["droplet_id"].as_i64());
                }
            }
            let there: BTreeSet<i64> = cloud.lock().unwrap().droplets.keys().copied().collect();
            if wanted.len() == ACCOUNTS && wanted == there {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    let log = || std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
    if timeout(PATIENCE, settled).await.is_err() {
        panic!("seed {seed}: {:?}\n{}", cloud.lock().unwrap().droplets, log());
    }
    let made = cloud.lock().unwrap().made;
    println!("{made} droplets made in all; settled {:?} after the last start", begun.elapsed());
    assert!(made > i64::try_from(ACCOUNTS).unwrap(), "something happened before the kills");
    assert!(!log().contains("panicked"), "{}", log());
}
