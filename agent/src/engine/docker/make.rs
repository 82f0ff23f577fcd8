//! What Docker is asked for.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use bollard::models::{
    ContainerCreateBody, ContainerUpdateBody, HostConfig, HostConfigLogConfig, Mount, MountType, MountVolumeOptions,
    NetworkingConfig, PortBinding, RestartPolicy as DockerRestartPolicy, RestartPolicyNameEnum,
};
use dtma_api::instance::Transport;

use super::network;
use crate::engine::Link;
use crate::instance::network::PROXY_VARIABLES;
use crate::instance::{DeploymentId, Egress, Environment, HostPort, RestartPolicy, SessionOf, Spec, Volume};

/// Label of everything the agent makes: `true`.
pub(super) const MANAGED: &str = "dtma.managed";
/// Label telling agents on one host apart.
pub(super) const SCOPE: &str = "dtma.scope";
/// Label: name of the instance.
pub(super) const INSTANCE: &str = "dtma.instance";
/// Label: the backend's id.
const ACCOUNT_TOOL_INSTANCE_ID: &str = "dtma.account-tool-instance-id";
/// Label: which deploy made it.
pub(super) const DEPLOYMENT: &str = "dtma.deployment";
/// Label: hash of the spec.
pub(super) const SPEC_HASH: &str = "dtma.spec-hash";
/// Label: the spec as JSON, environment values left out.
pub(super) const SPEC: &str = "dtma.spec";

/// Label: the session a container is for. Such a container bears none of the labels above by which an instance's own is known, so that no agent,
/// not even one from before there were any, can take it for that: to such a one it is nobody's, and is removed.
pub(super) const SESSION: &str = "dtma.session";
/// Label: the instance the session is with.
pub(super) const SESSION_OF: &str = "dtma.session-of";

/// Size at which a container's log file is turned over.
const LOG_SIZE: &str = "10m";
/// How many log files are kept.
const LOG_FILES: &str = "3";

/// What members of a group may add to each other's names, so that programs don't take them for something out in the world.
pub(super) const GROUP_DOMAIN: &str = ".group";
/// What is on the container's own network, and never behind the proxy.
const NOT_PROXIED: &str = "localhost,127.0.0.1,::1,.group";
/// Docker asks name servers from the host's own network unless it is given others, and so names would lead out where nothing else does.
/// Nobody answers there; names of a group's members are Docker's own.
const NO_NAME_SERVER: &str = "127.0.0.1";
/// So that a program finds out soon that a name can't be had.
const IMPATIENT: [&str; 2] = ["timeout:2", "attempts:1"];

/// What the names of everything begin with.
pub(super) fn base_name(scope: &str) -> String {
    if scope == "main" { "dtma".to_owned() } else { format!("dtma-{scope}") }
}

fn volume_name(spec: &Spec, volume: &Volume, scope: &str) -> String {
    // A volume's own name has no dot in it, so two instances can't get the same.
    format!("{}.{}.{}", base_name(scope), spec.name, volume.name)
}

/// Labels of the agent's networks.
pub(super) fn network_labels(scope: &str) -> HashMap<String, String> {
    HashMap::from([(MANAGED.to_owned(), "true".to_owned()), (SCOPE.to_owned(), scope.to_owned())])
}

/// Where a container is put.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Place {
    /// The address it keeps.
    pub(super) address: Option<Ipv4Addr>,
    /// Where the way out is, for those who have only that one.
    pub(super) proxy: Option<Ipv4Addr>,
}

/// The variables by which programs find the proxy.
fn proxy_variables(proxy: Ipv4Addr) -> impl Iterator<Item = String> {
    let url = format!("http://{proxy}:{}", crate::egress::PORT);
    PROXY_VARIABLES.into_iter().map(move |name| match name {
        "NO_PROXY" | "no_proxy" => format!("{name}={NOT_PROXIED}"),
        // Node reads the others only when told to.
        "NODE_USE_ENV_PROXY" => format!("{name}=1"),
        _ => format!("{name}={url}"),
    })
}

fn labels(spec: &Spec, deployment: DeploymentId, scope: &str) -> HashMap<String, String> {
    let mut told = spec.clone();
    let names = told.process.environment.0.into_keys();
    told.process.environment = Environment(names.map(|name| (name, String::new())).collect());
    // Serialising a spec can't fail; an empty label would only mean that a lost ledger can't be put together from it.
    let json = serde_json::to_string(&told).unwrap_or_default();
    let own = [
        (MANAGED, "true".to_owned()),
        (SCOPE, scope.to_owned()),
        (INSTANCE, spec.name.to_string()),
        (ACCOUNT_TOOL_INSTANCE_ID, spec.account_tool_instance_id.to_string()),
        (DEPLOYMENT, deployment.0.to_string()),
        (SPEC_HASH, spec.hash().as_str().to_owned()),
        (SPEC, json),
    ];
    let callers = spec.labels.iter().map(|(key, value)| (key.clone(), value.clone()));
    callers.chain(own.map(|(key, value)| (key.to_owned(), value))).collect()
}

/// The container of an instance.
pub(super) fn container(spec: &Spec, deployment: DeploymentId, scope: &str, place: Place) -> ContainerCreateBody {
    let process = &spec.process;
    let proxy = place.proxy.map(proxy_variables).into_iter().flatten();
    let own = process.environment.0.iter();
    let own = own.filter(|(name, _)| place.proxy.is_none() || !PROXY_VARIABLES.contains(&name.as_str()));
    let variables = own.map(|(name, value)| format!("{name}={value}")).chain(proxy);
    let home = Link::home(&spec.network);
    let stdio = spec.mcp.as_ref().is_some_and(|mcp| mcp.transport == Transport::Stdio);
    let ports: Vec<String> =
        spec.ports.iter().map(|port| format!("{}/{}", port.container, port.protocol.as_str())).collect();
    ContainerCreateBody {
        image: Some(spec.image.to_string()),
        env: Some(variables.collect()),
        entrypoint: process.entrypoint.clone(),
        cmd: process.command.clone(),
        working_dir: process.working_dir.clone(),
        user: process.user.clone(),
        labels: Some(labels(spec, deployment, scope)),
        // Without this a port binding publishes nothing.
        exposed_ports: Some(ports).filter(|ports| !ports.is_empty()),
        // A stdio server ends as soon as its standard input does.
        open_stdin: Some(stdio),
        networking_config: Some(NetworkingConfig {
            endpoints_config: Some(HashMap::from([(
                network::name(scope, &home),
                network::endpoint(Some(&spec.name), &home, place.address),
            )])),
        }),
        host_config: Some(host_config(spec, deployment, scope)),
        ..ContainerCreateBody::default()
    }
}

/// The container of one session of an instance, from `image`.
pub(super) fn session_container(
    session: &SessionOf,
    spec: &Spec,
    deployment: DeploymentId,
    scope: &str,
    place: Place,
    image: String,
) -> ContainerCreateBody {
    // Whose process ends is over; and its ports are the instance's.
    let own = Spec { ports: Vec::new(), restart: RestartPolicy::Never, ..spec.clone() };
    let home = Link::home(&own.network);
    let labels = [
        (MANAGED, "true".to_owned()),
        (SCOPE, scope.to_owned()),
        (SESSION, session.id.0.to_string()),
        (SESSION_OF, session.instance.to_string()),
        (DEPLOYMENT, deployment.0.to_string()),
    ];
    let callers = own.labels.clone().into_iter();
    ContainerCreateBody {
        image: Some(image),
        labels: Some(callers.chain(labels.map(|(key, value)| (key.to_owned(), value))).collect()),
        networking_config: Some(NetworkingConfig {
            endpoints_config: Some(HashMap::from([(
                network::name(scope, &home),
                // Whoever asks for the instance by its name gets the instance.
                network::endpoint(None, &home, place.address),
            )])),
        }),
        ..container(&own, deployment, scope, place)
    }
}

/// What [`super::super::Settings`] are to be, for a container that is there.
pub(super) fn adjustment(spec: &Spec) -> ContainerUpdateBody {
    let memory = signed(spec.limits.memory_bytes);
    ContainerUpdateBody {
        memory: Some(memory),
        // Always together: Docker refuses memory above the swap it knows.
        memory_swap: Some(memory),
        nano_cpus: Some(signed(spec.limits.nano_cpus)),
        pids_limit: Some(i64::from(spec.limits.pids)),
        restart_policy: Some(restart_policy(spec.restart)),
        ..ContainerUpdateBody::default()
    }
}

fn signed(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}

fn host_config(spec: &Spec, deployment: DeploymentId, scope: &str) -> HostConfig {
    let limits = spec.limits;
    let mut bindings: HashMap<String, Option<Vec<PortBinding>>> = HashMap::new();
    for port in &spec.ports {
        let binding = PortBinding {
            host_ip: Some(spec.publish_on.to_string()),
            host_port: Some(match port.host {
                HostPort::Exactly(number) => number.to_string(),
                HostPort::Any => String::new(),
            }),
        };
        let key = format!("{}/{}", port.container, port.protocol.as_str());
        bindings.entry(key).or_default().get_or_insert_default().push(binding);
    }
    let volume_labels = HashMap::from([
        (MANAGED.to_owned(), "true".to_owned()),
        (SCOPE.to_owned(), scope.to_owned()),
        (INSTANCE.to_owned(), spec.name.to_string()),
        (DEPLOYMENT.to_owned(), deployment.0.to_string()),
    ]);
    let mounts = spec.volumes.iter().map(|volume| Mount {
        target: Some(volume.path.clone()),
        source: Some(volume_name(spec, volume, scope)),
        typ: Some(MountType::VOLUME),
        // Docker gives these only to a volume it makes here; one that was there keeps those of the deploy that made it.
        volume_options: Some(MountVolumeOptions { labels: Some(volume_labels.clone()), ..Default::default() }),
        ..Mount::default()
    });
    let sandbox = &spec.sandbox;
    let shut_in = spec.network.egress != Egress::Open;
    HostConfig {
        network_mode: Some(network::name(scope, &Link::home(&spec.network))),
        dns: Some(vec![NO_NAME_SERVER.to_owned()]).filter(|_| shut_in),
        dns_options: Some(IMPATIENT.map(str::to_owned).to_vec()).filter(|_| shut_in),
        port_bindings: Some(bindings).filter(|bindings| !bindings.is_empty()),
        mounts: Some(mounts.collect::<Vec<_>>()).filter(|mounts| !mounts.is_empty()),
        restart_policy: Some(restart_policy(spec.restart)),
        memory: Some(signed(limits.memory_bytes)),
        // The same as `memory`: no swap on top, or a leaking server would slow the whole droplet down before it is ended.
        memory_swap: Some(signed(limits.memory_bytes)),
        nano_cpus: Some(signed(limits.nano_cpus)),
        pids_limit: Some(i64::from(limits.pids)),
        // Passes signals on, so that a server without a handler for SIGTERM stops at once, and reaps what it leaves.
        init: Some(true),
        security_opt: Some(vec!["no-new-privileges:true".to_owned()]),
        cap_drop: Some(vec!["ALL".to_owned()]),
        cap_add: Some(sandbox.capabilities.iter().map(|capability| capability.as_str().to_owned()).collect()),
        readonly_rootfs: Some(sandbox.read_only_root),
        tmpfs: Some(sandbox.tmpfs.iter().map(|(path, options)| (path.clone(), options.clone())).collect()),
        shm_size: sandbox.shm_bytes.map(signed),
        log_config: Some(HostConfigLogConfig {
            typ: Some("json-file".to_owned()),
            config: Some(HashMap::from([
                ("max-size".to_owned(), LOG_SIZE.to_owned()),
                ("max-file".to_owned(), LOG_FILES.to_owned()),
            ])),
        }),
        ..HostConfig::default()
    }
}

fn restart_policy(policy: RestartPolicy) -> DockerRestartPolicy {
    let (name, retries) = match policy {
        RestartPolicy::UnlessStopped => (RestartPolicyNameEnum::UNLESS_STOPPED, None),
        RestartPolicy::OnFailure { max_retries } => (RestartPolicyNameEnum::ON_FAILURE, Some(i64::from(max_retries))),
        RestartPolicy::Never => (RestartPolicyNameEnum::NO, None),
    };
    DockerRestartPolicy { name: Some(name), maximum_retry_count: retries }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::SessionId;
    use crate::instance::spec::examples;

    fn made(spec: &Spec) -> ContainerCreateBody {
        container(spec, DeploymentId(uuid::Uuid::nil()), "main", Place::default())
    }

    #[test]
    fn every_container_is_shut_in_whatever_was_asked() {
        let host = made(&examples::spec("one")).host_config.unwrap();
        assert_eq!(host.cap_drop.unwrap(), ["ALL"]);
        assert_eq!(host.security_opt.unwrap(), ["no-new-privileges:true"]);
        assert_eq!(host.init, Some(true));
        assert_eq!(host.pids_limit, Some(256));
        assert_eq!((host.memory, host.memory_swap), (Some(536_870_912), Some(536_870_912)));
        assert_eq!(host.nano_cpus, Some(1_000_000_000));
        assert_eq!(host.network_mode.as_deref(), Some("dtma"));
        assert_eq!(host.log_config.unwrap().config.unwrap().get("max-size").map(String::as_str), Some("10m"));
        assert_eq!((host.binds, host.privileged, host.port_bindings), (None, None, None));
    }

    #[test]
    fn labels_hold_names_of_environment_variables_and_never_their_values() {
        let mut spec = examples::spec("one");
        spec.process.environment.0.insert("TOKEN".into(), "hunter2".into());
        let body = made(&spec);
        let labels = body.labels.unwrap();
        assert!(!format!("{labels:?}").contains("hunter2"));
        let told: Spec = serde_json::from_str(&labels[SPEC]).unwrap();
        assert_eq!(told.process.environment.0.get("TOKEN").map(String::as_str), Some(""));
        assert_eq!(labels[SPEC_HASH], spec.hash().as_str());
        assert_eq!(body.env.unwrap(), ["TOKEN=hunter2"]);
    }

    #[test]
    fn whoever_is_shut_in_asks_no_name_server_and_only_a_list_leads_to_the_proxy() {
        let mut spec = examples::spec("one");
        spec.process.environment.0.insert("https_proxy".into(), "http://elsewhere".into());
        let open = made(&spec);
        assert_eq!(open.env.unwrap(), ["https_proxy=http://elsewhere"]);
        assert_eq!(
            (open.host_config.as_ref().unwrap().dns.clone(), open.host_config.unwrap().dns_options),
            (None, None)
        );

        spec.network.egress = Egress::AllowList([("a.b".parse().unwrap())].into());
        let place = Place { address: Some(Ipv4Addr::new(172, 20, 3, 4)), proxy: Some(Ipv4Addr::new(172, 20, 0, 1)) };
        let listed = container(&spec, DeploymentId(uuid::Uuid::nil()), "main", place);
        let variables = listed.env.unwrap();
        for expected in
            ["https_proxy=http://172.20.0.1:3128", "HTTP_PROXY=http://172.20.0.1:3128", "NODE_USE_ENV_PROXY=1"]
        {
            assert_eq!(variables.iter().filter(|variable| *variable == expected).count(), 1, "{variables:?}");
        }
        assert!(!variables.iter().any(|variable| variable.contains("elsewhere")), "{variables:?}");
        let host = listed.host_config.unwrap();
        assert_eq!(
            (host.network_mode.as_deref(), host.dns.unwrap()),
            (Some("dtma.listed"), vec!["127.0.0.1".to_owned()])
        );
        let endpoints = listed.networking_config.unwrap().endpoints_config.unwrap();
        let config = endpoints["dtma.listed"].ipam_config.clone().unwrap();
        assert_eq!(config.ipv4_address.as_deref(), Some("172.20.3.4"));
    }

    #[test]
    fn a_sessions_container_is_made_alike_and_can_not_be_taken_for_the_instances_own() {
        let mut spec = examples::spec("one");
        spec.network.group = Some("team".parse().unwrap());
        spec.volumes.push(Volume { name: "data".into(), path: "/data".into() });
        let port = crate::instance::Port {
            container: 80,
            protocol: crate::instance::PortProtocol::Tcp,
            host: HostPort::Exactly(8081),
        };
        spec.ports.push(port);
        spec.labels.insert("team".into(), "blue".into());
        let session = SessionOf { id: SessionId(uuid::Uuid::from_u128(7)), instance: spec.name.clone() };
        let deployment = DeploymentId(uuid::Uuid::nil());
        let (place, image) = (Place::default(), "sha256:abc".to_owned());
        let body = session_container(&session, &spec, deployment, "main", place, image);
        let main = made(&spec);
        let labels = body.labels.unwrap();
        for own in [INSTANCE, SPEC_HASH, SPEC, ACCOUNT_TOOL_INSTANCE_ID] {
            assert!(main.labels.as_ref().unwrap().contains_key(own) && !labels.contains_key(own), "{own}");
        }
        for (label, value) in [(MANAGED, "true"), (SCOPE, "main"), (SESSION_OF, "one"), ("team", "blue")] {
            assert_eq!(labels.get(label).map(String::as_str), Some(value), "{label}");
        }
        assert_eq!(labels[SESSION], session.id.0.to_string());
        let (own, others) = (body.host_config.unwrap(), main.host_config.unwrap());
        assert_eq!((own.port_bindings, body.exposed_ports), (None, None));
        assert_eq!(own.restart_policy.unwrap().name, Some(RestartPolicyNameEnum::NO));
        assert_eq!((own.memory, own.nano_cpus, own.pids_limit), (others.memory, others.nano_cpus, others.pids_limit));
        assert_eq!((own.mounts, own.cap_drop, own.init), (others.mounts, others.cap_drop, others.init));
        assert_eq!((body.image.as_deref(), own.network_mode), (Some("sha256:abc"), others.network_mode));
        let aliases = |config: Option<NetworkingConfig>| {
            let endpoints = config.unwrap().endpoints_config.unwrap();
            endpoints.into_values().next().unwrap().aliases
        };
        assert_eq!(aliases(body.networking_config), None);
        assert!(aliases(main.networking_config).is_some());
    }

    #[test]
    fn a_published_port_is_exposed_and_bound_to_loopback() {
        let mut spec = examples::spec("one");
        let protocol = crate::instance::PortProtocol::Tcp;
        spec.ports.push(crate::instance::Port { container: 80, protocol, host: HostPort::Exactly(8081) });
        spec.ports.push(crate::instance::Port { container: 81, protocol, host: HostPort::Any });
        let body = made(&spec);
        assert_eq!(body.exposed_ports.unwrap(), ["80/tcp", "81/tcp"]);
        let bindings = body.host_config.unwrap().port_bindings.unwrap();
        let binding = |key: &str| bindings[key].as_ref().unwrap()[0].clone();
        assert_eq!(binding("80/tcp").host_ip.as_deref(), Some("127.0.0.1"));
        assert_eq!(binding("80/tcp").host_port.as_deref(), Some("8081"));
        assert_eq!(binding("81/tcp").host_port.as_deref(), Some(""));
    }
}
