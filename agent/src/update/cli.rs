//! `dtma-agent update …`: what a person types, and what the units run. Root's.

use std::io;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use dtma_api::update::{UpdateOutcome, UpdateResult};
use dtma_release::{KeysError, PublicKeys, Standing, Version};
use serde::{Deserialize, Serialize};

use super::course::{Course, CourseError};
use super::gate::Patience;
use super::host::Systemd;
use super::memory::Memory;
use super::places::{Places, remove_if_there};
use super::request;
use super::source::{HttpSource, Wanted};
use crate::config::{Settings, Updating};
use crate::store::durable;

/// The public keys this build trusts, as `cargo xtask release` compiles them in. A build without them takes no release.
const RELEASE_KEYS: &str = match option_env!("DTMA_RELEASE_KEYS") {
    Some(keys) => keys,
    None => "",
};

const UNIT: &str = "dtma-update.service";
/// Another run may be undoing something; a moment later it is gone.
const LOCK_PATIENCE: Duration = Duration::from_secs(20);

const HELP: &str = "\
Updates this droplet's agent. Tools keep running.

Usage: dtma-agent update --check [VERSION]            is there a newer release? Changes nothing
       dtma-agent update --apply [VERSION] [--again]  go to it, or to VERSION; keep it only if it proves itself.
                                                      --again: even if it has failed here before
       dtma-agent update --rollback                   go back to the version before
       dtma-agent update --status                     what the updater does and remembers, as JSON

Ends with 0 when what was asked for is so, else with 1.
The units use --run (whatever was asked for) and --undo (a trial nobody judges any more).";

/// `sysexits.h`: try again later.
const BUSY: u8 = 75;
const USAGE: u8 = 2;

/// What a person wants of the updater's unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    Apply { version: Option<Version>, again: bool },
    RollBack,
}

#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Check(Option<Version>),
    Order(Order),
    Status,
    Run,
    Undo,
}

/// Does what the words after `update` say.
pub fn main(words: &[String]) -> ExitCode {
    let asked = match parse(words) {
        Ok(asked) => asked,
        Err(problem) => {
            eprintln!("{problem}\n\n{HELP}");
            return ExitCode::from(USAGE);
        }
    };
    let places = Places::default();
    let done = match asked {
        Asked::Check(version) => check(&places, version),
        Asked::Order(order) => give(&places, &order),
        Asked::Status => status(&places),
        Asked::Run => run(&places),
        Asked::Undo => undo(&places),
    };
    done.unwrap_or_else(|error| {
        eprintln!("dtma-agent update: {}", crate::causes::line_by_line(error.as_ref()));
        ExitCode::FAILURE
    })
}

fn parse(words: &[String]) -> Result<Asked, String> {
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let version =
        |word: &str| Version::parse(word).map_err(|error| format!("'{word}' is not a version such as 1.2.3: {error}"));
    Ok(match words.as_slice() {
        ["--check"] => Asked::Check(None),
        ["--check", word] => Asked::Check(Some(version(word)?)),
        ["--apply"] => Asked::Order(Order::Apply { version: None, again: false }),
        ["--apply", "--again"] => Asked::Order(Order::Apply { version: None, again: true }),
        ["--apply", word] => Asked::Order(Order::Apply { version: Some(version(word)?), again: false }),
        ["--apply", word, "--again"] | ["--apply", "--again", word] => {
            Asked::Order(Order::Apply { version: Some(version(word)?), again: true })
        }
        ["--rollback"] => Asked::Order(Order::RollBack),
        ["--status"] => Asked::Status,
        ["--run"] => Asked::Run,
        ["--undo"] => Asked::Undo,
        _ => return Err("that is not one of these:".to_owned()),
    })
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// Hands what a course needs to `work`.
fn with_course<T>(places: &Places, updating: &Updating, work: impl FnOnce(&Course<'_>) -> T) -> T {
    // Only fails when a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let keys: Result<PublicKeys, KeysError> = PublicKeys::parse(RELEASE_KEYS);
    let course = Course {
        places,
        source: &HttpSource { base_url: updating.releases_url.clone() },
        host: &Systemd::new(),
        keys: &keys,
        target: crate::TARGET,
        channel: updating.channel,
        patience: Patience { ready: updating.ready, soak: updating.soak, ..Patience::default() },
    };
    work(&course)
}

fn check(places: &Places, version: Option<Version>) -> Result<ExitCode, Failed> {
    let updating = Settings::updating_of_process()?;
    let wanted = version.map_or(Wanted::Newest(updating.channel), Wanted::Version);
    let (good, manifest, standing) = with_course(places, &updating, |course| course.check(&wanted))?;
    match standing {
        Standing::Newer => println!(
            "version {} can be installed ({}, issued {}); {good} is in use",
            manifest.version, manifest.channel, manifest.issued_at
        ),
        Standing::HasBeenTaken => println!("nothing newer than {}; {good} is in use", manifest.version),
    }
    Ok(ExitCode::SUCCESS)
}

fn status(places: &Places) -> Result<ExitCode, Failed> {
    let memory = match std::fs::read(places.memory_file()) {
        Ok(bytes) => serde_json::from_slice::<Memory>(&bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Memory::default(),
        Err(error) => return Err(error.into()),
    };
    println!("{}", serde_json::to_string_pretty(&memory.shown)?);
    Ok(ExitCode::SUCCESS)
}

/// Has the unit do it: a terminal that goes away must not end an update in the middle.
fn give(places: &Places, order: &Order) -> Result<ExitCode, Failed> {
    let before = shown_last(places);
    std::fs::create_dir_all(&places.memory)?;
    durable::replace(&places.order_file(), &serde_json::to_vec(order)?).map_err(|error| {
        format!("the order can't be written to {}: {error}; this needs root", places.memory.display())
    })?;
    eprintln!("this takes some minutes, of which the tools notice none; it goes on if you leave");
    // As often as another order may have been before ours.
    for _ in 0..3 {
        let started = Command::new("systemctl").args(["start", UNIT]).status();
        if !started.as_ref().is_ok_and(std::process::ExitStatus::success) {
            remove_if_there(&places.order_file())?;
            return Err(format!("{UNIT} did not end well; see: journalctl --unit {UNIT}").into());
        }
        if !places.order_file().exists() {
            break;
        }
    }
    let last = shown_last(places).filter(|last| Some(last) != before.as_ref());
    let Some(last) = last else { return Err(format!("nothing was done; see: journalctl --unit {UNIT}").into()) };
    println!("{}", sentence(&last));
    Ok(match last.outcome {
        UpdateOutcome::Updated | UpdateOutcome::UpToDate | UpdateOutcome::RolledBack => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn shown_last(places: &Places) -> Option<UpdateResult> {
    let bytes = std::fs::read(places.memory_file()).ok()?;
    serde_json::from_slice::<Memory>(&bytes).ok()?.shown.last
}

fn sentence(result: &UpdateResult) -> String {
    let to = result.to_version.as_deref().unwrap_or("the newest release");
    let why = match (&result.code, &result.reason) {
        (Some(code), Some(reason)) => format!(": {reason} ({code})"),
        _ => String::new(),
    };
    let from = &result.from_version;
    match result.outcome {
        UpdateOutcome::Updated => format!("version {to} is in use; {from} was before"),
        UpdateOutcome::UpToDate => format!("nothing to do: {from} is in use"),
        UpdateOutcome::Refused => format!("version {to} was refused{why}; {from} is in use"),
        UpdateOutcome::Failed => format!("version {to} could not be tried{why}; {from} is in use"),
        UpdateOutcome::Reverted => format!("version {to} did not prove itself{why}; {from} is in use again"),
        UpdateOutcome::RolledBack => format!("version {to} is in use again; {from} isn't gone to again by itself"),
        UpdateOutcome::Unknown => format!("a newer version of the updater knows how it ended{why}"),
    }
}

/// What was asked for. One thing each time, so that it has all the time there is; the path unit starts another run for what is left.
fn run(places: &Places) -> Result<ExitCode, Failed> {
    log();
    let Some(_lock) = wait_for_lock(places)? else {
        eprintln!("another update is under way");
        return Ok(ExitCode::from(BUSY));
    };
    // First of all: as long as a request lies there this is started again and again, whatever becomes of it.
    let order = take(places);
    // A wrong setting must not keep a trial from being undone.
    let settings = Settings::updating_of_process();
    let updating = settings.as_ref().map_or_else(|_| Updating::default(), Clone::clone);
    let done: Result<(), CourseError> = with_course(places, &updating, |course| {
        course.recover()?;
        let ended = match (order?, &settings) {
            (Some(_), Err(error)) => course.fail("settings", error)?,
            (Some(order), Ok(_)) => carry_out(course, &order)?,
            (None, Ok(updating)) if updating.automatic => {
                carry_out(course, &Order::Apply { version: None, again: false })?
            }
            (None, _) => return Ok(()),
        };
        tracing::info!("{}", sentence(&ended));
        Ok(())
    });
    done?;
    settings?;
    Ok(ExitCode::SUCCESS)
}

fn carry_out(course: &Course<'_>, order: &Order) -> Result<UpdateResult, CourseError> {
    match order {
        Order::Apply { version, again } => {
            let wanted = version.clone().map_or(Wanted::Newest(course.channel), Wanted::Version);
            course.apply(&wanted, *again)
        }
        Order::RollBack => course.roll_back(),
    }
}

/// The next thing to do: a person's order first, then the agent's request. Whatever it is, it is gone from where it lay.
fn take(places: &Places) -> io::Result<Option<Order>> {
    let order = places.order_file();
    match std::fs::read(&order) {
        Ok(bytes) => {
            std::fs::remove_file(&order)?;
            match serde_json::from_slice(&bytes) {
                Ok(order) => return Ok(Some(order)),
                Err(error) => tracing::error!(%error, "an order is not understood"),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    match request::take(&places.request_file()) {
        Ok(request) => Ok(request.map(|request| Order::Apply { version: request.version, again: false })),
        Err(error) => {
            tracing::error!(%error, "the agent's request is not understood");
            Ok(None)
        }
    }
}

/// Undoes a trial that has no judge any more.
fn undo(places: &Places) -> Result<ExitCode, Failed> {
    log();
    let Some(_lock) = wait_for_lock(places)? else {
        // Whoever has it may judge, or may be an installer that fails: it is looked at again when it has ended.
        eprintln!("an updater or installer is at work");
        return Ok(ExitCode::from(BUSY));
    };
    match with_course(places, &Updating::default(), |course| course.recover()) {
        Ok(None) => {}
        Ok(Some(ended)) => tracing::warn!("{}", sentence(&ended)),
        // Nothing to undo where nothing was installed by this version's rules.
        Err(CourseError::NotInstalled(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(ExitCode::SUCCESS)
}

fn wait_for_lock(places: &Places) -> io::Result<Option<super::places::Lock>> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        if let Some(lock) = places.lock()? {
            return Ok(Some(lock));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// To the journal, which adds the time.
fn log() {
    let _ =
        tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false).without_time().with_target(false).try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn words_mean_what_they_say_or_are_refused() {
        assert_eq!(parse(&words("--check")), Ok(Asked::Check(None)));
        assert_eq!(parse(&words("--check 1.2.3")), Ok(Asked::Check(Some(Version::new(1, 2, 3)))));
        let apply = |version, again| Ok(Asked::Order(Order::Apply { version, again }));
        assert_eq!(parse(&words("--apply")), apply(None, false));
        assert_eq!(parse(&words("--apply 1.2.3 --again")), apply(Some(Version::new(1, 2, 3)), true));
        assert_eq!(parse(&words("--rollback")), Ok(Asked::Order(Order::RollBack)));
        for wrong in ["", "--apply latest", "--check 1.2.3 4", "apply", "--rollback now", "--apply ../../x"] {
            assert!(parse(&words(wrong)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_order_goes_before_a_request_and_each_is_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let places =
            Places { memory: folder.path().to_owned(), agent_state: folder.path().to_owned(), ..Places::default() };
        std::fs::write(places.request_file(), r#"{"version": "1.0.1"}"#).unwrap();
        std::fs::write(places.order_file(), serde_json::to_vec(&Order::RollBack).unwrap()).unwrap();
        assert_eq!(take(&places).unwrap(), Some(Order::RollBack));
        assert_eq!(take(&places).unwrap(), Some(Order::Apply { version: Some(Version::new(1, 0, 1)), again: false }));
        assert_eq!(take(&places).unwrap(), None);
        std::fs::write(places.order_file(), "{").unwrap();
        assert_eq!(take(&places).unwrap(), None);
        assert!(!places.order_file().exists());
    }
}
