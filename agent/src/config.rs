//! The agent's settings. The only place that reads the environment; everything else is given what it needs.

mod updating;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use dtma_api::{AGENT_PORT, Token, TokenHash};
use tracing_subscriber::EnvFilter;

use crate::disks::Reserve;

pub use updating::Updating;

/// Everything an operator can decide. Nothing in it has been tried out: no port bound, no file opened.
#[derive(Debug)]
pub struct Settings {
    /// `PORT`: where it listens, on every address. 30000.
    pub port: u16,
    /// `DTMA_STATE_DIR`: where everything durable lies. `/var/lib/dtma`.
    pub state_dir: PathBuf,
    /// `DTMA_TLS`: `self-signed`, or `off`.
    pub tls: Tls,
    /// `DTMA_PLAINTEXT`: `refuse`, or `allow`.
    pub plaintext: Plaintext,
    /// `DTMA_PUBLIC_STATUS`: what `GET /status` tells strangers, `liveness` or `full`.
    pub public_status: PublicStatus,
    /// `BACKEND_TO_DTMA_API_KEY` or `BACKEND_TO_DTMA_API_KEY_SHA256`: digests of the keys callers may present, on top of those enrolment brings.
    pub caller_keys: Vec<TokenHash>,
    /// `AGENTOPIA_API_BASE_URL`, `DTMA_BEARER_TOKEN` (or `DTMA_AUTH_TOKEN`), `DTMA_ENROLMENT_TOKEN`, `OFFLINE_MODE`: whom it reports to.
    pub backend: Backend,
    /// `DOCKER_HOST`: the Docker Engine, `unix://…` or `tcp://…`.
    pub docker_host: Option<String>,
    /// `DTMA_SCOPE`: which of several agents on one Docker Engine this is. `main`.
    pub scope: String,
    /// `DTMA_DISK_RESERVE_MB` (512) and `DTMA_DISK_RESERVE_PERCENT` (5, of which 4 GiB at most): how much disk is kept free; the
    /// larger of both.
    pub disk_reserve: Reserve,
    /// `DTMA_IMAGE_KEEP_DAYS`: how long an image the agent pulled is kept after its last use. 7.
    pub image_max_age: Duration,
    /// `DTMA_SECRETS_DIR`: where values of secrets are kept; a folder on a tmpfs. `/run/dtma/secrets`.
    pub secrets_dir: PathBuf,
    /// `DTMA_SECRETS_ON_DISK`: what becomes of secrets where that folder is on a disk, `refuse` or `allow`.
    pub secrets_on_disk: bool,
    /// How it comes to another version of itself. Read here only for its faults to be found at the start; the updater reads it anew.
    pub updating: Updating,
    /// `RUST_LOG`: what is logged. `info`.
    pub log_filter: String,
}

/// How port 30000 speaks TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// With the agent's own key and a self-signed certificate; callers check the pin.
    SelfSigned,
    /// Not at all.
    Off,
}

/// What becomes of a caller who speaks plain HTTP where TLS is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plaintext {
    /// 426 `tls_required`.
    Refuse,
    /// It is served, credentials and all.
    Allow,
}

/// What `GET /status` tells a caller without a credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublicStatus {
    /// That the agent lives, and its version.
    Liveness,
    /// Everything, as the old agent did.
    Full,
}

/// Whom the agent reports to, as far as the settings tell.
#[derive(Debug)]
pub enum Backend {
    /// Nobody (`OFFLINE_MODE`).
    Offline,
    /// A backend that knows the token set by hand; no provisioner.
    Standalone {
        /// Base URL, no slash at the end.
        base_url: String,
        /// The droplet's own token.
        bearer: Token,
    },
    /// A provisioner.
    Provisioner {
        /// Base URL, no slash at the end.
        base_url: String,
        /// The one-time token; needed only until the agent has enrolled.
        enrolment_token: Option<Token>,
    },
}

/// Everything wrong with the settings, at once.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub struct SettingsError {
    faults: Vec<(String, String)>,
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the settings are not usable:")?;
        for (variable, problem) in &self.faults {
            write!(f, "\n  {variable}: {problem}")?;
        }
        Ok(())
    }
}

const NAMES: [&str; 18] = [
    "DTMA_STATE_DIR",
    "DTMA_TLS",
    "DTMA_PLAINTEXT",
    "DTMA_PUBLIC_STATUS",
    "DTMA_BEARER_TOKEN",
    "DTMA_AUTH_TOKEN",
    "DTMA_ENROLMENT_TOKEN",
    "DTMA_SCOPE",
    "DTMA_DISK_RESERVE_MB",
    "DTMA_DISK_RESERVE_PERCENT",
    "DTMA_IMAGE_KEEP_DAYS",
    "DTMA_SECRETS_DIR",
    "DTMA_SECRETS_ON_DISK",
    "DTMA_RELEASES_URL",
    "DTMA_UPDATE_CHANNEL",
    "DTMA_UPDATES",
    "DTMA_UPDATE_READY_SECONDS",
    "DTMA_UPDATE_SOAK_SECONDS",
];

/// Longest `DTMA_SCOPE`: it is part of the names of networks and volumes.
const SCOPE_MAX: usize = 32;

impl Settings {
    /// The settings of this process.
    ///
    /// # Errors
    /// One error naming every variable that is wrong, and what would be right. It never repeats a secret's value.
    pub fn from_environment() -> Result<Self, SettingsError> {
        Self::parse(std::env::vars_os())
    }

    /// The same, from any list of variables. A variable set to nothing counts as not set, because that is what `NAME=` means in systemd's
    /// environment files.
    ///
    /// # Errors
    /// As [`Settings::from_environment`].
    pub fn parse(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Self, SettingsError> {
        let mut reader = Reader::new(variables);
        let settings = Self {
            port: reader.port(),
            state_dir: reader.folder("DTMA_STATE_DIR", "/var/lib/dtma"),
            tls: reader.tls(),
            plaintext: reader.word(
                "DTMA_PLAINTEXT",
                &[("refuse", Plaintext::Refuse), ("allow", Plaintext::Allow)],
                Plaintext::Refuse,
            ),
            public_status: reader.word(
                "DTMA_PUBLIC_STATUS",
                &[("liveness", PublicStatus::Liveness), ("full", PublicStatus::Full)],
                PublicStatus::Liveness,
            ),
            caller_keys: reader.caller_keys(),
            backend: reader.backend(),
            docker_host: reader.docker_host(),
            scope: reader.scope(),
            disk_reserve: reader.disk_reserve(),
            image_max_age: reader.image_max_age(),
            secrets_dir: reader.folder("DTMA_SECRETS_DIR", "/run/dtma/secrets"),
            secrets_on_disk: reader.word("DTMA_SECRETS_ON_DISK", &[("refuse", false), ("allow", true)], false),
            updating: reader.updating(),
            log_filter: reader.log_filter(),
        };
        if settings.caller_keys.is_empty() && !matches!(settings.backend, Backend::Provisioner { .. }) {
            reader.fault(
                "BACKEND_TO_DTMA_API_KEY",
                "is not set, so nobody could call this agent; set it, or BACKEND_TO_DTMA_API_KEY_SHA256",
            );
        }
        if reader.faults.is_empty() { Ok(settings) } else { Err(SettingsError { faults: reader.faults }) }
    }
}

struct Reader {
    values: BTreeMap<String, String>,
    faults: Vec<(String, String)>,
}

impl Reader {
    fn new(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let mut reader = Self { values: BTreeMap::new(), faults: Vec::new() };
        for (name, value) in variables {
            let Some(name) = name.to_str() else { continue };
            if name.starts_with("DTMA_") && !NAMES.contains(&name) {
                reader.fault(name, &format!("is not a setting of this agent; it knows {}", NAMES.join(", ")));
            }
            match value.into_string() {
                Ok(value) if value.is_empty() => {}
                Ok(value) => drop(reader.values.insert(name.to_owned(), value)),
                Err(_) if is_ours(name) => reader.fault(name, "must be UTF-8"),
                Err(_) => {}
            }
        }
        reader
    }

    fn fault(&mut self, variable: &str, problem: &str) {
        // One may be asked for more than once.
        if self.faults.iter().any(|(known, said)| known == variable && said == problem) {
            return;
        }
        self.faults.push((variable.to_owned(), problem.to_owned()));
    }

    fn get(&self, variable: &str) -> Option<&str> {
        self.values.get(variable).map(String::as_str)
    }

    /// One of a few words; anything else is a fault.
    fn word<T: Copy>(&mut self, variable: &str, words: &[(&str, T)], default: T) -> T {
        let Some(value) = self.get(variable) else { return default };
        match words.iter().find(|(word, _)| *word == value) {
            Some((_, meaning)) => *meaning,
            None => {
                let allowed: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                self.fault(variable, &format!("must be {}", allowed.join(" or ")));
                default
            }
        }
    }

    fn port(&mut self) -> u16 {
        match self.get("PORT").map(str::parse) {
            None => AGENT_PORT,
            Some(Ok(port)) if port != 0 => port,
            Some(_) => {
                self.fault("PORT", "must be a number from 1 to 65535");
                AGENT_PORT
            }
        }
    }

    fn folder(&mut self, variable: &str, default: &str) -> PathBuf {
        let path = PathBuf::from(self.get(variable).unwrap_or(default));
        if !path.is_absolute() {
            self.fault(variable, "must be an absolute path");
        }
        path
    }

    fn tls(&mut self) -> Tls {
        if self.get("DTMA_TLS") == Some("acme") {
            self.fault("DTMA_TLS", "acme is not in this version; use self-signed, and let callers check the pin");
            return Tls::SelfSigned;
        }
        self.word("DTMA_TLS", &[("self-signed", Tls::SelfSigned), ("off", Tls::Off)], Tls::SelfSigned)
    }

    fn caller_keys(&mut self) -> Vec<TokenHash> {
        let mut keys = Vec::new();
        if let Some(key) = self.secret("BACKEND_TO_DTMA_API_KEY") {
            keys.push(key.hash());
        }
        match self.get("BACKEND_TO_DTMA_API_KEY_SHA256").map(str::parse) {
            None => {}
            Some(Ok(hash)) => keys.push(hash),
            Some(Err(_)) => self.fault(
                "BACKEND_TO_DTMA_API_KEY_SHA256",
                "must be the key's SHA-256, 64 hexadecimal digits: printf %s KEY | sha256sum",
            ),
        }
        keys
    }

    /// A secret that can travel in a header.
    fn secret(&mut self, variable: &str) -> Option<Token> {
        let value = self.get(variable)?;
        if value.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Some(Token::from(value.to_owned()));
        }
        self.fault(variable, "must be printable ASCII without spaces");
        None
    }

    fn backend(&mut self) -> Backend {
        let offline = self.word("OFFLINE_MODE", &[("true", true), ("1", true), ("false", false), ("0", false)], false);
        let base_url = self.url("AGENTOPIA_API_BASE_URL");
        let bearer = match (self.secret("DTMA_BEARER_TOKEN"), self.secret("DTMA_AUTH_TOKEN")) {
            (Some(new), Some(old)) if new.hash() != old.hash() => {
                self.fault(
                    "DTMA_AUTH_TOKEN",
                    "is the old name of DTMA_BEARER_TOKEN and says something else; remove it",
                );
                Some(new)
            }
            (new, old) => new.or(old),
        };
        let enrolment_token = self.secret("DTMA_ENROLMENT_TOKEN");
        if offline {
            return Backend::Offline;
        }
        let Some(base_url) = base_url else {
            if self.get("AGENTOPIA_API_BASE_URL").is_none() {
                self.fault(
                    "AGENTOPIA_API_BASE_URL",
                    "is not set; heartbeats go to {AGENTOPIA_API_BASE_URL}/heartbeat. Without a backend set OFFLINE_MODE=true",
                );
            }
            return Backend::Offline;
        };
        match (bearer, enrolment_token) {
            (Some(_), Some(_)) => {
                self.fault(
                    "DTMA_ENROLMENT_TOKEN",
                    "is set and so is the droplet's own token; enrolment brings its own, so keep only one of them",
                );
                Backend::Offline
            }
            (Some(bearer), None) => Backend::Standalone { base_url, bearer },
            (None, enrolment_token) => Backend::Provisioner { base_url, enrolment_token },
        }
    }

    /// An address other paths are put behind, no slash at the end.
    fn url(&mut self, variable: &str) -> Option<String> {
        let text = self.get(variable)?;
        let usable = reqwest::Url::parse(text).is_ok_and(|url| {
            matches!(url.scheme(), "http" | "https")
                && url.has_host()
                && url.username().is_empty()
                && url.password().is_none()
                && url.query().is_none()
                && url.fragment().is_none()
        });
        if usable {
            return Some(text.trim_end_matches('/').to_owned());
        }
        self.fault(variable, "must be a URL like https://example.com/agent/v1, without user, query or fragment");
        None
    }

    fn docker_host(&mut self) -> Option<String> {
        let host = self.get("DOCKER_HOST")?.to_owned();
        if !["unix://", "tcp://", "http://"].iter().any(|scheme| host.starts_with(scheme)) {
            self.fault("DOCKER_HOST", "must begin with unix:// or tcp://");
        }
        Some(host)
    }

    fn scope(&mut self) -> String {
        let scope = self.get("DTMA_SCOPE").unwrap_or("main").to_owned();
        let usable = scope.len() <= SCOPE_MAX
            && scope.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && scope.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        if !usable {
            let rule = format!("must be at most {SCOPE_MAX} lower-case letters, digits and dashes, no dash first");
            self.fault("DTMA_SCOPE", &rule);
        }
        scope
    }

    fn disk_reserve(&mut self) -> Reserve {
        let default = Reserve::default();
        let megabytes = self.number("DTMA_DISK_RESERVE_MB", 0..=1_000_000).map(|number| number * 1024 * 1024);
        let percent = self.number("DTMA_DISK_RESERVE_PERCENT", 0..=90).and_then(|number| u8::try_from(number).ok());
        Reserve { bytes: megabytes.unwrap_or(default.bytes), percent: percent.unwrap_or(default.percent) }
    }

    fn image_max_age(&mut self) -> Duration {
        let days = self.number("DTMA_IMAGE_KEEP_DAYS", 1..=3650).unwrap_or(7);
        Duration::from_secs(days * 24 * 3600)
    }

    /// A whole number; anything else is a fault.
    fn number(&mut self, variable: &str, allowed: RangeInclusive<u64>) -> Option<u64> {
        let text = self.get(variable)?;
        let number = text.parse().ok().filter(|number| allowed.contains(number));
        if number.is_none() {
            self.fault(variable, &format!("must be a whole number from {} to {}", allowed.start(), allowed.end()));
        }
        number
    }

    fn log_filter(&mut self) -> String {
        let filter = self.get("RUST_LOG").unwrap_or("info").to_owned();
        if let Err(error) = EnvFilter::try_new(&filter) {
            self.fault("RUST_LOG", &format!("{error}; try info, or debug,hyper=info"));
        }
        filter
    }
}

fn is_ours(name: &str) -> bool {
    name.starts_with("DTMA_")
        || [
            "PORT",
            "AGENTOPIA_API_BASE_URL",
            "BACKEND_TO_DTMA_API_KEY",
            "BACKEND_TO_DTMA_API_KEY_SHA256",
            "OFFLINE_MODE",
            "DOCKER_HOST",
            "RUST_LOG",
        ]
        .contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(variables: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        Settings::parse(variables.iter().map(|(name, value)| (name.into(), value.into())))
    }

    fn faults(variables: &[(&str, &str)]) -> Vec<String> {
        parse(variables).unwrap_err().faults.into_iter().map(|(variable, _)| variable).collect()
    }

    #[test]
    fn what_a_provisioner_writes_is_enough() {
        let settings = parse(&[
            ("AGENTOPIA_API_BASE_URL", "http://10.0.0.1:3000/agent/v1/"),
            ("DTMA_ENROLMENT_TOKEN", "one-time"),
            ("HOME", "/root"),
        ])
        .unwrap();
        assert_eq!((settings.port, settings.tls, settings.plaintext), (30_000, Tls::SelfSigned, Plaintext::Refuse));
        assert_eq!(settings.public_status, PublicStatus::Liveness);
        assert_eq!(settings.state_dir, PathBuf::from("/var/lib/dtma"));
        assert_eq!(settings.scope, "main");
        assert_eq!((settings.secrets_dir, settings.secrets_on_disk), (PathBuf::from("/run/dtma/secrets"), false));
        assert_eq!(settings.disk_reserve, Reserve { bytes: 512 << 20, percent: 5 });
        assert_eq!(settings.image_max_age, Duration::from_secs(604_800));
        let Backend::Provisioner { base_url, enrolment_token: Some(token) } = settings.backend else {
            panic!("{:?}", settings.backend)
        };
        assert_eq!((base_url.as_str(), token.expose()), ("http://10.0.0.1:3000/agent/v1", "one-time"));
    }

    #[test]
    fn the_old_agents_settings_are_enough() {
        let settings = parse(&[
            ("AGENTOPIA_API_BASE_URL", "https://x.supabase.co/functions/v1"),
            ("DTMA_AUTH_TOKEN", "own"),
            ("BACKEND_TO_DTMA_API_KEY", "fleet"),
            ("PORT", "30000"),
            ("DTMA_DISK_RESERVE_MB", "0"),
            ("DTMA_DISK_RESERVE_PERCENT", "1"),
        ])
        .unwrap();
        assert_eq!(settings.caller_keys, [TokenHash::of("fleet")]);
        assert_eq!(settings.disk_reserve, Reserve { bytes: 0, percent: 1 });
        assert!(matches!(settings.backend, Backend::Standalone { bearer, .. } if bearer.expose() == "own"));
    }

    #[test]
    fn a_digest_does_for_the_fleet_key_and_empty_means_not_set() {
        let hash = TokenHash::of("fleet").to_string();
        let settings = parse(&[
            ("OFFLINE_MODE", "1"),
            ("BACKEND_TO_DTMA_API_KEY", ""),
            ("BACKEND_TO_DTMA_API_KEY_SHA256", &hash),
            ("DTMA_TLS", ""),
        ])
        .unwrap();
        assert_eq!(settings.caller_keys, [TokenHash::of("fleet")]);
        assert!(matches!(settings.backend, Backend::Offline));
    }

    #[test]
    fn every_fault_is_named_at_once_and_no_secret_is_repeated() {
        let error = parse(&[
            ("PORT", "70000"),
            ("DTMA_STATE_DIR", "relative"),
            ("DTMA_TLS", "acme"),
            ("DTMA_PLAINTEXT", "yes"),
            ("DTMA_PUBLIC_STATUS", "some"),
            ("DTMA_TSL", "off"),
            ("DTMA_BEARER_TOKEN", "hush hush"),
            ("BACKEND_TO_DTMA_API_KEY_SHA256", "secret"),
            ("AGENTOPIA_API_BASE_URL", "https://user:pass@x"),
            ("OFFLINE_MODE", "maybe"),
            ("DOCKER_HOST", "/var/run/docker.sock"),
            ("DTMA_SCOPE", "Two Agents"),
            ("DTMA_DISK_RESERVE_MB", "1g"),
            ("DTMA_DISK_RESERVE_PERCENT", "91"),
            ("DTMA_IMAGE_KEEP_DAYS", "0"),
            ("RUST_LOG", "dtma=nonsense"),
        ])
        .unwrap_err();
        let text = error.to_string();
        for variable in [
            "PORT",
            "DTMA_STATE_DIR",
            "DTMA_TLS",
            "DTMA_PLAINTEXT",
            "DTMA_PUBLIC_STATUS",
            "DTMA_TSL",
            "DTMA_BEARER_TOKEN",
            "BACKEND_TO_DTMA_API_KEY_SHA256",
            "AGENTOPIA_API_BASE_URL",
            "OFFLINE_MODE",
            "DOCKER_HOST",
            "DTMA_SCOPE",
            "DTMA_DISK_RESERVE_MB",
            "DTMA_DISK_RESERVE_PERCENT",
            "DTMA_IMAGE_KEEP_DAYS",
            "RUST_LOG",
        ] {
            assert!(text.contains(&format!("\n  {variable}: ")), "{variable} in {text}");
        }
        assert!(!text.contains("hush") && !text.contains("secret") && !text.contains("pass@"), "{text}");
    }

    #[test]
    fn settings_that_contradict_or_lead_nowhere_are_faults() {
        let base = ("AGENTOPIA_API_BASE_URL", "https://x");
        let key = ("BACKEND_TO_DTMA_API_KEY", "fleet");
        assert_eq!(faults(&[key]), ["AGENTOPIA_API_BASE_URL"]);
        assert_eq!(faults(&[base, ("DTMA_BEARER_TOKEN", "own")]), ["BACKEND_TO_DTMA_API_KEY"]);
        assert_eq!(faults(&[("OFFLINE_MODE", "true")]), ["BACKEND_TO_DTMA_API_KEY"]);
        assert_eq!(
            faults(&[base, key, ("DTMA_BEARER_TOKEN", "own"), ("DTMA_ENROLMENT_TOKEN", "once")]),
            ["DTMA_ENROLMENT_TOKEN"]
        );
        assert_eq!(
            faults(&[base, key, ("DTMA_BEARER_TOKEN", "own"), ("DTMA_AUTH_TOKEN", "other")]),
            ["DTMA_AUTH_TOKEN"]
        );
    }
}
