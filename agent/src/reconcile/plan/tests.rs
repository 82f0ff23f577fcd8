use std::time::Duration;

use jiff::Timestamp;
use proptest::prelude::*;

use super::*;
use crate::engine::Exit;
use crate::instance::spec::examples;
use crate::instance::{DeploymentId, Failure, FailureKind, SpecHash};

fn entry(intent: Intent, proven: bool) -> Entry {
    let spec = examples::spec("one");
    Entry {
        spec_hash: spec.hash(),
        deployment: DeploymentId(uuid::Uuid::nil()),
        intent,
        proven,
        image_digest: None,
        accepted_at: Timestamp::UNIX_EPOCH,
        batch: None,
        update: None,
        last_update: None,
        spec,
    }
}

fn container(id: &str, condition: Condition) -> Container {
    let spec = examples::spec("one");
    Container {
        id: ContainerId(id.to_owned()),
        name: "one".to_owned(),
        instance: Some(spec.name.clone()),
        session: None,
        spec_hash: spec.hash(),
        settings: Settings::of(&spec),
        spec_label: String::new(),
        deployment: None,
        created: 0,
        condition,
        restart_count: 0,
        ports: Vec::new(),
        address: None,
        own_address: None,
        links: Link::all_of(&spec.network),
    }
}

fn running() -> Condition {
    Condition::Running { since: Timestamp::UNIX_EPOCH }
}

fn exited(code: i64) -> Condition {
    Condition::Exited(Exit { code, out_of_memory: false, error: String::new() })
}

fn subject<'a>(entry: &'a Entry, containers: &'a [Container]) -> Subject<'a> {
    Subject { entry, containers, nudge: None, hung: false, failing: false, not_before: None, adjusted: false }
}

fn steps(subject: &Subject<'_>) -> Vec<Step> {
    plan(subject, Instant::now()).map(|job| job.steps).unwrap_or_default()
}

fn discard(id: &str) -> Step {
    Step::Discard(ContainerId(id.to_owned()))
}

#[test]
fn a_deploy_goes_on_from_wherever_it_was_left() {
    let new = entry(Intent::Run, false);
    let left = |condition: Condition| steps(&subject(&new, &[container("a", condition)]));
    assert_eq!(steps(&subject(&new, &[])), [Step::Fetch, Step::Create, Step::Start, Step::Await]);
    assert_eq!(left(Condition::Created), [Step::Start, Step::Await]);
    assert_eq!(left(running()), [Step::Await]);
    assert_eq!(left(exited(1)), [Step::Start, Step::Await]);
}

#[test]
fn docker_restarts_what_crashes_and_the_plan_leaves_it_alone() {
    let proven = entry(Intent::Run, true);
    let restarting = Condition::Restarting(Exit { code: 1, out_of_memory: false, error: String::new() });
    assert_eq!(steps(&subject(&proven, &[container("a", restarting)])), []);
    assert_eq!(steps(&subject(&proven, &[container("a", running())])), []);
}

#[test]
fn a_policy_that_leaves_it_ended_is_kept_to_unless_it_never_got_to_start() {
    let mut proven = entry(Intent::Run, true);
    proven.spec.restart = RestartPolicy::OnFailure { max_retries: 2 };
    proven.spec_hash = proven.spec.hash();
    let left = |condition: Condition| {
        let one = Container {
            spec_hash: proven.spec_hash.clone(),
            settings: Settings::of(&proven.spec),
            ..container("a", condition)
        };
        steps(&subject(&proven, &[one]))
    };
    assert_eq!(left(exited(1)), []);
    // After a reboot, say, at which Docker found that what is to be mounted isn't there.
    let failed = Exit { code: 128, out_of_memory: false, error: "no such file or directory".to_owned() };
    assert_eq!(left(Condition::Exited(failed)), [Step::Start, Step::Await]);
}

#[test]
fn what_hangs_is_restarted_where_it_runs_and_is_to_run() {
    let proven = entry(Intent::Run, true);
    let plan_of = |entry: &Entry, condition: Condition, nudge: Option<Nudge>| {
        let containers = [container("a", condition)];
        let job = plan(&Subject { hung: true, nudge, ..subject(entry, &containers) }, Instant::now());
        job.map(|job| (job.steps, job.goal))
    };
    assert_eq!(plan_of(&proven, running(), None), Some((vec![Step::Restart], Goal::Revived)));
    // Somebody else's restart waits until it answers; Docker's is left alone; what hasn't shown yet that it works is awaited.
    let asked = plan_of(&proven, running(), Some(Nudge::Restart));
    assert_eq!(asked, Some((vec![Step::Restart, Step::Await], Goal::Running)));
    let restarting = Condition::Restarting(Exit { code: 1, out_of_memory: false, error: String::new() });
    assert_eq!(plan_of(&proven, restarting, None), None);
    assert_eq!(plan_of(&entry(Intent::Run, false), running(), None), Some((vec![Step::Await], Goal::Running)));
    assert_eq!(plan_of(&entry(Intent::Stop, true), running(), None), Some((vec![Step::Stop], Goal::Stopped)));
}

#[test]
fn what_was_stopped_or_removed_behind_the_agents_back_is_put_right() {
    let proven = entry(Intent::Run, true);
    assert_eq!(steps(&subject(&proven, &[container("a", exited(0))])), [Step::Start, Step::Await]);
    assert_eq!(steps(&subject(&proven, &[])), [Step::Fetch, Step::Create, Step::Start, Step::Await]);
    let stopped = entry(Intent::Stop, true);
    assert_eq!(steps(&subject(&stopped, &[container("a", running())])), [Step::Stop]);
    assert_eq!(steps(&subject(&stopped, &[container("a", exited(0))])), []);
    assert_eq!(steps(&subject(&stopped, &[])), []);
}

#[test]
fn a_restart_policy_that_leaves_it_ended_is_kept_to_until_somebody_asks() {
    let mut proven = entry(Intent::Run, true);
    proven.spec.restart = RestartPolicy::Never;
    let mut ended = container("a", exited(0));
    ended.settings = Settings::of(&proven.spec);
    let ended = [ended];
    assert_eq!(steps(&subject(&proven, &ended)), []);
    let asked = Subject { nudge: Some(Nudge::Start), ..subject(&proven, &ended) };
    assert_eq!(steps(&asked), [Step::Start, Step::Await]);
}

#[test]
fn a_container_that_is_not_on_its_networks_is_made_anew_before_it_is_to_run() {
    let group = Link::Group("team".parse().unwrap());
    let mut wanted = entry(Intent::Run, true);
    wanted.spec.network.group = Some("team".parse().unwrap());
    let links = Link::all_of(&wanted.spec.network);
    let anew = [discard("a"), Step::Fetch, Step::Create, Step::Start, Step::Await];
    for condition in [Condition::Created, running(), exited(1)] {
        // As a crash between making it and connecting it leaves it; or somebody has removed the group's network.
        assert_eq!(steps(&subject(&wanted, &[container("a", condition.clone())])), anew, "{condition:?}");
        let mut whole = container("a", condition);
        whole.links = links.clone();
        assert!(!steps(&subject(&wanted, &[whole])).contains(&Step::Create));
    }
    // More than it may: somebody has connected it to the network that leads out.
    wanted.spec.network.egress = crate::instance::Egress::None;
    let mut wide = container("a", running());
    wide.links.insert(group.clone());
    assert_eq!(steps(&subject(&wanted, &[wide])), anew);
    // What only waits is left as it is.
    let mut stopped = wanted.clone();
    stopped.intent = Intent::Stop;
    assert_eq!(steps(&subject(&stopped, &[container("a", exited(0))])), []);
}

#[test]
fn a_container_of_another_spec_goes_before_the_new_one_comes() {
    let proven = entry(Intent::Run, true);
    let mut outdated = container("old", running());
    outdated.spec_hash = SpecHash::from_label("another");
    let planned = steps(&subject(&proven, &[outdated]));
    assert_eq!(planned, [discard("old"), Step::Fetch, Step::Create, Step::Start, Step::Await]);
}

#[test]
fn doubles_go_and_the_running_one_stays() {
    let proven = entry(Intent::Run, true);
    let both = [container("idle", exited(0)), container("live", running())];
    assert_eq!(steps(&subject(&proven, &both)), [discard("idle")]);
}

#[test]
fn a_failure_is_waited_out_unless_somebody_asks() {
    let proven = entry(Intent::Run, true);
    let now = Instant::now();
    let later = Some(now + Duration::from_secs(5));
    let failing = Subject { failing: true, not_before: later, ..subject(&proven, &[]) };
    assert_eq!(plan(&failing, now), None);
    assert!(plan(&failing, now + Duration::from_secs(5)).is_some());
    assert!(plan(&Subject { nudge: Some(Nudge::Start), ..failing }, now).is_some());
}

#[test]
fn undoing_a_deploy_takes_back_only_the_volumes_it_made() {
    let failure = Failure { kind: FailureKind::Refused, message: String::new(), log: Vec::new() };
    let mut undone = entry(Intent::Remove(Departure::Undone(failure)), false);
    undone.spec.volumes.push(crate::instance::Volume { name: "data".into(), path: "/data".into() });
    let planned = steps(&subject(&undone, &[container("a", running())]));
    assert_eq!(planned, [discard("a"), Step::RemoveVolumes(Volumes::OfDeployment(undone.deployment))]);
    let asked = entry(Intent::Remove(Departure::Asked { volumes: true, grace_seconds: None }), true);
    let planned = steps(&subject(&asked, &[container("a", running())]));
    let all = Step::RemoveVolumes(Volumes::OfInstance(asked.spec.name.clone()));
    assert_eq!(planned, [Step::Stop, discard("a"), all]);
}

#[path = "tests/mess.rs"]
mod mess;
