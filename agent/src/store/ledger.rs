//! The ledger: the durable list of what callers were promised.
//!
//! One file: a line of JSON naming format, generation and the SHA-256 of the rest, then the entries as JSON. It is replaced as a
//! whole, so it is either the old list or the new one. A file that can't be read is kept aside and the list is put together again
//! from the containers' labels. Environment variables are in it, so it is the owner's alone; secrets never are.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
mod strange;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dtma_api::InstanceName;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::instance::{Batch, Course, DeploymentId, Failure, Intent, LastUpdate, Spec, SpecHash, Update};
use crate::store::durable;

pub use self::strange::StrangeEntry;

/// Version of the file's format. What older agents pass over, or leave alone ([`strange`]), is no reason for another.
const FORMAT: u32 = 1;

/// What one instance was promised to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// What it is.
    pub spec: Spec,
    /// Hash of `spec` when it was accepted. Kept, not computed again: a newer agent's specs may have more fields, and its containers
    /// must not look outdated because of that.
    pub spec_hash: SpecHash,
    /// The deploy that brought this spec.
    pub deployment: DeploymentId,
    /// What is wanted of it.
    pub intent: Intent,
    /// It has run once. Until then a failure undoes the deploy; from then on it is tried again.
    pub proven: bool,
    /// Digest its image resolved to.
    pub image_digest: Option<String>,
    /// When the deploy was accepted.
    pub accepted_at: Timestamp,
    /// Those it was deployed together with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<Batch>,
    /// The version being tried, while there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update: Option<Box<Update>>,
    /// How the last update ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_update: Option<LastUpdate>,
}

/// One version of an instance: what it is, and which accepted request brought it.
#[derive(Debug, Clone, Copy)]
pub struct Version<'a> {
    /// What it is.
    pub spec: &'a Spec,
    /// Hash of the spec when it was accepted.
    pub spec_hash: &'a SpecHash,
    /// The request that brought it.
    pub deployment: DeploymentId,
}

/// What is being worked towards. Work begun for another purpose is called off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Purpose {
    intent: Intent,
    update: Option<(DeploymentId, Course)>,
}

impl Entry {
    /// The version that serves, or is to serve.
    pub fn present(&self) -> Version<'_> {
        Version { spec: &self.spec, spec_hash: &self.spec_hash, deployment: self.deployment }
    }

    /// The version being tried.
    pub fn next(&self) -> Option<Version<'_>> {
        let update = self.update.as_ref()?;
        Some(Version { spec: &update.spec, spec_hash: &update.spec_hash, deployment: update.deployment })
    }

    /// What is being worked towards.
    pub fn purpose(&self) -> Purpose {
        let update = self.update.as_ref().map(|update| (update.deployment, update.course.clone()));
        Purpose { intent: self.intent.clone(), update }
    }

    /// The version being tried has shown that it works: it is the present one now.
    pub fn take_over(&mut self, image_digest: Option<String>, at: Timestamp) {
        let Some(update) = self.update.take() else { return };
        let Update { spec, spec_hash, deployment, .. } = *update;
        self.spec = spec;
        self.spec_hash = spec_hash;
        self.deployment = deployment;
        self.proven = true;
        self.image_digest = image_digest;
        self.last_update = Some(LastUpdate { deployment, at, failure: None });
    }

    /// The version being tried has failed: what it made is to be taken back, and what was wanted before is wanted again.
    pub fn turn_back(&mut self, failure: Failure) {
        if let Some(update) = &mut self.update {
            self.intent = update.before.clone();
            update.course = Course::Back(failure);
        }
    }

    /// Nothing is left of the version that failed.
    pub fn settle_back(&mut self, at: Timestamp) {
        let Some(update) = self.update.take() else { return };
        let failure = match update.course {
            Course::Back(failure) => Some(failure),
            Course::Forth => None,
        };
        self.last_update = Some(LastUpdate { deployment: update.deployment, at, failure });
    }
}

/// What the ledger holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// Every instance.
    pub entries: BTreeMap<InstanceName, Arc<Entry>>,
    /// Instances that another version of the agent wrote down and this one can't read. Left alone.
    pub strange: BTreeMap<InstanceName, StrangeEntry>,
    /// Ids of containers that bear our labels and could not be read when a lost ledger was put together again. Left alone.
    pub unreadable: BTreeSet<String>,
    /// Instances that were deployed with registry credentials. Those are in memory only; this tells that they were lost from that they were
    /// never needed.
    pub with_credentials: BTreeSet<InstanceName>,
    /// Images the agent itself pulled and that were not on the host before, by their engine's id. Nobody else's are ever removed.
    pub images: BTreeMap<String, PulledImage>,
}

/// An image the agent pulled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PulledImage {
    /// What it was pulled as, in [`ImageReference::familiar`](crate::instance::ImageReference::familiar) form.
    pub references: BTreeSet<String>,
    /// When it was last seen in use; while it is in use, some hours behind.
    pub last_used: Timestamp,
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    format: u32,
    generation: u64,
    sha256: String,
}

/// The ledger of one state directory.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    generation: u64,
    contents: Contents,
    saved: bool,
}

/// What was found at the ledger's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A whole ledger.
    Whole,
    /// None: a new agent, or a lost state directory.
    Nothing,
    /// Something that could not be read; it was kept as this file.
    Damaged {
        /// Where the bad file is now.
        kept_as: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// Why the ledger can't be used or changed.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// It could not be read from the disk.
    #[error("the ledger {path} could not be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// The bad file could not be moved aside.
    #[error("the damaged ledger {path} could not be moved aside")]
    SetAside {
        /// The file.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// The disk is full; nothing has changed.
    #[error("no space left to write the ledger")]
    NoSpace,
    /// It could not be written; nothing has changed.
    #[error("the ledger could not be written")]
    Write(#[source] io::Error),
}

impl Ledger {
    /// Opens `ledger.json` in the state directory. Nothing is written yet.
    ///
    /// # Errors
    /// When the file is there and the system won't read it, or won't move a damaged one aside.
    pub fn open(state_dir: &Path, now: Timestamp) -> Result<(Self, Found), LedgerError> {
        let path = state_dir.join("ledger.json");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((Self { path, generation: 0, contents: Contents::default(), saved: true }, Found::Nothing));
            }
            Err(source) => return Err(LedgerError::Read { path, source }),
        };
        match parse(&bytes) {
            Ok((generation, contents)) => Ok((Self { path, generation, contents, saved: true }, Found::Whole)),
            Err(problem) => {
                let kept_as = state_dir.join(format!("ledger.damaged-{}.json", now.as_millisecond()));
                if let Err(source) = std::fs::rename(&path, &kept_as) {
                    return Err(LedgerError::SetAside { path, source });
                }
                let ledger = Self { path, generation: 0, contents: Contents::default(), saved: true };
                Ok((ledger, Found::Damaged { kept_as, problem }))
            }
        }
    }

    /// What it holds.
    pub fn contents(&self) -> &Contents {
        &self.contents
    }

    /// Goes up with every change.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether the disk has all that is here.
    pub fn is_saved(&self) -> bool {
        self.saved
    }

    /// Takes in what a caller wants: on the disk first, then here. Blocks on the disk.
    ///
    /// # Errors
    /// When it could not be written; the ledger is then as it was.
    pub fn commit(&mut self, contents: Contents) -> Result<(), LedgerError> {
        self.write(&contents)?;
        self.contents = contents;
        Ok(())
    }

    /// Takes in what has happened, which is so whether or not it can be written down. What isn't on the disk goes there with the next
    /// change; if the agent dies before, it finds out again. Blocks on the disk.
    ///
    /// # Errors
    /// When it could not be written.
    pub fn note(&mut self, contents: Contents) -> Result<(), LedgerError> {
        let result = self.write(&contents);
        self.contents = contents;
        self.saved = result.is_ok();
        result
    }

    fn write(&mut self, contents: &Contents) -> Result<(), LedgerError> {
        let generation = self.generation.saturating_add(1);
        let bytes = render(generation, contents).map_err(|error| LedgerError::Write(error.into()))?;
        durable::replace(&self.path, &bytes).map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => LedgerError::NoSpace,
            _ => LedgerError::Write(error),
        })?;
        self.generation = generation;
        self.saved = true;
        Ok(())
    }
}

fn render(generation: u64, contents: &Contents) -> Result<Vec<u8>, serde_json::Error> {
    let body = serde_json::to_vec(contents)?;
    let header = Header { format: FORMAT, generation, sha256: hex::encode(Sha256::digest(&body)) };
    let mut bytes = serde_json::to_vec(&header)?;
    bytes.push(b'\n');
    bytes.extend_from_slice(&body);
    bytes.push(b'\n');
    Ok(bytes)
}

/// Reads what [`render`] wrote. Any other bytes give a reason, never a panic.
fn parse(bytes: &[u8]) -> Result<(u64, Contents), String> {
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or("it has no header line")?;
    let (header, rest) = bytes.split_at(end);
    let header: Header =
        serde_json::from_slice(header).map_err(|error| format!("its header can't be read: {error}"))?;
    if header.format != FORMAT {
        return Err(format!("its format is {}, and this agent reads format {FORMAT}", header.format));
    }
    let body = rest.trim_ascii();
    if hex::encode(Sha256::digest(body)) != header.sha256 {
        return Err("its checksum is wrong: it was truncated or changed".to_owned());
    }
    let contents = strange::read(body).map_err(|error| format!("its entries can't be read: {error}"))?;
    // Everything is done by an entry's name, to the container its spec names.
    match contents.entries.iter().find(|(name, entry)| *name != &entry.spec.name) {
        Some((name, entry)) => Err(format!("its entry {name} is about {}", entry.spec.name)),
        None => Ok((header.generation, contents)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::instance::spec::examples;

    pub(super) fn contents(names: &[&str]) -> Contents {
        let entries = names.iter().map(|name| {
            let spec = examples::spec(name);
            let entry = Entry {
                spec_hash: spec.hash(),
                deployment: DeploymentId(uuid::Uuid::from_u128(7)),
                intent: Intent::Run,
                proven: true,
                image_digest: None,
                accepted_at: Timestamp::UNIX_EPOCH,
                batch: None,
                update: None,
                last_update: None,
                spec,
            };
            (entry.spec.name.clone(), Arc::new(entry))
        });
        Contents { entries: entries.collect(), ..Contents::default() }
    }

    #[test]
    fn what_was_committed_is_there_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let (mut ledger, found) = Ledger::open(directory.path(), Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(found, Found::Nothing);
        ledger.commit(contents(&["one"])).unwrap();
        ledger.commit(contents(&["one", "two"])).unwrap();
        let (again, found) = Ledger::open(directory.path(), Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(found, Found::Whole);
        assert_eq!(again.contents(), &contents(&["one", "two"]));
        assert_eq!(again.generation(), 2);
    }

    #[test]
    fn a_ledger_cut_off_anywhere_is_kept_aside_and_never_half_believed() {
        let whole = render(3, &contents(&["one", "two"])).unwrap();
        // The last byte is a newline that may be missing.
        for length in 0..whole.len() - 1 {
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join("ledger.json"), &whole[..length]).unwrap();
            let (ledger, found) = Ledger::open(directory.path(), Timestamp::UNIX_EPOCH).unwrap();
            let Found::Damaged { kept_as, .. } = found else { panic!("{length} bytes were believed") };
            assert_eq!(std::fs::read(kept_as).unwrap(), &whole[..length]);
            assert_eq!(ledger.contents(), &Contents::default());
        }
    }

    #[test]
    fn a_commit_that_fails_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (mut ledger, _) = Ledger::open(directory.path(), Timestamp::UNIX_EPOCH).unwrap();
        ledger.commit(contents(&["one"])).unwrap();
        std::fs::create_dir(directory.path().join("ledger.json.new")).unwrap();
        assert!(matches!(ledger.commit(contents(&["two"])), Err(LedgerError::Write(_))));
        assert_eq!(ledger.contents(), &contents(&["one"]));
        let (again, _) = Ledger::open(directory.path(), Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(again.contents(), &contents(&["one"]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic_and_a_flipped_bit_is_noticed(noise: Vec<u8>, at: prop::sample::Index, bit in 0..8_u8) {
            let _ = parse(&noise);
            let mut bytes = render(3, &contents(&["one"])).unwrap();
            let index = at.index(bytes.len() - 1);
            bytes[index] ^= 1 << bit;
            if let Ok((_, read)) = parse(&bytes) {
                prop_assert_eq!(read, contents(&["one"]), "only the generation may differ");
            }
        }
    }
}
