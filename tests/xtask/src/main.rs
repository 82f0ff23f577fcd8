//! `cargo xtask`: the one entry to everything a person or CI does with this repository.

mod bench;
mod chaos;
mod demo;
mod fuzz;
mod interrupt;
mod release;
mod terminal;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use stack::stack::{Stack, StackOptions, remove_all, remove_stale};
use stack::{StackError, Workspace, prepare};

use crate::interrupt::interrupted;
use crate::terminal::Terminal;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Everything this repository can do on one machine")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// From nothing to a working MCP tool call on a new droplet, and back to nothing
    Demo(demo::Options),
    /// Start local cloud, registry and provisioner and leave them running; see target/local/stack.json
    Up,
    /// Remove everything `up` (or a run that was killed) has left
    Down {
        /// Also whatever in Docker bears a stack's label and isn't known here; a test that is just running may still use it
        #[arg(long)]
        all: bool,
    },
    /// Set up this machine and run every check and test there is
    Test(test::Options),
    /// Measure the released agent on a droplet, and the released provisioner, against what they may cost
    Bench,
    /// Make life hard for an agent on a droplet, and look whether it kept its promises
    Chaos(chaos::Options),
    /// Give libFuzzer's inputs to everything in the agent that reads bytes from outside
    Fuzz(fuzz::Options),
    /// Build the agent's release, sign it, and put it into target/dist
    Release(release::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Warnings of the libraries; what a task does is told by the task itself.
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_writer(std::io::stderr)
        .init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("cannot start a runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(async {
        let terminal = Terminal::new();
        match arguments.task {
            Task::Demo(options) => demo::run(&options, &terminal).await,
            Task::Test(options) => test::run(&options, &terminal).await,
            Task::Up => unless_interrupted(up(&terminal), &terminal).await,
            Task::Down { all } => unless_interrupted(down(all, &terminal), &terminal).await,
            Task::Bench => unless_interrupted(bench::run(&terminal), &terminal).await,
            Task::Release(options) => unless_interrupted(release::run(&options, &terminal), &terminal).await,
            Task::Chaos(options) => chaos::run(&options, &terminal).await,
            Task::Fuzz(options) => fuzz::run(&options, &terminal).await,
        }
    })
}

/// Runs a task that needs nothing cleaned up but what goes when it is dropped.
async fn unless_interrupted<E: std::error::Error>(
    task: impl Future<Output = Result<(), E>>,
    terminal: &Terminal,
) -> ExitCode {
    tokio::select! {
        outcome = task => ended(outcome, terminal),
        name = interrupted() => {
            terminal.failed(&format!("interrupted ({name})"));
            ExitCode::FAILURE
        }
    }
}

/// Tells what went wrong, if anything did.
fn ended<E: std::error::Error>(outcome: Result<(), E>, terminal: &Terminal) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            terminal.failed(&with_causes(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error and what it came from, as one text.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

async fn up(terminal: &Terminal) -> Result<(), stack::release::ReleaseError> {
    let workspace = Workspace::find();
    // The same one every time, and not another clone's.
    let id = format!("up-{}", workspace.short_name());
    let options = StackOptions { id: Some(id), stays: true, ..StackOptions::default() };
    terminal.step("prepare: machine, programs, release, images");
    prepare::everything(&workspace, &[prepare::DEFAULT_IMAGE.to_owned(), prepare::BARE_IMAGE.to_owned()], terminal)
        .await?;
    remove_stale(&workspace).await?;
    terminal.done("ready");
    terminal.step("start registry, local cloud, provisioner");
    let stack = Stack::start_prepared(options, &workspace, terminal).await?;
    let file = stack.file();
    file.write(&workspace)?;
    terminal.done("running until `cargo xtask down`");
    terminal.line(&format!("    provisioner  {}", file.provisioner_url));
    terminal.line(&format!("    local cloud  {}", file.cloud_url));
    terminal.line(&format!("    registry     {} (push to {})", file.registry, file.registry_push));
    terminal.line(&format!("    secrets      {}", stack::record::StackFile::path(&workspace).display()));
    Ok(())
}

async fn down(all: bool, terminal: &Terminal) -> Result<(), StackError> {
    terminal.step("remove every trace of local stacks");
    let removed = remove_all(&Workspace::find(), all).await?;
    let result =
        if removed.is_empty() { "nothing was there".to_owned() } else { format!("removed: {}", removed.join(", ")) };
    terminal.done(&result);
    Ok(())
}
