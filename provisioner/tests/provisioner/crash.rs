//! Every moment at which the process may die: the database and the cloud as the crash leaves them, then a new start. Whatever the moment,
//! an environment that is wanted ends with exactly one droplet, and one that isn't with none.

use std::sync::Arc;
use std::time::Duration;

use dtma_api::EnvironmentId;
use dtma_api::environment::{EnvironmentEvent, EnvironmentStatus};
use dtma_provisioner::environment::{
    Attempt, Cleanup, DropletId, Environment, Placement, Progress, RunningDroplet, State, after, attempt_tag,
    environment_tag, plain_error,
};
use jiff::Timestamp;
use uuid::Uuid;

use super::fake_cloud::FakeCloud;
use super::rig::{FLEET_TAG, Rig, Wishes, a_token, spec};

struct Scene {
    id: EnvironmentId,
    attempt: Attempt,
    cloud: Arc<FakeCloud>,
    now: Timestamp,
}

impl Scene {
    fn new() -> Self {
        let now = Timestamp::now();
        let attempt = Attempt {
            id: Uuid::new_v4(),
            number: 1,
            started_at: now,
            run_started_at: now,
            deadline: after(now, Duration::from_secs(600)),
            token_hash: a_token().hash(),
            token_expires_at: after(now, Duration::from_secs(600)),
        };
        Self { id: EnvironmentId(Uuid::now_v7()), attempt, cloud: Arc::default(), now }
    }

    fn tags(&self) -> Vec<String> {
        vec![FLEET_TAG.to_owned(), environment_tag(self.id), attempt_tag(self.attempt.id)]
    }

    /// The droplet of the attempt, in no list before `lists` were read.
    fn droplet(&self, lists: u32) -> DropletId {
        self.cloud.add(&self.tags(), lists)
    }

    fn provisioning(&self, placement: Placement) -> State {
        State::Provisioning { attempt: self.attempt.clone(), placement, progress: Progress::default() }
    }

    async fn restart(&self, state: State) -> Rig {
        let mut environment = Environment::new(self.id, "account".parse().unwrap(), spec(), self.now);
        environment.state = state;
        let event = EnvironmentEvent {
            at: self.now,
            status: environment.state.status(),
            phase: None,
            message: "before the crash".to_owned(),
        };
        // A stranger that must survive everything.
        self.cloud.add(&[], 0);
        let wishes = Wishes { cloud: Arc::clone(&self.cloud), ..Wishes::default() };
        Rig::with(wishes, async |store| store.insert(&environment, &event).await.unwrap()).await
    }

    fn ours(cloud: &FakeCloud, stranger: i64) -> Vec<i64> {
        cloud.ids().into_iter().filter(|id| *id != stranger).collect()
    }

    async fn ends_with_one(&self, state: State, creates: usize, what: &str) -> i64 {
        let before = self.cloud.ids().len();
        let rig = self.restart(state).await;
        let stranger = i64::try_from(before).unwrap() + 1;
        let environment = rig
            .until("account", |environment, cloud| {
                environment.state.status() == EnvironmentStatus::AwaitingHeartbeat
                    && Self::ours(cloud, stranger).len() == 1
            })
            .await;
        let droplet = environment.state.droplet().unwrap().0;
        assert_eq!(Self::ours(&rig.cloud, stranger), [droplet], "{what}");
        assert_eq!(rig.cloud.create_count(), creates, "{what}");
        assert!(rig.cloud.ids().contains(&stranger), "{what}");
        droplet
    }

    async fn ends_with_none(&self, state: State, what: &str) {
        let stranger = i64::try_from(self.cloud.ids().len()).unwrap() + 1;
        let rig = self.restart(state).await;
        rig.until_status("account", EnvironmentStatus::Deprovisioned).await;
        assert_eq!(rig.cloud.ids(), [stranger], "{what}");
        assert_eq!(rig.cloud.create_count(), 0, "{what}");
    }
}

#[tokio::test]
async fn after_the_wish_was_written() {
    let scene = Scene::new();
    scene.ends_with_one(State::wanted(scene.now), 1, "wanted").await;
}

#[tokio::test]
async fn after_the_intent_was_written_and_before_the_cloud_was_asked() {
    let scene = Scene::new();
    scene.ends_with_one(scene.provisioning(Placement::Asked), 1, "asked, not sent").await;
}

#[tokio::test]
async fn after_the_cloud_made_the_droplet_and_before_its_answer_was_written() {
    for lists in [0, 1, 5] {
        let scene = Scene::new();
        let droplet = scene.droplet(lists);
        let kept = scene.ends_with_one(scene.provisioning(Placement::Asked), 0, "asked, made").await;
        assert_eq!(kept, droplet.0);
    }
}

#[tokio::test]
async fn while_a_lost_answer_is_looked_into() {
    let scene = Scene::new();
    let droplet = scene.droplet(1);
    let doubtful = scene.provisioning(Placement::Doubtful { since: scene.now });
    assert_eq!(scene.ends_with_one(doubtful, 0, "doubtful, made").await, droplet.0);

    let scene = Scene::new();
    let doubtful = scene.provisioning(Placement::Doubtful { since: scene.now });
    scene.ends_with_one(doubtful, 1, "doubtful, not made").await;
}

#[tokio::test]
async fn after_the_droplets_id_was_written() {
    let scene = Scene::new();
    let droplet = scene.droplet(3);
    let placed = scene.provisioning(Placement::Placed { droplet, action: Some(7) });
    assert_eq!(scene.ends_with_one(placed, 0, "placed").await, droplet.0);
}

#[tokio::test]
async fn after_the_droplet_failed_to_be_placed() {
    let scene = Scene::new();
    let placed = scene.provisioning(Placement::Placed { droplet: DropletId(4711), action: Some(7) });
    scene.ends_with_one(placed, 1, "placed, vanished").await;
}

#[tokio::test]
async fn before_what_a_failed_try_left_was_deleted() {
    let scene = Scene::new();
    let old = scene.droplet(0);
    let leftover = Some(Cleanup::of(old));
    let state = State::PendingProvision { tries: 1, since: scene.now, not_before: None, last_error: None, leftover };
    assert_ne!(scene.ends_with_one(state, 1, "leftover").await, old.0);
}

#[tokio::test]
async fn after_a_new_try_was_begun_while_the_old_droplet_comes_late() {
    let scene = Scene::new();
    // Of an attempt the row no longer knows.
    let mut tags = scene.tags();
    tags[2] = attempt_tag(Uuid::new_v4());
    let late = scene.cloud.add(&tags, 2);
    let kept = scene.ends_with_one(scene.provisioning(Placement::Asked), 1, "superseded").await;
    assert_ne!(kept, late.0);
}

#[tokio::test]
async fn while_the_droplet_boots() {
    let scene = Scene::new();
    let droplet = scene.droplet(0);
    let state = State::AwaitingHeartbeat {
        attempt: scene.attempt.clone(),
        droplet: RunningDroplet { id: droplet, ip: [10, 0, 0, 9].into() },
        progress: Progress::default(),
    };
    assert_eq!(scene.ends_with_one(state, 0, "booting").await, droplet.0);
}

#[tokio::test]
async fn after_each_step_of_deleting() {
    let scene = Scene::new();
    let droplet = scene.droplet(0);
    scene.ends_with_none(State::PendingDeprovision { cleanup: Cleanup::of(droplet) }, "wish").await;

    let scene = Scene::new();
    let droplet = scene.droplet(0);
    let asked = Cleanup { delete_asked_at: Some(scene.now), ..Cleanup::of(droplet) };
    let going = |cleanup| State::Deprovisioning { since: scene.now, cleanup, failures: 0 };
    scene.ends_with_none(going(asked), "asked, without effect").await;

    let scene = Scene::new();
    let asked = Cleanup { delete_asked_at: Some(scene.now), ..Cleanup::of(DropletId(4711)) };
    let going = State::Deprovisioning { since: scene.now, cleanup: asked, failures: 0 };
    scene.ends_with_none(going, "asked, gone, not written").await;

    let scene = Scene::new();
    let droplet = scene.droplet(0);
    let failed = State::ErrorDeprovisioning {
        error: plain_error("cloud_refused", "no", scene.now),
        cleanup: Cleanup::of(droplet),
        retry_at: scene.now,
        failures: 3,
    };
    scene.ends_with_none(failed, "failed before").await;
}

#[tokio::test]
async fn after_a_delete_whose_create_was_never_answered() {
    for lists in [0, 4] {
        let scene = Scene::new();
        scene.droplet(lists);
        let cleanup = Cleanup { doubtful_since: Some(scene.now), ..Cleanup::default() };
        scene.ends_with_none(State::PendingDeprovision { cleanup }, "doubtful, made").await;
    }
    let scene = Scene::new();
    let cleanup = Cleanup { doubtful_since: Some(scene.now), ..Cleanup::default() };
    scene.ends_with_none(State::PendingDeprovision { cleanup }, "doubtful, not made").await;
}

#[tokio::test]
async fn a_second_droplet_with_the_environments_tag_goes_with_it() {
    let scene = Scene::new();
    let droplet = scene.droplet(0);
    let mut tags = scene.tags();
    tags[2] = attempt_tag(Uuid::new_v4());
    scene.cloud.add(&tags, 0);
    scene.ends_with_none(State::PendingDeprovision { cleanup: Cleanup::of(droplet) }, "two").await;
}
