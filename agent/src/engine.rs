//! The seam to the container engine: the few verbs the loop needs, in the agent's own words.
//!
//! Owns the observed side of an instance (its containers as the engine shows them) and the reasons why the engine refuses. The one real
//! adapter is [`docker`]; nothing else may name its library.

mod attach;
pub mod docker;
mod exec;
mod usage;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;

use async_trait::async_trait;
use dtma_api::instance::{PortView, Progress};
pub use dtma_api::output::OutputStream as LogStream;
use dtma_api::{GroupId, InstanceName};
use futures_util::stream::BoxStream;
use jiff::Timestamp;

pub use self::attach::Attached;
pub use self::exec::{Exec, ExecEnd, ExecError, Executed, Kept};
pub use self::usage::Usage;
use crate::instance::{
    DeploymentId, Egress, HostPort, ImageReference, Limits, Network, PortProtocol, RegistryCredentials, RestartPolicy,
    SessionOf, Spec, SpecHash,
};

/// What the agent asks of a container engine. Every verb is safe to repeat, except `create`, which answers
/// [`EngineError::NameTaken`] the second time. All act on containers of this agent only.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// The engine's version, which also shows that it answers.
    async fn version(&self) -> Result<String, EngineError>;

    /// Every container bearing this agent's labels, whatever its state.
    async fn list(&self) -> Result<Vec<Container>, EngineError>;

    /// One container; `None` when it is gone.
    async fn inspect(&self, id: &ContainerId) -> Result<Option<Container>, EngineError>;

    /// Says whether the image is there without asking a registry; its digest where it came from one.
    async fn image(&self, image: &ImageReference) -> Result<Option<Image>, EngineError>;

    /// Asks the registry for the image. `progress` is told about every change, at most a few times a second, and how it ended up.
    async fn pull(
        &self,
        image: &ImageReference,
        credentials: Option<&RegistryCredentials>,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<(), EngineError>;

    /// Every image on the host, strangers' too.
    async fn images(&self) -> Result<Vec<HeldImage>, EngineError>;

    /// Takes a tag or a digest off an image, which removes it with its last one, or removes the image without any that has this id. Refused
    /// while any container is made from it. Repeating it is a success.
    async fn remove_image(&self, name: &str) -> Result<(), EngineError>;

    /// The folder on this host where the engine keeps images and volumes; `None` when it is on another host.
    async fn data_root(&self) -> Result<Option<PathBuf>, EngineError>;

    /// Makes the container called `name`, not started. Volumes and the networks it needs are made on the way. Dying in between
    /// may leave a container that isn't on all of them: see [`Container::links`].
    async fn create(&self, name: &str, spec: &Spec, deployment: &DeploymentId) -> Result<ContainerId, EngineError>;

    /// Makes, not started, the container of one session of an instance: from the image that the container `like` is made from, to `spec`, but
    /// without ports, without a name in the instance's group, and never started again by the engine. It bears no label by which it could be
    /// taken for the instance's own container.
    async fn create_for_session(
        &self,
        session: &SessionOf,
        spec: &Spec,
        deployment: &DeploymentId,
        like: &ContainerId,
    ) -> Result<ContainerId, EngineError>;

    /// Gives it another name; [`EngineError::NameTaken`] when another container has it.
    async fn rename(&self, id: &ContainerId, name: &str) -> Result<(), EngineError>;

    /// Gives it the limits and the restart policy of `spec` while it goes on running.
    async fn adjust(&self, id: &ContainerId, spec: &Spec) -> Result<(), EngineError>;

    /// Starts it, or wakes it when its process is frozen; starting a running container is a success.
    async fn start(&self, id: &ContainerId) -> Result<(), EngineError>;

    /// Asks it to end, and ends it by force when it hasn't within `grace_seconds`. Stopping a stopped or absent container is a success.
    async fn stop(&self, id: &ContainerId, grace_seconds: u32) -> Result<(), EngineError>;

    /// Stop and start in one call, so that the engine finishes it even when the agent dies meanwhile.
    async fn restart(&self, id: &ContainerId, grace_seconds: u32) -> Result<(), EngineError>;

    /// Answers when its process next ends, with its exit code; however soon the engine starts it again.
    async fn next_exit(&self, id: &ContainerId) -> Result<i64, EngineError>;

    /// Removes it by force, its anonymous volumes and network endpoints with it, and its group's network if it was the last one there.
    /// Removing an absent container is a success.
    async fn remove(&self, id: &ContainerId) -> Result<(), EngineError>;

    /// Removes named volumes.
    async fn remove_volumes(&self, which: &Volumes) -> Result<(), EngineError>;

    /// The host's address on the network of instances whose egress is a list, which is made if it isn't there.
    async fn egress_gateway(&self) -> Result<IpAddr, EngineError>;

    /// Name of the container, anybody's, that publishes this port on the host; `None` when none does.
    async fn port_holder(&self, port: u16, protocol: PortProtocol) -> Result<Option<String>, EngineError>;

    /// Environment of a container as it was created, for putting a lost ledger together again.
    async fn environment(&self, id: &ContainerId) -> Result<Vec<(String, String)>, EngineError>;

    /// Runs a command inside the container, beside its server, and waits for its end. Dropping the future leaves the command alone.
    async fn exec(&self, id: &ContainerId, exec: &Exec) -> Result<Executed, ExecError>;

    /// Attaches to the container's process, which has to run and to have an open standard input. Whoever is attached already stays so.
    async fn attach(&self, id: &ContainerId) -> Result<Attached, EngineError>;

    /// What the container has used, answered at once; `None` when it doesn't run, or the engine has no figures of it.
    async fn usage(&self, id: &ContainerId) -> Result<Option<Usage>, EngineError>;

    /// One item for each change of a container of this agent; says that something changed, not what. Ends with an error when the
    /// engine goes away.
    fn changes(&self) -> BoxStream<'static, Result<(), EngineError>>;

    /// A container's output, oldest line first.
    fn logs(&self, id: &ContainerId, options: LogOptions) -> BoxStream<'static, Result<LogLine, EngineError>>;
}

/// The engine's full id of a container.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerId(pub String);

impl ContainerId {
    /// The id as text, 64 hexadecimal digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Which named volumes to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Volumes {
    /// All of an instance, whichever deploy made them.
    OfInstance(InstanceName),
    /// Only those one deploy made.
    OfDeployment(DeploymentId),
}

/// A container of this agent.
#[derive(Debug, Clone, PartialEq)]
pub struct Container {
    /// Its id.
    pub id: ContainerId,
    /// Its name, without the engine's leading slash.
    pub name: String,
    /// The instance it says it is the container of; `None` when its label is no instance name, and when it is a session's.
    pub instance: Option<InstanceName>,
    /// The session it says it belongs to.
    pub session: Option<SessionOf>,
    /// Hash of the spec it was made from.
    pub spec_hash: SpecHash,
    /// The spec it was made from as JSON, environment values left out; as found, so not to be trusted.
    pub spec_label: String,
    /// The deploy that made it, as found.
    pub deployment: Option<DeploymentId>,
    /// When it was created, Unix seconds.
    pub created: i64,
    /// How it is.
    pub condition: Condition,
    /// What can be changed about it while it is there.
    pub settings: Settings,
    /// How often the engine restarted it.
    pub restart_count: u64,
    /// Its published ports.
    pub ports: Vec<PortView>,
    /// Its address on the agent's network, while it runs.
    pub address: Option<IpAddr>,
    /// An address that is its own for as long as it exists, whether it runs or not; those whose egress is a list have one.
    pub own_address: Option<IpAddr>,
    /// The agent's networks it is on, those left out that somebody has removed.
    pub links: BTreeSet<Link>,
}

/// One of the agent's networks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Link {
    /// The one that leads out.
    Open,
    /// The one that leads nowhere.
    Closed,
    /// The one on which only the agent's proxy leads out.
    Listed,
    /// The one a group's members reach each other on.
    Group(GroupId),
    /// The one that leads out, for members of a group. They reach each other on it, too: Docker tells a name's address on this one first, and
    /// it has to be one that can be reached.
    GroupOpen(GroupId),
}

impl Link {
    /// The one an instance is reached on by the agent, which is also its way out if it has one.
    pub fn home(network: &Network) -> Self {
        match (&network.egress, &network.group) {
            (Egress::Open, None) => Self::Open,
            (Egress::Open, Some(group)) => Self::GroupOpen(group.clone()),
            (Egress::None, None) => Self::Closed,
            (Egress::None, Some(group)) => Self::Group(group.clone()),
            (Egress::AllowList(_), _) => Self::Listed,
        }
    }

    /// All that an instance's container has to be on, and no others.
    pub fn all_of(network: &Network) -> BTreeSet<Self> {
        std::iter::once(Self::home(network)).chain(network.group.clone().map(Self::Group)).collect()
    }

    /// Its members reach each other, and it goes when there are none.
    pub fn is_of_group(&self) -> bool {
        match self {
            Self::Group(_) | Self::GroupOpen(_) => true,
            Self::Open | Self::Closed | Self::Listed => false,
        }
    }
}

/// What can be changed about a container while it is there, and so has to be looked after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Its limits; 0 where there is none.
    pub limits: Limits,
    /// What happens when its process ends; none for a policy that no spec has.
    pub restart: Option<RestartPolicy>,
}

impl Settings {
    /// What they are to be.
    pub fn of(spec: &Spec) -> Self {
        Self { limits: spec.limits, restart: Some(spec.restart) }
    }
}

/// How a container is.
#[derive(Debug, Clone, PartialEq)]
pub enum Condition {
    /// Made and never started.
    Created,
    /// Its process runs.
    Running {
        /// Since when.
        since: Timestamp,
    },
    /// Its process is frozen.
    Paused,
    /// Its process ended and the engine is about to start it again.
    Restarting(Exit),
    /// Its process ended.
    Exited(Exit),
    /// The engine is removing it.
    Removing,
    /// The engine failed to remove it.
    Dead,
}

impl Condition {
    /// The engine's word for it.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running { .. } => "running",
            Self::Paused => "paused",
            Self::Restarting(_) => "restarting",
            Self::Exited(_) => "exited",
            Self::Removing => "removing",
            Self::Dead => "dead",
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Exit {
    /// Its exit code; 128 + signal when it was killed.
    pub code: i64,
    /// It was killed because it used up its memory limit.
    pub out_of_memory: bool,
    /// What the engine says about it; often empty.
    pub error: String,
}

/// An image that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The engine's id of it, `sha256:…`.
    pub id: String,
    /// `sha256:…` of the manifest the registry gave, when it came from one.
    pub digest: Option<String>,
}

/// An image among all those on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldImage {
    /// The engine's id of it, `sha256:…`.
    pub id: String,
    /// Its names with a tag, as [`ImageReference::familiar`] gives them.
    pub tags: Vec<String>,
    /// Its names with a digest, likewise.
    pub digests: Vec<String>,
    /// What it takes on the disk at most, bytes; layers may be other images' too.
    pub bytes: u64,
    /// A container, anybody's, running or not, is made from it.
    pub used: bool,
}

/// What part of a container's output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Last lines only; all when absent.
    pub tail: Option<u32>,
    /// Only what was written at or after this.
    pub since: Option<Timestamp>,
    /// Go on with what is written from now on.
    pub follow: bool,
}

/// One line of a container's output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// When the engine received it.
    pub at: Option<Timestamp>,
    /// Where it was written.
    pub stream: LogStream,
    /// The line without its end; bytes that aren't UTF-8 are replaced.
    pub message: String,
}

/// The cause of an engine error, in the adapter's library's words.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why the engine didn't do something.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// It doesn't answer, or broke off.
    #[error("the container engine did not answer when asked to {operation}")]
    Unavailable {
        /// What it was asked.
        operation: &'static str,
        /// Why.
        #[source]
        source: Cause,
    },
    /// There is no such container.
    #[error("the container is gone: {operation}")]
    ContainerGone {
        /// What it was asked.
        operation: &'static str,
    },
    /// One of the container's networks is gone, so it can't be started any more.
    #[error("a network of the container is gone: {operation}")]
    NetworkGone {
        /// What it was asked.
        operation: &'static str,
    },
    /// The registry, or this host, has no such image.
    #[error("{message}")]
    ImageNotFound {
        /// The engine's words.
        message: String,
    },
    /// The registry wants a credential, or refuses it.
    #[error("{message}")]
    PullDenied {
        /// The engine's words.
        message: String,
    },
    /// The registry can't be reached, or broke off.
    #[error("{message}")]
    PullFailed {
        /// The engine's words.
        message: String,
    },
    /// Another container has this name.
    #[error("the name is taken by another container")]
    NameTaken,
    /// A published port is taken.
    #[error("port {} is taken", port.map_or_else(|| "?".to_owned(), |port| port.to_string()))]
    PortTaken {
        /// Which, where the engine says.
        port: Option<u16>,
    },
    /// The disk is full.
    #[error("no space left on the disk to {operation}")]
    NoSpace {
        /// What it was asked.
        operation: &'static str,
    },
    /// The engine won't: the request can't be right as it is.
    #[error("the container engine refused to {operation}: {message}")]
    Refused {
        /// What it was asked.
        operation: &'static str,
        /// Its words.
        message: String,
    },
    /// The engine failed.
    #[error("the container engine failed to {operation}: {message}")]
    Failed {
        /// What it was asked.
        operation: &'static str,
        /// Its words.
        message: String,
    },
}

/// The host ports a spec insists on.
pub fn exact_ports(spec: &Spec) -> impl Iterator<Item = (u16, PortProtocol)> + '_ {
    spec.ports.iter().filter_map(|port| match port.host {
        HostPort::Exactly(number) => Some((number, port.protocol)),
        HostPort::Any => None,
    })
}
