//! What Docker answers, in the agent's own words. Docker's answers are read leniently: what is absent is as if it were empty.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use bollard::container::LogOutput;
use bollard::models::{
    ContainerInspectResponse, ContainerState, ContainerStateStatusEnum, ContainerSummary, CreateImageInfo, HostConfig,
    ImageInspect, NetworkSettings, PortSummaryTypeEnum, RestartPolicyNameEnum,
};
use dtma_api::instance::{PortView, Progress};
use jiff::Timestamp;

use super::make;
use super::network::{self, Networks};
use crate::engine::{Condition, Container, ContainerId, Exit, Image, Link, LogLine, LogStream, Settings};
use crate::instance::{
    DeploymentId, ImageReference, Limits, PortProtocol, RestartPolicy, SessionId, SessionOf, SpecHash,
};

/// A container of the agent with this scope, whose networks are these.
pub(super) fn container(answer: ContainerInspectResponse, scope: &str, networks: &Networks) -> Container {
    let mut labels = answer.config.and_then(|config| config.labels).unwrap_or_default();
    let mut label = |name: &str| labels.remove(name).unwrap_or_default();
    let network_settings = answer.network_settings;
    let (links, address, own_address) =
        network_settings.as_ref().map(|settings| links(settings, scope, networks)).unwrap_or_default();
    Container {
        id: ContainerId(answer.id.unwrap_or_default()),
        name: answer.name.as_deref().unwrap_or_default().trim_start_matches('/').to_owned(),
        instance: label(make::INSTANCE).parse().ok(),
        session: session(&label(make::SESSION), &label(make::SESSION_OF)),
        spec_hash: SpecHash::from_label(&label(make::SPEC_HASH)),
        spec_label: label(make::SPEC),
        deployment: label(make::DEPLOYMENT).parse().ok().map(DeploymentId),
        created: answer.created.and_then(|text| text.parse::<Timestamp>().ok()).map_or(0, Timestamp::as_second),
        condition: condition(answer.state.unwrap_or_default()),
        settings: settings(&answer.host_config.unwrap_or_default()),
        restart_count: answer.restart_count.and_then(|count| u64::try_from(count).ok()).unwrap_or(0),
        address,
        own_address,
        links,
        ports: network_settings.map(ports).unwrap_or_default(),
    }
}

fn session(id: &str, of: &str) -> Option<SessionOf> {
    Some(SessionOf { id: SessionId(id.parse().ok()?), instance: of.parse().ok()? })
}

fn settings(host: &HostConfig) -> Settings {
    // Docker says 0, -1 or nothing where there is no limit.
    let count = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok()).unwrap_or(0);
    let policy = host.restart_policy.clone().unwrap_or_default();
    let restart = match policy.name.unwrap_or(RestartPolicyNameEnum::EMPTY) {
        RestartPolicyNameEnum::UNLESS_STOPPED => Some(RestartPolicy::UnlessStopped),
        RestartPolicyNameEnum::ON_FAILURE => {
            let max_retries = u32::try_from(count(policy.maximum_retry_count)).unwrap_or(u32::MAX);
            Some(RestartPolicy::OnFailure { max_retries })
        }
        RestartPolicyNameEnum::NO | RestartPolicyNameEnum::EMPTY => Some(RestartPolicy::Never),
        RestartPolicyNameEnum::ALWAYS => None,
    };
    let limits = Limits {
        memory_bytes: count(host.memory),
        nano_cpus: count(host.nano_cpus),
        pids: u32::try_from(count(host.pids_limit)).unwrap_or(u32::MAX),
    };
    Settings { limits, restart }
}

fn condition(state: ContainerState) -> Condition {
    let exit = Exit {
        code: state.exit_code.unwrap_or(0),
        out_of_memory: state.oom_killed.unwrap_or(false),
        error: state.error.unwrap_or_default(),
    };
    let since = state.started_at.and_then(|text| text.parse().ok()).unwrap_or(Timestamp::UNIX_EPOCH);
    match state.status.unwrap_or(ContainerStateStatusEnum::EMPTY) {
        ContainerStateStatusEnum::CREATED => Condition::Created,
        ContainerStateStatusEnum::RUNNING | ContainerStateStatusEnum::STOPPING => Condition::Running { since },
        ContainerStateStatusEnum::PAUSED => Condition::Paused,
        ContainerStateStatusEnum::RESTARTING => Condition::Restarting(exit),
        ContainerStateStatusEnum::REMOVING => Condition::Removing,
        ContainerStateStatusEnum::EXITED => Condition::Exited(exit),
        ContainerStateStatusEnum::DEAD => Condition::Dead,
        ContainerStateStatusEnum::EMPTY => Condition::Dead,
    }
}

/// The agent's networks a container is on, its address on the one the agent reaches it by, and the address that was given to it.
fn links(
    settings: &NetworkSettings,
    scope: &str,
    networks: &Networks,
) -> (BTreeSet<Link>, Option<IpAddr>, Option<IpAddr>) {
    let mut links = BTreeSet::new();
    let mut addresses = BTreeMap::new();
    let mut own_address = None;
    for (name, endpoint) in settings.networks.iter().flatten() {
        let id = endpoint.network_id.as_deref().unwrap_or_default();
        let Some(link) = networks.link(scope, name, id) else { continue };
        if let Some(address) = endpoint.ip_address.as_deref().and_then(|address| address.parse().ok()) {
            addresses.insert(link.clone(), address);
        }
        if link == Link::Listed {
            own_address = network::given_address(endpoint);
        }
        links.insert(link);
    }
    // On its own network, if it has one beside its group's; any would do for the agent, and it has to be the same every time.
    let address = addresses.into_iter().min_by_key(|(link, _)| matches!(link, Link::Group(_)));
    (links, address.map(|(_, address)| address), own_address)
}

fn ports(settings: NetworkSettings) -> Vec<PortView> {
    let mut ports: Vec<PortView> = settings
        .ports
        .unwrap_or_default()
        .into_iter()
        .flat_map(|(key, bindings)| {
            let (number, protocol) =
                key.split_once('/').map_or((key.as_str(), "tcp"), |(number, protocol)| (number, protocol));
            let (number, protocol) = (number.parse::<u16>().ok(), protocol.to_owned());
            bindings.unwrap_or_default().into_iter().filter_map(move |binding| {
                Some(PortView {
                    ip: binding.host_ip.unwrap_or_default(),
                    private_port: number?,
                    public_port: binding.host_port?.parse().ok()?,
                    protocol: protocol.clone(),
                })
            })
        })
        .collect();
    ports.sort_by(|a, b| {
        (a.private_port, &a.protocol, a.public_port).cmp(&(b.private_port, &b.protocol, b.public_port))
    });
    ports
}

/// An image; its digest is the one under the name it was asked for.
pub(super) fn image(answer: &ImageInspect, asked: &ImageReference) -> Image {
    let (name, _) = asked.split();
    let digests = answer.repo_digests.as_deref().unwrap_or_default();
    let split = || digests.iter().filter_map(|text| text.split_once('@'));
    let same_name = split().find(|(repository, _)| *repository == name || repository.ends_with(&format!("/{name}")));
    let id = answer.id.clone().unwrap_or_default();
    Image { id, digest: same_name.or_else(|| split().next()).map(|(_, digest)| digest.to_owned()) }
}

/// Whether a container publishes this port on the host.
pub(super) fn publishes(summary: &ContainerSummary, port: u16, protocol: PortProtocol) -> bool {
    let wanted = match protocol {
        PortProtocol::Tcp => PortSummaryTypeEnum::TCP,
        PortProtocol::Udp => PortSummaryTypeEnum::UDP,
    };
    summary.ports.iter().flatten().any(|held| held.public_port == Some(port) && held.typ == Some(wanted))
}

/// A listed container's name.
pub(super) fn name(summary: ContainerSummary) -> Option<String> {
    let name = summary.names?.into_iter().next()?;
    Some(name.trim_start_matches('/').to_owned())
}

/// One line of output, which Docker puts a time in front of.
pub(super) fn line(output: LogOutput) -> LogLine {
    let stream = match &output {
        LogOutput::StdErr { .. } => LogStream::Stderr,
        LogOutput::StdOut { .. } | LogOutput::StdIn { .. } | LogOutput::Console { .. } => LogStream::Stdout,
    };
    let bytes = output.into_bytes();
    let text = String::from_utf8_lossy(&bytes);
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    let (at, message) = match text.split_once(' ').map(|(at, message)| (at.parse::<Timestamp>(), message)) {
        Some((Ok(at), message)) => (Some(at), message),
        Some((Err(_), _)) | None => match text.parse::<Timestamp>() {
            Ok(at) => (Some(at), ""),
            Err(_) => (None, text),
        },
    };
    LogLine { at, stream, message: message.to_owned() }
}

/// The layers of an image being pulled.
#[derive(Debug, Default)]
pub(super) struct Layers {
    layers: HashMap<String, Layer>,
}

#[derive(Debug, Default)]
struct Layer {
    /// Bytes there, and bytes in all; 0 of 0 while nothing has been said about them.
    bytes: (u64, u64),
    done: bool,
}

impl Layers {
    /// Takes note of one line of a pull's answer.
    pub(super) fn take(&mut self, answer: CreateImageInfo) {
        let Some(id) = answer.id else { return };
        let bytes = |count: Option<i64>| count.and_then(|count| u64::try_from(count).ok());
        match answer.status.as_deref() {
            Some("Pulling fs layer" | "Waiting") => {
                self.layers.entry(id).or_default();
            }
            Some("Already exists") => self.layers.entry(id).or_default().done = true,
            Some("Downloading") => {
                let Some(detail) = answer.progress_detail else { return };
                if let (Some(current), Some(total)) = (bytes(detail.current), bytes(detail.total)) {
                    self.layers.entry(id).or_default().bytes = (current.min(total), total);
                }
            }
            Some(word @ ("Download complete" | "Pull complete")) => {
                let layer = self.layers.entry(id).or_default();
                layer.bytes.0 = layer.bytes.1;
                layer.done |= word == "Pull complete";
            }
            Some(_) | None => {}
        }
    }

    /// How far the pull is, once there is a layer.
    pub(super) fn progress(&self) -> Option<Progress> {
        if self.layers.is_empty() {
            return None;
        }
        let sum = |of: fn(&Layer) -> u64| self.layers.values().map(of).fold(0, u64::saturating_add);
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Some(Progress {
            current_bytes: sum(|layer| layer.bytes.0),
            total_bytes: sum(|layer| layer.bytes.1),
            layers_done: count(self.layers.values().filter(|layer| layer.done).count()),
            layers_total: count(self.layers.len()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_loses_its_time_and_nothing_else() {
        let stderr = |text: &str| line(LogOutput::StdErr { message: text.to_owned().into() });
        let read = stderr("2026-01-02T03:04:05.123456789Z  two spaces \n");
        assert_eq!((read.message.as_str(), read.stream), (" two spaces ", LogStream::Stderr));
        assert_eq!(read.at.unwrap().as_nanosecond() % 1_000_000_000, 123_456_789);
        assert_eq!(stderr("2026-01-02T03:04:05Z \r\n").message, "");
        assert_eq!(stderr("no time here").message, "no time here");
    }

    #[test]
    fn progress_never_passes_the_whole() {
        let report = |id: &str, status: &str, current: i64, total: i64| CreateImageInfo {
            id: Some(id.into()),
            status: Some(status.into()),
            progress_detail: Some(bollard::models::ProgressDetail { current: Some(current), total: Some(total) }),
            ..CreateImageInfo::default()
        };
        let mut layers = Layers::default();
        layers.take(report("tag", "Pulling from repository", 0, 0));
        assert_eq!(layers.progress(), None);
        let mut after = |id, status, current, total| {
            layers.take(report(id, status, current, total));
            let sum = layers.progress().unwrap();
            (sum.current_bytes, sum.total_bytes, sum.layers_done, sum.layers_total)
        };
        assert_eq!(after("a", "Pulling fs layer", 0, 0), (0, 0, 0, 1));
        assert_eq!(after("b", "Already exists", 0, 0), (0, 0, 1, 2));
        assert_eq!(after("a", "Downloading", 5, 10), (5, 10, 1, 2));
        assert_eq!(after("a", "Extracting", 1, 10), (5, 10, 1, 2));
        assert_eq!(after("a", "Downloading", 12, 10), (10, 10, 1, 2));
        assert_eq!(after("a", "Download complete", 0, 0), (10, 10, 1, 2));
        assert_eq!(after("a", "Pull complete", 0, 0), (10, 10, 2, 2));
    }
}
