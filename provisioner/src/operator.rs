//! `dtma-provisioner rollout …`: steers rollouts of the running provisioner over its internal API, for a person at a terminal or a script.

pub mod client;
mod print;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use tokio::time::Instant;

use self::client::{Client, ClientError};
use crate::rollout::{RolloutView, StartRequest};

/// Between two looks at a rollout that is waited for.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Whoever waits for a rollout bears so long that nobody answers: a provisioner that is restarted goes on where it was.
const AWAY: Duration = Duration::from_secs(300);
/// A rollout that is waited for has halted or was aborted; one that is only looked at has halted.
const NOT_COMPLETED: u8 = 3;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum RolloutCommand {
    /// Bring a release to all agents, wave by wave
    Start(Start),
    /// Show the rollout under way, or the latest one. Ends with 3 when it has halted
    Status(Status),
    /// Tell agents nothing more until it is resumed
    Pause(Which),
    /// Go on; what has failed so far doesn't count any more
    Resume(Which),
    /// End it
    Abort(Which),
}

/// See [`RolloutCommand::Start`].
#[derive(Debug, Args)]
pub struct Start {
    /// The release, such as 1.2.3
    version: String,
    /// How much of the fleet has been asked once each wave has begun, in per cent
    #[arg(long, value_delimiter = ',', default_value = "1,10,50,100")]
    waves: Vec<u8>,
    /// How long each wave has to go well, such as 90s, 10m or 1h
    #[arg(long, default_value = "10m", value_parser = seconds)]
    soak: u64,
    /// So many agents may fail or fall silent
    #[arg(long, default_value_t = 0)]
    max_failures: u32,
    /// How long an agent may take
    #[arg(long, default_value = "1h", value_parser = seconds)]
    deadline: u64,
    /// Wait for its end: 0 when it completes, 3 when it halts or is aborted
    #[arg(long)]
    wait: bool,
}

/// See [`RolloutCommand::Status`].
#[derive(Debug, Args)]
pub struct Status {
    /// Which; the latest when absent
    id: Option<String>,
    /// All that is known, as JSON
    #[arg(long)]
    json: bool,
    /// Wait for its end: 0 when it completes, 3 when it halts or is aborted
    #[arg(long)]
    wait: bool,
}

/// One rollout.
#[derive(Debug, Args)]
pub struct Which {
    /// Which; the one under way when absent
    id: Option<String>,
}

/// Does what is asked; what it comes to is on standard output, why it can't be done on standard error.
pub async fn run(command: RolloutCommand, client: &Client) -> ExitCode {
    match obey(command, client).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn obey(command: RolloutCommand, client: &Client) -> Result<ExitCode, ClientError> {
    match command {
        RolloutCommand::Start(start) => {
            let request = StartRequest {
                version: start.version,
                waves: Some(start.waves),
                soak_seconds: Some(start.soak),
                max_failures: Some(start.max_failures),
                deadline_seconds: Some(start.deadline),
            };
            let begun = client.start(&request).await?;
            println!("{}", begun.message);
            if start.wait {
                return wait(client, &begun.data.id.to_string(), AWAY).await;
            }
            print::short(&begun.data);
            Ok(ExitCode::SUCCESS)
        }
        RolloutCommand::Status(status) => {
            let id = match status.id {
                Some(id) => id,
                None => match client.list().await?.into_iter().next() {
                    Some(latest) => latest.id.to_string(),
                    None => {
                        println!("{}", if status.json { "null" } else { "There has been no rollout." });
                        return Ok(ExitCode::SUCCESS);
                    }
                },
            };
            if status.wait {
                return wait(client, &id, AWAY).await;
            }
            let rollout = client.show(&id).await?;
            if status.json {
                println!("{}", serde_json::to_string_pretty(&rollout).unwrap_or_default());
            } else {
                print::long(&rollout);
            }
            Ok(if rollout.status == "halted" { ExitCode::from(NOT_COMPLETED) } else { ExitCode::SUCCESS })
        }
        RolloutCommand::Pause(which) => steer(client, which, "pause").await,
        RolloutCommand::Resume(which) => steer(client, which, "resume").await,
        RolloutCommand::Abort(which) => steer(client, which, "abort").await,
    }
}

async fn steer(client: &Client, which: Which, word: &str) -> Result<ExitCode, ClientError> {
    let id = match which.id {
        Some(id) => id,
        None => match client.list().await?.into_iter().find(is_open) {
            Some(open) => open.id.to_string(),
            None => {
                eprintln!("There is no rollout under way.");
                return Ok(ExitCode::FAILURE);
            }
        },
    };
    let answer = client.steer(&id, word).await?;
    println!("{}", answer.message);
    print::short(&answer.data);
    Ok(ExitCode::SUCCESS)
}

fn is_open(rollout: &RolloutView) -> bool {
    matches!(rollout.status.as_str(), "running" | "paused" | "halted")
}

/// Tells what happens as it happens, until nothing more will by itself. Nobody may answer for `away`.
async fn wait(client: &Client, id: &str, away: Duration) -> Result<ExitCode, ClientError> {
    let mut told = 0;
    loop {
        let rollout = patiently(away, async || client.glance(id).await).await?;
        for line in rollout.history.iter().skip(told) {
            print::line(line);
        }
        told = rollout.history.len();
        match rollout.status.as_str() {
            "running" | "paused" => tokio::time::sleep(LOOK_AGAIN).await,
            "completed" => return Ok(ExitCode::SUCCESS),
            _ => {
                let rollout = patiently(away, async || client.show(id).await).await?;
                print::short(&rollout);
                print::agents(&rollout);
                return Ok(ExitCode::from(NOT_COMPLETED));
            }
        }
    }
}

/// What `look` answers, asked again for as long as `away` when nobody is there to answer.
async fn patiently<T>(away: Duration, look: impl AsyncFn() -> Result<T, ClientError>) -> Result<T, ClientError> {
    let began = Instant::now();
    let mut said = false;
    loop {
        match look().await {
            Err(error) if error.may_pass() && began.elapsed() < away => {
                if !said {
                    eprintln!("{error}\nAsking again for {} s.", away.as_secs());
                    said = true;
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            answer => return answer,
        }
    }
}

/// `600`, `90s`, `10m`, `1h`.
fn seconds(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(digits) => (digits, text.get(digits.len()..).unwrap_or_default()),
        None => (text, "s"),
    };
    let factor = match unit {
        "m" => 60,
        "h" => 3600,
        _ => 1,
    };
    let number: u64 = digits.parse().map_err(|_| "must be a number of seconds, or such as 90s, 10m, 1h".to_owned())?;
    number.checked_mul(factor).ok_or_else(|| "is too long".to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use dtma_release::Version;
    use jiff::Timestamp;
    use secrecy::SecretString;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use uuid::Uuid;

    use super::*;
    use crate::rollout::{Rollout, RolloutAnswer, RolloutId, Terms};

    /// A provisioner that answers each call with the next of `script`, and hangs up without a word where that is empty.
    async fn scripted(script: Vec<String>) -> (Client, tokio::task::JoinHandle<()>) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let serving = tokio::spawn(async move {
            for answer in script {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        (Client::new(base, SecretString::from("secret")).unwrap(), serving)
    }

    fn answer(status: u16, body: &str) -> String {
        format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
    }

    fn rollout(status: &str) -> String {
        let terms = Terms {
            version: Version::new(1, 1, 0),
            waves: vec![100],
            soak_seconds: 0,
            max_failures: 0,
            silent_after_seconds: 180,
            deadline_seconds: 1800,
        };
        let rollout = Rollout::new(RolloutId(Uuid::nil()), terms, &[], Timestamp::UNIX_EPOCH);
        let mut data = rollout.view(BTreeMap::new(), &BTreeMap::new());
        status.clone_into(&mut data.status);
        let body = RolloutAnswer { success: true, message: String::new(), data, next: None };
        answer(200, &serde_json::to_string(&body).unwrap())
    }

    #[tokio::test]
    async fn whoever_waits_bears_that_the_provisioner_is_restarted() {
        let away = [String::new(), answer(502, "<html>"), answer(503, r#"{"success":false,"error":"x","code":"y"}"#)];
        let script = [rollout("running")].into_iter().chain(away).chain([rollout("completed")]);
        let (client, serving) = scripted(script.collect()).await;
        let code = wait(&client, "x", AWAY).await.unwrap();
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::SUCCESS));
        serving.await.unwrap();
    }

    #[tokio::test]
    async fn but_not_for_ever_and_not_a_refusal() {
        let (client, serving) = scripted(vec![String::new()]).await;
        assert!(matches!(wait(&client, "x", Duration::ZERO).await, Err(ClientError::Unreachable { .. })));
        serving.await.unwrap();
        let refusal = answer(404, r#"{"success":false,"error":"x","code":"rollout_not_found"}"#);
        let (client, serving) = scripted(vec![refusal]).await;
        assert!(matches!(wait(&client, "x", AWAY).await, Err(ClientError::Refused { status: 404, .. })));
        serving.await.unwrap();
    }

    #[test]
    fn durations_are_read_as_people_write_them() {
        let read = |text| seconds(text).ok();
        assert_eq!([read("600"), read("90s"), read("10m"), read("1h")], [Some(600), Some(90), Some(600), Some(3600)]);
        assert_eq!([read(""), read("m"), read("1d"), read("-1s"), read("99999999999999999999h")], [None; 5]);
    }
}
