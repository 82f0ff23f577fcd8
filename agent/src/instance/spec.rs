//! What an instance is asked to be. A `Spec` that exists has been validated; two specs are the same request exactly when they are equal.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use dtma_api::instance::{PullPolicy, Transport};
use dtma_api::{AccountToolInstanceId, GroupId, InstanceName};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::health::HealthCheck;
use super::network::Network;
use super::secrets::SecretSources;
use super::session::SessionMode;

/// Everything needed to make an instance's container again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Name of the instance and of its container.
    pub name: InstanceName,
    /// The backend's id.
    pub account_tool_instance_id: AccountToolInstanceId,
    /// What to run.
    pub image: ImageReference,
    /// When to ask the registry for it.
    pub pull_policy: PullPolicy,
    /// How its process is started.
    pub process: Process,
    /// The caller's own labels; none in the agent's or Docker's namespace.
    pub labels: BTreeMap<String, String>,
    /// Ports published on the host. Nothing has to be: the agent reaches the server on the container's own address.
    pub ports: Vec<Port>,
    /// Address of the host its ports are published on.
    pub publish_on: IpAddr,
    /// Named volumes, kept when the container is replaced.
    pub volumes: Vec<Volume>,
    /// Upper bounds.
    pub limits: Limits,
    /// What Docker does when the process ends by itself.
    pub restart: RestartPolicy,
    /// How it is shut in, beyond what every container gets.
    pub sandbox: Sandbox,
    /// What it may reach. Left out where it is the usual, so that specs from before there was a choice keep their hash.
    #[serde(default, skip_serializing_if = "Network::is_default")]
    pub network: Network,
    /// The group it was deployed in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupId>,
    /// Which secrets it has; never their values. Left out where there are none.
    #[serde(default, skip_serializing_if = "SecretSources::is_none")]
    pub secrets: SecretSources,
    /// How it is reached, when it is an MCP server.
    pub mcp: Option<McpServer>,
    /// How it is checked, when it is one. Left out where it is the usual, as above.
    #[serde(default, skip_serializing_if = "HealthCheck::is_default")]
    pub health_check: HealthCheck,
}

impl Spec {
    /// SHA-256 over the whole spec; equal exactly for equal specs.
    pub fn hash(&self) -> SpecHash {
        // Serialising a spec can't fail: it holds maps with text keys and numbers only.
        let json = serde_json::to_vec(self).unwrap_or_default();
        SpecHash(hex::encode(Sha256::digest(json)))
    }
}

/// Identifies a spec's content on its container, 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SpecHash(String);

impl SpecHash {
    /// A hash as it was found on a container; any text, since it is only compared.
    pub fn from_label(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// The hash as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An image reference as `docker pull` takes it: `[registry[:port]/]path[:tag][@sha256:digest]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageReference(String);

/// A text that is not an image reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "an image reference must be [registry[:port]/]path[:tag][@sha256:digest], path and registry in lower case, at most 512 characters"
)]
pub struct InvalidImageReference;

impl ImageReference {
    /// The reference as it was asked for.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The reference without tag and digest, and what selects the version: the tag, the digest (which wins), or `latest`.
    pub fn split(&self) -> (&str, &str) {
        if let Some((name, digest)) = self.0.split_once('@') {
            return (tagless(name).0, digest);
        }
        let (name, tag) = tagless(&self.0);
        (name, tag.unwrap_or("latest"))
    }
}

fn tagless(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        Some(_) | None => (text, None),
    }
}

fn valid_component(text: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    edge(text.chars().next())
        && edge(text.chars().last())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
}

fn valid_registry(text: &str) -> bool {
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    !host.is_empty()
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b))
        && host.starts_with(|c: char| c.is_ascii_alphanumeric())
        && port.is_none_or(|port| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok())
}

impl TryFrom<String> for ImageReference {
    type Error = InvalidImageReference;

    fn try_from(text: String) -> Result<Self, InvalidImageReference> {
        if text.is_empty() || text.len() > 512 {
            return Err(InvalidImageReference);
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text.as_str(), None),
        };
        let digest_valid = digest.is_none_or(|digest| {
            digest.strip_prefix("sha256:").is_some_and(|hex| {
                hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
            })
        });
        let (name, tag) = tagless(rest);
        let tag_valid = tag.is_none_or(|tag| {
            !tag.is_empty()
                && tag.len() <= 128
                && !tag.starts_with(['.', '-'])
                && tag.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        });
        // The first component is a registry when it could not be a path component of Docker Hub, as Docker decides it.
        let path = match name.split_once('/') {
            Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => {
                if !valid_registry(first) {
                    return Err(InvalidImageReference);
                }
                path
            }
            Some(_) | None => name,
        };
        // As registries have it; without this a name could be too long to be given its tag.
        if digest_valid && tag_valid && name.len() <= 255 && path.split('/').all(valid_component) {
            Ok(Self(text))
        } else {
            Err(InvalidImageReference)
        }
    }
}

impl FromStr for ImageReference {
    type Err = InvalidImageReference;
    fn from_str(text: &str) -> Result<Self, InvalidImageReference> {
        Self::try_from(text.to_owned())
    }
}

impl From<ImageReference> for String {
    fn from(image: ImageReference) -> Self {
        image.0
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How the container's process is started; what is absent comes from the image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Environment variables on top of the image's.
    pub environment: Environment,
    /// Replaces the image's entry point.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command.
    pub command: Option<Vec<String>>,
    /// Absolute path.
    pub working_dir: Option<String>,
    /// `user[:group]`, names or numbers.
    pub user: Option<String>,
}

/// Environment variables. Callers are told not to put secrets here and do, so values don't print.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Environment(pub BTreeMap<String, String>);

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// One port of the container published on the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Port {
    /// Port in the container.
    pub container: u16,
    /// Its protocol.
    pub protocol: PortProtocol,
    /// Port on the host.
    pub host: HostPort,
}

/// What a published port speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl PortProtocol {
    /// Docker's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// Which port on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostPort {
    /// Exactly this one.
    Exactly(u16),
    /// Whichever is free when the container starts.
    Any,
}

/// A named volume, owned by the instance.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Volume {
    /// Name within the instance.
    pub name: String,
    /// Absolute path in the container.
    pub path: String,
}

/// Upper bounds of one instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of memory; swap comes on top of nothing.
    pub memory_bytes: u64,
    /// Billionths of a core.
    pub nano_cpus: u64,
    /// Processes and threads.
    pub pids: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory_bytes: 512 * 1024 * 1024, nano_cpus: 1_000_000_000, pids: 256 }
    }
}

/// What Docker does when the container's process ends by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// Starts it again, also after an engine restart or a reboot, unless it was stopped.
    #[default]
    UnlessStopped,
    /// Starts it again when it ended with an error, at most so often (0: without end).
    OnFailure {
        /// How often.
        max_retries: u32,
    },
    /// Leaves it ended.
    Never,
}

/// How an instance is shut in beyond what every container gets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Capabilities given back; all others are dropped.
    pub capabilities: BTreeSet<Capability>,
    /// The root file system can't be written.
    pub read_only_root: bool,
    /// Paths in the container held in memory, with Docker's mount options.
    pub tmpfs: BTreeMap<String, String>,
    /// Bytes of `/dev/shm`; Docker's default when absent.
    pub shm_bytes: Option<u64>,
}

/// A capability an instance may have: those Docker itself gives every container by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[allow(missing_docs)] // named by the kernel: capabilities(7)
pub enum Capability {
    AuditWrite,
    Chown,
    DacOverride,
    Fowner,
    Fsetid,
    Kill,
    Mknod,
    NetBindService,
    NetRaw,
    Setfcap,
    Setgid,
    Setpcap,
    Setuid,
    SysChroot,
}

impl Capability {
    /// Every one that may be asked for. `NET_RAW` isn't any more, though older ledgers may hold it: with it a container takes other
    /// containers' addresses on its bridge.
    pub const ASKABLE: [Self; 13] = [
        Self::AuditWrite,
        Self::Chown,
        Self::DacOverride,
        Self::Fowner,
        Self::Fsetid,
        Self::Kill,
        Self::Mknod,
        Self::NetBindService,
        Self::Setfcap,
        Self::Setgid,
        Self::Setpcap,
        Self::Setuid,
        Self::SysChroot,
    ];

    /// The kernel's name without `CAP_`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AuditWrite => "AUDIT_WRITE",
            Self::Chown => "CHOWN",
            Self::DacOverride => "DAC_OVERRIDE",
            Self::Fowner => "FOWNER",
            Self::Fsetid => "FSETID",
            Self::Kill => "KILL",
            Self::Mknod => "MKNOD",
            Self::NetBindService => "NET_BIND_SERVICE",
            Self::NetRaw => "NET_RAW",
            Self::Setfcap => "SETFCAP",
            Self::Setgid => "SETGID",
            Self::Setpcap => "SETPCAP",
            Self::Setuid => "SETUID",
            Self::SysChroot => "SYS_CHROOT",
        }
    }
}

/// How an MCP server is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct McpServer {
    /// What it speaks.
    pub transport: Transport,
    /// Port in the container; not used for stdio.
    pub port: u16,
    /// Path of its endpoint, beginning with `/`; not used for stdio.
    pub path: String,
    /// Whether its clients share it; only stdio has the choice. Left out where it is the usual, so that specs from before there was one keep
    /// their hash.
    #[serde(default, skip_serializing_if = "SessionMode::is_shared")]
    pub sessions: SessionMode,
}

/// Specs for tests.
#[cfg(test)]
pub(crate) mod examples {
    use super::*;

    /// A plain server called `name`.
    pub(crate) fn spec(name: &str) -> Spec {
        Spec {
            name: name.parse().unwrap(),
            account_tool_instance_id: format!("id-{name}").parse().unwrap(),
            image: "registry.example/server:1".parse().unwrap(),
            pull_policy: PullPolicy::IfNotPresent,
            process: Process::default(),
            labels: BTreeMap::new(),
            ports: Vec::new(),
            publish_on: std::net::Ipv4Addr::LOCALHOST.into(),
            volumes: Vec::new(),
            limits: Limits::default(),
            restart: RestartPolicy::UnlessStopped,
            sandbox: Sandbox::default(),
            network: Network::default(),
            group: None,
            secrets: SecretSources::default(),
            mcp: None,
            health_check: HealthCheck::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_references_are_those_docker_takes() {
        for good in [
            "busybox",
            "busybox:1.36",
            "library/busybox",
            "ghcr.io/owner/name:tag",
            "localhost:5000/a/b:c",
            "localhost/a",
            "10.0.0.1:5000/a__b/c--d",
            &format!("busybox@sha256:{}", "a".repeat(64)),
            &format!("r.example:443/a:1@sha256:{}", "0".repeat(64)),
        ] {
            assert!(ImageReference::from_str(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            " busybox",
            "Busybox",
            "busybox:",
            "busybox:-x",
            "busybox@sha256:abc",
            "/busybox",
            "busybox/",
            "a//b",
            "http://busybox",
            "a b",
            "a?b",
            "a#b",
            "../a",
            "localhost:port/a",
            "localhost:+80/a",
            &"a".repeat(513),
        ] {
            assert!(ImageReference::from_str(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_image_reference_splits_where_docker_splits_it() {
        let split = |text: &str| {
            let image = ImageReference::from_str(text).unwrap();
            let (name, version) = image.split();
            (name.to_owned(), version.to_owned())
        };
        assert_eq!(split("busybox"), ("busybox".into(), "latest".into()));
        assert_eq!(split("localhost:5000/a"), ("localhost:5000/a".into(), "latest".into()));
        assert_eq!(split("localhost:5000/a:1"), ("localhost:5000/a".into(), "1".into()));
        let digest = format!("sha256:{}", "b".repeat(64));
        assert_eq!(split(&format!("a:1@{digest}")), ("a".into(), digest));
    }

    #[test]
    fn environment_values_do_not_print() {
        let environment = Environment([("TOKEN".to_owned(), "hunter2".to_owned())].into());
        let printed = format!("{environment:?}");
        assert!(printed.contains("TOKEN") && !printed.contains("hunter2"), "{printed}");
    }
}
