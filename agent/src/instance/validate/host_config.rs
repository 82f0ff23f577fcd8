//! Docker's `HostConfig`: a bounded subset is taken, what would hand over the host is refused.

use serde_json::{Map, Value};

use super::findings::{At, Findings, is_nothing};
use super::{MOUNT_PATH_RULE, Policy, is_mount_path};
use crate::instance::spec::{Capability, HostPort, Limits, Port, PortProtocol, RestartPolicy, Sandbox};

/// What of a `HostConfig` becomes part of a spec.
pub(super) struct HostConfig {
    pub(super) ports: Vec<Port>,
    pub(super) limits: Limits,
    pub(super) restart: RestartPolicy,
    pub(super) sandbox: Sandbox,
}

/// Docker starts nothing with less.
const MIN_MEMORY: u64 = 6 * 1024 * 1024;
/// Docker's smallest share of a core, in billionths.
const MIN_NANO_CPUS: u64 = 10_000_000;
/// The most that makes sense anywhere.
const MAX_NANO_CPUS: u64 = 1_000_000_000_000;
const MEMORY_RULE: &str = "must be bytes, or a number with k, m or g as in \"256m\", at least 6m";
const CPU_RULE: &str = "must be a number of cores, 0.01 to 1000";

/// Options that hand over the host, another container or another instance's data, whatever their value, unless it is nothing.
const FORBIDDEN: [(&str, &str); 20] = [
    ("Privileged", "gives the container the host"),
    ("Binds", "mounts a path of the host, or a volume of another; use volumes"),
    ("Mounts", "mounts a path of the host, or a volume of another; use volumes, or HostConfig.Tmpfs"),
    ("VolumesFrom", "mounts another container's volumes"),
    ("VolumeDriver", "mounts what is outside the container; use volumes"),
    ("Devices", "gives the container devices of the host"),
    ("DeviceRequests", "gives the container devices of the host"),
    ("DeviceCgroupRules", "gives the container devices of the host"),
    ("PidMode", "shares the host's or another container's processes"),
    ("UTSMode", "shares the host's name"),
    ("UsernsMode", "takes the container out of its user namespace"),
    ("Cgroup", "places the container in another control group"),
    ("CgroupParent", "places the container in another control group"),
    ("Sysctls", "changes kernel settings"),
    ("Runtime", "chooses another runtime"),
    ("Links", "reaches into another container"),
    ("OomKillDisable", "lets the container take all of the host's memory"),
    ("OomScoreAdj", "makes the kernel end other processes first"),
    ("MaskedPaths", "uncovers the kernel's files"),
    ("ReadonlyPaths", "uncovers the kernel's files"),
];

/// Read below, or harmless because the agent decides it.
const READ: [&str; 17] = [
    "PortBindings",
    "Memory",
    "NanoCpus",
    "PidsLimit",
    "RestartPolicy",
    "CapAdd",
    "CapDrop",
    "SecurityOpt",
    "NetworkMode",
    "IpcMode",
    "CgroupnsMode",
    "ReadonlyRootfs",
    "Tmpfs",
    "ShmSize",
    "Init",
    "AutoRemove",
    "MemorySwap",
];

impl HostConfig {
    /// What is not said stays as `limits` and `sandbox` have it.
    pub(super) fn read(
        base: &Map<String, Value>,
        at: &At,
        limits: Limits,
        sandbox: Sandbox,
        policy: &Policy,
        findings: &mut Findings,
    ) -> Self {
        let mut read = Self { ports: Vec::new(), limits, restart: RestartPolicy::default(), sandbox };
        let at = at.key("HostConfig");
        let host = match base.get("HostConfig") {
            None | Some(Value::Null) => return read,
            Some(Value::Object(host)) => host,
            Some(_) => {
                findings.fault(&at, "must be an object");
                return read;
            }
        };
        forbidden(host, &at, findings);
        namespaces(host, &at, findings);
        read.ports = ports(host, &at.key("PortBindings"), policy, findings);
        read.limits(host, &at, findings);
        read.restart = restart(host, &at.key("RestartPolicy"), findings);
        read.sandbox(host, &at, findings);
        for key in ["AutoRemove", "MemorySwap"] {
            if host.get(key).is_some_and(|value| !is_nothing(value)) {
                findings.warn(&at.key(key), "is ignored: the agent decides it");
            }
        }
        if host.get("Init") == Some(&Value::Bool(false)) {
            findings.warn(&at.key("Init"), "is ignored: every container gets an init process");
        }
        let known: Vec<&str> = READ.into_iter().chain(FORBIDDEN.map(|(key, _)| key)).collect();
        findings.only_known(host, &at, &known);
        read
    }

    fn limits(&mut self, host: &Map<String, Value>, at: &At, findings: &mut Findings) {
        if let Some(value) = host.get("Memory").filter(|value| !is_nothing(value)) {
            match bytes(value).filter(|bytes| *bytes >= MIN_MEMORY) {
                Some(bytes) => self.limits.memory_bytes = bytes,
                None => findings.fault(&at.key("Memory"), MEMORY_RULE),
            }
        }
        if let Some(value) = host.get("NanoCpus").filter(|value| !is_nothing(value)) {
            match value.as_u64().filter(|cpus| (MIN_NANO_CPUS..=MAX_NANO_CPUS).contains(cpus)) {
                Some(cpus) => self.limits.nano_cpus = cpus,
                None => findings.fault(&at.key("NanoCpus"), "must be billionths of a core, at least 10000000"),
            }
        }
        if let Some(value) = host.get("PidsLimit").filter(|value| !is_nothing(value)) {
            match value.as_u64().and_then(|pids| u32::try_from(pids).ok()).filter(|pids| (8..=32_768).contains(pids)) {
                Some(pids) => self.limits.pids = pids,
                None => findings.fault(&at.key("PidsLimit"), "must be 8 to 32768"),
            }
        }
    }

    /// `resourceLimits` is the newer way to say it, so it wins.
    pub(super) fn apply_resource_limits(&mut self, body: &Map<String, Value>, findings: &mut Findings) {
        let at = At::root().key("resourceLimits");
        let limits = match body.get("resourceLimits") {
            None | Some(Value::Null) => return,
            Some(Value::Object(limits)) => limits,
            Some(_) => return findings.fault(&at, "must be an object with memory and cpu"),
        };
        findings.only_known(limits, &at, &["memory", "cpu"]);
        if let Some(value) = limits.get("memory").filter(|value| !value.is_null()) {
            match bytes(value).filter(|bytes| *bytes >= MIN_MEMORY) {
                Some(bytes) => self.limits.memory_bytes = bytes,
                None => findings.fault(&at.key("memory"), MEMORY_RULE),
            }
        }
        if let Some(value) = limits.get("cpu").filter(|value| !value.is_null()) {
            let cores = value.as_f64().or_else(|| value.as_str()?.parse().ok());
            match cores.and_then(nano_cpus) {
                Some(cpus) => self.limits.nano_cpus = cpus,
                None => findings.fault(&at.key("cpu"), CPU_RULE),
            }
        }
    }

    fn sandbox(&mut self, host: &Map<String, Value>, at: &At, findings: &mut Findings) {
        for (at, value) in findings.list(host.get("CapAdd"), &at.key("CapAdd")) {
            let asked = value.as_str().unwrap_or_default().to_ascii_uppercase();
            let asked = asked.strip_prefix("CAP_").unwrap_or(&asked);
            match Capability::ASKABLE.into_iter().find(|capability| capability.as_str() == asked) {
                Some(capability) => {
                    self.sandbox.capabilities.insert(capability);
                }
                None => {
                    let allowed = Capability::ASKABLE.map(Capability::as_str).join(", ");
                    findings.forbid(&at, format!("is outside what may be given back: {allowed}"));
                }
            }
        }
        match host.get("ReadonlyRootfs") {
            None | Some(Value::Null) => {}
            Some(Value::Bool(read_only)) => self.sandbox.read_only_root = *read_only,
            Some(_) => findings.fault(&at.key("ReadonlyRootfs"), "must be true or false"),
        }
        for (at, path, options) in findings.map(host.get("Tmpfs"), &at.key("Tmpfs")) {
            let options = options.as_str().unwrap_or("\0");
            if !is_mount_path(path) {
                findings.fault(&at, MOUNT_PATH_RULE);
            } else if !options.bytes().all(|b| b.is_ascii_alphanumeric() || b"=,%".contains(&b)) {
                findings.fault(&at, "must be mount options as in \"size=64m,mode=1777\"");
            } else {
                self.sandbox.tmpfs.insert(path.to_owned(), options.to_owned());
            }
        }
        if let Some(value) = host.get("ShmSize").filter(|value| !is_nothing(value)) {
            match bytes(value) {
                Some(bytes) => self.sandbox.shm_bytes = Some(bytes),
                None => findings.fault(&at.key("ShmSize"), "must be bytes, or a number with k, m or g"),
            }
        }
    }
}

fn forbidden(host: &Map<String, Value>, at: &At, findings: &mut Findings) {
    for (key, reason) in FORBIDDEN {
        // An empty list of masked paths masks nothing, so there nothing is something.
        let uncovers = matches!(key, "MaskedPaths" | "ReadonlyPaths");
        if host.get(key).is_some_and(|value| if uncovers { !value.is_null() } else { !is_nothing(value) }) {
            findings.forbid(&at.key(key), format!("is forbidden: it {reason}"));
        }
    }
    for (at, value) in findings.list(host.get("SecurityOpt"), &at.key("SecurityOpt")) {
        if !matches!(value.as_str(), Some("no-new-privileges" | "no-new-privileges:true" | "no-new-privileges=true")) {
            findings.forbid(&at, "is forbidden: it takes protections off the container");
        }
    }
}

fn namespaces(host: &Map<String, Value>, at: &At, findings: &mut Findings) {
    let own = [
        ("NetworkMode", &["", "default", "bridge"][..], "takes the container off its own network"),
        ("IpcMode", &["", "private", "none", "shareable"][..], "shares the host's or another container's memory"),
        ("CgroupnsMode", &["", "private"][..], "shows the container the host's control groups"),
    ];
    for (key, harmless, reason) in own {
        let at = at.key(key);
        match findings.text(host.get(key), &at) {
            Some(mode) if !harmless.contains(&mode.as_str()) => {
                findings.forbid(&at, format!("is forbidden: it {reason}"));
            }
            Some(_) | None => {}
        }
    }
}

fn ports(host: &Map<String, Value>, at: &At, policy: &Policy, findings: &mut Findings) -> Vec<Port> {
    let mut ports: Vec<Port> = Vec::new();
    for (at, key, bindings) in findings.map(host.get("PortBindings"), at) {
        let (number, protocol) = key.split_once('/').unwrap_or((key, "tcp"));
        let protocol = match protocol {
            "tcp" => Some(PortProtocol::Tcp),
            "udp" => Some(PortProtocol::Udp),
            _ => None,
        };
        let container = number.parse::<u16>().ok().filter(|number| *number > 0);
        let (Some(container), Some(protocol)) = (container, protocol) else {
            findings.fault(&at, "must be named PORT/tcp or PORT/udp");
            continue;
        };
        let bindings = findings.list(Some(bindings), &at);
        if bindings.is_empty() {
            ports.push(Port { container, protocol, host: HostPort::Any });
        }
        for (at, binding) in bindings {
            let Some(binding) = binding.as_object() else {
                findings.fault(&at, "must be an object with HostPort");
                continue;
            };
            findings.only_known(binding, &at, &["HostPort", "HostIp"]);
            if let Some(host_ip) = findings.text(binding.get("HostIp"), &at.key("HostIp"))
                && !host_ip.is_empty()
                && host_ip.parse() != Ok(policy.publish_on)
            {
                let bound = policy.publish_on;
                findings.warn(&at.key("HostIp"), format!("is ignored: ports are published on {bound}"));
            }
            let Some(mut host) = host_port(binding.get("HostPort")) else {
                findings.fault(&at.key("HostPort"), "must be a port number, 1 to 65535, or empty for any");
                continue;
            };
            if host == HostPort::Exactly(policy.agent_port) && protocol == PortProtocol::Tcp {
                let agent = policy.agent_port;
                findings
                    .warn(&at.key("HostPort"), format!("{agent} is the agent's own port; a free one is used instead"));
                host = HostPort::Any;
            }
            let double = |port: &Port| port.host == host && port.protocol == protocol && host != HostPort::Any;
            if ports.iter().any(double) {
                findings.fault(&at.key("HostPort"), "is published twice");
            }
            ports.push(Port { container, protocol, host });
        }
    }
    ports.sort();
    ports
}

fn host_port(value: Option<&Value>) -> Option<HostPort> {
    let number = match value {
        None | Some(Value::Null) => 0,
        Some(Value::String(text)) if text.is_empty() => 0,
        Some(Value::String(text)) => text.parse().ok()?,
        Some(value) => u16::try_from(value.as_u64()?).ok()?,
    };
    Some(if number == 0 { HostPort::Any } else { HostPort::Exactly(number) })
}

fn restart(host: &Map<String, Value>, at: &At, findings: &mut Findings) -> RestartPolicy {
    let policy = match host.get("RestartPolicy") {
        None | Some(Value::Null) => return RestartPolicy::default(),
        Some(Value::Object(policy)) => policy,
        Some(_) => {
            findings.fault(at, "must be an object with Name");
            return RestartPolicy::default();
        }
    };
    findings.only_known(policy, at, &["Name", "MaximumRetryCount"]);
    let retries = policy.get("MaximumRetryCount").filter(|count| !is_nothing(count));
    let max_retries = match retries.map(|count| count.as_u64().and_then(|count| u32::try_from(count).ok())) {
        None => 0,
        Some(Some(count)) => count,
        Some(None) => {
            findings.fault(&at.key("MaximumRetryCount"), "must be a whole number");
            0
        }
    };
    match findings.text(policy.get("Name"), &at.key("Name")).unwrap_or_default().as_str() {
        "" | "unless-stopped" => RestartPolicy::UnlessStopped,
        "always" => {
            findings.warn(&at.key("Name"), "unless-stopped is used instead of always: what is stopped stays stopped");
            RestartPolicy::UnlessStopped
        }
        "on-failure" => RestartPolicy::OnFailure { max_retries },
        "no" => RestartPolicy::Never,
        _ => {
            findings.fault(&at.key("Name"), "must be unless-stopped, on-failure, always or no");
            RestartPolicy::default()
        }
    }
}

/// Bytes as a number, or as a text with Docker's units (powers of 1024).
fn bytes(value: &Value) -> Option<u64> {
    if let Some(bytes) = value.as_u64() {
        return i64::try_from(bytes).is_ok().then_some(bytes);
    }
    let text = value.as_str()?.trim().to_ascii_lowercase();
    let text = text.strip_suffix('b').unwrap_or(&text);
    let (digits, unit) = match text.strip_suffix(['k', 'm', 'g']) {
        Some(digits) => (digits, text.get(digits.len()..)?),
        None => (text, ""),
    };
    let factor: u64 = match unit {
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        _ => 1,
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(factor).filter(|bytes| i64::try_from(*bytes).is_ok())
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // checked to be between 0.01 and 1000 first
fn nano_cpus(cores: f64) -> Option<u64> {
    (0.01..=1000.0).contains(&cores).then(|| (cores * 1e9).round() as u64)
}
