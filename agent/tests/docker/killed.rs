//! The real agent on the real Docker Engine, killed at every step of everything it does. Started anew on the same state directory it has
//! to come to an end by itself: what is promised is there, what isn't is gone, and everything can still be used.

mod files;
mod operation;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use self::files::FileTrap;
use self::operation::{Operation, Promised};
use self::world::World;
use crate::relay::{self, Moment};

/// More changing requests than any one operation makes.
const MOST: usize = 30;

/// Looks how it ended: what is promised has to be one of `allowed`. What is there is used and removed afterwards.
async fn judge(world: &mut World, operation: Operation, allowed: &[Promised], what: &str) {
    if operation.keeps_volumes() {
        operation.before().keys().for_each(|word| world.keep_volumes_of(word));
    }
    let promises = world.agreement().await;
    let words = ["one", "two"].map(|word| (word, world.host.name(word)));
    let promised: BTreeMap<&str, (&str, &str)> = words
        .iter()
        .filter_map(|(word, name)| Some((*word, promises.get(name)?)))
        .map(|(word, promise)| (word, (promise.intent.as_str(), promise.version.as_str())))
        .collect();
    let fits = promised.len() == promises.len() && allowed.iter().any(|allowed| allowed == &promised);
    assert!(fits, "{what}: promised is {promised:?}, not one of {allowed:?}\n{}", world.log());
    let there: Vec<&str> = promised.keys().copied().collect();
    for word in &there {
        world.stop_and_start(word).await;
    }
    for word in &there {
        world.remove(word).await;
    }
    if !there.is_empty() {
        assert_eq!(world.agreement().await, BTreeMap::new());
        world.nothing_left().await;
    }
}

/// What may be promised after somebody heard this answer, or none.
fn allowed(operation: Operation, answer: Option<&(u16, Value)>) -> Vec<Promised> {
    match answer {
        Some((status, answer)) => {
            assert!(operation.is_answered_by(*status, answer), "{operation:?}: {status} {answer}");
            vec![operation.after()]
        }
        None => vec![operation.before(), operation.after()],
    }
}

/// Kills the agent at the first, second, … change it asks of Docker, until it comes to the end of the operation alive.
async fn at_every_change(mut world: World, operation: Operation, moment: Moment) -> Vec<String> {
    for number in 1..MOST {
        world.afresh().await;
        operation.prepare(&world).await;
        world.relay.arm(number, moment, world.killer());
        let answer = operation.ask(&world, "wait=100").await;
        let (struck, seen) = world.relay.disarm();
        if !struck {
            let (status, answer) = answer.expect("nobody killed it");
            assert!(operation.is_answered_by(status, &answer), "{operation:?}: {status} {answer}\n{}", world.log());
            judge(&mut world, operation, &[operation.after()], "left alone").await;
            return seen;
        }
        world.bury().await;
        world.start().await;
        let what = format!("{operation:?} killed {:?} its change number {number}, {}", moment, seen[number - 1]);
        // The intent is on the disk before anything is done, so from the first change on there is no way back.
        judge(&mut world, operation, &[operation.after()], &what).await;
    }
    panic!("{operation:?} never came to its end");
}

/// Before it, after it, and in the middle of it.
const EVERY_MOMENT: &[Moment] = &[
    Moment::Before,
    Moment::After,
    Moment::During(Duration::from_millis(1)),
    Moment::During(Duration::from_millis(40)),
];
/// For operations made of the same changes as others: done, and nobody knows; or just begun.
const TELLING_MOMENTS: &[Moment] = &[Moment::After, Moment::During(Duration::from_millis(1))];

/// The same for several moments of a change, side by side; what the operation consists of.
async fn at_moments(moments: &[Moment], operation: Operation, pulls: bool) -> Vec<String> {
    let runs = moments.iter().map(|moment| {
        let moment = *moment;
        tokio::spawn(async move {
            let world = if pulls { World::with_registry().await } else { World::new().await };
            at_every_change(world, operation, moment).await
        })
    });
    let seen: Vec<_> = futures_util::future::try_join_all(runs).await.unwrap();
    // Members of a group are worked on side by side.
    let sorted = seen.iter().map(|one| one.iter().collect::<BTreeSet<_>>()).collect::<BTreeSet<_>>();
    assert_eq!(sorted.len(), 1, "{seen:?}");
    seen[0].clone()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_deploy_killed_at_any_change_is_done_after_the_next_start() {
    let changes = at_moments(EVERY_MOMENT, Operation::Deploy, true).await;
    assert_eq!(
        changes,
        ["POST /images/create", "POST /networks/create", "POST /containers/create", "POST /containers/*/start"]
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_delete_killed_at_any_change_is_done_after_the_next_start() {
    let changes = at_moments(EVERY_MOMENT, Operation::Remove { volumes: false }, false).await;
    assert_eq!(changes, ["POST /containers/*/stop", "DELETE /containers/*"]);
    let changes = at_moments(EVERY_MOMENT, Operation::Remove { volumes: true }, false).await;
    assert_eq!(changes, ["POST /containers/*/stop", "DELETE /containers/*", "DELETE /volumes/*"]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_stop_start_or_restart_killed_at_any_change_is_done_after_the_next_start() {
    assert_eq!(at_moments(EVERY_MOMENT, Operation::Stop, false).await, ["POST /containers/*/stop"]);
    assert_eq!(at_moments(EVERY_MOMENT, Operation::Start, false).await, ["POST /containers/*/start"]);
    assert_eq!(at_moments(EVERY_MOMENT, Operation::Restart, false).await, ["POST /containers/*/restart"]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn an_update_killed_at_any_change_is_done_or_taken_back_after_the_next_start() {
    let forth = ["POST /containers/create", "POST /containers/*/stop", "POST /containers/*/start"];
    let changes = at_moments(EVERY_MOMENT, Operation::Update, false).await;
    assert_eq!(changes, [forth.as_slice(), &["DELETE /containers/*", "POST /containers/*/rename"]].concat());
    at_moments(TELLING_MOMENTS, Operation::UpdateOfStopped, false).await;
    at_moments(TELLING_MOMENTS, Operation::UpdateThatFails, false).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_group_killed_at_any_change_is_there_as_a_whole_or_not_at_all_after_the_next_start() {
    for operation in [Operation::Group, Operation::GroupThatFails, Operation::RemoveGroup] {
        at_moments(TELLING_MOMENTS, operation, false).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_session_whose_agent_is_killed_at_any_change_is_over_and_leaves_nothing_after_the_next_start() {
    let changes = at_moments(EVERY_MOMENT, Operation::Session, false).await;
    let own =
        ["POST /containers/create", "POST /containers/*/start", "POST /containers/*/stop", "DELETE /containers/*"];
    assert_eq!(changes, own);
    let changes = at_moments(TELLING_MOMENTS, Operation::RemoveWithSession, false).await;
    let gone = ["POST /containers/*/stop", "DELETE /containers/*"];
    assert_eq!(changes, [&gone[..], &gone, &["DELETE /volumes/*"]].concat());
}

/// One of every kind.
const OPERATIONS: [Operation; 8] = [
    Operation::Deploy,
    Operation::Stop,
    Operation::Start,
    Operation::Restart,
    Operation::Remove { volumes: true },
    Operation::Update,
    Operation::UpdateThatFails,
    Operation::GroupThatFails,
];

/// Kills the agent at the first, second, … thing that happens to a file in its state directory.
async fn at_every_file_event(mut world: World, operation: Operation) -> Vec<String> {
    for number in 1..MOST {
        world.afresh().await;
        operation.prepare(&world).await;
        let trap = FileTrap::set(&world.state_dir(), number, world.killer());
        let answer = operation.ask(&world, "wait=100").await;
        let (struck, seen) = trap.disarm();
        let what = format!("{operation:?} killed when the files had been {seen:?}");
        let allowed = allowed(operation, answer.as_ref());
        if !struck {
            judge(&mut world, operation, &allowed, "left alone").await;
            return seen;
        }
        world.bury().await;
        world.start().await;
        judge(&mut world, operation, &allowed, &what).await;
    }
    panic!("{operation:?} never came to its end");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_second_network_of_the_agents_name_is_removed_and_what_runs_keeps_its_own() {
    let mut world = World::new().await;
    world.start().await;
    let again = || async {
        // As an agent that died leaves it; Docker doesn't mind.
        let labels = json!({ "dtma.managed": "true", "dtma.scope": world.host.scope });
        let body = json!({ "Name": format!("dtma-{}", world.host.scope), "Labels": labels });
        let (status, answer) = relay::ask_docker(Method::POST, "/v1.41/networks/create", Some(&body)).await;
        assert_eq!(status, 201, "{answer}");
    };
    again().await;
    again().await;
    for word in ["one", "two"] {
        world.must(Method::POST, "/tools", Some(&world.deploy_body(word, "1")), 201).await;
        assert_eq!(world.agreement().await.len(), if word == "one" { 1 } else { 2 });
        assert_eq!(world.networks().await.len(), 1);
        again().await;
    }
    // One that is there already is none the worse for it.
    let path = format!("/tools/{}", world.host.name("one"));
    for verb in ["restart", "stop", "start"] {
        world.must(Method::POST, &format!("{path}/{verb}"), None, 200).await;
    }
    world.agreement().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn whenever_it_dies_while_it_writes_the_ledger_the_promise_is_the_old_or_the_new_and_is_kept() {
    let runs = OPERATIONS
        .map(|operation| tokio::spawn(async move { at_every_file_event(World::new().await, operation).await }));
    let seen: Vec<_> = futures_util::future::try_join_all(runs).await.unwrap();
    let writes = |seen: &Vec<String>| seen.iter().filter(|event| *event == "ledger.json put in place").count();
    let writes: Vec<usize> = seen.iter().map(writes).collect();
    assert_eq!(writes[..7], [2, 1, 1, 0, 2, 2, 3], "{seen:?}");
    // Whether one member of a group is seen to run before the other has failed is chance.
    assert!((4..=5).contains(&writes[7]), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn what_was_answered_is_kept_whenever_it_dies_afterwards_and_what_was_not_is_kept_or_was_never_promised() {
    // Milliseconds from the request to the death; none: with the answer, which in this case comes at once.
    const DELAYS: [Option<u64>; 3] = [None, Some(60), Some(350)];
    let runs = OPERATIONS.map(|operation| {
        tokio::spawn(async move {
            let mut world = World::new().await;
            for delay in DELAYS {
                world.afresh().await;
                operation.prepare(&world).await;
                let kill = world.killer();
                let answer = match delay {
                    None => {
                        let answer = operation.ask(&world, "wait=0").await;
                        assert!(answer.is_some(), "nobody killed it");
                        kill();
                        answer
                    }
                    Some(millis) => {
                        let killing = tokio::task::spawn_blocking(move || {
                            std::thread::sleep(Duration::from_millis(millis));
                            kill();
                        });
                        let answer = operation.ask(&world, "wait=100").await;
                        killing.await.unwrap();
                        answer
                    }
                };
                world.bury().await;
                world.start().await;
                let what = format!("{operation:?} killed after {delay:?} ms, answered {answer:?}");
                judge(&mut world, operation, &allowed(operation, answer.as_ref()), &what).await;
            }
        })
    });
    futures_util::future::try_join_all(runs).await.unwrap();
}
