//! What the plan never does, whatever the row, the cloud and the time.

use std::time::Duration;

use dtma_api::EnvironmentId;
use dtma_api::TokenHash;
use dtma_provisioner::cloud::{ActionStatus, Droplet, Power};
use dtma_provisioner::environment::{
    Attempt, Cleanup, DropletId, EnrolledAgent, Environment, Placement, Progress, RunningDroplet, State, after,
    attempt_tag, environment_tag, plain_error,
};
use dtma_provisioner::reconcile::plan::{Known, Observed, Policy, Step, Verdict, judge, plan};
use jiff::Timestamp;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use uuid::Uuid;

use super::rig::spec;

const START: i64 = 1_800_000_000;
const FLEET: &str = "fleet";

fn policy() -> Policy {
    Policy { fleet_tag: FLEET.to_owned(), ..Policy::default() }
}

fn our_id() -> EnvironmentId {
    EnvironmentId(Uuid::from_u128(1))
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(START + seconds).unwrap()
}

/// Attempt 0 is the row's, the others are not.
fn attempt_id(number: u128) -> Uuid {
    Uuid::from_u128(100 + number)
}

fn attempt() -> impl Strategy<Value = Attempt> {
    (1_u32..7, 0_i64..100).prop_map(|(number, begun)| Attempt {
        id: attempt_id(0),
        number,
        started_at: at(begun),
        run_started_at: at(0),
        deadline: after(at(begun), Duration::from_secs(900)),
        token_hash: TokenHash::of("token"),
        token_expires_at: after(at(begun), Duration::from_secs(900)),
    })
}

fn agent() -> EnrolledAgent {
    EnrolledAgent {
        pin: dtma_api::CertificatePin::of_spki(b"key"),
        retry_key_hash: TokenHash::of("retry"),
        bearers: vec![TokenHash::of("bearer")],
        version: "1.0.0".to_owned(),
        enrolled_at: at(0),
    }
}

fn progress() -> impl Strategy<Value = Progress> {
    (option::of(Just("docker".to_owned())), any::<bool>(), any::<bool>()).prop_map(|(phase, enrolled, heard)| {
        let phases_told = u32::from(phase.is_some());
        Progress { phase, phases_told, agent: enrolled.then(agent), heard_at: (enrolled && heard).then(|| at(50)) }
    })
}

fn cleanup() -> impl Strategy<Value = Cleanup> {
    (option::of(1_i64..6), option::of(0_i64..100), option::of(0_i64..100)).prop_map(|(droplet, doubtful, asked)| {
        Cleanup { droplet: droplet.map(DropletId), doubtful_since: doubtful.map(at), delete_asked_at: asked.map(at) }
    })
}

fn state() -> impl Strategy<Value = State> {
    let error = || plain_error("code", "message", at(0));
    let running = (1_i64..6).prop_map(|id| RunningDroplet { id: DropletId(id), ip: [10, 0, 0, 1].into() });
    let placement = prop_oneof![
        Just(Placement::Asked),
        (0_i64..100).prop_map(|since| Placement::Doubtful { since: at(since) }),
        (1_i64..6, option::of(Just(9_i64)))
            .prop_map(|(id, action)| Placement::Placed { droplet: DropletId(id), action }),
    ];
    prop_oneof![
        (0_u32..6, option::of(0_i64..200), option::of(cleanup())).prop_map(move |(tries, not_before, leftover)| {
            State::PendingProvision { tries, since: at(0), not_before: not_before.map(at), last_error: None, leftover }
        }),
        (attempt(), placement, progress()).prop_map(|(attempt, placement, progress)| State::Provisioning {
            attempt,
            placement,
            progress
        }),
        (attempt(), running.clone(), progress()).prop_map(|(attempt, droplet, progress)| State::AwaitingHeartbeat {
            attempt,
            droplet,
            progress
        }),
        (attempt(), running.clone()).prop_map(|(attempt, droplet)| State::Active {
            attempt,
            droplet,
            agent: agent(),
            ready_at: at(0)
        }),
        (attempt(), running).prop_map(move |(attempt, droplet)| State::Unresponsive {
            attempt,
            droplet,
            agent: agent(),
            ready_at: at(0),
            error: error(),
        }),
        option::of(cleanup()).prop_map(move |leftover| State::ErrorProvisioning { error: error(), leftover }),
        cleanup().prop_map(|cleanup| State::PendingDeprovision { cleanup }),
        (cleanup(), 0_i64..100).prop_map(|(cleanup, since)| State::Deprovisioning {
            since: at(since),
            cleanup,
            failures: 0
        }),
        Just(State::Deprovisioned { at: at(0) }),
        (cleanup(), 0_i64..200).prop_map(move |(cleanup, retry)| State::ErrorDeprovisioning {
            error: error(),
            cleanup,
            retry_at: at(retry),
            failures: 1,
        }),
    ]
}

/// Of us or of anybody else, with any part of our tags missing.
fn droplet() -> impl Strategy<Value = Droplet> {
    let power = prop_oneof![Just(Power::New), Just(Power::Active), Just(Power::Other)];
    (1_i64..12, power, any::<bool>(), any::<bool>(), 0_u8..3, 0_u128..3, 0_i64..2000).prop_map(
        |(id, power, addressed, fleet, environment, attempt, created)| {
            let mut tags = vec!["web".to_owned()];
            if fleet {
                tags.push(FLEET.to_owned());
            }
            match environment {
                0 => tags.push(environment_tag(our_id())),
                1 => tags.push(environment_tag(EnvironmentId(Uuid::from_u128(2)))),
                _ => {}
            }
            if attempt < 2 {
                tags.push(attempt_tag(attempt_id(attempt)));
            }
            Droplet {
                id: DropletId(id),
                power,
                public_ip: addressed.then(|| [203, 0, 113, 1].into()),
                tags,
                created_at: at(created - 2000),
            }
        },
    )
}

fn observed() -> impl Strategy<Value = Observed> {
    let known = prop_oneof![Just(Known::Unseen), Just(Known::Gone), droplet().prop_map(Known::Present)];
    let action = option::of(prop_oneof![
        Just(ActionStatus::InProgress),
        Just(ActionStatus::Completed),
        Just(ActionStatus::Errored)
    ]);
    (known, option::of(vec(droplet(), 0..8)), action).prop_map(|(known, tagged, action)| Observed {
        known,
        tagged,
        action,
    })
}

fn row(state: State) -> Environment {
    Environment { state, ..Environment::new(our_id(), "account".parse().unwrap(), spec(), at(0)) }
}

fn ours(droplet: &Droplet) -> bool {
    droplet.tags.iter().any(|tag| tag == FLEET) && droplet.tags.contains(&environment_tag(our_id()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn only_what_is_ours_is_deleted(state in state(), observed in observed(), now in 0_i64..3000) {
        let environment = row(state);
        if let Step::Delete(ids) = plan(&environment, &observed, &policy(), at(now)) {
            prop_assert!(!ids.is_empty());
            let own_id = environment.state.cleanup().and_then(|cleanup| cleanup.droplet);
            for id in ids {
                let listed = observed.tagged.iter().flatten().any(|droplet| droplet.id == id && ours(droplet));
                prop_assert!(Some(id) == own_id || listed);
            }
        }
    }

    #[test]
    fn a_droplet_is_asked_for_only_when_nothing_is_left_and_it_is_time(
        state in state(), observed in observed(), now in 0_i64..3000,
    ) {
        let environment = row(state);
        if let Step::Create { number, .. } = plan(&environment, &observed, &policy(), at(now)) {
            match environment.state {
                State::PendingProvision { tries, not_before, leftover: None, .. } => {
                    prop_assert!(not_before.is_none_or(|before| at(now) >= before));
                    prop_assert_eq!(number, tries + 1);
                }
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }

    #[test]
    fn a_doubtful_create_is_given_up_only_after_looking_long_enough_and_finding_nothing(
        state in state(), observed in observed(), now in 0_i64..3000,
    ) {
        let environment = row(state);
        let State::Provisioning { placement: Placement::Doubtful { since }, .. } = environment.state else {
            return Ok(());
        };
        let mine = |droplet: &&Droplet| ours(droplet) && droplet.tags.contains(&attempt_tag(attempt_id(0)));
        let found: Option<DropletId> = observed.tagged.iter().flatten().filter(mine).map(|droplet| droplet.id).min();
        match plan(&environment, &observed, &policy(), at(now)) {
            Step::Become(change) => match change.state {
                State::Provisioning { placement: Placement::Placed { droplet, .. }, .. } => {
                    prop_assert_eq!(Some(droplet), found);
                }
                State::PendingProvision { .. } | State::ErrorProvisioning { .. } => {
                    prop_assert!(found.is_none() && observed.tagged.is_some());
                    prop_assert!(at(now) >= after(since, policy().lookup_grace));
                }
                other => prop_assert!(false, "{other:?}"),
            },
            Step::Wait => prop_assert!(found.is_none()),
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn gone_is_said_only_when_nothing_of_ours_is_seen_or_may_still_come(
        state in state(), observed in observed(), now in 0_i64..3000,
    ) {
        let environment = row(state);
        let Some(cleanup) = environment.state.cleanup().cloned() else { return Ok(()) };
        let Step::Become(change) = plan(&environment, &observed, &policy(), at(now)) else { return Ok(()) };
        let finished = matches!(change.state, State::Deprovisioned { .. })
            || (!matches!(environment.state, State::PendingDeprovision { .. }) && change.state.cleanup().is_none());
        if finished {
            prop_assert!(cleanup.droplet.is_none() || observed.known == Known::Gone);
            let Some(tagged) = &observed.tagged else { return Err(TestCaseError::fail("no list was read")) };
            prop_assert!(!tagged.iter().any(|droplet| ours(droplet) && Some(droplet.id) != cleanup.droplet));
            prop_assert!(cleanup.doubtful_since.is_none_or(|since| at(now) >= after(since, policy().lookup_grace)));
        }
    }

    #[test]
    fn deleting_one_droplet_again_and_again_never_keeps_the_others_from_being_seen(
        cleanup in cleanup(), now in 0_i64..3000,
    ) {
        let cleanup = Cleanup { delete_asked_at: Some(at(0)), ..cleanup };
        let environment = row(State::Deprovisioning { since: at(now), cleanup, failures: 0 });
        prop_assert_eq!(plan(&environment, &Observed::default(), &policy(), at(now)), Step::Wait);
    }

    #[test]
    fn a_settled_environment_needs_nothing_and_an_active_one_is_left_alone(
        state in state(), observed in observed(), now in 0_i64..3000,
    ) {
        let environment = row(state);
        let blind = plan(&environment, &Observed::default(), &policy(), at(now));
        if environment.state.settled() {
            prop_assert_eq!(blind, Step::Wait);
        }
        if matches!(environment.state, State::Active { .. } | State::Deprovisioned { .. }) {
            prop_assert_eq!(plan(&environment, &observed, &policy(), at(now)), Step::Wait);
        }
    }

    #[test]
    fn the_sweeper_keeps_strangers_and_what_is_wanted(
        state in state(), droplet in droplet(), known in any::<bool>(), now in 0_i64..3000,
    ) {
        let environment = known.then(|| row(state));
        let verdict = judge(&droplet, environment.as_ref(), &policy(), at(now));
        if !droplet.tags.iter().any(|tag| tag == FLEET) {
            prop_assert_eq!(verdict, Verdict::Keep);
            return Ok(());
        }
        match environment {
            Some(row) if row.state.droplet() == Some(droplet.id) => prop_assert_eq!(verdict, Verdict::Keep),
            Some(row) => {
                let waited_for = matches!(
                    row.state,
                    State::Provisioning { placement: Placement::Asked | Placement::Doubtful { .. }, .. }
                ) && droplet.tags.contains(&attempt_tag(attempt_id(0)));
                if waited_for {
                    prop_assert_eq!(verdict, Verdict::Keep);
                }
            }
            None => {
                let old = at(now) >= after(droplet.created_at, policy().orphan_age);
                prop_assert_eq!(verdict == Verdict::Delete, old);
            }
        }
    }
}
