//! From the JSON of `POST /mcp/groups` to the specs of its servers and how they are to come.

use std::collections::{BTreeMap, BTreeSet};

use dtma_api::failure::Fault;
use dtma_api::{GroupId, InstanceName};
use serde_json::{Map, Value};

use super::findings::{At, Findings};
use super::{Policy, Refusal, confidential, required_text, validate};
use crate::instance::{Confidential, Spec};

/// More servers than a droplet runs.
const MOST_SERVERS: usize = 32;
/// How many are brought up at the same time, unless it is said.
const AT_ONCE: u32 = 3;

/// A group that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupPlan {
    /// Its id.
    pub id: GroupId,
    /// Its servers, as they were named.
    pub servers: Vec<Spec>,
    /// For each of them those that have to run before it.
    pub after: BTreeMap<InstanceName, BTreeSet<InstanceName>>,
    /// When one of them can't be had, none is kept.
    pub atomic: bool,
    /// How many are brought up at the same time.
    pub most_at_once: u32,
    /// What was changed or ignored.
    pub warnings: Vec<Fault>,
}

/// Reads the body of `POST /mcp/groups`.
///
/// # Errors
/// When anything in it, or in any of its servers, is invalid or forbidden; every such thing is named.
pub fn validate_group(body: &Value, policy: &Policy) -> Result<GroupPlan, Refusal> {
    let mut findings = Findings::default();
    let Some(body) = body.as_object() else {
        findings.fault(&At::root(), "must be a JSON object");
        return Err(findings.review(None).into());
    };
    let id: Option<GroupId> = required_text(body, "groupId", &mut findings);
    let options = options(body, &mut findings);
    findings.only_known(body, &At::root(), &["groupId", "servers", "options"]);
    let policy = Policy { group: id.clone(), shared_network: options.shared_networking, ..policy.clone() };
    let mut servers = Servers::default();
    servers.read(body, &policy, &mut findings);
    let after = order(&options.dependency_order, &servers.named, &mut findings);
    let own = findings.review(None);
    let faults: Vec<Fault> = own.faults.into_iter().chain(servers.refusal.faults).collect();
    match id {
        Some(id) if faults.is_empty() => Ok(GroupPlan {
            id,
            servers: servers.specs,
            after,
            atomic: options.atomic,
            most_at_once: options.most_at_once,
            warnings: own.warnings.into_iter().chain(servers.warnings).collect(),
        }),
        Some(_) | None => Err(Refusal { faults, forbidden: servers.refusal.forbidden }),
    }
}

/// What is kept in memory only, of each server in a body that [`validate_group`] has found nothing wrong with.
pub fn group_confidential(body: &Value) -> BTreeMap<InstanceName, Confidential> {
    let servers = body.get("servers").and_then(Value::as_array).into_iter().flatten();
    let given = servers.filter_map(|server| {
        let name = server.get("instanceNameOnToolbox")?.as_str()?.parse().ok()?;
        Some((name, confidential(server)))
    });
    given.collect()
}

struct Options {
    shared_networking: bool,
    dependency_order: Vec<(At, String)>,
    most_at_once: u32,
    atomic: bool,
}

fn options(body: &Map<String, Value>, findings: &mut Findings) -> Options {
    let mut read =
        Options { shared_networking: false, dependency_order: Vec::new(), most_at_once: AT_ONCE, atomic: false };
    let at = At::root().key("options");
    let options = match body.get("options") {
        None | Some(Value::Null) => return read,
        Some(Value::Object(options)) => options,
        Some(_) => {
            findings.fault(&at, "must be an object");
            return read;
        }
    };
    findings.only_known(options, &at, &["sharedNetworking", "dependencyOrder", "maxConcurrentDeployments", "atomic"]);
    for (key, flag) in [("sharedNetworking", &mut read.shared_networking), ("atomic", &mut read.atomic)] {
        match options.get(key) {
            None | Some(Value::Null) => {}
            Some(Value::Bool(given)) => *flag = *given,
            Some(_) => findings.fault(&at.key(key), "must be true or false"),
        }
    }
    if let Some(value) = options.get("maxConcurrentDeployments").filter(|value| !value.is_null()) {
        match value.as_u64().and_then(|count| u32::try_from(count).ok()).filter(|count| (1..=16).contains(count)) {
            Some(count) => read.most_at_once = count,
            None => findings.fault(&at.key("maxConcurrentDeployments"), "must be a whole number, 1 to 16"),
        }
    }
    let listed = findings.list(options.get("dependencyOrder"), &at.key("dependencyOrder"));
    for (at, value) in listed {
        match value.as_str() {
            Some(name) => read.dependency_order.push((at, name.to_owned())),
            None => findings.fault(&at, "must be the name of a server"),
        }
    }
    read
}

#[derive(Default)]
struct Servers {
    specs: Vec<Spec>,
    /// Every name that was given, also of servers that aren't valid otherwise.
    named: Vec<String>,
    /// And every id.
    ids: Vec<String>,
    warnings: Vec<Fault>,
    refusal: Refusal,
}

impl Servers {
    fn read(&mut self, body: &Map<String, Value>, policy: &Policy, findings: &mut Findings) {
        let at = At::root().key("servers");
        let listed = findings.list(body.get("servers"), &at);
        if !(1..=MOST_SERVERS).contains(&listed.len()) {
            findings.fault(&at, format!("must be a list of 1 to {MOST_SERVERS} servers, each as POST /tools takes it"));
            return;
        }
        for (at, server) in listed {
            let name = server.get("instanceNameOnToolbox").and_then(Value::as_str).unwrap_or_default();
            if !name.is_empty() && self.named.iter().any(|other| other == name) {
                findings.fault(&at.key("instanceNameOnToolbox"), "is the name of another server of this group");
            }
            self.named.push(name.to_owned());
            let id = server.get("accountToolInstanceId").and_then(Value::as_str).unwrap_or_default();
            if !id.is_empty() && self.ids.iter().any(|other| other == id) {
                findings.fault(&at.key("accountToolInstanceId"), "is the id of another server of this group");
            }
            self.ids.push(id.to_owned());
            let here = |faults: Vec<Fault>| faults.into_iter().map(|fault| within(&at, fault)).collect::<Vec<_>>();
            match validate(server, policy) {
                Ok((spec, warnings)) => {
                    self.warnings.extend(here(warnings));
                    self.specs.push(spec);
                }
                Err(refusal) => {
                    self.refusal.faults.extend(here(refusal.faults));
                    self.refusal.forbidden |= refusal.forbidden;
                }
            }
        }
    }
}

/// A fault of one server as one of the whole body.
fn within(at: &At, fault: Fault) -> Fault {
    Fault { path: format!("{at}{}", fault.path.strip_prefix('$').unwrap_or(&fault.path)), problem: fault.problem }
}

/// For each server of the order the one before it.
fn order(
    listed: &[(At, String)],
    named: &[String],
    findings: &mut Findings,
) -> BTreeMap<InstanceName, BTreeSet<InstanceName>> {
    let mut after: BTreeMap<InstanceName, BTreeSet<InstanceName>> = BTreeMap::new();
    let mut before: Option<InstanceName> = None;
    for (at, text) in listed {
        let Some(name) = Some(text).filter(|text| named.contains(text)).and_then(|text| text.parse().ok()) else {
            findings.fault(at, "is not the name of a server of this group");
            continue;
        };
        if after.contains_key(&name) {
            findings.fault(at, "is named twice");
        }
        after.entry(name.clone()).or_default().extend(before.replace(name));
    }
    after
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn server(name: &str) -> Value {
        json!({ "dockerImageUrl": "busybox", "instanceNameOnToolbox": name, "accountToolInstanceId": format!("id-{name}") })
    }

    #[test]
    fn a_group_is_its_servers_and_the_order_they_come_in() {
        let body = json!({
            "groupId": "agent-1-mcp",
            "servers": [server("one"), server("two"), server("three")],
            "options": { "sharedNetworking": true, "dependencyOrder": ["two", "one"], "maxConcurrentDeployments": 2, "atomic": true },
        });
        let plan = validate_group(&body, &Policy::default()).unwrap();
        let names: Vec<&str> = plan.servers.iter().map(|spec| spec.name.as_str()).collect();
        assert_eq!((names, plan.atomic, plan.most_at_once), (vec!["one", "two", "three"], true, 2));
        assert!(
            plan.servers.iter().all(|spec| spec.group == Some(plan.id.clone()) && spec.network.group == spec.group)
        );
        let before = |name: &str| {
            plan.after.get(&name.parse().unwrap()).cloned().unwrap_or_default().into_iter().collect::<Vec<_>>()
        };
        assert_eq!((before("two"), before("one"), before("three")), (vec![], vec!["two".parse().unwrap()], vec![]));
    }

    #[test]
    fn every_fault_of_a_group_and_of_its_servers_is_named_at_once() {
        let mut strong = server("one");
        strong["baseConfigOverrideJson"] = json!({ "HostConfig": { "Privileged": true } });
        let body = json!({
            "servers": [server("one"), strong, { "instanceNameOnToolbox": "two", "accountToolInstanceId": "2" }],
            "options": { "dependencyOrder": ["one", "four", "one", 5], "atomic": "yes", "maxConcurrentDeployments": 0 },
        });
        let refusal = validate_group(&body, &Policy::default()).unwrap_err();
        let mut paths: Vec<&str> = refusal.faults.iter().map(|fault| fault.path.as_str()).collect();
        paths.sort_unstable();
        let all = [
            "$.groupId",
            "$.options.atomic",
            "$.options.dependencyOrder[1]",
            "$.options.dependencyOrder[2]",
            "$.options.dependencyOrder[3]",
            "$.options.maxConcurrentDeployments",
            "$.servers[1].accountToolInstanceId",
            "$.servers[1].baseConfigOverrideJson.HostConfig.Privileged",
            "$.servers[1].instanceNameOnToolbox",
            "$.servers[2].dockerImageUrl",
        ];
        assert_eq!((paths, refusal.forbidden), (all.to_vec(), true));
        for empty in [json!({ "groupId": "group" }), json!({ "groupId": "group", "servers": [] })] {
            assert_eq!(validate_group(&empty, &Policy::default()).unwrap_err().faults[0].path, "$.servers");
        }
        assert!(validate_group(&json!(7), &Policy::default()).is_err());
    }
}
