//! `dtma-provisioner`: reads its settings, wires the parts, serves until told to end. `dtma-provisioner rollout …` steers one that runs.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser as _;
use dtma_api::enrolment::AgentSettings;
use dtma_provisioner::accounts::Accounts;
use dtma_provisioner::board::Board;
use dtma_provisioner::cloud::digitalocean::DigitalOcean;
use dtma_provisioner::config::{OperatorSettings, Settings};
use dtma_provisioner::heartbeats::Heartbeats;
use dtma_provisioner::http::server::{Limits, Server};
use dtma_provisioner::http::{App, Parts, router};
use dtma_provisioner::metrics::Metrics;
use dtma_provisioner::operator::client::Client;
use dtma_provisioner::operator::{self, RolloutCommand};
use dtma_provisioner::owners::Owners;
use dtma_provisioner::owners::supabase::SupabaseOwners;
use dtma_provisioner::reconcile::plan::Policy;
use dtma_provisioner::reconcile::{Pace, Reconciler};
use dtma_provisioner::releases::Releases;
use dtma_provisioner::rollouts::{RolloutPace, RolloutParts, Rollouts};
use dtma_provisioner::store::sqlite::SqliteStore;
use dtma_provisioner::store::{RolloutStore, Store};
use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// Heartbeats that are not on disk when the process is told to end get this long.
const LAST_WRITES: Duration = Duration::from_secs(5);

/// Makes sure an account has exactly one droplet with a working agent on it. Serves when no command is given; settings are read from the
/// environment
#[derive(clap::Parser)]
#[command(name = "dtma-provisioner", version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Steer updates of the agents; needs INTERNAL_API_SECRET, and PROVISIONER_URL or PORT where the provisioner isn't at port 3000 here
    #[command(subcommand)]
    Rollout(RolloutCommand),
}

#[tokio::main]
async fn main() -> ExitCode {
    // Only fails when a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match Arguments::parse().command {
        None => begin().await,
        Some(Command::Rollout(command)) => steer(command).await,
    }
}

async fn steer(command: RolloutCommand) -> ExitCode {
    let settings = match OperatorSettings::of_process() {
        Ok(settings) => settings,
        Err(invalid) => {
            eprintln!("{invalid}");
            return ExitCode::from(2);
        }
    };
    match Client::new(settings.url, settings.secret) {
        Ok(client) => operator::run(command, &client).await,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn begin() -> ExitCode {
    // A bad setting ends the process before anything is bound or written.
    let settings = match Settings::of_process() {
        Ok(settings) => settings,
        Err(invalid) => {
            eprintln!("{invalid}");
            return ExitCode::from(2);
        }
    };
    log_to_stderr(settings.json_logs);
    match serve(settings).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = %error, cause = error.source(), "the provisioner ends");
            ExitCode::FAILURE
        }
    }
}

fn log_to_stderr(json: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    if json { logs.json().init() } else { logs.init() }
}

async fn serve(settings: Settings) -> Result<(), Failed> {
    for note in &settings.notes {
        tracing::warn!("{note}");
    }
    let stop = CancellationToken::new();
    let metrics = Arc::new(Metrics::default());
    let sqlite = Arc::new(SqliteStore::open(&settings.database_url).await?);
    let store: Arc<dyn Store> = Arc::clone(&sqlite) as Arc<dyn Store>;
    let agent_settings = agent_settings(&settings, store.as_ref()).await?;
    let board = Arc::new(Board::open(Arc::clone(&store), Timestamp::now()).await?);
    let (heartbeats, heartbeat_writer) = Heartbeats::start(Arc::clone(&store), Arc::clone(&metrics));
    let releases = Arc::new(Releases::new(
        settings.releases_dir,
        settings.release_trust,
        settings.agent_version,
        settings.releases_url,
    ));
    let rollouts = Arc::new(
        Rollouts::open(RolloutParts {
            store: Arc::clone(&sqlite) as Arc<dyn RolloutStore>,
            board: Arc::clone(&board),
            releases: Arc::clone(&releases),
            metrics: Arc::clone(&metrics),
            pace: RolloutPace::default(),
        })
        .await?,
    );
    match releases.current().await {
        Ok(release) => {
            tracing::info!(version = release.version, sha256 = release.sha256, "new droplets get this release")
        }
        Err(error) => tracing::error!(error = %error, "no environment can be made before there is a release"),
    }
    let owners: Option<Arc<dyn Owners>> = match settings.supabase {
        Some(supabase) => Some(Arc::new(SupabaseOwners::new(&supabase.url, supabase.key)?)),
        None => None,
    };
    let cloud = DigitalOcean::new(&settings.cloud_url, settings.cloud_token, settings.ssh_keys, Arc::clone(&metrics))?;

    // Bound before the loop starts: a second process on this port ends here and has not touched the cloud.
    let server = Server::bind(settings.listen, Limits::of_this_process(), Arc::clone(&metrics)).await?;
    let reconciler = Reconciler {
        board: Arc::clone(&board),
        cloud: Arc::new(cloud),
        releases: Arc::clone(&releases),
        public_url: settings.public_url,
        policy: Policy {
            fleet_tag: settings.fleet_tag,
            lookup_grace: settings.lookup_grace,
            bootstrap_deadline: settings.bootstrap_deadline,
            orphan_age: settings.orphan_age,
            ..Policy::default()
        },
        pace: Pace {
            sweep: settings.reconcile_interval,
            unresponsive_after: settings.unresponsive_after,
            ..Pace::default()
        },
        metrics: Arc::clone(&metrics),
    };
    let reconciling = reconciler.start(&stop);
    let rolling = rollouts.start(&stop);
    let app = App::new(Parts {
        board,
        accounts: Accounts { store, owners },
        heartbeats,
        releases,
        rollouts,
        silent_after_seconds: settings.unresponsive_after.as_secs(),
        metrics,
        internal_secret: settings.internal_secret,
        spec: settings.spec,
        agent_settings,
        stop: stop.clone(),
    });
    tracing::info!(address = %server.local_address()?, version = env!("CARGO_PKG_VERSION"), "serving");
    let serving = tokio::spawn(server.run(router(app), stop.clone()));

    ended().await?;
    tracing::info!("ending");
    stop.cancel();
    serving.await?;
    reconciling.await?;
    rolling.await?;
    // Its handles went with the server, unless a request is stuck; then what waits is lost, and agents report again.
    if tokio::time::timeout(LAST_WRITES, heartbeat_writer).await.is_err() {
        tracing::warn!("some heartbeats were not written");
    }
    sqlite.close().await;
    Ok(())
}

async fn agent_settings(settings: &Settings, store: &dyn Store) -> Result<AgentSettings, Failed> {
    let mut told = AgentSettings {
        generation: 0,
        caller_key_sha256s: vec![settings.fleet_key],
        heartbeat_interval_seconds: settings.heartbeat_interval.as_secs(),
    };
    told.generation = store.settings_generation(&serde_json::to_string(&told)?).await?;
    Ok(told)
}

/// Resolves when the process is told to end.
async fn ended() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        interrupted = tokio::signal::ctrl_c() => interrupted,
    }
}
