//! What the description says of one operation: plain data, built in the table of routes and read by [`super::document`] alone.

#![cfg_attr(not(test), allow(dead_code, reason = "a program contains no description, and so nobody who reads one"))]

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::Value;

/// Who may call an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::http) enum Access {
    /// Who bears a key.
    Keyed,
    /// Everybody; who bears a key is told more.
    More,
    /// Everybody.
    Open,
}

/// What the description says of one operation. Built in the table, read by who writes the description.
pub(in crate::http) struct Operation {
    pub(in crate::http) summary: &'static str,
    pub(in crate::http) description: Option<&'static str>,
    pub(in crate::http) access: Access,
    pub(in crate::http) query: Vec<Query>,
    pub(in crate::http) headers: Vec<(&'static str, &'static str)>,
    pub(in crate::http) body: Option<Body>,
    pub(in crate::http) answers: Vec<Answer>,
    pub(in crate::http) failures: Vec<Failing>,
}

/// A parameter of the query.
pub(in crate::http) struct Query {
    pub(in crate::http) name: &'static str,
    pub(in crate::http) description: &'static str,
    pub(in crate::http) schema: Value,
}

/// The body of a request.
pub(in crate::http) struct Body {
    pub(in crate::http) description: &'static str,
    pub(in crate::http) schema: SchemaOf,
    pub(in crate::http) required: bool,
    /// Name, what it is, the body.
    pub(in crate::http) examples: Vec<(&'static str, &'static str, Value)>,
}

/// A schema that isn't made before somebody wants it.
pub(in crate::http) type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// One kind of answer; several of one status differ in their media type.
pub(in crate::http) struct Answer {
    pub(in crate::http) status: u16,
    pub(in crate::http) description: &'static str,
    pub(in crate::http) content: Content,
}

/// What an answer's body is.
pub(in crate::http) enum Content {
    /// One JSON text.
    Json(SchemaOf),
    /// Server-sent events, the data of each a JSON text.
    Events(SchemaOf),
    /// JSON texts, each with a line break behind it.
    Lines(SchemaOf),
    /// Text of this media type.
    Text(&'static str),
    /// Whatever the MCP server sends.
    Any,
}

/// A way to fail: status, code, and when.
pub(in crate::http) type Failing = (u16, &'static str, &'static str);

/// For operations on `{ref}`.
pub(in crate::http) const NAMED: [Failing; 4] = [
    (400, "invalid_request", "the path is not UTF-8, or a parameter can't be read"),
    (404, "instance_not_found", "nothing is called that"),
    (409, "ambiguous_reference", "several containers' ids begin with it"),
    (503, "docker_unavailable", "the Docker Engine does not answer; try again after `Retry-After`"),
];

/// For operations that write down what is wanted and wait until it is so.
pub(in crate::http) const CHANGING: [Failing; 6] = [
    (409, "superseded", "another request changed the instance meanwhile"),
    (500, "docker_failed", "the Docker Engine failed; `GET /tools/{ref}/events` has what it said"),
    (500, "ledger_unwritable", "the request could not be recorded, and nothing was changed"),
    (503, "docker_unavailable", "the Docker Engine does not answer; try again after `Retry-After`"),
    (507, "no_space", "the droplet's disk is full, or has too little room for another image; `error` has the figures"),
    (409, "busy", "the instance is being brought up, updated or removed; try again after `Retry-After`"),
];

/// For operations after which the server has to run. `details` has the server's last lines of output where they matter.
pub(in crate::http) const RUNNING: [Failing; 11] = [
    (404, "image_not_found", "no registry has the image, or it is not here and may not be pulled"),
    (409, "name_conflict", "a container that is not this agent's has the name"),
    (409, "port_conflict", "a published port is taken; `details.holder` says by whom"),
    (422, "container_refused", "Docker won't make or start a container like this"),
    (422, "exited", "the server's process ended soon after its start; `details` has `exit_code` and `log`"),
    (422, "not_answering", "it runs and does not answer as an MCP server; `details.log`"),
    (422, "pull_denied", "the registry wants other `registryCredentials`, or any"),
    (502, "pull_failed", "the registry can't be reached or broke off"),
    (409, "needs_secrets", "values of `secrets` are gone since the droplet was restarted; repeat the deploy with them"),
    (502, "secrets_unavailable", "the backend does not give the instance's secrets; `error` says why"),
    (
        503,
        "no_secret_store",
        "secrets can't be kept in memory on this droplet, and nothing was changed; the agent's log says why",
    ),
];

impl Operation {
    /// An operation, in a few words.
    pub(in crate::http) fn new(summary: &'static str) -> Self {
        Self {
            summary,
            description: None,
            access: Access::Keyed,
            query: Vec::new(),
            headers: Vec::new(),
            body: None,
            answers: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// More about it.
    pub(in crate::http) fn described(mut self, description: &'static str) -> Self {
        self.description = Some(description);
        self
    }

    /// Who may call it, where that isn't only who bears a key.
    pub(in crate::http) fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// A parameter of the query.
    pub(in crate::http) fn query(mut self, name: &'static str, description: &'static str, schema: Value) -> Self {
        self.query.push(Query { name, description, schema });
        self
    }

    /// A switch in the query.
    pub(in crate::http) fn flag(self, name: &'static str, default: bool, description: &'static str) -> Self {
        self.query(name, description, serde_json::json!({ "type": "boolean", "default": default }))
    }

    /// How long the caller waits.
    pub(in crate::http) fn waits(self) -> Self {
        let description = "How many seconds to wait until it is as asked, 140 at most; after that the answer is 202 and the work goes on.";
        self.query("wait", description, serde_json::json!({ "type": "integer", "minimum": 0, "default": 120 }))
    }

    /// A number of lines in the query.
    pub(in crate::http) fn count(self, name: &'static str, description: &'static str) -> Self {
        let most = u32::MAX;
        let number = serde_json::json!({ "type": "integer", "minimum": 0, "maximum": most });
        self.query(name, description, serde_json::json!({ "oneOf": [number, { "const": "all" }] }))
    }

    /// A time in the query.
    pub(in crate::http) fn time(self, name: &'static str, description: &'static str) -> Self {
        let time = serde_json::json!({ "type": "string", "format": "date-time" });
        let seconds = serde_json::json!({ "type": "integer", "description": "Unix seconds" });
        self.query(name, description, serde_json::json!({ "oneOf": [time, seconds] }))
    }

    /// A header that is read.
    pub(in crate::http) fn header(mut self, name: &'static str, description: &'static str) -> Self {
        self.headers.push((name, description));
        self
    }

    /// What its body is.
    pub(in crate::http) fn takes<T: JsonSchema>(mut self, description: &'static str) -> Self {
        let schema = |generator: &mut SchemaGenerator| generator.subschema_for::<T>();
        self.body = Some(Body { description, schema, required: true, examples: Vec::new() });
        self
    }

    /// That its body may be left out.
    pub(in crate::http) fn optionally(mut self) -> Self {
        if let Some(body) = &mut self.body {
            body.required = false;
        }
        self
    }

    /// An example of its body.
    pub(in crate::http) fn example(mut self, name: &'static str, summary: &'static str, body: Value) -> Self {
        if let Some(of) = &mut self.body {
            of.examples.push((name, summary, body));
        }
        self
    }

    /// An answer in JSON.
    pub(in crate::http) fn answers<T: JsonSchema>(self, status: u16, description: &'static str) -> Self {
        self.answer(status, description, Content::Json(|generator| generator.subschema_for::<T>()))
    }

    /// An answer of server-sent events, `T` the data of each.
    pub(in crate::http) fn streams<T: JsonSchema>(self, status: u16, description: &'static str) -> Self {
        self.answer(status, description, Content::Events(|generator| generator.subschema_for::<T>()))
    }

    /// An answer of lines, each `T` in JSON.
    pub(in crate::http) fn lists<T: JsonSchema>(self, status: u16, description: &'static str) -> Self {
        self.answer(status, description, Content::Lines(|generator| generator.subschema_for::<T>()))
    }

    /// An answer of any kind.
    pub(in crate::http) fn answer(mut self, status: u16, description: &'static str, content: Content) -> Self {
        self.answers.push(Answer { status, description, content });
        self
    }

    /// How it can fail, besides how every operation can.
    pub(in crate::http) fn fails(mut self, failures: &[Failing]) -> Self {
        self.failures.extend_from_slice(failures);
        self
    }
}
