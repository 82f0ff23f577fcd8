//! How the agent says that it is well: a small file on a tmpfs, written anew every second while it serves. The updater reads it to judge a
//! new version; nothing else depends on it.

use std::collections::BTreeSet;
use std::io::{self, Read as _};
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::places::{Places, open_of_the_agents};

/// How often it is written while the agent lives.
pub const EVERY: Duration = Duration::from_secs(1);
/// A larger file isn't read.
const MAX_BYTES: u64 = 256 * 1024;

/// One writing. A field that an older or newer version doesn't write counts as not known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vitals {
    /// The process that wrote it.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// When it wrote this.
    pub written_at: Timestamp,
    /// Where it listens.
    #[serde(default)]
    pub port: u16,
    /// The Docker Engine answers.
    #[serde(default)]
    pub docker_reachable: bool,
    /// It reports to somebody.
    #[serde(default)]
    pub reports: bool,
    /// Heartbeats taken since it started.
    #[serde(default)]
    pub heartbeats_taken: u64,
    /// Heartbeats in a row that were not.
    #[serde(default)]
    pub heartbeats_failing: u64,
    /// Every instance it looks after is in `instances`.
    #[serde(default)]
    pub complete: bool,
    /// Their names, now.
    #[serde(default)]
    pub instances: BTreeSet<String>,
    /// Their names as they were found when it started, before anybody could ask for another.
    #[serde(default)]
    pub found: Option<BTreeSet<String>>,
}

impl Vitals {
    /// Writes it. Not brought to a disk: there is none under it.
    ///
    /// # Errors
    /// Whatever the file system says; what was there before is then still there.
    pub fn write(&self, places: &Places) -> io::Result<()> {
        self.write_to(&places.vitals_file())
    }

    /// Writes it as the last word of an agent that ends in order: what callers have asked of it is all in it.
    ///
    /// # Errors
    /// As [`Vitals::write`].
    pub fn write_last(&self, places: &Places) -> io::Result<()> {
        self.write_to(&places.last_word_file())
    }

    fn write_to(&self, path: &Path) -> io::Result<()> {
        let draft = path.with_extension("json.new");
        std::fs::write(&draft, serde_json::to_vec(self)?)?;
        std::fs::rename(&draft, path)
    }

    /// Reads it; none when there is none, or it isn't one.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let file = open_of_the_agents(path).ok()?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
        serde_json::from_slice(&bytes).ok()
    }
}
