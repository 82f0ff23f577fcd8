//! A container engine in memory, strangers included, which can be told to fail, to hang and to be gone.

mod guests;
mod images;
mod inside;
mod others;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use dtma_api::InstanceName;
use dtma_api::instance::Progress;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use jiff::Timestamp;
use tokio::sync::{Notify, broadcast};
use tokio_stream::wrappers::BroadcastStream;

use crate::disks::{Disks, Reserve};
use crate::engine::{
    Attached, Condition, Container, ContainerId, Engine, EngineError, Exec, ExecError, Executed, Exit, HeldImage,
    Image, Link, LogLine, LogOptions, LogStream, Settings, Usage, Volumes, exact_ports,
};
use crate::instance::{
    DeploymentId, Environment, ImageReference, Limits, PortProtocol, RegistryCredentials, SessionOf, Spec,
};

/// What a container does once it is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    Stays,
    /// Ends at once; Docker's restart policy takes over.
    Exits,
}

#[derive(Debug, Clone)]
struct Held {
    container: Container,
    ours: bool,
    environment: BTreeMap<String, String>,
    image: String,
    ports: Vec<(u16, PortProtocol)>,
    volumes: Vec<String>,
}

/// Where the process that uses the engine dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Death {
    /// The call was sent and had no effect.
    Before,
    /// The call had its effect, and the answer was lost.
    After,
}

type Fault = Arc<dyn Fn() -> EngineError + Send + Sync>;

#[derive(Default)]
struct World {
    held: Vec<Held>,
    volumes: BTreeMap<String, (InstanceName, DeploymentId)>,
    images: BTreeMap<String, HeldImage>,
    registry: BTreeSet<String>,
    wanted: BTreeMap<String, String>,
    manner: BTreeMap<String, Manner>,
    faults: BTreeMap<&'static str, Fault>,
    hangs: BTreeSet<&'static str>,
    calls: Vec<String>,
    next: u32,
    death: Option<(usize, Death)>,
    changing: usize,
    forgets_adjustments: bool,
    /// Names taken by containers that are only being made.
    reserved: BTreeMap<String, DeploymentId>,
    /// Containers that somebody starts again as soon as they are stopped, once.
    revived: BTreeSet<String>,
}

pub(crate) struct FakeEngine {
    world: Mutex<World>,
    changed: broadcast::Sender<()>,
    /// As full as the images on it make it: 100 bytes large, and one byte of each image.
    pub(crate) disks: Arc<Disks>,
    filled: Arc<AtomicU64>,
    epoch: tokio::time::Instant,
    /// Lets what hangs go on.
    released: Notify,
    /// Rung when the point of death is reached.
    pub(crate) died: Notify,
}

const CHANGING: [&str; 10] = [
    "pull",
    "create",
    "create_for_session",
    "rename",
    "adjust",
    "start",
    "stop",
    "restart",
    "remove",
    "remove_volumes",
];

impl FakeEngine {
    pub(crate) fn new() -> Arc<Self> {
        let world = World {
            registry: ["registry.example/server:1", "registry.example/server:2"].map(str::to_owned).into(),
            ..World::default()
        };
        let (changed, epoch) = (broadcast::Sender::new(64), tokio::time::Instant::now());
        let filled = Arc::new(AtomicU64::new(0));
        let used = Arc::clone(&filled);
        let measure = move |_: &Path| Some((100, 100 - used.load(Ordering::Relaxed)));
        let disks = Arc::new(Disks::measured_by(Path::new("/state"), Reserve { bytes: 97, percent: 0 }, measure));
        Arc::new(Self {
            world: Mutex::new(world),
            changed,
            disks,
            filled,
            epoch,
            released: Notify::new(),
            died: Notify::new(),
        })
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// Every call of `verb` fails from now on.
    pub(crate) fn fail(&self, verb: &'static str, fault: impl Fn() -> EngineError + Send + Sync + 'static) {
        self.world().faults.insert(verb, Arc::new(fault));
    }

    pub(crate) fn heal(&self) {
        let mut world = self.world();
        world.faults.clear();
        world.hangs.clear();
    }

    /// Every call of `verb` never answers from now on.
    pub(crate) fn hang(&self, verb: &'static str) {
        self.world().hangs.insert(verb);
    }

    /// What hangs now goes on, and nothing hangs any more.
    pub(crate) fn release(&self) {
        self.world().hangs.clear();
        self.released.notify_waiters();
    }

    pub(crate) fn gone(&self) {
        for verb in ["version", "list", "inspect", "image", "images", "remove_image"].into_iter().chain(CHANGING) {
            self.fail(verb, || EngineError::Unavailable { operation: "answer", source: "it is gone".into() });
        }
    }

    /// The process dies at the changing call number `at`, counted from 0.
    pub(crate) fn die_at(&self, at: usize, death: Death) {
        let mut world = self.world();
        world.death = Some((at, death));
        world.changing = 0;
    }

    pub(crate) fn live(&self) {
        self.world().death = None;
    }

    pub(crate) fn manner(&self, name: &str, manner: Manner) {
        self.world().manner.insert(name.to_owned(), manner);
    }

    /// Says yes to every adjustment and makes none.
    pub(crate) fn forget_adjustments(&self) {
        self.world().forgets_adjustments = true;
    }

    /// As [`Self::manner`], for every container of an image.
    pub(crate) fn manner_of_image(&self, image: &str, manner: Manner) {
        self.world().manner.insert(image.to_owned(), manner);
    }

    /// Ours, those of sessions left out, by name: the condition's word.
    pub(crate) fn ours(&self) -> BTreeMap<String, &'static str> {
        let world = self.world();
        let ours = world.held.iter().filter(|held| held.ours && held.container.session.is_none());
        ours.map(|held| (held.container.name.clone(), held.container.condition.word())).collect()
    }

    pub(crate) fn strangers(&self) -> usize {
        self.world().held.iter().filter(|held| !held.ours).count()
    }

    pub(crate) fn volumes(&self) -> Vec<String> {
        self.world().volumes.keys().cloned().collect()
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.world().calls.clone()
    }

    /// What happens around every call.
    async fn call<T>(
        &self,
        verb: &'static str,
        on: &str,
        effect: impl FnOnce(&mut World) -> Result<T, EngineError> + Send,
    ) -> Result<T, EngineError> {
        let (hangs, fault, death) = {
            let mut world = self.world();
            world.calls.push(format!("{verb} {on}"));
            let changing = CHANGING.contains(&verb);
            let number = world.changing;
            world.changing += usize::from(changing);
            let death = world.death.filter(|(at, _)| changing && *at == number).map(|(_, death)| death);
            (world.hangs.contains(verb), world.faults.get(verb).cloned(), death)
        };
        // Gives others their turn, as a call over a socket does.
        tokio::task::yield_now().await;
        if hangs {
            self.released.notified().await;
        }
        if let Some(fault) = fault {
            return Err(fault());
        }
        if death == Some(Death::Before) {
            self.died.notify_one();
            return std::future::pending().await;
        }
        let result = effect(&mut self.world());
        if CHANGING.contains(&verb) {
            let _ = self.changed.send(());
        }
        if death == Some(Death::After) {
            self.died.notify_one();
            return std::future::pending().await;
        }
        result
    }
}

pub(crate) fn blank(id: String, name: &str) -> Container {
    Container {
        id: ContainerId(id),
        name: name.to_owned(),
        instance: None,
        session: None,
        spec_hash: crate::instance::SpecHash::from_label(""),
        spec_label: String::new(),
        deployment: None,
        settings: Settings { limits: Limits::default(), restart: None },
        created: 1,
        condition: Condition::Created,
        restart_count: 0,
        ports: Vec::new(),
        address: None,
        own_address: None,
        links: BTreeSet::new(),
    }
}

fn make(world: &mut World, spec: &Spec, deployment: DeploymentId) -> Held {
    world.next += 1;
    let mut told = spec.clone();
    let names = spec.process.environment.0.keys();
    told.process.environment = Environment(names.map(|name| (name.clone(), String::new())).collect());
    let volumes: Vec<String> = spec.volumes.iter().map(|volume| format!("{}.{}", spec.name, volume.name)).collect();
    for volume in &volumes {
        world.volumes.entry(volume.clone()).or_insert_with(|| (spec.name.clone(), deployment));
    }
    let container = Container {
        instance: Some(spec.name.clone()),
        spec_hash: spec.hash(),
        links: Link::all_of(&spec.network),
        spec_label: serde_json::to_string(&told).unwrap(),
        deployment: Some(deployment),
        settings: Settings::of(spec),
        ..blank(format!("container-{:03}", world.next), spec.name.as_str())
    };
    let ports = exact_ports(spec).collect();
    Held {
        container,
        ours: true,
        environment: spec.process.environment.0.clone(),
        image: spec.image.familiar(),
        ports,
        volumes,
    }
}

fn is_running(world: &mut World, id: &ContainerId) -> bool {
    let held = world.held.iter().find(|held| &held.container.id == id);
    held.is_some_and(|held| matches!(held.container.condition, Condition::Running { .. }))
}

fn gone(operation: &'static str) -> EngineError {
    EngineError::ContainerGone { operation }
}

fn start(world: &mut World, id: &ContainerId) -> Result<(), EngineError> {
    let held = world.held.iter().find(|held| &held.container.id == id).ok_or_else(|| gone("start"))?.clone();
    let busy = world.held.iter().filter(|other| other.container.id != *id).find_map(|other| {
        let running = matches!(other.container.condition, Condition::Running { .. });
        held.ports.iter().find(|port| running && other.ports.contains(port)).map(|(port, _)| *port)
    });
    if let Some(port) = busy {
        return Err(EngineError::PortTaken { port: Some(port) });
    }
    let manner = [&held.container.name, &held.image].into_iter().find_map(|of| world.manner.get(of).copied());
    let manner = manner.unwrap_or(Manner::Stays);
    world.next += 1;
    let since = Timestamp::from_second(world.next.into()).unwrap();
    let held = world.held.iter_mut().find(|held| &held.container.id == id).ok_or_else(|| gone("start"))?;
    held.container.condition = match manner {
        Manner::Stays => Condition::Running { since },
        Manner::Exits => Condition::Restarting(Exit { code: 3, out_of_memory: false, error: String::new() }),
    };
    held.container.address = Some(std::net::Ipv4Addr::new(172, 30, 0, 2).into());
    Ok(())
}

#[async_trait]
impl Engine for FakeEngine {
    async fn version(&self) -> Result<String, EngineError> {
        self.call("version", "", |_| Ok("fake".to_owned())).await
    }

    async fn list(&self) -> Result<Vec<Container>, EngineError> {
        let ours = |world: &mut World| {
            let ours = world.held.iter().filter(|held| held.ours);
            Ok(ours.map(|held| held.container.clone()).collect())
        };
        self.call("list", "", ours).await
    }

    async fn inspect(&self, id: &ContainerId) -> Result<Option<Container>, EngineError> {
        let found = |world: &mut World| {
            let found = world.held.iter().find(|held| &held.container.id == id || held.container.name == id.as_str());
            Ok(found.map(|held| held.container.clone()))
        };
        self.call("inspect", id.as_str(), found).await
    }

    async fn image(&self, image: &ImageReference) -> Result<Option<Image>, EngineError> {
        let found = |world: &mut World| {
            let found = world.images.get(&image.familiar());
            Ok(found.map(|found| Image { id: found.id.clone(), digest: Some("sha256:abc".to_owned()) }))
        };
        self.call("image", image.as_str(), found).await
    }

    async fn pull(
        &self,
        image: &ImageReference,
        credentials: Option<&RegistryCredentials>,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<(), EngineError> {
        let shown = images::shown(credentials);
        progress(Progress { current_bytes: 1, total_bytes: 2, ..Progress::default() });
        let pull = |world: &mut World| {
            if !world.registry.contains(image.as_str()) {
                return Err(EngineError::ImageNotFound { message: "manifest unknown".to_owned() });
            }
            if world.wanted.get(image.as_str()).is_some_and(|wanted| Some(wanted) != shown.as_ref()) {
                return Err(EngineError::PullDenied { message: "unauthorized".to_owned() });
            }
            let name = image.familiar();
            world.images.insert(name.clone(), images::image(&name));
            Ok(())
        };
        let pulled = self.call("pull", image.as_str(), pull).await;
        self.measure();
        pulled
    }

    async fn images(&self) -> Result<Vec<HeldImage>, EngineError> {
        self.call("images", "", |world| Ok(images::held(world))).await
    }

    async fn remove_image(&self, name: &str) -> Result<(), EngineError> {
        let remove = |world: &mut World| {
            assert!(!world.held.iter().any(|held| held.image == name), "an image in use was removed");
            world.images.remove(name);
            Ok(())
        };
        let removed = self.call("remove_image", name, remove).await;
        self.measure();
        removed
    }

    async fn data_root(&self) -> Result<Option<std::path::PathBuf>, EngineError> {
        Ok(Some("/docker".into()))
    }

    async fn create(&self, name: &str, spec: &Spec, deployment: &DeploymentId) -> Result<ContainerId, EngineError> {
        let create = |world: &mut World| {
            if let Some(making) = world.reserved.get_mut(name) {
                *making = *deployment;
                return Err(EngineError::NameTaken);
            }
            if world.held.iter().any(|held| held.container.name == name) {
                return Err(EngineError::NameTaken);
            }
            let mut held = make(world, spec, *deployment);
            name.clone_into(&mut held.container.name);
            let id = held.container.id.clone();
            world.held.push(held);
            Ok(id)
        };
        self.call("create", name, create).await
    }

    async fn create_for_session(
        &self,
        session: &SessionOf,
        spec: &Spec,
        deployment: &DeploymentId,
        like: &ContainerId,
    ) -> Result<ContainerId, EngineError> {
        self.created_for_session(session, spec, deployment, like).await
    }

    async fn rename(&self, id: &ContainerId, name: &str) -> Result<(), EngineError> {
        let rename = |world: &mut World| {
            if world.held.iter().any(|held| held.container.name == name && &held.container.id != id) {
                return Err(EngineError::NameTaken);
            }
            let held = world.held.iter_mut().find(|held| &held.container.id == id).ok_or_else(|| gone("rename"))?;
            name.clone_into(&mut held.container.name);
            Ok(())
        };
        self.call("rename", id.as_str(), rename).await
    }

    async fn adjust(&self, id: &ContainerId, spec: &Spec) -> Result<(), EngineError> {
        let adjust = |world: &mut World| {
            let held = world.held.iter_mut().find(|held| &held.container.id == id).ok_or_else(|| gone("adjust"))?;
            if !world.forgets_adjustments {
                held.container.settings = Settings::of(spec);
            }
            Ok(())
        };
        self.call("adjust", id.as_str(), adjust).await
    }

    async fn start(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.call("start", id.as_str(), |world| start(world, id)).await
    }

    async fn stop(&self, id: &ContainerId, _: u32) -> Result<(), EngineError> {
        let stop = |world: &mut World| {
            let held = world.held.iter_mut().find(|held| &held.container.id == id);
            if let Some(held) = held.filter(|held| !world.revived.remove(&held.container.name)) {
                let exit = Exit { code: 143, out_of_memory: false, error: String::new() };
                held.container.condition = Condition::Exited(exit);
                held.container.address = None;
            }
            Ok(())
        };
        self.call("stop", id.as_str(), stop).await
    }

    async fn restart(&self, id: &ContainerId, _: u32) -> Result<(), EngineError> {
        self.call("restart", id.as_str(), |world| start(world, id)).await
    }

    async fn next_exit(&self, id: &ContainerId) -> Result<i64, EngineError> {
        let exits = |world: &mut World| {
            let held = world.held.iter().find(|held| &held.container.id == id).ok_or_else(|| gone("wait"))?;
            Ok(matches!(held.container.condition, Condition::Restarting(_)))
        };
        if self.call("next_exit", id.as_str(), exits).await? { Ok(3) } else { std::future::pending().await }
    }

    async fn remove(&self, id: &ContainerId) -> Result<(), EngineError> {
        let remove = |world: &mut World| {
            assert!(!world.held.iter().any(|held| &held.container.id == id && !held.ours), "a stranger was removed");
            world.held.retain(|held| &held.container.id != id);
            Ok(())
        };
        self.call("remove", id.as_str(), remove).await
    }

    async fn remove_volumes(&self, which: &Volumes) -> Result<(), EngineError> {
        let remove = |world: &mut World| {
            let used: BTreeSet<String> = world.held.iter().flat_map(|held| held.volumes.clone()).collect();
            world.volumes.retain(|volume, (instance, deployment)| {
                let meant = match which {
                    Volumes::OfInstance(name) => instance == name,
                    Volumes::OfDeployment(id) => deployment == id,
                };
                !meant || used.contains(volume)
            });
            Ok(())
        };
        self.call("remove_volumes", "", remove).await
    }

    async fn egress_gateway(&self) -> Result<IpAddr, EngineError> {
        // Nobody's, so that nothing can listen there.
        self.call("egress_gateway", "", |_| Ok(IpAddr::from([192, 0, 2, 1]))).await
    }

    async fn port_holder(&self, port: u16, protocol: PortProtocol) -> Result<Option<String>, EngineError> {
        let holder = |world: &mut World| {
            let running =
                world.held.iter().filter(|held| matches!(held.container.condition, Condition::Running { .. }));
            let holder = running.into_iter().find(|held| held.ports.contains(&(port, protocol)));
            Ok(holder.map(|held| held.container.name.clone()))
        };
        self.call("port_holder", "", holder).await
    }

    async fn environment(&self, id: &ContainerId) -> Result<Vec<(String, String)>, EngineError> {
        let found = |world: &mut World| {
            let found = world.held.iter().find(|held| &held.container.id == id).ok_or_else(|| gone("inspect"))?;
            Ok(found.environment.clone().into_iter().collect())
        };
        self.call("environment", id.as_str(), found).await
    }

    async fn attach(&self, id: &ContainerId) -> Result<Attached, EngineError> {
        self.attached(id).await
    }

    async fn exec(&self, id: &ContainerId, exec: &Exec) -> Result<Executed, ExecError> {
        self.run(id, exec).await
    }

    async fn usage(&self, id: &ContainerId) -> Result<Option<Usage>, EngineError> {
        self.used_by(id).await
    }

    fn changes(&self) -> BoxStream<'static, Result<(), EngineError>> {
        // Falling behind is a change too.
        BroadcastStream::new(self.changed.subscribe()).map(|_| Ok(())).boxed()
    }

    fn logs(&self, _: &ContainerId, _: LogOptions) -> BoxStream<'static, Result<LogLine, EngineError>> {
        let line = LogLine { at: None, stream: LogStream::Stderr, message: "last words".to_owned() };
        stream::iter([Ok(line)]).boxed()
    }
}
