//! One provisioner for one test: a temporary database, a fake cloud, the real loop and the real router.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response};
use dtma_api::enrolment::AgentSettings;
use dtma_api::environment::EnvironmentStatus;
use dtma_api::{CertificatePin, EnvironmentId, Token, TokenHash};
use dtma_provisioner::accounts::Accounts;
use dtma_provisioner::board::Board;
use dtma_provisioner::cloud::Cloud;
use dtma_provisioner::environment::{DropletSpec, Environment};
use dtma_provisioner::heartbeats::Heartbeats;
use dtma_provisioner::http::{App, Parts, router};
use dtma_provisioner::metrics::Metrics;
use dtma_provisioner::owners::Owners;
use dtma_provisioner::reconcile::plan::Policy;
use dtma_provisioner::reconcile::{Pace, Reconciler};
use dtma_provisioner::releases::{Releases, Trust};
use dtma_provisioner::rollouts::{RolloutPace, RolloutParts, Rollouts};
use dtma_provisioner::store::sqlite::SqliteStore;
use dtma_provisioner::store::{RolloutStore, Store};
use dtma_release::PublicKeys;
use http_body_util::BodyExt;
use jiff::Timestamp;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::fake_cloud::FakeCloud;

pub(crate) const SECRET: &str = "internal-internal-internal-internal";
pub(crate) const FLEET_KEY: &str = "fleet-fleet-fleet-fleet-fleet-fleet";
pub(crate) const FLEET_TAG: &str = "dtma-fleet";
/// Nothing in these tests takes longer; if it does, it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn spec() -> DropletSpec {
    DropletSpec { region: "nyc3".to_owned(), size: "s-1vcpu-1gb".to_owned(), image: "debian-12-x64".to_owned() }
}

/// Waits and limits in proportion to a cloud that answers in microseconds.
pub(crate) fn policy() -> Policy {
    Policy {
        fleet_tag: FLEET_TAG.to_owned(),
        lookup_grace: Duration::from_millis(600),
        delete_repeat: Duration::from_millis(20),
        ..Policy::default()
    }
}

pub(crate) fn pace() -> Pace {
    Pace {
        first_look: Duration::from_millis(5),
        slowest_look: Duration::from_millis(20),
        crowd_look: Duration::from_millis(10),
        tick: Duration::from_millis(20),
        sweep: Duration::from_millis(30),
        unresponsive_after: Duration::from_secs(60),
    }
}

pub(crate) struct Rig {
    pub(crate) folder: TempDir,
    pub(crate) cloud: Arc<FakeCloud>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) board: Arc<Board>,
    pub(crate) router: Router,
    pub(crate) stop: CancellationToken,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What a test may want to be otherwise.
pub(crate) struct Wishes {
    pub(crate) policy: Policy,
    pub(crate) pace: Pace,
    pub(crate) owners: Option<Arc<dyn Owners>>,
    pub(crate) release: bool,
    /// Who makes its releases; unsigned ones do when absent.
    pub(crate) maker: Option<PublicKeys>,
    /// Where its releases are, if not in the rig's own folder.
    pub(crate) releases: Option<PathBuf>,
    pub(crate) rollout_pace: RolloutPace,
    pub(crate) silent_after_seconds: u64,
    /// Where the database is to be, if not in the rig's own folder.
    pub(crate) database: Option<PathBuf>,
    /// What stands between the rollouts and their database.
    pub(crate) rollout_store: fn(Arc<SqliteStore>) -> Arc<dyn RolloutStore>,
    pub(crate) cloud: Arc<FakeCloud>,
}

impl Default for Wishes {
    fn default() -> Self {
        Self {
            policy: policy(),
            pace: pace(),
            owners: None,
            release: true,
            maker: None,
            releases: None,
            rollout_pace: RolloutPace {
                tick: Duration::from_millis(20),
                gap: Duration::from_millis(2),
                idle: Duration::from_millis(50),
            },
            silent_after_seconds: 180,
            database: None,
            rollout_store: |store| store,
            cloud: Arc::default(),
        }
    }
}

impl Rig {
    pub(crate) async fn start() -> Self {
        Self::with(Wishes::default(), async |_: &dyn Store| {}).await
    }

    /// `before` sees the database before the loop does.
    pub(crate) async fn with(wishes: Wishes, before: impl AsyncFnOnce(&dyn Store)) -> Self {
        let cloud = Arc::clone(&wishes.cloud) as Arc<_>;
        Self::on(cloud, wishes, before).await
    }

    /// On another cloud than the wished one.
    pub(crate) async fn on(cloud: Arc<dyn Cloud>, wishes: Wishes, before: impl AsyncFnOnce(&dyn Store)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let database = wishes.database.unwrap_or_else(|| folder.path().join("db.sqlite"));
        let url = format!("sqlite:{}", database.display());
        let sqlite = Arc::new(SqliteStore::open(&url).await.unwrap());
        let store: Arc<dyn Store> = Arc::clone(&sqlite) as Arc<dyn Store>;
        before(store.as_ref()).await;
        let releases = wishes.releases.unwrap_or_else(|| folder.path().join("releases"));
        if wishes.release {
            std::fs::create_dir_all(releases.join("1.2.3")).unwrap();
            std::fs::write(releases.join("1.2.3/dtma-agent-1.2.3-x86_64-linux-gnu.tar.gz"), "archive").unwrap();
        }
        let public_url = "http://provisioner.test:3000".to_owned();
        let releases = Arc::new(Releases::new(
            releases,
            wishes.maker.map_or(Trust::Unsigned, Trust::Signed),
            None,
            format!("{public_url}/agent/v1/releases"),
        ));
        let metrics = Arc::new(Metrics::default());
        let board = Arc::new(Board::open(Arc::clone(&store), Timestamp::now()).await.unwrap());
        let (heartbeats, _) = Heartbeats::start(Arc::clone(&store), Arc::clone(&metrics));
        let stop = CancellationToken::new();
        let parts = RolloutParts {
            store: (wishes.rollout_store)(sqlite),
            board: Arc::clone(&board),
            releases: Arc::clone(&releases),
            metrics: Arc::clone(&metrics),
            pace: wishes.rollout_pace,
        };
        let rollouts = Arc::new(Rollouts::open(parts).await.unwrap());
        drop(rollouts.start(&stop));
        let reconciler = Reconciler {
            board: Arc::clone(&board),
            cloud,
            releases: Arc::clone(&releases),
            public_url,
            policy: wishes.policy,
            pace: wishes.pace,
            metrics: Arc::clone(&metrics),
        };
        drop(reconciler.start(&stop));
        let app = App::new(Parts {
            board: Arc::clone(&board),
            accounts: Accounts { store: Arc::clone(&store), owners: wishes.owners },
            heartbeats,
            releases,
            rollouts,
            silent_after_seconds: wishes.silent_after_seconds,
            metrics,
            internal_secret: TokenHash::of(SECRET),
            spec: spec(),
            agent_settings: AgentSettings {
                generation: 2,
                caller_key_sha256s: vec![TokenHash::of(FLEET_KEY)],
                heartbeat_interval_seconds: 60,
            },
            stop: stop.clone(),
        });
        Self { folder, cloud: wishes.cloud, store, board, router: router(app), stop }
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Response<Body> {
        self.router.clone().oneshot(request).await.unwrap()
    }

    /// A request with the internal secret; the answer's status and JSON.
    pub(crate) async fn internal(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
        let request = Request::builder().method(method).uri(path).header("x-internal-api-secret", SECRET);
        json_of(self.send(request.body(body).unwrap()).await).await
    }

    pub(crate) async fn ensure(&self, agent: &str, wait: u32) -> (u16, Value) {
        let path = format!("/internal/agents/{agent}/ensure-tool-environment?wait={wait}");
        self.internal("POST", &path, None).await
    }

    pub(crate) async fn get(&self, agent: &str) -> (u16, Value) {
        self.internal("GET", &format!("/internal/agents/{agent}/tool-environment"), None).await
    }

    pub(crate) async fn delete(&self, agent: &str, wait: u32) -> (u16, Value) {
        self.internal("DELETE", &format!("/internal/agents/{agent}/tool-environment?wait={wait}"), None).await
    }

    /// A request an agent or its droplet sends.
    pub(crate) async fn agent(&self, path: &str, bearer: &str, body: Value) -> (u16, Value) {
        let request = Request::builder()
            .method("POST")
            .uri(format!("/agent/v1/{path}"))
            .header("authorization", format!("Bearer {bearer}"))
            .header("content-type", "application/json");
        json_of(self.send(request.body(Body::from(body.to_string())).unwrap()).await).await
    }

    pub(crate) async fn enrol(&self, token: &str, retry_key: &str, key: &[u8]) -> (u16, Value) {
        let pin = CertificatePin::of_spki(key).to_string();
        let body = json!({"certificate_pin": pin, "retry_key": retry_key, "agent_version": "1.2.3"});
        self.agent("enroll", token, body).await
    }

    /// The account's environment once `enough` holds of it and of the cloud.
    pub(crate) async fn until(&self, account: &str, enough: impl Fn(&Environment, &FakeCloud) -> bool) -> Environment {
        let account = account.parse().unwrap();
        let mut cloud = self.cloud.watch();
        let attempt = async {
            loop {
                cloud.mark_unchanged();
                let Some(found) = self.store.of_account(&account).await.unwrap() else {
                    tokio::task::yield_now().await;
                    continue;
                };
                let mut row = self.board.watch(found.id);
                let environment = self.store.environment(found.id).await.unwrap().unwrap();
                if enough(&environment, &self.cloud) {
                    return environment;
                }
                tokio::select! {
                    _ = row.changed() => {}
                    _ = cloud.changed() => {}
                }
            }
        };
        match tokio::time::timeout(PATIENCE, attempt).await {
            Ok(environment) => environment,
            Err(_) => {
                let last = self.store.of_account(&account).await.unwrap();
                panic!("still {last:?} with droplets {:?}", self.cloud.ids());
            }
        }
    }

    pub(crate) async fn until_status(&self, account: &str, status: EnvironmentStatus) -> Environment {
        self.until(account, |environment, _| environment.state.status() == status).await
    }

    /// Has the newest droplet's agent enrol and report; the bearer it was given.
    pub(crate) async fn boot(&self) -> String {
        let (status, answer) = self.enrol(&self.token(), "retry-key-retry-key", b"key").await;
        assert_eq!(status, 200, "{answer}");
        let bearer = answer["bearer_token"].as_str().unwrap().to_owned();
        let (status, answer) = self.agent("heartbeat", &bearer, heartbeat()).await;
        assert!(status == 204 || status == 200, "{status} {answer}");
        bearer
    }

    /// The enrolment token in the user data last sent.
    pub(crate) fn token(&self) -> String {
        token_in(&self.cloud.last_user_data()).expect("the user data holds a token")
    }

    /// An environment from nothing to active; its bearer.
    pub(crate) async fn active(&self, agent: &str) -> (EnvironmentId, String) {
        self.ensure(agent, 0).await;
        self.until_status(agent, EnvironmentStatus::AwaitingHeartbeat).await;
        let bearer = self.boot().await;
        (self.until_status(agent, EnvironmentStatus::Active).await.id, bearer)
    }
}

/// A token is 43 characters of URL-safe base64, and the user data holds nothing else like it; a digest is hexadecimal.
fn token_in(user_data: &str) -> Option<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    user_data.split(|c| !word(c)).find(|text| text.len() == 43).map(ToOwned::to_owned)
}

pub(crate) async fn json_of(response: Response<Body>) -> (u16, Value) {
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let json = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).expect("JSON") };
    (status, json)
}

pub(crate) fn heartbeat() -> Value {
    json!({
        "dtma_version": "1.2.3",
        "system_status": {
            "cpu_load_percent": 1.0,
            "memory": {"total_bytes": 1, "active_bytes": 1, "free_bytes": 1, "used_bytes": 1},
            "disk": {"mount": "/", "total_bytes": 1, "used_bytes": 1, "free_bytes": 1},
        },
        "tool_statuses": [],
        "settings_generation": 2,
    })
}

pub(crate) fn a_token() -> Token {
    Token::generate().unwrap()
}
