//! The link to the backend against a local HTTP server that behaves as badly as real ones do.

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use std::collections::{BTreeSet, VecDeque};
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::{Json, Router};
use dtma_agent::backend::{BackendSecrets, Link, LinkState, NoToken, Patience, Reporting};
use dtma_agent::config::Backend;
use dtma_agent::http::callers::{Callers, Credential};
use dtma_agent::reconcile::{SecretSource as _, SecretsWanted};
use dtma_agent::store::StateDir;
use dtma_agent::store::identity::Identity;
use dtma_agent::update::{Places, Updates};
use dtma_api::heartbeat::Heartbeat;
use dtma_api::instance::{InstanceEvent, Progress};
use dtma_api::status::SystemMetrics;
use dtma_api::{Token, TokenHash};
use http_body_util::BodyExt as _;
use jiff::Timestamp;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

const ENVIRONMENT: &str = "01890a5d-ac96-774b-bcce-b302099a8057";

/// The agent's own patience would take minutes; the proportions are the same.
const PATIENCE: Patience = Patience {
    interval: Duration::from_secs(2),
    settle: Duration::from_millis(20),
    pause: Duration::from_millis(100),
    first_wait: Duration::from_millis(20),
    longest_enrol_wait: Duration::from_millis(200),
    refused_wait: Duration::from_secs(1),
    answer: Duration::from_millis(500),
};

/// What the backend does with one call.
enum Reply {
    Json(u16, Value),
    /// Takes the call and drops the connection.
    HangUp,
    /// Takes the call and says nothing.
    Silence,
}

/// One call as the backend saw it.
#[derive(Debug)]
struct Call {
    path: String,
    bearer: String,
    body: Value,
    at: Instant,
}

#[derive(Clone)]
struct Script {
    replies: Arc<Mutex<VecDeque<Reply>>>,
    calls: mpsc::UnboundedSender<Call>,
}

struct FakeBackend {
    base_url: String,
    calls: mpsc::UnboundedReceiver<Call>,
}

/// Answers with the replies in turn, and with 204 when there are no more.
async fn backend(replies: Vec<Reply>) -> FakeBackend {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (sender, calls) = mpsc::unbounded_channel();
    let script = Script { replies: Arc::new(Mutex::new(replies.into())), calls: sender };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let base_url = format!("http://{}/agent/v1", listener.local_addr().unwrap());
    let router = Router::new().fallback(answer).with_state(script);
    tokio::spawn(async move { axum::serve(listener, router).await });
    FakeBackend { base_url, calls }
}

async fn answer(State(script): State<Script>, request: Request) -> Response {
    let at = Instant::now();
    let path = request.uri().path().to_owned();
    let bearer = request.headers()[header::AUTHORIZATION].to_str().unwrap().to_owned();
    let body = serde_json::from_slice(&request.into_body().collect().await.unwrap().to_bytes()).unwrap();
    let reply = script.replies.lock().unwrap().pop_front();
    script.calls.send(Call { path, bearer, body, at }).unwrap();
    match reply {
        None => StatusCode::NO_CONTENT.into_response(),
        Some(Reply::Json(status, body)) => (StatusCode::from_u16(status).unwrap(), Json(body)).into_response(),
        Some(Reply::HangUp) => {
            let broken = futures_util::stream::iter([Err::<&str, _>(std::io::Error::other("gone"))]);
            Response::new(Body::from_stream(broken))
        }
        Some(Reply::Silence) => std::future::pending().await,
    }
}

impl FakeBackend {
    async fn next(&mut self) -> Call {
        timeout(Duration::from_secs(20), self.calls.recv()).await.expect("the agent called in time").unwrap()
    }
}

fn enrolled(generation: u64, key: &str, interval: u64) -> Value {
    json!({
        "success": true,
        "environment_id": ENVIRONMENT,
        "bearer_token": "own",
        "settings": settings(generation, key, interval),
    })
}

fn settings(generation: u64, key: &str, interval: u64) -> Value {
    json!({
        "generation": generation,
        "caller_key_sha256s": [TokenHash::of(key)],
        "heartbeat_interval_seconds": interval,
    })
}

struct Agent {
    callers: Arc<Callers>,
    state: watch::Receiver<LinkState>,
    events: broadcast::Sender<InstanceEvent>,
    secrets: BackendSecrets,
    task: JoinHandle<()>,
}

fn identity(directory: &Path) -> Identity {
    Identity::load_or_make(&StateDir::open(&directory.join("state")).unwrap()).unwrap()
}

fn start(directory: &TempDir, backend: Backend) -> Agent {
    let own_keys = vec![TokenHash::of("by-hand")];
    let callers = Arc::new(Callers::new(own_keys.clone()));
    let link = Link::new(backend, identity(directory.path()), &own_keys, &callers, PATIENCE).unwrap();
    let (state, secrets) = (link.state(), link.secrets());
    let (events, receiver) = broadcast::channel(16);
    let report = |settings_generation| Heartbeat {
        dtma_version: "1.2.3".to_owned(),
        system_status: SystemMetrics::default(),
        tool_statuses: Vec::new(),
        sent_at: Some(Timestamp::now()),
        agent_started_at: None,
        docker_reachable: Some(true),
        settings_generation,
        update: None,
    };
    let reporting = Reporting {
        report: Box::new(report),
        updates: Updates::new(&Places::default()),
        events: receiver,
        callers: Arc::clone(&callers),
        own_keys,
    };
    Agent { callers, state, events, secrets, task: tokio::spawn(link.run(reporting)) }
}

fn provisioner(backend: &FakeBackend, token: Option<&str>) -> Backend {
    let enrolment_token = token.map(|token| Token::from(token.to_owned()));
    Backend::Provisioner { base_url: backend.base_url.clone(), enrolment_token }
}

fn accepts(agent: &Agent, key: &str) -> bool {
    let value = HeaderValue::from_str(&format!("Bearer {key}")).unwrap();
    agent.callers.judge(&HeaderMap::from_iter([(header::AUTHORIZATION, value)])) == Credential::Accepted
}

fn event(progress: Option<Progress>) -> InstanceEvent {
    InstanceEvent {
        at: Timestamp::now(),
        sequence: 1,
        instance_name_on_toolbox: "echo".parse().unwrap(),
        event: "running".to_owned(),
        message: "it runs".to_owned(),
        progress,
    }
}

#[tokio::test]
async fn an_agent_enrols_once_and_then_reports() {
    let directory = tempfile::tempdir().unwrap();
    let mut backend = backend(vec![Reply::Json(200, enrolled(4, "fleet", 60))]).await;
    let mut agent = start(&directory, provisioner(&backend, Some("one-time")));
    assert_eq!(*agent.state.borrow(), LinkState::Enrolling { problem: None });
    assert!(!accepts(&agent, "fleet"));

    let enrol = backend.next().await;
    assert_eq!((enrol.path.as_str(), enrol.bearer.as_str()), ("/agent/v1/enroll", "Bearer one-time"));
    assert!(enrol.body["certificate_pin"].as_str().unwrap().starts_with("sha256//"));
    let heartbeat = backend.next().await;
    assert_eq!((heartbeat.path.as_str(), heartbeat.bearer.as_str()), ("/agent/v1/heartbeat", "Bearer own"));
    assert_eq!((&heartbeat.body["dtma_version"], &heartbeat.body["settings_generation"]), (&json!("1.2.3"), &json!(4)));
    agent.state.wait_for(|state| matches!(state, LinkState::Linked { taken: 1, .. })).await.unwrap();
    assert!(accepts(&agent, "fleet") && accepts(&agent, "by-hand"));

    // After a restart the spent token doesn't matter any more, and the keys are known before anything is sent.
    agent.task.abort();
    let _ = agent.task.await;
    let again = start(&directory, provisioner(&backend, Some("spent")));
    assert!(accepts(&again, "fleet"));
    assert_eq!(backend.next().await.path, "/agent/v1/heartbeat");
}

#[tokio::test]
async fn secrets_are_asked_for_with_the_token_of_that_moment() {
    let directory = tempfile::tempdir().unwrap();
    let mut backend = backend(vec![
        Reply::Json(200, enrolled(4, "fleet", 3600)),
        Reply::Json(200, json!({ "bearer_token": "second" })),
        Reply::Json(200, json!({})),
        Reply::Json(200, json!({ "secrets": { "API_KEY": "hunter2" } })),
    ])
    .await;
    let mut agent = start(&directory, provisioner(&backend, Some("one-time")));
    agent.state.wait_for(|state| matches!(state, LinkState::Linked { taken: 2, .. })).await.unwrap();
    let wanted = SecretsWanted {
        instance: "one".parse().unwrap(),
        account_tool_instance_id: "id-1".parse().unwrap(),
        all: true,
        providers: BTreeSet::new(),
    };
    let fetched = agent.secrets.fetch(&wanted).await.unwrap();
    assert_eq!(fetched.values.expose(&"API_KEY".parse().unwrap()), Some("hunter2"));
    for _ in 0..3 {
        backend.next().await;
    }
    let call = backend.next().await;
    assert_eq!((call.path.as_str(), call.bearer.as_str()), ("/agent/v1/fetch-tool-secrets", "Bearer second"));
    assert_eq!(call.body["accountToolInstanceId"], "id-1");

    let offline = start(&tempfile::tempdir().unwrap(), Backend::Offline);
    let refused = offline.secrets.fetch(&wanted).await.unwrap_err();
    assert!(refused.reason.contains("OFFLINE_MODE"), "{refused}");
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_with_the_same_key() {
    let directory = tempfile::tempdir().unwrap();
    let failed = || Reply::Json(503, json!({"success": false, "error": "later", "code": "busy"}));
    let replies = vec![Reply::HangUp, failed(), Reply::Silence, Reply::Json(200, json!({"success": true}))];
    let mut backend = backend(replies.into_iter().chain([Reply::Json(200, enrolled(1, "fleet", 60))]).collect()).await;
    let agent = start(&directory, provisioner(&backend, Some("one-time")));
    let mut calls = Vec::new();
    for _ in 0..5 {
        calls.push(backend.next().await);
    }
    assert!(calls.iter().all(|call| call.path == "/agent/v1/enroll"));
    assert!(calls.iter().all(|call| call.body["retry_key"] == calls[0].body["retry_key"]));
    assert!(calls.iter().all(|call| call.body["certificate_pin"] == calls[0].body["certificate_pin"]));
    assert_eq!(backend.next().await.path, "/agent/v1/heartbeat");
    assert!(accepts(&agent, "fleet"));
}

#[tokio::test]
async fn a_refused_token_is_not_hammered_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let refused = json!({"success": false, "error": "this token was used", "code": "token_used"});
    let mut backend = backend(vec![Reply::Json(401, refused)]).await;
    let mut agent = start(&directory, provisioner(&backend, Some("one-time")));
    let first = backend.next().await;
    let problem = |state: &LinkState| matches!(state, LinkState::Enrolling { problem: Some(problem) } if problem.contains("token_used"));
    agent.state.wait_for(problem).await.unwrap();
    let second = backend.next().await;
    assert!(second.at - first.at >= Duration::from_millis(900), "{:?}", second.at - first.at);
}

#[tokio::test]
async fn an_enrolment_that_cannot_be_stored_is_not_used() {
    let directory = tempfile::tempdir().unwrap();
    let mut backend =
        backend(vec![Reply::Json(200, enrolled(1, "one", 60)), Reply::Json(200, enrolled(1, "two", 60))]).await;
    drop(identity(directory.path()));
    let obstacle = directory.path().join("state/identity.json.new");
    std::fs::create_dir(&obstacle).unwrap();
    let mut agent = start(&directory, provisioner(&backend, Some("one-time")));
    backend.next().await;
    agent.state.wait_for(|state| matches!(state, LinkState::Enrolling { problem: Some(_) })).await.unwrap();
    assert!(!accepts(&agent, "one"));
    std::fs::remove_dir(&obstacle).unwrap();
    backend.next().await;
    agent.state.wait_for(|state| matches!(state, LinkState::Linked { .. })).await.unwrap();
    assert!(accepts(&agent, "two") && !accepts(&agent, "one"));
}

#[tokio::test]
async fn newer_settings_and_tokens_are_stored_and_used_and_older_ones_ignored() {
    let directory = tempfile::tempdir().unwrap();
    let mut backend = backend(vec![
        Reply::Json(200, enrolled(5, "fleet", 60)),
        Reply::Json(200, json!({"settings": settings(6, "new", 1), "bearer_token": "next", "unknown": 1})),
        Reply::Json(200, json!({"settings": settings(5, "old", 60)})),
    ])
    .await;
    let agent = start(&directory, provisioner(&backend, Some("one-time")));
    let mut bearers = Vec::new();
    for _ in 0..4 {
        bearers.push(backend.next().await.bearer);
    }
    assert_eq!(bearers, ["Bearer one-time", "Bearer own", "Bearer next", "Bearer next"]);
    assert!(accepts(&agent, "new") && !accepts(&agent, "fleet") && !accepts(&agent, "old"));
    agent.task.abort();
    let _ = agent.task.await;
    let stored = identity(directory.path());
    assert_eq!(stored.enrolment().unwrap().bearer_token.expose(), "next");
    assert_eq!(stored.enrolment().unwrap().settings.generation, 6);
}

#[tokio::test]
async fn a_change_is_reported_soon_changes_together_once_and_progress_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let mut backend = backend(Vec::new()).await;
    let standalone =
        Backend::Standalone { base_url: backend.base_url.clone(), bearer: Token::from("by-hand".to_owned()) };
    let mut agent = start(&directory, standalone);
    let first = backend.next().await;
    assert_eq!((first.path.as_str(), first.bearer.as_str()), ("/agent/v1/heartbeat", "Bearer by-hand"));
    assert_eq!(first.body["settings_generation"], Value::Null);
    agent.state.wait_for(|state| matches!(state, LinkState::Linked { taken: 1, .. })).await.unwrap();

    agent.events.send(event(Some(Progress { current_bytes: 1, total_bytes: 2, ..Progress::default() }))).unwrap();
    let second = backend.next().await;
    assert!((second.at - first.at).as_millis() >= 1_800, "{:?}", second.at - first.at);

    agent.state.wait_for(|state| matches!(state, LinkState::Linked { taken: 2, .. })).await.unwrap();
    for _ in 0..10 {
        agent.events.send(event(None)).unwrap();
    }
    let third = backend.next().await;
    assert!((third.at - second.at).as_millis() <= 1_500, "{:?}", third.at - second.at);
    let fourth = backend.next().await;
    assert!((fourth.at - third.at).as_millis() >= 1_700, "{:?}", fourth.at - third.at);
}

#[tokio::test]
async fn failing_heartbeats_back_off_and_recover() {
    let directory = tempfile::tempdir().unwrap();
    let failed = || Reply::Json(500, json!("not even our shape"));
    let mut backend = backend(vec![failed(), failed(), Reply::HangUp, failed()]).await;
    let standalone = Backend::Standalone { base_url: backend.base_url.clone(), bearer: Token::from("own".to_owned()) };
    let mut agent = start(&directory, standalone);
    let mut times = Vec::new();
    for _ in 0..5 {
        times.push(backend.next().await.at);
    }
    // 20, 40, 80 and 160 ms, or down to half of each: longer than the interval none of them is.
    assert!(times[4] - times[0] >= Duration::from_millis(150), "{times:?}");
    assert!(times[1] - times[0] < PATIENCE.interval, "{times:?}");
    let recovered = |state: &LinkState| matches!(state, LinkState::Linked { taken: 1.., failing: 0, problem: None });
    agent.state.wait_for(recovered).await.unwrap();
}

#[tokio::test]
async fn an_agent_without_any_token_does_not_start_and_an_offline_one_says_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut backend = backend(Vec::new()).await;
    let callers = Callers::new(Vec::new());
    let refused = Link::new(provisioner(&backend, None), identity(directory.path()), &[], &callers, PATIENCE);
    assert_eq!(refused.unwrap_err(), NoToken);
    let agent = start(&directory, Backend::Offline);
    agent.task.await.unwrap();
    assert!(backend.calls.try_recv().is_err());
}
