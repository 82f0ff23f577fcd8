//! Everything that reads bytes from outside, as one function each over any bytes at all: what must hold whatever they are. `tests/fuzz`
//! gives them to libFuzzer, and the tests here run them over its corpus and over what a little random damage makes of it.
//!
//! Not in the program: only built for tests, and with `--cfg fuzzing`.

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use crate::{backend, egress, engine, http, instance, mcp, store, update};

/// Takes any bytes, and fails when something isn't as it must be.
pub type Target = fn(&[u8]);

/// Every target by name, which is also that of its corpus.
pub const TARGETS: [(&str, Target); 18] = [
    ("deploy", engine::docker::fuzzed::deploy),
    ("update", engine::docker::fuzzed::update),
    ("group", engine::docker::fuzzed::group),
    ("egress", egress::fuzzed::egress),
    ("label", engine::docker::fuzzed::label),
    ("inspect", engine::docker::fuzzed::inspect),
    ("log", engine::docker::fuzzed::log),
    ("image", instance::fuzzed::image),
    ("reference", instance::fuzzed::reference),
    ("ledger", store::ledger::fuzzed::ledger),
    ("exec", http::fuzzed_exec),
    ("credentials", instance::validate::fuzzed_credentials),
    ("query", http::fuzzed_query),
    ("bridge", mcp::fuzzed_message),
    ("probe", mcp::fuzzed_probe),
    ("events", mcp::link::sse::fuzzed_events),
    ("backend", backend::fuzzed_answer),
    ("release", update::fuzzed_release),
];

/// Runs the target called `name`.
///
/// # Panics
/// When there is none of that name, or something isn't as it must be.
pub fn run(name: &str, data: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).unwrap();
    target(data);
}

#[cfg(test)]
mod tests;
