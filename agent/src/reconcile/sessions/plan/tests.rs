use jiff::Timestamp;
use uuid::Uuid;

use super::*;
use crate::engine::Exit;
use crate::reconcile::tests::blank_container;

const RUNS: Condition = Condition::Running { since: Timestamp::UNIX_EPOCH };

/// What a plan is made from, put together piece by piece.
#[derive(Default)]
struct World {
    wishes: Vec<Wish>,
    containers: Vec<Container>,
    under_way: BTreeMap<SessionId, InstanceName>,
    resting: BTreeSet<SessionId>,
    hosts: BTreeMap<InstanceName, ContainerId>,
}

fn one() -> InstanceName {
    "one".parse().unwrap()
}

fn session(number: u128) -> SessionOf {
    SessionOf { id: SessionId(Uuid::from_u128(number)), instance: one() }
}

fn id(text: &str) -> ContainerId {
    ContainerId(text.to_owned())
}

impl World {
    /// An instance that runs in `main`.
    fn new() -> Self {
        Self { hosts: [(one(), id("main"))].into(), ..Self::default() }
    }

    fn wishes(mut self, number: u128, container: Option<&str>) -> Self {
        let session = session(number).id;
        let container = container.map(id);
        self.wishes.push(Wish { session, instance: one(), beside: id("main"), most: Some(2), container });
        self
    }

    fn has(mut self, number: u128, container: &str, condition: Condition) -> Self {
        let session = Some(session(number));
        self.containers.push(Container { id: id(container), session, condition, ..blank_container() });
        self
    }

    fn works_on(mut self, number: u128) -> Self {
        self.under_way.insert(session(number).id, one());
        self
    }

    fn steps(&self) -> Vec<Step> {
        plan(&Subject {
            wishes: &self.wishes,
            containers: &self.containers,
            under_way: &self.under_way,
            resting: &self.resting,
            hosts: &self.hosts,
        })
    }
}

fn begin(number: u128) -> Step {
    Step::Begin { session: session(number), like: id("main") }
}

fn remove(number: u128, container: &str, runs: bool) -> Step {
    Step::Remove { session: session(number), container: id(container), runs }
}

fn over(number: u128, why: &str) -> Step {
    Step::Over { session: session(number).id, why: why.to_owned() }
}

fn exited(code: i64) -> Condition {
    Condition::Exited(Exit { code, out_of_memory: false, error: String::new() })
}

#[test]
fn a_wish_is_begun_once_and_left_alone_while_its_container_runs() {
    assert_eq!(World::new().wishes(1, None).steps(), [begin(1)]);
    assert_eq!(World::new().wishes(1, None).works_on(1).steps(), []);
    for condition in [RUNS, Condition::Paused] {
        assert_eq!(World::new().wishes(1, Some("a")).has(1, "a", condition).steps(), []);
    }
}

#[test]
fn an_instance_has_as_many_as_it_may_and_the_next_waits_for_one_to_be_gone() {
    let full = World::new().wishes(1, Some("a")).has(1, "a", RUNS).works_on(2).wishes(2, None);
    assert_eq!(full.wishes(3, None).steps(), [], "one is there and one being made");
    let leaving = World::new().has(1, "a", RUNS).has(2, "b", RUNS).wishes(3, None);
    assert_eq!(leaving.steps(), [remove(1, "a", true), remove(2, "b", true)]);
    let left = World::new().has(1, "a", RUNS).works_on(1).wishes(3, None).wishes(4, None);
    assert_eq!(left.steps(), [begin(3)]);
}

#[test]
fn a_session_of_the_agents_own_takes_no_clients_place() {
    let mut world = World::new().wishes(1, None).wishes(2, Some("b")).has(2, "b", RUNS).wishes(3, None).wishes(4, None);
    world.wishes[1].most = None;
    assert_eq!(world.steps(), [begin(1), begin(3)]);
    world.wishes[1].container = None;
    world.containers.clear();
    assert_eq!(world.steps(), [begin(1), begin(2), begin(3)]);
}

#[test]
fn what_nobody_wishes_goes_and_so_does_what_is_left_of_an_agent_that_died() {
    let left = World::new().has(1, "a", RUNS).has(2, "b", Condition::Created).has(3, "c", exited(0));
    assert_eq!(left.steps(), [remove(1, "a", true), remove(2, "b", false), remove(3, "c", false)]);
    let orphan = World { hosts: BTreeMap::new(), ..World::new().has(1, "a", RUNS) };
    assert_eq!(orphan.steps(), [remove(1, "a", true)], "also when the instance itself is gone");
    assert_eq!(World::new().has(1, "a", Condition::Removing).steps(), []);
    let resting = World { resting: [session(1).id].into(), ..World::new().has(1, "a", Condition::Dead) };
    assert_eq!(resting.steps(), []);
}

#[test]
fn a_session_is_over_when_its_process_ends_or_somebody_removes_its_container() {
    let killed = World::new().wishes(1, Some("a")).has(1, "a", exited(137));
    assert_eq!(killed.steps(), [over(1, "its process ended with exit code 137"), remove(1, "a", false)]);
    let removed = World::new().wishes(1, Some("a"));
    assert_eq!(removed.steps(), [over(1, "its container was removed")]);
}

#[test]
fn no_session_outlives_the_container_it_began_beside() {
    let why = "the instance was stopped, updated or removed";
    let with = |hosts: &[&str]| {
        let world = World::new().wishes(1, Some("a")).has(1, "a", RUNS).wishes(2, None);
        World { hosts: hosts.iter().map(|main| (one(), id(main))).collect(), ..world }
    };
    let gone = [over(1, why), over(2, why), remove(1, "a", true)];
    assert_eq!(with(&[]).steps(), gone, "stopped");
    assert_eq!(with(&["other"]).steps(), gone, "updated");
}
