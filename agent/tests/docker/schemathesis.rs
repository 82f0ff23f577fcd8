//! Schemathesis goes at the real agent, over the real Docker Engine, with what `openapi.json` says of it: nothing it thinks of may be
//! answered with a 5xx, or with anything that isn't described.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::host::{Host, free_port};

const KEY: &str = "a-key-for-tests";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/docker/schemathesis")
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{text}");
    text
}

/// Schemathesis in a virtual environment of its own, made once per build folder.
fn program() -> PathBuf {
    let environment = Path::new(env!("CARGO_TARGET_TMPDIR")).join("schemathesis");
    let ready = environment.join("ready");
    let requirements = folder().join("requirements.txt");
    let wanted = std::fs::read_to_string(&requirements).unwrap();
    if std::fs::read_to_string(&ready).is_ok_and(|made| made == wanted) {
        return environment.join("bin/schemathesis");
    }
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&environment));
    let mut install = Command::new(environment.join("bin/python"));
    run(install.args(["-m", "pip", "install", "--quiet", "--requirement"]).arg(&requirements));
    std::fs::write(ready, wanted).unwrap();
    environment.join("bin/schemathesis")
}

/// The agent's program under a supervisor that starts it again when it ends in order, as systemd does.
struct Supervised {
    stop: Arc<AtomicBool>,
    pid: Arc<std::sync::Mutex<u32>>,
    supervisor: Option<JoinHandle<bool>>,
    _state: Arc<TempDir>,
}

impl Supervised {
    fn start(host: &Host, port: u16) -> Self {
        let state = Arc::new(tempfile::tempdir().unwrap());
        let scope = host.scope.clone();
        let directory = state.path().join("state");
        let secrets = state.path().join("secrets");
        let spawn = move || -> Child {
            Command::new(env!("CARGO_BIN_EXE_dtma-agent"))
                .env_clear()
                .env("DTMA_STATE_DIR", &directory)
                // Nothing here is secret.
                .env("DTMA_SECRETS_DIR", &secrets)
                .env("DTMA_SECRETS_ON_DISK", "allow")
                .env("DTMA_SCOPE", &scope)
                .env("DTMA_TLS", "off")
                .env("OFFLINE_MODE", "true")
                // However full this machine is.
                .env("DTMA_DISK_RESERVE_MB", "0")
                .env("DTMA_DISK_RESERVE_PERCENT", "0")
                .env("BACKEND_TO_DTMA_API_KEY", KEY)
                .env("PORT", port.to_string())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        };
        let mut child = spawn();
        let stop = Arc::new(AtomicBool::new(false));
        let pid = Arc::new(std::sync::Mutex::new(child.id()));
        let (told, known) = (Arc::clone(&stop), Arc::clone(&pid));
        let supervisor = thread::spawn(move || {
            loop {
                let in_order = child.wait().unwrap().success();
                if told.load(Ordering::Acquire) || !in_order {
                    return in_order;
                }
                child = spawn();
                *known.lock().unwrap() = child.id();
            }
        });
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(20), "the agent does not listen");
            thread::sleep(Duration::from_millis(10));
        }
        Self { stop, pid, supervisor: Some(supervisor), _state: state }
    }

    /// Ends it; whether it and all before it ended in order.
    fn end(&mut self) -> bool {
        self.stop.store(true, Ordering::Release);
        let pid = i32::try_from(*self.pid.lock().unwrap()).unwrap();
        let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM);
        self.supervisor.take().is_some_and(|supervisor| supervisor.join().unwrap_or(false))
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        if self.supervisor.is_some() {
            self.end();
        }
    }
}

#[test]
#[ignore = "needs Docker and root: cargo xtask test"]
fn whatever_the_description_allows_is_answered_as_it_says() {
    let program = program();
    let mut host = Host::new();
    let image = host.registry();
    // Mostly one that is there and serves; the other is not in the registry.
    let images = format!("{image} {image} {image} {}", image.replace("dtma-test", "dtma-none"));
    let names = ["one", "two", "three", "four", "five", "six"].map(|word| host.name(word)).join(" ");
    let port = free_port();
    let mut agent = Supervised::start(&host, port);
    let url = format!("http://127.0.0.1:{port}");
    let here = tempfile::tempdir().unwrap();
    let description: serde_json::Value = serde_json::from_str(include_str!("../../openapi.json")).unwrap();
    let image_pattern =
        &description["components"]["schemas"]["DeployRequest"]["properties"]["dockerImageUrl"]["pattern"];
    let output = Command::new(program)
        .current_dir(here.path())
        .arg("--config-file")
        .arg(folder().join("schemathesis.toml"))
        .args([
            "run",
            &format!("{url}/openapi.json"),
            "--no-color",
            "--header",
            &format!("Authorization: Bearer {KEY}"),
        ])
        .env("PYTHONPATH", folder())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("AGENT_URL", &url)
        .env("AGENT_KEY", KEY)
        .env("AGENT_IMAGES", images)
        .env("AGENT_NAMES", names)
        .env("IMAGE_PATTERN", image_pattern.as_str().unwrap())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let deploys = std::fs::read_to_string(here.path().join("deploys")).unwrap_or_default();
    let count = |wanted: &str| deploys.lines().filter(|status| *status == wanted).count();
    let (here_already, made, under_way) = (count("200"), count("201"), count("202"));
    assert!(
        made > 5,
        "mostly refusals were looked at: {made} made, {under_way} under way, {here_already} there already\n{said}"
    );
    println!("{made} made, {under_way} under way, {here_already} there already\n{said}");
    assert!(agent.end(), "the agent, or one before it, did not end in order");
}
