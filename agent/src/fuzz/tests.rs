//! The targets in an ordinary test run: over the corpus, and over what random damage makes of it.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

use super::TARGETS;

/// Damaged inputs for each target.
const CASES: u32 = 400;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz")
}

/// What lies in a target's corpus.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(folder().join("corpus").join(target)).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// The words of libFuzzer's dictionary.
fn words() -> Vec<Vec<u8>> {
    let text = fs::read_to_string(folder().join("words.dict")).unwrap();
    let quoted = text.lines().filter_map(|line| line.strip_prefix('"')?.strip_suffix('"'));
    quoted.map(|word| word.replace("\\x0a", "\n").replace("\\\"", "\"").replace("\\\\", "\\").into_bytes()).collect()
}

/// Something that happens to an input.
#[derive(Debug, Clone)]
enum Damage {
    Overwrite(Index, u8),
    Insert(Index, Vec<u8>),
    InsertWord(Index, Index),
    Cut(Index, Index),
    Double(Index, Index),
    /// The rest becomes that of another input.
    Splice(Index, Index, Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<Index>;
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(place, byte)| Damage::Overwrite(place, byte)),
        (at(), prop::collection::vec(any::<u8>(), 0..8)).prop_map(|(place, bytes)| Damage::Insert(place, bytes)),
        (at(), at()).prop_map(|(place, word)| Damage::InsertWord(place, word)),
        (at(), at()).prop_map(|(from, to)| Damage::Cut(from, to)),
        (at(), at()).prop_map(|(from, to)| Damage::Double(from, to)),
        (at(), at(), at()).prop_map(|(place, other, from)| Damage::Splice(place, other, from)),
    ]
}

fn damaged(mut input: Vec<u8>, all: &[Damage], corpus: &[Vec<u8>], words: &[Vec<u8>]) -> Vec<u8> {
    for one in all {
        let place = |index: &Index| index.index(input.len() + 1);
        let between = |one: &Index, other: &Index| {
            let (one, other) = (place(one), place(other));
            one.min(other)..one.max(other)
        };
        match one {
            Damage::Overwrite(at, byte) => {
                let at = place(at);
                input.truncate(input.len().max(at));
                if let Some(there) = input.get_mut(at) {
                    *there = *byte;
                }
            }
            Damage::Insert(at, bytes) => drop(input.splice(place(at)..place(at), bytes.iter().copied())),
            Damage::InsertWord(at, word) => {
                let (at, word) = (place(at), &words[word.index(words.len())]);
                input.splice(at..at, word.iter().copied());
            }
            Damage::Cut(from, to) => drop(input.drain(between(from, to))),
            Damage::Double(from, to) => {
                let range = between(from, to);
                let twice = input[range.clone()].to_vec();
                input.splice(range.end..range.end, twice);
            }
            Damage::Splice(at, other, from) => {
                let other = &corpus[other.index(corpus.len())];
                input.truncate(place(at));
                input.extend_from_slice(&other[from.index(other.len() + 1)..]);
            }
        }
    }
    input
}

#[test]
fn every_target_holds_over_its_corpus_and_over_what_damage_makes_of_it() {
    let words = words();
    assert!(words.len() > 50);
    for (name, target) in TARGETS {
        let corpus = corpus(name);
        assert!(corpus.len() >= 3, "{name} has no corpus to speak of");
        corpus.iter().for_each(|input| target(input));
        target(b"");
        let inputs = (any::<Index>(), prop::collection::vec(damage(), 1..6))
            .prop_map(|(seed, all)| damaged(seed.get(&corpus).clone(), &all, &corpus, &words));
        let mut runner = TestRunner::new(Config { cases: CASES, failure_persistence: None, ..Config::default() });
        let outcome = runner.run(&inputs, |input| {
            target(&input);
            Ok(())
        });
        if let Err(error) = outcome {
            panic!("{name}: {error}");
        }
    }
}

/// Otherwise a target that nobody runs any more would go unnoticed: the fuzzing crate isn't built in an ordinary run.
#[test]
fn the_fuzzing_crate_has_exactly_these_targets() {
    let manifest = fs::read_to_string(folder().join("Cargo.toml")).unwrap();
    let mut listed: Vec<&str> = manifest
        .split("[[bin]]")
        .skip(1)
        .filter_map(|bin| bin.lines().find_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"')))
        .collect();
    listed.sort_unstable();
    let mut names = TARGETS.map(|(name, _)| name);
    names.sort_unstable();
    assert_eq!(listed, names);
    for name in names {
        let source = fs::read_to_string(folder().join(format!("fuzz_targets/{name}.rs"))).unwrap();
        let call = format!("fuzz_target!(|data: &[u8]| dtma_agent::fuzz::run(\"{name}\", data));");
        assert!(source.contains(&call), "{name}: {source}");
    }
}
