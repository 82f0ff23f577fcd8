//! `cargo xtask chaos`: callers, and somebody with a shell, make life hard for an agent on a droplet; see `stories::chaos`.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::Args;
use stack::{Stack, Workspace, prepare};
use stories::chaos::Chaos;
use stories::{Scene, all_logs, story_options};

use crate::terminal::{Terminal, shown};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How long they are at it
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// What they do follows from it; another one each time when absent
    #[arg(long)]
    seed: Option<u64>,
}

pub(crate) async fn run(options: &Options, terminal: &Terminal) -> ExitCode {
    match chaos(options, terminal).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            terminal.failed(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

async fn chaos(options: &Options, terminal: &Terminal) -> Result<(), Box<dyn std::error::Error>> {
    let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let seed = options.seed.unwrap_or_else(clock);
    let workspace = Workspace::find();
    terminal.step("Prepare: machine, programs, release, images");
    prepare::everything(&workspace, &[prepare::DEFAULT_IMAGE.to_owned()], terminal).await?;
    terminal.done("ready");
    terminal.step("A droplet");
    let stack = Stack::start_prepared(story_options(), &workspace, terminal).await?;
    let scene = Scene::on(stack).await?;
    terminal.done("active");

    let length = Duration::from_secs(options.minutes.saturating_mul(60));
    terminal.step(&format!("{} minutes of chaos, seed {seed}", options.minutes));
    terminal.line("");
    let outcome = Chaos { length, seed }.run(&scene, &|line| terminal.line(line)).await;
    let aftermath = match outcome {
        Ok(aftermath) => aftermath,
        Err(wrong) => {
            terminal.log("the stack", &all_logs(&scene.stack).await);
            return Err(wrong);
        }
    };
    scene.stack.remove().await?;
    let (accepted, refused, lost) = aftermath.requests;
    let tricks: Vec<String> = aftermath.tricks.iter().map(|(trick, times)| format!("{times} × {trick}")).collect();
    terminal.line(&format!("    seed        {seed}"));
    terminal.line(&format!("    requests    {accepted} accepted, {refused} refused, {lost} without an answer"));
    terminal.line(&format!("    tricks      {}", tricks.join("; ")));
    terminal.line(&format!("    in order    {} after the last of them", shown(aftermath.settled_after)));
    terminal.line(&format!(
        "    memory      {:.1} MB at most, {:.1} MB at the end",
        aftermath.memory.0, aftermath.memory.1
    ));
    terminal.done("what was promised is there, and nothing else");
    Ok(())
}
