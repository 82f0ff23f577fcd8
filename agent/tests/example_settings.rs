//! The settings example that is shipped with the agent.

use std::collections::BTreeMap;
use std::ffi::OsString;

use dtma_agent::config::{Backend, Settings};

const EXAMPLE: &str = include_str!("../../packaging/dtma.conf.example");

/// Lines as systemd reads an `EnvironmentFile`; with those that are commented out when asked for.
fn settings(with_commented_out: bool) -> BTreeMap<OsString, OsString> {
    EXAMPLE
        .lines()
        .filter_map(|line| {
            let line = if with_commented_out { line.trim_start_matches('#') } else { line };
            let (name, value) = line.split_once('=')?;
            let is_name =
                !name.is_empty() && name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_');
            is_name.then(|| (name.into(), value.into()))
        })
        .collect()
}

#[test]
fn the_example_settings_are_what_the_agent_takes_for_standalone_use() {
    let parsed = Settings::parse(settings(false)).unwrap();
    assert!(matches!(parsed.backend, Backend::Standalone { .. }), "{:?}", parsed.backend);
    assert_eq!(parsed.caller_keys.len(), 1);
}

#[test]
fn the_defaults_the_example_names_are_the_agents_own() {
    let every = settings(true);
    assert!(every.len() >= 10, "{every:?}");
    let (named, bare) = (Settings::parse(every).unwrap(), Settings::parse(settings(false)).unwrap());
    assert_eq!(named.port, bare.port);
    assert_eq!(named.state_dir, bare.state_dir);
    assert_eq!(named.tls, bare.tls);
    assert_eq!(named.plaintext, bare.plaintext);
    assert_eq!(named.scope, bare.scope);
    assert_eq!(named.log_filter, bare.log_filter);
    assert_eq!((named.secrets_dir, named.secrets_on_disk), (bare.secrets_dir, bare.secrets_on_disk));
    assert_eq!((named.disk_reserve, named.image_max_age), (bare.disk_reserve, bare.image_max_age));
    assert!(matches!(named.backend, Backend::Standalone { .. }));
}
