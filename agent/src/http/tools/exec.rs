//! `POST /tools/{ref}/exec`: one command inside an instance's container, and nowhere else.

#[cfg(any(test, fuzzing))]
pub(in crate::http) mod fuzzed;

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use bytes::Bytes;
use dtma_api::exec::{ExecAnswer, ExecTimeout};
use dtma_api::failure::Fault;
use serde_json::Value;

use super::super::error::ApiError;
use super::failures::not_inside;
use super::params::Named;
use super::{invalid, json};
use crate::engine::{Exec, ExecEnd, Kept};
use crate::reconcile::Instances;

/// Largest body of a command.
pub(super) const MAX_BODY: usize = 256 * 1024;
/// Most texts of one command.
const MAX_ARGUMENTS: usize = 256;
/// Most bytes of one command.
const MAX_COMMAND: usize = 64 * 1024;
/// How long a command may take unless the caller says otherwise, seconds.
const DEFAULT_TIMEOUT: u64 = 30;
/// The longest it may: edge functions are ended after about 150 s without a byte.
const MAX_TIMEOUT: u64 = 120;
/// How much of each output is kept.
const KEEP: usize = 1024 * 1024;

pub(super) async fn exec(
    State(instances): State<Instances>,
    Named(name): Named,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<ExecAnswer>, ApiError> {
    let Asked { command, timeout_seconds } = Asked::read(&json(body)?).map_err(invalid)?;
    tracing::info!(instance = %name, program = command.first(), timeout_seconds, "running a command in a container");
    let exec = Exec { command, patience: Duration::from_secs(timeout_seconds), keep: KEEP };
    let executed = instances
        .exec(&name, exec)
        .await
        .map_err(|failure| not_inside(failure, "run the command in the instance's container"))?;
    let dropped = executed.stdout.dropped.saturating_add(executed.stderr.dropped);
    let truncated = dropped > 0;
    let (stdout, stderr) = (text(executed.stdout), text(executed.stderr));
    match executed.end {
        ExecEnd::Exited { code } => Ok(Json(ExecAnswer {
            success: true,
            exit_code: code,
            stdout,
            stderr,
            truncated,
            dropped_bytes: Some(dropped).filter(|_| truncated),
        })),
        ExecEnd::TimedOut { killed } => {
            let became = if killed {
                "it was killed, its children too".to_owned()
            } else {
                format!(
                    "it may still run inside the container: Docker has no call to end it, and there is no shell in the \
                     container to do so; POST /tools/{name}/restart ends it together with the server"
                )
            };
            let error = format!("the command did not end within {timeout_seconds} s; {became}");
            let details = ExecTimeout { timeout_seconds, stdout, stderr, truncated, killed };
            // Numbers and texts always serialise.
            let details = serde_json::to_value(details).unwrap_or(Value::Null);
            Err(ApiError::new(StatusCode::GATEWAY_TIMEOUT, "exec_timeout", error).with_details(details))
        }
    }
}

fn text(kept: Kept) -> String {
    // Without a copy where it is UTF-8 already.
    String::from_utf8(kept.bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

#[derive(Debug, PartialEq, Eq)]
struct Asked {
    command: Vec<String>,
    timeout_seconds: u64,
}

impl Asked {
    fn read(body: &Value) -> Result<Self, Vec<Fault>> {
        let mut faults = Vec::new();
        let mut fault = |path: &str, problem: &str| {
            faults.push(Fault { path: path.to_owned(), problem: problem.to_owned() });
        };
        let Some(object) = body.as_object() else {
            fault("$", "must be a JSON object");
            return Err(faults);
        };
        let command: Option<Vec<String>> = object.get("command").and_then(Value::as_array).and_then(|texts| {
            texts.iter().map(|text| text.as_str().filter(|text| !text.contains('\0')).map(str::to_owned)).collect()
        });
        let command = command.unwrap_or_default();
        if command.first().is_none_or(String::is_empty) {
            let problem = r#"must be a list of texts without NUL, the program first: ["/bin/sh", "-c", "…"]"#;
            fault("$.command", problem);
        } else if command.len() > MAX_ARGUMENTS || command.iter().map(String::len).sum::<usize>() > MAX_COMMAND {
            fault("$.command", "must be at most 256 texts and 64 KiB");
        }
        let timeout_seconds = match object.get("timeout_seconds") {
            None | Some(Value::Null) => DEFAULT_TIMEOUT,
            Some(value) => value.as_u64().filter(|seconds| (1..=MAX_TIMEOUT).contains(seconds)).unwrap_or_else(|| {
                fault("$.timeout_seconds", "must be whole seconds, 1 to 120");
                DEFAULT_TIMEOUT
            }),
        };
        // Refused rather than ignored: whoever asks for another user or a terminal would take the answer for one.
        for key in object.keys().filter(|key| !["command", "timeout_seconds"].contains(&key.as_str())) {
            fault(&format!("$.{key}"), "is not known here: a command has command and timeout_seconds");
        }
        if faults.is_empty() { Ok(Self { command, timeout_seconds }) } else { Err(faults) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_command_is_read_and_everything_wrong_with_one_is_named() {
        let asked = Asked::read(&json!({ "command": ["ls", ""] })).unwrap();
        assert_eq!(asked, Asked { command: vec!["ls".into(), String::new()], timeout_seconds: 30 });
        assert_eq!(Asked::read(&json!({ "command": ["ls"], "timeout_seconds": 120 })).unwrap().timeout_seconds, 120);
        let paths = |body: Value| {
            let faults = Asked::read(&body).unwrap_err();
            faults.into_iter().map(|fault| fault.path).collect::<Vec<_>>()
        };
        for command in [json!(null), json!([]), json!([""]), json!("ls"), json!(["ls", 1]), json!(["l\0s"])] {
            assert_eq!(paths(json!({ "command": command })), ["$.command"], "{command}");
        }
        assert_eq!(paths(json!({ "command": vec!["x"; 257] })), ["$.command"]);
        assert_eq!(paths(json!({ "command": ["x".repeat(65_537)] })), ["$.command"]);
        for timeout in [json!(0), json!(121), json!(-1), json!(1.5), json!("30")] {
            assert_eq!(paths(json!({ "command": ["ls"], "timeout_seconds": timeout })), ["$.timeout_seconds"]);
        }
        assert_eq!(paths(json!({ "privileged": true, "timeout_seconds": 0 })).len(), 3);
        assert_eq!(paths(json!([])), ["$"]);
    }
}
