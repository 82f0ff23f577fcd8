//! The official SDKs' clients for Python and TypeScript, and the official conformance suite, in an environment of their own: a Python
//! virtual environment which also holds Node and npm, so that the machine needs neither. Pinned by `tests/stack/clients`, set up once
//! per pinning.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::command::Job;
use crate::error::{Result, StackError};
use crate::watch::{Unwatched, Watch};
use crate::workspace::Workspace;

/// What decides which environment it is.
const PINS: [&str; 4] = [
    "clients/requirements.txt",
    "clients/package.json",
    "clients/package-lock.json",
    "images/mcp-demo/requirements.txt",
];
/// Written last, so that what was interrupted isn't taken for whole.
const DONE: &str = "done";
/// One client's whole talk, its own start included, on a machine that does other things too.
const TALK_LIMIT: Duration = Duration::from_secs(90);
const CONFORMANCE_LIMIT: Duration = Duration::from_secs(300);

/// An environment that is set up. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Sdks {
    folder: PathBuf,
    sources: PathBuf,
}

/// Whose client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sdk {
    /// `mcp` from PyPI.
    Python,
    /// `@modelcontextprotocol/client` from npm.
    TypeScript,
}

/// How a client begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Era {
    /// With `server/discover`, and `initialize` where that isn't known.
    Auto,
    /// With `initialize`.
    Legacy,
}

/// What one client did and heard.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Talk {
    /// The protocol's version they agreed on.
    pub version: Option<String>,
    /// Names of the server's tools.
    pub tools: Vec<String>,
    /// One for each call, in order.
    pub answers: Vec<ToolAnswer>,
}

/// What a tool answered.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ToolAnswer {
    /// The text in it.
    pub text: String,
    /// Whether the tool calls it an error.
    pub error: bool,
}

/// How one scenario of the conformance suite ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scenario {
    /// Checks that succeeded, by id.
    pub passed: Vec<String>,
    /// Checks that failed, by id, and why.
    pub failed: BTreeMap<String, String>,
}

/// How every scenario ended, by name.
pub type Scores = BTreeMap<String, Scenario>;

impl Sdks {
    /// Sets the environment up unless it is there.
    ///
    /// # Errors
    /// When a package can't be had.
    pub async fn ensure(workspace: &Workspace, watch: &dyn Watch) -> Result<Self> {
        let sources = workspace.root().join("tests/stack");
        let mut digest = Sha256::new();
        for pins in PINS {
            let file = sources.join(pins);
            digest.update(std::fs::read(&file).map_err(StackError::io(format!("read {}", file.display())))?);
            digest.update([0]);
        }
        let mut name = hex::encode(digest.finalize());
        name.truncate(12);
        let sdks = Self { folder: workspace.local().join("sdks").join(&name), sources: sources.join("clients") };
        if sdks.folder.join(DONE).is_file() {
            return Ok(sdks);
        }
        watch.say("setting up the SDKs' clients and the conformance suite (PyPI, npm)");
        let log = |what: &str| workspace.local_file(&format!("sdks/{name}-{what}.log"));
        Job::new("python3", log("venv")?).args(["-m", "venv", "--clear"]).args([&sdks.folder]).run(watch).await?;
        Job::new(sdks.program("python"), log("pip")?)
            .args(["-m", "pip", "install", "--disable-pip-version-check", "--only-binary=:all:", "--progress-bar=off"])
            .args([Path::new("--requirement"), &sdks.sources.join("requirements.txt")])
            .run(watch)
            .await?;
        // Node looks for packages beside the script that asks for them.
        for file in ["package.json", "package-lock.json", "client.mjs"] {
            copy(&sdks.sources.join(file), &sdks.folder.join(file))?;
        }
        sdks.npm_ci(&sdks.folder, log("npm")?, watch).await?;
        std::fs::write(sdks.folder.join(DONE), "").map_err(StackError::io("write that the SDKs are there"))?;
        Ok(sdks)
    }

    /// Installs what the lock file in `folder` says, there.
    ///
    /// # Errors
    /// When a package can't be had.
    pub(crate) async fn npm_ci(&self, folder: &Path, log: PathBuf, watch: &dyn Watch) -> Result<()> {
        Job::new(self.program("npm"), log)
            .args(["ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"])
            .env("PATH", self.path())
            .in_folder(folder)
            .run(watch)
            .await
    }

    /// Lets a client connect to `target` (a streamable HTTP URL; or `sse:` and a URL; or `stdio:` and a command as a JSON array), list
    /// the tools and make `calls`, one after the other.
    ///
    /// # Errors
    /// When the client ends with an error, or not in time.
    pub async fn talk(&self, sdk: Sdk, target: &str, era: Era, calls: &[(&str, Value)]) -> Result<Talk> {
        let calls: Vec<Value> =
            calls.iter().map(|(tool, arguments)| json!({ "tool": tool, "arguments": arguments })).collect();
        let log = tempfile::NamedTempFile::new().map_err(StackError::io("make a file for a client's output"))?;
        let (program, script) = match sdk {
            Sdk::Python => ("python", self.sources.join("client.py")),
            Sdk::TypeScript => {
                copy(&self.sources.join("client.mjs"), &self.folder.join("client.mjs"))?;
                ("node", self.folder.join("client.mjs"))
            }
        };
        let era = match era {
            Era::Auto => "auto",
            Era::Legacy => "legacy",
        };
        let job = Job::new(self.program(program), log.path().to_path_buf())
            .args([script])
            .args([target, era, &Value::from(calls).to_string()])
            .env("NO_PROXY", "*");
        limited("let a client talk", TALK_LIMIT, job.run(&Unwatched)).await?;
        let told = std::fs::read_to_string(log.path()).map_err(StackError::io("read a client's output"))?;
        // Around it there may be warnings of the library, and what a server it has started says.
        let line = told.lines().rev().find(|line| line.starts_with("{\"version\"")).unwrap_or_default();
        serde_json::from_str(line).map_err(StackError::json(format!("what a client told: {told}")))
    }

    /// Runs the scenarios a revision of the protocol requires of a server, against the one at `url`.
    ///
    /// # Errors
    /// When the suite can't be run or leaves no result; failed scenarios are a result.
    pub async fn conformance(&self, url: &str, revision: &str) -> Result<Scores> {
        let folder = tempfile::tempdir().map_err(StackError::io("make a folder for the suite's results"))?;
        let job = Job::new(self.program("node"), folder.path().join("log"))
            .args([self.folder.join("node_modules/@modelcontextprotocol/conformance/dist/index.js")])
            .args(["server", "--url", url, "--requirements", revision, "--output-dir"])
            .args([folder.path().join("results")])
            .env("NO_PROXY", "*");
        match limited("run the conformance suite", CONFORMANCE_LIMIT, job.run(&Unwatched)).await {
            // How it ends when a scenario has failed.
            Ok(()) | Err(StackError::Command { .. }) => {}
            Err(error) => return Err(error),
        }
        let scores = read_scores(&folder.path().join("results"))?;
        if scores.is_empty() {
            let tail = crate::command::tail_of(&folder.path().join("log"), 20);
            return Err(StackError::Mcp { doing: "run the conformance suite", problem: tail });
        }
        Ok(scores)
    }

    fn program(&self, name: &str) -> PathBuf {
        self.folder.join("bin").join(name)
    }

    /// npm is a script that looks for `node`.
    fn path(&self) -> std::ffi::OsString {
        let mut path = self.folder.join("bin").into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        path
    }
}

/// The suite leaves a folder per scenario, named `server-`, the scenario, and the time.
fn read_scores(folder: &Path) -> Result<Scores> {
    #[derive(Deserialize)]
    struct Check {
        id: String,
        status: String,
        #[serde(default, rename = "errorMessage")]
        error: Option<String>,
    }
    let reading = || StackError::io(format!("read {}", folder.display()));
    let mut scores = Scores::new();
    for entry in std::fs::read_dir(folder).map_err(reading())? {
        let entry = entry.map_err(reading())?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let file = entry.path().join("checks.json");
        let scenario = scores.entry(scenario_of(&name).to_owned()).or_default();
        let text = match std::fs::read(&file) {
            Ok(text) => text,
            // The scenario broke off, and has passed nothing.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(StackError::io(format!("read {}", file.display()))(error)),
        };
        let checks: Vec<Check> = serde_json::from_slice(&text).map_err(StackError::json(file.display().to_string()))?;
        for check in checks {
            match check.status.as_str() {
                "SUCCESS" => scenario.passed.push(check.id),
                "FAILURE" => drop(scenario.failed.insert(check.id, check.error.unwrap_or_default())),
                // Warnings, remarks and what didn't apply.
                _ => {}
            }
        }
        scenario.passed.sort();
        scenario.passed.dedup();
        scenario.passed.retain(|id| !scenario.failed.contains_key(id));
    }
    Ok(scores)
}

/// `server-tools-list-2026-08-31T10-00-00-000Z` is about `tools-list`.
fn scenario_of(folder: &str) -> &str {
    let name = folder.strip_prefix("server-").unwrap_or(folder);
    let time = name.match_indices("-20").map(|(at, _)| at).find(|at| name.get(at + 11..at + 12) == Some("T"));
    time.and_then(|at| name.get(..at)).unwrap_or(name)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::copy(from, to).map(drop).map_err(StackError::io(format!("copy {}", from.display())))
}

async fn limited<T>(doing: &'static str, limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(outcome) => outcome,
        Err(_) => Err(StackError::Mcp { doing, problem: format!("not done in {} s", limit.as_secs()) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_told_from_its_folder_and_a_check_that_failed_once_has_failed() {
        let folder = tempfile::tempdir().unwrap();
        let results = folder.path().join("server-json-schema-2020-12-2026-08-31T10-00-00-000Z");
        std::fs::create_dir(&results).unwrap();
        let checks = json!([
            { "id": "a", "status": "SUCCESS" },
            { "id": "b", "status": "SUCCESS" },
            { "id": "b", "status": "FAILURE", "errorMessage": "why" },
            { "id": "c", "status": "INFO" },
        ]);
        std::fs::write(results.join("checks.json"), checks.to_string()).unwrap();
        std::fs::create_dir(folder.path().join("server-broke-off-2026-08-31T10-00-00-000Z")).unwrap();
        let mut scores = read_scores(folder.path()).unwrap();
        assert_eq!(scores.remove("broke-off"), Some(Scenario::default()));
        let expected =
            Scenario { passed: vec!["a".to_owned()], failed: BTreeMap::from([("b".to_owned(), "why".to_owned())]) };
        assert_eq!(scores, Scores::from([("json-schema-2020-12".to_owned(), expected)]));
    }
}
