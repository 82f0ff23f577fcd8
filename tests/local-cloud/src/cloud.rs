//! The cloud itself: accepts what is asked for in the ledger at once, carries it out on the host in the background.
//!
//! One thing at a time is done to a droplet, in the order it was accepted. Knows nothing of HTTP.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures_util::StreamExt as _;
use jiff::Timestamp;
use tokio::sync::Mutex as AsyncMutex;
use tokio_util::task::TaskTracker;

use crate::action::{Action, ActionId, ActionKind, Progress};
use crate::droplet::{Droplet, DropletId, Lag, Refusal, Status};
use crate::host::{Attachment, Host, HostError, Power, Record, Vitals};
use crate::ledger::{Filter, Ledger, OverLimit};
use crate::order::Order;

/// Until a host that couldn't tell any more what droplets do is asked again.
const FOLLOW_AGAIN: Duration = Duration::from_secs(1);

/// What tells the time: the system, or a test.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// How the cloud behaves.
#[derive(Clone)]
pub struct CloudOptions {
    /// Droplets the account may have.
    pub droplet_limit: usize,
    /// How far what is shown lags behind.
    pub lag: Lag,
    /// What tells the time.
    pub clock: Clock,
}

/// Why an action was not taken on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ActError {
    /// No such droplet.
    #[error("there is no such droplet")]
    Unknown,
    /// Not in its present state.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// The cloud. Cheap to clone.
#[derive(Clone)]
pub struct Cloud(Arc<Inner>);

struct Inner {
    host: Arc<dyn Host>,
    ledger: Mutex<Ledger>,
    /// Held while something is done to a droplet.
    busy: Mutex<HashMap<DropletId, Arc<AsyncMutex<()>>>>,
    clock: Clock,
    tasks: TaskTracker,
}

impl Cloud {
    /// A cloud with the droplets its host has.
    ///
    /// # Errors
    /// When the host doesn't say which.
    pub async fn start(host: Arc<dyn Host>, options: CloudOptions) -> Result<Self, HostError> {
        let found = host.found().await?;
        let ledger = Ledger::new(found, options.droplet_limit, options.lag, (options.clock)());
        let cloud = Self(Arc::new(Inner {
            host,
            ledger: Mutex::new(ledger),
            busy: Mutex::default(),
            clock: options.clock,
            tasks: TaskTracker::new(),
        }));
        tokio::spawn(follow(Arc::downgrade(&cloud.0)));
        Ok(cloud)
    }

    /// Now.
    pub fn now(&self) -> Timestamp {
        (self.0.clock)()
    }

    /// What the cloud knows. Not to be held over anything slow.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // A panic while it was held can only have happened between two complete changes.
        self.0.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends when everything accepted is carried out.
    pub async fn settled(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
        self.0.tasks.reopen();
    }

    /// Accepts an order and begins to carry it out. With `no_room` the droplets are accepted and then found no place for.
    ///
    /// # Errors
    /// When the account would have too many droplets.
    pub fn create(&self, order: &Order, no_room: bool) -> Result<Vec<(Droplet, Action)>, OverLimit> {
        let accepted = self.ledger().accept(order, self.now())?;
        let no_room = no_room || order.is_unplaceable();
        for (droplet, action) in &accepted {
            let (cloud, record, action) = (self.clone(), droplet.record.clone(), action.id);
            let user_data = order.user_data.clone();
            // Taken before anything else can be asked of it, so that a delete waits for the creation to be over.
            let turn = self.turn(record.id).try_lock_owned().ok();
            self.0.tasks.spawn(async move {
                let _turn = turn;
                cloud.carry_out_creation(record, user_data, action, no_room).await;
            });
        }
        Ok(accepted)
    }

    async fn carry_out_creation(&self, record: Record, user_data: Option<String>, action: ActionId, no_room: bool) {
        let placed = if no_room { None } else { self.place(&record, user_data.as_deref()).await };
        let now = self.now();
        let mut ledger = self.ledger();
        if let Some(address) = placed {
            let lag = ledger.lag();
            if let Some(droplet) = ledger.droplet_mut(record.id) {
                droplet.placed(address, lag, now);
            }
            ledger.close(action, Progress::Completed(now));
        } else {
            ledger.forget(record.id);
            ledger.close(action, Progress::Errored(now));
        }
    }

    async fn place(&self, record: &Record, user_data: Option<&str>) -> Option<Ipv4Addr> {
        match self.0.host.create(record, user_data).await {
            Ok(address) => {
                tracing::info!(droplet = %record.id, name = record.name, %address, "a droplet runs");
                Some(address)
            }
            Err(error) => {
                report(&error);
                None
            }
        }
    }

    /// Accepts a deletion and begins to carry it out: false when there is no such droplet. Until it is carried out the droplet is
    /// still shown.
    pub fn delete(&self, id: DropletId) -> bool {
        let Some(first) = self.ledger().droplet_mut(id).map(Droplet::doom) else { return false };
        if first {
            let cloud = self.clone();
            self.0.tasks.spawn(async move { cloud.carry_out_deletion(id).await });
        }
        true
    }

    /// Accepts the deletion of every droplet with that tag, whether lists show it yet or not.
    pub fn delete_tagged(&self, tag: &str) {
        let tagged: Vec<_> =
            self.ledger().all(&Filter::Tag(tag.to_owned())).into_iter().map(|droplet| droplet.record.id).collect();
        for id in tagged {
            self.delete(id);
        }
    }

    async fn carry_out_deletion(&self, id: DropletId) {
        let _turn = self.turn(id).lock_owned().await;
        match self.0.host.remove(id).await {
            Ok(()) => {
                self.ledger().forget(id);
                self.locked_turns().remove(&id);
                tracing::info!(droplet = %id, "a droplet is gone");
            }
            Err(error) => {
                report(&error);
                if let Some(droplet) = self.ledger().droplet_mut(id) {
                    droplet.reprieve();
                }
            }
        }
    }

    /// Accepts an action and begins to carry it out.
    ///
    /// # Errors
    /// When there is no such droplet, or it can't take the action now.
    pub fn act(&self, id: DropletId, kind: ActionKind) -> Result<Action, ActError> {
        let now = self.now();
        let action = {
            let mut ledger = self.ledger();
            let number = ledger.next_action_id();
            let droplet = ledger.droplet_mut(id).ok_or(ActError::Unknown)?;
            droplet.begin(kind, number)?;
            let region = droplet.record.region.clone();
            ledger.note(kind, id, region, now)
        };
        let (cloud, number) = (self.clone(), action.id);
        self.0.tasks.spawn(async move { cloud.carry_out_action(id, kind, number).await });
        Ok(action)
    }

    async fn carry_out_action(&self, id: DropletId, kind: ActionKind, action: ActionId) {
        let steps: &[Power] = match kind {
            ActionKind::Create => &[],
            ActionKind::PowerOn => &[Power::On],
            ActionKind::PowerOff => &[Power::Cut],
            ActionKind::PowerCycle => &[Power::Cut, Power::On],
            ActionKind::Shutdown => &[Power::Shutdown],
            ActionKind::Reboot => &[Power::Shutdown, Power::On],
        };
        let result = self.change_power(id, steps).await;
        let now = self.now();
        let mut ledger = self.ledger();
        ledger.close(action, if result.is_ok() { Progress::Completed(now) } else { Progress::Errored(now) });
        if let Some(droplet) = ledger.droplet_mut(id) {
            droplet.settled();
        }
        if let Err(error) = &result {
            report(error);
        }
    }

    /// Takes a droplet through changes of its power and returns when they are done.
    ///
    /// # Errors
    /// When the host can't carry one out; the ones after it are left.
    pub async fn change_power(&self, id: DropletId, steps: &[Power]) -> Result<(), HostError> {
        let _turn = self.turn(id).lock_owned().await;
        for step in steps {
            self.0.host.power(id, *step).await?;
            if let Some(droplet) = self.ledger().droplet_mut(id) {
                droplet.powered(*step == Power::On);
            }
        }
        Ok(())
    }

    /// Takes note of what a droplet has done by itself: one that ended to reboot is started again, one that powered itself off is off.
    async fn attend(&self, id: DropletId) {
        // Gone, going, or coming: whoever is at that knows.
        if self.ledger().droplet(id).is_none() {
            return;
        }
        let _turn = self.turn(id).lock_owned().await;
        let Some(status) = self.ledger().droplet(id).map(Droplet::status) else { return };
        let attended = match (status, self.0.host.vitals(id).await) {
            (Status::Active, Ok(Vitals::Rebooting)) => {
                tracing::info!(droplet = %id, "a droplet reboots by itself");
                self.0.host.power(id, Power::On).await
            }
            (Status::Active | Status::Off, Ok(vitals)) => {
                if let Some(droplet) = self.ledger().droplet_mut(id) {
                    droplet.powered(vitals == Vitals::Running);
                }
                Ok(())
            }
            (Status::New, Ok(_)) => Ok(()),
            (_, Err(error)) => Err(error),
        };
        if let Err(error) = attended {
            report(&error);
        }
    }

    /// Has the host keep the tags a droplet has now.
    pub fn keep_tags(&self, id: DropletId) {
        let cloud = self.clone();
        self.0.tasks.spawn(async move {
            let _turn = cloud.turn(id).lock_owned().await;
            let Some(tags) = cloud.ledger().droplet(id).map(|droplet| droplet.record.tags.clone()) else { return };
            if let Err(error) = cloud.0.host.keep_tags(id, &tags).await {
                report(&error);
            }
        });
    }

    /// Plugs a droplet's network cable in or pulls it.
    ///
    /// # Errors
    /// When the host can't.
    pub async fn connect(&self, id: DropletId, connected: bool) -> Result<(), HostError> {
        let _turn = self.turn(id).lock_owned().await;
        self.0.host.connect(id, connected).await
    }

    /// What a droplet wrote on its console.
    ///
    /// # Errors
    /// When the host can't tell.
    pub async fn console(&self, id: DropletId) -> Result<String, HostError> {
        self.0.host.console(id).await
    }

    /// The droplet that has this address, however long lists and its own view still keep it back.
    pub async fn droplet_at(&self, address: Ipv4Addr) -> Option<DropletId> {
        self.0.host.droplet_at(address).await
    }

    /// How a droplet is attached, and what it was given.
    ///
    /// # Errors
    /// When the host can't tell.
    pub async fn attachment(&self, id: DropletId) -> Result<Attachment, HostError> {
        self.0.host.attachment(id).await
    }

    /// Name by which a person finds the droplet on the host.
    pub fn container_name(&self, id: DropletId) -> String {
        self.0.host.container_name(id)
    }

    fn turn(&self, id: DropletId) -> Arc<AsyncMutex<()>> {
        Arc::clone(self.locked_turns().entry(id).or_default())
    }

    fn locked_turns(&self) -> MutexGuard<'_, HashMap<DropletId, Arc<AsyncMutex<()>>>> {
        self.0.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Attends to droplets for as long as there is a cloud.
async fn follow(cloud: Weak<Inner>) {
    let Some(host) = cloud.upgrade().map(|inner| Arc::clone(&inner.host)) else { return };
    loop {
        let mut stirrings = host.stirrings();
        let attend = |id| {
            let cloud = Cloud(cloud.upgrade()?);
            let attending = cloud.clone();
            cloud.0.tasks.spawn(async move { attending.attend(id).await });
            Some(())
        };
        // What has happened while nobody followed.
        let Some(all) = cloud.upgrade().map(|inner| Cloud(inner).ledger().ids()) else { return };
        for id in all {
            attend(id);
        }
        while let Some(id) = stirrings.next().await {
            if attend(id).is_none() {
                return;
            }
        }
        tokio::time::sleep(FOLLOW_AGAIN).await;
    }
}

fn report(error: &HostError) {
    tracing::error!(error = %error, source = %error.source, "the host failed");
}
