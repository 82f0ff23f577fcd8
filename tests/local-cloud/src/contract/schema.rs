//! From OpenAPI 3.0's dialect of schemas to JSON Schema, with every reference replaced by what it leads to.

use serde_json::{Map, Value, json};

/// A reference that leads nowhere, or round in circles.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} leads nowhere, or in circles")]
pub struct Unresolved(pub String);

/// Deeper than any schema that doesn't contain itself.
const DEPTH_MAX: usize = 64;

/// What a `$ref` leads to, or the value itself.
pub(super) fn target<'a>(value: &'a Value, document: &'a Value) -> Result<&'a Value, Unresolved> {
    let mut value = value;
    for _ in 0..DEPTH_MAX {
        let Some(reference) = value.get("$ref").and_then(Value::as_str) else { return Ok(value) };
        let pointer = reference.strip_prefix('#').unwrap_or_default();
        value = document.pointer(pointer).ok_or_else(|| Unresolved(reference.to_owned()))?;
    }
    Err(Unresolved(value.to_string()))
}

/// `schema` as JSON Schema that stands by itself.
pub(super) fn standalone(schema: &Value, document: &Value) -> Result<Value, Unresolved> {
    convert(schema, document, 0)
}

fn convert(schema: &Value, document: &Value, depth: usize) -> Result<Value, Unresolved> {
    if depth > DEPTH_MAX {
        return Err(Unresolved(schema.to_string()));
    }
    // Beside a `$ref` OpenAPI 3.0 ignores everything.
    let Value::Object(keywords) = target(schema, document)? else { return Ok(json!({})) };
    let below = |schema: &Value| convert(schema, document, depth + 1);
    if let Some(choice) = keywords.get("discriminator") {
        return chosen(choice, below);
    }
    let mut converted = Map::new();
    for (keyword, value) in keywords {
        let value = match (keyword.as_str(), value) {
            ("properties", Value::Object(properties)) => {
                let pairs = properties.iter().map(|(name, schema)| Ok((name.clone(), below(schema)?)));
                Value::Object(pairs.collect::<Result<_, Unresolved>>()?)
            }
            ("allOf" | "anyOf" | "oneOf", Value::Array(schemas)) => {
                Value::Array(schemas.iter().map(below).collect::<Result<_, _>>()?)
            }
            ("items" | "not", schema) => below(schema)?,
            ("additionalProperties", schema @ Value::Object(_)) => below(schema)?,
            ("exclusiveMinimum" | "exclusiveMaximum", Value::Bool(_)) => continue,
            (
                "type"
                | "enum"
                | "required"
                | "pattern"
                | "format"
                | "minimum"
                | "maximum"
                | "minLength"
                | "maxLength"
                | "minItems"
                | "maxItems"
                | "uniqueItems"
                | "multipleOf"
                | "additionalProperties"
                | "unevaluatedProperties",
                value,
            ) => value.clone(),
            // Words for people and hints for generators.
            _ => continue,
        };
        converted.insert(keyword.clone(), value);
    }
    for (flag, bound) in [("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")] {
        if keywords.get(flag) == Some(&Value::Bool(true))
            && let Some(value) = converted.remove(bound)
        {
            converted.insert(flag.to_owned(), value);
        }
    }
    let converted = Value::Object(converted);
    let nullable = keywords.get("nullable") == Some(&Value::Bool(true));
    Ok(if nullable { json!({ "anyOf": [converted, { "type": "null" }] }) } else { converted })
}

/// A choice among schemas by the value of one property: `oneOf` beside it would often fit more than one of them.
fn chosen(choice: &Value, below: impl Fn(&Value) -> Result<Value, Unresolved>) -> Result<Value, Unresolved> {
    let property = choice.get("propertyName").and_then(Value::as_str).unwrap_or_default();
    let mapping = choice.get("mapping").and_then(Value::as_object);
    let mut cases = Vec::new();
    for (value, reference) in mapping.into_iter().flatten() {
        let schema = below(&json!({ "$ref": reference }))?;
        cases.push(json!({ "if": { "properties": { property: { "const": value } } }, "then": schema }));
    }
    let values: Vec<_> = mapping.into_iter().flat_map(Map::keys).collect();
    Ok(json!({ "required": [property], "properties": { property: { "enum": values } }, "allOf": cases }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_replaced_and_openapis_own_words_translated() {
        let document = json!({"components": {"schemas": {
            "age": {"type": "integer", "minimum": 0, "exclusiveMinimum": true, "nullable": true, "example": 3},
        }}});
        let schema = json!({"type": "object", "description": "A person", "properties": {
            "age": {"$ref": "#/components/schemas/age", "description": "ignored"},
            "nullable": {"type": "boolean", "default": false},
        }});
        assert_eq!(
            standalone(&schema, &document).unwrap(),
            json!({"type": "object", "properties": {
                "age": {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "null"}]},
                "nullable": {"type": "boolean"},
            }})
        );
    }

    #[test]
    fn a_discriminator_chooses_the_one_schema_that_holds() {
        let document = json!({
            "plain": {"type": "object", "properties": {"type": {"type": "string"}}},
            "named": {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["name"]},
        });
        let schema = json!({
            "oneOf": [{"$ref": "#/plain"}, {"$ref": "#/named"}],
            "discriminator": {"propertyName": "type", "mapping": {"on": "#/plain", "snapshot": "#/named"}},
        });
        let validator = jsonschema::validator_for(&standalone(&schema, &document).unwrap()).unwrap();
        assert!(validator.is_valid(&json!({"type": "on"})), "although it fits both");
        assert!(validator.is_valid(&json!({"type": "snapshot", "name": "a"})));
        for wrong in [json!({"type": "snapshot"}), json!({"type": "unheard-of"}), json!({})] {
            assert!(!validator.is_valid(&wrong), "{wrong}");
        }
    }

    #[test]
    fn a_reference_to_nothing_or_to_itself_is_an_error() {
        let document = json!({"loop": {"type": "array", "items": {"$ref": "#/loop"}}});
        assert_eq!(standalone(&json!({"$ref": "#/none"}), &document), Err(Unresolved("#/none".into())));
        assert!(standalone(&json!({"$ref": "#/loop"}), &document).is_err());
    }
}
