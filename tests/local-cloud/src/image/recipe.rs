//! What goes into each base image.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};

use super::PackageSource;

/// One base image a droplet can be made from.
#[derive(Debug, PartialEq, Eq)]
pub struct Recipe {
    /// What a caller writes as `image`.
    pub slug: &'static str,
    /// The number `GET /v2/images` gives it.
    pub id: u64,
    /// Human name, as `GET /v2/images` shows it.
    pub name: &'static str,
    /// Debian's code name of the release.
    pub suite: &'static str,
    packages: &'static [&'static str],
}

/// What a cloud's Debian image has that cloud-init and a shell script in user data rely on. No `openssh-server` and no kernel: a
/// droplet is looked into from outside and shares the machine's kernel.
const SYSTEM: [&str; 13] = [
    "systemd",
    "systemd-sysv",
    "dbus",
    "cloud-init",
    "curl",
    "ca-certificates",
    "iptables",
    "nftables",
    "iproute2",
    "iputils-ping",
    "procps",
    "netbase",
    "kmod",
];

/// Every base image this cloud offers.
pub const RECIPES: &[Recipe] = &[
    Recipe { slug: "debian-12-x64", id: 129_211_873, name: "12 x64", suite: "bookworm", packages: &[] },
    Recipe {
        slug: "docker-debian-12",
        id: 129_211_874,
        name: "Docker on Debian 12",
        suite: "bookworm",
        packages: &["docker.io"],
    },
    Recipe { slug: "debian-11-x64", id: 129_211_871, name: "11 x64", suite: "bullseye", packages: &[] },
    Recipe {
        slug: "docker-debian-11",
        id: 129_211_872,
        name: "Docker on Debian 11",
        suite: "bullseye",
        packages: &["docker.io"],
    },
    Recipe { slug: "debian-13-x64", id: 129_211_875, name: "13 x64", suite: "trixie", packages: &[] },
    Recipe {
        slug: "docker-debian-13",
        id: 129_211_876,
        name: "Docker on Debian 13",
        suite: "trixie",
        packages: &["docker.io", "docker-cli"],
    },
];

/// The script that turns a fresh root file system into a droplet's.
pub(super) const CUSTOMISE: &str = include_str!("customise.sh");

/// The recipe called `slug`.
pub fn find(slug: &str) -> Option<&'static Recipe> {
    RECIPES.iter().find(|recipe| recipe.slug == slug)
}

impl Recipe {
    /// `Debian`, as `GET /v2/images` groups images.
    pub const DISTRIBUTION: &'static str = "Debian";

    /// Every package asked for, comma-separated as `mmdebstrap --include` wants it.
    pub fn include(&self) -> String {
        SYSTEM.iter().chain(self.packages).copied().collect::<Vec<_>>().join(",")
    }

    /// Reference of the finished image in the Docker Engine: `dtma-local-cloud/{slug}:{digest of all that it is made from}`.
    pub fn reference(&self, source: &PackageSource) -> String {
        let mut digest = Sha256::new();
        for part in [self.suite, &self.include(), CUSTOMISE, &source.fingerprint()] {
            digest.update(part.len().to_le_bytes());
            digest.update(part);
        }
        let tag = digest.finalize().iter().take(6).fold(String::new(), |mut tag, byte| {
            // Writing to a String cannot fail.
            let _ = write!(tag, "{byte:02x}");
            tag
        });
        format!("{}:{tag}", self.repository())
    }

    /// The image's name without its tag.
    pub fn repository(&self) -> String {
        format!("dtma-local-cloud/{}", self.slug)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn slugs_and_ids_name_one_image_each() {
        let slugs: HashSet<_> = RECIPES.iter().map(|recipe| recipe.slug).collect();
        let ids: HashSet<_> = RECIPES.iter().map(|recipe| recipe.id).collect();
        assert_eq!((slugs.len(), ids.len()), (RECIPES.len(), RECIPES.len()));
    }

    #[test]
    fn an_image_is_rebuilt_when_its_packages_or_its_source_change_and_only_then() {
        let bare = find("debian-12-x64").unwrap();
        let plain = PackageSource::default();
        let proxied = PackageSource {
            apt_options: vec!["Acquire::http::Proxy \"http://cache:3142\";".into()],
            ..PackageSource::default()
        };
        assert_eq!(bare.reference(&plain), bare.reference(&plain));
        assert_ne!(bare.reference(&plain), bare.reference(&proxied));
        assert_ne!(
            bare.reference(&plain).rsplit_once(':'),
            find("docker-debian-12").unwrap().reference(&plain).rsplit_once(':')
        );
        assert!(bare.reference(&plain).starts_with("dtma-local-cloud/debian-12-x64:"));
    }
}
