//! A cloud in memory that can be told to fail, to lag and to lose answers.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use dtma_provisioner::cloud::{
    ActionStatus, Cloud, CloudError, CreateError, CreateRequest, Created, Droplet, Power, Refusal,
};
use dtma_provisioner::environment::DropletId;
use jiff::Timestamp;
use secrecy::ExposeSecret;
use tokio::sync::{Notify, watch};

/// How the next create is answered; unless told otherwise it succeeds.
#[derive(Debug, Clone)]
pub(crate) enum Create {
    /// Refused with this status and sentence.
    Refuse(u16, &'static str),
    /// 429 with this Retry-After.
    RateLimit(Duration),
    /// Lost on the way there.
    LostBefore,
    /// Lost on the way back: the droplet exists.
    LostAfter,
    /// As `LostAfter`, and the droplet is in no list before this many lists were read.
    LostAfterAndLate(u32),
    /// Accepted, then the action fails and the droplet is gone.
    PlacementFails,
    /// Answered only once [`FakeCloud::release`] is called; then it succeeds.
    Held,
}

#[derive(Debug)]
struct Made {
    droplet: Droplet,
    looks_until_active: u32,
    lists_until_shown: u32,
}

#[derive(Default)]
struct World {
    droplets: BTreeMap<i64, Made>,
    last_id: i64,
    creates: VecDeque<Create>,
    ignored_deletes: u32,
    failing_deletes: u32,
    failing_looks: u32,
    lag: u32,
    never_active: bool,
    create_requests: Vec<Vec<String>>,
    user_data: Vec<String>,
    errored_actions: Vec<i64>,
}

pub(crate) struct FakeCloud {
    world: Mutex<World>,
    changed: watch::Sender<u64>,
    held: Notify,
    arrived: Notify,
}

impl Default for FakeCloud {
    fn default() -> Self {
        Self { world: Mutex::default(), changed: watch::channel(0).0, held: Notify::new(), arrived: Notify::new() }
    }
}

impl FakeCloud {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    fn changed(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(crate) fn next_creates(&self, creates: impl IntoIterator<Item = Create>) {
        self.world().creates.extend(creates);
    }

    pub(crate) fn ignore_deletes(&self, count: u32) {
        self.world().ignored_deletes = count;
    }

    pub(crate) fn fail_deletes(&self, count: u32) {
        self.world().failing_deletes = count;
    }

    pub(crate) fn fail_looks(&self, count: u32) {
        self.world().failing_looks = count;
    }

    /// New droplets are missing from this many lists.
    pub(crate) fn lists_lag(&self, lists: u32) {
        self.world().lag = lists;
    }

    pub(crate) fn never_active(&self) {
        self.world().never_active = true;
    }

    /// Lets one held create go on.
    pub(crate) fn release(&self) {
        self.held.notify_one();
    }

    /// Resolves when a held create has arrived.
    pub(crate) async fn create_arrived(&self) {
        self.arrived.notified().await;
    }

    pub(crate) fn add(&self, tags: &[String], lists_until_shown: u32) -> DropletId {
        let id = self.world().add(tags.to_vec(), lists_until_shown);
        self.changed();
        id
    }

    pub(crate) fn add_aged(&self, tags: &[String], age: Duration) -> DropletId {
        let id = self.add(tags, 0);
        let mut world = self.world();
        world.droplets.get_mut(&id.0).unwrap().droplet.created_at = Timestamp::now() - age;
        id
    }

    pub(crate) fn remove(&self, id: DropletId) {
        self.world().droplets.remove(&id.0);
        self.changed();
    }

    pub(crate) fn ids(&self) -> Vec<i64> {
        self.world().droplets.keys().copied().collect()
    }

    pub(crate) fn tagged_with(&self, tag: &str) -> Vec<i64> {
        let world = self.world();
        let tagged = world.droplets.values().filter(|made| made.droplet.tags.iter().any(|held| held == tag));
        tagged.map(|made| made.droplet.id.0).collect()
    }

    pub(crate) fn create_count(&self) -> usize {
        self.world().create_requests.len()
    }

    pub(crate) fn last_user_data(&self) -> String {
        self.world().user_data.last().cloned().unwrap()
    }
}

impl World {
    fn add(&mut self, tags: Vec<String>, lists_until_shown: u32) -> DropletId {
        self.last_id += 1;
        let id = DropletId(self.last_id);
        let droplet = Droplet { id, power: Power::New, public_ip: None, tags, created_at: Timestamp::now() };
        self.droplets.insert(id.0, Made { droplet, looks_until_active: 2, lists_until_shown });
        id
    }

    fn look(&mut self, id: i64) -> Option<Droplet> {
        let never = self.never_active;
        let made = self.droplets.get_mut(&id)?;
        made.looks_until_active = made.looks_until_active.saturating_sub(1);
        if made.looks_until_active == 0 && !never {
            made.droplet.power = Power::Active;
            made.droplet.public_ip = Some(Ipv4Addr::new(10, 0, 0, u8::try_from(id % 250).unwrap()));
        }
        Some(made.droplet.clone())
    }

    fn fails(&mut self, operation: &'static str) -> Result<(), CloudError> {
        if self.failing_looks == 0 {
            return Ok(());
        }
        self.failing_looks -= 1;
        Err(CloudError::Refused { operation, refusal: refusal(500, "server_error", "told to fail") })
    }
}

pub(crate) fn refusal(status: u16, id: &str, message: &str) -> Refusal {
    Refusal {
        status,
        id: id.to_owned(),
        message: message.to_owned(),
        request_id: Some("cloud-request-7".to_owned()),
        retry_after: None,
    }
}

#[async_trait]
impl Cloud for FakeCloud {
    async fn create(&self, request: &CreateRequest) -> Result<Created, CreateError> {
        let told = {
            let mut world = self.world();
            world.create_requests.push(request.tags.clone());
            world.user_data.push(request.user_data.expose_secret().to_owned());
            world.creates.pop_front()
        };
        let tags = request.tags.clone();
        let lost = || CreateError::Doubtful { reason: "connection reset".to_owned() };
        let made = match told {
            Some(Create::Refuse(status, message)) => {
                return Err(CreateError::Refused(refusal(status, "unprocessable_entity", message)));
            }
            Some(Create::RateLimit(wait)) => {
                let refusal = refusal(429, "too_many_requests", "API rate limit exceeded.");
                return Err(CreateError::RateLimited(Refusal { retry_after: Some(wait), ..refusal }));
            }
            Some(Create::LostBefore) => return Err(lost()),
            Some(Create::LostAfter) => {
                self.add(&tags, 0);
                return Err(lost());
            }
            Some(Create::LostAfterAndLate(lists)) => {
                self.add(&tags, lists);
                return Err(lost());
            }
            Some(Create::PlacementFails) => {
                let droplet = self.world().add(tags, 0);
                let mut world = self.world();
                world.droplets.remove(&droplet.0);
                world.errored_actions.push(1000 + droplet.0);
                droplet
            }
            Some(Create::Held) => {
                self.arrived.notify_one();
                self.held.notified().await;
                let lag = self.world().lag;
                self.world().add(tags, lag)
            }
            None => {
                let lag = self.world().lag;
                self.world().add(tags, lag)
            }
        };
        self.changed();
        Ok(Created { droplet: made, action: Some(1000 + made.0) })
    }

    async fn droplet(&self, id: DropletId) -> Result<Option<Droplet>, CloudError> {
        self.world().fails("droplets_get")?;
        Ok(self.world().look(id.0))
    }

    async fn tagged(&self, tag: &str) -> Result<Vec<Droplet>, CloudError> {
        let mut world = self.world();
        world.fails("droplets_list")?;
        let ids: Vec<i64> = world.droplets.keys().copied().collect();
        let mut shown = Vec::new();
        for id in ids {
            let made = world.droplets.get_mut(&id).unwrap();
            let hidden = made.lists_until_shown > 0;
            made.lists_until_shown = made.lists_until_shown.saturating_sub(1);
            if !hidden {
                shown.extend(world.look(id));
            }
        }
        // A real list is filtered by the cloud; strangers are thrown in, because nothing may depend on that.
        shown.retain(|droplet| droplet.tags.iter().any(|held| held == tag) || droplet.tags.is_empty());
        Ok(shown)
    }

    async fn action(&self, id: i64) -> Result<Option<ActionStatus>, CloudError> {
        let world = self.world();
        Ok(Some(if world.errored_actions.contains(&id) { ActionStatus::Errored } else { ActionStatus::Completed }))
    }

    async fn delete(&self, id: DropletId) -> Result<(), CloudError> {
        {
            let mut world = self.world();
            if world.failing_deletes > 0 {
                world.failing_deletes -= 1;
                return Err(CloudError::Refused {
                    operation: "droplets_destroy",
                    refusal: refusal(422, "unprocessable_entity", "Droplet already has a pending event."),
                });
            }
            if world.ignored_deletes > 0 {
                world.ignored_deletes -= 1;
                return Ok(());
            }
            world.droplets.remove(&id.0);
        }
        self.changed();
        Ok(())
    }
}
