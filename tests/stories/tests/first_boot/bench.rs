//! One droplet, and in place of the provisioner a server that hands out a release and writes down what it is told.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use dtma_api::Token;
use dtma_api::bootstrap::{BootstrapOutcome, BootstrapProgress};
use dtma_provisioner::user_data::{self, ReleaseRef, UserData};
use dtma_release::Version;
use jiff::Timestamp;
use local_cloud::droplet::DropletId;
use local_cloud::host::{DockerHost, DockerHostOptions, Host as _, Record};
use local_cloud::image::PackageSource;
use secrecy::ExposeSecret as _;
use stack::Workspace;
use stack::docker::{Engine, ExecOutput, network_name};
use stack::release::{self, Terms};
use tokio::sync::watch;

/// The only droplet of a bench.
const DROPLET: i64 = 1;

/// Longer than any set-up here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// What the droplet finds behind its release URL.
#[derive(Clone)]
pub(crate) enum Served {
    /// A release whose agent is this script.
    Agent(&'static str),
    /// The same, but the user data names another SHA-256.
    AnotherAgent(&'static str),
    /// 404.
    Nothing,
    /// Zeros without an announced length and without an end.
    Endless,
}

/// A droplet being set up.
pub(crate) struct Bench {
    id: String,
    engine: Engine,
    token: Token,
    reports: watch::Receiver<Vec<BootstrapProgress>>,
    server: tokio::task::JoinHandle<()>,
    _folder: tempfile::TempDir,
}

#[derive(Clone)]
struct Provisioner {
    expected: Arc<str>,
    archive: Option<Bytes>,
    reports: Arc<Mutex<watch::Sender<Vec<BootstrapProgress>>>>,
}

impl Bench {
    /// Boots a droplet made from `image` with user data as the provisioner renders it.
    pub(crate) async fn boot(image: &str, served: Served) -> Self {
        let token = Token::generate().unwrap();
        let id = format!("first-boot-{}", &token.hash().to_string()[..8]);
        let engine = Engine::connect().await.unwrap();
        let gateway = engine.network(&id).await.unwrap();
        let folder = tempfile::tempdir().unwrap();

        let (sha256, archive) = packed(&served, folder.path());
        let (sender, reports) = watch::channel(Vec::new());
        let provisioner = Provisioner {
            expected: format!("Bearer {}", token.expose()).into(),
            archive,
            reports: Arc::new(Mutex::new(sender)),
        };
        let router = Router::new()
            .route("/agent/v1/bootstrap-progress", post(take_report))
            .route("/agent/v1/releases/9.9.9/agent.tar.gz", get(hand_out))
            .with_state((provisioner, matches!(served, Served::Endless)));
        let listener = tokio::net::TcpListener::bind(format!("{gateway}:0")).await.unwrap();
        let public_url = format!("http://{}", listener.local_addr().unwrap());
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });

        let url = format!("{public_url}/agent/v1/releases/9.9.9/agent.tar.gz");
        let release = ReleaseRef { version: "9.9.9".to_owned(), url, sha256 };
        let text = user_data::render(&UserData { public_url: &public_url, enrolment_token: &token, release: &release })
            .unwrap();
        // From here on, dropping it removes what is made.
        let bench = Self { id, engine, token, reports, server, _folder: folder };
        let host = DockerHost::connect(DockerHostOptions {
            stack: bench.id.clone(),
            network: network_name(&bench.id),
            registry: None,
            packages: PackageSource::of_this_machine().await.unwrap(),
            image_cache: Workspace::find().target().join("local/image-cache"),
            metadata: None,
        });
        let record = Record {
            id: DropletId(DROPLET.unsigned_abs()),
            name: "first-boot".to_owned(),
            region: "nyc3".to_owned(),
            size: "s-1vcpu-1gb".to_owned(),
            image: image.to_owned(),
            tags: Vec::new(),
            created_at: Timestamp::now(),
        };
        host.await.unwrap().create(&record, Some(text.expose_secret())).await.unwrap();
        bench
    }

    /// The token in its user data.
    pub(crate) fn token(&self) -> &str {
        self.token.expose()
    }

    /// Waits until cloud-init has ended; answers with its status and everything reported by then.
    pub(crate) async fn set_up(&self) -> (String, Vec<BootstrapProgress>) {
        let waiting = self.run(&["cloud-init", "status", "--wait"]);
        let ended = tokio::time::timeout(PATIENCE, waiting).await.expect("the set-up never ends");
        let status = ended.stdout.lines().last().unwrap_or_default().trim_start_matches("status: ").to_owned();
        (status, self.reports.borrow().clone())
    }

    /// Runs a command in the droplet once its init answers.
    pub(crate) async fn run(&self, command: &[&str]) -> ExecOutput {
        self.engine.exec_in_droplet(&self.id, DROPLET, command).await.unwrap()
    }

    /// What a shell script prints in the droplet.
    pub(crate) async fn shell(&self, script: &str) -> String {
        let ran = self.run(&["bash", "-c", script]).await;
        format!("{}{}", ran.stdout, ran.stderr).trim_end().to_owned()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.server.abort();
        let id = self.id.clone();
        // A runtime of its own: this one may be unwinding.
        let sweep = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                DockerHost::destroy(&id).await?;
                Engine::connect().await?.sweep(&id).await?;
                Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
            })
        });
        match sweep.join() {
            Ok(Ok(())) => {}
            problem => eprintln!("{} is not gone: {problem:?}", self.id),
        }
    }
}

/// The phases begun, and the one failed with its output.
pub(crate) fn told(reports: &[BootstrapProgress]) -> (Vec<&str>, Option<(&str, &str)>) {
    let begun = reports.iter().filter(|report| report.outcome == BootstrapOutcome::Begun);
    let failed = reports.iter().find(|report| report.outcome == BootstrapOutcome::Failed);
    (
        begun.map(|report| report.phase.as_str()).collect(),
        failed.map(|report| (report.phase.as_str(), report.output.as_str())),
    )
}

fn packed(served: &Served, folder: &Path) -> (String, Option<Bytes>) {
    let zeros = "0".repeat(64);
    let (script, right) = match served {
        Served::Agent(script) => (script, true),
        Served::AnotherAgent(script) => (script, false),
        Served::Nothing | Served::Endless => return (zeros, None),
    };
    let agent = folder.join("dtma-agent");
    std::fs::write(&agent, script).unwrap();
    let workspace = Workspace::find();
    let terms = Terms { version: Version::new(9, 9, 9), ..Terms::of(&workspace) };
    let keys = release::development_keys(&workspace).unwrap();
    let release = release::pack(&workspace, &terms, &agent, &keys, folder).unwrap();
    let archive = Bytes::from(std::fs::read(release.archive).unwrap());
    (if right { release.sha256 } else { zeros }, Some(archive))
}

async fn take_report(
    State((provisioner, _)): State<(Provisioner, bool)>,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    if headers.get("authorization").is_none_or(|value| value.as_bytes() != provisioner.expected.as_bytes()) {
        return StatusCode::UNAUTHORIZED;
    }
    match serde_json::from_slice::<BootstrapProgress>(&body) {
        Ok(report) => {
            provisioner.reports.lock().unwrap().send_modify(|reports| reports.push(report));
            StatusCode::NO_CONTENT
        }
        Err(error) => panic!("not a report: {error}: {}", String::from_utf8_lossy(&body)),
    }
}

async fn hand_out(State((provisioner, endless)): State<(Provisioner, bool)>) -> Response {
    let zeros = Bytes::from_static(&[0; 65_536]);
    match provisioner.archive {
        Some(archive) => archive.into_response(),
        None if endless => {
            let stream = futures_util::stream::repeat_with(move || Ok::<_, std::io::Error>(zeros.clone()));
            Body::from_stream(stream).into_response()
        }
        None => (StatusCode::NOT_FOUND, "no such release").into_response(),
    }
}
