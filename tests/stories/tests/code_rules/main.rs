//! The rules of ARCHITECTURE.md that a compiler doesn't check, read off the sources: who may import whom, where I/O may happen,
//! what may lie where. Every rule names file, line and reason, and is shown to fail on a snippet that breaks it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod predecessor;
mod source;

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use source::{Named, Source};

/// A broken rule.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Breach {
    file: String,
    line: usize,
    reason: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.reason)
    }
}

type Rule = fn(&[Source]) -> Vec<Breach>;

/// Modules that own meaning, and the diffs made from it: no I/O, no clock, no dice.
const PURE: [&str; 5] = [
    "agent/src/instance",
    "agent/src/reconcile/plan",
    "provisioner/src/environment",
    "provisioner/src/reconcile/plan",
    "provisioner/src/rollout",
];

/// What reaches outside, reads the clock or rolls dice.
const IMPURE: [&str; 26] = [
    "axum",
    "bollard",
    "getrandom",
    "hyper",
    "jiff::Timestamp::now",
    "jiff::Zoned::now",
    "rand",
    "reqwest",
    "sqlx",
    "std::env",
    "std::fs",
    "std::net::TcpListener",
    "std::net::TcpStream",
    "std::net::UdpSocket",
    "std::process",
    "std::thread",
    "std::time::Instant::now",
    "std::time::SystemTime::now",
    "sysinfo",
    "tokio::fs",
    "tokio::net",
    "tokio::process",
    "tokio::spawn",
    "tokio::time",
    "Timestamp::now",
    "Token::generate",
];
const IMPURE_CALLS: [&str; 7] = [
    "Instant::now",
    "SystemTime::now",
    "Timestamp::now",
    "Zoned::now",
    "Uuid::new_v4",
    "Uuid::now_v7",
    "Token::generate",
];

/// A crate for one kind of I/O, and the only modules that may name it. A seam's own module (`store.rs`, `store/mod.rs`) may not.
const ADAPTERS: [(&str, &str, &[&str]); 3] = [
    ("bollard", "agent/", &["agent/src/engine/"]),
    ("sqlx", "provisioner/", &["provisioner/src/store/"]),
    ("reqwest", "provisioner/", &["provisioner/src/cloud/", "provisioner/src/owners/", "provisioner/src/operator/"]),
];

/// A failure carried as a source and a parsed address talk to nobody.
const MERE_VALUES: [&str; 2] = ["reqwest::Error", "reqwest::Url"];

const TOP_LEVEL: [&str; 14] = [
    ".cargo",
    ".ci",
    ".git",
    ".gitignore",
    "ARCHITECTURE.md",
    "Cargo.lock",
    "Cargo.toml",
    "README.md",
    "agent",
    "cloud-init",
    "clippy.toml",
    "packaging",
    "provisioner",
    "rustfmt.toml",
];

const MEMBERS: [&str; 7] = ["dtma-agent", "dtma-api", "dtma-provisioner", "local-cloud", "stack", "stories", "xtask"];

const MOST_LINES: usize = 600;

fn breach(source: &Source, line: usize, reason: impl Into<String>) -> Breach {
    Breach { file: source.path.clone(), line, reason: reason.into() }
}

fn is_or_is_below(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// The paths that a file's code names, where it is code of one of our two programs or their wire types.
fn product_code(sources: &[Source]) -> impl Iterator<Item = (&Source, Vec<Named>)> {
    sources
        .iter()
        .filter(|source| {
            source.is_rust() && (source.path.starts_with("agent/") || source.path.starts_with("provisioner/"))
        })
        .filter(|source| !source.is_test())
        .map(|source| (source, source.names()))
}

fn agent_and_provisioner_do_not_know_each_other(sources: &[Source]) -> Vec<Breach> {
    let mut breaches = Vec::new();
    for source in sources.iter().filter(|source| source.is_rust() || source.path.ends_with("Cargo.toml")) {
        let stranger = match source.path.split('/').next() {
            Some("agent") => "provisioner",
            Some("provisioner") => "agent",
            _ => continue,
        };
        for (number, line) in source.text.lines().enumerate() {
            if line.contains(&format!("dtma_{stranger}::")) || line.starts_with(&format!("dtma-{stranger}")) {
                breaches.push(breach(
                    source,
                    number + 1,
                    "agent and provisioner share agent/api and agent/release and nothing else",
                ));
            }
        }
    }
    breaches
}

fn only_adapters_name_the_crate_they_adapt(sources: &[Source]) -> Vec<Breach> {
    let mut breaches = Vec::new();
    for (source, names) in product_code(sources) {
        for (krate, side, allowed) in ADAPTERS {
            let may =
                allowed.iter().any(|folder| source.path.strip_prefix(folder).is_some_and(|inside| inside != "mod.rs"));
            // The agent's seam has one adapter, called by name.
            let may = may && (krate != "bollard" || source.is_in("agent/src/engine/docker"));
            if may || !source.path.starts_with(side) {
                continue;
            }
            let named = names.iter().filter(|named| is_or_is_below(&named.path, krate));
            for named in named.filter(|named| !MERE_VALUES.iter().any(|value| is_or_is_below(&named.path, value))) {
                breaches.push(breach(
                    source,
                    named.line,
                    format!("only an adapter in {} names {krate}", allowed.join(" or ")),
                ));
            }
        }
    }
    breaches
}

fn handlers_and_loops_use_seams_not_adapters(sources: &[Source]) -> Vec<Breach> {
    // Whatever names bollard, sqlx or reqwest below a seam is an adapter.
    let adapters: BTreeSet<(&str, String)> = product_code(sources)
        .filter_map(|(source, names)| {
            let (_, side, _) = ADAPTERS.iter().find(|(krate, side, allowed)| {
                source.path.starts_with(side)
                    && allowed.iter().any(|folder| source.path.starts_with(folder) && !source.path.ends_with("/mod.rs"))
                    && names.iter().any(|named| is_or_is_below(&named.path, krate))
            })?;
            Some((*side, source.module()))
        })
        .collect();
    let mut breaches = Vec::new();
    for (source, names) in product_code(sources) {
        let Some((side, inside)) = source.path.split_once("src/") else { continue };
        if !["http/", "http.rs", "reconcile/", "reconcile.rs"].iter().any(|room| inside.starts_with(room)) {
            continue;
        }
        for named in &names {
            if adapters.iter().any(|(of, module)| *of == side && is_or_is_below(&named.path, module)) {
                breaches.push(breach(
                    source,
                    named.line,
                    format!("{} is an adapter; main hands it over behind its seam", named.path),
                ));
            }
        }
    }
    breaches
}

fn domain_and_plans_do_no_io_and_are_given_now(sources: &[Source]) -> Vec<Breach> {
    let mut breaches = Vec::new();
    for (source, names) in product_code(sources).filter(|(source, _)| PURE.iter().any(|module| source.is_in(module))) {
        for named in names {
            let path = named.path.as_str();
            let impure = IMPURE.iter().any(|what| is_or_is_below(path, what));
            if impure || IMPURE_CALLS.iter().any(|call| path.ends_with(call)) {
                breaches.push(breach(
                    source,
                    named.line,
                    format!("{path}: domain and plans do no I/O; time and chance are arguments"),
                ));
            }
        }
    }
    breaches
}

fn the_environment_is_read_in_config_only(sources: &[Source]) -> Vec<Breach> {
    let mut breaches = Vec::new();
    for (source, names) in product_code(sources) {
        if source.path.ends_with("/config.rs") || source.path.contains("/config/") {
            continue;
        }
        for named in names.iter().filter(|named| {
            ["std::env::var", "std::env::vars", "std::env::var_os", "std::env::vars_os", "env::var"]
                .contains(&named.path.as_str())
        }) {
            breaches.push(breach(source, named.line, "settings are read in config"));
        }
    }
    breaches
}

/// `[dependencies]` and the like of a Cargo.toml: line and name.
fn dependencies(manifest: &Source) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut inside = false;
    for (number, line) in manifest.text.lines().enumerate() {
        if line.starts_with('[') {
            inside = line.contains("dependencies") && !line.contains("dev-dependencies");
        } else if inside && line.starts_with(|c: char| c.is_ascii_alphabetic()) {
            let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
            found.push((number + 1, name.to_owned()));
        }
    }
    found
}

fn the_wire_types_are_a_leaf(sources: &[Source]) -> Vec<Breach> {
    let heavy = ["tokio", "axum", "reqwest", "hyper", "bollard", "sqlx", "tower"];
    let mut breaches = Vec::new();
    for source in sources.iter().filter(|source| source.path.starts_with("agent/api/")) {
        if source.path.ends_with("Cargo.toml") {
            for (line, name) in dependencies(source) {
                if MEMBERS.contains(&name.as_str()) || heavy.contains(&name.as_str()) {
                    breaches.push(breach(
                        source,
                        line,
                        format!("{name}: the wire types depend on nothing of ours and do no I/O"),
                    ));
                }
            }
        } else if source.is_rust() {
            for named in source.names() {
                if ["std::fs", "std::net::TcpStream", "std::process", "std::env"]
                    .iter()
                    .any(|what| is_or_is_below(&named.path, what))
                {
                    breaches.push(breach(source, named.line, format!("{}: the wire types do no I/O", named.path)));
                }
            }
        }
    }
    breaches
}

fn modules_are_named_for_what_they_own(sources: &[Source]) -> Vec<Breach> {
    let empty = ["util", "utils", "common", "helper", "helpers", "manager", "managers", "misc"];
    let mut breaches = Vec::new();
    for source in sources.iter().filter(|source| source.is_rust()) {
        for part in source.path.trim_end_matches(".rs").split('/') {
            if empty.contains(&part) {
                breaches.push(breach(source, 1, format!("`{part}` says nothing about what is in there")));
            }
        }
        for (number, line) in source.code.lines().enumerate() {
            let words: Vec<&str> =
                line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).collect();
            for pair in words.windows(2) {
                if pair[0] == "mod" && empty.contains(&pair[1]) {
                    breaches.push(breach(
                        source,
                        number + 1,
                        format!("`{}` says nothing about what is in there", pair[1]),
                    ));
                }
            }
        }
    }
    breaches
}

fn everything_has_its_place(sources: &[Source]) -> Vec<Breach> {
    let git_ignores = |name: &str| name == ".env" || name.contains(".sqlite");
    sources
        .iter()
        .filter(|source| {
            let first = source.path.split('/').next().unwrap_or_default();
            first != "tests" && !TOP_LEVEL.contains(&first) && !git_ignores(first)
        })
        .map(|source| breach(source, 1, "not part of the layout in ARCHITECTURE.md"))
        .collect()
}

fn no_file_outgrows_its_noun(sources: &[Source]) -> Vec<Breach> {
    let written = |path: &str| [".rs", ".sh", ".py", ".md"].iter().any(|ending| path.ends_with(ending));
    sources
        .iter()
        .filter(|source| written(&source.path) && source.text.lines().count() > MOST_LINES)
        .map(|source| breach(source, MOST_LINES + 1, "find the noun that is missing and give it a file"))
        .collect()
}

fn nothing_depends_on_where_packages_came_from(sources: &[Source]) -> Vec<Breach> {
    // In two halves, or this file would break its own rule.
    let hosts = [
        ("crates", ".io"),
        ("pypi", ".org"),
        ("pythonhosted", ".org"),
        ("npmjs", ".org"),
        ("npmjs", ".com"),
        ("deb.debian", ".org"),
        ("archive.ubuntu", ".com"),
        ("proxy.golang", ".org"),
        ("arti", "factory"),
    ];
    let mut breaches = Vec::new();
    for source in sources {
        let in_prose = |line: &str| match source.path.rsplit('.').next() {
            Some("md") => true,
            Some("toml" | "sh" | "yaml" | "yml" | "py" | "service" | "conf" | "example") => {
                line.trim_start().starts_with('#')
            }
            _ => false,
        };
        let lines: Vec<&str> = if source.is_rust() {
            source.comments.lines().collect()
        } else {
            source.text.lines().map(|line| if in_prose(line) { line } else { "" }).collect()
        };
        for (number, line) in lines.iter().enumerate() {
            for (name, ending) in hosts {
                if line.contains(&format!("{name}{ending}")) {
                    breaches.push(breach(
                        source,
                        number + 1,
                        "prose names the package, not the host it was fetched from",
                    ));
                }
            }
        }
    }
    breaches
}

fn check(rule: Rule) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let breaches: Vec<String> = rule(&Source::read_tree(root)).iter().map(ToString::to_string).collect();
    assert!(breaches.is_empty(), "\n{}\n", breaches.join("\n"));
}

/// The lines at which `rule` objects to a tree of these files.
fn objections(rule: Rule, files: &[(&str, &str)]) -> Vec<(String, usize)> {
    let sources: Vec<Source> = files.iter().map(|(path, text)| Source::new(path, text)).collect();
    rule(&sources).into_iter().map(|breach| (breach.file, breach.line)).collect()
}

macro_rules! rules {
    ($($rule:ident: refuses [$($bad:expr),+ $(,)?], accepts [$($good:expr),* $(,)?];)+) => {
        mod the_tree_keeps {
            $(#[test] fn $rule() { super::check(super::$rule); })+
        }
        mod objects_where {
            $(#[test] fn $rule() {
                $({
                    let (path, line, text): (&str, usize, &str) = $bad;
                    let adapters = [("agent/src/engine/docker.rs", "use bollard::Docker;"), ("provisioner/src/store/sqlite.rs", "use sqlx::Row;")];
                    let files: Vec<_> = adapters.into_iter().chain([(path, text)]).collect();
                    assert_eq!(super::objections(super::$rule, &files), [(path.to_owned(), line)], "{path}: {text}");
                })+
                $({
                    let (path, text): (&str, &str) = $good;
                    let files = [("agent/src/engine/docker.rs", "use bollard::Docker;"), (path, text)];
                    assert_eq!(super::objections(super::$rule, &files), [], "{path}: {text}");
                })*
            })+
        }
    };
}

rules! {
    agent_and_provisioner_do_not_know_each_other:
        refuses [
            ("agent/src/http/a.rs", 2, "\nuse dtma_provisioner::x;"),
            ("provisioner/src/main.rs", 1, "fn f() { dtma_agent::g() }"),
            ("agent/Cargo.toml", 2, "[dev-dependencies]\ndtma-provisioner.workspace = true"),
        ],
        accepts [("agent/src/a.rs", "use dtma_api::x;"), ("tests/stories/Cargo.toml", "dtma-agent.workspace = true")];
    only_adapters_name_the_crate_they_adapt:
        refuses [
            ("agent/src/reconcile/mod.rs", 1, "use bollard::Docker;"),
            ("agent/src/engine/mod.rs", 1, "pub enum E { A(bollard::errors::Error) }"),
            ("provisioner/src/http/mod.rs", 3, "use a::b;\n\nuse sqlx::Row;"),
            ("provisioner/src/store/mod.rs", 1, "use sqlx::Row;"),
            ("provisioner/src/reconcile/pass.rs", 1, "use {std::fmt, reqwest::Client};"),
        ],
        accepts [
            ("provisioner/src/cloud/digitalocean.rs", "use reqwest::Client;"),
            ("agent/src/backend/mod.rs", "use reqwest::Client;"),
            ("provisioner/src/cloud/mod.rs", "pub enum E { Unreachable(#[source] reqwest::Error) }"),
            ("agent/src/http/a.rs", "// bollard::Docker\n#[cfg(test)]\nmod tests { use bollard::Docker; }"),
            ("tests/stack/src/a.rs", "use bollard::Docker;"),
        ];
    handlers_and_loops_use_seams_not_adapters:
        refuses [
            ("agent/src/reconcile/pass.rs", 1, "use crate::engine::docker::DockerEngine;"),
            ("agent/src/http/tools.rs", 2, "\nfn f() { super::super::engine::docker::g() }"),
            ("provisioner/src/http/mod.rs", 1, "use crate::{store::{Store, sqlite::SqliteStore}};"),
        ],
        accepts [
            ("agent/src/http/tools.rs", "use crate::engine::Engine;"),
            ("agent/src/main.rs", "use crate::engine::docker::DockerEngine;"),
            ("provisioner/src/http/mod.rs", "use crate::engine::docker::X; // not this program's"),
        ];
    domain_and_plans_do_no_io_and_are_given_now:
        refuses [
            ("agent/src/instance.rs", 1, "use std::{fmt, fs};"),
            ("agent/src/instance/spec.rs", 1, "fn f() { tokio::net::TcpStream::connect(x) }"),
            ("agent/src/reconcile/plan.rs", 2, "use jiff::Timestamp;\nfn f() { Timestamp::now(); }"),
            ("provisioner/src/environment/mod.rs", 1, "fn f() { uuid::Uuid::new_v4() }"),
            ("provisioner/src/reconcile/plan/a.rs", 1, "use std::time::{Duration, Instant}; fn f() { Instant::now() }"),
        ],
        accepts [
            ("agent/src/instance/spec.rs", "use std::net::IpAddr; use std::time::Duration; fn f(now: jiff::Timestamp) {}"),
            ("agent/src/reconcile/pass.rs", "use tokio::time::sleep;"),
            ("agent/src/instance/tests.rs", "use std::fs;"),
        ];
    the_environment_is_read_in_config_only:
        refuses [("agent/src/http/a.rs", 1, "fn f() { std::env::var(x) }"), ("provisioner/src/main.rs", 1, "use std::env; fn f() { env::var(x) }")],
        accepts [("agent/src/config.rs", "fn f() { std::env::vars_os() }"), ("agent/src/a.rs", "const V: &str = env!(\"CARGO_PKG_VERSION\");")];
    the_wire_types_are_a_leaf:
        refuses [
            ("agent/api/Cargo.toml", 2, "[dependencies]\ntokio.workspace = true"),
            ("agent/api/Cargo.toml", 3, "[dependencies]\nserde = \"1\"\ndtma-agent = { path = \"..\" }"),
            ("agent/api/src/lib.rs", 1, "use std::fs::File;"),
        ],
        accepts [("agent/Cargo.toml", "[dependencies]\ntokio.workspace = true"), ("agent/api/Cargo.toml", "[dependencies]\nserde = \"1\"")];
    modules_are_named_for_what_they_own:
        refuses [
            ("agent/src/utils.rs", 1, ""),
            ("provisioner/src/common/mod.rs", 1, ""),
            ("agent/src/lib.rs", 2, "//! mod helpers;\npub(crate) mod manager;"),
        ],
        accepts [("agent/src/lib.rs", "// mod utils;\nmod commons;\nlet common = 1;")];
    everything_has_its_place:
        refuses [("notes.txt", 1, ""), ("scripts/run.sh", 1, ""), ("NOTES.md", 1, "")],
        accepts [("tests/xtask/src/main.rs", ""), ("provisioner/.env.example", ""), ("local.sqlite-wal", "")];
    no_file_outgrows_its_noun:
        refuses [("agent/src/a.rs", 601, &"x\n".repeat(601))],
        accepts [("agent/src/a.rs", &"x\n".repeat(600)), ("tests/data/api.yaml", &"x\n".repeat(6000))];
    nothing_depends_on_where_packages_came_from:
        refuses [
            ("README.md", 2, concat!("a\nfrom https://pypi", ".org/simple")),
            ("agent/src/a.rs", 1, concat!("// see static.crates", ".io")),
            ("packaging/a.sh", 1, concat!("  # http://deb.debian", ".org")),
        ],
        accepts [("README.md", "PyPI's pydo"), ("agent/src/a.rs", concat!("let x = \"crates", ".io\";"))];
}
