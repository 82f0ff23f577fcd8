//! A fleet of real droplets that is brought to another version, or isn't.

use std::collections::BTreeMap;
use std::error::Error;
use std::process::Output;

use dtma_api::environment::{EnsureRequest, EnvironmentStatus, EnvironmentView};
use futures_util::future::try_join_all;
use serde_json::Value;
use stack::{Stack, Workspace};
use stories::{Story, all_logs, story_options, until};

use crate::droplet::TWO_MINUTES;
use crate::offers::Makers;

/// How many droplets: all that the local cloud gives an account, or fewer where a machine has other things to do.
fn fleet_size() -> usize {
    std::env::var("DTMA_STORY_FLEET").ok().and_then(|text| text.parse().ok()).unwrap_or(4)
}

struct Fleet {
    stack: Stack,
    environments: Vec<EnvironmentView>,
}

impl Fleet {
    /// So many accounts, each with an active environment, all running `first`.
    async fn new(stack: Stack, size: usize) -> Result<Self, Box<dyn Error>> {
        let provisioner = stack.provisioner();
        let mut environments = Vec::new();
        let names: Vec<_> = (0..size).map(|number| format!("fleet-{number}")).collect();
        // A few at a time: they boot on one machine.
        for some in names.chunks(4) {
            let request = EnsureRequest::default();
            let ensured = try_join_all(some.iter().map(|name| provisioner.ensure(name, &request, 140))).await?;
            if let Some(late) = ensured.iter().find(|environment| environment.status != EnvironmentStatus::Active) {
                return Err(format!("not active: {late:?}\n{}", all_logs(&stack).await).into());
            }
            environments.extend(ensured);
        }
        let settings = "printf 'DTMA_UPDATE_READY_SECONDS=20\nDTMA_UPDATE_SOAK_SECONDS=5\n' >>/etc/dtma.conf";
        for environment in &environments {
            let droplet = environment.droplet_id.ok_or("an environment without a droplet")?;
            stack.droplet_exec(droplet, &["sh", "-c", settings]).await?;
        }
        Ok(Self { stack, environments })
    }

    /// `dtma-provisioner rollout` with these words.
    async fn rollout(&self, words: &[&str]) -> Result<Output, Box<dyn Error>> {
        let file = self.stack.file();
        let output = tokio::process::Command::new(Workspace::find().program("dtma-provisioner"))
            .arg("rollout")
            .args(words)
            .env("PROVISIONER_URL", &file.provisioner_url)
            .env("INTERNAL_API_SECRET", file.internal_api_secret.expose())
            .output()
            .await?;
        Ok(output)
    }

    /// How many agents report which version.
    async fn versions(&self) -> Result<BTreeMap<String, usize>, Box<dyn Error>> {
        let mut versions = BTreeMap::new();
        for environment in &self.environments {
            let path = format!("/internal/environments/{}", environment.environment_id);
            let answer = self.stack.provisioner().request(reqwest::Method::GET, &path).send().await?;
            let shown: Value = answer.json().await?;
            let version = shown.pointer("/heartbeat/report/dtma_version").and_then(Value::as_str).unwrap_or("none");
            *versions.entry(version.to_owned()).or_default() += 1;
        }
        Ok(versions)
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_bad_release_stops_at_the_first_wave_and_a_good_one_reaches_the_whole_fleet() -> Story {
    let (makers, size) = (Makers::new()?, fleet_size());
    let options = story_options()
        .provisioner_setting("HEARTBEAT_INTERVAL_SECONDS", "2")
        .provisioner_setting("UNRESPONSIVE_AFTER_SECONDS", "60")
        .provisioner_setting("AGENT_VERSION", "0.1.0")
        .provisioner_setting("RELEASES_DIR", &makers.dist().display().to_string());
    makers.real(&makers.terms("0.1.0"))?;
    makers.mistreated(&makers.terms("0.1.1"), "exit 1")?;
    makers.real(&makers.terms("0.1.2"))?;
    let fleet = Fleet::new(Stack::start(options).await?, size).await?;
    assert_eq!(fleet.versions().await?, BTreeMap::from([("0.1.0".to_owned(), size)]));

    let bad = fleet.rollout(&["start", "0.1.1", "--soak", "0s", "--wait"]).await?;
    println!("{}", text(&bad));
    assert_eq!(bad.status.code(), Some(3), "it halted: {}", text(&bad));
    assert!(text(&bad).contains("wave 1") && text(&bad).contains("crashed"), "and says why: {}", text(&bad));
    assert_eq!(fleet.versions().await?, BTreeMap::from([("0.1.0".to_owned(), size)]), "nobody runs it");
    let aborted = fleet.rollout(&["abort"]).await?;
    assert!(aborted.status.success(), "{}", text(&aborted));

    let good = fleet.rollout(&["start", "0.1.2", "--soak", "0s", "--wait"]).await?;
    println!("{}", text(&good));
    assert!(good.status.success(), "{}", text(&good));
    until("the whole fleet reports it", TWO_MINUTES, async || {
        let versions = fleet.versions().await?;
        let all = versions == BTreeMap::from([("0.1.2".to_owned(), size)]);
        if all { Ok(Some(())) } else { Err(format!("{versions:?}").into()) }
    })
    .await?;
    // What it was brought to is what the next one begins with, unless another is set.
    let status = fleet.rollout(&["status", "--json"]).await?;
    let status: Value = serde_json::from_slice(&status.stdout)?;
    assert!(status.to_string().contains("completed"), "{status}");
    Ok(())
}
