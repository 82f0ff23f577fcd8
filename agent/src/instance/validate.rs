//! From a deploy's JSON to a [`Spec`], with every fault named at once.
//!
//! Three kinds of finding. A *fault* makes the request invalid. A *forbidden* option would give the container the host, or another
//! instance: it is refused, never quietly left out. A *warning* says what was changed or ignored: options this agent doesn't know are
//! ignored with a warning, because none of them can widen what a container may do and callers may be newer than the agent. Options
//! that narrow what a container may do and aren't understood (an `egress` of another kind) are faults, since ignoring them would be a promise
//! broken.

mod credentials;
mod findings;
mod group;
mod health;
mod host_config;
mod network;
mod secrets;
mod update;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use dtma_api::instance::{PullPolicy, Transport};
use dtma_api::{AccountToolInstanceId, GroupId, InstanceName, failure::Fault};
use serde_json::{Map, Value};

#[cfg(any(test, fuzzing))]
pub(crate) use self::credentials::fuzzed::credentials as fuzzed_credentials;
use self::findings::{At, Findings, is_nothing};
pub use self::group::{GroupPlan, group_confidential, validate_group};
use self::host_config::HostConfig;
pub use self::update::{Present, validate_update};
use super::Confidential;
use super::network::Network;
use super::session::{self, SessionMode};
use super::spec::{Environment, ImageReference, McpServer, Process, Spec, Volume};
use super::template::{Defaults, Template};

/// What isn't in a deploy's body: what the operator decides, and the group it is part of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The agent's own port, which no instance gets.
    pub agent_port: u16,
    /// Address published ports are bound to.
    pub publish_on: IpAddr,
    /// The group it is part of. No body says so by itself: a group's deploy does.
    pub group: Option<GroupId>,
    /// The group's members reach each other.
    pub shared_network: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            agent_port: dtma_api::AGENT_PORT,
            publish_on: Ipv4Addr::LOCALHOST.into(),
            group: None,
            shared_network: false,
        }
    }
}

/// Why a deploy isn't accepted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Refusal {
    /// Everything that is wrong, forbidden options included.
    pub faults: Vec<Fault>,
    /// At least one of them is a forbidden option.
    pub forbidden: bool,
}

/// Everything there is to say of a deploy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Review {
    /// What it comes to, when nothing is wrong.
    pub spec: Option<Spec>,
    /// Everything that is wrong, forbidden options included.
    pub faults: Vec<Fault>,
    /// Those of them that are forbidden options.
    pub forbidden: Vec<Fault>,
    /// What was changed or ignored.
    pub warnings: Vec<Fault>,
}

impl From<Review> for Refusal {
    fn from(review: Review) -> Self {
        Self { forbidden: !review.forbidden.is_empty(), faults: review.faults }
    }
}

/// Longest path of an MCP endpoint.
const MAX_ENDPOINT_PATH: usize = 1024;
/// Longest environment variable: the kernel takes no argument longer than 128 KiB.
const MAX_VARIABLE: usize = 100 * 1024;
/// Port of an MCP endpoint when none is named.
const DEFAULT_MCP_PORT: u16 = 8080;

/// Reads the body of `POST /tools`. On success the warnings come with the spec.
///
/// # Errors
/// When anything in it is invalid or forbidden; every such thing is named.
pub fn validate(body: &Value, policy: &Policy) -> Result<(Spec, Vec<Fault>), Refusal> {
    let mut review = review(body, policy);
    let spec = review.spec.take();
    spec.map(|spec| (spec, std::mem::take(&mut review.warnings))).ok_or_else(|| review.into())
}

/// The same, with the warnings also where something is wrong.
pub fn review(body: &Value, policy: &Policy) -> Review {
    let mut findings = Findings::default();
    let root = At::root();
    let Some(body) = body.as_object() else {
        findings.fault(&root, "must be a JSON object");
        return findings.review(None);
    };
    let name: Option<InstanceName> = required_text(body, "instanceNameOnToolbox", &mut findings);
    if name.as_ref().is_some_and(|name| name.as_str() == "status") {
        // GET /tools/status is the list old callers read.
        findings.fault(&root.key("instanceNameOnToolbox"), "is reserved");
    }
    let id: Option<AccountToolInstanceId> = required_text(body, "accountToolInstanceId", &mut findings);
    let image: Option<ImageReference> = required_text(body, "dockerImageUrl", &mut findings);
    let pull_policy = pull_policy(body, &mut findings);
    let mcp = mcp(body, &mut findings);
    let health_check = health::health_check(body, mcp.is_some(), &mut findings);
    let volumes = volumes(body, &mut findings);
    let base_at = root.key("baseConfigOverrideJson");
    let empty = Map::new();
    let base = match body.get("baseConfigOverrideJson") {
        None | Some(Value::Null) => &empty,
        Some(Value::Object(base)) => base,
        Some(_) => {
            findings.fault(&base_at, "must be an object");
            &empty
        }
    };
    let (mut process, labels) = container_config(base, &base_at, &mut findings);
    environment_variables(body, &mut process.environment, &mut findings);
    let mut defaults = templates(body, &mut findings);
    // A volume is asked for, a template's memory in its place isn't.
    defaults.sandbox.tmpfs.retain(|path, _| volumes.iter().all(|volume| &volume.path != path));
    let egress = network::egress(body, defaults.egress, &mut findings);
    let mut host = HostConfig::read(base, &base_at, defaults.limits, defaults.sandbox, policy, &mut findings);
    host.apply_resource_limits(body, &mut findings);
    network::warn_of_proxy_variables(&egress, &process.environment, &mut findings);
    not_built(body, &mut findings);
    credentials::read(body, &mut findings);
    let (secrets, _) = secrets::read(body, &process.environment, &mut findings);
    for path in host.sandbox.tmpfs.keys().filter(|path| volumes.iter().any(|volume| &volume.path == *path)) {
        findings.fault(&root.key("volumes"), format!("{path} is in HostConfig.Tmpfs as well"));
    }
    match (name, id, image) {
        (Some(name), Some(account_tool_instance_id), Some(image)) if findings.is_sound() => {
            let spec = Spec {
                name,
                account_tool_instance_id,
                image,
                pull_policy,
                process,
                labels,
                ports: host.ports,
                publish_on: policy.publish_on,
                volumes,
                limits: host.limits,
                restart: host.restart,
                sandbox: host.sandbox,
                network: Network { egress, group: policy.group.clone().filter(|_| policy.shared_network) },
                group: policy.group.clone(),
                secrets,
                mcp,
                health_check,
            };
            findings.review(Some(spec))
        }
        _ => findings.review(None),
    }
}

/// What is kept in memory only, of a body that [`validate`] has found nothing wrong with.
pub fn confidential(body: &Value) -> Confidential {
    let Some(body) = body.as_object() else { return Confidential::default() };
    let (_, secrets) = secrets::read(body, &Environment::default(), &mut Findings::default());
    Confidential { registry: credentials::read(body, &mut Findings::default()), secrets }
}

fn required_text<T: TryFrom<String, Error: std::fmt::Display>>(
    body: &Map<String, Value>,
    key: &str,
    findings: &mut Findings,
) -> Option<T> {
    let at = At::root().key(key);
    match body.get(key) {
        None | Some(Value::Null) => findings.fault(&at, "is required"),
        Some(Value::String(text)) => match T::try_from(text.clone()) {
            Ok(value) => return Some(value),
            Err(error) => findings.fault(&at, error.to_string()),
        },
        Some(_) => findings.fault(&at, "must be a text"),
    }
    None
}

fn pull_policy(body: &Map<String, Value>, findings: &mut Findings) -> PullPolicy {
    let at = At::root().key("pullPolicy");
    match body.get("pullPolicy") {
        None | Some(Value::Null) => PullPolicy::default(),
        Some(value) => serde_json::from_value(value.clone()).unwrap_or_else(|_| {
            findings.fault(&at, "must be if-not-present, always or never");
            PullPolicy::default()
        }),
    }
}

/// What the templates asked for make of the defaults.
fn templates(body: &Map<String, Value>, findings: &mut Findings) -> Defaults {
    let mut defaults = Defaults::default();
    let at = At::root().key("template");
    let named = match body.get("template") {
        Some(one @ Value::String(text)) if !text.is_empty() => vec![(at, one)],
        Some(Value::String(_)) | None => Vec::new(),
        several => findings.list(several, &at),
    };
    let mut kinds = Vec::new();
    for (at, name) in named {
        let Some(template) = name.as_str().and_then(Template::named) else {
            let known = Template::ALL.map(Template::name).join(", ");
            findings.fault(&at, format!("is not a template of this agent; it has {known}"));
            continue;
        };
        if kinds.contains(&template.kind()) {
            findings.fault(&at, "is of the same kind as another template of this deploy");
        }
        kinds.push(template.kind());
        template.apply(&mut defaults);
    }
    defaults
}

fn mcp(body: &Map<String, Value>, findings: &mut Findings) -> Option<McpServer> {
    let root = At::root();
    let transport = match body.get("mcpTransportType") {
        None | Some(Value::Null) => None,
        Some(value) => match serde_json::from_value::<Transport>(value.clone()) {
            Ok(transport) => Some(transport),
            Err(_) => {
                findings.fault(&root.key("mcpTransportType"), "must be stdio, sse, http or websocket");
                None
            }
        },
    };
    let port_at = root.key("mcpPort");
    let port = match body.get("mcpPort") {
        None | Some(Value::Null) => None,
        Some(value) => match value.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0) {
            Some(port) => Some(port),
            None => {
                findings.fault(&port_at, "must be a port number, 1 to 65535");
                None
            }
        },
    };
    let path_at = root.key("mcpEndpointPath");
    let path = match body.get("mcpEndpointPath") {
        None | Some(Value::Null) => None,
        Some(Value::String(path)) if is_endpoint_path(path) => Some(path.clone()),
        Some(_) => {
            findings.fault(&path_at, "must be a path beginning with /, of letters, digits and -._~/:@!$&'()*+,;=%");
            None
        }
    };
    let sessions = session_mode(body, transport, findings);
    let Some(transport) = transport else {
        if body.get("mcpTransportType").is_none_or(Value::is_null) {
            for (given, at) in [(port.is_some(), &port_at), (path.is_some(), &path_at)] {
                if given {
                    findings.warn(at, "is ignored without mcpTransportType");
                }
            }
        }
        return None;
    };
    let default_path = match transport {
        Transport::Sse => "/sse",
        Transport::Websocket => "/ws",
        Transport::Http | Transport::Stdio => "/mcp",
    };
    Some(McpServer {
        transport,
        port: port.unwrap_or(DEFAULT_MCP_PORT),
        path: path.unwrap_or_else(|| default_path.to_owned()),
        sessions,
    })
}

fn is_endpoint_path(path: &str) -> bool {
    path.starts_with('/')
        && path.len() <= MAX_ENDPOINT_PATH
        && path.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~/:@!$&'()*+,;=%".contains(&b))
}

fn volumes(body: &Map<String, Value>, findings: &mut Findings) -> Vec<Volume> {
    let at = At::root().key("volumes");
    let mut volumes: Vec<Volume> = Vec::new();
    for (at, value) in findings.list(body.get("volumes"), &at) {
        let Some(object) = value.as_object() else {
            findings.fault(&at, "must be an object with name and path");
            continue;
        };
        findings.only_known(object, &at, &["name", "path"]);
        let name = findings.text(object.get("name"), &at.key("name")).unwrap_or_default();
        let path = findings.text(object.get("path"), &at.key("path")).unwrap_or_default();
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
        let name_valid =
            name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.len() <= 64 && name.bytes().all(word);
        if !name_valid {
            findings.fault(&at.key("name"), "must be 1 to 64 of A-Z a-z 0-9 _ - and begin with a letter or digit");
        }
        if !is_mount_path(&path) {
            findings.fault(&at.key("path"), MOUNT_PATH_RULE);
        }
        if volumes.iter().any(|volume| volume.name == name || volume.path == path) {
            findings.fault(&at, "has the name or the path of another volume of this instance");
        }
        volumes.push(Volume { name, path });
    }
    volumes.sort();
    volumes
}

/// What a folder in the container has to be for something to be mounted there.
const MOUNT_PATH_RULE: &str =
    "must be an absolute path without . or .. in it, outside /proc, /sys, /dev and /run/secrets";

fn is_mount_path(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    let clean = path.len() <= 4096
        && parts.split_first().is_some_and(|(first, rest)| {
            first.is_empty() && !rest.is_empty() && rest.iter().all(|part| !matches!(*part, "" | "." | ".."))
        })
        && !path.contains(|c: char| c.is_control() || c == ':' || c == ',');
    let under = |folder: &str| path.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    clean && !["/proc", "/sys", "/dev", "/run/secrets"].into_iter().any(under)
}

/// Docker's words for the process: everything of `baseConfigOverrideJson` but `HostConfig`.
fn container_config(
    base: &Map<String, Value>,
    at: &At,
    findings: &mut Findings,
) -> (Process, BTreeMap<String, String>) {
    const KNOWN: [&str; 9] =
        ["Env", "Cmd", "Entrypoint", "WorkingDir", "User", "Labels", "HostConfig", "ExposedPorts", "Image"];
    findings.only_known(base, at, &KNOWN);
    if base.get("Image").is_some_and(|image| !is_nothing(image)) {
        findings.warn(&at.key("Image"), "is ignored: dockerImageUrl names the image");
    }
    let mut process = Process {
        entrypoint: arguments(base.get("Entrypoint"), &at.key("Entrypoint"), findings),
        command: arguments(base.get("Cmd"), &at.key("Cmd"), findings),
        ..Process::default()
    };
    for (at, value) in findings.list(base.get("Env"), &at.key("Env")) {
        match value.as_str().and_then(|text| text.split_once('=')) {
            Some((name, value)) => add_variable(&mut process.environment, name, value, &at, findings),
            None => findings.fault(&at, "must be a text NAME=value"),
        }
    }
    if let Some(directory) =
        findings.text(base.get("WorkingDir"), &at.key("WorkingDir")).filter(|text| !text.is_empty())
    {
        if directory.starts_with('/') && !directory.contains(char::is_control) {
            process.working_dir = Some(directory);
        } else {
            findings.fault(&at.key("WorkingDir"), "must be an absolute path");
        }
    }
    if let Some(user) = findings.text(base.get("User"), &at.key("User")).filter(|text| !text.is_empty()) {
        if user.len() <= 128 && user.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.:-".contains(&b)) {
            process.user = Some(user);
        } else {
            findings.fault(&at.key("User"), "must be user or user:group, names or numbers");
        }
    }
    let mut labels = BTreeMap::new();
    for (at, key, value) in findings.map(base.get("Labels"), &at.key("Labels")) {
        let Some(text) = value.as_str() else {
            findings.fault(&at, "must be a text");
            continue;
        };
        if key.is_empty() || key.contains(char::is_control) {
            findings.fault(&at, "has an empty name, or one with control characters");
        } else if ["dtma.", "com.docker.", "io.docker.", "org.dockerproject."].iter().any(|own| key.starts_with(own)) {
            findings.fault(&at, "is a reserved label");
        } else {
            labels.insert(key.to_owned(), text.to_owned());
        }
    }
    (process, labels)
}

/// `Cmd` and `Entrypoint`: a list of texts, or one text. Empty is as if absent.
fn arguments(value: Option<&Value>, at: &At, findings: &mut Findings) -> Option<Vec<String>> {
    if let Some(Value::String(text)) = value {
        return Some(vec![text.clone()]).filter(|_| !text.is_empty());
    }
    let mut arguments = Vec::new();
    for (at, value) in findings.list(value, at) {
        match value.as_str() {
            Some(text) if !text.contains('\0') => arguments.push(text.to_owned()),
            Some(_) | None => findings.fault(&at, "must be a text without NUL"),
        }
    }
    Some(arguments).filter(|arguments| !arguments.is_empty())
}

fn environment_variables(body: &Map<String, Value>, environment: &mut Environment, findings: &mut Findings) {
    let at = At::root().key("environmentVariables");
    for (at, name, value) in findings.map(body.get("environmentVariables"), &at) {
        let value = match value {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            Value::Bool(flag) => flag.to_string(),
            Value::Null | Value::Array(_) | Value::Object(_) => {
                findings.fault(&at, "must be a text");
                continue;
            }
        };
        if environment.0.get(name).is_some_and(|other| other != &value) {
            findings.warn(&at, "replaces another value in baseConfigOverrideJson.Env");
        }
        add_variable(environment, name, &value, &at, findings);
    }
}

fn add_variable(environment: &mut Environment, name: &str, value: &str, at: &At, findings: &mut Findings) {
    let name_valid = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    // The message must not repeat the value.
    if !name_valid {
        findings.fault(at, "has a name that isn't one: letters, digits and _ . - beginning with a letter or _");
    } else if value.contains('\0') || name.len() + value.len() > MAX_VARIABLE {
        findings.fault(at, "has a value with NUL in it, or one longer than 100 KiB");
    } else {
        environment.0.insert(name.to_owned(), value.to_owned());
    }
}

/// Whether the clients of a server on its standard input share one process.
fn session_mode(body: &Map<String, Value>, transport: Option<Transport>, findings: &mut Findings) -> SessionMode {
    let (at, most_at) = (At::root().key("sessionMode"), At::root().key("maxSessions"));
    let most = match body.get("maxSessions") {
        None | Some(Value::Null) => None,
        Some(value) => match value.as_u64().and_then(|most| u16::try_from(most).ok()) {
            Some(most @ 1..=session::LARGEST_MOST) => Some(most),
            Some(_) | None => {
                findings.fault(&most_at, format!("must be a number, 1 to {}", session::LARGEST_MOST));
                None
            }
        },
    };
    let is_stdio = transport == Some(Transport::Stdio);
    let per_session = match body.get("sessionMode") {
        None | Some(Value::Null) => false,
        Some(Value::String(mode)) if mode == "shared" => {
            if !is_stdio {
                findings.warn(&at, "is only for mcpTransportType stdio, and ignored");
            }
            false
        }
        // Whoever asks for it relies on it.
        Some(Value::String(mode)) if mode == "per-session" && !is_stdio => {
            let problem = "per-session is only for mcpTransportType stdio: a server that is reached over its network keeps its sessions apart \
                           itself; leave it out";
            findings.fault(&at, problem);
            false
        }
        Some(Value::String(mode)) if mode == "per-session" => true,
        Some(_) => {
            findings.fault(&at, "must be shared or per-session");
            false
        }
    };
    match (per_session, most) {
        (true, most) => SessionMode::PerSession { most: most.unwrap_or(session::DEFAULT_MOST) },
        (false, Some(_)) => {
            findings.warn(&most_at, "is only for sessionMode per-session, and ignored");
            SessionMode::Shared
        }
        (false, None) => SessionMode::Shared,
    }
}

/// What the contract has and this version hasn't.
fn not_built(body: &Map<String, Value>, findings: &mut Findings) {
    let root = At::root();
    const KNOWN: [&str; 17] = [
        "dockerImageUrl",
        "instanceNameOnToolbox",
        "accountToolInstanceId",
        "baseConfigOverrideJson",
        "mcpTransportType",
        "mcpEndpointPath",
        "mcpPort",
        "sessionMode",
        "maxSessions",
        "environmentVariables",
        "resourceLimits",
        "template",
        "volumes",
        "egress",
        "pullPolicy",
        health::KEY,
        credentials::KEY,
    ];
    let known: Vec<&str> = KNOWN.into_iter().chain(secrets::KEYS).collect();
    findings.only_known(body, &root, &known);
}

#[cfg(test)]
mod tests;
