//! What must hold of everything that goes to Docker and comes from there. See [`crate::fuzz`].

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeSet;

use bollard::container::LogOutput;
use bollard::models::ContainerInspectResponse;
use dtma_api::InstanceName;
use serde_json::Value;

use super::network::{self, Networks};
use super::{make, read};
use crate::engine::{Link, LogStream};
use crate::instance::{
    Capability, DeploymentId, Egress, HealthGate, Policy, Present, Refusal, Spec, validate, validate_group,
    validate_update,
};

/// All a container is ever asked for. Whatever isn't here might give it the host; think before adding to it.
const CONTAINER: [&str; 11] = [
    "Cmd",
    "Entrypoint",
    "Env",
    "ExposedPorts",
    "HostConfig",
    "Image",
    "Labels",
    "OpenStdin",
    "User",
    "WorkingDir",
    "NetworkingConfig",
];
const HOST_CONFIG: [&str; 18] = [
    "CapAdd",
    "CapDrop",
    "Dns",
    "DnsOptions",
    "Init",
    "LogConfig",
    "Memory",
    "MemorySwap",
    "Mounts",
    "NanoCpus",
    "NetworkMode",
    "PidsLimit",
    "PortBindings",
    "ReadonlyRootfs",
    "RestartPolicy",
    "SecurityOpt",
    "ShmSize",
    "Tmpfs",
];

/// A deploy is refused for reasons that can be shown, or makes a container that is shut in.
pub(crate) fn deploy(data: &[u8]) {
    let Ok(body) = serde_json::from_slice::<Value>(data) else { return };
    let policy = Policy::default();
    match validate(&body, &policy) {
        Err(refusal) => {
            told(&refusal);
            assert_eq!(validate(&body, &policy), Err(refusal));
        }
        Ok((spec, warnings)) => {
            assert!(warnings.iter().all(|warning| warning.path.starts_with('$')));
            accepted(&spec, &policy);
        }
    }
}

/// An update as well, and it stays the same instance's.
pub(crate) fn update(data: &[u8]) {
    let Ok(body) = serde_json::from_slice::<Value>(data) else { return };
    let (name, id) = ("one".parse().unwrap(), "ati-1".parse().unwrap());
    let policy = Policy::default();
    match validate_update(&body, Present { name: &name, account_tool_instance_id: &id }, &policy) {
        Err(refusal) => told(&refusal),
        Ok((spec, gate, _)) => {
            assert_eq!((&spec.name, &spec.account_tool_instance_id), (&name, &id));
            assert!((1..=HealthGate::MAX_TIMEOUT_SECONDS).contains(&gate.timeout_seconds), "{gate:?}");
            assert!((1..=HealthGate::MAX_SUCCESSES).contains(&gate.successes), "{gate:?}");
            accepted(&spec, &policy);
        }
    }
}

/// A group's members as well; their names are their own, and an order in which they can be brought up exists.
pub(crate) fn group(data: &[u8]) {
    let Ok(body) = serde_json::from_slice::<Value>(data) else { return };
    let policy = Policy::default();
    match validate_group(&body, &policy) {
        Err(refusal) => told(&refusal),
        Ok(plan) => {
            let names: BTreeSet<_> = plan.servers.iter().map(|spec| &spec.name).collect();
            let ids: BTreeSet<_> = plan.servers.iter().map(|spec| &spec.account_tool_instance_id).collect();
            assert!(!names.is_empty() && plan.most_at_once > 0);
            assert_eq!((names.len(), ids.len()), (plan.servers.len(), plan.servers.len()), "two are called the same");
            let mut waiting: BTreeSet<_> = names.clone();
            while !waiting.is_empty() {
                let ready = |name: &&InstanceName| {
                    plan.after.get(*name).into_iter().flatten().all(|before| !waiting.contains(before))
                };
                let ready: BTreeSet<_> = waiting.iter().copied().filter(ready).collect();
                assert!(!ready.is_empty(), "these wait for each other: {waiting:?}");
                waiting.retain(|name| !ready.contains(name));
            }
            assert!(
                plan.after
                    .iter()
                    .all(|(name, before)| names.contains(name) && before.iter().all(|one| names.contains(one)))
            );
            plan.servers.iter().for_each(|spec| accepted(spec, &policy));
        }
    }
}

fn told(refusal: &Refusal) {
    assert!(!refusal.faults.is_empty());
    assert!(refusal.faults.iter().all(|fault| fault.path.starts_with('$') && !fault.problem.is_empty()));
}

/// What a caller's spec may come to.
fn accepted(spec: &Spec, policy: &Policy) {
    kept(spec);
    let made = shut_in(spec);
    let host = &made["HostConfig"];
    let askable = Capability::ASKABLE.map(Capability::as_str);
    assert!(list(&host["CapAdd"]).all(|capability| askable.contains(&capability.as_str().unwrap())));
    for binding in values(&host["PortBindings"]).flat_map(|list| list.as_array().unwrap()) {
        assert_eq!(binding["HostIp"], "127.0.0.1");
        assert_ne!(binding["HostPort"], policy.agent_port.to_string(), "the agent's own port");
    }
    let targets = list(&host["Mounts"]).map(|mount| mount["Target"].as_str().unwrap());
    let targets: Vec<&str> = targets.chain(keys(&host["Tmpfs"])).collect();
    for target in &targets {
        assert!(target.starts_with('/') && !target.split('/').any(|part| part == ".." || part == "."));
        for kept in ["/proc", "/sys", "/dev", "/run/secrets"] {
            assert!(*target != kept && !target.starts_with(&format!("{kept}/")), "{target}");
        }
    }
    assert_eq!(targets.iter().collect::<BTreeSet<_>>().len(), targets.len(), "mounted twice: {targets:?}");
    for variable in list(&made["Env"]) {
        let (name, value) = variable.as_str().unwrap().split_once('=').unwrap();
        assert!(!name.is_empty() && !value.contains('\0'), "{variable}");
    }
}

/// A spec read from a label, which may be anything, also makes a container that is shut in.
pub(crate) fn label(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let Ok(spec) = serde_json::from_str::<Spec>(text) else { return };
    kept(&spec);
    shut_in(&spec);
}

/// A spec survives being written down, and keeps its hash.
fn kept(spec: &Spec) {
    let again: Spec = serde_json::from_str(&serde_json::to_string(spec).unwrap()).unwrap();
    assert_eq!((&again, again.hash()), (spec, spec.hash()));
}

/// What Docker would be asked for, after a look at all of it.
fn shut_in(spec: &Spec) -> Value {
    let made =
        serde_json::to_value(make::container(spec, DeploymentId(uuid::Uuid::nil()), "main", make::Place::default()))
            .unwrap();
    for (part, allowed) in [(&made, CONTAINER.as_slice()), (&made["HostConfig"], &HOST_CONFIG)] {
        for (key, value) in part.as_object().unwrap() {
            assert!(value.is_null() || allowed.contains(&key.as_str()), "{key} is asked for");
        }
    }
    let host = &made["HostConfig"];
    // One of the agent's own networks, never the host's or another container's.
    let home = network::name("main", &Link::home(&spec.network));
    assert!(home == "dtma" || home.starts_with("dtma."), "{home}");
    assert_eq!(host["NetworkMode"], home.as_str());
    assert!(keys(&made["NetworkingConfig"]["EndpointsConfig"]).eq([home.as_str()]), "{made}");
    // Whoever is shut in has no name server either.
    let name_servers = list(&host["Dns"]).filter_map(Value::as_str);
    assert!(name_servers.eq((spec.network.egress != Egress::Open).then_some("127.0.0.1")), "{host}");
    assert_eq!(host["CapDrop"], serde_json::json!(["ALL"]));
    assert_eq!(host["SecurityOpt"], serde_json::json!(["no-new-privileges:true"]));
    for mount in list(&host["Mounts"]) {
        assert_eq!(mount["Type"], "volume");
        // Docker takes a source with a slash in it for a folder of the host only where it stands first.
        assert!(mount["Source"].as_str().unwrap().starts_with("dtma."), "{mount}");
    }
    let labels = &made["Labels"];
    assert_eq!((&labels["dtma.managed"], &labels["dtma.instance"]), (&"true".into(), &spec.name.as_str().into()));
    let told: Spec = serde_json::from_str(labels["dtma.spec"].as_str().unwrap()).unwrap();
    assert!(told.process.environment.0.values().all(String::is_empty), "a value of the environment is in a label");
    let mut without = spec.clone();
    without.process.environment.0.values_mut().for_each(String::clear);
    assert_eq!(told, without);
    made
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn values(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_object().into_iter().flat_map(|object| object.values())
}

fn keys(value: &Value) -> impl Iterator<Item = &str> {
    value.as_object().into_iter().flat_map(|object| object.keys().map(String::as_str))
}

/// Docker's description of a container is read, or is no description.
pub(crate) fn inspect(data: &[u8]) {
    let Ok(answer) = serde_json::from_slice::<ContainerInspectResponse>(data) else { return };
    let read = read::container(answer, "main", &Networks::default());
    assert!(!read.name.starts_with('/'));
    assert!(read.ports.is_sorted_by_key(|port| (port.private_port, port.protocol.clone(), port.public_port)));
}

/// A line of output loses its time and its end, and nothing else. The first byte chooses the stream.
pub(crate) fn log(data: &[u8]) {
    let Some((stream, message)) = data.split_first() else { return };
    let message = bytes::Bytes::copy_from_slice(message);
    let output = match stream % 4 {
        0 => LogOutput::StdErr { message },
        1 => LogOutput::StdOut { message },
        2 => LogOutput::StdIn { message },
        _ => LogOutput::Console { message },
    };
    let sent = String::from_utf8_lossy(&data[1..]).into_owned();
    let line = read::line(output);
    assert_eq!(line.stream == LogStream::Stderr, stream % 4 == 0);
    let without_end = sent.strip_suffix('\n').unwrap_or(&sent);
    let without_end = without_end.strip_suffix('\r').unwrap_or(without_end);
    assert!(without_end.ends_with(&line.message));
    match line.at {
        None => assert_eq!(line.message, without_end),
        Some(at) => {
            let time = &without_end[..without_end.len() - line.message.len()];
            assert_eq!(time.trim_end_matches(' ').parse::<jiff::Timestamp>().unwrap(), at);
            assert!(time.len() - time.trim_end_matches(' ').len() <= 1, "more than the one space is gone");
        }
    }
}
