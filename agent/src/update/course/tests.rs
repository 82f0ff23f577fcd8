//! Updates on a droplet of files and a made-up systemd: good ones, bad ones, and any of them cut off before any one change.

mod droplet;
mod offer;

use std::collections::BTreeSet;

use self::droplet::{Conduct, Droplet, version};
use self::offer::{Offer, key, public};
use super::*;

const TARGET: &str = "x86_64-linux-gnu";
const BEGAN: &str = "2026-03-01T12:00:00Z";

fn trusted() -> Result<PublicKeys, KeysError> {
    PublicKeys::new(vec![public(&key(1)), public(&key(2))])
}

fn with<T>(droplet: &Droplet, offer: &Offer, work: impl FnOnce(&Course<'_>) -> T) -> T {
    let keys = trusted();
    work(&Course {
        places: &droplet.places,
        source: offer,
        host: droplet,
        keys: &keys,
        target: TARGET,
        channel: Channel::Stable,
        patience: Patience::default(),
    })
}

fn apply(droplet: &Droplet, offer: &Offer) -> UpdateResult {
    with(droplet, offer, |course| course.apply(&Wanted::Newest(Channel::Stable), false)).unwrap()
}

fn code(result: &UpdateResult) -> (UpdateOutcome, &str) {
    (result.outcome, result.code.as_deref().unwrap_or_default())
}

#[test]
fn a_version_that_proves_itself_is_kept_and_the_one_before_can_be_gone_back_to() {
    let droplet = Droplet::new();
    let ended = apply(&droplet, &Offer::new("1.1.0"));
    assert_eq!((ended.outcome, ended.from_version.as_str()), (UpdateOutcome::Updated, "1.0.0"), "{ended:?}");
    droplet.assert_settled("1.1.0");
    assert_eq!(droplet.memory().accepted.unwrap().highest_version, version("1.1.0"));
    assert!(droplet.places.version_folder(&version("1.1.0")).join("metadata-guard").exists());
    assert!(!droplet.places.staging().exists());

    assert_eq!(apply(&droplet, &Offer::new("1.1.0")).outcome, UpdateOutcome::UpToDate);

    let back = with(&droplet, &Offer::new("1.1.0"), |course| course.roll_back()).unwrap();
    assert_eq!(back.outcome, UpdateOutcome::RolledBack);
    droplet.assert_settled("1.0.0");
    // It isn't gone to again by itself, but a person may want it.
    assert_eq!(apply(&droplet, &Offer::new("1.1.0")).outcome, UpdateOutcome::UpToDate);
    let again =
        with(&droplet, &Offer::new("1.1.0"), |course| course.apply(&Wanted::Newest(Channel::Stable), true)).unwrap();
    assert_eq!(again.outcome, UpdateOutcome::Updated, "{again:?}");
    droplet.assert_settled("1.1.0");
}

#[test]
fn versions_that_no_link_names_are_removed() {
    let droplet = Droplet::new();
    for text in ["1.1.0", "1.2.0", "1.3.0"] {
        assert_eq!(apply(&droplet, &Offer::new(text)).outcome, UpdateOutcome::Updated);
    }
    let there: BTreeSet<_> = std::fs::read_dir(droplet.places.prefix.join("versions"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(there, BTreeSet::from(["1.2.0".to_owned(), "1.3.0".to_owned()]));
}

#[test]
fn a_release_that_is_not_what_it_must_be_is_refused_and_nothing_in_use_changes() {
    let mut truncated = Offer::new("1.1.0");
    truncated.archive.truncate(100);
    let mut exchanged = Offer::new("1.1.0");
    exchanged.archive = Offer::new("1.2.0").archive;
    exchanged.manifest.artifacts.first_mut().unwrap().size = exchanged.archive.len() as u64;
    let unsigned = Offer { signers: vec![], ..Offer::new("1.1.0") };
    let strangers = Offer { signers: vec![9], ..Offer::new("1.1.0") };
    let expired = Offer::new("1.1.0").change(|manifest| manifest.expires_at = BEGAN.parse().unwrap());
    let older = Offer::new("0.9.0");
    let huge = Offer::new("1.1.0").change(|manifest| manifest.artifacts.first_mut().unwrap().size = 1 << 40);
    let elsewhere =
        Offer::new("1.1.0").change(|manifest| manifest.artifacts.first_mut().unwrap().target = "aarch64".to_owned());
    let canary = Offer::new("1.1.0").change(|manifest| manifest.channel = Channel::Canary);
    for (offer, expected) in [
        (unsigned, "not_signed"),
        (strangers, "wrong_key"),
        (expired, "expired"),
        (older, "older"),
        (huge, "bad_archive"),
        (elsewhere, "no_artifact"),
        (canary, "other_channel"),
        (truncated, "truncated"),
        (exchanged, "wrong_digest"),
        (Offer::of("1.1.0", "1.1.0", 9), "wrong_archive_key"),
        (Offer::of("1.1.0", "0.9.0", 1), "other_program"),
        (Offer::of("1.1.0", "foreign", 1), "wrong_architecture"),
        (Offer::of("1.1.0", "broken", 1), "not_runnable"),
    ] {
        let droplet = Droplet::new();
        assert_eq!(code(&apply(&droplet, &offer)), (UpdateOutcome::Refused, expected));
        droplet.assert_settled("1.0.0");
        assert!(droplet.starts.borrow().is_empty(), "{expected}");
        assert!(!droplet.places.version_folder(&version("1.1.0")).exists(), "{expected}");
    }
}

#[test]
fn no_keys_mean_that_nothing_is_taken_however_it_is_signed() {
    let droplet = Droplet::new();
    let (offer, keys) = (Offer::new("1.1.0"), PublicKeys::parse(""));
    let course = Course {
        places: &droplet.places,
        source: &offer,
        host: &droplet,
        keys: &keys,
        target: TARGET,
        channel: Channel::Stable,
        patience: Patience::default(),
    };
    let ended = course.apply(&Wanted::Newest(Channel::Stable), true).unwrap();
    assert_eq!(code(&ended), (UpdateOutcome::Refused, "no_keys"));
    droplet.assert_settled("1.0.0");
}

#[test]
fn the_past_is_not_taken_even_if_what_came_after_it_has_failed() {
    let droplet = Droplet::new().with("1.2.0", Conduct { never_ready: true, ..Conduct::default() });
    let later = Offer::new("1.2.0").change(|manifest| manifest.issued_at = "2026-03-05T00:00:00Z".parse().unwrap());
    assert_eq!(apply(&droplet, &later).outcome, UpdateOutcome::Reverted);
    assert_eq!(code(&apply(&droplet, &Offer::new("1.1.0"))), (UpdateOutcome::Refused, "replayed"));
}

#[test]
fn a_version_that_does_not_prove_itself_goes_within_two_minutes_and_does_not_come_again() {
    let conducts = [
        (Conduct { never_ready: true, ..Conduct::default() }, "not_ready"),
        (Conduct { ends_after: Some(0), ..Conduct::default() }, "crashed"),
        (Conduct { ends_after: Some(62), ..Conduct::default() }, "crashed"),
        (Conduct { hangs_after: Some(20), ..Conduct::default() }, "silent"),
        (Conduct { without_docker: true, ..Conduct::default() }, "no_docker"),
        (Conduct { without_heartbeats: true, ..Conduct::default() }, "no_heartbeat"),
        (Conduct { forgets: true, ..Conduct::default() }, "tools_lost"),
    ];
    for (conduct, expected) in conducts {
        let what = format!("{conduct:?}");
        let droplet = Droplet::new().with("1.1.0", conduct);
        let began = droplet.elapsed();
        let ended = apply(&droplet, &Offer::new("1.1.0"));
        assert_eq!(code(&ended), (UpdateOutcome::Reverted, expected), "{what}");
        assert!(ended.reason.unwrap().ends_with("the last words"), "{what}");
        droplet.assert_settled("1.0.0");
        assert!(droplet.elapsed() - began < Duration::from_secs(120), "{what}: {:?}", droplet.elapsed() - began);
        assert_eq!(droplet.memory().shown.failed_versions.first().unwrap().code, expected);

        let starts = droplet.starts.borrow().len();
        assert_eq!(code(&apply(&droplet, &Offer::new("1.1.0"))), (UpdateOutcome::Refused, "failed_before"), "{what}");
        assert_eq!(droplet.starts.borrow().len(), starts, "it was not started again");
        assert_eq!(apply(&droplet, &Offer::new("1.1.1")).outcome, UpdateOutcome::Updated, "{what}");
    }
}

#[test]
fn a_version_that_fills_the_disk_is_taken_back_although_nothing_can_be_written_down() {
    let conduct = Conduct { never_ready: true, fills_disk: true, ..Conduct::default() };
    let droplet = Droplet::new().with("1.1.0", conduct);
    let offer = Offer::new("1.1.0");
    with(&droplet, &offer, |course| course.apply(&Wanted::Newest(Channel::Stable), false)).unwrap_err();
    assert_eq!(droplet.links(), ("1.0.0".to_owned(), "1.0.0".to_owned()));
    assert_eq!(droplet.agent.borrow().version, version("1.0.0"), "what is good runs");
    // With what filled it gone, there is room again.
    with(&droplet, &offer, |course| course.recover()).unwrap();
    droplet.assert_settled("1.0.0");
}

#[test]
fn an_agent_that_was_started_again_often_can_be_updated() {
    let mut droplet = Droplet::new();
    droplet.counts_on = true;
    droplet.agent.borrow_mut().restarts = 5;
    assert_eq!(apply(&droplet, &Offer::new("1.1.0")).outcome, UpdateOutcome::Updated);
    let mut droplet = Droplet::new().with("1.1.0", Conduct { ends_after: Some(3), ..Conduct::default() });
    droplet.counts_on = true;
    droplet.agent.borrow_mut().restarts = 5;
    assert_eq!(code(&apply(&droplet, &Offer::new("1.1.0"))), (UpdateOutcome::Reverted, "crashed"));
}

#[test]
fn a_version_whose_updater_systemd_cannot_load_is_not_kept() {
    let droplet = Droplet::new().with("1.1.0", Conduct { without_units: true, ..Conduct::default() });
    let ended = apply(&droplet, &Offer::new("1.1.0"));
    assert_eq!(code(&ended), (UpdateOutcome::Reverted, "bad_units"));
    assert!(ended.reason.unwrap().contains("dtma-update.path"));
    droplet.assert_settled("1.0.0");
}

#[test]
fn what_systemd_refuses_is_the_versions_fault_unless_the_droplet_is_going_down() {
    for (goes_down, expected, failed) in [(true, "interrupted", 0), (false, "systemd", 1)] {
        let mut droplet = Droplet::new();
        (droplet.refuses, droplet.goes_down) = (true, goes_down);
        assert_eq!(code(&apply(&droplet, &Offer::new("1.1.0"))), (UpdateOutcome::Reverted, expected));
        droplet.assert_settled("1.0.0");
        assert_eq!(droplet.memory().shown.failed_versions.len(), failed);
    }
}

#[test]
fn what_is_nobodys_fault_is_not_held_against_a_version() {
    let ended = Droplet::new().with("1.1.0", Conduct { is_ended_after: Some(20), ..Conduct::default() });
    let mut dockerless = Droplet::new();
    dockerless.docker_goes = true;
    for droplet in [ended, dockerless] {
        assert_eq!(code(&apply(&droplet, &Offer::new("1.1.0"))), (UpdateOutcome::Reverted, "interrupted"));
        droplet.assert_settled("1.0.0");
        assert!(droplet.memory().shown.failed_versions.is_empty());
        assert!(droplet.memory().unjudged.values().eq([&1]));
    }
}

#[test]
fn nothing_is_asked_of_a_new_version_that_the_old_one_could_not_do() {
    let conduct = Conduct { without_docker: true, without_heartbeats: true, ..Conduct::default() };
    let droplet = Droplet::new().with("1.0.0", conduct.clone()).with("1.1.0", conduct);
    assert_eq!(apply(&droplet, &Offer::new("1.1.0")).outcome, UpdateOutcome::Updated);
}

/// Runs an update that dies before its `changes`-th change, then what systemd runs after a death. Answers whether it died at all.
fn cut_off(droplet: &Droplet, offer: &Offer, changes: usize) -> bool {
    droplet.places.fuse.set(Some(changes));
    let died = with(droplet, offer, |course| course.apply(&Wanted::Newest(Channel::Stable), false)).is_err();
    droplet.places.fuse.set(None);
    died
}

#[test]
fn a_death_before_any_one_change_leaves_a_version_that_serves() {
    for (conduct, after) in
        [(Conduct::default(), "1.1.0"), (Conduct { never_ready: true, ..Conduct::default() }, "1.0.0")]
    {
        let mut deaths = 0;
        for changes in 0.. {
            assert!(changes < 100, "an update makes fewer changes than that");
            let droplet = Droplet::new().with("1.1.0", conduct.clone());
            if !cut_off(&droplet, &Offer::new("1.1.0"), changes) {
                break;
            }
            deaths += 1;
            with(&droplet, &Offer::new("1.1.0"), |course| course.recover()).unwrap();
            let settled = droplet.links().1;
            droplet.assert_settled(&settled);
            // And again after a reboot: recovery itself is repeatable.
            assert_eq!(with(&droplet, &Offer::new("1.1.0"), |course| course.recover()).unwrap(), None);
            // Whoever asks again gets what an undisturbed update would have come to.
            let memory = droplet.memory();
            let ended = apply(&droplet, &Offer::new("1.1.0"));
            droplet.assert_settled(after);
            if let Some(failed) = memory.shown.failed_versions.first() {
                assert_eq!(failed.code, "not_ready", "what was found out before the death is not forgotten");
                assert_eq!(code(&ended), (UpdateOutcome::Refused, "failed_before"));
            }
        }
        assert!(deaths >= 8, "{deaths} changes are few");
    }
}

#[test]
fn a_death_within_the_recovery_from_a_death_is_recovered_from() {
    for changes in 0..40 {
        for within in 0..4 {
            let droplet = Droplet::new();
            if !cut_off(&droplet, &Offer::new("1.1.0"), changes) {
                return;
            }
            droplet.places.fuse.set(Some(within));
            let _ = with(&droplet, &Offer::new("1.1.0"), |course| course.recover());
            droplet.places.fuse.set(None);
            with(&droplet, &Offer::new("1.1.0"), |course| course.recover()).unwrap();
            droplet.assert_settled(&droplet.links().1.clone());
        }
    }
}

#[test]
fn an_interrupted_trial_is_nobodys_fault_for_a_few_times() {
    let offer = Offer::new("1.1.0");
    // So many changes, and it is in use without having been kept.
    let in_use = (0..40).find(|changes| {
        let droplet = Droplet::new();
        cut_off(&droplet, &offer, *changes) && droplet.links() == ("1.1.0".to_owned(), "1.0.0".to_owned())
    });
    let droplet = Droplet::new();
    for count in 1..=MOST_UNJUDGED {
        assert!(cut_off(&droplet, &offer, in_use.unwrap()));
        let undone = with(&droplet, &offer, |course| course.recover()).unwrap().unwrap();
        assert_eq!(code(&undone), (UpdateOutcome::Reverted, "interrupted"));
        droplet.assert_settled("1.0.0");
        assert!(droplet.memory().unjudged.values().eq([&count]));
    }
    assert_eq!(code(&apply(&droplet, &offer)), (UpdateOutcome::Refused, "interrupted"));
    let again = with(&droplet, &offer, |course| course.apply(&Wanted::Newest(Channel::Stable), true)).unwrap();
    assert_eq!(again.outcome, UpdateOutcome::Updated);
}

#[test]
fn a_memory_that_cannot_be_read_is_put_aside_and_the_droplet_can_still_be_updated() {
    let droplet = Droplet::new();
    std::fs::write(droplet.places.memory_file(), "{ half a mem").unwrap();
    assert_eq!(code(&apply(&droplet, &Offer::new("0.9.0"))), (UpdateOutcome::Refused, "older"));
    assert_eq!(apply(&droplet, &Offer::new("1.1.0")).outcome, UpdateOutcome::Updated);
    assert!(droplet.folder.path().join("memory/state.json.unreadable").exists());
}

#[test]
fn what_is_only_looked_for_changes_nothing() {
    let droplet = Droplet::new();
    let (good, manifest, standing) =
        with(&droplet, &Offer::new("1.1.0"), |course| course.check(&Wanted::Newest(Channel::Stable))).unwrap();
    assert_eq!((good, manifest.version, standing), (version("1.0.0"), version("1.1.0"), Standing::Newer));
    assert!(!droplet.places.memory_file().exists());
    let other = Wanted::Version(version("1.3.0"));
    let error = with(&droplet, &Offer::new("1.1.0"), |course| course.check(&other)).unwrap_err();
    assert!(error.to_string().contains("other_version"), "{error}");
}
