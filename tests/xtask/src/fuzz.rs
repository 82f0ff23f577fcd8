//! `cargo xtask fuzz`: gives libFuzzer's inputs to everything in the agent that reads bytes from outside. What each target must hold is
//! in `agent/src/fuzz.rs`; the ordinary tests run the same over the corpus. The stable toolchain does: without a sanitizer, which code
//! without `unsafe` doesn't need, cargo-fuzz asks for nothing unstable.

use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use stack::command::{Job, tail_of};
use stack::{StackError, Workspace};

use crate::terminal::Terminal;
use crate::with_causes;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How long each target is run
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Only this one; all of them when absent
    target: Option<String>,
}

/// No input of a target takes longer, seconds.
const SLOWEST: u32 = 10;
/// Longest input that is tried. What is longer has no new shape.
const LONGEST: u32 = 4096;

pub(crate) async fn run(options: &Options, terminal: &Terminal) -> ExitCode {
    match all(options, terminal).await {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => {
            terminal.line(&format!("{failed} targets failed"));
            ExitCode::FAILURE
        }
        Err(error) => {
            terminal.failed(&with_causes(&error));
            ExitCode::FAILURE
        }
    }
}

/// How many targets failed.
async fn all(options: &Options, terminal: &Terminal) -> Result<usize, StackError> {
    let workspace = Workspace::find();
    let folder = workspace.local().join("fuzz");
    make(&folder)?;
    terminal.step("cargo-fuzz, and the targets built with instrumentation");
    if !installed(&workspace).await {
        let job = cargo(&folder.join("install.log"), &workspace).args(["install", "cargo-fuzz", "--locked"]);
        job.run(terminal).await?;
    }
    fuzz(&folder.join("build.log"), "build", &workspace).run(terminal).await?;
    terminal.done("built");
    let mut failed = 0;
    for target in targets(&workspace, options.target.as_deref())? {
        let found = folder.join(&target);
        make(&found)?;
        terminal.step(&format!("{target}: {} s", options.seconds));
        let log = folder.join(format!("{target}.log"));
        let corpus = workspace.root().join("tests/fuzz/corpus").join(&target);
        let words = workspace.root().join("tests/fuzz/words.dict");
        // libFuzzer keeps what it finds in the first folder; what is worth keeping for good goes into the second by hand.
        let job = fuzz(&log, "run", &workspace).args([target.as_str()]).args([&found, &corpus]).args([
            "--",
            &format!("-max_total_time={}", options.seconds),
            &format!("-timeout={SLOWEST}"),
            &format!("-max_len={LONGEST}"),
            &format!("-dict={}", words.display()),
            &format!("-artifact_prefix={}/{target}-", folder.display()),
            "-print_final_stats=1",
        ]);
        match job.run(terminal).await {
            Ok(()) => drop(terminal.done(&format!("{} inputs", executed(&log)))),
            Err(_) => {
                failed += 1;
                terminal.failed(&format!("{target} does not hold; the input is beside {}", log.display()));
                terminal.log(&target, &told(&log));
            }
        }
    }
    Ok(failed)
}

/// Names of the targets: the one wanted, or every one there is.
fn targets(workspace: &Workspace, wanted: Option<&str>) -> Result<Vec<String>, StackError> {
    let corpus = workspace.root().join("tests/fuzz/corpus");
    let doing = || format!("read {}", corpus.display());
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&corpus).map_err(|source| StackError::Io { doing: doing(), source })? {
        let entry = entry.map_err(|source| StackError::Io { doing: doing(), source })?;
        names.extend(entry.file_name().into_string().ok());
    }
    names.sort();
    match wanted {
        None => Ok(names),
        Some(wanted) if names.iter().any(|name| name == wanted) => Ok(vec![wanted.to_owned()]),
        Some(wanted) => Err(StackError::InUse(format!("there is no target {wanted}; there are {}", names.join(", ")))),
    }
}

fn cargo(log: &Path, workspace: &Workspace) -> Job {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    Job::new(cargo, log.to_path_buf()).env("CARGO_TERM_COLOR", "never").in_folder(workspace.root())
}

fn fuzz(log: &Path, what: &str, workspace: &Workspace) -> Job {
    let target_dir = workspace.root().join("target/fuzz");
    cargo(log, workspace)
        .args(["fuzz", what, "--fuzz-dir", "tests/fuzz", "--sanitizer", "none", "--target-dir"])
        .args([target_dir])
}

async fn installed(workspace: &Workspace) -> bool {
    let log = workspace.local().join("fuzz/version.log");
    cargo(&log, workspace).args(["fuzz", "--version"]).run(&stack::Unwatched).await.is_ok()
}

fn make(folder: &Path) -> Result<(), StackError> {
    let doing = format!("make {}", folder.display());
    std::fs::create_dir_all(folder).map_err(|source| StackError::Io { doing, source })
}

/// How many inputs were tried, as libFuzzer says at its end.
fn executed(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    line.map_or_else(|| "an unknown number of".to_owned(), |number| number.trim().to_owned())
}

/// What went wrong: from the panic on.
fn told(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    match text.find("panicked at") {
        Some(at) => text.get(at..).unwrap_or_default().lines().take(40).collect::<Vec<_>>().join("\n"),
        None => tail_of(log, 40),
    }
}
