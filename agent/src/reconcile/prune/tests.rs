//! Which images may go.

use proptest::prelude::*;

use super::*;
use crate::instance::spec::examples;
use crate::instance::{DeploymentId, Intent, Spec};
use crate::store::ledger::Entry;

fn entry(name: &str, image: &str) -> Arc<Entry> {
    let spec = Spec { image: image.parse().unwrap(), ..examples::spec(name) };
    Arc::new(Entry {
        spec_hash: spec.hash(),
        deployment: DeploymentId(uuid::Uuid::nil()),
        intent: Intent::Run,
        proven: true,
        image_digest: None,
        accepted_at: Timestamp::UNIX_EPOCH,
        update: None,
        last_update: None,
        batch: None,
        spec,
    })
}

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn held(id: &str, tags: &[&str], digests: &[&str]) -> HeldImage {
    HeldImage { id: id.to_owned(), tags: texts(tags), digests: texts(digests), bytes: 1, used: false }
}

fn recorded(images: &[(&str, &[&str], i64)]) -> Contents {
    let images = images.iter().map(|(id, references, second)| {
        let references = texts(references).into_iter().collect();
        let last_used = Timestamp::from_second(*second).unwrap();
        ((*id).to_owned(), PulledImage { references, last_used })
    });
    Contents { images: images.collect(), ..Contents::default() }
}

fn names(sorted: &Sorted) -> Vec<Vec<String>> {
    sorted.unused.iter().map(|candidate| candidate.names.clone()).collect()
}

#[test]
fn the_longest_unused_goes_first_and_what_was_never_recorded_stays() {
    let contents = recorded(&[("1", &["r/a:1"], 20), ("2", &["r/b:1"], 10)]);
    let there = [held("1", &["r/a:1"], &["r/a@sha256:x"]), held("2", &["r/b:1"], &[]), held("3", &["r/c:1"], &[])];
    let sorted = sort(&contents, &there);
    assert_eq!(names(&sorted), [["r/b:1"], ["r/a:1"]]);
}

#[test]
fn an_image_whose_tag_has_moved_on_goes_by_its_id_although_an_entry_names_the_tag() {
    let mut contents = recorded(&[("old", &["r/a:1"], 10), ("new", &["r/a:1"], 20)]);
    contents.entries.insert("one".parse().unwrap(), entry("one", "r/a:1"));
    let there = [held("old", &[], &["r/a@sha256:x"]), held("new", &["r/a:1"], &["r/a@sha256:y"])];
    let sorted = sort(&contents, &there);
    assert_eq!(names(&sorted), [["old"]]);
    assert_eq!(sorted.used, ["new".to_owned()].into());
}

#[test]
fn an_image_that_somebody_else_has_a_name_for_is_theirs() {
    let contents = recorded(&[("1", &["r/a:1"], 10), ("2", &["r/b:1"], 10), ("3", &["r/c:1"], 10)]);
    let there = [held("1", &["r/a:1", "mine:1"], &[]), held("2", &[], &["other/b@sha256:x"])];
    let sorted = sort(&contents, &there);
    assert_eq!(sorted.lost, ["1", "2", "3"].map(str::to_owned).into(), "and the third is gone");
    assert!(sorted.unused.is_empty());
}

#[test]
fn an_image_pulled_by_its_digest_goes_by_it_and_is_named_by_it() {
    let digest = format!("r/a@sha256:{}", "a".repeat(64));
    let mut contents = recorded(&[("1", &[&digest], 10)]);
    let there = [held("1", &[], &[&digest])];
    assert_eq!(names(&sort(&contents, &there)), [[digest.clone()]]);
    let pinned = digest.replace("r/a@", "r/a:7@");
    contents.entries.insert("one".parse().unwrap(), entry("one", &pinned));
    assert_eq!(sort(&contents, &there).used, ["1".to_owned()].into());
}

fn any_image() -> impl Strategy<Value = (HeldImage, Option<BTreeSet<String>>)> {
    let names = || proptest::sample::subsequence(vec!["r/a:1", "r/a:2", "r/b:1", "s/c:1"], 0..3);
    let digests = proptest::sample::subsequence(vec!["r/a@sha256:x", "s/c@sha256:y"], 0..2);
    (names(), digests, any::<bool>(), proptest::option::of(names())).prop_map(|(tags, digests, used, ours)| {
        let image = HeldImage { used, ..held("", &tags, &digests) };
        (image, ours.map(|ours| texts(&ours).into_iter().collect()))
    })
}

proptest! {
    #[test]
    fn nothing_used_named_or_strange_is_ever_removed(
        images in proptest::collection::vec(any_image(), 0..6),
        promised in proptest::sample::subsequence(vec!["r/a:1", "r/b:1", "s/c:1"], 0..3),
    ) {
        let mut contents = Contents::default();
        for image in promised {
            let name = format!("n{}", image.replace([':', '/'], "-"));
            contents.entries.insert(name.parse().unwrap(), entry(&name, image));
        }
        let mut there = Vec::new();
        for (number, (image, ours)) in images.into_iter().enumerate() {
            let id = number.to_string();
            if let Some(references) = ours {
                contents.images.insert(id.clone(), PulledImage { references, last_used: Timestamp::UNIX_EPOCH });
            }
            there.push(HeldImage { id, ..image });
        }
        let named: BTreeSet<String> = contents.entries.values().map(|entry| entry.spec.image.familiar()).collect();
        let sorted = sort(&contents, &there);
        for candidate in &sorted.unused {
            let image = there.iter().find(|image| image.id == candidate.id).unwrap();
            let record = &contents.images[&candidate.id];
            prop_assert!(!image.used);
            prop_assert!(!image.tags.iter().any(|tag| named.contains(tag)));
            prop_assert!(image.tags.iter().all(|tag| record.references.contains(tag)));
            prop_assert!(candidate.names.iter().all(|name| record.references.contains(name) || *name == image.id));
            // By its id only when it has no tag: Docker would take them all off.
            prop_assert!(!candidate.names.contains(&image.id) || image.tags.is_empty());
        }
        let judged = sorted.unused.len() + sorted.used.len() + sorted.lost.len();
        prop_assert_eq!(judged, contents.images.len());
    }
}
