//! Reads the working tree far enough for the rules: files, code without comments, strings and tests, and the paths named in it.

use std::fs;
use std::path::Path;

/// One text file of the working tree.
pub(crate) struct Source {
    /// Relative to the root, `/` between folders.
    pub(crate) path: String,
    /// As it is.
    pub(crate) text: String,
    /// Rust only: the same lines with comments, the insides of strings and `#[cfg(test)]` items blanked out.
    pub(crate) code: String,
    /// Rust only: the same lines with nothing but comments left.
    pub(crate) comments: String,
}

/// A path named in code, in a `use` or in passing: `std::fs::read`, `crate::engine::docker`.
pub(crate) struct Named {
    /// 1-based.
    pub(crate) line: usize,
    /// With `self` and `super` resolved to `crate::…`.
    pub(crate) path: String,
}

impl Source {
    pub(crate) fn new(path: &str, text: &str) -> Self {
        let (code, comments) = if path.ends_with(".rs") { split(text) } else { (String::new(), String::new()) };
        Self { path: path.to_owned(), text: text.to_owned(), code: without_tests(&code), comments }
    }

    /// Every text file below `root`, except what git ignores and git's own.
    pub(crate) fn read_tree(root: &Path) -> Vec<Self> {
        let mut sources = Vec::new();
        let mut folders = vec![root.to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let relative = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                if path.is_dir() {
                    if !["target", ".git"].contains(&relative.as_str()) && !relative.ends_with("__pycache__") {
                        folders.push(path);
                    }
                } else if let Ok(text) = fs::read_to_string(&path) {
                    sources.push(Self::new(&relative, &text));
                }
            }
        }
        sources.sort_by(|a, b| a.path.cmp(&b.path));
        assert!(sources.len() > 20, "the working tree was not found");
        sources
    }

    pub(crate) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whether the file lies in that folder, or is the module of that name.
    pub(crate) fn is_in(&self, module: &str) -> bool {
        self.path.strip_prefix(module).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
    }

    /// A module that exists for tests only.
    pub(crate) fn is_test(&self) -> bool {
        self.path.ends_with("/tests.rs") || self.path.contains("/tests/")
    }

    /// `agent/src/http/tools.rs` is `crate::http::tools`.
    pub(crate) fn module(&self) -> String {
        let inside = self.path.split_once("src/").map_or("", |(_, inside)| inside);
        let inside = inside.trim_end_matches(".rs").trim_end_matches("/mod");
        match inside {
            "lib" | "main" | "" => "crate".to_owned(),
            _ => format!("crate::{}", inside.replace('/', "::")),
        }
    }

    /// Every path in the code, those of nested `use` trees in full.
    pub(crate) fn names(&self) -> Vec<Named> {
        let tokens = tokens(&self.code);
        let module = self.module();
        let mut named = Vec::new();
        let mut at = 0;
        while at < tokens.len() {
            if tokens[at].text == "use" {
                at = use_tree(&tokens, at + 1, "", &mut named);
            } else if tokens[at].is_word() {
                let line = tokens[at].line;
                let mut path = tokens[at].text.to_owned();
                while at + 2 < tokens.len() && tokens[at + 1].text == "::" && tokens[at + 2].is_word() {
                    path = format!("{path}::{}", tokens[at + 2].text);
                    at += 2;
                }
                named.push(Named { line, path });
                at += 1;
            } else {
                at += 1;
            }
        }
        for name in &mut named {
            name.path = resolved(&name.path, &module);
        }
        named
    }
}

fn resolved(path: &str, module: &str) -> String {
    let (mut rest, mut base) = (path, module.to_owned());
    if let Some(inside) = rest.strip_prefix("self::") {
        return format!("{base}::{inside}");
    }
    let mut relative = false;
    while let Some(inside) = rest.strip_prefix("super::") {
        base = base.rsplit_once("::").map_or_else(|| base.clone(), |(parent, _)| parent.to_owned());
        rest = inside;
        relative = true;
    }
    if relative { format!("{base}::{rest}") } else { path.to_owned() }
}

/// Adds every path of the tree that begins at `at`; answers where it ends.
fn use_tree(tokens: &[Token<'_>], mut at: usize, prefix: &str, named: &mut Vec<Named>) -> usize {
    let mut path = prefix.to_owned();
    let mut line = tokens.get(at).map_or(0, |token| token.line);
    while let Some(token) = tokens.get(at) {
        match token.text {
            "::" => {}
            "{" => {
                at += 1;
                while tokens.get(at).is_some_and(|token| token.text != "}") {
                    at = use_tree(tokens, at, &path, named);
                    if tokens.get(at).is_some_and(|token| token.text == ",") {
                        at += 1;
                    }
                }
                return at + 1;
            }
            "as" => at += 1, // the new name says nothing
            ";" | "," | "}" => {
                named.push(Named { line, path });
                return at;
            }
            "*" => {}
            word => {
                line = token.line;
                path = if path.is_empty() { word.to_owned() } else { format!("{path}::{word}") };
            }
        }
        at += 1;
    }
    at
}

struct Token<'a> {
    text: &'a str,
    line: usize,
}

impl Token<'_> {
    fn is_word(&self) -> bool {
        self.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
    }
}

fn tokens(code: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    for (number, mut rest) in code.lines().enumerate() {
        while let Some(first) = rest.chars().next() {
            let length = if first.is_alphanumeric() || first == '_' {
                rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            let (text, after) = rest.split_at(length);
            if !first.is_whitespace() {
                tokens.push(Token { text, line: number + 1 });
            }
            rest = after;
        }
    }
    tokens
}

/// The code without comments and string contents, and the comments without code; line numbers stay.
fn split(text: &str) -> (String, String) {
    #[derive(Clone, Copy, PartialEq)]
    enum In {
        Code,
        LineComment,
        BlockComment(usize),
        Str,
        RawStr(usize),
    }
    let chars: Vec<char> = text.chars().collect();
    let (mut code, mut comments) = (String::new(), String::new());
    let (mut state, mut at) = (In::Code, 0);
    let next_is = |at: usize, what: &str| what.chars().enumerate().all(|(i, c)| chars.get(at + i) == Some(&c));
    while let Some(&c) = chars.get(at) {
        let mut taken = 1;
        match state {
            In::Code if next_is(at, "//") => state = In::LineComment,
            In::Code if next_is(at, "/*") => (state, taken) = (In::BlockComment(1), 2),
            In::Code if c == '"' => state = In::Str,
            In::Code if c == 'r' && (at == 0 || !chars[at - 1].is_alphanumeric()) => {
                let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
                if chars.get(at + 1 + hashes) == Some(&'"') {
                    (state, taken) = (In::RawStr(hashes), hashes + 2);
                } else {
                    code.push(c);
                    comments.push(' ');
                    at += 1;
                    continue;
                }
            }
            // A character, not a lifetime.
            In::Code if c == '\'' && next_is(at + 1, "\\") => {
                taken = 3 + chars[at + 3..].iter().take_while(|c| **c != '\'').count() + 1;
            }
            In::Code if c == '\'' && chars.get(at + 2) == Some(&'\'') => taken = 3,
            In::LineComment if c == '\n' => state = In::Code,
            In::BlockComment(depth) if next_is(at, "/*") => (state, taken) = (In::BlockComment(depth + 1), 2),
            In::BlockComment(1) if next_is(at, "*/") => (state, taken) = (In::Code, 2),
            In::BlockComment(depth) if next_is(at, "*/") => (state, taken) = (In::BlockComment(depth - 1), 2),
            In::Str if c == '\\' => taken = 2,
            In::Str if c == '"' => state = In::Code,
            In::RawStr(hashes) if next_is(at, &format!("\"{}", "#".repeat(hashes))) => {
                (state, taken) = (In::Code, 1 + hashes);
            }
            In::Code => {
                code.push(c);
                comments.push(if c == '\n' { c } else { ' ' });
                at += 1;
                continue;
            }
            _ => {}
        }
        let in_comment = matches!(state, In::LineComment | In::BlockComment(_));
        for offset in 0..taken {
            let Some(&c) = chars.get(at + offset) else { break };
            code.push(if c == '\n' { c } else { ' ' });
            comments.push(if in_comment || c == '\n' { c } else { ' ' });
        }
        at += taken;
    }
    (code, comments)
}

/// Blanks out every item under `#[cfg(test)]`.
fn without_tests(code: &str) -> String {
    let mut left = String::with_capacity(code.len());
    let mut rest = code;
    while let Some((before, after)) = rest.split_once("#[cfg(test)]") {
        left.push_str(before);
        let mut depth = 0_usize;
        let end = after
            .char_indices()
            .find(|(_, c)| {
                match c {
                    '{' => depth += 1,
                    '}' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                depth == 0 && matches!(c, '}' | ';')
            })
            .map_or(after.len(), |(end, c)| end + c.len_utf8());
        left.extend(after[..end].chars().filter(|c| *c == '\n'));
        rest = &after[end..];
    }
    left.push_str(rest);
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<(usize, String)> {
        let source = Source::new("agent/src/http/tools.rs", text);
        source.names().into_iter().filter(|named| named.path.contains("::")).map(|n| (n.line, n.path)).collect()
    }

    #[test]
    fn nested_imports_are_spelled_out_with_the_line_each_stands_on() {
        let found = names(
            "use std::{\n    fs,\n    net::{TcpStream, IpAddr as Ip},\n};\nuse tokio::fs as files;\npub use a::*;\n",
        );
        let expected =
            [(2, "std::fs"), (3, "std::net::TcpStream"), (3, "std::net::IpAddr"), (5, "tokio::fs"), (6, "a")];
        let found: Vec<(usize, &str)> = found.iter().map(|(line, path)| (*line, path.as_str())).collect();
        assert_eq!(found, &expected[..4], "a path of one word is none");
    }

    #[test]
    fn paths_named_in_passing_are_seen_and_relative_ones_resolved() {
        let found = names("fn f() -> super::super::engine::docker::X { tokio::fs::read(self::y::Z) }");
        let found: Vec<&str> = found.iter().map(|(_, path)| path.as_str()).collect();
        assert_eq!(found, ["crate::engine::docker::X", "tokio::fs::read", "crate::http::tools::y::Z"]);
    }

    #[test]
    fn comments_strings_and_tests_are_not_code() {
        let text = "// std::fs::a\n/* std::fs::b /* nested */ */\nlet x = \"std::fs::c \\\" std::fs::d\";\n\
                    let y = r#\"std::fs::e \" \"#; let c = '\"'; let l: &'static str = '\\''; real::f();\n\
                    #[cfg(test)]\nmod tests { fn f() { std::fs::g(); } }\n\
                    #[cfg(test)]\nmod more;\nlast::h();\n";
        assert_eq!(names(text), [(4, "real::f".to_owned()), (9, "last::h".to_owned())]);
        let source = Source::new("a.rs", text);
        assert!(source.comments.contains("std::fs::a") && source.comments.contains("std::fs::b"));
        assert!(!source.comments.contains("std::fs::c"));
    }
}
