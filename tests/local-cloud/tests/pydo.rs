//! DigitalOcean's own Python client against the local cloud: an independent reading of the same API.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use jiff::SignedDuration;
use local_cloud::droplet::Lag;
use serde_json::json;

use support::{Setup, TOKEN, TestCloud};

/// The client, and what its description of itself forgets to ask for.
const PACKAGES: [&str; 2] = ["pydo==0.44.0", "azure-core==1.41.0"];

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{text}");
    text
}

/// Python of a virtual environment with the client in it, made once per build folder.
fn python() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pydo");
    let python = folder.join("bin/python");
    let ready = folder.join("ready");
    let wanted = PACKAGES.join(" ");
    if std::fs::read_to_string(&ready).is_ok_and(|made| made == wanted) {
        return python;
    }
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder));
    run(Command::new(&python).args(["-m", "pip", "install", "--quiet"]).args(PACKAGES));
    std::fs::write(ready, wanted).unwrap();
    python
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn digitaloceans_own_client_works_against_this_cloud() {
    let python = python();
    let lag = Lag { list: SignedDuration::ZERO, address: SignedDuration::ZERO };
    let cloud = TestCloud::start(Setup { lag, ..Setup::default() }).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pydo_client.py");
    let base = format!("http://{}", cloud.address);
    let said =
        tokio::task::spawn_blocking(move || run(Command::new(python).arg(script).args([&base, TOKEN]))).await.unwrap();
    assert!(said.contains("every call as expected"), "{said}");
    let violations = cloud.get("/control/violations").await;
    assert_eq!(violations, json!([]), "what the client sends and gets is what its own description says");
}
