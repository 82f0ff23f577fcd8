//! Command line of the local cloud: wiring only.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use local_cloud::host::{DockerHost, DockerImages};
use local_cloud::image::{self, PackageSource};

/// A DigitalOcean-compatible API whose droplets are system containers on this machine.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Builds the base images that are missing.
    Image(ImageArguments),
    /// Removes every droplet of a stack.
    Destroy {
        /// The stack.
        #[arg(long)]
        stack: String,
    },
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
    let outcome = match Cli::parse().command {
        Command::Image(arguments) => build_images(&arguments).await,
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

async fn destroy(stack: &str) -> Result<(), Failure> {
    let removed = DockerHost::destroy(stack).await?;
    println!("removed {removed} droplets of stack {stack}");
    Ok(())
}
