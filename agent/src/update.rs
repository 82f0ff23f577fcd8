//! Updates of the agent itself, made so that no update can strand a droplet.
//!
//! The agent never replaces itself: it *asks* ([`Updates`]), and says how it is ([`vitals`]). A root oneshot unit runs this same program as
//! `dtma-agent update` ([`cli`]), which fetches a release, checks it, puts it beside the others, and puts it on trial.
//!
//! Two links under `/opt/dtma` say everything: `current` is the version in use, `good` the last one that has proved itself here. While they
//! differ a trial is under way. Making `good` the same as `current` ends it well, making `current` the same as `good` undoes it; either
//! is one rename. The updater always runs from `good`, so that no new version judges itself, and systemd sees to it that
//! nobody's death leaves a trial without a judge: the units that undo one run from `good`, too.

mod asking;
pub mod cli;
mod course;
#[cfg(any(test, fuzzing))]
mod fuzzed;
mod gate;
mod host;
mod memory;
mod places;
mod request;
mod source;
mod stage;
pub mod vitals;

pub use asking::{NotAsked, Updates};
#[cfg(any(test, fuzzing))]
pub(crate) use fuzzed::release as fuzzed_release;
pub use places::Places;
