//! `healthCheck` of a deploy.

use serde_json::{Map, Value};

use super::findings::{At, Findings};
use crate::instance::HealthCheck;

pub(super) const KEY: &str = "healthCheck";

/// Every member, as callers write it and as `healthGate` would.
const NAMES: [(&str, &str); 7] = [
    ("enabled", "enabled"),
    ("intervalSeconds", "interval_seconds"),
    ("timeoutSeconds", "timeout_seconds"),
    ("failureThreshold", "failure_threshold"),
    ("successThreshold", "success_threshold"),
    ("startPeriodSeconds", "start_period_seconds"),
    ("restart", "restart"),
];

/// How the server is to be checked. `is_server`: the instance is an MCP server, and nothing else is checked.
pub(super) fn health_check(body: &Map<String, Value>, is_server: bool, findings: &mut Findings) -> HealthCheck {
    let at = At::root().key(KEY);
    let mut check = HealthCheck::default();
    let given = match body.get(KEY) {
        None | Some(Value::Null) => return check,
        Some(Value::Object(given)) => given,
        Some(_) => {
            let names = NAMES.map(|(name, _)| name).join(", ");
            findings.fault(&at, format!("must be an object of {names}"));
            return check;
        }
    };
    let known: Vec<&str> = NAMES.iter().flat_map(|(camel, snake)| [*camel, *snake]).collect();
    findings.only_known(given, &at, &known);
    for (camel, snake) in NAMES {
        let own = given.get(camel).filter(|value| !value.is_null());
        let other = given.get(snake).filter(|value| camel != snake && !value.is_null());
        let (name, value) = match (own, other) {
            (None, None) => continue,
            (Some(value), None) => (camel, value),
            (None, Some(value)) => (snake, value),
            (Some(value), Some(_)) => {
                findings.fault(&at.key(snake), format!("is {camel} once more"));
                (camel, value)
            }
        };
        let at = at.key(name);
        let number = |most: u32, findings: &mut Findings| {
            let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
            let number = number.filter(|number| (1..=most).contains(number));
            number.unwrap_or_else(|| {
                findings.fault(&at, format!("must be a whole number, 1 to {most}"));
                1
            })
        };
        let switch = |findings: &mut Findings| {
            value.as_bool().unwrap_or_else(|| {
                findings.fault(&at, "must be true or false");
                true
            })
        };
        match camel {
            "enabled" => check.enabled = switch(findings),
            "intervalSeconds" => check.interval_seconds = number(HealthCheck::MAX_INTERVAL_SECONDS, findings),
            "timeoutSeconds" => check.timeout_seconds = number(HealthCheck::MAX_TIMEOUT_SECONDS, findings),
            "failureThreshold" => check.failure_threshold = number(HealthCheck::MAX_THRESHOLD, findings),
            "successThreshold" => check.success_threshold = number(HealthCheck::MAX_THRESHOLD, findings),
            "startPeriodSeconds" => {
                check.start_period_seconds = number(HealthCheck::MAX_START_PERIOD_SECONDS, findings)
            }
            _ => check.restart = switch(findings),
        }
    }
    if !is_server && !check.is_default() {
        findings.warn(&at, "is ignored without mcpTransportType");
        return HealthCheck::default();
    }
    check
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{Policy, Refusal, validate};
    use super::*;
    use crate::instance::Spec;

    fn read(check: Value, transport: Option<&str>) -> Result<(Spec, Vec<String>), Refusal> {
        let body = json!({
            "dockerImageUrl": "busybox", "instanceNameOnToolbox": "one", "accountToolInstanceId": "id-1",
            "mcpTransportType": transport, "healthCheck": check,
        });
        let (spec, warnings) = validate(&body, &Policy::default())?;
        Ok((spec, warnings.into_iter().map(|warning| warning.path).collect()))
    }

    fn faults(check: Value) -> Vec<String> {
        read(check, Some("http")).unwrap_err().faults.into_iter().map(|fault| fault.path).collect()
    }

    #[test]
    fn what_is_not_said_is_the_agents_and_both_spellings_are_taken() {
        let (usual, _) = read(Value::Null, Some("http")).unwrap();
        assert_eq!(usual.health_check, HealthCheck::default());
        for check in [json!({}), json!({ "enabled": true, "intervalSeconds": null, "interval_seconds": 30 })] {
            assert_eq!(read(check, Some("http")).unwrap(), (usual.clone(), vec![]));
        }
        let wanted = HealthCheck {
            enabled: false,
            interval_seconds: 10,
            timeout_seconds: 2,
            failure_threshold: 5,
            success_threshold: 2,
            start_period_seconds: 30,
            restart: false,
        };
        let camel = json!({ "enabled": false, "intervalSeconds": 10, "timeoutSeconds": 2, "failureThreshold": 5,
            "successThreshold": 2, "startPeriodSeconds": 30, "restart": false });
        let snake = json!({ "enabled": false, "interval_seconds": 10, "timeout_seconds": 2, "failure_threshold": 5,
            "success_threshold": 2, "start_period_seconds": 30, "restart": false });
        for check in [camel, snake] {
            assert_eq!(read(check, Some("http")).unwrap().0.health_check, wanted);
        }
    }

    #[test]
    fn every_fault_is_named_at_once_and_what_nobody_reads_is_warned_of() {
        let check = json!({ "enabled": "yes", "intervalSeconds": 0, "timeoutSeconds": 61, "failure_threshold": 1.5,
            "successThreshold": -1, "startPeriodSeconds": 601, "restart": 1 });
        let named = faults(check);
        let all = ["enabled", "intervalSeconds", "timeoutSeconds", "failure_threshold", "successThreshold"];
        let all = all.into_iter().chain(["startPeriodSeconds", "restart"]);
        assert_eq!(named, all.map(|name| format!("$.healthCheck.{name}")).collect::<Vec<_>>());
        assert_eq!(faults(json!({ "intervalSeconds": 1, "interval_seconds": 1 })), ["$.healthCheck.interval_seconds"]);
        for none in [json!(3), json!(true), json!([]), json!("off")] {
            assert_eq!(faults(none), ["$.healthCheck"]);
        }
        let (_, warned) = read(json!({ "test": ["CMD", "true"] }), Some("http")).unwrap();
        assert_eq!(warned, ["$.healthCheck.test"]);
    }

    #[test]
    fn only_mcp_servers_are_checked_and_the_usual_leaves_a_specs_hash_as_it_was() {
        let (plain, warned) = read(json!({ "intervalSeconds": 5 }), None).unwrap();
        assert_eq!((plain.health_check, warned), (HealthCheck::default(), vec!["$.healthCheck".to_owned()]));
        assert!(!serde_json::to_string(&plain).unwrap().contains("health_check"));
        let (checked, _) = read(json!({ "intervalSeconds": 5 }), Some("http")).unwrap();
        let stored = serde_json::to_string(&checked).unwrap();
        assert_eq!(serde_json::from_str::<Spec>(&stored).unwrap(), checked);
        assert_ne!(read(Value::Null, Some("http")).unwrap().0.hash(), checked.hash());
    }
}
