//! `dtma-agent`: reads the settings, wires the parts together, and ends in order. Decides nothing else.

mod kept_socket;
mod vital_signs;
mod watchdog;

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use dtma_agent::backend::{Link, Patience, Reporting};
use dtma_agent::config::{Settings, Tls};
use dtma_agent::disks::Disks;
use dtma_agent::engine::docker::DockerEngine;
use dtma_agent::http::callers::Callers;
use dtma_agent::http::frame::{Answered, Gate};
use dtma_agent::http::server::{Server, ServerState};
use dtma_agent::http::{self, App, tls};
use dtma_agent::mcp::{Bridges, McpProber, Proxy};
use dtma_agent::reconcile::{self, Instances, Secrets, Sessions, Timing};
use dtma_agent::store::StateDir;
use dtma_agent::store::identity::Identity;
use dtma_agent::store::ledger::Ledger;
use dtma_agent::store::vault::Vault;
use dtma_agent::update::{self, Places, Updates};
use dtma_agent::{TARGET, logs, system, version};
use dtma_api::heartbeat::Heartbeat;
use jiff::Timestamp;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::vital_signs::VitalSigns;

/// What `sysexits.h` calls a configuration error; systemd's unit can tell it from a crash.
const EXIT_SETTINGS: u8 = 78;
/// How long the loop may take to let go of what it does.
const LOOP_END: Duration = Duration::from_secs(5);

const HELP: &str = "\
Runs MCP server containers on one droplet and gives each an authenticated endpoint.

Usage: dtma-agent [--version | --help]
       dtma-agent update …     (see: dtma-agent update --help)

Takes no other arguments: its settings are environment variables, described in
the example /etc/dtma.conf. It runs in the foreground until SIGTERM or SIGINT.";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    match arguments.as_slice() {
        [] => {}
        [update, words @ ..] if update == "update" => return update::cli::main(words),
        [one] if one == "--version" => {
            println!("dtma-agent {} ({TARGET})", version());
            return ExitCode::SUCCESS;
        }
        [one] if one == "--help" || one == "-h" => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{HELP}");
            return ExitCode::from(2);
        }
    }
    let settings = match Settings::from_environment() {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("dtma-agent: {error}");
            return ExitCode::from(EXIT_SETTINGS);
        }
    };
    match start(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dtma-agent: {}", dtma_agent::causes::line_by_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn start(settings: Settings) -> Result<(), Box<dyn Error + Send + Sync>> {
    let logs = logs::start(&settings.log_filter)?;
    std::panic::set_hook(Box::new(|panic| {
        // Where, but not what: the message may hold anything.
        let at = panic.location().map(ToString::to_string);
        tracing::error!(at, "THE AGENT PANICKED; this is a bug");
    }));
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        return Err("another crypto provider is installed already".into());
    }
    // Two threads carry any load this agent is meant for, and each costs memory.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8)
        .thread_keep_alive(Duration::from_secs(2))
        .enable_all()
        .build()?;
    let ended = runtime.block_on(run(settings, logs));
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

async fn run(settings: Settings, logs: logs::LogRing) -> Result<(), Box<dyn Error + Send + Sync>> {
    let started_at = Timestamp::now();
    let shutdown = CancellationToken::new();
    let signals = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);

    let state = StateDir::open(&settings.state_dir)?;
    let identity = Identity::load_or_make(&state)?;
    let pin = identity.pin();
    let acceptor = match settings.tls {
        Tls::SelfSigned => Some(tls::acceptor(&identity)?),
        Tls::Off => None,
    };
    let callers = Arc::new(Callers::new(settings.caller_keys.clone()));
    let link = Link::new(settings.backend, identity, &settings.caller_keys, &callers, Patience::default())?;
    let disks = Arc::new(Disks::new(state.path(), settings.disk_reserve));
    let system = system::start(Arc::clone(&disks));

    let vault = Vault::new(&settings.secrets_dir, &settings.scope, settings.secrets_on_disk);
    let engine = DockerEngine::connect(settings.docker_host.as_deref())?.scoped(&settings.scope);
    let engine = Arc::new(engine.with_secrets_in(vault.clone()));
    let sessions = Sessions::default();
    let bridges = Bridges::new(Arc::clone(&engine) as _, sessions.clone(), shutdown.clone());
    let (instances, mut reconciling) = reconcile::start(reconcile::Parts {
        engine,
        ledger: Ledger::open(state.path(), started_at)?,
        prober: Arc::new(McpProber::new(bridges.clone())),
        disks,
        secrets: Secrets { vault, source: Arc::new(link.secrets()) },
        sessions,
        timing: Timing { image_max_age: settings.image_max_age, ..Timing::default() },
        shutdown: shutdown.clone(),
    });

    let updates = Updates::new(&Places::default());
    let mut vital_signs = VitalSigns::new(instances.clone(), link.state(), settings.port, link.reports());
    let server_state = ServerState::default();
    let app = App::new(http::Parts {
        instances: instances.clone(),
        gate: Arc::new(Gate {
            callers: Arc::clone(&callers),
            public_status: settings.public_status,
            answered: Answered::default(),
        }),
        logs,
        system: system.clone(),
        link: link.state(),
        updates: updates.clone(),
        server: server_state.clone(),
        proxy: Proxy::new(shutdown.clone()),
        bridges,
        shutdown: shutdown.clone(),
        has_api_base_url: link.reports(),
        port: settings.port,
        started_at,
    });
    let listener = kept_socket::listen(settings.port)
        .map_err(|error| format!("port {} could not be had: {error}; set PORT to a free one", settings.port))?;
    let server = Server::on(listener, acceptor, settings.plaintext, http::router(&app), server_state.clone());
    tracing::info!(version = version(), port = settings.port, %pin, "listening");

    let reporting = Reporting {
        report: heartbeats(instances.clone(), system, updates.clone(), started_at),
        updates: updates.clone(),
        events: instances.events(),
        callers,
        own_keys: settings.caller_keys,
    };
    let reporting = tokio::spawn(link.run(reporting));
    let watching = tokio::spawn(watchdog::run(instances, server_state));
    let noticing = tokio::spawn(updates.watch());
    let serving = tokio::spawn(server.run(shutdown.clone()));
    tell_systemd(&[NotifyState::Ready]);

    let loop_ended = tokio::select! {
        () = asked_to_end(signals, &shutdown) => false,
        _ = &mut reconciling => true,
        () = vital_signs.run() => false,
    };
    // Told to end, the loop may be the first to do so.
    let failed = loop_ended && !shutdown.is_cancelled();
    tell_systemd(&[NotifyState::Stopping]);
    shutdown.cancel();
    // What is under way may finish; nobody is told any more how it went.
    reporting.abort();
    watching.abort();
    noticing.abort();
    if serving.await.is_err() {
        return Err("the listener ended unexpectedly; the log says why".into());
    }
    if failed {
        return Err("the loop that looks after instances ended unexpectedly; the log says why".into());
    }
    if !loop_ended && timeout(LOOP_END, reconciling).await.is_err() {
        tracing::warn!("the loop is still at work; ending anyway, it goes on from the ledger next time");
    }
    vital_signs.end();
    tracing::info!("ended in order");
    drop(state);
    Ok(())
}

async fn asked_to_end(signals: (Signal, Signal), shutdown: &CancellationToken) {
    let (mut terminate, mut interrupt) = signals;
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: ending"),
        _ = interrupt.recv() => tracing::info!("SIGINT: ending"),
        () = shutdown.cancelled() => {}
    }
}

/// Puts a heartbeat together from what is published; costs nothing.
fn heartbeats(
    instances: Instances,
    system: watch::Receiver<system::Sample>,
    updates: Updates,
    started_at: Timestamp,
) -> Box<dyn Fn(Option<u64>) -> Heartbeat + Send + Sync> {
    Box::new(move |settings_generation| Heartbeat {
        dtma_version: version().to_owned(),
        system_status: system.borrow().metrics.clone(),
        tool_statuses: instances.tool_statuses(),
        sent_at: Some(Timestamp::now()),
        agent_started_at: Some(started_at),
        docker_reachable: Some(instances.engine_status().reachable),
        settings_generation,
        update: updates.state(),
    })
}

/// Does nothing where systemd doesn't listen.
fn tell_systemd(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd could not be told");
    }
}
