//! Holds answers to `openapi.json`: whatever a test asks, what comes back has to be described there.

use std::sync::OnceLock;

use serde_json::{Value, json};

/// The committed description, which another test holds to the code.
pub(crate) fn description() -> &'static Value {
    static DESCRIPTION: OnceLock<Value> = OnceLock::new();
    DESCRIPTION.get_or_init(|| serde_json::from_str(include_str!("../../openapi.json")).unwrap())
}

/// Panics unless this answer is one that the description has for this request.
pub(crate) fn check(method: &str, path: &str, status: u16, media_type: &str, body: &str) {
    let path = path.split('?').next().unwrap();
    let operation = described_path(path).and_then(|methods| methods.get(method.to_ascii_lowercase()));
    let Some(operation) = operation else {
        let expected = if described_path(path).is_some() { 405 } else { 404 };
        assert!(
            status == expected || matches!(status, 401 | 403),
            "{method} {path} is not described and answers {status}"
        );
        return is_valid(&json!({ "$ref": "#/components/schemas/Failure" }), body, &format!("{method} {path}"));
    };
    let what = format!("{method} {path}: {status} {media_type}");
    let response = &operation["responses"][status.to_string()];
    let response = response
        .get("$ref")
        .map_or(response, |shared| description().pointer(shared.as_str().unwrap().trim_start_matches('#')).unwrap());
    assert!(response.is_object(), "{what}: there is no such status in openapi.json; the body is {body}");
    let essence = media_type.split(';').next().unwrap();
    let content = &response["content"];
    let Some(content) = content.get(essence).or_else(|| content.get("*/*")) else {
        panic!("{what}: there is no such media type in openapi.json")
    };
    // What an MCP server answers is its own.
    let Some(schema) = content.get("schema") else { return };
    match essence {
        "application/json" => is_valid(schema, body, &what),
        // `schema` is that of one line, or of one event.
        "application/x-ndjson" => body.lines().for_each(|line| is_valid(schema, line, &what)),
        "text/event-stream" => {
            let data = &schema["properties"]["data"]["contentSchema"];
            body.lines().filter_map(|line| line.strip_prefix("data: ")).for_each(|line| is_valid(data, line, &what));
        }
        _ => {}
    }
}

fn is_valid(schema: &Value, body: &str, what: &str) {
    let schema = json!({ "allOf": [schema], "components": description()["components"] });
    let body: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{what}: {error}: {body}"));
    let validator = jsonschema::draft202012::new(&schema).unwrap();
    let faults: Vec<_> =
        validator.iter_errors(&body).map(|fault| format!("{} {fault}", fault.instance_path())).collect();
    assert!(faults.is_empty(), "{what}: not as openapi.json has it: {faults:?}: {body}");
}

/// The methods of the path a request's path is one of; one that is written out goes before one with parameters.
fn described_path(path: &str) -> Option<&'static Value> {
    let paths = description()["paths"].as_object().unwrap();
    let matching = paths.iter().filter(|(template, _)| matches(template, path));
    matching.min_by_key(|(template, _)| template.matches('{').count()).map(|(_, methods)| methods)
}

fn matches(template: &str, path: &str) -> bool {
    let (mut template, mut path) = (template.split('/'), path.split('/'));
    loop {
        match (template.next(), path.next()) {
            (None, None) => return true,
            (Some("{rest}"), Some(_)) => return true,
            (Some(wanted), Some(given)) if wanted == given || (wanted.starts_with('{') && !given.is_empty()) => {}
            (Some(_), Some(_)) | (Some(_), None) | (None, Some(_)) => return false,
        }
    }
}
