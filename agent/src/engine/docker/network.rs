//! The agent's networks: which there are, that each is there once, and who is on them.
//!
//! One bridge for each kind of egress, all with their members kept apart; and for each group one whose members reach each other, with another
//! beside it that leads out, if any of them may go there. All but those for open egress are internal: Docker gives them no way out of
//! the host.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};

use bollard::Docker;
use bollard::models::{
    ContainerSummary, EndpointIpamConfig, EndpointSettings, Ipam, IpamConfig, Network, NetworkConnectRequest,
    NetworkCreateRequest,
};
use bollard::query_parameters::{ListContainersOptionsBuilder, ListNetworksOptionsBuilder};
use dtma_api::InstanceName;
use uuid::Uuid;

use super::errors::{is_in_use, is_missing, is_overlap, sort};
use super::{DockerEngine, make};
use crate::engine::{ContainerId, EngineError, Link};
use crate::instance::{DeploymentId, Spec};

const OPERATION: &str = "make the agent's network";
/// How often the network for allow-lists is tried to be made in a place that was free a moment ago.
const PLACES_TRIED: usize = 3;

/// The agent's networks as they were last seen.
#[derive(Debug, Default)]
pub(super) struct Networks(BTreeMap<Link, Vec<Net>>);

/// One network.
#[derive(Debug, Clone)]
pub(super) struct Net {
    id: String,
    created: String,
    pub(super) gateway: Option<Ipv4Addr>,
    /// Its first address and the number of bits all its addresses share.
    subnet: Option<(Ipv4Addr, u8)>,
}

impl Networks {
    /// The one containers are put on.
    fn first(&self, link: &Link) -> Option<&Net> {
        self.0.get(link)?.first()
    }

    /// The agent's network called `name`, if a container that says its id is `id` can be on it. A container that was never started says none.
    pub(super) fn link(&self, scope: &str, name: &str, id: &str) -> Option<Link> {
        let link = link_called(scope, name)?;
        let there = self.0.get(&link)?;
        (id.is_empty() || there.iter().any(|net| net.id == id)).then_some(link)
    }

    fn groups(&self) -> Vec<Link> {
        self.0.keys().filter(|link| link.is_of_group()).cloned().collect()
    }
}

impl Net {
    fn of(network: &Network) -> Self {
        let configs = network.ipam.as_ref().and_then(|ipam| ipam.config.as_deref()).unwrap_or_default();
        let config = configs.iter().find(|config| subnet(config).is_some());
        Self {
            id: network.id.clone().unwrap_or_default(),
            created: network.created.clone().unwrap_or_default().to_string(),
            gateway: config.and_then(|config| config.gateway.as_deref()?.parse().ok()),
            subnet: config.and_then(subnet),
        }
    }
}

fn subnet(config: &IpamConfig) -> Option<(Ipv4Addr, u8)> {
    let (address, bits) = config.subnet.as_deref()?.split_once('/')?;
    Some((address.parse().ok()?, bits.parse().ok()?))
}

/// What a network is called. No scope has a dot in it, so no two of them can get the same.
pub(super) fn name(scope: &str, link: &Link) -> String {
    let base = make::base_name(scope);
    match link {
        Link::Open => base,
        Link::Closed => format!("{base}.closed"),
        Link::Listed => format!("{base}.listed"),
        Link::Group(group) => format!("{base}.group.{group}"),
        Link::GroupOpen(group) => format!("{base}.group-open.{group}"),
    }
}

fn link_called(scope: &str, text: &str) -> Option<Link> {
    match text.strip_prefix(&make::base_name(scope))? {
        "" => Some(Link::Open),
        ".closed" => Some(Link::Closed),
        ".listed" => Some(Link::Listed),
        rest => match (rest.strip_prefix(".group."), rest.strip_prefix(".group-open.")) {
            (Some(group), _) => group.parse().ok().map(Link::Group),
            (None, Some(group)) => group.parse().ok().map(Link::GroupOpen),
            (None, None) => None,
        },
    }
}

fn request(scope: &str, name: String, link: &Link, place: Option<IpamConfig>) -> NetworkCreateRequest {
    let icc = ("com.docker.network.bridge.enable_icc".to_owned(), link.is_of_group().to_string());
    NetworkCreateRequest {
        name,
        driver: Some("bridge".to_owned()),
        internal: Some(!matches!(link, Link::Open | Link::GroupOpen(_))),
        // Members are kept apart by IPv4 rules only.
        enable_ipv6: Some(false),
        options: Some(HashMap::from([icc])),
        labels: Some(make::network_labels(scope)),
        ipam: place.map(|place| Ipam { config: Some(vec![place]), ..Ipam::default() }),
        ..NetworkCreateRequest::default()
    }
}

/// Addresses of a network a container can be given, in an order that depends on the deployment: so that an address that has just been given
/// up is hardly ever the next one's.
fn candidates(net: &Net, deployment: DeploymentId) -> impl Iterator<Item = Ipv4Addr> {
    let (first, bits) = net.subnet.unwrap_or((Ipv4Addr::UNSPECIFIED, 32));
    // Without the network's own, the broadcast address and the usual gateway.
    let count = 1_u32.checked_shl(32_u32.saturating_sub(u32::from(bits))).unwrap_or(u32::MAX).saturating_sub(3);
    let start = mixed(deployment.0) % count.max(1);
    let gateway = net.gateway;
    let offsets = (0..count).map(move |step| (start + step) % count);
    offsets
        .map(move |offset| Ipv4Addr::from(u32::from(first) + 2 + offset))
        .filter(move |address| Some(*address) != gateway)
}

fn mixed(id: Uuid) -> u32 {
    let (high, low) = id.as_u64_pair();
    let [a, b, c, d, ..] = (high ^ low.rotate_left(17)).to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

impl DockerEngine {
    /// Looks at the agent's networks.
    pub(super) async fn look_at_networks(&self, docker: &Docker) -> Result<(), EngineError> {
        let filters = HashMap::from([("label".to_owned(), self.our_labels())]);
        let options = ListNetworksOptionsBuilder::new().filters(&filters).build();
        let found = docker.list_networks(Some(options)).await.map_err(|error| sort("list networks", error))?;
        let mut networks = Networks::default();
        for network in &found {
            if let Some(link) = link_called(&self.scope, network.name.as_deref().unwrap_or_default()) {
                networks.0.entry(link).or_default().push(Net::of(network));
            }
        }
        for same in networks.0.values_mut() {
            same.sort_by(|a, b| (&a.created, &a.id).cmp(&(&b.created, &b.id)));
        }
        let doubles: Vec<Link> =
            networks.0.iter().filter(|(_, same)| same.len() > 1).map(|(link, _)| link.clone()).collect();
        *self.networks.lock().await = networks;
        for link in doubles {
            let _making = self.making.lock().await;
            let one = self.only_one(docker, &name(&self.scope, &link)).await?;
            self.networks.lock().await.0.insert(link, one.into_iter().collect());
        }
        Ok(())
    }

    /// Nothing is known of the networks any more, until they are looked at again.
    pub(super) async fn forget_networks(&self) {
        *self.networks.lock().await = Networks::default();
    }

    /// The network, made if it isn't there.
    pub(super) async fn network(&self, docker: &Docker, link: &Link) -> Result<Net, EngineError> {
        if let Some(net) = self.networks.lock().await.first(link) {
            return Ok(net.clone());
        }
        let _making = self.making.lock().await;
        let name = name(&self.scope, link);
        if let Some(net) = self.only_one(docker, &name).await? {
            self.networks.lock().await.0.insert(link.clone(), vec![net.clone()]);
            return Ok(net);
        }
        if *link == Link::Listed {
            self.make_in_place(docker, &name, link).await?;
        } else {
            self.make(docker, &name, link, None).await.map_err(|error| sort(OPERATION, error))?;
        }
        // An agent that died while Docker was making it may have left another.
        let made = self.only_one(docker, &name).await?;
        let net = made.ok_or_else(|| EngineError::NetworkGone { operation: OPERATION })?;
        self.networks.lock().await.0.insert(link.clone(), vec![net.clone()]);
        Ok(net)
    }

    async fn make(
        &self,
        docker: &Docker,
        name: &str,
        link: &Link,
        place: Option<IpamConfig>,
    ) -> Result<(), bollard::errors::Error> {
        docker.create_network(request(&self.scope, name.to_owned(), link, place)).await.map(drop)
    }

    /// Makes a network on which containers can be given addresses. Docker allows that only where the subnet was asked for, and only Docker
    /// knows which are free: so it is asked for the one it has just chosen for another.
    async fn make_in_place(&self, docker: &Docker, name: &str, link: &Link) -> Result<(), EngineError> {
        let trial = format!("{name}.trial");
        for tried in 1.. {
            self.unmake(docker, &trial).await?;
            self.make(docker, &trial, link, None).await.map_err(|error| sort(OPERATION, error))?;
            let chosen = docker.inspect_network(&trial, None).await.map_err(|error| sort(OPERATION, error))?;
            self.unmake(docker, &trial).await?;
            let configs = chosen.ipam.and_then(|ipam| ipam.config).unwrap_or_default();
            let place =
                configs.into_iter().find(|config| subnet(config).is_some()).ok_or_else(|| EngineError::Failed {
                    operation: OPERATION,
                    message: "Docker gave a network without an IPv4 subnet".to_owned(),
                })?;
            match self.make(docker, name, link, Some(place)).await {
                Ok(()) => return Ok(()),
                Err(error) if is_overlap(&error) && tried < PLACES_TRIED => {}
                Err(error) => return Err(sort(OPERATION, error)),
            }
        }
        Ok(())
    }

    async fn unmake(&self, docker: &Docker, name: &str) -> Result<(), EngineError> {
        for net in self.called(docker, name).await? {
            match docker.remove_network(&net.id).await {
                Ok(()) => {}
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(sort(OPERATION, error)),
            }
        }
        Ok(())
    }

    /// Our networks of this name, the oldest first.
    async fn called(&self, docker: &Docker, name: &str) -> Result<Vec<Net>, EngineError> {
        let filters = HashMap::from([("name".to_owned(), vec![name.to_owned()])]);
        let options = ListNetworksOptionsBuilder::new().filters(&filters).build();
        let found = docker.list_networks(Some(options)).await.map_err(|error| sort(OPERATION, error))?;
        // Docker's filter also finds names that only have this in them.
        let found: Vec<_> = found.into_iter().filter(|network| network.name.as_deref() == Some(name)).collect();
        let ours = |network: &Network| {
            let labels = network.labels.as_ref();
            labels.is_some_and(|labels| {
                make::network_labels(&self.scope).iter().all(|(key, value)| labels.get(key) == Some(value))
            })
        };
        if !found.iter().all(ours) {
            let message = format!("a network called {name} exists that this agent did not make");
            return Err(EngineError::Refused { operation: OPERATION, message });
        }
        let mut nets: Vec<Net> = found.iter().map(Net::of).collect();
        nets.sort_by(|a, b| (&a.created, &a.id).cmp(&(&b.created, &b.id)));
        Ok(nets)
    }

    /// The network of this name. Docker takes any number of one name, and attaches nothing to a name that several have: the others are
    /// removed, those with containers on them last.
    async fn only_one(&self, docker: &Docker, name: &str) -> Result<Option<Net>, EngineError> {
        let mut nets = self.called(docker, name).await?;
        if nets.len() > 1 {
            let mut ranked = Vec::with_capacity(nets.len());
            for net in nets {
                let used = match docker.inspect_network(&net.id, None).await {
                    Ok(network) => network.containers.is_some_and(|containers| !containers.is_empty()),
                    Err(error) if is_missing(&error) => continue,
                    Err(error) => return Err(sort(OPERATION, error)),
                };
                ranked.push((!used, net));
            }
            // Stable, so that among equals the oldest stays.
            ranked.sort_by_key(|(unused, _)| *unused);
            nets = ranked.into_iter().map(|(_, net)| net).collect();
            for net in nets.split_off(1.min(nets.len())) {
                tracing::warn!(
                    network = net.id,
                    name,
                    "there is more than one network of this name; removing this one"
                );
                match docker.remove_network(&net.id).await {
                    Ok(()) => {}
                    Err(error) if is_missing(&error) || is_in_use(&error) => {}
                    Err(error) => return Err(sort(OPERATION, error)),
                }
            }
        }
        Ok(nets.into_iter().next())
    }

    /// An address on the network for allow-lists that no container has, running or not. The proxy knows an instance by it.
    pub(super) async fn free_address(
        &self,
        docker: &Docker,
        net: &Net,
        deployment: DeploymentId,
    ) -> Result<Ipv4Addr, EngineError> {
        let name = name(&self.scope, &Link::Listed);
        let taken: BTreeSet<Ipv4Addr> =
            self.our_containers(docker).await?.iter().filter_map(|container| address_on(container, &name)).collect();
        candidates(net, deployment).find(|address| !taken.contains(address)).ok_or_else(|| EngineError::Failed {
            operation: "find a free address",
            message: format!("every address of the network {name} is taken"),
        })
    }

    pub(super) async fn our_containers(&self, docker: &Docker) -> Result<Vec<ContainerSummary>, EngineError> {
        let filters = HashMap::from([("label".to_owned(), self.our_labels())]);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
        docker.list_containers(Some(options)).await.map_err(|error| sort("list containers", error))
    }

    /// Puts a container that isn't started yet onto its group's network, where it isn't made on that one. Docker before 25 takes only one
    /// network when a container is made.
    pub(super) async fn join_group(
        &self,
        docker: &Docker,
        id: &ContainerId,
        spec: &Spec,
        name: Option<&InstanceName>,
    ) -> Result<(), EngineError> {
        const OPERATION: &str = "connect the container to its group";
        let home = Link::home(&spec.network);
        for link in Link::all_of(&spec.network).into_iter().filter(|link| *link != home) {
            let net = self.network(docker, &link).await?;
            let request = NetworkConnectRequest {
                container: id.as_str().to_owned(),
                endpoint_config: Some(endpoint(name, &link, None)),
            };
            docker.connect_network(&net.id, request).await.map_err(|error| sort(OPERATION, error))?;
        }
        Ok(())
    }

    /// Removes the networks of groups that none of our containers is in, whether it runs or not. Nobody waits for it: what is left is found
    /// again the next time.
    pub(super) async fn remove_empty_groups(&self, docker: &Docker) {
        let groups = self.networks.lock().await.groups();
        if groups.is_empty() {
            return;
        }
        // Nobody is just making a container that is to be in one of them.
        let _alone = self.creating.write().await;
        let containers = match self.our_containers(docker).await {
            Ok(containers) => containers,
            Err(error) => {
                return tracing::warn!(error = &error as &dyn std::error::Error, "networks of groups may be left");
            }
        };
        for link in groups {
            let name = name(&self.scope, &link);
            let on = |container: &ContainerSummary| {
                let settings = container.network_settings.as_ref().and_then(|settings| settings.networks.as_ref());
                settings.is_some_and(|networks| networks.contains_key(&name))
            };
            if containers.iter().any(on) {
                continue;
            }
            match self.unmake(docker, &name).await {
                Ok(()) => drop(self.networks.lock().await.0.remove(&link)),
                // A stranger's container is on it.
                Err(error) => {
                    tracing::warn!(
                        network = name,
                        error = &error as &dyn std::error::Error,
                        "the network of a group is left"
                    );
                }
            }
        }
    }
}

/// The address a container was given on a network, running or not.
fn address_on(container: &ContainerSummary, network: &str) -> Option<Ipv4Addr> {
    let networks = container.network_settings.as_ref()?.networks.as_ref()?;
    given_address(networks.get(network)?).and_then(|address| match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    })
}

/// The address an endpoint keeps for as long as its container is there.
pub(super) fn given_address(endpoint: &EndpointSettings) -> Option<IpAddr> {
    endpoint.ipam_config.as_ref()?.ipv4_address.as_deref()?.parse().ok()
}

/// An endpoint with this address. In a group others find it by this name, whatever its container is called, or not at all.
pub(super) fn endpoint(name: Option<&InstanceName>, link: &Link, address: Option<Ipv4Addr>) -> EndpointSettings {
    let aliases = |name: &InstanceName| vec![name.to_string(), format!("{name}{}", make::GROUP_DOMAIN)];
    EndpointSettings {
        aliases: name.filter(|_| link.is_of_group()).map(aliases),
        ipam_config: address.map(|address| EndpointIpamConfig {
            ipv4_address: Some(address.to_string()),
            ..EndpointIpamConfig::default()
        }),
        ..EndpointSettings::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(subnet: &str, gateway: &str) -> Net {
        let config =
            IpamConfig { subnet: Some(subnet.to_owned()), gateway: Some(gateway.to_owned()), ..IpamConfig::default() };
        let ipam = Some(Ipam { config: Some(vec![config]), ..Ipam::default() });
        Net::of(&Network { id: Some("abc".to_owned()), ipam, ..Network::default() })
    }

    #[test]
    fn every_network_is_known_again_by_its_name_and_by_no_other_agent() {
        let group: dtma_api::GroupId = "team.one-2".parse().unwrap();
        let groups = [Link::Group(group.clone()), Link::GroupOpen(group)];
        for link in [Link::Open, Link::Closed, Link::Listed].into_iter().chain(groups) {
            assert_eq!(link_called("main", &name("main", &link)), Some(link.clone()));
            assert_eq!(link_called("other", &name("other", &link)), Some(link.clone()));
            assert_eq!(link_called("main", &name("other", &link)), None, "{link:?}");
        }
        for text in ["bridge", "dtma.listed.trial", "dtma.group.", "dtma-main", "dtmax"] {
            assert_eq!(link_called("main", text), None, "{text}");
        }
    }

    #[test]
    fn members_are_kept_apart_except_within_a_group_and_only_what_is_open_leads_out() {
        let asked = |link: Link| {
            let request = request("main", name("main", &link), &link, None);
            (request.internal.unwrap(), request.options.unwrap()["com.docker.network.bridge.enable_icc"].clone())
        };
        assert_eq!(asked(Link::Open), (false, "false".to_owned()));
        assert_eq!(asked(Link::Closed), (true, "false".to_owned()));
        assert_eq!(asked(Link::Listed), (true, "false".to_owned()));
        assert_eq!(asked(Link::Group("team".parse().unwrap())), (true, "true".to_owned()));
        assert_eq!(asked(Link::GroupOpen("team".parse().unwrap())), (false, "true".to_owned()));
    }

    #[test]
    fn addresses_are_the_networks_own_and_none_is_offered_twice() {
        let small = net("10.9.8.64/28", "10.9.8.65");
        let one: Vec<_> = candidates(&small, DeploymentId(Uuid::from_u128(7))).collect();
        let all: BTreeSet<_> = one.iter().copied().collect();
        assert_eq!((one.len(), all.len()), (13, 13), "sixteen less network, gateway and broadcast");
        assert_eq!(all.first(), Some(&Ipv4Addr::new(10, 9, 8, 66)));
        assert_eq!(all.last(), Some(&Ipv4Addr::new(10, 9, 8, 78)));
        let other = net("172.20.0.0/16", "172.20.0.5");
        assert!(!candidates(&other, DeploymentId(Uuid::nil())).any(|address| address == Ipv4Addr::new(172, 20, 0, 5)));
        let first = |id| candidates(&other, DeploymentId(Uuid::from_u128(id))).next().unwrap();
        assert_ne!(first(1), first(2));
        let none = Net { subnet: None, ..small };
        assert_eq!(candidates(&none, DeploymentId(Uuid::nil())).count(), 0);
    }
}
