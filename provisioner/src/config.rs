//! The provisioner's settings: read once from the environment, all faults reported together. The only module that reads it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use dtma_api::TokenHash;
use dtma_release::{PublicKeys, Version};
use secrecy::SecretString;

use crate::environment::DropletSpec;
use crate::releases::Trust;

/// A shared secret shorter than this can be guessed.
const SECRET_LENGTH: usize = 32;

/// Everything the provisioner is told from outside. Variables in parentheses.
#[derive(Debug)]
pub struct Settings {
    /// Where to listen (`LISTEN_ADDRESS` 0.0.0.0, `PORT` 3000).
    pub listen: SocketAddr,
    /// What callers of the internal API present (`INTERNAL_API_SECRET`), digested.
    pub internal_secret: TokenHash,
    /// What callers of agents present (`BACKEND_TO_DTMA_API_KEY`), digested: agents need no more to know it.
    pub fleet_key: TokenHash,
    /// The cloud's token (`DO_API_TOKEN`).
    pub cloud_token: SecretString,
    /// The cloud's API without `/v2` (`DO_API_BASE_URL`).
    pub cloud_url: String,
    /// What a droplet is when the caller doesn't say (`DO_DEFAULT_REGION`, `DO_DEFAULT_SIZE`, `DO_DEFAULT_IMAGE`).
    pub spec: DropletSpec,
    /// Keys put on every droplet (`DO_SSH_KEY_FINGERPRINTS`, separated by commas): fingerprints or ids.
    pub ssh_keys: Vec<String>,
    /// `sqlite:FILE` (`DATABASE_URL`).
    pub database_url: String,
    /// How droplets reach us (`PUBLIC_URL`), without a slash at its end.
    pub public_url: String,
    /// Releases of the agent (`RELEASES_DIR`).
    pub releases_dir: PathBuf,
    /// Where droplets fetch releases (`RELEASES_URL`), without a slash at its end: any place that serves the same files as `RELEASES_DIR`
    /// holds; this provisioner's own when absent.
    pub releases_url: String,
    /// What makes an archive there a release (`RELEASE_KEYS`): the makers' public keys, 64 hexadecimal digits each, separated by commas;
    /// or the word `unsigned`, for development only. There is no default: forgetting it must not switch the check off.
    pub release_trust: Trust,
    /// The version new droplets get (`AGENT_VERSION`); when absent, the one last rolled out, else channel stable's, else the newest.
    pub agent_version: Option<Version>,
    /// Tag of every droplet of this provisioner (`FLEET_TAG`); no other provisioner with the same cloud account may have it.
    pub fleet_tag: String,
    /// From asking for a droplet to its agent's first heartbeat (`BOOTSTRAP_DEADLINE_SECONDS` 900).
    pub bootstrap_deadline: Duration,
    /// Between heartbeats (`HEARTBEAT_INTERVAL_SECONDS` 60).
    pub heartbeat_interval: Duration,
    /// Silence after which an agent is unresponsive (`UNRESPONSIVE_AFTER_SECONDS` 180).
    pub unresponsive_after: Duration,
    /// Between sweeps (`RECONCILE_INTERVAL_SECONDS` 30).
    pub reconcile_interval: Duration,
    /// How long a droplet of doubtful existence is looked for (`LOOKUP_GRACE_SECONDS` 60).
    pub lookup_grace: Duration,
    /// Age at which a droplet that nobody knows is deleted (`ORPHAN_AGE_SECONDS` 900).
    pub orphan_age: Duration,
    /// Who owns which agent (`SUPABASE_URL`, `SUPABASE_SERVICE_ROLE_KEY`); both or neither.
    pub supabase: Option<Supabase>,
    /// One JSON object a line instead of text (`LOG_FORMAT` json or text).
    pub json_logs: bool,
    /// Sentences about settings that are accepted and have no effect.
    pub notes: Vec<String>,
}

/// Where the platform's tables are.
#[derive(Debug)]
pub struct Supabase {
    /// Base URL, without a slash at its end.
    pub url: String,
    /// Key of the service role.
    pub key: SecretString,
}

/// What the command line needs to reach the running provisioner.
#[derive(Debug)]
pub struct OperatorSettings {
    /// Where it is (`PROVISIONER_URL`; `http://{LISTEN_ADDRESS}:{PORT}` on this machine when absent).
    pub url: String,
    /// The internal API's secret (`INTERNAL_API_SECRET`).
    pub secret: SecretString,
}

/// All that is wrong with the settings.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the settings can't be used:\n  {}", .0.join("\n  "))]
pub struct InvalidSettings(pub Vec<String>);

struct Reader<L> {
    lookup: L,
    faults: Vec<String>,
}

impl<L: Fn(&str) -> Option<String>> Reader<L> {
    /// An empty value counts as absent: compose files and shells can't always unset.
    fn text(&self, name: &str) -> Option<String> {
        (self.lookup)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    fn fault(&mut self, name: &str, problem: &str) {
        self.faults.push(format!("{name} {problem}"));
    }

    fn required(&mut self, name: &str, what: &str) -> String {
        self.text(name).unwrap_or_else(|| {
            self.fault(name, &format!("is missing: {what}"));
            String::new()
        })
    }

    fn secret(&mut self, name: &str) -> TokenHash {
        let value = self.text(name).unwrap_or_default();
        if value.chars().count() < SECRET_LENGTH {
            let state = if value.is_empty() { "is missing" } else { "is too short" };
            self.fault(name, &format!("{state}: it must have at least {SECRET_LENGTH} characters"));
        }
        TokenHash::of(&value)
    }

    fn number<T: FromStr>(&mut self, name: &str, default: T, rule: &str) -> T {
        let Some(text) = self.text(name) else { return default };
        text.parse().unwrap_or_else(|_| {
            self.fault(name, &format!("must be {rule}, not {text:?}"));
            default
        })
    }

    fn seconds(&mut self, name: &str, default: u64) -> Duration {
        let rule = "a whole number of seconds, 1 to 86400";
        let seconds = self.number(name, default, rule);
        if !(1..=86_400).contains(&seconds) {
            self.fault(name, &format!("must be {rule}, not {seconds}"));
        }
        Duration::from_secs(seconds)
    }

    fn url(&mut self, name: &str, value: &str) -> String {
        let parsed = reqwest::Url::parse(value).ok().filter(|url| {
            matches!(url.scheme(), "http" | "https")
                && url.has_host()
                && url.username().is_empty()
                && url.query().is_none()
                && url.fragment().is_none()
        });
        if parsed.is_none() && !value.is_empty() {
            self.fault(name, "must be an http or https URL without user, query or fragment");
        }
        value.trim_end_matches('/').to_owned()
    }

    /// A slug or a tag: it goes into JSON and query strings as it is.
    fn word(&mut self, name: &str, default: &str) -> String {
        let value = self.text(name).unwrap_or_else(|| default.to_owned());
        if !is_word(&value) {
            self.fault(name, "must be 1 to 128 of A-Z a-z 0-9 _ : . -");
        }
        value
    }

    fn database(&mut self) -> String {
        let value = self.text("DATABASE_URL").unwrap_or_else(|| "sqlite:dtma-provisioner.sqlite".to_owned());
        if value.starts_with("postgres:") || value.starts_with("postgresql:") {
            self.fault(
                "DATABASE_URL",
                "names Postgres, and this version keeps its data in SQLite only: use sqlite:FILE",
            );
        } else if !value.starts_with("sqlite:") {
            self.fault("DATABASE_URL", "must be sqlite:FILE");
        }
        value
    }

    fn release_trust(&mut self) -> Trust {
        let problem = match self.text("RELEASE_KEYS") {
            None => "is missing: name the public keys that releases are signed with, 64 hexadecimal digits each, separated by commas; \
                     or say `unsigned` to install whatever lies in RELEASES_DIR, for development only"
                .to_owned(),
            Some(text) if text == "unsigned" => return Trust::Unsigned,
            Some(text) => match PublicKeys::parse(&text) {
                Ok(keys) => return Trust::Signed(keys),
                Err(error) => format!("can't be used: {error}"),
            },
        };
        self.fault("RELEASE_KEYS", &problem);
        Trust::Unsigned
    }

    fn supabase(&mut self) -> Option<Supabase> {
        let (url, key) = (self.text("SUPABASE_URL"), self.text("SUPABASE_SERVICE_ROLE_KEY"));
        match (url, key) {
            (Some(url), Some(key)) => {
                Some(Supabase { url: self.url("SUPABASE_URL", &url), key: SecretString::from(key) })
            }
            (None, None) => None,
            (Some(_), None) => {
                self.fault("SUPABASE_SERVICE_ROLE_KEY", "is missing, and SUPABASE_URL is set: both or neither");
                None
            }
            (None, Some(_)) => {
                self.fault("SUPABASE_URL", "is missing, and SUPABASE_SERVICE_ROLE_KEY is set: both or neither");
                None
            }
        }
    }

    fn json_logs(&mut self) -> bool {
        match self.text("LOG_FORMAT").as_deref() {
            None | Some("text") => false,
            Some("json") => true,
            Some(_) => {
                self.fault("LOG_FORMAT", "must be json or text");
                false
            }
        }
    }
}

/// Whether a text can be a slug or a tag.
pub fn is_word(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b':' | b'.' | b'-'))
}

impl Settings {
    /// Reads the settings through `lookup`, which answers a variable's value.
    ///
    /// # Errors
    /// Every fault at once, each with its variable's name; values of secrets are never quoted.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, InvalidSettings> {
        let mut reader = Reader { lookup, faults: Vec::new() };
        let cloud_url = reader.text("DO_API_BASE_URL").unwrap_or_else(|| "https://api.digitalocean.com".to_owned());
        let public_url = reader.required("PUBLIC_URL", "the URL at which droplets reach this provisioner");
        let fleet_tag = reader.word("FLEET_TAG", "dtma-fleet");
        if fleet_tag.contains('.') {
            reader.fault("FLEET_TAG", "must not have a dot: the cloud's tags can't");
        }
        let mut notes = Vec::new();
        if reader.text("DTMA_DOCKER_IMAGE_URL").is_some() {
            notes.push("DTMA_DOCKER_IMAGE_URL is not used: the agent is a binary from RELEASES_DIR now".to_owned());
        }
        let own_releases = format!("{}/agent/v1/releases", public_url.trim_end_matches('/'));
        let releases_url = match reader.text("RELEASES_URL") {
            Some(url) => reader.url("RELEASES_URL", &url),
            None => own_releases,
        };
        let release_trust = reader.release_trust();
        if matches!(release_trust, Trust::Unsigned) {
            notes.push(
                "RELEASE_KEYS is `unsigned`: whoever can write to RELEASES_DIR decides what runs on new droplets, and agents can't be \
                 updated from here"
                    .to_owned(),
            );
        }
        let agent_version = reader.text("AGENT_VERSION").and_then(|text| {
            let version = Version::parse(&text).ok();
            if version.is_none() {
                reader.fault("AGENT_VERSION", "must be a version such as 1.2.3");
            }
            version
        });
        let address: IpAddr = reader.number("LISTEN_ADDRESS", IpAddr::from([0, 0, 0, 0]), "an IP address");
        let port = reader.number("PORT", 3000_u16, "a port number, 1 to 65535");
        let settings = Self {
            listen: SocketAddr::new(address, port),
            internal_secret: reader.secret("INTERNAL_API_SECRET"),
            fleet_key: reader.secret("BACKEND_TO_DTMA_API_KEY"),
            cloud_token: SecretString::from(reader.required("DO_API_TOKEN", "the DigitalOcean API token")),
            cloud_url: reader.url("DO_API_BASE_URL", cloud_url.trim_end_matches('/').trim_end_matches("/v2")),
            spec: DropletSpec {
                region: reader.word("DO_DEFAULT_REGION", "nyc3"),
                size: reader.word("DO_DEFAULT_SIZE", "s-1vcpu-1gb"),
                image: reader.word("DO_DEFAULT_IMAGE", "ubuntu-22-04-x64"),
            },
            ssh_keys: reader
                .text("DO_SSH_KEY_FINGERPRINTS")
                .map(|keys| keys.split(',').map(|key| key.trim().to_owned()).filter(|key| !key.is_empty()).collect())
                .unwrap_or_default(),
            database_url: reader.database(),
            public_url: reader.url("PUBLIC_URL", &public_url),
            releases_dir: reader.text("RELEASES_DIR").unwrap_or_else(|| "releases".to_owned()).into(),
            releases_url,
            release_trust,
            agent_version,
            fleet_tag,
            bootstrap_deadline: reader.seconds("BOOTSTRAP_DEADLINE_SECONDS", 900),
            heartbeat_interval: reader.seconds("HEARTBEAT_INTERVAL_SECONDS", 60),
            unresponsive_after: reader.seconds("UNRESPONSIVE_AFTER_SECONDS", 180),
            reconcile_interval: reader.seconds("RECONCILE_INTERVAL_SECONDS", 30),
            lookup_grace: reader.seconds("LOOKUP_GRACE_SECONDS", 60),
            orphan_age: reader.seconds("ORPHAN_AGE_SECONDS", 900),
            supabase: reader.supabase(),
            json_logs: reader.json_logs(),
            notes,
        };
        if settings.unresponsive_after <= settings.heartbeat_interval {
            reader.fault("UNRESPONSIVE_AFTER_SECONDS", "must be more than HEARTBEAT_INTERVAL_SECONDS");
        }
        if reader.faults.is_empty() { Ok(settings) } else { Err(InvalidSettings(reader.faults)) }
    }

    /// Reads the settings of this process, as [`lookup_of_process`] finds them.
    ///
    /// # Errors
    /// As [`Self::read`]; also when `.env` is there and can't be read.
    pub fn of_process() -> Result<Self, InvalidSettings> {
        Self::read(lookup_of_process()?)
    }
}

impl OperatorSettings {
    /// Reads the settings through `lookup`, which answers a variable's value.
    ///
    /// # Errors
    /// Every fault at once, each with its variable's name.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, InvalidSettings> {
        let mut reader = Reader { lookup, faults: Vec::new() };
        let secret = reader.required("INTERNAL_API_SECRET", "the secret the provisioner runs with");
        let address: IpAddr = reader.number("LISTEN_ADDRESS", IpAddr::from([0, 0, 0, 0]), "an IP address");
        let port = reader.number("PORT", 3000_u16, "a port number, 1 to 65535");
        let address = match address {
            IpAddr::V4(any) if any.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
            IpAddr::V6(any) if any.is_unspecified() => IpAddr::from(std::net::Ipv6Addr::LOCALHOST),
            one => one,
        };
        let here = format!("http://{}", SocketAddr::new(address, port));
        let url = reader.text("PROVISIONER_URL").unwrap_or(here);
        let settings = Self { url: reader.url("PROVISIONER_URL", &url), secret: SecretString::from(secret) };
        if reader.faults.is_empty() { Ok(settings) } else { Err(InvalidSettings(reader.faults)) }
    }

    /// Reads the settings of this process, as the server reads its own.
    ///
    /// # Errors
    /// As [`Self::read`]; also when `.env` is there and can't be read.
    pub fn of_process() -> Result<Self, InvalidSettings> {
        Self::read(lookup_of_process()?)
    }
}

/// What this process was told: its environment, and where that says nothing, `.env` in the working directory, unless `NODE_ENV` or
/// `DTMA_ENV` is `production`.
fn lookup_of_process() -> Result<impl Fn(&str) -> Option<String>, InvalidSettings> {
    let production = ["DTMA_ENV", "NODE_ENV"].iter().any(|name| std::env::var(name).is_ok_and(|v| v == "production"));
    let file = if production { HashMap::new() } else { dotenv(std::fs::read_to_string(".env"))? };
    Ok(move |name: &str| std::env::var(name).ok().or_else(|| file.get(name).cloned()))
}

/// `NAME=value` lines; `export`, comments and matching quotes are understood, nothing else is expanded.
fn dotenv(content: std::io::Result<String>) -> Result<HashMap<String, String>, InvalidSettings> {
    let content = match content {
        Ok(content) => content,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(HashMap::new()),
        Err(error) => return Err(InvalidSettings(vec![format!(".env can't be read: {error}")])),
    };
    let mut values = HashMap::new();
    let mut faults = Vec::new();
    for (index, line) in content.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((name, value)) = line.strip_prefix("export ").unwrap_or(line).split_once('=') else {
            faults.push(format!(".env line {} is not NAME=value", index + 1));
            continue;
        };
        let value = value.trim();
        let unquoted = ['"', '\''].iter().find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote));
        values.insert(name.trim().to_owned(), unquoted.unwrap_or(value).to_owned());
    }
    if faults.is_empty() { Ok(values) } else { Err(InvalidSettings(faults)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const GOOD: [(&str, &str); 5] = [
        ("RELEASE_KEYS", KEY),
        ("INTERNAL_API_SECRET", "internal-internal-internal-internal"),
        ("BACKEND_TO_DTMA_API_KEY", "fleet-fleet-fleet-fleet-fleet-fleet"),
        ("DO_API_TOKEN", "cloud-token"),
        ("PUBLIC_URL", "https://provisioner.example/"),
    ];

    fn read(changes: &[(&str, &str)]) -> Result<Settings, InvalidSettings> {
        let values: HashMap<&str, &str> = GOOD.iter().chain(changes).copied().collect();
        Settings::read(|name| values.get(name).map(|value| (*value).to_owned()))
    }

    #[test]
    fn five_variables_are_enough() {
        let settings = read(&[]).unwrap();
        assert_eq!(settings.listen.to_string(), "0.0.0.0:3000");
        assert_eq!(settings.public_url, "https://provisioner.example");
        assert_eq!(settings.cloud_url, "https://api.digitalocean.com");
        assert_eq!(settings.spec.region, "nyc3");
        assert_eq!(settings.releases_url, "https://provisioner.example/agent/v1/releases");
        assert!(settings.supabase.is_none() && settings.notes.is_empty());
        let elsewhere = read(&[("RELEASES_URL", "https://nyc3.spaces.example/dtma/")]).unwrap();
        assert_eq!(elsewhere.releases_url, "https://nyc3.spaces.example/dtma");
    }

    #[test]
    fn every_fault_is_told_at_once_by_name_and_no_secret_is_quoted() {
        let InvalidSettings(faults) = read(&[
            ("INTERNAL_API_SECRET", "hunter2"),
            ("BACKEND_TO_DTMA_API_KEY", ""),
            ("DO_API_TOKEN", " "),
            ("PUBLIC_URL", "ftp://x"),
            ("PORT", "seventy"),
            ("LOOKUP_GRACE_SECONDS", "0"),
            ("DO_DEFAULT_REGION", "nyc 3"),
            ("SUPABASE_URL", "https://x.supabase.co"),
            ("LOG_FORMAT", "xml"),
            ("AGENT_VERSION", "latest"),
            ("RELEASE_KEYS", "abc"),
            ("DATABASE_URL", "postgres://u:p4ss@h/db"),
        ])
        .unwrap_err();
        for name in [
            "INTERNAL_API_SECRET",
            "BACKEND_TO_DTMA_API_KEY",
            "DO_API_TOKEN",
            "PUBLIC_URL",
            "PORT",
            "LOOKUP_GRACE_SECONDS",
            "DO_DEFAULT_REGION",
            "SUPABASE_SERVICE_ROLE_KEY",
            "LOG_FORMAT",
            "AGENT_VERSION",
            "RELEASE_KEYS",
            "DATABASE_URL",
        ] {
            assert_eq!(faults.iter().filter(|fault| fault.starts_with(name)).count(), 1, "{name}: {faults:?}");
        }
        assert!(!faults.iter().any(|fault| fault.contains("hunter2") || fault.contains("p4ss")), "{faults:?}");
    }

    #[test]
    fn releases_are_checked_unless_somebody_says_in_so_many_words_that_they_are_not() {
        assert!(matches!(read(&[]).unwrap().release_trust, Trust::Signed(_)));
        let missing = read(&[("RELEASE_KEYS", "")]).unwrap_err().to_string();
        assert!(missing.contains("RELEASE_KEYS is missing") && missing.contains("unsigned"), "{missing}");
        let unsigned = read(&[("RELEASE_KEYS", "unsigned")]).unwrap();
        assert!(matches!(unsigned.release_trust, Trust::Unsigned) && unsigned.notes[0].contains("RELEASE_KEYS"));
    }

    #[test]
    fn the_old_image_variable_is_noted_and_postgres_is_told_why_not() {
        assert!(read(&[("DTMA_DOCKER_IMAGE_URL", "x/y")]).unwrap().notes[0].contains("DTMA_DOCKER_IMAGE_URL"));
        let refused = read(&[("DATABASE_URL", "postgresql://h/db")]).unwrap_err().to_string();
        assert!(refused.contains("SQLite only"), "{refused}");
    }

    #[test]
    fn the_command_line_finds_the_provisioner_of_this_machine_unless_told_otherwise() {
        let read = |changes: &[(&str, &str)]| {
            let values: HashMap<&str, &str> = [("INTERNAL_API_SECRET", "s")].iter().chain(changes).copied().collect();
            OperatorSettings::read(|name| values.get(name).map(|value| (*value).to_owned()))
        };
        assert_eq!(read(&[]).unwrap().url, "http://127.0.0.1:3000");
        assert_eq!(read(&[("PORT", "81"), ("LISTEN_ADDRESS", "::")]).unwrap().url, "http://[::1]:81");
        assert_eq!(read(&[("LISTEN_ADDRESS", "192.0.2.1")]).unwrap().url, "http://192.0.2.1:3000");
        assert_eq!(read(&[("PROVISIONER_URL", "https://p.example/")]).unwrap().url, "https://p.example");
        assert!(read(&[("INTERNAL_API_SECRET", "")]).unwrap_err().to_string().contains("INTERNAL_API_SECRET"));
    }

    #[test]
    fn debug_output_holds_no_secret() {
        let settings = read(&[("SUPABASE_URL", "https://s"), ("SUPABASE_SERVICE_ROLE_KEY", "service-key")]).unwrap();
        let printed = format!("{settings:?}");
        for secret in ["cloud-token", "service-key", "internal-internal", "fleet-fleet"] {
            assert!(!printed.contains(secret), "{printed}");
        }
    }

    #[test]
    fn a_dotenv_file_is_read_as_people_write_it() {
        let text = "# c\n\nexport A=1\nB = \"two words\"\nC='#x'\nD=a=b\n";
        let values = dotenv(Ok(text.to_owned())).unwrap();
        let of = |name: &str| values[name].clone();
        assert_eq!([of("A"), of("B"), of("C"), of("D")], ["1", "two words", "#x", "a=b"]);
        assert!(dotenv(Ok("nonsense".to_owned())).unwrap_err().0[0].contains("line 1"));
        assert!(dotenv(Err(std::io::ErrorKind::NotFound.into())).unwrap().is_empty());
    }
}
