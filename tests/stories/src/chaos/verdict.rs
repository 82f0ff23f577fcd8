//! Whether what is there is what was promised: the agent's ledger, Docker's containers and volumes, and what callers were told.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;

use serde_json::Value;

use super::client::egress_of;
use super::crew;
use super::model::{Model, Promise};
use crate::Scene;

/// Name of the one container and volume that aren't the agent's business.
pub(super) const STRANGER: &str = "stranger";

const LOOK: &str = "cat /var/lib/dtma/ledger.json; echo; echo =====; docker ps --all --quiet | xargs --no-run-if-empty docker inspect; \
    echo =====; docker volume ls --quiet | xargs --no-run-if-empty docker volume inspect; \
    echo =====; docker network ls --format '{{.Name}} {{.Label \"dtma.managed\"}}'";

/// Everything there is on the droplet at one moment.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The ledger's entries.
    pub(super) entries: Value,
    pub(super) containers: Vec<Value>,
    pub(super) volumes: Vec<Value>,
    /// Networks of the agent's.
    pub(super) networks: Vec<String>,
}

impl Found {
    pub(super) async fn on(scene: &Scene) -> Result<Self, Box<dyn Error>> {
        let text = scene.on_droplet(&["sh", "-c", LOOK]).await?;
        Self::read(&text).ok_or_else(|| format!("not what was asked for: {text}").into())
    }

    fn read(text: &str) -> Option<Self> {
        let mut parts = text.split("=====\n");
        let ledger: Value = serde_json::from_str(parts.next()?.trim().split_once('\n')?.1).ok()?;
        let mut list = || {
            let text = parts.next()?.trim();
            if text.is_empty() { Some(Vec::new()) } else { serde_json::from_str(text).ok() }
        };
        let (containers, volumes) = (list()?, list()?);
        let networks = parts.next()?.lines().filter_map(|line| line.strip_suffix(" true")).map(str::to_owned);
        Some(Self { entries: ledger.get("entries")?.clone(), containers, volumes, networks: networks.collect() })
    }

    /// How what is there differs from what was promised; nothing when it doesn't.
    pub(super) fn differences(&self, models: &BTreeMap<String, Model>, contested: &BTreeSet<String>) -> Vec<String> {
        let mut wrong = Vec::new();
        let no_entries = serde_json::Map::new();
        let entries = self.entries.as_object().unwrap_or(&no_entries);
        for (name, model) in models {
            let possible = model.possible();
            let is = entries.get(name).map_or(Some(Promise::Absent), promised);
            let fits = is.is_some_and(|is| possible.iter().any(|promise| alike(*promise, is)));
            if !fits {
                wrong.push(format!("{name}: the ledger says {is:?}, callers were promised one of {possible:?}"));
            }
            if is == Some(Promise::Absent) && !model.volumes_kept && self.volumes_of(name) > 0 {
                wrong.push(format!("{name}: deleted with its volumes, and {} are there", self.volumes_of(name)));
            }
        }
        for (name, entry) in entries {
            if !models.contains_key(name) && !contested.contains(name) {
                wrong.push(format!("{name}: nobody ever asked for it"));
            }
            wrong.extend(self.against_entry(name, entry));
        }
        for container in self.containers.iter().filter(|container| label(container, "dtma.managed").is_some()) {
            let owner = label(container, "dtma.instance").unwrap_or_default();
            if !entries.contains_key(owner) {
                wrong.push(format!("{owner}: the container {} is left over", text(container, "/Name")));
            }
        }
        match self.containers.iter().find(|container| text(container, "/Name") == format!("/{STRANGER}")) {
            Some(stranger) if text(stranger, "/State/Status") == "running" => {}
            Some(stranger) => wrong.push(format!("the stranger is {}", text(stranger, "/State/Status"))),
            None => wrong.push("the stranger is gone".to_owned()),
        }
        if !self.volumes.iter().any(|volume| text(volume, "/Name") == STRANGER) {
            wrong.push("the stranger's volume is gone".to_owned());
        }
        wrong.extend(self.about_the_crew(entries));
        let names: BTreeSet<&String> = self.networks.iter().collect();
        if names.len() < self.networks.len() {
            wrong.push(format!("networks of one name: {:?}", self.networks));
        }
        wrong
    }

    /// A group that was only ever asked for as a whole is there as a whole, and its networks are as long as it is.
    fn about_the_crew(&self, entries: &serde_json::Map<String, Value>) -> Option<String> {
        let there: Vec<&str> = crew::MEMBERS.into_iter().filter(|name| entries.contains_key(*name)).collect();
        let networks: Vec<&String> = self.networks.iter().filter(|name| name.contains(".group")).collect();
        if there.is_empty() && !networks.is_empty() {
            return Some(format!("{}: the group is gone, and its networks are there: {networks:?}", crew::GROUP));
        }
        let whole = there.is_empty() || there.len() == crew::MEMBERS.len();
        (!whole).then(|| format!("{}: of a group that is all or nothing there are {there:?}", crew::GROUP))
    }

    fn against_entry(&self, name: &str, entry: &Value) -> Option<String> {
        let own: Vec<&Value> = self.of_instance(name).collect();
        let described: Vec<String> = own
            .iter()
            .map(|container| format!("{} {}", text(container, "/Name"), text(container, "/State/Status")))
            .collect();
        let runs = match entry.get("intent").and_then(Value::as_str) {
            Some("run") => true,
            Some("stop") => false,
            _ => return Some(format!("{name}: still being removed; there are {described:?}")),
        };
        if entry.get("update").is_some_and(|update| !update.is_null()) {
            return Some(format!("{name}: still being updated; there are {described:?}"));
        }
        let hash = entry.get("spec_hash").and_then(Value::as_str).unwrap_or_default();
        let right = match own.as_slice() {
            // Stopped before it was ever made.
            [] => !runs,
            [container] if runs && networks(container) != networks_of(name) => {
                return Some(format!("{name}: is on {:?} and not on {:?}", networks(container), networks_of(name)));
            }
            [container] if container.pointer("/HostConfig/Memory") != entry.pointer("/spec/limits/memory_bytes") => {
                return Some(format!("{name}: its memory limit is not that of its spec"));
            }
            [container] => {
                text(container, "/Name") == format!("/{name}")
                    && label(container, "dtma.spec-hash") == Some(hash)
                    && (text(container, "/State/Status") == "running") == runs
            }
            _ => false,
        };
        (!right)
            .then(|| format!("{name}: is to {}, and there are {described:?}", if runs { "run" } else { "be stopped" }))
    }

    fn of_instance(&self, name: &str) -> impl Iterator<Item = &Value> {
        self.containers.iter().filter(move |container| label(container, "dtma.instance") == Some(name))
    }

    fn volumes_of(&self, name: &str) -> usize {
        let of = |volume: &&Value| {
            volume.pointer("/Labels").and_then(|labels| labels.get("dtma.instance")).and_then(Value::as_str)
                == Some(name)
        };
        self.volumes.iter().filter(of).count()
    }
}

/// What an entry of the ledger promises; nothing for one that is on its way out.
fn promised(entry: &Value) -> Option<Promise> {
    let runs = match entry.get("intent")?.as_str()? {
        "run" => true,
        "stop" => false,
        _ => return None,
    };
    let version = entry.pointer("/spec/process/environment/VERSION")?.as_str()?.parse().ok()?;
    Some(Promise::Present { version, runs, proven: entry.get("proven")?.as_bool()? })
}

/// The same to a caller, who isn't told whether it has run before.
fn alike(one: Promise, other: Promise) -> bool {
    match (one, other) {
        (Promise::Absent | Promise::Leaving, Promise::Absent | Promise::Leaving) => true,
        (Promise::Present { version, runs, .. }, Promise::Present { version: other, runs: others, .. }) => {
            (version, runs) == (other, others)
        }
        (Promise::Absent | Promise::Leaving, Promise::Present { .. })
        | (Promise::Present { .. }, Promise::Absent | Promise::Leaving) => false,
    }
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The networks it has an address on.
fn networks(container: &Value) -> BTreeSet<&str> {
    let networks = container.pointer("/NetworkSettings/Networks").and_then(Value::as_object);
    let reached = networks.into_iter().flatten().filter(|(_, network)| !text(network, "/IPAddress").is_empty());
    reached.map(|(name, _)| name.as_str()).collect()
}

/// The networks an instance is to be on.
fn networks_of(name: &str) -> BTreeSet<&'static str> {
    if crew::MEMBERS.contains(&name) {
        return ["dtma.group.crew", "dtma.group-open.crew"].into();
    }
    match egress_of(name) {
        Value::String(word) if word == "none" => ["dtma.closed"].into(),
        Value::String(_) => ["dtma"].into(),
        _ => ["dtma.listed"].into(),
    }
}

fn label<'a>(container: &'a Value, name: &str) -> Option<&'a str> {
    container.pointer("/Config/Labels")?.get(name)?.as_str()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::model::{Answer, Wish};
    use super::*;

    fn container(name: &str, instance: &str, status: &str) -> Value {
        let labels = json!({ "dtma.managed": "true", "dtma.instance": instance, "dtma.spec-hash": "h" });
        json!({ "Name": format!("/{name}"), "State": { "Status": status }, "Config": { "Labels": labels },
            "HostConfig": { "Memory": 64 }, "NetworkSettings": { "Networks": { "dtma": { "IPAddress": "172.18.0.2" } } } })
    }

    fn found(intent: &str, containers: Vec<Value>) -> Found {
        let entry = json!({ "intent": intent, "spec_hash": "h", "proven": true,
            "spec": { "limits": { "memory_bytes": 64 }, "process": { "environment": { "VERSION": "1" } } } });
        let mut all = containers;
        all.push(json!({ "Name": "/stranger", "State": { "Status": "running" }, "Config": { "Labels": {} } }));
        let volumes = vec![json!({ "Name": "stranger", "Labels": null })];
        Found { entries: json!({ "one": entry }), containers: all, volumes, networks: vec!["dtma".to_owned()] }
    }

    fn models(wishes: &[Wish]) -> BTreeMap<String, Model> {
        let mut model = Model::default();
        for wish in wishes {
            let status = if matches!(wish, Wish::Deploy(_)) { 201 } else { 200 };
            model.heard(*wish, &Answer::Said(status, String::new())).unwrap();
        }
        [("one".to_owned(), model)].into()
    }

    fn said(found: &Found, wishes: &[Wish]) -> String {
        found.differences(&models(wishes), &BTreeSet::new()).join("\n")
    }

    #[test]
    fn what_is_as_promised_is_no_difference() {
        assert_eq!(said(&found("run", vec![container("one", "one", "running")]), &[Wish::Deploy(1)]), "");
        assert_eq!(said(&found("stop", vec![container("one", "one", "exited")]), &[Wish::Deploy(1), Wish::Stop]), "");
    }

    #[test]
    fn every_kind_of_difference_is_named() {
        let one = || container("one", "one", "running");
        let (mut lonely, mut larger) = (one(), one());
        lonely["NetworkSettings"] = json!({});
        larger["HostConfig"]["Memory"] = json!(65);
        let cases = [
            (found("run", vec![lonely]), vec![Wish::Deploy(1)], "is on {} and not on"),
            (found("run", vec![larger]), vec![Wish::Deploy(1)], "memory limit"),
            (found("run", vec![one()]), vec![Wish::Deploy(2)], "callers were promised"),
            (found("run", vec![one()]), vec![Wish::Deploy(1), Wish::Delete { volumes: true }], "callers were promised"),
            (found("run", vec![]), vec![Wish::Deploy(1)], "is to run"),
            (found("run", vec![one(), container("two", "one", "exited")]), vec![Wish::Deploy(1)], "is to run"),
            (found("run", vec![container("renamed", "one", "running")]), vec![Wish::Deploy(1)], "is to run"),
            (found("run", vec![container("one", "one", "paused")]), vec![Wish::Deploy(1)], "is to run"),
            (found("run", vec![one(), container("x", "x", "running")]), vec![Wish::Deploy(1)], "left over"),
        ];
        for (found, wishes, expected) in cases {
            let said = said(&found, &wishes);
            assert!(said.contains(expected), "{expected:?} in {said:?}");
        }
        let mut lonely = found("run", vec![one()]);
        lonely.containers.pop();
        lonely.volumes.clear();
        assert_eq!(said(&lonely, &[Wish::Deploy(1)]), "the stranger is gone\nthe stranger's volume is gone");
    }

    #[test]
    fn what_the_droplet_says_is_read() {
        let text = "{\"format\":1}\n{\"entries\":{}}\n\n=====\n[{\"Name\":\"/a\"}]\n=====\n=====\nbridge \ndtma true\n";
        let found = Found::read(text).unwrap();
        assert_eq!((found.containers.len(), found.volumes.len(), found.networks), (1, 0, vec!["dtma".to_owned()]));
        assert!(Found::read("").is_none());
    }
}
