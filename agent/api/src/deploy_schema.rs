//! What the agent takes in a deploy's fields beyond what their types say, in JSON Schema. The agent is more lenient than the types in
//! [`crate::instance`], which are what callers should send.

use schemars::{Schema, SchemaGenerator, json_schema};

/// `dockerImageUrl`: `[registry[:port]/]path[:tag][@sha256:digest]`.
pub(crate) const IMAGE: &str = "^((localhost|[A-Za-z0-9][A-Za-z0-9-]*\\.[A-Za-z0-9.-]*)(:[0-9]{1,5})?/|[A-Za-z0-9][A-Za-z0-9-]*:[0-9]{1,5}/)?\
     [a-z0-9]([a-z0-9._-]*[a-z0-9])?(/[a-z0-9]([a-z0-9._-]*[a-z0-9])?)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$";

/// `mcpEndpointPath`.
pub(crate) const ENDPOINT_PATH: &str = "^/[A-Za-z0-9._~/:@!$&'()*+,;=%-]*$";

/// `environmentVariables`: the names are checked, and numbers and switches taken for texts.
pub(crate) fn environment_variables(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["object", "null"],
        "propertyNames": { "pattern": "^[A-Za-z_][A-Za-z0-9_.-]*$" },
        "additionalProperties": { "type": ["string", "number", "boolean"] },
    })
}

/// `secrets`: what a name has to be, and a value.
pub(crate) fn secrets(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["object", "null"],
        "maxProperties": 128,
        "propertyNames": { "pattern": "^(?!_dtma)[A-Za-z_][A-Za-z0-9_]{0,127}$" },
        "additionalProperties": { "type": "string", "minLength": 1, "maxLength": 65536, "writeOnly": true },
    })
}

/// `requiredOAuthProviders`.
pub(crate) fn providers(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["array", "null"],
        "maxItems": 128,
        "items": { "type": "string", "pattern": "^[a-z][a-z0-9_-]{0,63}$" },
    })
}

/// `resourceLimits.memory`.
pub(crate) fn memory(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "anyOf": [
            { "type": "integer", "minimum": 6_291_456, "maximum": i64::MAX },
            { "type": "string", "pattern": "^ *[0-9]+[kmgKMG]?[bB]? *$" },
            { "type": "null" },
        ],
        "examples": ["256m", 268_435_456],
    })
}

/// `resourceLimits.cpu`.
pub(crate) fn cpu(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "anyOf": [
            { "type": "number", "minimum": 0.01, "maximum": 1000 },
            { "type": "string", "pattern": "^[0-9.]+$" },
            { "type": "null" },
        ],
        "examples": [0.5],
    })
}

/// `volumes`.
pub(crate) fn volumes(generator: &mut SchemaGenerator) -> Schema {
    let volume = generator.subschema_for::<crate::instance::VolumeRequest>();
    json_schema!({ "type": ["array", "null"], "items": volume })
}

/// `baseConfigOverrideJson`. Of values only what they mean is said: whatever spells out that nothing is asked (`null`, `false`, `0`, an empty
/// text, list or object) is taken as if it weren't there.
pub(crate) fn base_config(_: &mut SchemaGenerator) -> Schema {
    let says = |what: &str| json_schema!({ "description": what });
    json_schema!({
        "type": ["object", "null"],
        "properties": {
            "Env": says("A list of `NAME=value`."),
            "Cmd": says("A text or a list of texts; replaces the image's command."),
            "Entrypoint": says("A text or a list of texts; replaces the image's entry point."),
            "WorkingDir": says("An absolute path."),
            "User": says("`user` or `user:group`, names or numbers."),
            "Labels": says("Texts by name; names in `dtma.`, `com.docker.`, `io.docker.` and `org.dockerproject.` are reserved."),
            "HostConfig": {
                "type": ["object", "null"],
                "properties": {
                    "PortBindings": says("`{\"8080/tcp\": [{\"HostPort\": \"8081\"}]}`; an empty `HostPort` is any that is free. Nothing needs publishing: `mcp_url` is the way in."),
                    "Memory": says("Bytes, or a text as in `\"256m\"`; at least 6 MiB."),
                    "NanoCpus": says("Billionths of a core, at least 10000000."),
                    "PidsLimit": says("Processes and threads, 8 to 32768."),
                    "RestartPolicy": says("`{\"Name\": \"unless-stopped\" | \"on-failure\" | \"no\", \"MaximumRetryCount\": 3}`."),
                    "CapAdd": says("Capabilities to give back, of those Docker gives by default; every other is forbidden."),
                    "ReadonlyRootfs": says("`true`: the root file system can't be written."),
                    "Tmpfs": says("`{\"/tmp\": \"size=64m\"}`: paths held in memory."),
                    "ShmSize": says("Bytes of `/dev/shm`, or a text as in `\"64m\"`."),
                },
            },
        },
    })
}
