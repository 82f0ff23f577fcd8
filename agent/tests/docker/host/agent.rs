//! One agent process, but for its port: the real router, loop, ledger and adapter over the real Docker Engine.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::{Method, Request, StatusCode, header};
use axum::response::Response;
use dtma_agent::backend::LinkState;
use dtma_agent::config::PublicStatus;
use dtma_agent::disks::{Disks, Reserve};
use dtma_agent::engine::docker::DockerEngine;
use dtma_agent::http::callers::Callers;
use dtma_agent::http::frame::{Answered, Gate};
use dtma_agent::http::server::ServerState;
use dtma_agent::http::{self, App};
use dtma_agent::logs::LogRing;
use dtma_agent::mcp::{Bridges, Proxy};
use dtma_agent::reconcile::{
    self, Answer, FetchedSecrets, Instances, NoSecrets, ProbeFailure, Prober, Question, SecretSource, Secrets,
    SecretsWanted, Sessions, Timing, Upstream,
};
use dtma_agent::store::ledger::Ledger;
use dtma_agent::store::vault::Vault;
use dtma_agent::update::{Places, Updates};
use dtma_api::TokenHash;
use dtma_api::health::{Era, Introduction};
use http_body_util::BodyExt as _;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::Host;

const KEY: &str = "a-key-for-tests";

/// Takes any HTTP answer for an MCP server's: whether a server is one is tested where servers speak MCP.
struct AnyAnswer;

#[async_trait]
impl Prober for AnyAnswer {
    async fn probe(&self, upstream: &Upstream, question: Question) -> Result<Answer, ProbeFailure> {
        let exchange = async {
            let mut stream = TcpStream::connect(upstream.address).await?;
            stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.map(|_| answer)
        };
        match tokio::time::timeout(question.patience, exchange).await {
            Ok(Ok(answer)) if answer.starts_with("HTTP/1.1 200") => Ok(Answer::Introduced(Box::new(introduction()))),
            other => Err(ProbeFailure { reason: format!("{other:?}") }),
        }
    }
}

/// A backend that has no secrets.
struct NoBackend;

#[async_trait]
impl SecretSource for NoBackend {
    async fn fetch(&self, _: &SecretsWanted) -> Result<FetchedSecrets, NoSecrets> {
        Err(NoSecrets { reason: "there is no backend".to_owned() })
    }
}

fn introduction() -> Introduction {
    Introduction {
        era: Era::Legacy,
        protocol_version: "2025-11-25".to_owned(),
        name: None,
        version: None,
        capabilities: json!({}),
        tools: Some(Vec::new()),
    }
}

/// One agent process, but for its port.
pub(crate) struct Agent {
    router: Router,
    pub(crate) instances: Instances,
    task: JoinHandle<()>,
}

impl Agent {
    pub(crate) fn start(host: &Host, state: &Path) -> Self {
        Self::start_with_vault(host, state, Vault::new(&state.join("no-secrets"), &host.scope, false))
    }

    /// With another place for secrets than none.
    pub(crate) fn start_with_vault(host: &Host, state: &Path, vault: Vault) -> Self {
        let timing = Timing { settle: Duration::from_millis(300), ..Timing::default() };
        // However full this machine is: what a full disk does is tested by itself.
        let disks = Disks::new(state, Reserve { bytes: 0, percent: 0 });
        let engine = host.engine().with_secrets_in(vault.clone());
        Self::start_all(|_| Arc::new(AnyAnswer), engine, state, timing, disks, vault)
    }

    /// With another engine, another patience, or other disks.
    pub(crate) fn start_with(engine: DockerEngine, state: &Path, timing: Timing, disks: Disks) -> Self {
        Self::start_asking(|_| Arc::new(AnyAnswer), engine, state, timing, disks)
    }

    /// With another idea of what an MCP server is, too.
    pub(crate) fn start_asking(
        prober: impl FnOnce(&Bridges) -> Arc<dyn Prober>,
        engine: DockerEngine,
        state: &Path,
        timing: Timing,
        disks: Disks,
    ) -> Self {
        let vault = Vault::new(&state.join("no-secrets"), "main", false);
        Self::start_all(prober, engine, state, timing, disks, vault)
    }

    pub(crate) fn start_all(
        prober: impl FnOnce(&Bridges) -> Arc<dyn Prober>,
        engine: DockerEngine,
        state: &Path,
        timing: Timing,
        disks: Disks,
        vault: Vault,
    ) -> Self {
        let shutdown = CancellationToken::new();
        let engine = Arc::new(engine);
        let sessions = Sessions::default();
        let bridges = Bridges::new(Arc::clone(&engine) as _, sessions.clone(), shutdown.clone());
        let (instances, task) = reconcile::start(reconcile::Parts {
            engine,
            ledger: Ledger::open(state, Timestamp::now()).unwrap(),
            prober: prober(&bridges),
            disks: Arc::new(disks),
            secrets: Secrets { vault, source: Arc::new(NoBackend) },
            sessions,
            timing,
            shutdown: shutdown.clone(),
        });
        let gate = Gate {
            callers: Arc::new(Callers::new(vec![TokenHash::of(KEY)])),
            public_status: PublicStatus::Liveness,
            answered: Answered::default(),
        };
        let app = App::new(http::Parts {
            instances: instances.clone(),
            gate: Arc::new(gate),
            logs: LogRing::default(),
            system: watch::channel(dtma_agent::system::Sample::default()).1,
            link: watch::channel(LinkState::Offline).1,
            updates: Updates::new(&Places::default()),
            server: ServerState::default(),
            proxy: Proxy::new(shutdown.clone()),
            bridges,
            shutdown,
            has_api_base_url: false,
            port: 30_000,
            started_at: Timestamp::now(),
        });
        Self { router: http::router(&app), instances, task }
    }

    /// Serves it on loopback as well, for clients that need a connection; its address and the key.
    pub(crate) async fn listen(&self) -> (SocketAddr, &'static str) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = self.router.clone().into_make_service_with_connect_info::<SocketAddr>();
        tokio::spawn(async move { axum::serve(listener, service).await });
        (address, KEY)
    }

    /// As `kill -9` ends it.
    pub(crate) async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.is_err());
    }

    pub(crate) async fn text(&self, method: Method, path: &str, body: Option<&str>) -> (StatusCode, String) {
        let answer = self.ask(method, path, body).await;
        let status = answer.status();
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    /// The answer before its body has been read.
    pub(crate) async fn ask(&self, method: Method, path: &str, body: Option<&str>) -> Response {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::AUTHORIZATION, format!("Bearer {KEY}"))
            .extension(ConnectInfo(SocketAddr::from(([127, 0, 0, 1], 1))))
            .body(body.map_or_else(Body::empty, |body| Body::from(body.to_owned())))
            .unwrap();
        self.router.clone().oneshot(request).await.unwrap()
    }

    pub(crate) async fn call(&self, method: Method, path: &str) -> (StatusCode, Value) {
        let (status, text) = self.text(method, path, None).await;
        (status, serde_json::from_str(&text).unwrap())
    }

    /// With a JSON body.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let (status, text) = self.text(Method::POST, path, Some(&body.to_string())).await;
        (status, serde_json::from_str(&text).unwrap())
    }

    pub(crate) async fn deploy(&self, body: &Value) -> (StatusCode, Value) {
        self.post("/tools", body).await
    }
}

/// A deploy of the host's image.
pub(crate) fn body(host: &Host, word: &str, more: Value) -> Value {
    let mut body = json!({
        "dockerImageUrl": host.image,
        "instanceNameOnToolbox": host.name(word),
        "accountToolInstanceId": format!("ati-{word}"),
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// What its server is to do.
pub(crate) fn words(words: &[&str]) -> Value {
    json!({ "baseConfigOverrideJson": { "Cmd": words } })
}
