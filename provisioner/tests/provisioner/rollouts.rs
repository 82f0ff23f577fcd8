//! Rollouts over the internal API, on real router, loop and database; agents are played by the tests.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use dtma_api::EnvironmentId;
use dtma_api::environment::EnvironmentStatus;
use dtma_provisioner::rollout::{Preference, Rollout, RolloutId};
use dtma_provisioner::rollouts::RolloutPace;
use dtma_provisioner::store::sqlite::SqliteStore;
use dtma_provisioner::store::{RolloutStore, StoreError, StoredHeartbeat, Summary};
use jiff::Timestamp;
use serde_json::{Value, json};
use std::time::Duration;

use super::rig::{Rig, Wishes, heartbeat};
use super::signed::Maker;

/// What is answered is what the description says.
fn described(schema: &str, answer: &Value) {
    let description: Value = serde_json::from_str(include_str!("../../openapi.json")).unwrap();
    let schema = json!({"$ref": format!("#/components/schemas/{schema}"), "components": description["components"]});
    let validator = jsonschema::validator_for(&schema).unwrap();
    let faults: Vec<String> =
        validator.iter_errors(answer).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert!(faults.is_empty(), "{faults:#?}\n{answer:#}");
    for (name, known) in [("data", &answer["data"]), ("agent", &answer["data"]["agents"][0])] {
        let Some(fields) = known.as_object() else { continue };
        let schema = if name == "agent" { "RolloutAgent" } else { "Rollout" };
        let described = &description["components"]["schemas"][schema]["properties"];
        for field in fields.keys().filter(|_| known.get("environment_id").is_some() || known.get("history").is_some()) {
            assert!(described.get(field).is_some(), "{field} of {schema} is not described");
        }
    }
}

/// A rig with three agents at 1.0.0, and releases 1.1.0 and 1.2.0.
struct Fleet {
    rig: Rig,
    maker: Maker,
    agents: Vec<(EnvironmentId, String)>,
    folder: tempfile::TempDir,
}

fn says(version: &str, update: Value) -> Value {
    let mut report = heartbeat();
    report["dtma_version"] = json!(version);
    report["update"] = update;
    report
}

fn idle() -> Value {
    json!({"phase": "idle"})
}

impl Fleet {
    async fn start() -> Self {
        Self::with(Wishes::default()).await
    }

    async fn with(wishes: Wishes) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let maker = Maker::new(1, folder.path());
        maker.publish(&maker.release("1.0.0"));
        maker.release("1.1.0");
        maker.release("1.2.0");
        let wishes =
            Wishes { release: false, releases: Some(folder.path().to_owned()), maker: Some(maker.keys()), ..wishes };
        let rig = Rig::with(wishes, async |_: &dyn dtma_provisioner::store::Store| {}).await;
        let mut fleet = Self { rig, maker, agents: Vec::new(), folder };
        for agent in ["a", "b", "c"] {
            fleet.join(agent).await;
        }
        fleet
    }

    async fn join(&mut self, agent: &str) {
        let (id, bearer) = self.rig.active(agent).await;
        self.agents.push((id, bearer));
        self.report(self.agents.len() - 1, "1.0.0", idle()).await;
    }

    /// The version one agent is told.
    async fn report(&self, agent: usize, version: &str, update: Value) -> Option<String> {
        let (status, answer) = self.rig.agent("heartbeat", &self.agents[agent].1, says(version, update)).await;
        assert!(status == 204 || status == 200, "{status} {answer}");
        answer["desired_version"].as_str().map(ToOwned::to_owned)
    }

    /// Returns once all who are asked are told with their next heartbeat.
    async fn until_told(&self, rollout: &Value) {
        let seen = self.show(rollout).await;
        let pending = seen["agents"].as_array().unwrap().iter().filter(|agent| agent["standing"] == "pending");
        let asked = pending.map(|agent| agent["asked_at"].as_str().unwrap().parse::<Timestamp>().unwrap());
        if let Some(last) = asked.max() {
            let wait = Duration::try_from(last.duration_since(Timestamp::now())).unwrap_or_default();
            tokio::time::sleep(wait).await;
        }
    }

    /// Those who are told `version` while all report 1.0.0, in order.
    async fn told(&self, version: &str) -> Vec<usize> {
        let mut told = Vec::new();
        for agent in 0..self.agents.len() {
            if self.report(agent, "1.0.0", idle()).await.as_deref() == Some(version) {
                told.push(agent);
            }
        }
        told
    }

    async fn begin(&self, version: &str) -> Value {
        let body = json!({"version": version, "waves": [1, 100], "soak_seconds": 0});
        let (status, answer) = self.rig.internal("POST", "/internal/rollouts", Some(body)).await;
        assert_eq!((status, answer["success"].as_bool()), (200, Some(true)), "{answer}");
        described("RolloutAnswer", &answer);
        answer["data"].clone()
    }

    async fn steer(&self, rollout: &Value, word: &str) -> (u16, Value) {
        let path = format!("/internal/rollouts/{}/{word}", rollout["id"].as_str().unwrap());
        self.rig.internal("POST", &path, None).await
    }

    async fn show(&self, rollout: &Value) -> Value {
        let path = format!("/internal/rollouts/{}", rollout["id"].as_str().unwrap());
        let (status, answer) = self.rig.internal("GET", &path, None).await;
        assert_eq!(status, 200, "{answer}");
        described("RolloutAnswer", &answer);
        answer["data"].clone()
    }

    async fn until(&self, rollout: &Value, enough: impl Fn(&Value) -> bool) -> Value {
        let looking = async {
            loop {
                let seen = self.show(rollout).await;
                if enough(&seen) {
                    return seen;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        match tokio::time::timeout(Duration::from_secs(60), looking).await {
            Ok(seen) => seen,
            Err(_) => panic!("still {:#}", self.show(rollout).await),
        }
    }

    async fn until_wave(&self, rollout: &Value, wave: u64) -> Value {
        let seen = self.until(rollout, |seen| seen["wave"] == wave).await;
        self.until_told(rollout).await;
        seen
    }

    async fn until_is(&self, rollout: &Value, status: &str) -> Value {
        self.until(rollout, |seen| seen["status"] == status).await
    }

    /// All who are told go there, and go on reporting until it is complete.
    async fn complete(&self, rollout: &Value, version: &str) -> Value {
        let mut versions = vec!["1.0.0".to_owned(); self.agents.len()];
        for _ in 0..2000 {
            for (agent, running) in versions.iter_mut().enumerate() {
                if let Some(told) = self.report(agent, running, idle()).await {
                    assert_eq!(told, version);
                    *running = told;
                }
            }
            let seen = self.show(rollout).await;
            if seen["status"] == "completed" {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        panic!("still {:#}", self.show(rollout).await);
    }
}

#[tokio::test]
async fn a_rollout_reaches_all_and_new_droplets_begin_with_its_version() {
    let mut fleet = Fleet::start().await;
    let rollout = fleet.begin("1.1.0").await;
    fleet.until_wave(&rollout, 1).await;
    assert_eq!(fleet.told("1.1.0").await.len(), 1);
    let seen = fleet.complete(&rollout, "1.1.0").await;
    assert_eq!(seen["counts"], json!({"updated": 3}));
    let (_, ready) = fleet.rig.internal("GET", "/ready", None).await;
    assert_eq!(ready["agent_version"], "1.1.0");
    // One that was asleep all the time is told when it is back, however long after.
    fleet.join("late").await;
    assert_eq!(fleet.report(3, "1.0.0", idle()).await.as_deref(), Some("1.1.0"));
    assert_eq!(fleet.report(3, "1.1.0", idle()).await, None);
    assert!(fleet.rig.cloud.last_user_data().contains("1.1.0"));
    let (_, list) = fleet.rig.internal("GET", "/internal/rollouts", None).await;
    assert_eq!(
        (list["data"][0]["status"].as_str(), &list["data"][0]["counts"]),
        (Some("completed"), &json!({"updated": 3}))
    );
    assert_eq!(fleet.steer(&rollout, "resume").await.1["code"], "rollout_over");
}

#[tokio::test]
async fn nobody_is_sent_after_a_release_that_is_gone_also_while_another_rollout_is_open() {
    let fleet = Fleet::start().await;
    let first = fleet.begin("1.1.0").await;
    fleet.complete(&first, "1.1.0").await;
    let second = fleet.begin("1.2.0").await;
    fleet.steer(&second, "pause").await;
    assert_eq!(fleet.report(0, "1.0.0", idle()).await.as_deref(), Some("1.1.0"));
    std::fs::remove_dir_all(fleet.folder.path().join("1.1.0")).unwrap();
    let told_no_more = async {
        while fleet.report(0, "1.0.0", idle()).await.is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), told_no_more).await.unwrap();
}

#[tokio::test]
async fn a_halted_rollout_says_why_tells_nobody_and_goes_on_when_it_is_resumed() {
    let fleet = Fleet::start().await;
    let rollout = fleet.begin("1.1.0").await;
    fleet.until_wave(&rollout, 1).await;
    let canary = fleet.told("1.1.0").await[0];
    let reverted = json!({
        "phase": "idle",
        "last": {
            "outcome": "reverted", "from_version": "1.0.0", "to_version": "1.1.0", "code": "crashed",
            "reason": "it ended 3 times within 10 s: address in use", "at": "2026-11-25T09:00:00Z",
        },
    });
    fleet.report(canary, "1.0.0", reverted.clone()).await;
    let halted = fleet.until_is(&rollout, "halted").await;
    let reason = "1 of 1 agents of wave 1 reverted: crashed: it ended 3 times within 10 s: address in use";
    assert_eq!(halted["reason"], reason);
    let agent = halted["agents"].as_array().unwrap().iter().find(|agent| agent["standing"] == "failed").unwrap();
    assert_eq!(agent["environment_id"], json!(fleet.agents[canary].0));
    assert_eq!((&agent["outcome"], &agent["code"]), (&json!("reverted"), &json!("crashed")));
    assert_eq!(fleet.told("1.1.0").await, Vec::<usize>::new());
    let (status, refused) = fleet.rig.internal("POST", "/internal/rollouts", Some(json!({"version": "1.2.0"}))).await;
    assert_eq!((status, refused["code"].as_str()), (409, Some("rollout_open")), "{refused}");
    let request = axum::http::Request::get("/metrics").header("x-internal-api-secret", super::rig::SECRET);
    let page = fleet.rig.send(request.body(axum::body::Body::empty()).unwrap()).await;
    let page = http_body_util::BodyExt::collect(page.into_body()).await.unwrap().to_bytes();
    let page = String::from_utf8(page.to_vec()).unwrap();
    for line in [
        "dtma_rollouts_halted_total 1",
        "dtma_rollout{version=\"1.1.0\",status=\"halted\",wave=\"1\"} 1",
        "dtma_rollout_agents{version=\"1.1.0\",standing=\"failed\"} 1",
    ] {
        assert!(page.lines().any(|there| there == line), "{line}\n{page}");
    }

    // Resumed, the wave is over once its soak time is, and the others follow.
    let (status, resumed) = fleet.steer(&rollout, "resume").await;
    assert_eq!((status, resumed["data"]["status"].as_str()), (200, Some("running")), "{resumed}");
    fleet.until_wave(&rollout, 2).await;
    for other in (0..3).filter(|agent| *agent != canary) {
        assert_eq!(fleet.report(other, "1.0.0", idle()).await.as_deref(), Some("1.1.0"));
        assert_eq!(fleet.report(other, "1.1.0", idle()).await, None);
    }
    let ends = async {
        loop {
            for agent in 0..3 {
                let (version, update) = if agent == canary { ("1.0.0", reverted.clone()) } else { ("1.1.0", idle()) };
                // Not even when it is complete: it would only fail again.
                assert_eq!(fleet.report(agent, version, update).await, None);
            }
            if fleet.show(&rollout).await["status"] == "completed" {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), ends).await.unwrap();
    assert_eq!(fleet.report(canary, "1.0.0", reverted).await, None);
}

#[tokio::test]
async fn paused_nobody_is_told_and_aborted_another_can_begin() {
    let fleet = Fleet::start().await;
    let rollout = fleet.begin("1.1.0").await;
    fleet.until_wave(&rollout, 1).await;
    for _ in 0..2 {
        let (status, paused) = fleet.steer(&rollout, "pause").await;
        assert_eq!((status, paused["data"]["status"].as_str()), (200, Some("paused")), "{paused}");
    }
    assert_eq!(fleet.told("1.1.0").await.len(), 0);
    fleet.steer(&rollout, "resume").await;
    fleet.until_told(&rollout).await;
    assert_eq!(fleet.told("1.1.0").await.len(), 1);
    for _ in 0..2 {
        let (status, aborted) = fleet.steer(&rollout, "abort").await;
        assert_eq!((status, aborted["data"]["status"].as_str()), (200, Some("aborted")), "{aborted}");
    }
    assert_eq!(fleet.told("1.1.0").await.len(), 0);
    let next = fleet.begin("1.2.0").await;
    fleet.complete(&next, "1.2.0").await;
}

#[tokio::test]
async fn what_agents_would_not_take_is_not_begun() {
    let fleet = Fleet::start().await;
    let mut expired = fleet.maker.archive("1.3.0", "x");
    expired.expires_at = expired.issued_at;
    fleet.maker.sign(&expired);
    for (body, status, code) in [
        (json!({"version": "9.9.9"}), 422, "release_unknown"),
        (json!({"version": "1.3.0"}), 422, "release_refused"),
        (json!({"version": "latest"}), 400, "invalid_request"),
        (json!({"version": "1.1.0", "waves": [10, 5, 100]}), 400, "invalid_request"),
        (json!({"version": "1.1.0", "waves": [10, 50]}), 400, "invalid_request"),
        (json!({"version": "1.1.0", "waves": []}), 400, "invalid_request"),
        (json!({"version": "1.1.0", "waves": [0, 100]}), 400, "invalid_request"),
        (json!({"version": "1.1.0", "soak_seconds": 9_999_999}), 400, "invalid_request"),
        (json!({"version": "1.1.0", "deadline_seconds": 0}), 400, "invalid_request"),
        (json!({"soak_seconds": 1}), 400, "invalid_json"),
    ] {
        let (answered, answer) = fleet.rig.internal("POST", "/internal/rollouts", Some(body.clone())).await;
        assert_eq!((answered, answer["code"].as_str()), (status, Some(code)), "{body}: {answer}");
    }
    let (_, refused) = fleet.rig.internal("POST", "/internal/rollouts", Some(json!({"version": "1.3.0"}))).await;
    assert_eq!(refused["details"]["reason"], "expired");
    for path in ["nonsense", "018f0000-0000-7000-8000-000000000000"] {
        let (status, answer) = fleet.rig.internal("GET", &format!("/internal/rollouts/{path}"), None).await;
        assert_eq!((status, answer["code"].as_str()), (404, Some("rollout_not_found")));
    }
    let unsigned = Rig::start().await;
    let (status, answer) = unsigned.internal("POST", "/internal/rollouts", Some(json!({"version": "1.2.3"}))).await;
    assert_eq!((status, answer["code"].as_str()), (422, Some("releases_unsigned")), "{answer}");
}

#[tokio::test]
async fn pinned_and_excluded_environments_are_passed_by_and_their_view_says_so() {
    let fleet = Fleet::start().await;
    let decide = async |agent: usize, body: Value| {
        let path = format!("/internal/environments/{}/updates", fleet.agents[agent].0);
        let (status, answer) = fleet.rig.internal("PUT", &path, Some(body)).await;
        described(if status == 200 { "UpdatesAnswer" } else { "Failure" }, &answer);
        (status, answer)
    };
    assert_eq!(decide(0, json!({"excluded": true})).await.0, 200);
    assert_eq!(decide(1, json!({"pin": "1.2.0"})).await.0, 200);
    let (status, answer) = decide(1, json!({"pin": "newest"})).await;
    assert_eq!((status, answer["code"].as_str()), (400, Some("invalid_request")));
    let path = "/internal/environments/018f0000-0000-7000-8000-000000000000/updates";
    let (status, answer) = fleet.rig.internal("PUT", path, Some(json!({}))).await;
    assert_eq!((status, answer["code"].as_str()), (404, Some("environment_not_found")));
    let (_, list) = fleet.rig.internal("GET", "/internal/environments", None).await;
    let updates: Vec<Value> =
        list["data"].as_array().unwrap().iter().map(|environment| environment["updates"].clone()).collect();
    let nothing = json!({"pin": null, "excluded": false});
    assert_eq!(updates, [json!({"pin": null, "excluded": true}), json!({"pin": "1.2.0", "excluded": false}), nothing]);
    // A pin is told at once, with or without a rollout.
    assert_eq!(fleet.report(1, "1.0.0", idle()).await.as_deref(), Some("1.2.0"));

    let rollout = fleet.begin("1.1.0").await;
    fleet.until_wave(&rollout, 1).await;
    assert_eq!(fleet.told("1.1.0").await, [2]);
    let seen = fleet.show(&rollout).await;
    assert_eq!(seen["counts"], json!({"left_out": 2, "pending": 1}));
    // No longer excluded: it takes part in the last wave, as all who come late.
    assert_eq!(decide(0, json!({})).await.0, 200);
    fleet.until(&rollout, |seen| seen["counts"]["waiting"] == 1).await;
    assert_eq!(decide(1, json!({})).await.0, 200);
    let seen = fleet.complete(&rollout, "1.1.0").await;
    assert_eq!(seen["counts"], json!({"updated": 3}));
}

#[tokio::test]
async fn an_agent_that_was_told_and_falls_silent_halts_it() {
    let pace = RolloutPace { tick: Duration::from_millis(20), ..Wishes::default().rollout_pace };
    let fleet = Fleet::with(Wishes { silent_after_seconds: 1, rollout_pace: pace, ..Wishes::default() }).await;
    let rollout = fleet.begin("1.1.0").await;
    fleet.until_wave(&rollout, 1).await;
    let canary = fleet.told("1.1.0").await[0];
    let halted = fleet.until_is(&rollout, "halted").await;
    assert_eq!(halted["reason"], "1 of 1 agents of wave 1 fell silent");
    assert_eq!(fleet.report(canary, "1.1.0", idle()).await, None);
    fleet.until(&rollout, |seen| seen["counts"]["updated"] == 1).await;
    assert_eq!(fleet.show(&rollout).await["status"], "halted");
}

#[tokio::test]
async fn who_was_told_before_a_restart_is_known_after_it() {
    let kept = tempfile::tempdir().unwrap();
    let database = Some(kept.path().join("db.sqlite"));
    let wishes = Wishes { silent_after_seconds: 1, database: database.clone(), ..Wishes::default() };
    let mut fleet = Fleet::with(wishes).await;
    let rollout = fleet.begin("1.1.0").await;
    fleet.until_wave(&rollout, 1).await;
    assert_eq!(fleet.told("1.1.0").await.len(), 1);
    // Nobody but this process could have seen it fall silent, and this process ends now.
    let wishes = Wishes {
        release: false,
        releases: Some(fleet.folder.path().to_owned()),
        maker: Some(fleet.maker.keys()),
        database,
        cloud: Arc::clone(&fleet.rig.cloud),
        ..Wishes::default()
    };
    let after = Rig::with(wishes, async |_: &dyn dtma_provisioner::store::Store| {}).await;
    fleet.rig = after;
    let halted = fleet.until_is(&rollout, "halted").await;
    assert_eq!(halted["reason"], "1 of 1 agents of wave 1 fell silent");
}

/// Writes a new rollout down, and then says that it couldn't.
struct Mute(Arc<SqliteStore>);

#[async_trait]
impl RolloutStore for Mute {
    async fn add_rollout(&self, rollout: &Rollout) -> Result<bool, StoreError> {
        self.0.add_rollout(rollout).await?;
        Err(StoreError { operation: "adding a rollout", passing: true, source: "the connection broke".into() })
    }
    async fn keep_rollout(&self, rollout: &Rollout, changed: &[EnvironmentId]) -> Result<(), StoreError> {
        self.0.keep_rollout(rollout, changed).await
    }
    async fn open_rollout(&self) -> Result<Option<Rollout>, StoreError> {
        self.0.open_rollout().await
    }
    async fn completed_rollout(&self) -> Result<Option<Rollout>, StoreError> {
        self.0.completed_rollout().await
    }
    async fn rollout(&self, id: RolloutId) -> Result<Option<Rollout>, StoreError> {
        self.0.rollout(id).await
    }
    async fn rollouts(&self, limit: u32) -> Result<Vec<Summary>, StoreError> {
        self.0.rollouts(limit).await
    }
    async fn heartbeats(&self) -> Result<Vec<StoredHeartbeat>, StoreError> {
        self.0.heartbeats().await
    }
    async fn preferences(&self) -> Result<HashMap<EnvironmentId, Preference>, StoreError> {
        self.0.preferences().await
    }
    async fn prefer(&self, id: EnvironmentId, preference: &Preference, now: Timestamp) -> Result<(), StoreError> {
        self.0.prefer(id, preference, now).await
    }
}

#[tokio::test]
async fn a_rollout_that_was_written_down_is_carried_on_also_where_the_database_said_otherwise() {
    let fleet = Fleet::with(Wishes { rollout_store: |store| Arc::new(Mute(store)), ..Wishes::default() }).await;
    let body = json!({"version": "1.1.0", "waves": [1, 100], "soak_seconds": 0});
    let (status, answer) = fleet.rig.internal("POST", "/internal/rollouts", Some(body)).await;
    assert_eq!((status, answer["code"].as_str()), (503, Some("database_unavailable")), "{answer}");
    let (_, list) = fleet.rig.internal("GET", "/internal/rollouts", None).await;
    let rollout = list["data"][0].clone();
    fleet.until_wave(&rollout, 1).await;
    let (status, aborted) = fleet.steer(&rollout, "abort").await;
    assert_eq!((status, aborted["data"]["status"].as_str()), (200, Some("aborted")), "{aborted}");
    assert_eq!(fleet.show(&rollout).await["status"], "aborted");
}

#[tokio::test]
async fn what_another_process_carries_on_is_not_said_to_be_aborted() {
    let kept = tempfile::tempdir().unwrap();
    let database = Some(kept.path().join("db.sqlite"));
    let mut fleet = Fleet::with(Wishes { database: database.clone(), ..Wishes::default() }).await;
    let wishes = Wishes {
        release: false,
        releases: Some(fleet.folder.path().to_owned()),
        maker: Some(fleet.maker.keys()),
        database,
        cloud: Arc::clone(&fleet.rig.cloud),
        ..Wishes::default()
    };
    let other = Rig::with(wishes, async |_: &dyn dtma_provisioner::store::Store| {}).await;
    let rollout = fleet.begin("1.1.0").await;
    let first = std::mem::replace(&mut fleet.rig, other);
    let (status, answer) = fleet.steer(&rollout, "abort").await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("rollout_elsewhere")), "{answer}");
    assert_eq!(fleet.show(&rollout).await["status"], "running");
    drop(first);
}

#[tokio::test]
async fn agents_are_listed_in_pages() {
    let fleet = Fleet::start().await;
    let rollout = fleet.begin("1.1.0").await;
    let path = format!("/internal/rollouts/{}?limit=2", rollout["id"].as_str().unwrap());
    let (_, first) = fleet.rig.internal("GET", &path, None).await;
    let next = first["next"].as_str().unwrap();
    let (_, second) = fleet.rig.internal("GET", &format!("{path}&after={next}"), None).await;
    let ids = |page: &Value| -> Vec<Value> {
        page["data"]["agents"].as_array().unwrap().iter().map(|agent| agent["environment_id"].clone()).collect()
    };
    let all: Vec<Value> = fleet.agents.iter().map(|(id, _)| json!(id)).collect();
    assert_eq!([ids(&first), ids(&second)].concat(), all);
    assert_eq!(second["next"], Value::Null);
}

#[tokio::test]
async fn an_environment_that_is_given_up_is_not_waited_for() {
    let fleet = Fleet::start().await;
    let rollout = fleet.begin("1.1.0").await;
    fleet.until_wave(&rollout, 1).await;
    let canary = fleet.told("1.1.0").await[0];
    fleet.rig.delete(["a", "b", "c"][canary], 10).await;
    fleet.rig.until_status(["a", "b", "c"][canary], EnvironmentStatus::Deprovisioned).await;
    // It has proved nothing: another one is the first to try the version.
    let seen = fleet.until(&rollout, |seen| seen["counts"]["gone"] == 1 && seen["counts"]["pending"] == 1).await;
    assert_eq!((&seen["wave"], &seen["counts"]["waiting"]), (&json!(1), &json!(1)));
}
