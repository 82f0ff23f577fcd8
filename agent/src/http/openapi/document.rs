//! Writes the description: goes through the table of routes as another [`Table`] and puts what it finds in OpenAPI's words.

use std::collections::BTreeMap;

use axum::handler::Handler;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::super::App;
use super::super::table::{Table, Verb};
use super::operation::{Access, Answer, Content, Failing, Operation};

const ABOUT: &str = "\
Runs MCP server containers on one droplet and gives each an authenticated endpoint.

Every answer carries `x-request-id`, the caller's where it sent one. Every failure is a `Failure`: `code` is stable and what programs \
decide by, `error` is a sentence for a person. Paths this agent doesn't have answer 404 `no_such_route`, methods a path doesn't take 405 \
`method_not_allowed`. The port speaks TLS; plain HTTP is answered with 426 `tls_required`, unless the operator allows it. \
Unknown query parameters and unknown fields are ignored.

`{ref}` is an instance's name, its `account_tool_instance_id`, or its container's id: whole, or a unique beginning of at least twelve \
characters.";

const PATH_PARAMETERS: [(&str, &str); 4] = [
    ("id", "The group's id, as it was chosen when it was deployed."),
    ("groupId", "The group's id, as it was chosen when it was deployed."),
    (
        "ref",
        "The instance: its name, its `account_tool_instance_id`, or its container's id (whole, or a unique beginning of at least twelve characters).",
    ),
    ("rest", "What follows the endpoint's path on the server; slashes are allowed."),
];

/// What every operation behind the gate can fail with.
const GATED: [Failing; 3] = [
    (401, "credential_missing", "there is no `Authorization` header"),
    (401, "credential_malformed", "the `Authorization` header is not `Bearer KEY`"),
    (403, "credential_wrong", "this key is not accepted here; the answer takes longer the more often that happens"),
];

/// What every operation can fail with.
const ALWAYS: [Failing; 1] = [(500, "internal_error", "the agent failed; its log says why")];

/// The description in the making.
pub(super) struct Document {
    paths: BTreeMap<String, Map<String, Value>>,
    /// Of what callers send.
    read: SchemaGenerator,
    /// Of what the agent answers.
    written: SchemaGenerator,
}

impl Table for Document {
    fn on<H, A>(mut self, methods: &[Verb], path: &'static str, _: H, describe: impl FnOnce() -> Operation) -> Self
    where
        H: Handler<A, App>,
        A: 'static,
    {
        let operation = describe();
        for verb in methods {
            let method = format!("{verb:?}").to_ascii_lowercase();
            let shown = path.replace("{*", "{");
            let mut described = self.operation(&operation, &shown);
            described["operationId"] = operation_id(&method, &shown).into();
            let before = self.paths.entry(shown).or_default().insert(method, described);
            assert!(before.is_none(), "{path} has {verb:?} twice");
        }
        self
    }
}

impl Document {
    pub(super) fn new() -> Self {
        let settings = || {
            SchemaSettings::draft2020_12().with(|settings| {
                settings.definitions_path = "/components/schemas".into();
                settings.meta_schema = None;
            })
        };
        Self {
            paths: BTreeMap::new(),
            read: settings().for_deserialize().into_generator(),
            written: settings().for_serialize().into_generator(),
        }
    }

    fn operation(&mut self, operation: &Operation, path: &str) -> Value {
        let mut value = json!({
            "summary": operation.summary,
            "tags": [tag(path)],
            "security": match operation.access {
                Access::Keyed => json!([{ "key": [] }]),
                Access::More => json!([{ "key": [] }, {}]),
                Access::Open => json!([]),
            },
            "responses": self.responses(operation),
        });
        if let Some(description) = operation.description {
            value["description"] = description.into();
        }
        let parameters = parameters(operation, path);
        if !parameters.is_empty() {
            value["parameters"] = parameters.into();
        }
        if let Some(body) = &operation.body {
            let mut content = json!({ "schema": (body.schema)(&mut self.read) });
            for (name, summary, example) in &body.examples {
                content["examples"][name] = json!({ "summary": summary, "value": example });
            }
            value["requestBody"] = json!({
                "description": body.description,
                "required": body.required,
                "content": { "application/json": content },
            });
        }
        value
    }

    fn responses(&mut self, operation: &Operation) -> Value {
        let mut responses: BTreeMap<u16, Value> = BTreeMap::new();
        for Answer { status, description, content } in &operation.answers {
            let response = responses.entry(*status).or_insert_with(|| json!({ "description": "" }));
            let text = response["description"].as_str().unwrap();
            let told = if text.is_empty() { (*description).to_owned() } else { format!("{text}\n\n{description}") };
            response["description"] = told.into();
            let (media_type, schema) = self.content(content);
            response["content"][media_type] = schema;
        }
        let gated: &[Failing] = if operation.access == Access::Open { &[] } else { &GATED };
        for (status, codes) in by_status(operation.failures.iter().chain(gated).chain(&ALWAYS)) {
            assert!(!responses.contains_key(&status), "{status} is a success and a failure of {}", operation.summary);
            let shared = by_status(GATED.iter().chain(&ALWAYS)).remove(&status).is_some_and(|shared| shared == codes);
            let response = if shared {
                json!({ "$ref": format!("#/components/responses/{status}") })
            } else {
                self.failure(&codes)
            };
            responses.insert(status, response);
        }
        responses.into_iter().map(|(status, response)| (status.to_string(), response)).collect::<Map<_, _>>().into()
    }

    /// The answer for these codes of one status, each with when it is given.
    fn failure(&mut self, codes: &BTreeMap<&str, &str>) -> Value {
        let told: Vec<_> = codes.iter().map(|(code, when)| format!("- `{code}`: {when}")).collect();
        let failure = self.written.subschema_for::<dtma_api::Failure>();
        let codes: Vec<_> = codes.keys().collect();
        let schema = json!({ "allOf": [failure, { "properties": { "code": { "enum": codes } } }] });
        json!({ "description": told.join("\n"), "content": { "application/json": { "schema": schema } } })
    }

    fn content(&mut self, content: &Content) -> (&'static str, Value) {
        match content {
            Content::Json(schema) => ("application/json", json!({ "schema": schema(&mut self.written) })),
            // What a stream as a whole is, OpenAPI 3.1 can't say; by custom `schema` is that of one item.
            Content::Events(schema) => {
                let data = json!({
                    "type": "string",
                    "contentMediaType": "application/json",
                    "contentSchema": schema(&mut self.written),
                });
                let text = json!({ "type": "string" });
                let event = json!({
                    "description": "One event of the stream.",
                    "type": "object",
                    "properties": { "id": text, "event": text, "data": data },
                    "required": ["data"],
                });
                ("text/event-stream", json!({ "schema": event }))
            }
            Content::Lines(schema) => ("application/x-ndjson", json!({ "schema": schema(&mut self.written) })),
            Content::Text(media_type) => (media_type, json!({ "schema": { "type": "string" } })),
            Content::Any => ("*/*", json!({})),
        }
    }

    /// A type that no answer as a whole is, and that readers of a description need all the same.
    pub(super) fn with<T: JsonSchema>(mut self) -> Self {
        self.written.subschema_for::<T>();
        self
    }

    pub(super) fn finish(mut self) -> Value {
        let shared: BTreeMap<_, _> = by_status(GATED.iter().chain(&ALWAYS))
            .into_iter()
            .map(|(status, codes)| (status.to_string(), self.failure(&codes)))
            .collect();
        let mut schemas = self.written.take_definitions(true);
        for (name, schema) in self.read.take_definitions(true) {
            if let Some(other) = schemas.get(&name) {
                assert_eq!(other, &schema, "{name} is read and written, and not the same in both: make it two types");
            }
            schemas.insert(name, schema);
        }
        json!({
            "openapi": "3.1.0",
            "info": { "title": "dtma-agent", "version": crate::version(), "description": ABOUT },
            "paths": self.paths,
            "components": {
                "schemas": schemas,
                "responses": shared,
                "securitySchemes": {
                    "key": {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "The fleet's key, or this droplet's own inbound key.",
                    },
                },
            },
        })
    }
}

fn by_status<'a>(failures: impl Iterator<Item = &'a Failing>) -> BTreeMap<u16, BTreeMap<&'a str, &'a str>> {
    let mut by_status: BTreeMap<u16, BTreeMap<&str, &str>> = BTreeMap::new();
    for (status, code, when) in failures {
        by_status.entry(*status).or_default().insert(code, when);
    }
    by_status
}

fn parameters(operation: &Operation, path: &str) -> Vec<Value> {
    let in_path = path.split('{').skip(1).map(|rest| rest.split('}').next().unwrap());
    let in_path = in_path.map(|name| {
        let known = PATH_PARAMETERS.iter().find(|(known, _)| *known == name);
        let (_, description) = known.unwrap_or_else(|| panic!("say in PATH_PARAMETERS what {name} is"));
        let schema = json!({ "type": "string", "minLength": 1 });
        json!({ "name": name, "in": "path", "required": true, "description": description, "schema": schema })
    });
    let in_query = operation.query.iter().map(
        |query| json!({ "name": query.name, "in": "query", "description": query.description, "schema": query.schema }),
    );
    let in_header = operation.headers.iter().map(|(name, description)| {
        json!({ "name": name, "in": "header", "description": description, "schema": { "type": "string" } })
    });
    in_path.chain(in_query).chain(in_header).collect()
}

fn tag(path: &str) -> &'static str {
    match path.split('/').nth(1) {
        Some("tools" | "events") => "instances",
        Some("mcp") => "MCP management",
        _ => "agent",
    }
}

/// `get_tools_ref_logs`.
fn operation_id(method: &str, path: &str) -> String {
    let words = path.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    std::iter::once(method).chain(words).collect::<Vec<_>>().join("_")
}
