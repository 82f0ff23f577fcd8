//! Many accounts at once, on a cloud that is as slow and as sparing as a real one, forty times faster.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use dtma_api::environment::EnvironmentStatus;
use dtma_provisioner::cloud::{ActionStatus, Cloud, CloudError, CreateError, CreateRequest, Created, Droplet, Power};
use dtma_provisioner::environment::{DropletId, State};
use dtma_provisioner::reconcile::Pace;
use jiff::Timestamp;
use tokio::time::{Instant, sleep_until, timeout};

use super::rig::{Rig, Wishes};

const FASTER: u32 = 40;
const ACCOUNTS: usize = 200;

fn scaled(real: Duration) -> Duration {
    real / FASTER
}

struct Made {
    tags: Vec<String>,
    created_at: Timestamp,
    begun: Instant,
}

/// One allowance of four requests a second, answers that take 200 ms, droplets up after 10 s and in lists after 2.
#[derive(Default)]
struct SlowCloud {
    droplets: Mutex<BTreeMap<i64, Made>>,
    next_turn: Mutex<Option<Instant>>,
    asked: Mutex<BTreeMap<&'static str, usize>>,
    creating: Mutex<(usize, usize)>,
}

impl SlowCloud {
    async fn turn(&self, operation: &'static str) {
        *self.asked.lock().unwrap().entry(operation).or_default() += 1;
        let at = {
            let mut next = self.next_turn.lock().unwrap();
            let at = next.unwrap_or_else(Instant::now).max(Instant::now());
            *next = Some(at + scaled(Duration::from_millis(250)));
            at
        };
        sleep_until(at + scaled(Duration::from_millis(200))).await;
    }

    fn shown(id: i64, made: &Made) -> Droplet {
        let up = made.begun.elapsed() >= scaled(Duration::from_secs(10));
        let address = [10, 0, u8::try_from(id / 250).unwrap(), u8::try_from(id % 250).unwrap()];
        Droplet {
            id: DropletId(id),
            power: if up { Power::Active } else { Power::New },
            public_ip: up.then(|| address.into()),
            tags: made.tags.clone(),
            created_at: made.created_at,
        }
    }
}

#[async_trait]
impl Cloud for SlowCloud {
    async fn create(&self, request: &CreateRequest) -> Result<Created, CreateError> {
        {
            let mut creating = self.creating.lock().unwrap();
            creating.0 += 1;
            creating.1 = creating.1.max(creating.0);
        }
        self.turn("create").await;
        self.creating.lock().unwrap().0 -= 1;
        let mut droplets = self.droplets.lock().unwrap();
        let id = i64::try_from(droplets.len()).unwrap() + 1;
        droplets.insert(id, Made { tags: request.tags.clone(), created_at: Timestamp::now(), begun: Instant::now() });
        Ok(Created { droplet: DropletId(id), action: Some(id) })
    }

    async fn droplet(&self, id: DropletId) -> Result<Option<Droplet>, CloudError> {
        self.turn("get").await;
        Ok(self.droplets.lock().unwrap().get(&id.0).map(|made| Self::shown(id.0, made)))
    }

    async fn tagged(&self, tag: &str) -> Result<Vec<Droplet>, CloudError> {
        self.turn("list").await;
        let droplets = self.droplets.lock().unwrap();
        let listed = droplets.iter().filter(|(_, made)| {
            made.begun.elapsed() >= scaled(Duration::from_secs(2)) && made.tags.iter().any(|held| held == tag)
        });
        Ok(listed.map(|(id, made)| Self::shown(*id, made)).collect())
    }

    async fn action(&self, _: i64) -> Result<Option<ActionStatus>, CloudError> {
        self.turn("action").await;
        Ok(Some(ActionStatus::Completed))
    }

    async fn delete(&self, id: DropletId) -> Result<(), CloudError> {
        self.turn("delete").await;
        self.droplets.lock().unwrap().remove(&id.0);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_accounts_at_once_cost_the_cloud_little_more_than_their_creates() {
    let cloud = Arc::new(SlowCloud::default());
    let usual = Pace::default();
    let pace = Pace {
        first_look: scaled(usual.first_look),
        slowest_look: scaled(usual.slowest_look),
        crowd_look: scaled(usual.crowd_look),
        tick: scaled(usual.tick),
        sweep: scaled(usual.sweep),
        unresponsive_after: usual.unresponsive_after,
    };
    let wishes = Wishes { pace, ..Wishes::default() };
    let rig = Arc::new(Rig::on(Arc::clone(&cloud) as Arc<dyn Cloud>, wishes, async |_| {}).await);
    let begun = Instant::now();
    let asking: Vec<_> = (0..ACCOUNTS)
        .map(|number| {
            let rig = Arc::clone(&rig);
            tokio::spawn(async move { rig.ensure(&format!("agent-{number}"), 0).await.0 })
        })
        .collect();
    for asked in asking {
        assert_eq!(asked.await.unwrap(), 202);
    }
    let answered = begun.elapsed();
    let counted = async {
        loop {
            let counts = rig.store.counts().await.unwrap();
            if counts.get(EnvironmentStatus::AwaitingHeartbeat.as_str()) == Some(&(ACCOUNTS as u64)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = timeout(Duration::from_secs(60), counted).await;
    let counts = rig.store.counts().await.unwrap();
    assert!(waited.is_ok(), "{counts:?} {:?}", cloud.asked.lock().unwrap());
    let asked = cloud.asked.lock().unwrap().clone();
    let took = begun.elapsed() * FASTER;
    println!("answered after {answered:?}, up after {took:?} of the real cloud's time, requests {asked:?}");

    assert_eq!((cloud.droplets.lock().unwrap().len(), asked["create"]), (ACCOUNTS, ACCOUNTS), "one each");
    assert!(cloud.creating.lock().unwrap().1 <= 10);
    // Nobody's deadline ran while it waited for its turn.
    for environment in rig.store.live().await.unwrap() {
        let State::AwaitingHeartbeat { attempt, .. } = environment.state else { panic!("{environment:?}") };
        assert_eq!(attempt.number, 1);
    }
    // Lists come by the clock, however long this machine takes. One request for each droplet beside its create is what the limit allows.
    let one_by_one = ["get", "action"].into_iter().filter_map(|operation| asked.get(operation)).sum::<usize>();
    assert!(one_by_one <= 3 * ACCOUNTS / 2, "an action each, and hardly a get: {asked:?}");
}
