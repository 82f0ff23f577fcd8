//! The tests that need Docker and root, three programs of tests at a time and within each one test after the other: what they wait for is
//! Docker and droplets more than this machine's cores. What runs beside what follows from how long each takes, so none may mind.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::Deserialize;
use stack::command::{Job, tail_of};
use stack::{StackError, Workspace};

use super::{LOG_LINES, counted, telling};
use crate::terminal::{Terminal, shown};

/// Those that take longest, the longest first: begun last, one of them would run alone in the end.
const LONGEST: [&str; 6] =
    ["agent-docker", "stories-isolation", "stories-update", "stories-mcp", "stories-mcp_load", "stories-provisioning"];

/// One that takes longer than all others is two: those whose names have this word in them, and the rest.
const DIVIDED: (&str, &str) = ("agent-docker", "killed");

/// One program of tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Program {
    /// The package and the target in it.
    name: String,
    executable: PathBuf,
    /// The package's folder, in which cargo runs its tests as well.
    folder: PathBuf,
    /// Which of its tests: the arguments that choose them.
    chosen: Vec<&'static str>,
}

/// What came of one program of tests.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub(super) name: String,
    pub(super) passed: usize,
    pub(super) failed: usize,
    pub(super) ok: bool,
}

/// A line of what `cargo --message-format=json` says about a finished build.
#[derive(Debug, Deserialize)]
struct Artifact {
    executable: Option<PathBuf>,
    manifest_path: PathBuf,
    target: Target,
    profile: Profile,
}

#[derive(Debug, Deserialize)]
struct Target {
    name: String,
}

#[derive(Debug, Deserialize)]
struct Profile {
    test: bool,
}

/// Every program of tests there is in the workspace, built, the longest first.
pub(super) async fn programs(workspace: &Workspace, terminal: &Terminal) -> Result<Vec<Program>, StackError> {
    let log = workspace.local().join("test-programs.log");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let args = ["test", "--workspace", "--no-run", "--message-format=json"];
    Job::new(cargo, log.clone()).args(args).in_folder(workspace.root()).run(terminal).await?;
    let said = std::fs::read_to_string(&log)
        .map_err(|source| StackError::Io { doing: format!("read {}", log.display()), source })?;
    Ok(listed(&said))
}

fn listed(said: &str) -> Vec<Program> {
    let artifacts = said.lines().filter_map(|line| serde_json::from_str::<Artifact>(line).ok());
    let mut programs: Vec<Program> = artifacts
        .filter(|artifact| artifact.profile.test)
        .filter_map(|artifact| {
            let folder = artifact.manifest_path.parent()?.to_path_buf();
            let package = folder.file_name()?.to_string_lossy().into_owned();
            Some(Program {
                name: format!("{package}-{}", artifact.target.name),
                executable: artifact.executable?,
                folder,
                chosen: Vec::new(),
            })
        })
        .flat_map(divided)
        .collect();
    programs.sort_by_key(|program| {
        let place = LONGEST.iter().position(|name| program.name.starts_with(name)).unwrap_or(LONGEST.len());
        (place, program.name.clone())
    });
    programs
}

fn divided(program: Program) -> Vec<Program> {
    let (name, word) = DIVIDED;
    if program.name != name {
        return vec![program];
    }
    let part = Program { name: format!("{name}-{word}"), chosen: vec![word], ..program.clone() };
    vec![Program { chosen: vec!["--skip", word], ..program }, part]
}

/// Runs the tests in `programs` that are ignored otherwise.
pub(super) async fn run(programs: Vec<Program>, workspace: &Workspace, terminal: &Terminal) -> Vec<Run> {
    let waiting = Mutex::new(programs.into_iter());
    let lane = async || {
        let mut runs = Vec::new();
        while let Some(program) = next(&waiting) {
            runs.push(run_one(&program, &workspace.local(), terminal).await);
        }
        runs
    };
    let (first, second, third) = tokio::join!(lane(), lane(), lane());
    [first, second, third].concat()
}

fn next(waiting: &Mutex<std::vec::IntoIter<Program>>) -> Option<Program> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner).next()
}

async fn run_one(program: &Program, logs: &Path, terminal: &Terminal) -> Run {
    let begun = Instant::now();
    let log = logs.join(format!("test-{}.log", program.name));
    let job = Job::new(&program.executable, log.clone()).args(["--ignored", "--test-threads=1"]).args(&program.chosen);
    let outcome = job.in_folder(&program.folder).run(terminal).await;
    let written = std::fs::read_to_string(&log).unwrap_or_default();
    let (passed, failed) = counted(&written);
    let name = program.name.clone();
    let took = begun.elapsed();
    match outcome {
        // Most have no such test.
        Ok(()) if passed == 0 => {}
        Ok(()) => terminal.line(&format!("    ✓ {name}: {passed} passed  {}", shown(took))),
        Err(error) => {
            let why = match &error {
                StackError::Command { .. } => {
                    format!("{failed} failed, {passed} passed; the whole log: {}", log.display())
                }
                other => other.to_string(),
            };
            terminal.line(&format!("    ✗ {name}: {why}  {}", shown(took)));
            terminal.log(&name, &telling(&written).unwrap_or_else(|| tail_of(&log, LOG_LINES)));
            return Run { name, passed, failed, ok: false };
        }
    }
    Run { name, passed, failed, ok: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_of_tests_are_found_in_what_cargo_says_the_longest_first() {
        let said = r#"
   Compiling something
{"reason":"compiler-artifact","package_id":"p","manifest_path":"/w/agent/Cargo.toml","target":{"kind":["lib"],"name":"dtma_agent"},"profile":{"test":true},"executable":"/t/dtma_agent-1"}
{"reason":"compiler-artifact","package_id":"p","manifest_path":"/w/agent/Cargo.toml","target":{"kind":["bin"],"name":"dtma-agent"},"profile":{"test":false},"executable":"/t/dtma-agent"}
{"reason":"compiler-artifact","package_id":"p","manifest_path":"/w/agent/Cargo.toml","target":{"kind":["test"],"name":"docker"},"profile":{"test":true},"executable":"/t/docker-1"}
{"reason":"compiler-artifact","package_id":"q","manifest_path":"/r/serde/Cargo.toml","target":{"kind":["lib"],"name":"serde"},"profile":{"test":false},"executable":null}
{"reason":"build-finished","success":true}
"#;
        let names: Vec<String> = listed(said).into_iter().map(|program| program.name).collect();
        assert_eq!(names, ["agent-docker", "agent-docker-killed", "agent-dtma_agent"]);
        assert_eq!(listed(said).first().map(|program| program.folder.clone()), Some(PathBuf::from("/w/agent")));
    }
}
