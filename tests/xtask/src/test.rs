//! `cargo xtask test`: sets this machine up, then runs every check and test there is, ending with the demo. Goes on after a
//! failure, so that one run tells everything.

mod lanes;

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use stack::command::{Job, tail_of};
use stack::stack::remove_stale;
use stack::{StackError, Unwatched, Workspace, host, prepare, release};

use crate::demo;
use crate::interrupt::interrupted;
use crate::terminal::{Terminal, shown};
use crate::with_causes;

const LOG_LINES: usize = 150;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only what needs neither Docker nor root: formatting, lints, plain tests
    #[arg(long)]
    quick: bool,
}

/// What was run and what came of it.
#[derive(Debug, Default)]
struct Summary {
    steps: Vec<(String, bool, Duration)>,
    passed: usize,
    failed: usize,
}

impl Summary {
    fn note(&mut self, what: &str, ok: bool, took: Duration) {
        self.steps.push((what.to_owned(), ok, took));
    }

    fn all_well(&self) -> bool {
        self.failed == 0 && self.steps.iter().all(|(_, ok, _)| *ok)
    }
}

pub(crate) async fn run(options: &Options, terminal: &Terminal) -> ExitCode {
    let workspace = Workspace::find();
    let mut summary = Summary::default();
    terminal.title("Every check and test there is");
    let interruption = tokio::select! {
        // First, so that nothing that is being given up still takes the interruption for its own.
        biased;
        name = interrupted() => Some(name),
        () = steps(options, &workspace, &mut summary, terminal) => None,
    };
    if let Some(name) = interruption {
        let took = terminal.failed(&format!("interrupted ({name})"));
        summary.note("to the end", false, took);
        if !options.quick {
            // The tests that ran had no time to clean up.
            terminal.step("remove what the interrupted tests have left");
            ended("clean-up", remove_stale(&workspace).await, &mut summary, terminal);
        }
    }
    close(&summary, terminal)
}

async fn steps(options: &Options, workspace: &Workspace, summary: &mut Summary, terminal: &Terminal) {
    if !options.quick && !set_up(workspace, summary, terminal).await {
        return;
    }
    cargo("formatting", &["fmt", "--all", "--check", "--", "--color=never"], workspace, summary, terminal).await;
    let lints = ["clippy", "--workspace", "--all-targets", "--", "--deny=warnings"];
    cargo("lints", &lints, workspace, summary, terminal).await;
    let plain = ["test", "--workspace", "--no-fail-fast"];
    // The release ends in one long compilation that leaves a core to others. Whatever comes of it is told in its own step, which does it again.
    let early = async {
        if !options.quick {
            drop(release::release(workspace, None, &Unwatched).await);
        }
    };
    tokio::join!(cargo("tests", &plain, workspace, summary, terminal), early);
    if options.quick || !programs_and_images(workspace, summary, terminal).await {
        return;
    }
    with_docker(workspace, summary, terminal).await;
    let begun = terminal.elapsed();
    let shown = demo::run(&demo::Options::default(), terminal).await == ExitCode::SUCCESS;
    summary.note("demo", shown, terminal.elapsed().saturating_sub(begun));
}

async fn set_up(workspace: &Workspace, summary: &mut Summary, terminal: &Terminal) -> bool {
    terminal.step("set-up of this machine");
    let outcome = async {
        host::set_up(workspace, terminal).await?;
        remove_stale(workspace).await
    };
    ended("set-up", outcome.await, summary, terminal)
}

async fn programs_and_images(workspace: &Workspace, summary: &mut Summary, terminal: &Terminal) -> bool {
    terminal.step("programs, release, images");
    let images = [prepare::DEFAULT_IMAGE, prepare::BARE_IMAGE].map(str::to_owned);
    ended("programs, release, images", prepare::everything(workspace, &images, terminal).await, summary, terminal)
}

/// The tests that plain `cargo test` leaves out.
async fn with_docker(workspace: &Workspace, summary: &mut Summary, terminal: &Terminal) {
    let what = "tests with Docker and droplets";
    terminal.step(what);
    let programs = match lanes::programs(workspace, terminal).await {
        Ok(programs) => programs,
        Err(error) => {
            let took = terminal.failed(&with_causes(&error));
            return summary.note(what, false, took);
        }
    };
    let runs = lanes::run(programs, workspace, terminal).await;
    let passed: usize = runs.iter().map(|run| run.passed).sum();
    let broken: Vec<&str> = runs.iter().filter(|run| !run.ok).map(|run| run.name.as_str()).collect();
    summary.passed += passed;
    summary.failed += runs.iter().map(|run| run.failed).sum::<usize>();
    let took = if broken.is_empty() {
        terminal.done(&format!("{passed} tests passed"))
    } else {
        terminal.failed(&format!("see above what is wrong in {}", broken.join(", ")))
    };
    summary.note(what, broken.is_empty(), took);
}

/// One cargo command; whatever tests its output tells of are counted.
async fn cargo(what: &str, args: &[&str], workspace: &Workspace, summary: &mut Summary, terminal: &Terminal) {
    terminal.step(&format!("{what}: cargo {}", args.join(" ")));
    let log = workspace.local().join(format!("test-{}.log", what.replace(' ', "-")));
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let job = Job::new(cargo, log.clone()).args(args).env("CARGO_TERM_COLOR", "never").in_folder(workspace.root());
    let outcome = match std::fs::create_dir_all(workspace.local()) {
        Ok(()) => job.run(terminal).await,
        Err(source) => Err(StackError::Io { doing: "make target/local".to_owned(), source }),
    };
    let written = std::fs::read_to_string(&log).unwrap_or_default();
    let (passed, failed) = counted(&written);
    summary.passed += passed;
    summary.failed += failed;
    match outcome {
        Ok(()) => {
            let result = if passed > 0 { format!("{passed} tests passed") } else { "nothing to say".to_owned() };
            let took = terminal.done(&result);
            summary.note(what, true, took);
        }
        Err(_) => {
            let took = terminal.failed(&format!("{what}: {failed} tests failed; the whole log: {}", log.display()));
            terminal.log(what, &telling(&written).unwrap_or_else(|| tail_of(&log, LOG_LINES)));
            summary.note(what, false, took);
        }
    }
}

/// Adds up cargo test's closing lines.
fn counted(log: &str) -> (usize, usize) {
    let mut sum = (0, 0);
    for line in log.lines().filter_map(|line| line.strip_prefix("test result: ")) {
        let words = line.split([' ', ';']).filter(|word| !word.is_empty());
        let mut number = 0;
        for word in words {
            match word {
                "passed" => sum.0 += number,
                "failed" => sum.1 += number,
                _ => number = word.parse().unwrap_or(number),
            }
        }
    }
    sum
}

/// What the failed tests wrote, cut out of everything the others did.
fn telling(log: &str) -> Option<String> {
    let mut kept = Vec::new();
    let mut inside = false;
    for line in log.lines() {
        if line == "failures:" {
            inside = true;
        }
        if inside {
            kept.push(line);
        }
        if line.starts_with("test result: ") {
            inside = false;
        }
    }
    (!kept.is_empty()).then(|| kept.join("\n"))
}

fn ended<E: std::error::Error>(what: &str, outcome: Result<(), E>, summary: &mut Summary, terminal: &Terminal) -> bool {
    let (ok, took) = match outcome {
        Ok(()) => (true, terminal.done("done")),
        Err(error) => (false, terminal.failed(&with_causes(&error))),
    };
    summary.note(what, ok, took);
    ok
}

fn close(summary: &Summary, terminal: &Terminal) -> ExitCode {
    terminal.title("\nSummary");
    for (what, ok, took) in &summary.steps {
        terminal.line(&format!("    {} {what:<32} {}", if *ok { "ok    " } else { "FAILED" }, shown(*took)));
    }
    terminal.line(&format!("    all in {}", shown(terminal.elapsed())));
    // A check that isn't a test must not hide behind a clean count.
    let failed_checks = summary.steps.iter().filter(|(_, ok, _)| !ok).count();
    let failed = summary.failed.max(failed_checks);
    terminal.line(&format!("{} passed, {failed} failed", summary.passed));
    if summary.all_well() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
running 2 tests
test a ... ok
test b ... FAILED

failures:

---- b stdout ----
why

failures:
    b

test result: FAILED. 1 passed; 1 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.01s

running 1 test
test c ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn tests_are_counted_over_all_packages_and_failures_are_cut_out() {
        assert_eq!(counted(LOG), (2, 1));
        let told = telling(LOG).unwrap();
        assert!(told.contains("why") && !told.contains("test c"), "{told}");
        assert_eq!(telling("all well"), None);
    }

    #[test]
    fn a_failed_check_counts_as_a_failure() {
        let mut summary = Summary { passed: 3, ..Summary::default() };
        assert!(summary.all_well());
        summary.note("lints", false, Duration::ZERO);
        assert!(!summary.all_well());
    }
}
