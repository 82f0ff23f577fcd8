//! From any mess, with any intent, plans lead to what is wanted and then to nothing more: over a model of an engine with strangers on it,
//! which also breaks off in the middle and refuses a name that is taken.

use std::collections::HashSet;

use super::*;
use crate::instance::{HealthGate, Volume};

/// More than any mess needs, however often it is broken off.
const ROUNDS: usize = 12;
const PRESENT: DeploymentId = DeploymentId(uuid::Uuid::from_u128(1));
const NEXT: DeploymentId = DeploymentId(uuid::Uuid::from_u128(2));
const ELSE: DeploymentId = DeploymentId(uuid::Uuid::from_u128(3));

/// What an engine holds, and what the ledger promises of one instance.
struct World {
    entry: Entry,
    ours: Vec<Container>,
    /// Ids and names of containers that aren't ours.
    strangers: Vec<(ContainerId, String)>,
    /// Volumes of the instance, by who made them.
    volumes: HashSet<(String, DeploymentId)>,
    made: u32,
    /// Its server hangs, until something about its process changes.
    hung: bool,
    gone: bool,
}

/// One container of a mess.
#[derive(Debug, Clone)]
struct Found {
    condition: Condition,
    spec: Kind,
    deployment: Option<DeploymentId>,
    settings_kept: bool,
    connected: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Present,
    Next,
    Older,
}

#[derive(Debug, Clone)]
struct Mess {
    intent: Intent,
    before: Intent,
    proven: bool,
    restart: RestartPolicy,
    update: Option<Course>,
    found: Vec<Found>,
    /// Which of them has the instance's name.
    named: Option<prop::sample::Index>,
    /// After how many steps each of the first jobs breaks off, if it does.
    breaks: Vec<Option<usize>>,
    update_works: bool,
    hung: bool,
}

fn failure() -> Failure {
    Failure { kind: FailureKind::NoSpace, message: String::new(), log: Vec::new() }
}

fn any_found() -> impl Strategy<Value = Found> {
    let restarting = Condition::Restarting(Exit { code: 1, out_of_memory: false, error: String::new() });
    let conditions = vec![
        Condition::Created,
        running(),
        Condition::Paused,
        restarting,
        exited(0),
        exited(1),
        Condition::Removing,
        Condition::Dead,
    ];
    let kinds = vec![Kind::Present, Kind::Present, Kind::Next, Kind::Older];
    let deployments = vec![None, Some(PRESENT), Some(PRESENT), Some(NEXT), Some(ELSE)];
    let select = (prop::sample::select(conditions), prop::sample::select(kinds), prop::sample::select(deployments));
    (select, any::<bool>(), prop::bool::weighted(0.8)).prop_map(
        |((condition, spec, deployment), settings_kept, connected)| Found {
            condition,
            spec,
            deployment,
            settings_kept,
            connected,
        },
    )
}

fn any_mess() -> impl Strategy<Value = Mess> {
    let asked = |volumes| Intent::Remove(Departure::Asked { volumes, grace_seconds: None });
    let intents = vec![
        Intent::Run,
        Intent::Run,
        Intent::Stop,
        asked(false),
        asked(true),
        Intent::Remove(Departure::Undone(failure())),
    ];
    let policies =
        vec![RestartPolicy::UnlessStopped, RestartPolicy::OnFailure { max_retries: 2 }, RestartPolicy::Never];
    let courses = vec![None, None, Some(Course::Forth), Some(Course::Back(failure()))];
    let wishes = (
        prop::sample::select(intents),
        prop::sample::select(vec![Intent::Run, Intent::Stop]),
        prop::sample::select(policies),
        prop::sample::select(courses),
    );
    let breaks = prop::collection::vec(prop::option::weighted(0.5, 0..5_usize), 0..4);
    let containers = (prop::collection::vec(any_found(), 0..6), prop::option::of(any::<prop::sample::Index>()));
    (wishes, any::<bool>(), containers, breaks, any::<(bool, bool)>()).prop_map(
        |((intent, before, restart, update), proven, (found, named), breaks, (update_works, hung))| {
            // As the handlers keep it: an update is of something that has run, and means to run; one that is taken back wants what was before.
            let intent = match (&update, &intent) {
                (_, Intent::Remove(_)) | (None, _) => intent,
                (Some(Course::Forth), _) => Intent::Run,
                (Some(Course::Back(_)), _) => before.clone(),
            };
            let undone = matches!(intent, Intent::Remove(Departure::Undone(_)));
            let update = update.filter(|_| !undone);
            let proven = (proven || update.is_some()) && !undone;
            Mess { intent, before, proven, restart, update, found, named, breaks, update_works, hung }
        },
    )
}

impl World {
    fn of(mess: &Mess) -> Self {
        let volume = |name: &str| Volume { name: name.to_owned(), path: format!("/{name}") };
        let mut present = entry(mess.intent.clone(), mess.proven);
        present.spec.restart = mess.restart;
        present.spec.volumes.push(volume("data"));
        present.spec_hash = present.spec.hash();
        present.deployment = PRESENT;
        let mut next = present.spec.clone();
        next.limits.pids = 7;
        next.volumes.push(volume("more"));
        if let Some(course) = &mess.update {
            present.update = Some(Box::new(Update {
                spec_hash: next.hash(),
                deployment: NEXT,
                gate: HealthGate::default(),
                before: mess.before.clone(),
                course: course.clone(),
                spec: next.clone(),
            }));
        }
        let named = mess.named.filter(|_| !mess.found.is_empty()).map(|index| index.index(mess.found.len()));
        let ours = mess.found.iter().enumerate().map(|(number, found)| {
            let mut one = container(&format!("found-{number}"), found.condition.clone());
            let spec = if found.spec == Kind::Next { &next } else { &present.spec };
            one.name = if named == Some(number) { "one".to_owned() } else { format!("mess-{number}") };
            one.spec_hash = if found.spec == Kind::Older { SpecHash::from_label("older") } else { spec.hash() };
            one.deployment = found.deployment;
            one.settings = Settings::of(spec);
            if !found.settings_kept {
                one.settings.limits.pids = 99_999;
            }
            if !found.connected {
                one.links.clear();
            }
            one
        });
        let ours: Vec<Container> = ours.collect();
        let strangers = ["two", "somebody-elses", "dtma-next-of-nobody"];
        let strangers = strangers.map(|name| (ContainerId(format!("stranger-{name}")), name.to_owned()));
        // Kept from an instance that had the name before, and what these versions have made so far.
        let mut volumes: HashSet<(String, DeploymentId)> = [("data".to_owned(), ELSE)].into();
        if mess.update.is_some() {
            volumes.insert(("more".to_owned(), NEXT));
        }
        Self { entry: present, ours, strangers: strangers.to_vec(), volumes, made: 0, hung: mess.hung, gone: false }
    }

    fn plan(&self) -> Option<Job> {
        plan(&Subject { hung: self.hung, ..subject(&self.entry, &self.ours) }, Instant::now())
    }

    fn is_taken(&self, name: &str) -> bool {
        self.ours
            .iter()
            .map(|container| &container.name)
            .chain(self.strangers.iter().map(|(_, name)| name))
            .any(|taken| taken == name)
    }

    /// A container of ours; a step that names any other is a mistake, a stranger's above all.
    fn of_ours(&mut self, id: Option<&ContainerId>) -> &mut Container {
        let id = id.expect("a step on a container that was never named");
        assert!(!self.strangers.iter().any(|(stranger, _)| stranger == id), "a stranger is named: {id:?}");
        let found = self.ours.iter_mut().find(|container| &container.id == id);
        found.expect("a step on a container that isn't there")
    }

    /// Does the steps up to `end`. Whether all of them could be done.
    fn perform(&mut self, job: &Job, end: usize) -> bool {
        let version = match job.edition {
            Edition::Present => self.entry.present(),
            Edition::Next => self.entry.next().expect("a next version is meant, and there is none"),
        };
        let (spec, hash, deployment) = (version.spec.clone(), version.spec_hash.clone(), version.deployment);
        let name = match job.edition {
            Edition::Present => "one".to_owned(),
            Edition::Next => format!("dtma-next-{}", deployment.0),
        };
        let mut target = job.container.clone();
        for step in job.steps.iter().take(end) {
            match step {
                Step::Discard(id) => {
                    let removed = self.of_ours(Some(id)).id.clone();
                    self.ours.retain(|container| container.id != removed);
                }
                Step::Create if self.is_taken(&name) => {
                    // Docker is still removing it; then it can only be tried again.
                    let removing =
                        |container: &Container| container.condition == Condition::Removing && container.name == name;
                    assert!(self.ours.iter().any(removing), "{name} is made while it is still there");
                    return false;
                }
                Step::Create => {
                    self.made += 1;
                    let mut made = container(&format!("made-{}", self.made), Condition::Created);
                    (made.name, made.spec_hash, made.deployment) = (name.clone(), hash.clone(), Some(deployment));
                    made.settings = Settings::of(&spec);
                    target = Some(made.id.clone());
                    self.ours.push(made);
                    for volume in &spec.volumes {
                        if !self.volumes.iter().any(|(there, _)| there == &volume.name) {
                            self.volumes.insert((volume.name.clone(), deployment));
                        }
                    }
                }
                Step::Start | Step::Restart => {
                    self.of_ours(target.as_ref()).condition = running();
                    self.hung = false;
                }
                Step::Stop => self.of_ours(target.as_ref()).condition = exited(143),
                Step::Retire(id) => self.of_ours(Some(id)).condition = exited(143),
                Step::Rename if self.is_taken("one") => {
                    let removing =
                        |container: &Container| container.condition == Condition::Removing && container.name == "one";
                    assert!(self.ours.iter().any(removing), "renamed to a name that is taken");
                    return false;
                }
                Step::Rename => "one".clone_into(&mut self.of_ours(target.as_ref()).name),
                Step::Adjust => self.of_ours(target.as_ref()).settings = Settings::of(&spec),
                Step::Await => {
                    let awaited = self.of_ours(target.as_ref());
                    assert!(is_lively(awaited), "{awaited:?} is awaited");
                }
                Step::RemoveVolumes(Volumes::OfInstance(name)) => {
                    assert_eq!(name.as_str(), "one");
                    self.volumes.clear();
                }
                Step::RemoveVolumes(Volumes::OfDeployment(which)) => {
                    self.volumes.retain(|(_, made_by)| made_by != which)
                }
                Step::Fetch => {}
            }
        }
        end >= job.steps.len()
    }

    /// What follows when a job has reached its goal.
    fn reached(&mut self, job: &Job, update_works: bool) {
        let now = Timestamp::UNIX_EPOCH;
        match job.goal {
            Goal::Running => self.entry.proven = true,
            Goal::Updated if update_works => self.entry.take_over(None, now),
            Goal::Updated => self.entry.turn_back(failure()),
            Goal::Reverted => self.entry.settle_back(now),
            Goal::Gone => self.gone = true,
            Goal::Revived => {
                assert!(self.entry.proven && self.entry.intent == Intent::Run && self.entry.update.is_none())
            }
            Goal::Stopped | Goal::Tidy => {}
        }
    }

    /// Docker gets done with what it was removing.
    fn pass_time(&mut self) {
        self.ours.retain(|container| container.condition != Condition::Removing);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn plans_lead_from_any_mess_to_what_is_wanted_and_then_to_nothing(mess in any_mess()) {
        let mut world = World::of(&mess);
        let asked = world.entry.intent.clone();
        let mut breaks = mess.breaks.iter().copied();
        let mut rounds = 0;
        while !world.gone {
            let Some(job) = world.plan() else {
                if world.ours.iter().any(|container| container.condition == Condition::Removing) {
                    world.pass_time();
                    continue;
                }
                break;
            };
            rounds += 1;
            prop_assert!(rounds <= ROUNDS, "no end to it: {job:?} with {:?}", world.ours);
            let end = breaks.next().flatten().unwrap_or(usize::MAX);
            if world.perform(&job, end) {
                world.reached(&job, mess.update_works);
            }
            world.pass_time();
        }

        let entry = &world.entry;
        match &entry.intent {
            Intent::Remove(departure) => {
                prop_assert!(world.gone && world.ours.is_empty(), "{:?} is left", world.ours);
                let kept = |name: &str, by| world.volumes.contains(&(name.to_owned(), by));
                match departure {
                    Departure::Asked { volumes: true, .. } => prop_assert!(world.volumes.is_empty()),
                    Departure::Asked { .. } | Departure::Undone(_) => {
                        prop_assert!(kept("data", ELSE), "what was there before is gone");
                        prop_assert!(!kept("more", NEXT), "what a version had that never served is left");
                    }
                }
            }
            wanted @ (Intent::Run | Intent::Stop) => {
                prop_assert!(entry.update.is_none(), "the update has no end");
                let works = asked == Intent::Run && mess.update == Some(Course::Forth) && mess.update_works;
                prop_assert_eq!(entry.deployment, if works { NEXT } else { PRESENT });
                prop_assert_eq!(world.volumes.contains(&("more".to_owned(), NEXT)), works);
                if mess.update.is_some() && !works {
                    prop_assert_eq!(wanted, &mess.before);
                }
                let current = current(entry, &world.ours);
                prop_assert_eq!(world.ours.len(), usize::from(current.is_some()), "there is more than the instance: {:?}", world.ours);
                if let Some(container) = current {
                    prop_assert_eq!(&container.name, "one");
                    prop_assert_eq!(&container.settings, &Settings::of(&entry.spec));
                }
                let runs = current.is_some_and(is_lively);
                let left_ended = entry.spec.restart != RestartPolicy::UnlessStopped
                    && current.is_some_and(|container| matches!(container.condition, Condition::Exited(_)));
                match wanted {
                    Intent::Run => prop_assert!(runs || left_ended, "it doesn't run: {:?}", current),
                    _ => prop_assert!(!runs, "it runs"),
                }
            }
        }
    }
}
