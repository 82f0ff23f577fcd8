//! What a server says of itself in a handshake, cut to what is worth keeping: it comes from a stranger, and is shown to callers.

use dtma_api::health::{Era, Introduction};
use serde_json::{Map, Value};

/// Longest name or version, in characters.
pub(super) const MAX_NAME: usize = 128;
/// Longest capabilities, in bytes of JSON. Real ones have a few hundred.
pub(super) const MAX_CAPABILITIES: usize = 16 * 1024;
/// Most capabilities that are named when they are longer than that.
const MAX_CAPABILITY_NAMES: usize = 20;
/// Most tools.
pub(super) const MAX_TOOLS: usize = 1000;

/// From the result of `initialize`; none when it isn't one.
pub(super) fn legacy(result: &Value) -> Option<Introduction> {
    introduction(Era::Legacy, result.get("protocolVersion")?.as_str()?, result)
}

/// From the result of `server/discover`; none when it isn't one.
pub(super) fn modern(result: &Value) -> Option<Introduction> {
    let supported = result.get("supportedVersions")?.as_array()?;
    // Versions are dates: the greatest is the latest.
    let latest = supported.iter().filter_map(Value::as_str).max().unwrap_or_default();
    introduction(Era::Modern, latest, result)
}

fn introduction(era: Era, version: &str, result: &Value) -> Option<Introduction> {
    let about = result.get("serverInfo").or_else(|| result.get("_meta")?.get("io.modelcontextprotocol/serverInfo"));
    let text = |key: &str| about.and_then(|about| about.get(key)).and_then(Value::as_str).map(cut);
    Some(Introduction {
        era,
        protocol_version: cut(version),
        name: text("name"),
        version: text("version"),
        capabilities: capabilities(result.get("capabilities")),
        tools: None,
    })
}

fn capabilities(given: Option<&Value>) -> Value {
    let Some(Value::Object(given)) = given else { return Value::Object(Map::new()) };
    let length = serde_json::to_vec(given).map_or(usize::MAX, |json| json.len());
    if length <= MAX_CAPABILITIES {
        return Value::Object(given.clone());
    }
    let names = given.keys().take(MAX_CAPABILITY_NAMES);
    Value::Object(names.map(|name| (cut(name), Value::Object(Map::new()))).collect())
}

/// Whether there are tools to ask for.
pub(super) fn offers_tools(introduction: &Introduction) -> bool {
    introduction.capabilities.get("tools").is_some()
}

/// Adds a page of `tools/list`, and says where the next one begins, if there is one that is of interest.
pub(super) fn add_tools(names: &mut Vec<String>, page: &Value) -> Option<Value> {
    let tools = page.get("tools").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let named = tools.iter().filter_map(|tool| tool.get("name")?.as_str()).map(cut);
    names.extend(named.take(MAX_TOOLS.saturating_sub(names.len())));
    let next = page.get("nextCursor").filter(|cursor| cursor.is_string())?;
    (names.len() < MAX_TOOLS).then(|| next.clone())
}

fn cut(text: &str) -> String {
    text.chars().take(MAX_NAME).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_eras_say_who_they_are_each_in_its_place() {
        let old = json!({"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
            "serverInfo": {"name": "time", "version": "1.2"}});
        let old = legacy(&old).unwrap();
        assert_eq!((old.era, old.protocol_version.as_str()), (Era::Legacy, "2025-06-18"));
        assert_eq!((old.name.as_deref(), old.version.as_deref()), (Some("time"), Some("1.2")));
        assert!(offers_tools(&old));
        let new = json!({"supportedVersions": ["2026-07-28", "2026-11-01"], "capabilities": {},
            "_meta": {"io.modelcontextprotocol/serverInfo": {"name": "time"}}});
        let new = modern(&new).unwrap();
        assert_eq!((new.era, new.protocol_version.as_str()), (Era::Modern, "2026-11-01"));
        assert_eq!((new.name.as_deref(), new.version.as_deref()), (Some("time"), None));
        assert!(!offers_tools(&new));
        assert_eq!((legacy(&json!({})), modern(&json!({}))), (None, None));
    }

    #[test]
    fn what_is_too_long_is_cut() {
        let long = "x".repeat(100_000);
        let said = legacy(&json!({"protocolVersion": long, "capabilities": {"tools": {"about": long}, "logging": {}},
            "serverInfo": {"name": long, "version": 7}}))
        .unwrap();
        assert_eq!((said.protocol_version.len(), said.name.map(|name| name.len())), (MAX_NAME, Some(MAX_NAME)));
        assert_eq!((said.version, said.capabilities), (None, json!({"logging": {}, "tools": {}})));
    }

    #[test]
    fn pages_of_tools_are_added_up_to_a_bound() {
        let page = |count: usize| {
            let tools: Vec<Value> = (0..count).map(|number| json!({"name": format!("tool-{number}")})).collect();
            json!({"tools": tools, "nextCursor": "more"})
        };
        let mut names = Vec::new();
        assert_eq!(add_tools(&mut names, &page(600)), Some(json!("more")));
        assert_eq!(add_tools(&mut names, &page(600)), None);
        assert_eq!(names.len(), MAX_TOOLS);
        let mut names = Vec::new();
        assert_eq!(
            add_tools(&mut names, &json!({"tools": [{"name": 1}, {"name": "a"}, "b"], "nextCursor": null})),
            None
        );
        assert_eq!(names, ["a"]);
    }
}
