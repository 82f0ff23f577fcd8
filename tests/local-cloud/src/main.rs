//! Command line of the local cloud: wiring only.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};
use jiff::{SignedDuration, Timestamp};
use local_cloud::api::App;
use local_cloud::cloud::{Clock, Cloud, CloudOptions};
use local_cloud::contract::Contract;
use local_cloud::droplet::Lag;
use local_cloud::gate::Gate;
use local_cloud::host::{DockerHost, DockerHostOptions, DockerImages};
use local_cloud::image::{self, PackageSource};
use local_cloud::limits::Limits;
use local_cloud::{metadata, server};
use secrecy::SecretString;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing_subscriber::EnvFilter;

/// A DigitalOcean-compatible API whose droplets are system containers on this machine.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves the API until SIGTERM or SIGINT. Droplets outlive it, and the next one of the same stack finds them.
    Serve(ServeArguments),
    /// Builds the base images that are missing.
    Image(ImageArguments),
    /// Says how mmdebstrap is told to take a suite's packages from where this machine takes its own: options and sources, one a line.
    Sources {
        /// Debian's code name of a release.
        suite: String,
    },
    /// Removes every droplet of a stack.
    Destroy {
        /// The stack.
        #[arg(long)]
        stack: String,
    },
}

#[derive(Args)]
struct ServeArguments {
    /// Names this cloud's containers and volumes among others'.
    #[arg(long)]
    stack: String,
    /// Docker network the droplets are on; it must have been made with an explicit subnet.
    #[arg(long)]
    network: String,
    /// Address and port to listen on.
    #[arg(long)]
    listen: SocketAddr,
    /// Bearer token of the account.
    #[arg(long, env = "LOCAL_CLOUD_TOKEN", hide_env_values = true)]
    token: SecretString,
    /// Registry (host:port) droplets may pull from without TLS.
    #[arg(long)]
    registry: Option<String>,
    /// Folder for the lock and the passing files of base-image builds.
    #[arg(long, default_value_os_t = default_image_cache())]
    image_cache: PathBuf,
    /// DigitalOcean's API description (OpenAPI 3.0, YAML): every request and answer is checked against it, see /control/violations.
    #[arg(long)]
    check_contract: Option<PathBuf>,
    /// Milliseconds until a new droplet appears in lists.
    #[arg(long, default_value_t = 1_000)]
    list_lag_ms: i64,
    /// Milliseconds from `active` until the address appears.
    #[arg(long, default_value_t = 300)]
    address_lag_ms: i64,
    /// Droplets the account may have.
    #[arg(long, default_value_t = 25)]
    droplet_limit: usize,
    /// Requests an hour.
    #[arg(long, default_value_t = Limits::default().hour)]
    hour_limit: usize,
    /// Requests a minute.
    #[arg(long, default_value_t = Limits::default().minute)]
    minute_limit: usize,
}

#[derive(Args)]
struct ImageArguments {
    /// Slugs of the base images.
    #[arg(required = true)]
    slugs: Vec<String>,
    /// Folder for the build's lock and its passing files.
    #[arg(long, default_value_os_t = default_image_cache())]
    image_cache: PathBuf,
}

fn default_image_cache() -> PathBuf {
    std::env::temp_dir().join("dtma-local-cloud")
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let outcome = match Cli::parse().command {
        Command::Serve(arguments) => serve(arguments).await,
        Command::Image(arguments) => build_images(&arguments).await,
        Command::Sources { suite } => sources(&suite).await,
        Command::Destroy { stack } => destroy(&stack).await,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            eprintln!("local-cloud: {text}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(arguments: ServeArguments) -> Result<(), Failure> {
    let contract = arguments.check_contract.as_deref().map(Contract::load).transpose()?;
    let packages = PackageSource::of_this_machine().await?;
    let (door, listeners) = mpsc::unbounded_channel();
    let host = DockerHost::connect(DockerHostOptions {
        stack: arguments.stack,
        network: arguments.network,
        registry: arguments.registry,
        packages,
        image_cache: arguments.image_cache,
        metadata: Some(door),
    })
    .await?;
    let clock: Clock = Arc::new(Timestamp::now);
    let lag = Lag {
        list: SignedDuration::from_millis(arguments.list_lag_ms),
        address: SignedDuration::from_millis(arguments.address_lag_ms),
    };
    let options = CloudOptions { droplet_limit: arguments.droplet_limit, lag, clock: Arc::clone(&clock) };
    let cloud = Cloud::start(Arc::new(host), options).await?;
    tokio::spawn(metadata::serve(listeners, cloud.clone()));
    let limits = Limits { hour: arguments.hour_limit, minute: arguments.minute_limit };
    let gate = Gate::new(arguments.token, limits, contract, clock);
    let listener = TcpListener::bind(arguments.listen).await?;
    tracing::info!(address = %listener.local_addr()?, "the local cloud serves");
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = async move {
        tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
    };
    server::serve(listener, App { cloud: cloud.clone(), gate }, stop).await?;
    cloud.settled().await;
    Ok(())
}

async fn build_images(arguments: &ImageArguments) -> Result<(), Failure> {
    let source = PackageSource::of_this_machine().await?;
    let store = DockerImages::connect()?;
    for slug in &arguments.slugs {
        let recipe = image::find(slug).ok_or_else(|| format!("there is no base image {slug}"))?;
        let built = image::ensure(recipe, &source, &store, &arguments.image_cache).await?;
        match built.took {
            Some(took) => println!("{slug}: built {} in {:.1} s", built.reference, took.as_secs_f64()),
            None => println!("{slug}: {} is there", built.reference),
        }
    }
    Ok(())
}

async fn sources(suite: &str) -> Result<(), Failure> {
    let source = PackageSource::of_this_machine().await?;
    for line in source.options().chain(source.lines(suite)) {
        println!("{line}");
    }
    Ok(())
}

async fn destroy(stack: &str) -> Result<(), Failure> {
    let removed = DockerHost::destroy(stack).await?;
    println!("removed {removed} droplets of stack {stack}");
    Ok(())
}
