//! Collecting what is wrong, and where.

use std::fmt;

use dtma_api::failure::Fault;
use serde_json::{Map, Value};

use super::Review;
use crate::instance::Spec;

/// Faults, and warnings, told of at most. Nobody reads more, and a body of nothing but faults would make an answer many times its size.
const MOST_TOLD: usize = 100;
/// Elements a list or an object may have: far more than any of them needs.
const MOST_ELEMENTS: usize = 4096;

/// A place in the body, as a JSON path.
#[derive(Debug, Clone)]
pub(super) struct At(String);

impl At {
    pub(super) fn root() -> Self {
        Self("$".to_owned())
    }

    /// A member of the object here.
    pub(super) fn key(&self, key: &str) -> Self {
        let plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if plain { Self(format!("{}.{key}", self.0)) } else { Self(format!("{}[{}]", self.0, Value::from(key))) }
    }

    /// An element of the list here.
    fn index(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a value is as if it weren't there: callers spell out defaults.
pub(super) fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.is_empty(),
    }
}

#[derive(Debug, Default)]
pub(super) struct Findings {
    faults: Told,
    /// Those of the faults that are forbidden options.
    forbidden: Told,
    warnings: Told,
}

/// The first of what is to be told, and how much more there is.
#[derive(Debug, Default)]
struct Told {
    first: Vec<Fault>,
    more: usize,
}

impl Told {
    fn add(&mut self, at: &At, problem: impl Into<String>) {
        if self.first.len() < MOST_TOLD {
            self.first.push(Fault { path: at.to_string(), problem: problem.into() });
        } else {
            self.more += 1;
        }
    }

    fn list(mut self) -> Vec<Fault> {
        if self.more > 0 {
            let problem = format!("has {} more like these, which are not listed", self.more);
            self.first.push(Fault { path: At::root().to_string(), problem });
        }
        self.first
    }
}

impl Findings {
    pub(super) fn fault(&mut self, at: &At, problem: impl Into<String>) {
        self.faults.add(at, problem);
    }

    pub(super) fn forbid(&mut self, at: &At, problem: impl Into<String>) {
        let problem = problem.into();
        self.forbidden.add(at, problem.clone());
        self.fault(at, problem);
    }

    pub(super) fn warn(&mut self, at: &At, problem: impl Into<String>) {
        self.warnings.add(at, problem);
    }

    pub(super) fn is_sound(&self) -> bool {
        self.faults.first.is_empty()
    }

    /// Everything found, and the spec where nothing is wrong.
    pub(super) fn review(self, spec: Option<Spec>) -> Review {
        let forbidden = self.forbidden.first;
        Review { spec, faults: self.faults.list(), forbidden, warnings: self.warnings.list() }
    }

    /// A text that may be absent.
    pub(super) fn text(&mut self, value: Option<&Value>, at: &At) -> Option<String> {
        match value {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => Some(text.clone()),
            Some(_) => {
                self.fault(at, "must be a text");
                None
            }
        }
    }

    /// The elements of a list that may be absent.
    pub(super) fn list<'a>(&mut self, value: Option<&'a Value>, at: &At) -> Vec<(At, &'a Value)> {
        match value {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(items)) if items.len() > MOST_ELEMENTS => {
                self.fault(at, format!("has more than {MOST_ELEMENTS} elements"));
                Vec::new()
            }
            Some(Value::Array(items)) => {
                items.iter().enumerate().map(|(index, item)| (at.index(index), item)).collect()
            }
            Some(_) => {
                self.fault(at, "must be a list");
                Vec::new()
            }
        }
    }

    /// The members of an object that may be absent.
    pub(super) fn map<'a>(&mut self, value: Option<&'a Value>, at: &At) -> Vec<(At, &'a str, &'a Value)> {
        match value {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Object(members)) if members.len() > MOST_ELEMENTS => {
                self.fault(at, format!("has more than {MOST_ELEMENTS} members"));
                Vec::new()
            }
            Some(Value::Object(members)) => {
                members.iter().map(|(key, value)| (at.key(key), key.as_str(), value)).collect()
            }
            Some(_) => {
                self.fault(at, "must be an object");
                Vec::new()
            }
        }
    }

    /// Warns of members nobody reads.
    pub(super) fn only_known(&mut self, object: &Map<String, Value>, at: &At, known: &[&str]) {
        for (key, _) in object.iter().filter(|(key, value)| !known.contains(&key.as_str()) && !is_nothing(value)) {
            self.warn(&at.key(key), "is not supported and was ignored");
        }
    }
}
