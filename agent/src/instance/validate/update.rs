//! From the JSON of `PUT /tools/{ref}` to a [`Spec`] and what the new version has to show.

use dtma_api::failure::Fault;
use dtma_api::{AccountToolInstanceId, InstanceName};
use serde_json::{Map, Value};

use super::findings::{At, Findings};
use super::{Policy, Refusal, validate};
use crate::instance::{HealthGate, Spec};

/// The instance an update is for; the body need not name it again, and can't rename it.
#[derive(Debug, Clone, Copy)]
pub struct Present<'a> {
    /// Its name.
    pub name: &'a InstanceName,
    /// Its id.
    pub account_tool_instance_id: &'a AccountToolInstanceId,
}

/// Reads the body of `PUT /tools/{ref}`: that of a deploy, with `healthGate`. On success the warnings come with it.
///
/// # Errors
/// When anything in it is invalid or forbidden; every such thing is named.
pub fn validate_update(
    body: &Value,
    present: Present<'_>,
    policy: &Policy,
) -> Result<(Spec, HealthGate, Vec<Fault>), Refusal> {
    let mut findings = Findings::default();
    let Some(body) = body.as_object() else {
        findings.fault(&At::root(), "must be a JSON object");
        return Err(findings.review(None).into());
    };
    let asked = asked_of_gate(body, &mut findings);
    let mut deploy = body.clone();
    deploy.remove("healthGate");
    let own = [
        ("instanceNameOnToolbox", present.name.as_str()),
        ("accountToolInstanceId", present.account_tool_instance_id.as_str()),
    ];
    for (key, value) in own {
        let given = deploy.entry(key).or_insert(Value::Null);
        if given.is_null() {
            *given = Value::String(value.to_owned());
        } else if given.as_str().is_some_and(|text| text != value) {
            findings.fault(
                &At::root().key(key),
                format!("must be {value:?}, as it is, or absent: an update changes neither"),
            );
        }
    }
    match (validate(&Value::Object(deploy), policy), findings.is_sound()) {
        (Ok((spec, warnings)), true) => {
            let gate = HealthGate {
                timeout_seconds: asked.timeout_seconds.unwrap_or(spec.health_check.start_period_seconds),
                successes: asked.successes.unwrap_or(spec.health_check.success_threshold),
            };
            Ok((spec, gate, warnings))
        }
        (Ok(_), false) => Err(findings.review(None).into()),
        (Err(mut refusal), _) => {
            refusal.faults.extend(findings.review(None).faults);
            Err(refusal)
        }
    }
}

/// What the caller says of the gate; of the rest the instance's own health check decides.
#[derive(Debug, Clone, Copy, Default)]
struct Asked {
    timeout_seconds: Option<u32>,
    successes: Option<u32>,
}

fn asked_of_gate(body: &Map<String, Value>, findings: &mut Findings) -> Asked {
    let mut asked = Asked::default();
    let at = At::root().key("healthGate");
    let given = match body.get("healthGate") {
        None | Some(Value::Null) => return asked,
        Some(Value::Object(given)) => given,
        Some(_) => {
            findings.fault(&at, "must be an object with timeout_seconds and successes");
            return asked;
        }
    };
    findings.only_known(given, &at, &["timeout_seconds", "successes"]);
    let fields = [
        ("timeout_seconds", HealthGate::MAX_TIMEOUT_SECONDS, &mut asked.timeout_seconds),
        ("successes", HealthGate::MAX_SUCCESSES, &mut asked.successes),
    ];
    for (key, most, field) in fields {
        let Some(value) = given.get(key).filter(|value| !value.is_null()) else { continue };
        match value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|number| (1..=most).contains(number))
        {
            Some(number) => *field = Some(number),
            None => findings.fault(&at.key(key), format!("must be a whole number, 1 to {most}")),
        }
    }
    asked
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<(Spec, HealthGate, Vec<Fault>), Refusal> {
        let (name, id) = ("one".parse().unwrap(), "id-1".parse().unwrap());
        validate_update(&body, Present { name: &name, account_tool_instance_id: &id }, &Policy::default())
    }

    #[test]
    fn an_update_need_not_say_whose_it_is() {
        let (spec, gate, warnings) = read(json!({ "dockerImageUrl": "busybox" })).unwrap();
        assert_eq!((spec.name.as_str(), spec.account_tool_instance_id.as_str()), ("one", "id-1"));
        assert_eq!((gate, warnings), (HealthGate::default(), vec![]));
        let given = json!({ "dockerImageUrl": "busybox", "instanceNameOnToolbox": "one", "accountToolInstanceId": "id-1",
            "healthGate": { "timeout_seconds": 5, "successes": 2 } });
        let (again, gate, _) = read(given).unwrap();
        assert_eq!((again, gate), (spec, HealthGate { timeout_seconds: 5, successes: 2 }));
        // What it doesn't say is as the health check has it.
        let checked = json!({ "dockerImageUrl": "busybox", "mcpTransportType": "http", "healthGate": { "successes": 2 },
            "healthCheck": { "startPeriodSeconds": 7, "successThreshold": 3 } });
        assert_eq!(read(checked).unwrap().1, HealthGate { timeout_seconds: 7, successes: 2 });
    }

    #[test]
    fn every_fault_of_an_update_is_named_at_once() {
        let body = json!({ "instanceNameOnToolbox": "two", "accountToolInstanceId": 7, "mcpPort": 0,
            "healthGate": { "timeout_seconds": 0, "successes": "many" } });
        let mut paths: Vec<String> = read(body).unwrap_err().faults.into_iter().map(|fault| fault.path).collect();
        paths.sort();
        let all = [
            "$.accountToolInstanceId",
            "$.dockerImageUrl",
            "$.healthGate.successes",
            "$.healthGate.timeout_seconds",
            "$.instanceNameOnToolbox",
            "$.mcpPort",
        ];
        assert_eq!(paths, all);
        let gate = json!({ "dockerImageUrl": "busybox", "healthGate": 3 });
        assert_eq!(read(gate).unwrap_err().faults[0].path, "$.healthGate");
        assert!(read(json!([])).is_err());
    }
}
