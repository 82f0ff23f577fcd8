//! `egress`: what an instance may connect to.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::findings::{At, Findings};
use crate::instance::network::{Destination, Egress, InvalidDestination, PROXY_VARIABLES};
use crate::instance::spec::Environment;

/// More than a server has any use for.
const MOST_DESTINATIONS: usize = 256;

const RULE: &str =
    r#"must be "open", "none", or an object like {"allow": ["api.example.com:443", "*.example.org", "10.1.2.3:5432"]}"#;

/// What is not said is as `default` has it.
pub(super) fn egress(body: &Map<String, Value>, default: Egress, findings: &mut Findings) -> Egress {
    let at = At::root().key("egress");
    match body.get("egress") {
        None | Some(Value::Null) => default,
        Some(Value::String(word)) if word == "open" => Egress::Open,
        Some(Value::String(word)) if word == "none" => Egress::None,
        Some(Value::Object(object)) => {
            for key in object.keys().filter(|key| *key != "allow") {
                // Not ignored: it could be meant to narrow what is allowed.
                findings.fault(&at.key(key), "is not supported; egress takes allow alone");
            }
            allow_list(object, &at.key("allow"), findings)
        }
        Some(_) => {
            findings.fault(&at, RULE);
            Egress::None
        }
    }
}

fn allow_list(object: &Map<String, Value>, at: &At, findings: &mut Findings) -> Egress {
    let mut allowed = BTreeSet::new();
    if !object.get("allow").is_some_and(Value::is_array) {
        findings.fault(at, "must be a list of destinations");
    }
    let listed = findings.list(object.get("allow").filter(|list| list.is_array()), at);
    if listed.len() > MOST_DESTINATIONS {
        findings.fault(at, format!("has more than {MOST_DESTINATIONS} destinations"));
        return Egress::None;
    }
    for (at, value) in listed {
        match value.as_str().map(str::parse::<Destination>) {
            Some(Ok(destination)) => {
                allowed.insert(destination);
            }
            Some(Err(error @ InvalidDestination::Unreachable)) => findings.forbid(&at, error.to_string()),
            Some(Err(error @ InvalidDestination::Form)) => findings.fault(&at, error.to_string()),
            None => findings.fault(&at, InvalidDestination::Form.to_string()),
        }
    }
    // Nothing allowed is nothing reached.
    if allowed.is_empty() { Egress::None } else { Egress::AllowList(allowed) }
}

/// Says which variables are the agent's own where it stands between the instance and the world.
pub(super) fn warn_of_proxy_variables(egress: &Egress, environment: &Environment, findings: &mut Findings) {
    let Egress::AllowList(_) = egress else { return };
    let at = At::root().key("environmentVariables");
    for name in PROXY_VARIABLES.iter().filter(|name| environment.0.contains_key(**name)) {
        findings.warn(&at.key(name), "is replaced: what this instance may reach is reached through the agent's proxy");
    }
}
