//! The old agent's faults are listed in ARCHITECTURE.md with the tests that hold them off; a test that goes takes the promise with it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const HEADING: &str = "## The old agent's faults";

/// The `file::test` references of each row of the table.
fn rows(document: &str) -> Vec<Vec<(&str, &str)>> {
    let section = document.split(HEADING).nth(1).unwrap_or_default();
    let section = section.split("\n## ").next().unwrap_or_default();
    let cells = section.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| What was wrong"));
    cells.map(|line| line.split('`').skip(1).step_by(2).filter_map(|code| code.split_once("::")).collect()).collect()
}

#[test]
fn each_fault_of_the_old_agent_is_held_off_by_a_test_that_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let document = fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let rows = rows(&document);
    assert!(rows.len() >= 9, "the table has gone: {rows:?}");
    let mut missing = BTreeSet::new();
    for row in &rows {
        assert!(!row.is_empty(), "a fault without a test");
        for (file, test) in row {
            let text = fs::read_to_string(root.join(file)).unwrap_or_default();
            let declared = text.find(&format!("fn {test}()")).map(|at| &text[..at]);
            // The attribute stands right above.
            let is_test = declared.is_some_and(|before| {
                before
                    .trim_end_matches("async ")
                    .trim_end()
                    .rsplit('\n')
                    .take(3)
                    .any(|line| line.contains("#[test]") || line.contains("#[tokio::test"))
            });
            if !is_test {
                missing.insert(format!("{file}::{test}"));
            }
        }
    }
    assert!(missing.is_empty(), "no such tests: {missing:?}");
}

#[test]
fn the_table_is_read_row_by_row() {
    let document = "x\n## The old agent's faults\n\n| What was wrong | What shows |\n|---|---|\n| a | `f.rs::one`, `g.rs::two` |\n\n## Next\n| b | `h.rs::three` |\n";
    assert_eq!(rows(document), [vec![("f.rs", "one"), ("g.rs", "two")]]);
}
