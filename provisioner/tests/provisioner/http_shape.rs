//! What every answer has in common: JSON, a request id, cross-origin headers, and no way in without the secret.

use axum::body::Body;
use axum::http::Request;
use dtma_api::environment::EnvironmentStatus;
use http_body_util::BodyExt;
use serde_json::{Value, json};

use super::rig::{Rig, SECRET, json_of};

#[tokio::test]
async fn without_the_secret_nothing_internal_answers() {
    let rig = Rig::start().await;
    for (method, path) in [
        ("POST", "/internal/agents/a/ensure-tool-environment"),
        ("GET", "/internal/agents/a/tool-environment"),
        ("DELETE", "/internal/agents/a/tool-environment"),
        ("GET", "/internal/agents/a/tool-environment/events"),
        ("GET", "/internal/environments"),
        ("GET", "/internal/environments/x"),
        ("PUT", "/internal/environments/x/updates"),
        ("POST", "/internal/rollouts"),
        ("GET", "/internal/rollouts"),
        ("GET", "/internal/rollouts/x"),
        ("POST", "/internal/rollouts/x/pause"),
        ("POST", "/internal/rollouts/x/resume"),
        ("POST", "/internal/rollouts/x/abort"),
        ("GET", "/metrics"),
    ] {
        for secret in [None, Some("wrong"), Some("")] {
            let mut request = Request::builder().method(method).uri(path);
            if let Some(secret) = secret {
                request = request.header("X-Internal-Api-Secret", secret);
            }
            let (status, body) = json_of(rig.send(request.body(Body::empty()).unwrap()).await).await;
            assert_eq!(status, 403, "{method} {path}");
            assert_eq!(body["success"], false);
            assert!(body["error"].is_string());
        }
    }
    assert_eq!(rig.cloud.create_count(), 0);
}

#[tokio::test]
async fn every_failure_is_json_that_says_what_is_wrong() {
    let rig = Rig::start().await;
    let ensure = "/internal/agents/a/ensure-tool-environment";
    let long = "x".repeat(300_000);
    for (method, path, body, status, code) in [
        ("GET", "/nowhere", "", 404, "not_found"),
        ("PATCH", "/health", "", 405, "method_not_allowed"),
        ("PUT", "/internal/environments", "", 405, "method_not_allowed"),
        ("POST", "/internal/agents/a%2Fb/ensure-tool-environment", "", 400, "invalid_id"),
        ("POST", &format!("/internal/agents/{}/ensure-tool-environment", "a".repeat(129)), "", 400, "invalid_id"),
        ("POST", ensure, "{", 400, "invalid_json"),
        ("POST", ensure, "{\"userId\": 7}", 400, "invalid_json"),
        ("POST", ensure, "{\"userId\": \"a/b\"}", 400, "invalid_json"),
        ("POST", ensure, "{\"region\": \"nyc 3\", \"size\": \"\"}", 400, "invalid_request"),
        ("POST", ensure, &long, 413, "body_too_large"),
        ("POST", &format!("{ensure}?wait=soon"), "", 400, "invalid_query"),
        ("GET", "/internal/agents/a/tool-environment", "", 404, "environment_not_found"),
        ("GET", "/internal/agents/a/tool-environment/events", "", 404, "environment_not_found"),
        ("GET", "/internal/environments/nonsense", "", 400, "invalid_id"),
        ("GET", "/internal/environments/%ff", "", 400, "invalid_path"),
        ("GET", "/internal/environments?limit=1&limit=2", "", 400, "invalid_query"),
        ("GET", "/internal/environments?status=happy", "", 400, "invalid_query"),
        ("GET", "/internal/environments?limit=0", "", 400, "invalid_query"),
        ("GET", "/internal/environments?after=x", "", 400, "invalid_id"),
        ("POST", "/agent/v1/heartbeat", "{}", 401, "bearer_unknown"),
    ] {
        let request = Request::builder().method(method).uri(path).header("x-internal-api-secret", SECRET);
        let request = if path.starts_with("/agent") { request.header("authorization", "Bearer x") } else { request };
        let (answered, answer) = json_of(rig.send(request.body(Body::from(body.to_owned())).unwrap()).await).await;
        assert_eq!((answered, answer["code"].as_str()), (status, Some(code)), "{method} {path}: {answer}");
        assert_eq!(answer["success"], false);
        assert!(!answer["error"].as_str().unwrap().is_empty());
    }
    let request = Request::post("/agent/v1/enroll").body(Body::empty()).unwrap();
    let (status, answer) = json_of(rig.send(request).await).await;
    assert_eq!((status, answer["code"].as_str()), (401, Some("credential_missing")));
}

#[tokio::test]
async fn all_faults_of_a_body_come_at_once_with_their_places() {
    let rig = Rig::start().await;
    let body = json!({"region": "nyc 3", "size": "s/1"});
    let (_, answer) = rig.internal("POST", "/internal/agents/a/ensure-tool-environment", Some(body)).await;
    let paths: Vec<_> = answer["details"].as_array().unwrap().iter().map(|fault| fault["path"].clone()).collect();
    assert_eq!(paths, ["$.region", "$.size"]);
}

#[tokio::test]
async fn a_request_id_is_kept_or_made() {
    let rig = Rig::start().await;
    let sent = Request::get("/health").header("x-request-id", "caller-7").body(Body::empty()).unwrap();
    assert_eq!(rig.send(sent).await.headers()["x-request-id"], "caller-7");
    for path in ["/health", "/nowhere", "/internal/environments"] {
        let response = rig.send(Request::get(path).body(Body::empty()).unwrap()).await;
        assert_eq!(response.headers()["x-request-id"].len(), 36, "{path}");
        assert_eq!(response.headers()["access-control-allow-origin"], "*");
    }
}

#[tokio::test]
async fn browsers_are_answered_as_before() {
    let rig = Rig::start().await;
    let preflight = Request::options("/internal/agents/a/tool-environment")
        .header("origin", "https://app.example")
        .header("access-control-request-method", "DELETE")
        .header("access-control-request-headers", "x-internal-api-secret,content-type");
    let response = rig.send(preflight.body(Body::empty()).unwrap()).await;
    assert_eq!(response.status(), 204);
    let headers = response.headers();
    assert_eq!(headers["access-control-allow-origin"], "*");
    assert_eq!(headers["access-control-allow-methods"], "GET,HEAD,PUT,PATCH,POST,DELETE");
    assert_eq!(headers["access-control-allow-headers"], "x-internal-api-secret,content-type");
}

#[tokio::test]
async fn the_service_says_what_it_is() {
    let rig = Rig::start().await;
    let (status, root) = rig.internal("GET", "/", None).await;
    assert_eq!((status, root["status"].as_str()), (200, Some("running")));
    assert!(root["endpoints"].as_array().unwrap().iter().any(|line| line == "GET /health"));
    let (status, health) = rig.internal("GET", "/health", None).await;
    assert_eq!((status, health["service"].as_str()), (200, Some("Agentopia Backend")));
    assert_eq!(health["status"], "healthy");
    let (status, ready) = rig.internal("GET", "/ready", None).await;
    assert_eq!((status, ready["agent_version"].as_str()), (200, Some("1.2.3")), "{ready}");
    let (status, openapi) = rig.internal("GET", "/openapi.json", None).await;
    assert_eq!((status, openapi["openapi"].as_str()), (200, Some("3.1.0")));
}

#[tokio::test]
async fn the_fleet_is_listed_in_pages_and_by_status() {
    let rig = Rig::start().await;
    for agent in ["a", "b", "c"] {
        rig.ensure(agent, 0).await;
        rig.until_status(agent, EnvironmentStatus::AwaitingHeartbeat).await;
    }
    rig.delete("b", 10).await;
    let accounts = |answer: &Value| -> Vec<String> {
        answer["data"].as_array().unwrap().iter().map(|row| row["account_id"].as_str().unwrap().to_owned()).collect()
    };
    let (_, first) = rig.internal("GET", "/internal/environments?limit=2", None).await;
    assert_eq!(accounts(&first), ["a", "b"]);
    let next = first["next"].as_str().unwrap();
    let (_, second) = rig.internal("GET", &format!("/internal/environments?limit=2&after={next}"), None).await;
    assert_eq!((accounts(&second), second["next"].is_null()), (vec!["c".to_owned()], true));
    let path = "/internal/environments?status=awaiting_heartbeat,active";
    assert_eq!(accounts(&rig.internal("GET", path, None).await.1), ["a", "c"]);
}

#[tokio::test]
async fn events_tell_the_story_so_far_and_then_go_on_to_the_end() {
    let rig = Rig::start().await;
    rig.ensure("a", 0).await;
    rig.until_status("a", EnvironmentStatus::AwaitingHeartbeat).await;
    let request = Request::get("/internal/agents/a/tool-environment/events").header("x-internal-api-secret", SECRET);
    let response = rig.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let progress = json!({"phase": "docker", "outcome": "begun"});
    rig.agent("bootstrap-progress", &rig.token(), progress).await;
    rig.boot().await;
    rig.delete("a", 10).await;
    // The stream ends with the environment.
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(body.to_vec()).unwrap();
    let events: Vec<Value> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).unwrap())
        .collect();
    let mut statuses: Vec<&str> = events.iter().map(|event| event["status"].as_str().unwrap()).collect();
    statuses.dedup();
    assert_eq!(
        statuses,
        [
            "pending_provision",
            "provisioning",
            "awaiting_heartbeat",
            "active",
            "pending_deprovision",
            "deprovisioning",
            "deprovisioned"
        ]
    );
    assert!(events.iter().any(|event| event["phase"] == "docker"));
    assert!(events.iter().any(|event| event["phase"] == "enrol"));
}
