//! A droplet whose agent is updated, and what must be so whatever becomes of an update.

use std::error::Error;
use std::time::{Duration, Instant};

use dtma_api::instance::{DeployRequest, Transport};
use dtma_api::update::{UpdateAnswer, UpdateOutcome, UpdatePhase};
use serde_json::json;
use stack::prepare::DEFAULT_IMAGE;
use stories::{Scene, Story, until};

use crate::offers::Host;

/// Longer than any undoing takes.
pub(crate) const TWO_MINUTES: Duration = Duration::from_secs(120);

/// A droplet with a tool on it, taking its releases from a host of the story's own.
pub(crate) struct Droplet {
    pub(crate) scene: Scene,
    pub(crate) host: Host,
    /// The version it was installed with.
    pub(crate) first: String,
    tool: String,
}

impl Droplet {
    /// `ready`, `soak`: how many seconds a trial's parts take.
    pub(crate) async fn new(ready: u64, soak: u64) -> Result<Self, Box<dyn Error>> {
        let scene = Scene::set(DEFAULT_IMAGE).await?;
        let host = Host::start(&scene.stack).await?;
        let settings = format!(
            "printf 'DTMA_RELEASES_URL={}\nDTMA_UPDATE_READY_SECONDS={ready}\nDTMA_UPDATE_SOAK_SECONDS={soak}\n' >>/etc/dtma.conf",
            host.url()
        );
        scene.on_droplet(&["sh", "-c", &settings]).await?;
        let request = DeployRequest::new(&scene.stack.mcp_image(), "adder".parse()?, "id-of-adder".parse()?);
        scene.agent.deploy(&DeployRequest { mcp_transport_type: Some(Transport::Http), ..request }).await?;
        let first = scene.agent.status().await?.version;
        let droplet = Self { tool: String::new(), first, host, scene };
        let tool = droplet.containers().await?;
        droplet.has_reported().await?;
        Ok(Self { tool, ..droplet })
    }

    /// Which containers run since when.
    async fn containers(&self) -> Result<String, Box<dyn Error>> {
        let script = "docker inspect --format '{{.Id}} {{.State.StartedAt}} {{.RestartCount}}' $(docker ps --quiet)";
        self.scene.on_droplet(&["sh", "-c", script]).await
    }

    /// What a new version has to do as well, this one has done: a heartbeat of it was taken.
    async fn has_reported(&self) -> Story {
        until("a heartbeat was taken", TWO_MINUTES, async || {
            let vitals: serde_json::Value = serde_json::from_str(&self.read("/run/dtma/vitals.json").await?)?;
            Ok((vitals["heartbeats_taken"].as_u64() > Some(0)).then_some(()))
        })
        .await
    }

    pub(crate) async fn read(&self, path: &str) -> Result<String, Box<dyn Error>> {
        self.scene.on_droplet(&["cat", path]).await
    }

    pub(crate) async fn update_state(&self) -> Result<UpdateAnswer, Box<dyn Error>> {
        Ok(self.scene.agent.get("/update").await?.decode::<UpdateAnswer>()?)
    }

    /// `dtma-agent update` with these words on the droplet; whether it ended well, what it said, and how long it took.
    pub(crate) async fn update(&self, words: &[&str]) -> Result<(bool, String, Duration), Box<dyn Error>> {
        let command = [&["/opt/dtma/good/dtma-agent", "update"], words].concat();
        let begun = Instant::now();
        let output = self.scene.stack.droplet_exec(self.scene.droplet()?, &command).await?;
        Ok((output.exit_code == 0, format!("{}{}", output.stdout, output.stderr), begun.elapsed()))
    }

    /// The versions `current` and `good` lead to.
    pub(crate) async fn links(&self) -> Result<(String, String), Box<dyn Error>> {
        let shown = self.scene.on_droplet(&["readlink", "/opt/dtma/current", "/opt/dtma/good"]).await?;
        let mut lines = shown.lines().map(|line| line.trim_start_matches("versions/").to_owned());
        Ok((lines.next().unwrap_or_default(), lines.next().unwrap_or_default()))
    }

    /// Waits until the updater is in this phase.
    pub(crate) async fn until_phase(&self, phase: UpdatePhase) -> Story {
        until(&format!("the updater is in phase {phase:?}"), TWO_MINUTES, async || {
            let state: serde_json::Value = serde_json::from_str(&self.read("/var/lib/dtma-update/state.json").await?)?;
            Ok((state["shown"]["phase"] == json!(phase)).then_some(()))
        })
        .await
    }

    /// Within two minutes this version serves, is the one in use and the good one, and nothing is under way.
    pub(crate) async fn settles_on(&self, version: &str) -> Story {
        let expected = (version.to_owned(), version.to_owned());
        until(&format!("{version} serves again"), TWO_MINUTES, async || {
            let links = self.links().await?;
            let state = self.update_state().await?;
            let settled = links == expected && state.version == version && state.update.phase == UpdatePhase::Idle;
            if settled { Ok(Some(())) } else { Err(format!("{links:?}, {state:?}").into()) }
        })
        .await
    }

    /// The tool has noticed nothing, and answers.
    pub(crate) async fn tool_is_untouched(&self) -> Story {
        assert_eq!(self.containers().await?, self.tool, "the tool's container");
        self.tool_answers().await
    }

    pub(crate) async fn tool_answers(&self) -> Story {
        until("the tool answers", TWO_MINUTES, async || {
            let instance =
                self.scene.agent.get("/tools/adder").await?.decode::<dtma_api::instance::InstanceAnswer>()?.data;
            let client = self.scene.agent.mcp(&instance).await?;
            let sum = client.call("add", json!({ "a": 19, "b": 23 })).await?;
            client.close().await?;
            Ok((sum == "42").then_some(()))
        })
        .await
    }

    /// What the agent says of the last update.
    pub(crate) async fn last(&self) -> Result<(UpdateOutcome, String), Box<dyn Error>> {
        let last = self.update_state().await?.update.last.ok_or("there was no update")?;
        Ok((last.outcome, last.code.unwrap_or_default()))
    }

    /// How the provisioner was told last that updates stand on this droplet.
    pub(crate) async fn reported(&self) -> Result<serde_json::Value, Box<dyn Error>> {
        let path = format!("/internal/environments/{}", self.scene.environment.environment_id);
        let answer = self.scene.stack.provisioner().request(reqwest::Method::GET, &path).send().await?;
        let shown: serde_json::Value = answer.json().await?;
        Ok(shown.pointer("/heartbeat/report/update").cloned().unwrap_or_default())
    }
}
