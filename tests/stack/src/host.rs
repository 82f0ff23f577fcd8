//! Making a machine ready: from a Debian or Ubuntu with Rust and root to one with everything the rest needs. Finds out what
//! is missing, installs just that by package name, and starts a Docker Engine where none answers. Touches no service that
//! was there before.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::command::{Job, succeeds, tail_of};
use crate::docker::Engine;
use crate::error::{Result, StackError};
use crate::watch::Watch;
use crate::workspace::Workspace;

const DOCKER_DEADLINE: Duration = Duration::from_secs(60);

/// Something the host must have, how to see that it has, and Debian's package with it.
struct Need {
    package: &'static str,
    present: Present,
}

enum Present {
    /// A program in one of the usual folders.
    Program(&'static str),
    /// A file.
    File(&'static str),
    /// A Python module that can be imported by `python3`.
    Module(&'static str),
}

const NEEDS: [Need; 13] = [
    Need { package: "docker.io", present: Present::Program("dockerd") },
    Need { package: "iptables", present: Present::Program("iptables") },
    Need { package: "mmdebstrap", present: Present::Program("mmdebstrap") },
    // What tells mmdebstrap whether a keyring is trusted already.
    Need { package: "gpg", present: Present::Program("gpg") },
    // Sets the units of a droplet's image; a machine that is itself a container may have none.
    Need { package: "systemd", present: Present::Program("systemctl") },
    Need { package: "docker-registry", present: Present::Program("docker-registry") },
    Need { package: "gcc", present: Present::Program("cc") },
    Need { package: "ca-certificates", present: Present::File("/etc/ssl/certs/ca-certificates.crt") },
    // On Ubuntu, what lets mmdebstrap check Debian's signatures.
    Need {
        package: "debian-archive-keyring",
        present: Present::File("/usr/share/keyrings/debian-archive-keyring.gpg"),
    },
    Need { package: "python3", present: Present::Program("python3") },
    Need { package: "python3-pip", present: Present::Module("pip") },
    Need { package: "python3-venv", present: Present::Module("ensurepip") },
    Need { package: "shellcheck", present: Present::Program("shellcheck") },
];

/// Since Debian 13 a package of its own; before that it came with `docker.io`, and there is no package of this name.
const COMMAND_LINE: [Need; 1] = [Need { package: "docker-cli", present: Present::Program("docker") }];

/// Makes sure this machine has what a stack needs. A tenth of a second when it has.
///
/// # Errors
/// When it isn't run as root, when a package can't be had, or when no Docker Engine comes up.
pub async fn set_up(workspace: &Workspace, watch: &dyn Watch) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(StackError::NotRoot);
    }
    install_missing(&NEEDS, workspace, watch).await?;
    install_missing(&COMMAND_LINE, workspace, watch).await?;
    allow_watches(watch);
    docker_answers(workspace, watch).await
}

/// Each droplet's systemd watches files by some ten inotify instances, and all droplets here share what one user may have.
const WATCHES: (&str, u32) = ("/proc/sys/fs/inotify/max_user_instances", 1024);

/// Without it a dozen droplets can be up at once, so it is no error when this machine's kernel won't have it.
fn allow_watches(watch: &dyn Watch) {
    let (path, enough) = WATCHES;
    let now = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u32>().ok());
    if now.is_none_or(|now| now >= enough) {
        return;
    }
    match std::fs::write(path, enough.to_string()) {
        Ok(()) => watch.say(&format!("{path} is {enough} now, so that many droplets can be up at once")),
        Err(error) => {
            watch.say(&format!("{path} can't be raised to {enough} ({error}); a dozen droplets can be up at once"))
        }
    }
}

/// Makes sure this machine has `wrk`, which only benchmarks need.
///
/// # Errors
/// When it isn't there and can't be installed.
pub async fn set_up_load(workspace: &Workspace, watch: &dyn Watch) -> Result<()> {
    install_missing(&[Need { package: "wrk", present: Present::Program("wrk") }], workspace, watch).await
}

async fn install_missing(needs: &[Need], workspace: &Workspace, watch: &dyn Watch) -> Result<()> {
    let missing = missing(needs).await;
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    if program("apt-get").is_none() {
        return Err(StackError::NoApt { missing: names(&missing), packages: packages.join(" ") });
    }
    watch.say(&format!("installing {}", packages.join(", ")));
    // A foreign source that can't be reached makes this fail and takes nothing from us; what counts is the install.
    if let Err(error) = apt(workspace, "apt-update.log", &["update"]).run(watch).await {
        watch.say(&format!("apt-get update had trouble, going on: {error}"));
    }
    let mut args = vec!["install", "--yes", "--no-install-recommends"];
    args.extend(&packages);
    apt(workspace, "apt-install.log", &args).run(watch).await?;
    let still = self::missing(needs).await;
    if still.is_empty() {
        return Ok(());
    }
    Err(StackError::StillMissing { missing: names(&still), packages: packages.join(" ") })
}

fn apt(workspace: &Workspace, log: &str, args: &[&str]) -> Job {
    let log = workspace.local_file(log).unwrap_or_else(|_| PathBuf::from("/dev/null"));
    Job::new("apt-get", log)
        .args(["-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3", "--quiet"])
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
}

async fn missing(needs: &[Need]) -> Vec<&Need> {
    let checks = needs.iter().map(|need| async move {
        let here = match need.present {
            Present::Program(name) => program(name).is_some(),
            Present::File(path) => Path::new(path).exists(),
            Present::Module(name) => succeeds("python3", &["-c", &format!("import {name}")]).await,
        };
        (!here).then_some(need)
    });
    futures_util::future::join_all(checks).await.into_iter().flatten().collect()
}

fn names(needs: &[&Need]) -> String {
    let names = needs.iter().map(|need| match need.present {
        Present::Program(name) => name.to_owned(),
        Present::File(path) => path.to_owned(),
        Present::Module(name) => format!("Python's {name}"),
    });
    names.collect::<Vec<_>>().join(", ")
}

/// Where a program lies: `PATH`, and the folders for root's programs that some shells leave out of it.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}

async fn docker_answers(workspace: &Workspace, watch: &dyn Watch) -> Result<()> {
    if Engine::connect().await.is_ok() {
        return Ok(());
    }
    let log = workspace.local_file("dockerd.log")?;
    if Path::new("/run/systemd/system").exists() {
        watch.say("starting Docker (systemctl start docker)");
        let job = Job::new("systemctl", workspace.local_file("systemctl.log")?).args(["start", "docker"]);
        job.run(watch).await?;
    } else {
        watch.say(&format!("starting Docker (dockerd; its log: {})", log.display()));
        spawn_dockerd(&log)?;
    }
    let begun = Instant::now();
    loop {
        let Err(error) = Engine::connect().await else { return Ok(()) };
        if begun.elapsed() > DOCKER_DEADLINE {
            let (what, last) = ("the Docker Engine".to_owned(), error.to_string());
            return Err(StackError::NotReady { what, waited: begun.elapsed(), last, tail: tail_of(&log, 20), log });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Outlives this process on purpose: the engine is the machine's, like one that systemd starts.
fn spawn_dockerd(log: &Path) -> Result<()> {
    let out = std::fs::File::create(log).map_err(StackError::io(format!("write {}", log.display())))?;
    let err = out.try_clone().map_err(StackError::io(format!("write {}", log.display())))?;
    let dockerd = program("dockerd").unwrap_or_else(|| PathBuf::from("dockerd"));
    let mut command = tokio::process::Command::new(dockerd);
    command.process_group(0).stdin(Stdio::null()).stdout(out).stderr(err);
    command.spawn().map(drop).map_err(StackError::io("start dockerd"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_where_they_are_and_nowhere_else() {
        assert!(program("sh").is_some());
        assert_eq!(program("no-such-program-anywhere"), None);
    }
}
