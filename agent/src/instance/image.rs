//! What images are called, beyond what a caller wrote.

use super::ImageReference;

/// The registry that is meant when none is named.
const HUB: &str = "docker.io";

impl ImageReference {
    /// The registry it is pulled from, `host[:port]`.
    pub fn registry(&self) -> &str {
        match self.split().0.split_once('/') {
            Some((first, _)) if first.contains(['.', ':']) || first == "localhost" => first,
            Some(_) | None => HUB,
        }
    }

    /// The one name Docker lists the image under, however it was asked for: `docker.io/library/busybox` is `busybox:latest`. With a digest
    /// the tag means nothing.
    pub fn familiar(&self) -> String {
        let (name, version) = self.split();
        let name = ["docker.io/", "index.docker.io/"].iter().find_map(|hub| name.strip_prefix(hub)).unwrap_or(name);
        let name = name.strip_prefix("library/").unwrap_or(name);
        let separator = if version.starts_with("sha256:") { '@' } else { ':' };
        format!("{name}{separator}{version}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_one_name_whatever_it_was_asked_for_by() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (asked, familiar, registry) in [
            ("busybox", "busybox:latest", HUB),
            ("library/busybox:1", "busybox:1", HUB),
            ("docker.io/library/busybox", "busybox:latest", "docker.io"),
            ("index.docker.io/library/busybox", "busybox:latest", "index.docker.io"),
            ("docker.io/owner/name:2", "owner/name:2", "docker.io"),
            ("localhost/name", "localhost/name:latest", "localhost"),
            ("10.0.0.1:5000/a/b:c", "10.0.0.1:5000/a/b:c", "10.0.0.1:5000"),
            (&format!("ghcr.io/a:1@{digest}"), &format!("ghcr.io/a@{digest}"), "ghcr.io"),
        ] {
            let image: ImageReference = asked.parse().unwrap();
            assert_eq!((image.familiar().as_str(), image.registry()), (familiar, registry), "{asked}");
        }
    }
}
