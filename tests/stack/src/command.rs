//! Running a program to its end: everything it writes goes to a file, its latest line to whoever watches.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use crate::error::{Result, StackError};
use crate::watch::Watch;

const TAIL_LINES: usize = 25;
/// From SIGTERM to SIGKILL: a package manager or a bootstrap wants to leave things in order.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// One program to run, with its log.
#[derive(Debug)]
pub struct Job {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    folder: Option<PathBuf>,
    log: PathBuf,
}

impl Job {
    /// `program`, writing to `log` (replaced).
    pub fn new(program: impl AsRef<OsStr>, log: PathBuf) -> Self {
        Self { program: program.as_ref().to_owned(), args: Vec::new(), env: Vec::new(), folder: None, log }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Runs it there.
    #[must_use]
    pub fn in_folder(mut self, folder: &Path) -> Self {
        self.folder = Some(folder.to_path_buf());
        self
    }

    /// Runs it to its end. It gets no standard input, and when the future is dropped it is ended with everything it has started.
    ///
    /// # Errors
    /// When it can't be started or ends with anything but 0; with the last lines of what it wrote.
    pub async fn run(self, watch: &dyn Watch) -> Result<()> {
        let shown = self.shown();
        let doing = format!("run `{shown}`");
        let mut log = tokio::fs::File::create(&self.log)
            .await
            .map_err(StackError::io(format!("write {}", self.log.display())))?;
        let mut command = Command::new(&self.program);
        for (name, _) in std::env::vars_os().filter(|(name, _)| says_what_cargo_runs(&name.to_string_lossy())) {
            command.env_remove(name);
        }
        command.args(&self.args).envs(self.env.iter().cloned()).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let mut family = Family { child: command.spawn().map_err(StackError::io(doing.clone()))?, over: false };

        let (lines_in, mut lines) = mpsc::channel::<String>(64);
        if let Some(out) = family.child.stdout.take() {
            tokio::spawn(forward(out, lines_in.clone()));
        }
        if let Some(err) = family.child.stderr.take() {
            tokio::spawn(forward(err, lines_in.clone()));
        }
        drop(lines_in);

        let mut tail = VecDeque::with_capacity(TAIL_LINES);
        // Ends when both pipes are closed, so nothing the program wrote is lost. A grandchild that keeps them open would
        // hold this up; daemons are started with their output in a file for that reason.
        while let Some(line) = lines.recv().await {
            let written = format!("{line}\n");
            log.write_all(written.as_bytes()).await.map_err(StackError::io(format!("write {}", self.log.display())))?;
            watch.now(line.trim());
            if tail.len() == TAIL_LINES {
                tail.pop_front();
            }
            tail.push_back(line);
        }
        log.flush().await.map_err(StackError::io(format!("write {}", self.log.display())))?;
        let status = family.child.wait().await.map_err(StackError::io(doing))?;
        family.over = true;
        if status.success() {
            return Ok(());
        }
        let tail: Vec<String> = tail.into();
        Err(StackError::Command { command: shown, status: said(status), log: self.log, tail: tail.join("\n") })
    }

    fn shown(&self) -> String {
        let program = Path::new(&self.program).file_name().unwrap_or(&self.program);
        let words = std::iter::once(program).chain(self.args.iter().map(OsString::as_os_str));
        words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }
}

/// A program and everything below it: cargo runs a cargo that runs compilers, and ending the first alone leaves the others working.
struct Family {
    child: Child,
    over: bool,
}

impl Drop for Family {
    /// Waits for the end: whoever cleans up next must find nothing running.
    fn drop(&mut self) {
        let id = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let Some(group) = id.filter(|_| !self.over) else { return };
        // A group that is gone already is what is wanted.
        let _ = kill_process_group(group, Signal::TERM);
        let begun = Instant::now();
        while begun.elapsed() < LAST_WORDS {
            // Reaped, or it would count as there.
            let _ = self.child.try_wait();
            if test_kill_process_group(group).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = kill_process_group(group, Signal::KILL);
        let _ = self.child.try_wait();
    }
}

/// Variables that `cargo run` and `cargo test` set for the program they run. A cargo started by that program must not see them:
/// build scripts that look at them (ring's does) would run again, and everything above them would be built again, every time.
fn says_what_cargo_runs(variable: &str) -> bool {
    let prefixes =
        ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_", "CARGO_TARGET_TMPDIR"];
    prefixes.iter().any(|prefix| variable.starts_with(prefix)) || variable == "LD_LIBRARY_PATH"
}

/// Whether a quick check succeeds; its output is thrown away.
pub(crate) async fn succeeds(program: &str, args: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().await.is_ok_and(|status| status.success())
}

/// The last `lines` lines of a file; empty when there is none.
pub fn tail_of(file: &Path, lines: usize) -> String {
    let text = std::fs::read(file).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    last_lines(&text, lines).to_owned()
}

/// The last `lines` lines of `text`.
pub fn last_lines(text: &str, lines: usize) -> &str {
    let text = text.trim_end();
    let start = text.rmatch_indices('\n').nth(lines.saturating_sub(1)).map_or(0, |(at, _)| at + 1);
    text.get(start..).unwrap_or(text)
}

fn said(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("exit code {code}"),
        None => status.to_string(),
    }
}

async fn forward(pipe: impl AsyncRead + Unpin, lines: mpsc::Sender<String>) {
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    // Programs that draw a progress bar end their "lines" with a carriage return; only the last drawing counts.
    while matches!(reader.read_until(b'\n', &mut line).await, Ok(1..)) {
        let text = String::from_utf8_lossy(&line);
        let last = text.trim_end_matches(['\r', '\n']).rsplit('\r').next().unwrap_or_default().to_owned();
        if lines.send(last).await.is_err() {
            return;
        }
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Seen(Mutex<Vec<String>>);

    impl Watch for Seen {
        fn say(&self, _line: &str) {}
        fn now(&self, text: &str) {
            self.0.lock().unwrap().push(text.to_owned());
        }
    }

    #[tokio::test]
    async fn a_job_that_fails_tells_its_status_and_its_last_lines() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let seen = Seen::default();
        let error = Job::new("sh", log.clone())
            .args(["-c", "for i in $(seq 40); do echo line $i; done; echo why >&2; exit 3"])
            .run(&seen)
            .await
            .unwrap_err();
        let StackError::Command { status, tail, .. } = error else { panic!("{error}") };
        assert_eq!(status, "exit code 3");
        assert!(tail.contains("line 40") && tail.contains("why"), "{tail}");
        assert!(!tail.contains("line 5\n"), "{tail}");
        assert!(std::fs::read_to_string(log).unwrap().contains("line 5\n"));
        assert!(seen.0.lock().unwrap().contains(&"line 40".to_owned()));
    }

    #[tokio::test]
    async fn a_job_reads_nothing_from_our_input_and_only_the_last_drawing_of_a_progress_bar_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        Job::new("sh", log.clone()).args(["-c", "cat; printf '1%%\\r2%%\\n'"]).run(&Seen::default()).await.unwrap();
        assert_eq!(std::fs::read_to_string(log).unwrap(), "2%\n");
    }

    #[tokio::test]
    async fn a_job_that_is_given_up_takes_its_grandchildren_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let pids = folder.path().join("pids");
        // One that goes when asked to, and one that doesn't.
        let script = format!(
            "(trap '' TERM; echo >&2; while :; do sleep 1; done) & sleep 600 & echo $$ $! > {}; wait",
            pids.display()
        );
        let job = Job::new("sh", folder.path().join("log")).args(["-c", &script]);
        let started = async {
            loop {
                match std::fs::read_to_string(&pids) {
                    Ok(text) if text.ends_with('\n') => return text,
                    _ => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        let seen = Seen::default();
        let started = tokio::select! {
            outcome = job.run(&seen) => panic!("{outcome:?}"),
            started = started => started,
        };
        let group: i32 = started.split_whitespace().next().unwrap().parse().unwrap();
        let members = || {
            let stats = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
                let stat = std::fs::read_to_string(entry.unwrap().path().join("stat")).ok()?;
                let (_, rest) = stat.rsplit_once(')')?;
                let fields: Vec<&str> = rest.split_whitespace().collect();
                (fields[0] != "Z" && fields[2] == group.to_string()).then_some(stat)
            });
            stats.collect::<Vec<_>>()
        };
        let gone = async {
            while !members().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), gone).await.unwrap_or_else(|_| panic!("{:?}", members()));
    }

    #[test]
    fn a_cargo_within_a_cargo_keeps_its_settings_and_nothing_else() {
        for gone in ["CARGO_PKG_NAME", "CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "LD_LIBRARY_PATH"] {
            assert!(says_what_cargo_runs(gone), "{gone}");
        }
        for kept in ["CARGO_HOME", "CARGO_TARGET_DIR", "CARGO_TERM_COLOR", "CARGO", "CARGO_NET_OFFLINE", "PATH"] {
            assert!(!says_what_cargo_runs(kept), "{kept}");
        }
    }

    #[test]
    fn the_last_lines_are_whole_lines() {
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines("a\nb", 5), "a\nb");
        assert_eq!(last_lines("", 5), "");
    }
}
