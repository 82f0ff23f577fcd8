//! Where this machine gets Debian packages from, so that droplets get theirs the same way.
//!
//! Read from the machine at run time: a machine behind a mirror or a proxy builds and runs droplets behind the same one, and nothing
//! about any particular mirror is written down here.

use std::collections::BTreeMap;
use std::path::Path;

use tokio::process::Command;

/// apt settings that decide whether a mirror can be used at all. Everything else a droplet keeps as Debian ships it.
const APT_SETTINGS: [&str; 4] =
    ["Acquire::Check-Valid-Until", "Acquire::Check-Date", "Acquire::http::Proxy", "Acquire::https::Proxy"];

const EXTRA_AUTHORITIES: &str = "/usr/local/share/ca-certificates";

/// Mirrors, apt settings and extra certificate authorities of this machine. Empty on a machine that isn't Debian: then `mmdebstrap`'s
/// own defaults hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PackageSource {
    /// Base URI of the main archive.
    pub archive: Option<String>,
    /// Base URI of the security archive.
    pub security: Option<String>,
    /// Lines of apt configuration.
    pub apt_options: Vec<String>,
    /// File name → PEM of every authority the operator added.
    pub authorities: BTreeMap<String, String>,
}

/// Why this machine's package source could not be read.
#[derive(Debug, thiserror::Error)]
#[error("reading {what} failed")]
pub struct PackageSourceError {
    what: &'static str,
    #[source]
    source: std::io::Error,
}

impl PackageSource {
    /// This machine's.
    ///
    /// # Errors
    /// When a file that is there cannot be read. A machine without apt is no error.
    pub async fn of_this_machine() -> Result<Self, PackageSourceError> {
        let os_release = read_if_there("/etc/os-release", "/etc/os-release").await?;
        let targets = output_of(
            "apt-get",
            &["indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"],
        )
        .await;
        let settings = {
            let arguments: Vec<&str> = std::iter::once("dump").chain(APT_SETTINGS).collect();
            output_of("apt-config", &arguments).await
        };
        let (archive, security) = mirrors(&os_release, &targets);
        Ok(Self { archive, security, apt_options: apt_options(&settings), authorities: authorities().await? })
    }

    /// mmdebstrap's options for the apt settings.
    pub fn options(&self) -> impl Iterator<Item = String> {
        self.apt_options.iter().map(|option| format!("--aptopt={option}"))
    }

    /// One-line apt sources for `suite`; empty when the machine names no mirror.
    pub fn lines(&self, suite: &str) -> Vec<String> {
        let archive = self
            .archive
            .iter()
            .flat_map(|uri| [format!("deb {uri} {suite} main"), format!("deb {uri} {suite}-updates main")]);
        let security = self.security.iter().map(|uri| format!("deb {uri} {suite}-security main"));
        archive.chain(security).collect()
    }

    /// Text that differs whenever an image built from this source would.
    pub(super) fn fingerprint(&self) -> String {
        format!("{:?} {:?} {:?} {:?}", self.archive, self.security, self.apt_options, self.authorities)
    }
}

/// The archives a Debian machine takes its own release from, out of `URI RELEASE COMPONENT` lines.
fn mirrors(os_release: &str, targets: &str) -> (Option<String>, Option<String>) {
    let field = |name: &str| {
        os_release
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"').to_owned())
    };
    let (Some("debian"), Some(codename)) = (field("ID").as_deref(), field("VERSION_CODENAME")) else {
        return (None, None);
    };
    let uri_of = |release: &str| {
        targets.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            let uri = words.next()?;
            (words.next()? == release && words.next()? == "main").then(|| uri.trim_end_matches('/').to_owned())
        })
    };
    (uri_of(&codename), uri_of(&format!("{codename}-security")))
}

/// `apt-config dump` lines that carry one of [`APT_SETTINGS`] with a value.
fn apt_options(dump: &str) -> Vec<String> {
    dump.lines()
        .filter(|line| {
            line.split_once(' ').is_some_and(|(name, value)| APT_SETTINGS.contains(&name) && value != "\"\";")
        })
        .map(str::to_owned)
        .collect()
}

async fn authorities() -> Result<BTreeMap<String, String>, PackageSourceError> {
    let failed = |source| PackageSourceError { what: EXTRA_AUTHORITIES, source };
    let mut found = BTreeMap::new();
    let mut folder = match tokio::fs::read_dir(EXTRA_AUTHORITIES).await {
        Ok(folder) => folder,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(failed(error)),
    };
    while let Some(entry) = folder.next_entry().await.map_err(failed)? {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "crt") {
            let name = entry.file_name().to_string_lossy().into_owned();
            found.insert(name, tokio::fs::read_to_string(&path).await.map_err(failed)?);
        }
    }
    Ok(found)
}

async fn read_if_there(path: impl AsRef<Path>, what: &'static str) -> Result<String, PackageSourceError> {
    match tokio::fs::read_to_string(path).await {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        other => other.map_err(|source| PackageSourceError { what, source }),
    }
}

/// Standard output of a program, or nothing where it isn't installed or fails: then the machine has no such source.
async fn output_of(program: &str, arguments: &[&str]) -> String {
    match Command::new(program).args(arguments).output().await {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        Ok(_) | Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOKWORM: &str = "ID=debian\nVERSION_CODENAME=bookworm\n";
    const TARGETS: &str = "http://extra.example/apt/ stable main\nhttp://mirror.example/debian/ bookworm main\n\
                           http://mirror.example/debian/ bookworm-updates main\nhttp://mirror.example/security/ bookworm-security main\n";

    #[test]
    fn a_debian_machine_lends_its_mirrors_to_every_suite() {
        let (archive, security) = mirrors(BOOKWORM, TARGETS);
        let source = PackageSource { archive, security, ..PackageSource::default() };
        assert_eq!(
            source.lines("trixie"),
            [
                "deb http://mirror.example/debian trixie main",
                "deb http://mirror.example/debian trixie-updates main",
                "deb http://mirror.example/security trixie-security main",
            ]
        );
    }

    #[test]
    fn another_distribution_leaves_the_choice_to_mmdebstrap() {
        let (archive, security) = mirrors("ID=fedora\nVERSION_CODENAME=bookworm\n", TARGETS);
        assert_eq!((archive, security), (None, None));
        assert!(PackageSource::default().lines("bookworm").is_empty());
    }

    #[test]
    fn only_settings_with_a_value_travel() {
        let dump =
            "Acquire::Check-Date \"false\";\nAcquire::http::Proxy \"\";\nAcquire::http::Proxy::local \"DIRECT\";\n";
        assert_eq!(apt_options(dump), ["Acquire::Check-Date \"false\";"]);
    }
}
