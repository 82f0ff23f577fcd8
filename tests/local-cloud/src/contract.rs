//! Is traffic what DigitalOcean's API description says? Checks requests as strictly as answers, a field the description doesn't know
//! included. Pure once loaded; knows nothing of droplets.

mod schema;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jsonschema::Validator;
use serde_json::{Value, json};

use self::schema::{Unresolved, standalone, target};

/// DigitalOcean's API description, made ready for checking.
pub struct Contract {
    operations: BTreeMap<String, Operation>,
}

struct Operation {
    /// Path with `{parameters}`.
    route: String,
    parameters: Vec<Parameter>,
    body: Option<Validator>,
    /// By status; `None` as the schema of an answer without a body.
    answers: BTreeMap<String, Option<Validator>>,
}

struct Parameter {
    name: String,
    place: Place,
    required: bool,
    validator: Validator,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Path,
    Query,
}

/// Why a description could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ContractError {
    /// The file could not be read.
    #[error("reading {} failed", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// It is no YAML.
    #[error("parsing {} failed", .0.display())]
    Parse(PathBuf, #[source] serde_yaml_ng::Error),
    /// A reference leads nowhere.
    #[error("resolving the description of {operation} failed")]
    Resolve {
        /// Which operation.
        operation: String,
        /// Which reference.
        #[source]
        source: Unresolved,
    },
    /// A schema that isn't one.
    #[error("compiling a schema of {operation} failed: {message}")]
    Compile {
        /// Which operation.
        operation: String,
        /// What is wrong with it.
        message: String,
    },
}

/// Path parameters that take more than their schema says: an image is also named by its slug, as the operation's own text has it.
const WIDER_THAN_DESCRIBED: [(&str, &str); 1] = [("images_get", "image_id")];

const VERBS: [&str; 5] = ["get", "post", "put", "patch", "delete"];

impl Contract {
    /// Reads an OpenAPI 3.0 file in YAML.
    ///
    /// # Errors
    /// When it can't be read, or isn't one.
    pub fn load(path: &Path) -> Result<Self, ContractError> {
        let text = std::fs::read_to_string(path).map_err(|error| ContractError::Read(path.to_owned(), error))?;
        let document: Value =
            serde_yaml_ng::from_str(&text).map_err(|error| ContractError::Parse(path.to_owned(), error))?;
        let mut operations = BTreeMap::new();
        let none = serde_json::Map::new();
        for (route, item) in document.get("paths").and_then(Value::as_object).unwrap_or(&none) {
            for verb in VERBS {
                let Some(described) = item.get(verb) else { continue };
                if let Some(id) = described.get("operationId").and_then(Value::as_str) {
                    operations.insert(id.to_owned(), Operation::read(id, route, described, &document)?);
                }
            }
        }
        Ok(Self { operations })
    }

    /// What is wrong with a request: its path and query parameters and its body. Nothing when all is well.
    pub fn check_request(&self, operation: &str, path: &str, query: &str, body: &[u8]) -> Vec<String> {
        let Some(described) = self.operations.get(operation) else { return vec![unknown(operation)] };
        let mut wrong = described.check_path(path);
        wrong.extend(described.check_query(query));
        match (&described.body, body) {
            (None, []) => {}
            (None, _) => wrong.push("body: this operation takes none".to_owned()),
            (Some(validator), body) => wrong.extend(check_json(validator, body)),
        }
        wrong
    }

    /// What is wrong with an answer.
    pub fn check_answer(&self, operation: &str, status: u16, body: &[u8]) -> Vec<String> {
        let Some(described) = self.operations.get(operation) else { return vec![unknown(operation)] };
        let answers = &described.answers;
        match answers.get(&status.to_string()).or_else(|| answers.get("default")) {
            None => vec![format!("status: {status} is not among {:?}", answers.keys().collect::<Vec<_>>())],
            Some(None) if body.is_empty() => vec![],
            Some(None) => vec![format!("body: a {status} has none")],
            Some(Some(validator)) => check_json(validator, body),
        }
    }
}

impl Operation {
    fn read(id: &str, route: &str, described: &Value, document: &Value) -> Result<Self, ContractError> {
        let unresolved = |source| ContractError::Resolve { operation: id.to_owned(), source };
        let compile = |schema: &Value| {
            let schema = standalone(schema, document).map_err(unresolved)?;
            jsonschema::draft202012::options()
                .should_validate_formats(true)
                .build(&schema)
                .map_err(|error| ContractError::Compile { operation: id.to_owned(), message: error.to_string() })
        };
        let mut parameters = Vec::new();
        for parameter in described.get("parameters").and_then(Value::as_array).into_iter().flatten() {
            let parameter = target(parameter, document).map_err(unresolved)?;
            let text = |key: &str| parameter.get(key).and_then(Value::as_str).unwrap_or_default();
            let place = match text("in") {
                "path" => Place::Path,
                "query" => Place::Query,
                _ => continue,
            };
            if WIDER_THAN_DESCRIBED.contains(&(id, text("name"))) {
                continue;
            }
            parameters.push(Parameter {
                name: text("name").to_owned(),
                place,
                required: parameter.get("required") == Some(&Value::Bool(true)),
                validator: compile(parameter.get("schema").unwrap_or(&Value::Null))?,
            });
        }
        let body = match described.get("requestBody") {
            None => None,
            Some(body) => {
                let body = target(body, document).map_err(unresolved)?;
                let schema = json_schema(body).unwrap_or(&Value::Null);
                // Callers must not send what the description doesn't know: it would be a misspelt field.
                Some(compile(&json!({ "allOf": [schema], "unevaluatedProperties": false }))?)
            }
        };
        let mut answers = BTreeMap::new();
        for (status, answer) in described.get("responses").and_then(Value::as_object).into_iter().flatten() {
            let answer = target(answer, document).map_err(unresolved)?;
            answers.insert(status.clone(), json_schema(answer).map(compile).transpose()?);
        }
        Ok(Self { route: route.to_owned(), parameters, body, answers })
    }

    fn check_path(&self, path: &str) -> Vec<String> {
        let mut wrong = Vec::new();
        for (pattern, value) in self.route.split('/').zip(path.split('/')) {
            let Some(name) = pattern.strip_prefix('{').and_then(|name| name.strip_suffix('}')) else { continue };
            let value: String =
                form_urlencoded::parse(format!("v={value}").as_bytes()).map(|(_, value)| value.into_owned()).collect();
            if let Some(parameter) = self.parameter(Place::Path, name) {
                wrong.extend(parameter.check(&value));
            }
        }
        wrong
    }

    fn check_query(&self, query: &str) -> Vec<String> {
        let mut wrong = Vec::new();
        let given: Vec<_> = form_urlencoded::parse(query.as_bytes()).collect();
        for (name, value) in &given {
            match self.parameter(Place::Query, name) {
                Some(parameter) => wrong.extend(parameter.check(value)),
                None => wrong.push(format!("query: {name} is not among this operation's parameters")),
            }
        }
        let missing = self.parameters.iter().filter(|parameter| {
            parameter.required
                && parameter.place == Place::Query
                && !given.iter().any(|(name, _)| *name == parameter.name)
        });
        wrong.extend(missing.map(|parameter| format!("query: {} is missing", parameter.name)));
        wrong
    }

    fn parameter(&self, place: Place, name: &str) -> Option<&Parameter> {
        self.parameters.iter().find(|parameter| parameter.place == place && parameter.name == name)
    }
}

impl Parameter {
    /// A parameter is text; where its schema wants a number or a boolean, that is what the text must read as.
    fn check(&self, text: &str) -> Option<String> {
        let as_text = Value::String(text.to_owned());
        let as_json = serde_json::from_str::<Value>(text).ok().filter(|value| value.is_number() || value.is_boolean());
        let fits = self.validator.is_valid(&as_text) || as_json.is_some_and(|value| self.validator.is_valid(&value));
        (!fits).then(|| format!("{} {text:?} is not what the description says", self.name))
    }
}

fn json_schema(described: &Value) -> Option<&Value> {
    described.get("content")?.get("application/json")?.get("schema")
}

fn check_json(validator: &Validator, body: &[u8]) -> Vec<String> {
    match serde_json::from_slice::<Value>(body) {
        Ok(value) => validator
            .iter_errors(&value)
            .map(|error| format!("body{}: {}", error.instance_path(), shortened(&error.to_string())))
            .collect(),
        Err(error) => vec![format!("body: not JSON: {error}")],
    }
}

/// A validator's message quotes the whole value, which may be a droplet's user data.
fn shortened(message: &str) -> String {
    const SHOWN: usize = 300;
    if message.chars().count() <= SHOWN {
        return message.to_owned();
    }
    let (start, end): (String, String) = (
        message.chars().take(SHOWN / 2).collect(),
        message.chars().skip(message.chars().count() - SHOWN / 2).collect(),
    );
    format!("{start} … {end}")
}

fn unknown(operation: &str) -> String {
    format!("the description has no operation {operation}")
}
