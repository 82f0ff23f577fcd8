//! Entries this agent can't read, and how the ledger's contents become bytes.
//!
//! An agent may be taken back to an older version than has written the ledger. What that doesn't know must not make it take the whole list
//! for damaged, nor may it lose any of it:
//! - A field it doesn't know is passed over, everywhere.
//! - A kind of failure it doesn't know is kept as it was written ([`FailureKind::Unknown`](crate::instance::FailureKind::Unknown)): it only
//!   tells of something.
//! - An entry it can't read for any other reason (an intent, a transport, a capability it doesn't know) stays in the list as it was written.
//!   Nothing is done about such an instance, to its container, its secrets or its image, until an agent comes that can read it; Docker
//!   keeps it running meanwhile.
//!
//! So whoever adds something need not raise [`FORMAT`](super::FORMAT); that is for a file that older agents must not read at all.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use dtma_api::InstanceName;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Contents, Entry, PulledImage};

/// An entry as it was written, and what has to be known of it to leave it alone.
#[derive(Clone, PartialEq, Eq)]
pub struct StrangeEntry {
    text: Arc<str>,
    deployments: BTreeSet<uuid::Uuid>,
    images: BTreeSet<String>,
}

impl StrangeEntry {
    fn new(raw: &RawValue) -> Self {
        let mut strange = Self { text: raw.get().into(), deployments: BTreeSet::new(), images: BTreeSet::new() };
        strange.note(&serde_json::from_str(raw.get()).unwrap_or_default());
        strange
    }

    /// Wherever they are: its versions may be called otherwise, and be more than two.
    fn note(&mut self, value: &Value) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    match (name.as_str(), value.as_str()) {
                        ("deployment", Some(id)) => self.deployments.extend(id.parse::<uuid::Uuid>()),
                        ("image", Some(image)) => drop(self.images.insert(image.to_owned())),
                        _ => self.note(value),
                    }
                }
            }
            Value::Array(values) => values.iter().for_each(|value| self.note(value)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    /// The requests that brought its versions.
    pub fn deployments(&self) -> impl Iterator<Item = uuid::Uuid> + '_ {
        self.deployments.iter().copied()
    }

    /// The images its versions name, as they name them.
    pub fn images(&self) -> impl Iterator<Item = &str> {
        self.images.iter().map(String::as_str)
    }
}

impl fmt::Debug for StrangeEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Environment variables are in it.
        f.debug_struct("StrangeEntry").field("deployments", &self.deployments).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Read<'a> {
    #[serde(borrow)]
    entries: BTreeMap<InstanceName, &'a RawValue>,
    #[serde(default)]
    unreadable: BTreeSet<String>,
    #[serde(default)]
    with_credentials: BTreeSet<InstanceName>,
    #[serde(default)]
    images: BTreeMap<String, PulledImage>,
}

/// Reads what [`Contents`] was written as, by whichever agent.
pub(super) fn read(body: &[u8]) -> Result<Contents, serde_json::Error> {
    let Read { entries: raw, unreadable, with_credentials, images } = serde_json::from_slice(body)?;
    let (mut entries, mut strange) = (BTreeMap::new(), BTreeMap::new());
    for (name, raw) in raw {
        match serde_json::from_str::<Entry>(raw.get()) {
            Ok(entry) => drop(entries.insert(name, Arc::new(entry))),
            Err(error) => {
                tracing::error!(
                    instance = %name,
                    error = &error as &dyn std::error::Error,
                    "this instance was written down by another version of the agent, and this one can't read it: it is left as it is"
                );
                strange.insert(name, StrangeEntry::new(raw));
            }
        }
    }
    Ok(Contents { entries, strange, unreadable, with_credentials, images })
}

#[derive(Serialize)]
#[serde(untagged)]
enum Written<'a> {
    Known(&'a Entry),
    Strange(&'a RawValue),
}

impl Serialize for Contents {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Whole<'a> {
            entries: BTreeMap<&'a InstanceName, Written<'a>>,
            #[serde(skip_serializing_if = "BTreeSet::is_empty")]
            unreadable: &'a BTreeSet<String>,
            #[serde(skip_serializing_if = "BTreeSet::is_empty")]
            with_credentials: &'a BTreeSet<InstanceName>,
            #[serde(skip_serializing_if = "BTreeMap::is_empty")]
            images: &'a BTreeMap<String, PulledImage>,
        }
        let Self { entries, strange, unreadable, with_credentials, images } = self;
        let mut all: BTreeMap<_, _> = entries.iter().map(|(name, entry)| (name, Written::Known(entry))).collect();
        for (name, entry) in strange {
            // It was JSON when it was read.
            let raw = serde_json::from_str(&entry.text).map_err(serde::ser::Error::custom)?;
            all.insert(name, Written::Strange(raw));
        }
        Whole { entries: all, unreadable, with_credentials, images }.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use serde_json::json;

    use super::super::tests::contents;
    use super::super::{Found, Ledger, parse, render};
    use super::*;
    use crate::instance::FailureKind;

    /// The body of a ledger, changed as a newer agent may have it.
    fn from_the_future(change: impl FnOnce(&mut Value)) -> Vec<u8> {
        let mut body = serde_json::to_value(contents(&["one", "two"])).unwrap();
        change(&mut body);
        super::super::fuzzed::with_header(body.to_string().as_bytes())
    }

    fn body_of(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes.splitn(2, |byte| *byte == b'\n').nth(1).unwrap()).unwrap()
    }

    #[test]
    fn fields_nobody_here_knows_are_passed_over_everywhere() {
        let bytes = from_the_future(|body| {
            fn add(value: &mut Value) {
                match value {
                    Value::Object(fields) => {
                        // Maps whose keys are names, not fields.
                        for (_, value) in fields
                            .iter_mut()
                            .filter(|(name, _)| !["environment", "labels", "tmpfs"].contains(&name.as_str()))
                        {
                            add(value);
                        }
                        if !fields.contains_key("one") {
                            fields.insert("of_the_future".to_owned(), json!({"a": [1, null, 2.5]}));
                        }
                    }
                    Value::Array(values) => values.iter_mut().for_each(add),
                    _ => {}
                }
            }
            add(body);
        });
        assert_eq!(parse(&bytes).unwrap().1, contents(&["one", "two"]));
    }

    #[test]
    fn a_kind_of_failure_nobody_here_knows_is_kept_as_it_was_written() {
        for kind in
            [json!("melted"), json!({"melted": {"degrees": 900}}), json!({"exited": {"signal": "SEGV", "code": "x"}})]
        {
            let failure = json!({"kind": kind, "message": "it melted"});
            let last = json!({"deployment": uuid::Uuid::nil(), "at": "2030-01-01T00:00:00Z", "failure": failure});
            let bytes = from_the_future(|body| {
                body["entries"]["one"]["last_update"] = last.clone();
                body["entries"]["two"]["intent"] = json!({"remove": {"undone": failure}});
            });
            let (generation, read) = parse(&bytes).unwrap();
            assert_eq!((read.entries.len(), read.strange.len()), (2, 0), "{kind}");
            let told = read.entries.values().next().unwrap().last_update.clone().unwrap().failure.unwrap();
            assert_eq!((told.kind, told.message.as_str()), (FailureKind::Unknown(kind), "it melted"));
            assert_eq!(body_of(&render(generation, &read).unwrap()), body_of(&bytes));
        }
    }

    #[test]
    fn an_entry_that_can_not_be_read_stays_as_it_was_written_and_the_others_are_as_ever() {
        let changes: [fn(&mut Value); 8] = [
            |one| one["intent"] = json!("hibernate"),
            |one| one["intent"] = json!({"remove": {"expired": {"after": 5}}}),
            |one| one["spec"]["pull_policy"] = json!("sometimes"),
            |one| one["spec"]["mcp"]["transport"] = json!("pigeon"),
            |one| one["spec"]["restart"] = json!("now_and_then"),
            |one| one["spec"]["network"] = json!({"egress": "by_night"}),
            |one| one["batch"] = json!("another shape"),
            |one| *one = json!({"deployment": uuid::Uuid::from_u128(9), "spec": {"image": "a/b:1"}, "next": [{"deployment": uuid::Uuid::from_u128(8)}]}),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let bytes = from_the_future(|body| change(&mut body["entries"]["one"]));
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join("ledger.json"), &bytes).unwrap();
            let (mut ledger, found) = Ledger::open(directory.path(), Timestamp::UNIX_EPOCH).unwrap();
            assert_eq!(found, Found::Whole, "change {number}");
            let mut read = ledger.contents().clone();
            assert_eq!(read.strange.keys().map(InstanceName::as_str).collect::<Vec<_>>(), ["one"], "change {number}");
            let two: InstanceName = "two".parse().unwrap();
            assert_eq!(read.entries, BTreeMap::from([(two.clone(), contents(&["two"]).entries[&two].clone())]));
            assert!(!format!("{read:?}").contains("hibernate"));
            // Whatever else this agent writes down, the newer one finds its entry again.
            read.entries.remove(&two);
            ledger.commit(read).unwrap();
            let written = body_of(&std::fs::read(directory.path().join("ledger.json")).unwrap());
            assert_eq!(written["entries"]["one"], body_of(&bytes)["entries"]["one"], "change {number}");
            if number == 7 {
                let strange = ledger.contents().strange.values().next().unwrap();
                let known = (
                    strange.deployments().map(|id| id.as_u128()).collect::<Vec<_>>(),
                    strange.images().collect::<Vec<_>>(),
                );
                assert_eq!(known, (vec![8, 9], vec!["a/b:1"]));
            }
        }
    }
}
