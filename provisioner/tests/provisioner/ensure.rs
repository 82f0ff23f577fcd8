//! What callers of `ensure` see, whatever the cloud does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use axum::body::Body;
use axum::http::Request;
use dtma_api::AgentId;
use dtma_api::environment::EnvironmentStatus;
use dtma_provisioner::owners::{Owner, Owners, OwnersError};
use dtma_provisioner::reconcile::Pace;
use dtma_provisioner::store::Store;
use http_body_util::BodyExt as _;
use serde_json::json;

use super::fake_cloud::Create;
use super::rig::{Rig, SECRET, Wishes, heartbeat, pace, policy};

async fn nothing(_: &dyn Store) {}

#[tokio::test]
async fn an_environment_comes_up_and_a_second_ensure_finds_it() {
    let rig = Rig::start().await;
    let (status, answer) = rig.ensure("agent-1", 0).await;
    assert_eq!(status, 202, "{answer}");
    assert_eq!(answer["success"], true);
    rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    rig.boot().await;
    let (status, answer) = rig.ensure("agent-1", 10).await;
    assert_eq!(status, 200, "{answer}");
    let data = &answer["data"];
    assert_eq!(data["status"], "active");
    assert_eq!(data["agent_id"], "agent-1");
    assert_eq!(data["account_id"], "agent-1");
    let ip = data["ip_address"].as_str().unwrap();
    assert_eq!(data["agent_url"], format!("https://{ip}:30000"));
    assert!(data["agent_certificate_pin"].as_str().unwrap().starts_with("sha256//"));
    assert!(data["ready_at"].is_string() && data["error"].is_null());
    assert_eq!(rig.cloud.create_count(), 1);
}

/// Rounds of the loop so far.
async fn passes(rig: &Rig) -> u64 {
    let request = Request::get("/metrics").header("authorization", format!("Bearer {SECRET}"));
    let answer = rig.send(request.body(Body::empty()).unwrap()).await;
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    let text = str::from_utf8(&body).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("dtma_reconcile_passes_total "));
    line.unwrap().parse().unwrap()
}

#[tokio::test]
async fn while_a_droplet_boots_the_loop_rests_between_its_rounds() {
    let rig = Rig::start().await;
    rig.ensure("agent-1", 0).await;
    rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    let (begun, before) = (Instant::now(), passes(&rig).await);
    tokio::time::sleep(pace().tick * 20).await;
    let rounds = passes(&rig).await - before;
    let rests = begun.elapsed().as_nanos() / pace().tick.as_nanos();
    assert!(u128::from(rounds) <= 2 * rests + 5, "{rounds} rounds in the time of {rests}");
}

#[tokio::test]
async fn fifty_at_once_get_one_droplet() {
    let rig = Arc::new(Rig::start().await);
    let calls: Vec<_> = (0..50)
        .map(|_| {
            let rig = Arc::clone(&rig);
            tokio::spawn(async move { rig.ensure("agent-1", 15).await })
        })
        .collect();
    rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    rig.boot().await;
    let mut environments = std::collections::HashSet::new();
    for call in calls {
        let (status, answer) = call.await.unwrap();
        assert_eq!(status, 200, "{answer}");
        environments.insert(answer["data"]["environment_id"].as_str().unwrap().to_owned());
    }
    assert_eq!(environments.len(), 1);
    assert_eq!((rig.cloud.create_count(), rig.cloud.ids().len()), (1, 1));
}

#[tokio::test]
async fn agents_of_one_owner_share_an_environment_and_others_are_turned_away() {
    let rig = Rig::start().await;
    let path = |agent: &str| format!("/internal/agents/{agent}/ensure-tool-environment?wait=0");
    let (_, first) = rig.internal("POST", &path("a-1"), Some(json!({"userId": "user-1"}))).await;
    let (_, second) = rig.internal("POST", &path("a-2"), Some(json!({"userId": "user-1"}))).await;
    assert_eq!(first["data"]["environment_id"], second["data"]["environment_id"]);
    assert_eq!(second["data"]["account_id"], "user-1");
    let (status, refused) = rig.internal("POST", &path("a-1"), Some(json!({"userId": "user-2"}))).await;
    assert_eq!((status, refused["code"].as_str()), (403, Some("not_owner")));
    // Without a user the remembered one counts.
    let (_, third) = rig.internal("POST", &path("a-1"), None).await;
    assert_eq!(third["data"]["account_id"], "user-1");
}

struct Platform;

#[async_trait]
impl Owners for Platform {
    async fn owner(&self, agent: &AgentId) -> Result<Owner, OwnersError> {
        match agent.as_str() {
            "owned" => Ok(Owner::Account("user-1".parse().unwrap())),
            "orphan" => Ok(Owner::Nobody),
            "broken" => Err(OwnersError::Refused(500)),
            _ => Ok(Owner::NoSuchAgent),
        }
    }
}

#[tokio::test]
async fn where_the_platform_knows_the_owners_its_word_counts() {
    let rig = Rig::with(Wishes { owners: Some(Arc::new(Platform)), ..Wishes::default() }, nothing).await;
    let path = |agent: &str| format!("/internal/agents/{agent}/ensure-tool-environment?wait=0");
    let code = |answer: &serde_json::Value| answer["code"].as_str().map(ToOwned::to_owned);
    let (status, answer) = rig.internal("POST", &path("owned"), None).await;
    assert_eq!((status, answer["data"]["account_id"].as_str()), (202, Some("user-1")));
    let (status, answer) = rig.internal("POST", &path("owned"), Some(json!({"userId": "user-2"}))).await;
    assert_eq!((status, code(&answer)), (403, Some("not_owner".to_owned())));
    let (status, answer) = rig.internal("POST", &path("stranger"), Some(json!({"userId": "user-2"}))).await;
    assert_eq!((status, code(&answer)), (404, Some("agent_not_found".to_owned())));
    let (status, answer) = rig.internal("POST", &path("orphan"), None).await;
    assert_eq!((status, answer["data"]["account_id"].as_str()), (202, Some("orphan")));
    let (status, answer) = rig.internal("POST", &path("broken"), None).await;
    assert_eq!((status, code(&answer)), (503, Some("owners_unavailable".to_owned())));
}

#[tokio::test]
async fn a_refusal_comes_with_the_clouds_words_and_request_id_and_the_next_ensure_tries_again() {
    let rig = Rig::start().await;
    rig.cloud.next_creates([Create::Refuse(422, "creating this droplet will exceed your droplet limit")]);
    let (status, answer) = rig.ensure("agent-1", 10).await;
    assert_eq!(status, 422, "{answer}");
    assert_eq!(answer["success"], false);
    assert_eq!(answer["code"], "cloud_refused");
    assert!(answer["error"].as_str().unwrap().contains("will exceed your droplet limit"), "{answer}");
    assert_eq!(answer["data"]["error"]["cloud_request_id"], "cloud-request-7");
    assert_eq!(answer["data"]["status"], "error_provisioning");
    assert!(rig.cloud.ids().is_empty());

    let (status, answer) = rig.ensure("agent-1", 0).await;
    assert_eq!((status, answer["success"].as_bool()), (202, Some(true)), "{answer}");
    rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    assert_eq!(rig.cloud.ids().len(), 1);
}

#[tokio::test]
async fn rate_limits_are_waited_for() {
    let rig = Rig::start().await;
    rig.cloud
        .next_creates([Create::RateLimit(Duration::from_millis(30)), Create::RateLimit(Duration::from_millis(30))]);
    rig.ensure("agent-1", 0).await;
    rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    assert_eq!((rig.cloud.create_count(), rig.cloud.ids().len()), (3, 1));
}

#[tokio::test]
async fn a_rate_limit_that_never_ends_is_an_answer_too() {
    let policy =
        dtma_provisioner::reconcile::plan::Policy { bootstrap_deadline: Duration::from_millis(100), ..policy() };
    let rig = Rig::with(Wishes { policy, ..Wishes::default() }, nothing).await;
    rig.cloud.next_creates(vec![Create::RateLimit(Duration::from_millis(20)); 100]);
    let (status, answer) = rig.ensure("agent-1", 10).await;
    assert_eq!((status, answer["code"].as_str()), (429, Some("cloud_rate_limited")), "{answer}");
}

#[tokio::test]
async fn a_lost_answer_after_the_effect_is_found_by_its_tag_and_not_repeated() {
    for lost in [Create::LostAfter, Create::LostAfterAndLate(3)] {
        let rig = Rig::start().await;
        rig.cloud.next_creates([lost]);
        rig.ensure("agent-1", 0).await;
        rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
        assert_eq!((rig.cloud.create_count(), rig.cloud.ids().len()), (1, 1));
        // It is the same attempt, so its token works.
        rig.boot().await;
        rig.until_status("agent-1", EnvironmentStatus::Active).await;
    }
}

#[tokio::test]
async fn a_lost_answer_without_effect_is_tried_again_after_the_grace_window() {
    let rig = Rig::start().await;
    rig.cloud.next_creates([Create::LostBefore]);
    rig.ensure("agent-1", 0).await;
    rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    assert_eq!((rig.cloud.create_count(), rig.cloud.ids().len()), (2, 1));
}

#[tokio::test]
async fn a_droplet_that_shows_up_after_the_grace_window_is_deleted() {
    let rig = Rig::start().await;
    rig.cloud.next_creates([Create::LostAfterAndLate(100_000)]);
    rig.ensure("agent-1", 0).await;
    let environment = rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    let wanted = environment.state.droplet().unwrap();
    let late = rig.cloud.ids().into_iter().find(|id| *id != wanted.0).unwrap();
    // Now the lists show it.
    let tags = vec![super::rig::FLEET_TAG.to_owned(), environment.tag(), "dtma-attempt:gone".to_owned()];
    rig.cloud.remove(dtma_provisioner::environment::DropletId(late));
    rig.cloud.add(&tags, 0);
    rig.until("agent-1", |_, cloud| cloud.ids() == [wanted.0]).await;
}

#[tokio::test]
async fn a_failed_placement_is_cleaned_up_and_tried_again() {
    let rig = Rig::start().await;
    rig.cloud.next_creates([Create::PlacementFails]);
    rig.ensure("agent-1", 0).await;
    rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    assert_eq!((rig.cloud.create_count(), rig.cloud.ids().len()), (2, 1));
}

#[tokio::test]
async fn placement_that_keeps_failing_ends_in_an_error() {
    let policy = dtma_provisioner::reconcile::plan::Policy { max_tries: 1, ..policy() };
    let rig = Rig::with(Wishes { policy, ..Wishes::default() }, nothing).await;
    rig.cloud.next_creates([Create::PlacementFails]);
    let (status, answer) = rig.ensure("agent-1", 10).await;
    assert_eq!((status, answer["code"].as_str()), (503, Some("placement_failed")), "{answer}");
}

#[tokio::test]
async fn looks_that_fail_change_nothing() {
    let rig = Rig::start().await;
    rig.cloud.fail_looks(10);
    rig.ensure("agent-1", 0).await;
    rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    assert_eq!((rig.cloud.create_count(), rig.cloud.ids().len()), (1, 1));
}

#[tokio::test]
async fn many_environments_at_once_share_lists_and_all_come_up() {
    let rig = Rig::start().await;
    rig.cloud.lists_lag(2);
    for agent in 0..12 {
        rig.ensure(&format!("agent-{agent}"), 0).await;
    }
    for agent in 0..12 {
        rig.until_status(&format!("agent-{agent}"), EnvironmentStatus::AwaitingHeartbeat).await;
    }
    assert_eq!((rig.cloud.create_count(), rig.cloud.ids().len()), (12, 12));
}

#[tokio::test]
async fn without_a_release_the_answer_says_so_and_nothing_is_created() {
    let rig = Rig::with(Wishes { release: false, ..Wishes::default() }, nothing).await;
    let (status, answer) = rig.ensure("agent-1", 10).await;
    assert_eq!((status, answer["code"].as_str()), (503, Some("no_release")), "{answer}");
    assert_eq!(rig.cloud.create_count(), 0);
    let (status, ready) = rig.internal("GET", "/ready", None).await;
    assert_eq!(status, 503);
    assert!(ready["reasons"][0].as_str().unwrap().contains("RELEASES_DIR"), "{ready}");
}

#[tokio::test]
async fn an_agent_that_never_reports_is_an_error_naming_the_last_phase_and_its_droplet_goes() {
    let policy =
        dtma_provisioner::reconcile::plan::Policy { bootstrap_deadline: Duration::from_millis(400), ..policy() };
    let rig = Rig::with(Wishes { policy, ..Wishes::default() }, nothing).await;
    rig.ensure("agent-1", 0).await;
    rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    let (status, _) =
        rig.agent("bootstrap-progress", &rig.token(), json!({"phase": "docker", "outcome": "begun"})).await;
    assert_eq!(status, 204);
    let (status, answer) = rig.ensure("agent-1", 10).await;
    assert_eq!((status, answer["code"].as_str()), (502, Some("bootstrap_timeout")), "{answer}");
    assert_eq!(answer["data"]["error"]["phase"], "docker");
    rig.until("agent-1", |_, cloud| cloud.ids().is_empty()).await;
}

#[tokio::test]
async fn a_failed_set_up_says_where_and_how_and_ensure_begins_afresh() {
    let rig = Rig::start().await;
    rig.ensure("agent-1", 0).await;
    rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    let old = rig.token();
    let report = json!({"phase": "download", "outcome": "failed", "output": "curl: (22) 404\n"});
    assert_eq!(rig.agent("bootstrap-progress", &old, report.clone()).await.0, 204);
    rig.until("agent-1", |environment, cloud| environment.failed() && cloud.ids().is_empty()).await;
    let (status, answer) = rig.get("agent-1").await;
    assert_eq!(
        (status, answer["success"].as_bool(), answer["code"].as_str()),
        (200, Some(false), Some("bootstrap_failed"))
    );
    assert_eq!(answer["data"]["error"]["phase"], "download");
    assert_eq!(answer["data"]["error"]["output"], "curl: (22) 404\n");

    rig.ensure("agent-1", 0).await;
    let environment = rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    assert_eq!(rig.cloud.ids(), [environment.state.droplet().unwrap().0]);
    // The failed droplet's token is worth nothing any more, the new one's is.
    assert_eq!(rig.enrol(&old, "retry-key-retry-key", b"key").await.0, 401);
    assert_eq!(rig.agent("bootstrap-progress", &old, report).await.0, 401);
    rig.boot().await;
    rig.until_status("agent-1", EnvironmentStatus::Active).await;
}

#[tokio::test]
async fn a_silent_agent_is_unresponsive_until_it_reports_again() {
    let pace = Pace { unresponsive_after: Duration::from_millis(100), ..pace() };
    let rig = Rig::with(Wishes { pace, ..Wishes::default() }, nothing).await;
    let (_, bearer) = rig.active("agent-1").await;
    let silent = rig.until_status("agent-1", EnvironmentStatus::Unresponsive).await;
    assert_eq!(silent.error().unwrap().code, "heartbeat_missing");
    assert_eq!(rig.agent("heartbeat", &bearer, heartbeat()).await.0, 204);
    // Back, though perhaps only for a moment: the events tell.
    let events = rig.store.events(silent.id, silent.run, 0).await.unwrap();
    let statuses: Vec<_> = events.iter().map(|(_, event)| event.status).collect();
    let back = statuses.windows(2).any(|two| two == [EnvironmentStatus::Unresponsive, EnvironmentStatus::Active]);
    assert!(back, "{statuses:?}");
}

#[tokio::test]
async fn a_droplet_deleted_behind_our_back_is_noticed_once_its_agent_is_silent() {
    let pace = Pace { unresponsive_after: Duration::from_millis(100), ..pace() };
    let rig = Rig::with(Wishes { pace, ..Wishes::default() }, nothing).await;
    rig.active("agent-1").await;
    let environment = rig.until_status("agent-1", EnvironmentStatus::Unresponsive).await;
    rig.cloud.remove(environment.state.droplet().unwrap());
    let gone = rig.until_status("agent-1", EnvironmentStatus::ErrorProvisioning).await;
    assert_eq!(gone.error().unwrap().code, "droplet_gone");
    rig.ensure("agent-1", 0).await;
    rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    assert_eq!(rig.cloud.ids().len(), 1);
}
