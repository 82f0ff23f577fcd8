//! The real agent on the real Docker Engine, killed at every step of everything it does. Started anew on the same state directory it has
//! to come to an end by itself: what is promised is there, what isn't is gone, and everything can still be used.

mod files;
mod world;

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use self::files::FileTrap;
use self::world::World;
use crate::relay::{self, Moment};

/// More changing requests than any one operation makes.
const MOST: usize = 30;

/// What is asked of the agent when it is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Deploy,
    Stop,
    Start,
    Restart,
    Remove { volumes: bool },
}

impl Operation {
    /// Brings about what the operation starts from.
    async fn prepare(self, world: &World) {
        let body = world.deploy_body("one", "1");
        let path = format!("/tools/{}", world.host.name("one"));
        if self != Self::Deploy {
            world.must(Method::POST, "/tools", Some(&body), 201).await;
        }
        if self == Self::Start {
            world.must(Method::POST, &format!("{path}/stop"), None, 200).await;
        }
    }

    async fn ask(self, world: &World, wait: &str) -> Option<(u16, Value)> {
        let path = format!("/tools/{}", world.host.name("one"));
        let (method, path, body) = match self {
            Self::Deploy => (Method::POST, "/tools".to_owned(), Some(world.deploy_body("one", "1"))),
            Self::Stop => (Method::POST, format!("{path}/stop"), None),
            Self::Start => (Method::POST, format!("{path}/start"), None),
            Self::Restart => (Method::POST, format!("{path}/restart"), None),
            Self::Remove { volumes } => (Method::DELETE, format!("{path}?volumes={volumes}"), None),
        };
        let separator = if path.contains('?') { '&' } else { '?' };
        world.send(method, &format!("{path}{separator}{wait}"), body.as_ref()).await
    }

    /// What the instance is promised to be before and after: its intent, or that there is none.
    fn before(self) -> Option<&'static str> {
        match self {
            Self::Deploy => None,
            Self::Start => Some("stop"),
            Self::Stop | Self::Restart | Self::Remove { .. } => Some("run"),
        }
    }

    fn after(self) -> Option<&'static str> {
        match self {
            Self::Deploy | Self::Start | Self::Restart => Some("run"),
            Self::Stop => Some("stop"),
            Self::Remove { .. } => None,
        }
    }
}

/// Looks how it ended: the intent has to be among `allowed`. The instance is used and removed afterwards.
async fn judge(world: &mut World, operation: Operation, allowed: &[Option<&str>], what: &str) {
    if matches!(operation, Operation::Remove { volumes: false }) {
        world.keep_volumes_of("one");
    }
    let promises = world.agreement().await;
    let promised = promises.get(&world.host.name("one")).map(|promise| promise.intent.as_str());
    assert!(allowed.contains(&promised), "{what}: promised is {promised:?}, not one of {allowed:?}\n{}", world.log());
    if promised.is_some() {
        world.use_and_remove("one").await;
    }
}

/// The intents that may be promised after somebody heard this answer, or none.
fn allowed(operation: Operation, answer: Option<&(u16, Value)>) -> Vec<Option<&'static str>> {
    match answer {
        Some((status, answer)) => {
            assert!((200..300).contains(status), "{operation:?}: {status} {answer}");
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
            assert!((200..300).contains(&status), "{operation:?}: {status} {answer}\n{}", world.log());
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

/// The same for every moment of a change, side by side; what the operation consists of.
async fn at_every_moment(operation: Operation, pulls: bool) -> Vec<String> {
    let during = |millis| Moment::During(Duration::from_millis(millis));
    let moments = [Moment::Before, Moment::After, during(1), during(40)];
    let runs = moments.map(|moment| {
        tokio::spawn(async move {
            let world = if pulls { World::with_registry().await } else { World::new().await };
            at_every_change(world, operation, moment).await
        })
    });
    let seen: Vec<_> = futures_util::future::try_join_all(runs).await.unwrap();
    assert!(seen.iter().all(|one| one == &seen[0]), "{seen:?}");
    seen[0].clone()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_deploy_killed_at_any_change_is_done_after_the_next_start() {
    let changes = at_every_moment(Operation::Deploy, true).await;
    assert_eq!(
        changes,
        ["POST /images/create", "POST /networks/create", "POST /containers/create", "POST /containers/*/start"]
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_delete_killed_at_any_change_is_done_after_the_next_start() {
    let changes = at_every_moment(Operation::Remove { volumes: false }, false).await;
    assert_eq!(changes, ["POST /containers/*/stop", "DELETE /containers/*"]);
    let changes = at_every_moment(Operation::Remove { volumes: true }, false).await;
    assert_eq!(changes, ["POST /containers/*/stop", "DELETE /containers/*", "DELETE /volumes/*"]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_stop_start_or_restart_killed_at_any_change_is_done_after_the_next_start() {
    assert_eq!(at_every_moment(Operation::Stop, false).await, ["POST /containers/*/stop"]);
    assert_eq!(at_every_moment(Operation::Start, false).await, ["POST /containers/*/start"]);
    assert_eq!(at_every_moment(Operation::Restart, false).await, ["POST /containers/*/restart"]);
}

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

const OPERATIONS: [Operation; 6] = [
    Operation::Deploy,
    Operation::Stop,
    Operation::Start,
    Operation::Restart,
    Operation::Remove { volumes: false },
    Operation::Remove { volumes: true },
];

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn whenever_it_dies_while_it_writes_the_ledger_the_promise_is_the_old_or_the_new_and_is_kept() {
    let runs = OPERATIONS
        .map(|operation| tokio::spawn(async move { at_every_file_event(World::new().await, operation).await }));
    let seen: Vec<_> = futures_util::future::try_join_all(runs).await.unwrap();
    let writes = |seen: &Vec<String>| seen.iter().filter(|event| *event == "ledger.json put in place").count();
    assert_eq!(seen.iter().map(writes).collect::<Vec<_>>(), [2, 1, 1, 0, 2, 2], "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn what_was_answered_is_kept_whenever_it_dies_afterwards_and_what_was_not_is_kept_or_was_never_promised() {
    // Milliseconds from the request to the death; none: with the answer, which in this case comes at once.
    const DELAYS: [Option<u64>; 4] = [None, Some(2), Some(60), Some(350)];
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
