//! Processes a stack starts and leaves running: spawned away from the terminal, remembered so that a later run can end
//! exactly them and nothing else.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::error::{Result, StackError};

/// A process as it can be recognised later: ids are used again, ids with a start time are not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// What it is to the stack.
    pub name: String,
    /// Process id.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub started: u64,
    /// Where it writes.
    pub log: PathBuf,
}

impl ProcessRecord {
    /// This process itself, for saying whose a stack is.
    pub fn of_this_process() -> Result<Self> {
        let pid = i32::try_from(std::process::id()).unwrap_or_default();
        let started = start_time(pid).ok_or_else(|| StackError::InUse("cannot read /proc".to_owned()))?;
        Ok(Self { name: "owner".to_owned(), pid, started, log: PathBuf::new() })
    }

    /// Starts `program` in a process group of its own, with no input, its output appended to `log`, and exactly `env`.
    pub(crate) fn spawn(
        name: &str,
        program: &Path,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
        env: impl IntoIterator<Item = (String, String)>,
        folder: &Path,
        log: &Path,
    ) -> Result<Self> {
        let doing = || format!("start {name} ({})", program.display());
        let out = File::options().create(true).append(true).open(log).map_err(StackError::io(doing()))?;
        let err = out.try_clone().map_err(StackError::io(doing()))?;
        let mut command = Command::new(program);
        command.args(args).env_clear().envs(env).current_dir(folder).process_group(0);
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        // Not waited for: the runtime reaps it if it ends before us, init if after.
        let child = command.spawn().map_err(StackError::io(doing()))?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default();
        let Some(started) = start_time(pid) else {
            return Err(StackError::Io { doing: doing(), source: std::io::Error::other("it ended at once") });
        };
        Ok(Self { name: name.to_owned(), pid, started, log: log.to_path_buf() })
    }

    /// Whether this very process still runs.
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Ends it with SIGTERM, and with SIGKILL after `grace`.
    ///
    /// # Errors
    /// When the signal can't be sent to a process that is still there.
    pub async fn stop(&self, grace: Duration) -> Result<()> {
        self.signal(Signal::TERM)?;
        if !self.ended_within(grace).await {
            self.kill().await?;
        }
        Ok(())
    }

    /// Ends it with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// As [`ProcessRecord::stop`].
    pub async fn kill(&self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.ended_within(Duration::from_secs(5)).await;
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let Some(pid) = Pid::from_raw(self.pid).filter(|_| self.is_alive()) else { return Ok(()) };
        match kill_process(pid, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => {
                Err(StackError::Io { doing: format!("end {} ({})", self.name, self.pid), source: errno.into() })
            }
        }
    }

    async fn ended_within(&self, limit: Duration) -> bool {
        let looking = async {
            while self.is_alive() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(limit, looking).await.is_ok()
    }
}

/// Ends a short-lived process of ours at the latest when the work it was started for is given up.
#[derive(Debug)]
pub(crate) struct KillOnDrop(pub(crate) ProcessRecord);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Err(error) = self.0.signal(Signal::KILL) {
            tracing::warn!(%error, "a process is left running");
        }
    }
}

/// Field 22 of `/proc/PID/stat`; none for a process that is gone or only waits to be reaped.
fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses and may hold spaces and parentheses itself.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    let started = fields.nth(18)?.parse().ok()?;
    (state != "Z").then_some(started)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(folder: &Path) -> ProcessRecord {
        let log = folder.join("log");
        ProcessRecord::spawn("sleeper", Path::new("/bin/sleep"), ["60"], [], folder, &log).unwrap()
    }

    #[tokio::test]
    async fn a_process_is_ended_and_another_with_its_id_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let process = sleeper(folder.path());
        let stranger = ProcessRecord { started: process.started + 1, ..process.clone() };
        assert!(process.is_alive() && !stranger.is_alive());
        stranger.kill().await.unwrap();
        assert!(process.is_alive(), "only the id was the same");
        process.stop(Duration::from_secs(5)).await.unwrap();
        assert!(!process.is_alive());
        process.stop(Duration::from_secs(5)).await.unwrap();
    }

    #[test]
    fn this_process_is_alive() {
        assert!(ProcessRecord::of_this_process().unwrap().is_alive());
    }
}
