//! The real `dtma-agent`, as systemd runs it: settings from the environment, a port, a signal, an exit code.

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

mod pinned;

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use dtma_agent::store::StateDir;
use dtma_agent::store::identity::Identity;
use dtma_api::CertificatePin;
use reqwest::Version;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Lines};
use tokio::net::UnixDatagram;
use tokio::process::{Child, ChildStderr, Command};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(20);

/// A command with no settings but these and a state directory.
fn command(directory: &Path, settings: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dtma-agent"));
    command.env_clear().env("DTMA_STATE_DIR", directory.join("state"));
    // Nobody answers there, which must not keep an agent from starting.
    command.env("DOCKER_HOST", format!("unix://{}", directory.join("no-docker.sock").display()));
    command.envs(settings.iter().copied()).kill_on_drop(true).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

const OFFLINE: [(&str, &str); 2] = [("OFFLINE_MODE", "true"), ("BACKEND_TO_DTMA_API_KEY", "fleet")];

fn free_port() -> String {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap().local_addr().unwrap().port().to_string()
}

struct Agent {
    child: Child,
    log: Lines<BufReader<ChildStderr>>,
    port: String,
    pin: CertificatePin,
    started_in: Duration,
    directory: TempDir,
}

impl Agent {
    async fn start(directory: TempDir, settings: &[(&str, &str)]) -> Self {
        let port = free_port();
        let mut command = command(directory.path(), &OFFLINE);
        let begun = tokio::time::Instant::now();
        let mut child = command.env("PORT", &port).envs(settings.iter().copied()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let listening = entry(&mut log, "listening").await;
        let pin = listening["pin"].as_str().unwrap().parse().unwrap();
        Self { child, log, port, pin, started_in: begun.elapsed(), directory }
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let url = format!("https://127.0.0.1:{}{path}", self.port);
        let response = pinned::client(self.pin).get(url).bearer_auth("fleet").send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id().unwrap().try_into().unwrap()).unwrap(), signal).unwrap();
    }

    async fn ended(mut self) -> (ExitStatus, TempDir) {
        (timeout(LIMIT, self.child.wait()).await.unwrap().unwrap(), self.directory)
    }
}

/// Reads the log up to the entry with this message.
async fn entry(log: &mut Lines<BufReader<ChildStderr>>, message: &str) -> Value {
    let search = async {
        while let Some(line) = log.next_line().await.unwrap() {
            let entry: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("no JSON in the log: {line}"));
            if entry["message"] == message {
                return entry;
            }
        }
        panic!("the agent ended without saying {message:?}");
    };
    timeout(LIMIT, search).await.unwrap()
}

/// Exit code, standard output and standard error of an agent that ends by itself.
async fn outcome(mut command: Command) -> (Option<i32>, String, String) {
    let output = timeout(LIMIT, command.output()).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn it_serves_without_docker_and_ends_in_order() {
    let mut agent = Agent::start(tempfile::tempdir().unwrap(), &[]).await;
    assert!(agent.started_in < Duration::from_secs(5), "{:?}", agent.started_in);
    assert_eq!(agent.get("/health").await, (200, "OK".to_owned()));
    let (status, body) = agent.get("/ready").await;
    assert_eq!(status, 503);
    assert!(body.contains("Docker"), "{body}");
    agent.signal(Signal::TERM);
    entry(&mut agent.log, "ended in order").await;
    let (status, directory) = agent.ended().await;
    assert!(status.success(), "{status}");

    // Callers hold the pin, so the key must be the same after a restart, however the first agent ended.
    let kept = Identity::load_or_make(&StateDir::open(&directory.path().join("state")).unwrap()).unwrap().pin();
    let agent = Agent::start(directory, &[]).await;
    assert_eq!(agent.pin, kept);
    agent.signal(Signal::KILL);
    let (_, directory) = agent.ended().await;
    assert_eq!(Agent::start(directory, &[]).await.pin, kept);
}

#[tokio::test]
async fn whoever_sends_too_much_or_has_the_wrong_key_hears_so_and_not_only_that_the_connection_broke() {
    let agent = Agent::start(tempfile::tempdir().unwrap(), &[]).await;
    let url = format!("https://127.0.0.1:{}/tools", agent.port);
    for (protocol, version) in [("http/1.1", Version::HTTP_11), ("h2", Version::HTTP_2)] {
        let client = pinned::speaking(agent.pin, &[protocol.as_bytes()]);
        for (key, expected) in [("fleet", 413), ("wrong", 403)] {
            let body = vec![b'x'; 20 * 1024 * 1024];
            let response = client.post(&url).bearer_auth(key).body(body).send().await.unwrap();
            assert_eq!((response.status().as_u16(), response.version()), (expected, version));
        }
    }
}

#[tokio::test]
async fn systemd_hears_that_it_is_ready_lives_and_stops() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify.sock");
    let socket = UnixDatagram::bind(&path).unwrap();
    let notify = path.to_str().unwrap().to_owned();
    let agent = Agent::start(directory, &[("NOTIFY_SOCKET", &notify), ("WATCHDOG_USEC", "600000")]).await;
    let mut heard = String::new();
    while !heard.contains("READY=1") || heard.matches("WATCHDOG=1").count() < 3 {
        let mut message = [0; 256];
        let length = timeout(LIMIT, socket.recv(&mut message)).await.expect("more is said").unwrap();
        heard.push_str(str::from_utf8(&message[..length]).unwrap());
    }
    agent.signal(Signal::INT);
    while !heard.contains("STOPPING=1") {
        let mut message = [0; 256];
        let length = timeout(LIMIT, socket.recv(&mut message)).await.expect("more is said").unwrap();
        heard.push_str(str::from_utf8(&message[..length]).unwrap());
    }
    assert!(agent.ended().await.0.success());
}

#[tokio::test]
async fn a_restart_through_the_api_ends_it_in_order() {
    let agent = Agent::start(tempfile::tempdir().unwrap(), &[]).await;
    let url = format!("https://127.0.0.1:{}/restart", agent.port);
    let response = pinned::client(agent.pin).post(url).bearer_auth("fleet").send().await.unwrap();
    assert_eq!(response.status(), 202);
    assert!(agent.ended().await.0.success());
}

#[tokio::test]
async fn wrong_settings_end_it_before_anything_happens() {
    let directory = tempfile::tempdir().unwrap();
    let (code, _, said) =
        outcome(command(directory.path(), &[("PORT", "http"), ("DTMA_TLS", "acme"), ("DTMA_X", "1")])).await;
    assert_eq!(code, Some(78));
    for variable in ["PORT", "DTMA_TLS", "DTMA_X", "AGENTOPIA_API_BASE_URL", "BACKEND_TO_DTMA_API_KEY"] {
        assert!(said.contains(&format!("\n  {variable}: ")), "{variable} in {said}");
    }
    assert!(!directory.path().join("state").exists());

    let no_token = [("AGENTOPIA_API_BASE_URL", "http://127.0.0.1:9/agent/v1")];
    let (code, _, said) = outcome(command(directory.path(), &no_token)).await;
    assert_eq!(code, Some(1));
    assert!(said.contains("DTMA_ENROLMENT_TOKEN"), "{said}");
}

#[tokio::test]
async fn a_second_agent_or_a_taken_port_is_a_sentence_and_an_exit_code() {
    let agent = Agent::start(tempfile::tempdir().unwrap(), &[]).await;
    let (code, _, said) = outcome(command(agent.directory.path(), &OFFLINE)).await;
    assert_eq!(code, Some(1));
    assert!(said.contains("another agent is using the state directory"), "{said}");

    let elsewhere = tempfile::tempdir().unwrap();
    let mut second = command(elsewhere.path(), &OFFLINE);
    second.env("PORT", &agent.port);
    let (code, _, said) = outcome(second).await;
    assert_eq!(code, Some(1));
    assert!(said.contains(&format!("port {} could not be had", agent.port)), "{said}");
}

#[tokio::test]
async fn its_arguments_are_few() {
    let directory = tempfile::tempdir().unwrap();
    let with = |argument: &str| {
        let mut command = command(directory.path(), &[]);
        command.arg(argument);
        outcome(command)
    };
    let version = format!("dtma-agent {} (x86_64-linux-gnu)\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(with("--version").await, (Some(0), version, String::new()));
    let (code, help, _) = with("--help").await;
    assert!(code == Some(0) && help.contains("/etc/dtma.conf"), "{help}");
    assert_eq!(with("serve").await.0, Some(2));
}

#[tokio::test]
async fn a_build_without_release_keys_takes_no_release() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = command(directory.path(), &[("AGENTOPIA_API_BASE_URL", "http://127.0.0.1:9")]);
    command.args(["update", "--check"]);
    let (code, _, said) = outcome(command).await;
    assert_eq!(code, Some(1));
    assert!(said.contains("no_keys") && said.contains("none can be trusted"), "{said}");
}

#[tokio::test]
async fn no_secret_is_written_to_the_log() {
    let settings = [("RUST_LOG", "trace")];
    let mut agent = Agent::start(tempfile::tempdir().unwrap(), &settings).await;
    assert_eq!(agent.get("/status").await.0, 200);
    agent.signal(Signal::TERM);
    let mut rest = String::new();
    timeout(LIMIT, agent.log.get_mut().read_to_string(&mut rest)).await.unwrap().unwrap();
    assert!(rest.contains("ended in order") && !rest.contains("fleet"), "a key is in the log");
}
