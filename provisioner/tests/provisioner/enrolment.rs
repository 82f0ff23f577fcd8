//! Enrolment, heartbeats and releases as droplets see them.

use axum::body::Body;
use axum::http::Request;
use dtma_api::environment::EnvironmentStatus;
use http_body_util::BodyExt;
use serde_json::json;

use super::rig::{FLEET_KEY, Rig, heartbeat};

#[tokio::test]
async fn a_token_admits_one_agent_once_and_that_one_again_when_the_answer_was_lost() {
    let rig = Rig::start().await;
    rig.ensure("agent-1", 0).await;
    rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    let token = rig.token();
    let (status, first) = rig.enrol(&token, "retry-key-retry-key", b"key").await;
    assert_eq!(status, 200, "{first}");
    assert_eq!(first["settings"]["caller_key_sha256s"][0], dtma_api::TokenHash::of(FLEET_KEY).to_string());
    let (status, second) = rig.enrol(&token, "retry-key-retry-key", b"key").await;
    assert_eq!(status, 200, "{second}");
    // Whichever answer arrived, it works.
    for answer in [&first, &second] {
        let bearer = answer["bearer_token"].as_str().unwrap();
        assert_eq!(rig.agent("heartbeat", bearer, heartbeat()).await.0, 204);
    }
    for (retry_key, key) in [("another-key-another", b"key"), ("retry-key-retry-key", b"yek")] {
        let (status, refused) = rig.enrol(&token, retry_key, key).await;
        assert_eq!((status, refused["code"].as_str()), (401, Some("token_used")));
    }
    let (status, refused) = rig.enrol("nonsense", "retry-key-retry-key", b"key").await;
    assert_eq!((status, refused["code"].as_str()), (401, Some("token_unknown")));
    let view = rig.get("agent-1").await.1;
    assert_eq!(view["data"]["status"], "active");
}

#[tokio::test]
async fn what_is_stored_holds_no_token_that_works() {
    let rig = Rig::start().await;
    let (_, bearer) = rig.active("agent-1").await;
    let token = rig.token();
    let mut stored = Vec::new();
    for file in std::fs::read_dir(rig.folder.path()).unwrap() {
        let path = file.unwrap().path();
        if path.is_file() {
            stored.extend(std::fs::read(path).unwrap());
        }
    }
    for secret in [token, bearer] {
        assert!(!stored.windows(secret.len()).any(|window| window == secret.as_bytes()));
    }
}

#[tokio::test]
async fn an_agent_may_report_before_the_cloud_says_that_its_droplet_is_up() {
    let rig = Rig::start().await;
    rig.cloud.fail_looks(30);
    rig.ensure("agent-1", 0).await;
    rig.until("agent-1", |_, cloud| !cloud.ids().is_empty()).await;
    rig.boot().await;
    let environment = rig.until_status("agent-1", EnvironmentStatus::Active).await;
    assert_eq!(rig.cloud.ids(), [environment.state.droplet().unwrap().0]);
}

#[tokio::test]
async fn heartbeats_are_kept_and_answered_with_newer_settings() {
    let rig = Rig::start().await;
    let (id, bearer) = rig.active("agent-1").await;
    let mut report = heartbeat();
    report["settings_generation"] = json!(1);
    report["dtma_version"] = json!("9.9.9");
    let (status, answer) = rig.agent("heartbeat", &bearer, report).await;
    assert_eq!((status, answer["settings"]["generation"].as_u64()), (200, Some(2)), "{answer}");
    let (_, seen) = rig.internal("GET", &format!("/internal/environments/{id}"), None).await;
    assert_eq!(seen["heartbeat"]["report"]["dtma_version"], "9.9.9");

    let (status, answer) = rig.agent("heartbeat", &bearer, json!({"nonsense": 1})).await;
    assert_eq!((status, answer["code"].as_str()), (400, Some("invalid_json")));
    let (status, answer) = rig.agent("heartbeat", "not-a-bearer", heartbeat()).await;
    assert_eq!((status, answer["code"].as_str()), (401, Some("bearer_unknown")));
    let (status, answer) = rig.agent("fetch-tool-secrets", &bearer, json!({})).await;
    assert_eq!((status, answer["code"].as_str()), (501, Some("tool_secrets_not_served")));
}

#[tokio::test]
async fn a_burst_of_heartbeats_is_all_kept() {
    let rig = std::sync::Arc::new(Rig::start().await);
    let (_, bearer) = rig.active("agent-1").await;
    let sends: Vec<_> = (0..200)
        .map(|_| {
            let (rig, bearer) = (std::sync::Arc::clone(&rig), bearer.clone());
            tokio::spawn(async move { rig.agent("heartbeat", &bearer, heartbeat()).await.0 })
        })
        .collect();
    for send in sends {
        assert_eq!(send.await.unwrap(), 204);
    }
    let request = Request::get("/metrics").header("authorization", format!("Bearer {}", super::rig::SECRET));
    let page = rig.send(request.body(Body::empty()).unwrap()).await.into_body().collect().await.unwrap().to_bytes();
    let page = String::from_utf8(page.to_vec()).unwrap();
    let value = |name: &str| -> u64 {
        let line = page.lines().find(|line| line.starts_with(name) && !line.starts_with('#')).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert_eq!(value("dtma_heartbeats_total"), 201);
    assert!(value("dtma_heartbeat_flushes_total") < 201, "{page}");
    assert_eq!(value("dtma_environments{status=\"active\"}"), 1);
}

#[tokio::test]
async fn a_release_is_served_to_anybody_and_nothing_beside_it() {
    let rig = Rig::start().await;
    let get = async |path: &str| {
        let response = rig.send(Request::get(path).body(Body::empty()).unwrap()).await;
        (response.status().as_u16(), response.into_body().collect().await.unwrap().to_bytes())
    };
    let (status, body) = get("/agent/v1/releases/1.2.3/dtma-agent-1.2.3-x86_64-linux-gnu.tar.gz").await;
    assert_eq!((status, body.as_ref()), (200, b"archive".as_slice()));
    for path in
        ["1.2.3/..%2f..%2fdb.sqlite", "..%2f/db.sqlite", "1.2.3/other", "%2e%2e/db.sqlite", "channels/stable.json"]
    {
        assert_eq!(get(&format!("/agent/v1/releases/{path}")).await.0, 404, "{path}");
    }
}

#[tokio::test]
async fn channels_are_served_and_a_cache_asks_whether_they_are_still_true() {
    let rig = Rig::start().await;
    let channels = rig.folder.path().join("releases/channels");
    std::fs::create_dir(&channels).unwrap();
    std::fs::write(channels.join("stable.json"), "{}").unwrap();
    let request = || Request::get("/agent/v1/releases/channels/stable.json");
    let first = rig.send(request().body(Body::empty()).unwrap()).await;
    assert_eq!((first.status().as_u16(), &first.headers()["cache-control"]), (200, &"no-cache".parse().unwrap()));
    assert_eq!(first.headers()["content-type"], "application/json");
    let tag = first.headers()["etag"].clone();
    let again = rig.send(request().header("if-none-match", &tag).body(Body::empty()).unwrap()).await;
    assert_eq!(again.status(), 304);
    std::fs::write(channels.join("stable.json"), "{ }").unwrap();
    let other = rig.send(request().header("if-none-match", &tag).body(Body::empty()).unwrap()).await;
    assert_eq!(other.status(), 200);
}
