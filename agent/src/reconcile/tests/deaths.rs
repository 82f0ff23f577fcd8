//! The agent dies at every call that changes anything, before and after its effect, and is started again.

use futures_util::future::BoxFuture;

use super::groups::plan;
use super::*;
use crate::instance::HealthGate;

/// The next version of `with_volume(text)`: another image, and a volume more.
fn next(text: &str) -> Spec {
    let mut spec = with_volume(text);
    spec.image = "registry.example/server:2".parse().unwrap();
    spec.volumes.push(Volume { name: "more".into(), path: "/more".into() });
    spec
}

/// What a caller does, and what must be there in the end whether or not the agent died in the middle.
struct Story {
    before: &'static [&'static str],
    act: fn(Instances) -> BoxFuture<'static, ()>,
    prepare: fn(&FakeEngine),
    after: &'static [(&'static str, &'static str)],
    volumes: usize,
}

const STORIES: [Story; 8] = [
    Story {
        before: &[],
        act: |instances| async move { drop(instances.deploy(with_volume("one"), WAIT).await) }.boxed(),
        prepare: |_| {},
        after: &[("one", "running")],
        volumes: 1,
    },
    Story {
        before: &["one"],
        act: |instances| async move { drop(instances.remove(&name("one"), true, WAIT).await) }.boxed(),
        prepare: |_| {},
        after: &[],
        volumes: 0,
    },
    Story {
        before: &[],
        act: |instances| async move { drop(instances.deploy(with_volume("one"), WAIT).await) }.boxed(),
        prepare: |engine| engine.manner("one", Manner::Exits),
        after: &[],
        volumes: 0,
    },
    Story {
        before: &["one"],
        act: |instances| {
            async move {
                drop(instances.stop(&name("one"), WAIT).await);
                drop(instances.start(&name("one"), WAIT).await);
                drop(instances.stop(&name("one"), WAIT).await);
            }
            .boxed()
        },
        prepare: |_| {},
        after: &[("one", "exited")],
        volumes: 1,
    },
    Story {
        before: &["one"],
        act: |instances| async move { drop(instances.update(next("one"), HealthGate::default(), WAIT).await) }.boxed(),
        prepare: |_| {},
        after: &[("one", "running")],
        volumes: 2,
    },
    Story {
        before: &["one"],
        act: |instances| async move { drop(instances.update(next("one"), HealthGate::default(), WAIT).await) }.boxed(),
        prepare: |engine| engine.manner_of_image("registry.example/server:2", Manner::Exits),
        after: &[("one", "running")],
        volumes: 1,
    },
    Story {
        before: &[],
        act: |instances| {
            async move { drop(instances.deploy_group(plan(&["one", "two"], &["two", "one"], true), WAIT).await) }
                .boxed()
        },
        prepare: |_| {},
        after: &[("one", "running"), ("two", "running")],
        volumes: 2,
    },
    Story {
        before: &[],
        act: |instances| {
            async move { drop(instances.deploy_group(plan(&["one:2", "two"], &["two", "one"], true), WAIT).await) }
                .boxed()
        },
        prepare: |engine| engine.manner_of_image("registry.example/server:2", Manner::Exits),
        after: &[],
        volumes: 0,
    },
];

#[tokio::test(start_paused = true)]
async fn death_at_any_call_leaves_it_done_or_undone_and_nothing_in_between() {
    for (number, story) in STORIES.iter().enumerate() {
        for death in [Death::Before, Death::After] {
            let mut at = 0;
            loop {
                let (engine, directory) = (FakeEngine::new(), tempfile::tempdir().unwrap());
                engine.stranger("stranger", None);
                let mut agent = Agent::start(&engine, directory.path());
                for one in story.before {
                    agent.instances.deploy(with_volume(one), WAIT).await.unwrap();
                }
                (story.prepare)(&engine);
                engine.die_at(at, death);
                let died = tokio::select! {
                    () = (story.act)(agent.instances.clone()) => false,
                    () = engine.died.notified() => true,
                };
                engine.live();
                if died {
                    agent.kill().await;
                    agent = Agent::start(&engine, directory.path());
                    // What the caller didn't get to say is said again; repeating is harmless.
                    if number == 3 {
                        (story.act)(agent.instances.clone()).await;
                    }
                }
                tokio::time::sleep(Duration::from_secs(1000)).await;
                let wanted: BTreeMap<String, &str> =
                    story.after.iter().map(|(name, word)| ((*name).to_owned(), *word)).collect();
                assert_eq!(engine.ours(), wanted, "story {number}, death {death:?} call {at}: {:?}", engine.calls());
                assert_eq!(engine.volumes().len(), story.volumes, "story {number}, death {death:?} call {at}");
                assert_eq!(agent.instances.list().len(), wanted.len(), "story {number}, death {death:?} call {at}");
                assert_eq!(engine.strangers(), 1);
                assert!(agent.instances.list().iter().all(|view| view.state != InstanceState::Updating));
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
