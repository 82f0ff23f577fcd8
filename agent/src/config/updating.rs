//! The settings that concern updates of the agent. Read apart from all others: a droplet whose other settings are wrong can still be updated.

use std::ffi::OsString;
use std::time::Duration;

use dtma_release::Channel;

use super::{Reader, Settings, SettingsError};

/// Where the unit's settings lie. Whoever runs a command on the droplet has none of them in the environment.
const FILE: &str = "/etc/dtma.conf";

/// How this droplet comes to another version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Updating {
    /// `DTMA_RELEASES_URL`: where releases are, no slash at the end. `{AGENTOPIA_API_BASE_URL}/releases`.
    pub releases_url: Option<String>,
    /// `DTMA_UPDATE_CHANNEL`: whose releases are taken where no version is named, `stable` or `canary`.
    pub channel: Channel,
    /// `DTMA_UPDATES`: who decides. `asked`: the backend, or whoever calls `POST /redeploy`. `channel`: also the updater itself, hourly.
    pub automatic: bool,
    /// `DTMA_UPDATE_READY_SECONDS`: how much time a new version gets to show all that is asked of it. 45.
    pub ready: Duration,
    /// `DTMA_UPDATE_SOAK_SECONDS`: how long a new version must have been well before it is kept. 90.
    pub soak: Duration,
}

impl Default for Updating {
    fn default() -> Self {
        Self {
            releases_url: None,
            channel: Channel::Stable,
            automatic: false,
            ready: Duration::from_secs(45),
            soak: Duration::from_secs(90),
        }
    }
}

impl Settings {
    /// What of this process's settings concerns updates: of the unit's environment, or for a person at a shell of the file the unit reads.
    ///
    /// # Errors
    /// As [`Settings::updating_of`].
    pub fn updating_of_process() -> Result<Updating, SettingsError> {
        let file = std::fs::read_to_string(FILE).unwrap_or_default();
        Self::updating_of(variables(&file).into_iter().chain(std::env::vars_os()))
    }

    /// What of the settings concerns updates, from any list of variables. Later ones override earlier ones; the rest may be anything.
    ///
    /// # Errors
    /// One error naming every variable that is wrong, and what would be right.
    pub fn updating_of(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Updating, SettingsError> {
        let ours = |name: &OsString| {
            name.to_str().is_some_and(|name| super::NAMES.contains(&name) || name == "AGENTOPIA_API_BASE_URL")
        };
        let mut reader = Reader::new(variables.into_iter().filter(|(name, _)| ours(name)));
        let updating = reader.updating();
        if reader.faults.is_empty() { Ok(updating) } else { Err(SettingsError { faults: reader.faults }) }
    }
}

impl Reader {
    pub(super) fn updating(&mut self) -> Updating {
        let default = Updating::default();
        let releases_url = match self.get("DTMA_RELEASES_URL") {
            Some(_) => self.url("DTMA_RELEASES_URL"),
            None => self.url("AGENTOPIA_API_BASE_URL").map(|base| format!("{base}/releases")),
        };
        let channels = [("stable", Channel::Stable), ("canary", Channel::Canary)];
        let ready = self.number("DTMA_UPDATE_READY_SECONDS", 5..=120).map(Duration::from_secs);
        let soak = self.number("DTMA_UPDATE_SOAK_SECONDS", 5..=600).map(Duration::from_secs);
        Updating {
            releases_url,
            channel: self.word("DTMA_UPDATE_CHANNEL", &channels, default.channel),
            automatic: self.word("DTMA_UPDATES", &[("asked", false), ("channel", true)], default.automatic),
            ready: ready.unwrap_or(default.ready),
            soak: soak.unwrap_or(default.soak),
        }
    }
}

/// `NAME=value` lines, as far as systemd and this file agree: no continued lines, quotes around a whole value.
fn variables(text: &str) -> Vec<(OsString, OsString)> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';']));
    lines
        .filter_map(|line| {
            let (name, value) = line.split_once('=')?;
            let value = value.trim();
            let bare = ['"', '\''].iter().find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote));
            Some((name.trim().into(), bare.unwrap_or(value).into()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Updating, SettingsError> {
        Settings::updating_of(pairs.iter().map(|(name, value)| (name.into(), value.into())))
    }

    #[test]
    fn releases_come_from_the_backend_unless_another_place_is_named() {
        let base = ("AGENTOPIA_API_BASE_URL", "https://p.example/agent/v1/");
        assert_eq!(read(&[base]).unwrap().releases_url.as_deref(), Some("https://p.example/agent/v1/releases"));
        let place = ("DTMA_RELEASES_URL", "https://space.example/dtma/");
        assert_eq!(read(&[base, place]).unwrap().releases_url.as_deref(), Some("https://space.example/dtma"));
        assert_eq!(read(&[]).unwrap(), Updating::default());
    }

    #[test]
    fn only_what_concerns_updates_can_be_wrong_here() {
        let other = [("PORT", "nonsense"), ("DTMA_OF_A_NEWER_VERSION", "1"), ("DTMA_TLS", "nonsense")];
        assert!(read(&other).is_ok());
        let error = read(&[
            ("DTMA_RELEASES_URL", "ftp://x"),
            ("DTMA_UPDATE_CHANNEL", "beta"),
            ("DTMA_UPDATES", "never"),
            ("DTMA_UPDATE_READY_SECONDS", "soon"),
            ("DTMA_UPDATE_SOAK_SECONDS", "1"),
        ]);
        let text = error.unwrap_err().to_string();
        for name in [
            "DTMA_RELEASES_URL",
            "DTMA_UPDATE_CHANNEL",
            "DTMA_UPDATES",
            "DTMA_UPDATE_READY_SECONDS",
            "DTMA_UPDATE_SOAK_SECONDS",
        ] {
            assert!(text.contains(&format!("\n  {name}: ")), "{name} in {text}");
        }
    }

    #[test]
    fn the_units_file_is_read_as_systemd_reads_it() {
        let text = "# a comment\nA=1\n ; another\nB=\"two words\"\n\nC = 'x'\nD=\"half\nE=a=b";
        let expected: Vec<(OsString, OsString)> =
            [("A", "1"), ("B", "two words"), ("C", "x"), ("D", "\"half"), ("E", "a=b")]
                .into_iter()
                .map(|(name, value)| (name.into(), value.into()))
                .collect();
        assert_eq!(variables(text), expected);
    }
}
