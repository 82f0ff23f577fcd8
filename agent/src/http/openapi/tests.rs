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
