//! Whatever callers, meddlers and deaths do, the containers end up being what was accepted.

use proptest::prelude::*;

use super::*;

const NAMES: [&str; 3] = ["one", "two", "three"];

#[derive(Debug, Clone)]
enum Act {
    Deploy(usize),
    Start(usize),
    Stop(usize),
    Restart(usize),
    Remove(usize, bool),
    /// Somebody removes the container.
    Steal(usize),
    /// Somebody stops the container of an instance that has been seen to run. (One that has not is undone, as it should be.)
    Halt(usize),
    KillAgent,
    EngineAway,
    EngineBack,
    Pass(u64),
}

fn any_act() -> impl Strategy<Value = Act> {
    let which = 0..NAMES.len();
    prop_oneof![
        4 => which.clone().prop_map(Act::Deploy),
        2 => which.clone().prop_map(Act::Start),
        2 => which.clone().prop_map(Act::Stop),
        1 => which.clone().prop_map(Act::Restart),
        2 => (which.clone(), any::<bool>()).prop_map(|(which, volumes)| Act::Remove(which, volumes)),
        2 => which.clone().prop_map(Act::Steal),
        2 => which.prop_map(Act::Halt),
        2 => Just(Act::KillAgent),
        1 => Just(Act::EngineAway),
        2 => Just(Act::EngineBack),
        3 => (0..3_000_u64).prop_map(Act::Pass),
    ]
}

/// What was accepted of one instance: that it runs, that it is stopped, or nothing.
type Accepted = BTreeMap<&'static str, bool>;

struct Left {
    accepted: Accepted,
    ours: BTreeMap<String, &'static str>,
    strangers: usize,
    /// What the last agent process says it did.
    events: Vec<String>,
    calls: Vec<String>,
}

async fn play(acts: Vec<Act>) -> Left {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    engine.stranger("four", Some(8081));
    let mut agent = Agent::start(&engine, directory.path());
    let mut accepted = Accepted::new();
    for act in acts {
        let instances = agent.instances.clone();
        match act {
            Act::Deploy(which) => {
                if instances.deploy(examples::spec(NAMES[which]), NO_WAIT).await.is_ok() {
                    accepted.entry(NAMES[which]).or_insert(true);
                }
            }
            Act::Start(which) => {
                if instances.start(&name(NAMES[which]), NO_WAIT).await.is_ok() {
                    accepted.insert(NAMES[which], true);
                }
            }
            Act::Stop(which) => {
                if instances.stop(&name(NAMES[which]), NO_WAIT).await.is_ok() {
                    accepted.insert(NAMES[which], false);
                }
            }
            Act::Restart(which) => {
                if instances.restart(&name(NAMES[which]), NO_WAIT).await.is_ok() {
                    accepted.insert(NAMES[which], true);
                }
            }
            Act::Remove(which, volumes) => {
                if instances.remove(&name(NAMES[which]), volumes, NO_WAIT).await.is_ok() {
                    accepted.remove(NAMES[which]);
                }
            }
            Act::Steal(which) => engine.steal(NAMES[which]),
            Act::Halt(which) => {
                let seen = agent.state(NAMES[which]) == Some(InstanceState::Running);
                if seen && engine.ours().get(NAMES[which]) == Some(&"running") {
                    let exit = Exit { code: 0, out_of_memory: false, error: String::new() };
                    engine.meddle(NAMES[which], |container| container.condition = Condition::Exited(exit));
                }
            }
            Act::KillAgent => {
                agent.kill().await;
                agent = Agent::start(&engine, directory.path());
            }
            Act::EngineAway => engine.gone(),
            Act::EngineBack => engine.heal(),
            Act::Pass(milliseconds) => tokio::time::sleep(Duration::from_millis(milliseconds)).await,
        }
    }
    engine.heal();
    tokio::time::sleep(Duration::from_secs(2000)).await;
    let (events, _) = agent.instances.events_with_history();
    let events =
        events.into_iter().map(|event| format!("{} {}", event.instance_name_on_toolbox, event.event)).collect();
    agent.kill().await;
    Left { accepted, ours: engine.ours(), strangers: engine.strangers(), events, calls: engine.calls() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_containers_end_up_being_what_was_accepted(acts in prop::collection::vec(any_act(), 0..30)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let left = runtime.block_on(play(acts));
        let story = || format!("{:?} {:?}", left.events, left.calls);
        for (name, runs) in &left.accepted {
            let word = left.ours.get(*name).copied();
            if *runs {
                prop_assert_eq!(word, Some("running"), "{} {}", name, story());
            } else {
                prop_assert_ne!(word, Some("running"), "{} {}", name, story());
            }
        }
        for name in left.ours.keys() {
            prop_assert!(left.accepted.contains_key(name.as_str()), "{} was not wanted", name);
        }
        prop_assert_eq!(left.strangers, 1);
    }
}
