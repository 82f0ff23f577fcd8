//! Files a droplet finds on its disk at first boot, as one tar archive.

use std::fmt::Write as _;

use serde_json::json;

use super::Record;

/// Where a droplet's user data lies on its disk.
pub(super) const USER_DATA: &str = "var/lib/cloud/seed/nocloud/user-data";

/// A file to be put on a droplet's disk, owned by root.
struct SeedFile {
    path: &'static str,
    mode: u32,
    contents: Vec<u8>,
}

/// What differs between droplets besides their user data.
pub(super) struct Seed<'a> {
    pub(super) record: &'a Record,
    pub(super) user_data: Option<&'a str>,
    /// 32 hexadecimal digits.
    pub(super) machine_id: &'a str,
    /// Registry (`host:port`) the droplet's Docker Engine may use without TLS.
    pub(super) registry: Option<&'a str>,
    /// Name servers for the droplet's own containers: the droplet's resolver listens on its loopback, where they can't reach it.
    pub(super) name_servers: &'a [String],
    /// Control group the droplet's Docker Engine must keep its containers in; `None` where the droplet has its own hierarchy.
    pub(super) control_group: Option<String>,
}

impl Seed<'_> {
    /// The archive, to be unpacked at `/`.
    ///
    /// # Errors
    /// When a path or a size doesn't fit the archive's format.
    pub(super) fn archive(&self) -> std::io::Result<Vec<u8>> {
        let mut archive = tar::Builder::new(Vec::new());
        for file in self.files() {
            let mut header = tar::Header::new_gnu();
            header.set_mode(file.mode);
            header.set_size(u64::try_from(file.contents.len()).map_err(std::io::Error::other)?);
            header.set_uid(0);
            header.set_gid(0);
            archive.append_data(&mut header, file.path, file.contents.as_slice())?;
        }
        archive.into_inner()
    }

    fn files(&self) -> Vec<SeedFile> {
        let mut files = vec![
            SeedFile { path: "etc/machine-id", mode: 0o444, contents: format!("{}\n", self.machine_id).into_bytes() },
            SeedFile {
                path: "var/lib/cloud/seed/nocloud/meta-data",
                mode: 0o600,
                contents: self.meta_data().into_bytes(),
            },
            SeedFile { path: USER_DATA, mode: 0o600, contents: self.user_data.unwrap_or_default().as_bytes().to_vec() },
        ];
        let daemon = self.docker_daemon();
        if daemon.as_object().is_some_and(|settings| !settings.is_empty()) {
            files.push(SeedFile {
                path: "etc/docker/daemon.json",
                mode: 0o644,
                contents: format!("{daemon:#}\n").into_bytes(),
            });
        }
        files
    }

    fn meta_data(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail. Names hold letters, digits, dots and dashes only, so they need no quoting.
        let _ = writeln!(text, "instance-id: \"{}\"", self.record.id);
        let _ = writeln!(text, "local-hostname: \"{}\"", self.record.name);
        text
    }

    fn docker_daemon(&self) -> serde_json::Value {
        let mut settings = serde_json::Map::new();
        if let Some(registry) = self.registry {
            settings.insert("insecure-registries".into(), json!([registry]));
        }
        if !self.name_servers.is_empty() {
            settings.insert("dns".into(), json!(self.name_servers));
        }
        if let Some(group) = &self.control_group {
            settings.insert("cgroup-parent".into(), json!(group));
        }
        settings.into()
    }
}

/// Name servers of a `resolv.conf` that something other than the machine itself can reach.
pub(super) fn reachable_name_servers(resolv_conf: &str) -> Vec<String> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|server| server.trim().parse::<std::net::IpAddr>().ok())
        .filter(|server| !server.is_loopback())
        .map(|server| server.to_string())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;

    use super::*;
    use crate::droplet::DropletId;

    fn record() -> Record {
        Record {
            id: DropletId(7),
            name: "web-1".into(),
            region: "nyc3".into(),
            size: "s-1vcpu-1gb".into(),
            image: "debian-12-x64".into(),
            tags: vec![],
            created_at: "2026-01-01T00:00:00Z".parse().unwrap(),
        }
    }

    fn unpacked(seed: &Seed<'_>) -> BTreeMap<String, (u32, String)> {
        let bytes = seed.archive().unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        archive
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let mut text = String::new();
                entry.read_to_string(&mut text).unwrap();
                let path = entry.path().unwrap().display().to_string();
                (path, (entry.header().mode().unwrap(), text))
            })
            .collect()
    }

    #[test]
    fn user_data_is_readable_by_root_alone_and_the_docker_engine_learns_the_registry() {
        let record = record();
        let servers = ["192.0.2.53".to_owned()];
        let files = unpacked(&Seed {
            record: &record,
            user_data: Some("#cloud-config\n"),
            machine_id: "0123456789abcdef0123456789abcdef",
            registry: Some("10.0.0.1:5000"),
            name_servers: &servers,
            control_group: Some("/docker/abc/containers".into()),
        });
        assert_eq!(files["var/lib/cloud/seed/nocloud/user-data"], (0o600, "#cloud-config\n".into()));
        assert_eq!(files["var/lib/cloud/seed/nocloud/meta-data"].1, "instance-id: \"7\"\nlocal-hostname: \"web-1\"\n");
        let daemon: serde_json::Value = serde_json::from_str(&files["etc/docker/daemon.json"].1).unwrap();
        assert_eq!(
            daemon,
            json!({"insecure-registries": ["10.0.0.1:5000"], "dns": ["192.0.2.53"], "cgroup-parent": "/docker/abc/containers"})
        );
    }

    #[test]
    fn a_droplet_with_nothing_special_keeps_the_docker_engines_own_settings() {
        let record = record();
        let seed = Seed {
            record: &record,
            user_data: None,
            machine_id: "",
            registry: None,
            name_servers: &[],
            control_group: None,
        };
        assert!(!unpacked(&seed).contains_key("etc/docker/daemon.json"));
    }

    #[test]
    fn a_resolver_on_loopback_is_not_handed_to_containers() {
        let servers =
            reachable_name_servers("search x\nnameserver 127.0.0.53\n nameserver 192.0.2.53\nnameserver nonsense\n");
        assert_eq!(servers, ["192.0.2.53"]);
    }
}
