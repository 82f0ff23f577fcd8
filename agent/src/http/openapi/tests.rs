use std::path::Path;

use dtma_api::exec::ExecTimeout;
use dtma_api::host::NotReady;

use super::DESCRIPTION;
use super::document::Document;

fn generate() -> String {
    let document = super::super::table(Document::new()).with::<NotReady>().with::<ExecTimeout>().finish();
    let mut text = serde_json::to_string_pretty(&document).unwrap();
    text.push('\n');
    text
}

#[test]
fn the_committed_description_is_what_the_code_says() {
    let generated = generate();
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.json");
        std::fs::write(path, generated).unwrap();
        return;
    }
    let differs = DESCRIPTION.lines().zip(generated.lines()).position(|(committed, made)| committed != made);
    assert!(
        DESCRIPTION == generated,
        "agent/openapi.json is not what the code says, from line {} on; write it anew with\n    \
         UPDATE_OPENAPI=1 cargo test -p dtma-agent --lib openapi\nand look at what changed for callers",
        differs.map_or_else(|| DESCRIPTION.lines().count(), |line| line + 1),
    );
}

mod patterns {
    //! What the description says of a text, against what the agent takes.

    use std::collections::BTreeMap;
    use std::sync::{LazyLock, Mutex};

    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::instance::{ImageReference, Policy, validate};

    /// The validators, made once: the description is long.
    fn described(pointer: &'static str, text: &str) -> bool {
        type Validators = BTreeMap<&'static str, jsonschema::Validator>;
        static VALIDATORS: LazyLock<Mutex<(Value, Validators)>> =
            LazyLock::new(|| Mutex::new((serde_json::from_str(DESCRIPTION).unwrap(), Validators::new())));
        let (description, validators) = &mut *VALIDATORS.lock().unwrap();
        let validator = validators.entry(pointer).or_insert_with(|| {
            let schema = description.pointer(&format!("/components/schemas/{pointer}")).unwrap();
            jsonschema::draft202012::new(schema).unwrap()
        });
        validator.is_valid(&text.into())
    }

    /// Whether the agent takes a deploy with this at its place.
    fn taken(more: Value) -> bool {
        let mut body = serde_json::json!({
            "dockerImageUrl": "a", "instanceNameOnToolbox": "one", "accountToolInstanceId": "1", "mcpTransportType": "http",
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        validate(&body, &Policy::default()).is_ok()
    }

    /// Texts that are nearly what is asked for.
    fn near() -> impl Strategy<Value = String> {
        let part = prop::sample::select(vec![
            "a",
            "Z",
            "0",
            "9",
            "-",
            "_",
            ".",
            "/",
            ":",
            "@",
            "%",
            " ",
            "=",
            "+",
            ",",
            "ä",
            "\n",
            "localhost",
            ":5000",
            "/mcp",
            "/proc",
            "..",
            "@sha256:",
            "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        ]);
        prop_oneof![prop::collection::vec(part, 0..8).prop_map(|parts| parts.concat()), ".{0,20}"]
    }

    proptest! {
        #[test]
        fn what_is_described_is_what_is_taken(text in near()) {
            let names = [
                ("InstanceName", text.parse::<dtma_api::InstanceName>().is_ok()),
                ("AccountToolInstanceId", text.parse::<dtma_api::AccountToolInstanceId>().is_ok()),
                ("GroupId", text.parse::<dtma_api::GroupId>().is_ok()),
                ("DeployRequest/properties/dockerImageUrl", text.parse::<ImageReference>().is_ok()),
                ("DeployRequest/properties/mcpEndpointPath", taken(serde_json::json!({ "mcpEndpointPath": text }))),
                (
                    "VolumeRequest/properties/name",
                    taken(serde_json::json!({ "volumes": [{ "name": text, "path": "/data" }] })),
                ),
            ];
            for (pointer, takes) in names {
                prop_assert_eq!(described(pointer, &text), takes, "{}: {:?}", pointer, text);
            }
        }
    }
}
