//! Commands inside containers.
//!
//! Docker starts such a process and tells how it ended, and has no call to end it: neither hanging up nor forgetting it does. So the command
//! is marked with a variable of its own in its environment, which its children inherit, and a second command looks for the mark and kills
//! what bears it, as the container's user and with nothing but a shell. An image without one keeps its process.

use std::time::Duration;

use bollard::Docker;
use bollard::container::LogOutput;
use bollard::exec::{StartExecOptions, StartExecResults};
use bollard::models::{ExecConfig, ExecInspectResponse};
use futures_util::StreamExt as _;
use tokio::time::{Instant, MissedTickBehavior, timeout, timeout_at};

use super::errors::{is_conflict, sort};
use crate::engine::{ContainerId, Exec, ExecEnd, ExecError, Executed, Kept};

/// The variable commands are marked with; its value is of one command only.
const MARK: &str = "DTMA_EXEC_ID";
/// How often Docker is asked whether the process has ended: its output stays open as long as any child of it holds it.
const ASK: Duration = Duration::from_secs(1);
/// How long output may still come in after the process has ended.
const DRAIN: Duration = Duration::from_millis(250);
/// How long killing may take, and being told that it worked.
const KILLING: Duration = Duration::from_secs(3);

/// Kills every process whose environment has the mark in `$1`; twice, for those that were just being made. Uses only what any shell has
/// built in. A process whose environment can't be read is not ours.
const KILL: &str = r#"
for round in 1 2; do
  for folder in /proc/[0-9]*; do
    while IFS= read -r variables || [ -n "$variables" ]; do
      case "$variables" in *"$1"*) kill -9 "${folder#/proc/}" ;; esac
      variables=
    done < "$folder/environ"
  done
done 2>/dev/null
"#;

/// Runs a command and waits for its end, or until its patience is over.
pub(super) async fn run(docker: &Docker, id: &ContainerId, exec: &Exec) -> Result<Executed, ExecError> {
    const OPERATION: &str = "run a command in the container";
    let until = Instant::now() + exec.patience;
    let mark = format!("{MARK}={}", uuid::Uuid::new_v4());
    let (mut stdout, mut stderr) = (Kept::default(), Kept::default());
    let config = ExecConfig {
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        env: Some(vec![mark.clone()]),
        cmd: Some(exec.command.clone()),
        ..ExecConfig::default()
    };
    let created = docker.create_exec(id.as_str(), config).await.map_err(|error| refused(OPERATION, error))?;
    let started = docker.start_exec(&created.id, Some(StartExecOptions::default())).await;
    let mut output = match started.map_err(|error| refused(OPERATION, error))? {
        StartExecResults::Attached { output, .. } => output,
        StartExecResults::Detached => futures_util::stream::empty().boxed(),
    };
    let mut ask = tokio::time::interval_at(Instant::now() + ASK, ASK);
    ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let in_time = timeout_at(until, async {
        loop {
            tokio::select! {
                piece = output.next() => match piece {
                    Some(Ok(piece)) => take(piece, exec.keep, &mut stdout, &mut stderr),
                    Some(Err(error)) => break Err(sort(OPERATION, error)),
                    None => break Ok(()),
                },
                _ = ask.tick() => {
                    if look(docker, &created.id).await?.running == Some(false) {
                        break Ok(());
                    }
                }
            }
        }
    });
    if let Ok(ended) = in_time.await {
        ended?;
    }
    // The process may have ended, and with a child of it still holding the output nobody would have noticed.
    let mut seen = look(docker, &created.id).await?;
    if seen.running == Some(true) {
        // The output's end can come a moment before that of the process.
        while seen.running == Some(true) && Instant::now() < until {
            tokio::time::sleep(DRAIN.min(until.saturating_duration_since(Instant::now()))).await;
            seen = look(docker, &created.id).await?;
        }
    }
    if seen.running == Some(true) {
        let killed = timeout(KILLING, kill(docker, id, &created.id, &mark)).await.unwrap_or(false);
        return Ok(Executed { end: ExecEnd::TimedOut { killed }, stdout, stderr });
    }
    // What is on its way already, and no more: a child may write for ever.
    let rest = async {
        while let Some(Ok(piece)) = output.next().await {
            take(piece, exec.keep, &mut stdout, &mut stderr);
        }
    };
    let _ = timeout(DRAIN, rest).await;
    let code = seen.exit_code.unwrap_or(-1);
    // A process that never was has no number, and Docker's reason stands where its output would.
    if matches!(code, 126 | 127) && seen.pid.unwrap_or(0) == 0 {
        let message = String::from_utf8_lossy(&stdout.bytes).trim().to_owned();
        return Err(ExecError::CannotStart { message });
    }
    Ok(Executed { end: ExecEnd::Exited { code }, stdout, stderr })
}

fn take(piece: LogOutput, keep: usize, stdout: &mut Kept, stderr: &mut Kept) {
    match piece {
        LogOutput::StdErr { message } => stderr.take(&message, keep),
        LogOutput::StdOut { message } | LogOutput::Console { message } | LogOutput::StdIn { message } => {
            stdout.take(&message, keep);
        }
    }
}

async fn look(docker: &Docker, exec: &str) -> Result<ExecInspectResponse, crate::engine::EngineError> {
    docker.inspect_exec(exec).await.map_err(|error| sort("look at a command", error))
}

/// Kills what bears the mark; whether the command itself has ended then.
async fn kill(docker: &Docker, id: &ContainerId, exec: &str, mark: &str) -> bool {
    let script = ["/bin/sh", "-c", KILL, "kill", mark].map(str::to_owned).to_vec();
    // Attached, because a command that nobody listens to is answered before it has run.
    let config = ExecConfig { attach_stdout: Some(true), cmd: Some(script), ..ExecConfig::default() };
    let Ok(killer) = docker.create_exec(id.as_str(), config).await else { return false };
    if let Ok(StartExecResults::Attached { mut output, .. }) = docker.start_exec(&killer.id, None).await {
        while let Some(Ok(_)) = output.next().await {}
    }
    // Docker hears of the end a moment after it.
    for _ in 0..10 {
        match look(docker, exec).await {
            Ok(seen) if seen.running == Some(false) => return true,
            Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            Err(_) => return false,
        }
    }
    false
}

fn refused(operation: &'static str, error: bollard::errors::Error) -> ExecError {
    if is_conflict(&error) {
        // It is stopped, paused, or about to be started again.
        return ExecError::NotRunning;
    }
    match sort(operation, error) {
        crate::engine::EngineError::ContainerGone { .. } => ExecError::NotRunning,
        // Newer engines say so at once, older ones where the output would be.
        crate::engine::EngineError::Refused { message, .. } => ExecError::CannotStart { message },
        error => ExecError::Engine(error),
    }
}
