//! What the updater asks of the droplet: systemd, the programs it has fetched, the clock.

use std::io::{self, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::gate::Unit;

const AGENT: &str = "dtma-agent.service";
const GUARD: &str = "dtma-metadata-guard.service";
/// The account a program is tried as before it is trusted with anything.
const ACCOUNT: &str = "nobody";
/// What a version brings besides the agent, and isn't on trial.
const OTHERS: [&str; 5] =
    ["dtma-update.service", "dtma-update-undo.service", "dtma-update.path", "dtma-update.timer", GUARD];
/// A program says its version at once.
const INTRODUCTION: Duration = if cfg!(test) { Duration::from_secs(2) } else { Duration::from_secs(10) };
/// Its port answers at once, too.
const HEALTH: Duration = Duration::from_secs(2);
/// Of the new version's last words, as many bytes are worth keeping.
const LAST_WORDS: usize = 1500;

/// What was asked of the droplet and didn't work.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub(super) struct HostError {
    what: String,
    #[source]
    source: Option<io::Error>,
}

#[cfg(test)]
impl HostError {
    pub(super) fn refused() -> Self {
        Self { what: "refused".to_owned(), source: None }
    }
}

/// Why a program doesn't say what it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unrunnable {
    /// It is for other machines.
    #[error("it is built for another machine ({0})")]
    Foreign(String),
    /// It doesn't run, or not well.
    #[error("{0}")]
    Broken(String),
}

/// The droplet as the updater needs it.
pub(super) trait Host {
    /// The agent's unit as systemd has it.
    fn unit(&self) -> Result<Unit, HostError>;
    /// systemd reads the units again: links may lead elsewhere now.
    fn reload(&self) -> Result<(), HostError>;
    /// Has the agent started anew; doesn't wait for it.
    fn restart(&self) -> Result<(), HostError>;
    /// The droplet is going down, or systemd can't even be asked: nothing it refuses now is anybody's fault.
    fn is_going_down(&self) -> bool;
    /// Which of the units beside the agent's systemd can't load.
    fn missing_units(&self) -> Result<Vec<String>, HostError>;
    /// The metadata guard does its work again, by the script that is good now.
    fn renew_guard(&self) -> Result<(), HostError>;
    /// Whether the agent's port answers.
    fn serving(&self, port: u16) -> bool;
    /// What a program says to `--version`, run as nobody who matters; or why it can't be run.
    fn introduce(&self, program: &Path) -> Result<String, Unrunnable>;
    /// The end of the agent's log.
    fn last_words(&self) -> String;
    /// Bytes free where a path lies.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
    /// The time.
    fn now(&self) -> Timestamp;
    /// Time since some moment of this run.
    fn elapsed(&self) -> Duration;
    /// Lets some time pass.
    fn pause(&self, time: Duration);
}

/// A droplet under systemd.
#[derive(Debug)]
pub(super) struct Systemd {
    began: Instant,
    health: Option<reqwest::blocking::Client>,
}

impl Systemd {
    pub(super) fn new() -> Self {
        let health = reqwest::blocking::Client::builder()
            .timeout(HEALTH)
            // It is asked on loopback whether it answers, nothing else.
            .danger_accept_invalid_certs(true)
            .no_proxy()
            .build();
        if let Err(error) = &health {
            tracing::warn!(%error, "no HTTP client could be made to ask the agent");
        }
        Self { began: Instant::now(), health: health.ok() }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<String, HostError> {
    let command = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| HostError { what: format!("`{}` can't be run", command()), source: Some(source) })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(HostError { what: format!("`{}` failed ({}): {}", command(), output.status, said.trim()), source: None })
}

impl Host for Systemd {
    fn unit(&self) -> Result<Unit, HostError> {
        let shown = run("systemctl", &["show", "--property=ActiveState,MainPID,NRestarts", AGENT])?;
        let value = |name: &str| {
            shown.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default().to_owned()
        };
        let state = value("ActiveState");
        Ok(Unit {
            active: state == "active",
            failed: state == "failed",
            stopped: state == "inactive",
            main_pid: value("MainPID").parse().unwrap_or_default(),
            restarts: value("NRestarts").parse().unwrap_or_default(),
        })
    }

    fn reload(&self) -> Result<(), HostError> {
        run("systemctl", &["daemon-reload"]).map(drop)
    }

    fn restart(&self) -> Result<(), HostError> {
        // At boot this is asked before the agent may start: waiting for it would be waiting for ourselves.
        run("systemctl", &["--no-block", "restart", AGENT]).map(drop)
    }

    fn is_going_down(&self) -> bool {
        // Its exit code says whether all is well, which isn't the question.
        let state = Command::new("systemctl").arg("is-system-running").stdin(Stdio::null()).output();
        let state = state.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
        matches!(state.as_str(), "" | "stopping" | "offline" | "unknown")
    }

    fn missing_units(&self) -> Result<Vec<String>, HostError> {
        let mut missing = Vec::new();
        for unit in OTHERS {
            if run("systemctl", &["show", "--property=LoadState", unit])?.trim() != "LoadState=loaded" {
                missing.push(unit.to_owned());
            }
        }
        Ok(missing)
    }

    fn renew_guard(&self) -> Result<(), HostError> {
        run("systemctl", &["--no-block", "try-reload-or-restart", GUARD]).map(drop)
    }

    fn serving(&self, port: u16) -> bool {
        let Some(client) = &self.health else { return false };
        ["https", "http"].iter().any(|scheme| {
            let answer = client.get(format!("{scheme}://127.0.0.1:{port}/health")).send();
            answer.is_ok_and(|answer| answer.status().is_success())
        })
    }

    fn introduce(&self, program: &Path) -> Result<String, Unrunnable> {
        let account = account(ACCOUNT).map_err(Unrunnable::Broken)?;
        introduce(program, Some(account))
    }

    fn last_words(&self) -> String {
        let arguments = ["--unit", AGENT, "--lines", "8", "--output", "cat", "--no-pager", "--quiet"];
        let said = run("journalctl", &arguments).unwrap_or_default();
        let said: String = said.chars().filter(|c| *c == '\n' || !c.is_control()).collect();
        let from = said.len().saturating_sub(LAST_WORDS);
        let from = (from..said.len()).find(|at| said.is_char_boundary(*at)).unwrap_or(said.len());
        said.get(from..).unwrap_or_default().trim().to_owned()
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    fn pause(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// User and group of an account of this machine.
fn account(name: &str) -> Result<(u32, u32), String> {
    let accounts =
        std::fs::read_to_string("/etc/passwd").map_err(|error| format!("/etc/passwd can't be read: {error}"))?;
    let ids = accounts.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then_some(())?;
        Some((fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?))
    });
    ids.ok_or_else(|| format!("there is no account {name}"))
}

/// Runs `program --version` for a moment.
fn introduce(program: &Path, account: Option<(u32, u32)>) -> Result<String, Unrunnable> {
    let broken = |error: &dyn std::fmt::Display| Unrunnable::Broken(error.to_string());
    if let Some(machine) = foreign_machine(program).map_err(|error| broken(&error))? {
        return Err(Unrunnable::Foreign(machine));
    }
    let mut command = Command::new(program);
    command
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir("/");
    if let Some((uid, gid)) = account {
        command.uid(uid).gid(gid);
    }
    let mut child = command.spawn().map_err(|error| broken(&error))?;
    let output = child.stdout.take();
    let (sender, said) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut said = Vec::new();
        // What follows isn't read, and its writer ends by that.
        let read = output.map(|output| output.take(1024).read_to_end(&mut said)).transpose().map(|_| said);
        // Nobody listens any more when that took too long.
        let _ = sender.send(read);
    });
    let deadline = Instant::now() + INTRODUCTION;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Ok(None) | Err(_) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Unrunnable::Broken(format!(
                    "it had not said its version after {} s",
                    INTRODUCTION.as_secs()
                )));
            }
        }
    };
    if !status.success() {
        return Err(Unrunnable::Broken(format!("asked for its version it ended with {status}")));
    }
    // Somebody it has started may hold its output open.
    let left = deadline.saturating_duration_since(Instant::now());
    let said = said.recv_timeout(left).map_err(|_| broken(&"its output did not end"))?;
    Ok(String::from_utf8_lossy(&said.map_err(|error| broken(&error))?).into_owned())
}

/// The machine an ELF program is for, where it isn't this one. Anything else is left to the kernel.
fn foreign_machine(program: &Path) -> io::Result<Option<String>> {
    let mut head = [0; 20];
    let mut file = std::fs::File::open(program)?;
    if file.read_exact(&mut head).is_err() {
        return Ok(None);
    }
    // e_ident, then e_type and e_machine; 62 is x86-64.
    match head {
        [0x7f, b'E', b'L', b'F', 2, 1, .., 62, 0] if cfg!(target_arch = "x86_64") => Ok(None),
        [0x7f, b'E', b'L', b'F', class, order, .., low, high] => {
            Ok(Some(format!("ELF class {class}, byte order {order}, machine {}", u16::from_le_bytes([low, high]))))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn script(text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        (folder, path)
    }

    #[test]
    fn a_program_says_what_it_is_or_why_not() {
        let (_folder, path) = script("#!/bin/sh\necho \"dtma-agent 1.2.3 ($#,$1,$HOME)\"");
        assert_eq!(introduce(&path, None).unwrap().trim(), "dtma-agent 1.2.3 (1,--version,)");
        let (_folder, path) = script("#!/bin/sh\nexit 3");
        assert!(introduce(&path, None).unwrap_err().to_string().contains("exit status: 3"));
        let (_folder, path) = script("#!/bin/sh\nexec yes");
        assert!(introduce(&path, None).is_err());
        let (_folder, path) = script("#!/bin/sh\nsleep 1000 &\necho \"dtma-agent 1.2.3\"; exit 0");
        assert!(introduce(&path, None).unwrap_err().to_string().contains("did not end"));
        let (_folder, path) = script("not a program at all");
        assert!(introduce(&path, None).is_err());
    }

    #[test]
    fn a_program_of_another_machine_is_told_by_its_head() {
        let aarch64 = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\xb7\0 and so on";
        let (_folder, path) = script("");
        std::fs::write(&path, aarch64).unwrap();
        let error = introduce(&path, None).unwrap_err();
        assert!(matches!(&error, Unrunnable::Foreign(machine) if machine.ends_with("machine 183")), "{error}");
        let this = std::env::current_exe().unwrap();
        assert_eq!(foreign_machine(&this).unwrap(), None);
    }
}
