//! Secrets: where they are and where they aren't, what a reboot takes, and what is fetched when.

use std::collections::BTreeSet;
use std::sync::Mutex;

use super::*;
use crate::engine::Engine as _;
use crate::instance::{Confidential, HealthGate, SecretForm, SecretSources, SecretValues};
use crate::store::vault::Vault;

/// In place of memory, which not every machine that tests has for everybody.
pub(super) fn vault(directory: &Path) -> Vault {
    Vault::new(&directory.join("secrets"), "main", true)
}

/// A backend that has what it is told to have.
#[derive(Default)]
pub(super) struct Backend {
    has: Mutex<Option<(SecretValues, Option<Duration>)>>,
    asked: Mutex<Vec<SecretsWanted>>,
}

impl Backend {
    fn has(&self, values: &[(&str, &str)], lifetime: Option<Duration>) {
        *self.has.lock().unwrap() = Some((self::values(values), lifetime));
    }

    fn is_down(&self) {
        *self.has.lock().unwrap() = None;
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

#[async_trait]
impl SecretSource for Backend {
    async fn fetch(&self, wanted: &SecretsWanted) -> Result<FetchedSecrets, NoSecrets> {
        self.asked.lock().unwrap().push(wanted.clone());
        let has = self.has.lock().unwrap().clone();
        let (values, lifetime) = has.ok_or_else(|| NoSecrets { reason: "nobody there".to_owned() })?;
        let expires_at = lifetime.map(|lifetime| Timestamp::now() + lifetime);
        Ok(FetchedSecrets { values, expires_at })
    }
}

fn values(all: &[(&str, &str)]) -> SecretValues {
    SecretValues(all.iter().map(|(name, value)| (name.parse().unwrap(), (*value).to_owned().into())).collect())
}

fn given(all: &[(&str, &str)]) -> Confidential {
    Confidential { registry: None, secrets: values(all) }
}

/// An instance whose `KEY` comes with its deploy.
fn with_key(text: &str) -> Spec {
    let secrets = SecretSources { given: [("KEY".parse().unwrap())].into(), ..SecretSources::default() };
    Spec { secrets, ..examples::spec(text) }
}

/// An instance that has what the backend has.
fn fetching(text: &str, form: SecretForm) -> Spec {
    let secrets = SecretSources { from_backend: true, form, ..SecretSources::default() };
    Spec { secrets, ..examples::spec(text) }
}

/// Every file of secrets there is, by name; of whichever instance.
fn kept(directory: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for place in std::fs::read_dir(directory.join("secrets/main")).into_iter().flatten() {
        for file in std::fs::read_dir(place.unwrap().path().join("files")).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            found.insert(name, std::fs::read_to_string(path).unwrap());
        }
    }
    found
}

fn keeps(directory: &Path, all: &[(&str, &str)]) {
    let all: BTreeMap<_, _> = all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    assert_eq!(kept(directory), all);
}

/// The droplet is restarted: what is in memory is gone, and Docker can't start what needs it.
async fn reboot(agent: Agent, engine: &Arc<FakeEngine>, directory: &Path, source: &Arc<Backend>) -> Agent {
    agent.kill().await;
    std::fs::remove_dir_all(directory.join("secrets")).unwrap();
    for name in engine.ours().into_keys() {
        let exit = Exit { code: 127, out_of_memory: false, error: "no such file or directory".to_owned() };
        engine.meddle(&name, |container| container.condition = Condition::Exited(exit));
    }
    Agent::start_with(engine, directory, Arc::clone(source))
}

fn starts(engine: &FakeEngine) -> usize {
    engine.calls().iter().filter(|call| call.starts_with("start ") || call.starts_with("restart ")).count()
}

#[tokio::test(start_paused = true)]
async fn a_value_is_in_the_vault_and_nowhere_else_and_goes_with_its_instance() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy_with(with_key("one"), given(&[("KEY", "hunter2")]), WAIT).await.unwrap();
    keeps(directory.path(), &[("KEY", "hunter2")]);
    let ledger = std::fs::read_to_string(directory.path().join("ledger.json")).unwrap();
    let (events, _) = agent.instances.events_with_history();
    let snapshot = agent.instances.snapshot();
    let told = format!(
        "{ledger} {events:?} {} {:?} {:?}",
        serde_json::to_string(&snapshot.instances).unwrap(),
        engine.list().await.unwrap(),
        agent.instances.get(&name("one"))
    );
    assert!(told.contains("KEY") && !told.contains("hunter2"), "{told}");
    agent.instances.remove(&name("one"), false, WAIT).await.unwrap();
    keeps(directory.path(), &[]);
    assert_eq!(std::fs::read_dir(directory.path().join("secrets/main")).unwrap().count(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_same_deploy_with_another_value_replaces_it_where_the_instance_is() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    let first = agent.instances.deploy_with(with_key("one"), given(&[("KEY", "1")]), WAIT).await.unwrap();
    let again = agent.instances.deploy_with(with_key("one"), given(&[("KEY", "2")]), WAIT).await.unwrap();
    assert!(!again.created && again.view.container_id == first.view.container_id);
    keeps(directory.path(), &[("KEY", "2")]);
    assert_eq!(starts(&engine), 1, "files need no new process");
    let gate = HealthGate::default();
    agent.instances.update_with(with_key("one"), gate, given(&[("KEY", "3")]), WAIT).await.unwrap();
    keeps(directory.path(), &[("KEY", "3")]);

    // A server that finds it in its environment has to be started anew, and only for another value.
    let mut two = with_key("two");
    two.secrets.form = SecretForm::Environment;
    agent.instances.deploy_with(two.clone(), given(&[("KEY", "3")]), WAIT).await.unwrap();
    assert_eq!(starts(&engine), 2);
    for (value, expected) in [("3", 2), ("4", 3)] {
        agent.instances.deploy_with(two.clone(), given(&[("KEY", value)]), WAIT).await.unwrap();
        agent.until(|snapshot| state_in(snapshot, "two") == Some(InstanceState::Running)).await;
        assert_eq!(starts(&engine), expected, "{value}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_agents_own_restart_loses_nothing_and_the_droplets_says_what_to_do() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let source = Arc::new(Backend::default());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy_with(with_key("one"), given(&[("KEY", "1")]), WAIT).await.unwrap();
    agent.kill().await;
    let agent = Agent::start(&engine, directory.path());
    agent.instances.restart(&name("one"), WAIT).await.unwrap();
    keeps(directory.path(), &[("KEY", "1")]);

    let agent = reboot(agent, &engine, directory.path(), &source).await;
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::NeedsSecrets)).await;
    let view = agent.instances.get(&name("one")).unwrap();
    assert_eq!(view.status_on_toolbox, InstallationStatus::PendingConfig);
    let error = view.error.unwrap();
    assert!(error.contains("KEY") && error.contains("secrets included"), "{error}");
    let refused = agent.instances.start(&name("one"), WAIT).await;
    assert!(matches!(&refused, Err(Rejection::Failed(failure)) if failure.kind == FailureKind::NeedsSecrets));
    assert_eq!(engine.ours()["one"], "exited", "nothing was started without them");

    let again = agent.instances.deploy_with(with_key("one"), given(&[("KEY", "2")]), WAIT).await.unwrap();
    assert_eq!((again.created, again.view.state), (false, InstanceState::Running));
    keeps(directory.path(), &[("KEY", "2")]);
}

#[tokio::test(start_paused = true)]
async fn what_the_backend_has_is_fetched_before_the_start_also_after_a_reboot() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let source = Arc::new(Backend::default());
    let agent = Agent::start_with(&engine, directory.path(), Arc::clone(&source));
    let spec = fetching("one", SecretForm::Files);
    let denied = failure(agent.instances.deploy(spec.clone(), WAIT).await);
    assert_eq!(denied.kind, FailureKind::SecretsUnavailable);
    assert!(denied.message.contains("nobody there"), "{}", denied.message);
    assert!(
        engine.ours().is_empty() && !engine.calls().iter().any(|call| call.starts_with("pull")),
        "nothing was begun"
    );

    source.has(&[("TOKEN", "1")], None);
    agent.instances.deploy(spec, WAIT).await.unwrap();
    keeps(directory.path(), &[("TOKEN", "1")]);
    let asked = source.asked.lock().unwrap().last().cloned().unwrap();
    assert_eq!((asked.account_tool_instance_id.as_str(), asked.all), ("id-one", true));

    source.is_down();
    let agent = reboot(agent, &engine, directory.path(), &source).await;
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::NeedsSecrets)).await;
    source.has(&[("TOKEN", "2")], None);
    // By itself, when the backend is there again.
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    keeps(directory.path(), &[("TOKEN", "2")]);
}

#[tokio::test(start_paused = true)]
async fn what_expires_is_fetched_again_before_and_kept_while_that_fails() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let source = Arc::new(Backend::default());
    let hour = Duration::from_secs(3600);
    source.has(&[("TOKEN", "1"), ("OLD", "1")], Some(hour));
    let agent = Agent::start_with(&engine, directory.path(), Arc::clone(&source));
    agent.instances.deploy(fetching("one", SecretForm::Files), WAIT).await.unwrap();
    source.has(&[("TOKEN", "2")], Some(hour));
    tokio::time::sleep(hour * 4 / 5 - Duration::from_secs(5)).await;
    assert_eq!(source.asked(), 1, "not too early");
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(source.asked(), 2);
    keeps(directory.path(), &[("TOKEN", "2")]);
    assert_eq!(starts(&engine), 1);

    source.is_down();
    tokio::time::sleep(hour).await;
    assert!((3..30).contains(&source.asked()), "with growing pauses: {}", source.asked());
    keeps(directory.path(), &[("TOKEN", "2")]);
    let view = agent.instances.get(&name("one")).unwrap();
    assert_eq!(view.state, InstanceState::Running);
    assert!(view.health_reason.unwrap().contains("nobody there"));
    assert!(agent.events("one").contains(&"secrets_refresh_failed".to_owned()));

    source.has(&[("TOKEN", "3")], Some(hour));
    tokio::time::sleep(Duration::from_secs(301)).await;
    keeps(directory.path(), &[("TOKEN", "3")]);
    assert_eq!(agent.instances.get(&name("one")).unwrap().health_reason, None);

    // Another process knows when they expire, too.
    let asked = source.asked();
    agent.kill().await;
    let _agent = Agent::start_with(&engine, directory.path(), Arc::clone(&source));
    tokio::time::sleep(hour / 2).await;
    assert_eq!(source.asked(), asked);
    tokio::time::sleep(hour / 2).await;
    assert_eq!(source.asked(), asked + 1);
}

#[tokio::test(start_paused = true)]
async fn a_server_with_secrets_in_its_environment_is_started_anew_when_one_has_changed() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let source = Arc::new(Backend::default());
    source.has(&[("TOKEN", "1")], None);
    let agent = Agent::start_with(&engine, directory.path(), Arc::clone(&source));
    agent.instances.deploy(fetching("one", SecretForm::Environment), WAIT).await.unwrap();
    let same = agent.instances.refresh_secrets(&name("one")).await.unwrap();
    assert_eq!((same.changed, same.restarting), (false, false));
    assert_eq!(starts(&engine), 1);
    source.has(&[("TOKEN", "2"), ("MORE", "x")], None);
    let other = agent.instances.refresh_secrets(&name("one")).await.unwrap();
    assert_eq!(
        (other.changed, other.restarting, other.secrets),
        (true, true, vec!["MORE".to_owned(), "TOKEN".to_owned()])
    );
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(starts(&engine), 2);
    assert_eq!(agent.state("one"), Some(InstanceState::Running));

    // What can't be fetched stays.
    source.is_down();
    let refused = agent.instances.refresh_secrets(&name("one")).await;
    assert!(matches!(&refused, Err(Rejection::Failed(failure)) if failure.kind == FailureKind::SecretsUnavailable));
    keeps(directory.path(), &[("MORE", "x"), ("TOKEN", "2")]);
    agent.instances.deploy_with(with_key("two"), given(&[("KEY", "1")]), WAIT).await.unwrap();
    let refused = agent.instances.refresh_secrets(&name("two")).await;
    assert!(matches!(refused, Err(Rejection::NothingToFetch(_))));
    assert!(matches!(agent.instances.refresh_secrets(&name("three")).await, Err(Rejection::NotFound(_))));
}

#[tokio::test(start_paused = true)]
async fn an_update_has_values_of_its_own_until_it_is_known_which_version_stays() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy_with(with_key("one"), given(&[("KEY", "old")]), WAIT).await.unwrap();
    let mut next = with_key("one");
    next.image = "registry.example/server:2".parse().unwrap();
    engine.manner_of_image("registry.example/server:2", Manner::Exits);
    let gate = HealthGate::default();
    let failed = agent.instances.update_with(next.clone(), gate, given(&[("KEY", "new")]), WAIT).await;
    assert!(matches!(failed, Err(Rejection::RolledBack { .. })), "{failed:?}");
    keeps(directory.path(), &[("KEY", "old")]);
    engine.manner_of_image("registry.example/server:2", Manner::Stays);
    agent.instances.update_with(next, gate, given(&[("KEY", "new")]), WAIT).await.unwrap();
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    keeps(directory.path(), &[("KEY", "new")]);
}

/// The agent dies, or its disk is full, when an update's values are there and its intent isn't written yet.
#[tokio::test(start_paused = true)]
async fn the_values_of_an_update_are_there_before_it_is_written_down_and_go_if_it_never_is() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&engine, directory.path());
    agent.instances.deploy_with(with_key("one"), given(&[("KEY", "old")]), WAIT).await.unwrap();
    let next = Spec { image: "registry.example/server:2".parse().unwrap(), ..with_key("one") };
    let gate = HealthGate::default();
    // Where values can't be kept, nothing is written down: they come first.
    let (folder, away) = (directory.path().join("secrets/main"), directory.path().join("away"));
    let ledger = || std::fs::read(directory.path().join("ledger.json")).unwrap();
    let before = ledger();
    std::fs::rename(&folder, &away).unwrap();
    std::fs::write(&folder, "").unwrap();
    let refused = agent.instances.update_with(next.clone(), gate, given(&[("KEY", "new")]), WAIT).await;
    assert!(matches!(refused, Err(Rejection::Vault(_))), "{refused:?}");
    assert_eq!(ledger(), before);
    std::fs::remove_file(&folder).unwrap();
    std::fs::rename(&away, &folder).unwrap();

    // Nothing can be written where this is.
    std::fs::create_dir(directory.path().join("ledger.json.new")).unwrap();
    let refused = agent.instances.update_with(next.clone(), gate, given(&[("KEY", "new")]), WAIT).await;
    assert!(matches!(refused, Err(Rejection::Ledger(_))), "{refused:?}");
    let folders = || std::fs::read_dir(&folder).unwrap().count();
    agent.kill().await;
    std::fs::remove_dir(directory.path().join("ledger.json.new")).unwrap();
    let agent = Agent::start(&engine, directory.path());
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    keeps(directory.path(), &[("KEY", "old")]);
    assert_eq!(folders(), 1);
    agent.instances.update_with(next, gate, given(&[("KEY", "new")]), WAIT).await.unwrap();
    agent.until(|snapshot| state_in(snapshot, "one") == Some(InstanceState::Running)).await;
    keeps(directory.path(), &[("KEY", "new")]);
}

#[tokio::test(start_paused = true)]
async fn without_a_place_in_memory_nothing_is_accepted() {
    let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
    // A file where the folder would be.
    std::fs::write(directory.path().join("secrets"), "").unwrap();
    let agent = Agent::start(&engine, directory.path());
    let refused = agent.instances.deploy_with(with_key("one"), given(&[("KEY", "1")]), WAIT).await;
    assert!(matches!(refused, Err(Rejection::Vault(_))), "{refused:?}");
    assert!(agent.instances.list().is_empty() && engine.ours().is_empty());
    agent.instances.deploy(examples::spec("two"), WAIT).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn death_at_any_call_leaves_the_values_that_are_needed_and_no_others() {
    type Act = fn(Instances) -> futures_util::future::BoxFuture<'static, ()>;
    let deploy: Act = |instances| {
        async move { drop(instances.deploy_with(with_key("one"), given(&[("KEY", "1")]), WAIT).await) }.boxed()
    };
    let update: Act = |instances| {
        async move {
            let next = Spec { image: "registry.example/server:2".parse().unwrap(), ..with_key("one") };
            drop(instances.update_with(next, HealthGate::default(), given(&[("KEY", "2")]), WAIT).await);
        }
        .boxed()
    };
    let remove: Act = |instances| async move { drop(instances.remove(&name("one"), true, WAIT).await) }.boxed();
    for (number, (act, after)) in [(deploy, Some("1")), (update, Some("2")), (remove, None)].into_iter().enumerate() {
        for death in [Death::Before, Death::After] {
            let mut at = 0;
            loop {
                let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
                let mut agent = Agent::start(&engine, directory.path());
                if number > 0 {
                    agent.instances.deploy_with(with_key("one"), given(&[("KEY", "1")]), WAIT).await.unwrap();
                }
                engine.die_at(at, death);
                let died = tokio::select! {
                    () = act(agent.instances.clone()) => false,
                    () = engine.died.notified() => true,
                };
                engine.live();
                if died {
                    agent.kill().await;
                    agent = Agent::start(&engine, directory.path());
                }
                tokio::time::sleep(Duration::from_secs(1000)).await;
                let expected: Vec<(&str, &str)> = after.map(|value| ("KEY", value)).into_iter().collect();
                keeps(directory.path(), &expected);
                let folders = std::fs::read_dir(directory.path().join("secrets/main")).unwrap().count();
                assert_eq!(folders, expected.len(), "story {number}, death {death:?} call {at}");
                let states: BTreeSet<&str> = engine.ours().into_values().collect();
                assert_eq!(states, after.map(|_| "running").into_iter().collect(), "story {number} {death:?} {at}");
                agent.kill().await;
                if !died {
                    break;
                }
                at += 1;
            }
            assert!(at >= 2, "story {number} made only {at} calls");
        }
    }
}
