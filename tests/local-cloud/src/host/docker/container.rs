//! What a system container is made of.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use bollard::models::{
    ContainerCreateBody, EndpointIpamConfig, EndpointSettings, HostConfig, HostConfigCgroupnsModeEnum,
    NetworkingConfig, SystemInfo, SystemInfoCgroupDriverEnum, SystemInfoCgroupVersionEnum,
};

/// What of the engine decides how a system container has to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Engine {
    /// One control-group hierarchy per resource, shared with the machine.
    legacy_control_groups: bool,
    /// Control groups are plain folders (`cgroupfs`) and not systemd's units.
    plain_control_groups: bool,
}

impl Engine {
    pub(super) fn of(info: &SystemInfo) -> Self {
        Self {
            legacy_control_groups: info.cgroup_version != Some(SystemInfoCgroupVersionEnum::_2),
            plain_control_groups: info.cgroup_driver == Some(SystemInfoCgroupDriverEnum::CGROUPFS),
        }
    }

    /// Where a droplet's own Docker Engine has to put its containers so that they end with the droplet. Left alone it would put
    /// them beside the droplet in the machine's hierarchy, where they stay behind after a power cut.
    pub(super) fn nested_control_group(self, container: &str) -> Option<String> {
        (self.legacy_control_groups && self.plain_control_groups).then(|| format!("/docker/{container}/containers"))
    }
}

/// Longest host name the kernel takes; a droplet's name may be longer.
const HOST_NAME_MAX: usize = 63;

/// A droplet's container before it is made.
pub(super) struct SystemContainer<'a> {
    pub(super) image: String,
    pub(super) host_name: &'a str,
    pub(super) network: &'a str,
    pub(super) address: Ipv4Addr,
    /// Volume for `/var/lib/docker`: the droplet's own engine can't stack its layers on the machine's.
    pub(super) docker_volume: &'a str,
    pub(super) labels: HashMap<String, String>,
    pub(super) engine: Engine,
}

impl SystemContainer<'_> {
    /// As the engine wants it said.
    pub(super) fn body(self) -> ContainerCreateBody {
        let mut binds = vec![format!("{}:/var/lib/docker", self.docker_volume)];
        let mut environment = vec!["container=docker".to_owned(), "TERM=dumb".to_owned()];
        if self.engine.legacy_control_groups {
            binds.push("/sys/fs/cgroup:/sys/fs/cgroup:rw".to_owned());
            // From systemd 256 on the old hierarchy has to be asked for; earlier ones take it as said.
            environment.push(
                "SYSTEMD_PROC_CMDLINE=SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1 systemd.unified_cgroup_hierarchy=0 \
                 systemd.legacy_systemd_cgroup_controller=1"
                    .to_owned(),
            );
        }
        let cgroupns = if self.engine.legacy_control_groups {
            HostConfigCgroupnsModeEnum::HOST
        } else {
            HostConfigCgroupnsModeEnum::PRIVATE
        };
        let tmpfs = [("/run", "exec"), ("/run/lock", ""), ("/tmp", "")];
        ContainerCreateBody {
            image: Some(self.image),
            hostname: Some(self.host_name.chars().take(HOST_NAME_MAX).collect()),
            // The console: systemd writes its progress to a terminal only.
            tty: Some(true),
            cmd: Some(vec!["/lib/systemd/systemd".to_owned()]),
            env: Some(environment),
            labels: Some(self.labels),
            // systemd's own signal for an orderly halt.
            stop_signal: Some("SIGRTMIN+3".to_owned()),
            host_config: Some(HostConfig {
                network_mode: Some(self.network.to_owned()),
                binds: Some(binds),
                tmpfs: Some(tmpfs.iter().map(|(path, options)| ((*path).to_owned(), (*options).to_owned())).collect()),
                cgroupns_mode: Some(cgroupns),
                // Not `privileged`: some machines lack CAP_SYS_RESOURCE themselves and can't give it.
                cap_add: Some(vec!["ALL".to_owned()]),
                cap_drop: Some(vec!["SYS_RESOURCE".to_owned()]),
                security_opt: Some(vec!["seccomp=unconfined".to_owned(), "apparmor=unconfined".to_owned()]),
                // None hidden, none read-only: systemd and a nested engine write to /proc/sys.
                masked_paths: Some(Vec::new()),
                readonly_paths: Some(Vec::new()),
                device_cgroup_rules: Some(vec!["a *:* rwm".to_owned()]),
                ..Default::default()
            }),
            networking_config: Some(NetworkingConfig {
                endpoints_config: Some(HashMap::from([(self.network.to_owned(), fixed_address(self.address))])),
            }),
            ..Default::default()
        }
    }
}

/// An endpoint that keeps its address, and has a second one from which it reaches the metadata service.
pub(super) fn fixed_address(address: Ipv4Addr) -> EndpointSettings {
    EndpointSettings {
        ipam_config: Some(EndpointIpamConfig {
            ipv4_address: Some(address.to_string()),
            link_local_ips: Some(vec![link_local(address).to_string()]),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A droplet's address on the link it shares with the metadata service. The kernel chooses it as the source of what goes there.
pub(super) fn link_local(address: Ipv4Addr) -> Ipv4Addr {
    let [_, _, third, fourth] = address.octets();
    Ipv4Addr::new(169, 254, third, fourth)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_legacy_control_groups_have_to_be_named() {
        let engine =
            |legacy_control_groups, plain_control_groups| Engine { legacy_control_groups, plain_control_groups };
        assert_eq!(engine(true, true).nested_control_group("abc").as_deref(), Some("/docker/abc/containers"));
        assert_eq!(engine(true, false).nested_control_group("abc"), None);
        assert_eq!(engine(false, true).nested_control_group("abc"), None);
    }
}
