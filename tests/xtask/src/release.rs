//! `cargo xtask release`: builds the agent for old systems, packs and signs it, and says what came out. Also makes the keys for it, and
//! signs a release again.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use dtma_release::{Channel, Version};
use jiff::{SignedDuration, Timestamp};
use stack::release::{self, Release, ReleaseError, ReleaseKeys, Terms};
use stack::{Watch, Workspace};

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    task: Option<Task>,
    /// Where to put it, as {out}/{version}/ and {out}/channels/ [default: target/dist]
    #[arg(long)]
    out: Option<PathBuf>,
    /// The folder with the keys it is signed with: *.key, *.pub [default: this working tree's development keys]
    #[arg(long, env = "DTMA_RELEASE_KEYS_DIR")]
    keys: Option<PathBuf>,
    /// Whom it is for: stable or canary
    #[arg(long, default_value = "stable")]
    channel: Channel,
    /// How many days it may be installed from when it is issued
    #[arg(long, default_value_t = 182, value_parser = clap::value_parser!(u16).range(1..=3650))]
    days: u16,
    /// When it is issued; a release signed again for longer, or for another channel, needs a later time [default: the commit's]
    #[arg(long)]
    issued_at: Option<Timestamp>,
    /// The oldest version that can go to it in one step
    #[arg(long, default_value = "0.1.0")]
    min_version: Version,
    /// Build it a second time from another folder, and fail unless it is the same bytes
    #[arg(long)]
    twice: bool,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Make two pairs of keys in a folder that holds none
    Keys {
        /// The folder; keep it outside of any repository
        folder: PathBuf,
    },
}

/// Builds, packs and signs into `{out}/{version}/`, then prints version, archive, size, SHA-256, keys and the glibc it needs.
///
/// # Errors
/// As [`release::make`].
pub(crate) async fn run(options: &Options, watch: &dyn Watch) -> Result<(), ReleaseError> {
    if let Some(Task::Keys { folder }) = &options.task {
        ReleaseKeys::make(folder)?;
        let keys = ReleaseKeys::load(folder)?;
        println!("keys     {}", folder.display());
        println!("trusted  {}", keys.public());
        println!("next     move release-2.key to where no computer can read it; packaging/README.md tells the rest");
        return Ok(());
    }
    let workspace = Workspace::find();
    let terms = Terms {
        channel: options.channel,
        lifetime: SignedDuration::from_hours(24 * i64::from(options.days)),
        min_version: options.min_version.clone(),
        ..Terms::of(&workspace)
    };
    let terms = Terms { issued_at: options.issued_at.unwrap_or(terms.issued_at), ..terms };
    let keys = match &options.keys {
        Some(folder) => ReleaseKeys::load(folder)?,
        None => release::development_keys(&workspace)?,
    };
    let made = release::make(&workspace, &terms, &keys, options.out.as_deref(), watch).await?;
    print(&made, &keys, options);
    if options.twice {
        release::again_elsewhere(&workspace, &terms, &keys, &made, watch).await?;
        println!("twice    the same bytes from another folder");
    }
    Ok(())
}

fn print(release: &Release, keys: &ReleaseKeys, options: &Options) {
    println!("version  {} ({})", release.version, release.manifest.channel);
    println!("archive  {}", release.archive.display());
    println!("size     {} bytes", release.size);
    println!("sha256   {}", release.sha256);
    println!("issued   {}, until {}", release.manifest.issued_at, release.manifest.expires_at);
    println!("trusted  {}", keys.public());
    match release.glibc {
        Some(glibc) => println!("glibc    {glibc} or newer"),
        None => println!("glibc    not needed"),
    }
    if options.keys.is_none() {
        println!(
            "note     signed with this working tree's development keys: good for the local cloud, not for droplets you mean to keep \
             (packaging/README.md)"
        );
    }
}
