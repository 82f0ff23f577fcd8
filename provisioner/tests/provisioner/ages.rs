//! Agents of other versions than the provisioner's: what they were recorded to say, byte by byte, and what a later one might.

use axum::body::Body;
use axum::http::Request;
use dtma_api::environment::EnvironmentStatus;
use serde_json::{Value, json};

use super::rig::{Rig, json_of};

/// With the generation that agents of this rig have, everything else as recorded.
async fn post(rig: &Rig, path: &str, bearer: &str, body: &str) -> (u16, Value) {
    let request = Request::post(format!("/agent/v1/{path}")).header("authorization", format!("Bearer {bearer}"));
    json_of(rig.send(request.body(Body::from(body.to_owned())).unwrap()).await).await
}

#[tokio::test]
async fn heartbeats_of_every_age_are_kept_whole_and_answered_with_what_every_age_understands() {
    let rig = Rig::start().await;
    let (id, bearer) = rig.active("agent-1").await;
    for recorded in [
        include_str!("recorded/heartbeat-first.json"),
        include_str!("recorded/heartbeat-before-updates.json"),
        include_str!("recorded/heartbeat-today.json"),
        include_str!("recorded/heartbeat-future.json"),
    ] {
        let (status, answer) = post(&rig, "heartbeat", &bearer, recorded).await;
        // It has older settings than this provisioner gives out, and says so in the same way at any age.
        assert_eq!((status, answer["settings"]["generation"].as_u64()), (200, Some(2)), "{answer}");
        assert_eq!(answer["desired_version"], Value::Null);
        let (_, seen) = rig.internal("GET", &format!("/internal/environments/{id}"), None).await;
        let said: Value = serde_json::from_str(recorded).unwrap();
        assert_eq!(seen["heartbeat"]["report"], said);
        assert_eq!(seen["data"]["status"], "active");
    }
}

#[tokio::test]
async fn droplets_of_every_age_are_set_up_and_enrol() {
    for (progress, enrolment) in [
        (include_str!("recorded/progress-today.json"), include_str!("recorded/enrolment-today.json")),
        (include_str!("recorded/progress-future.json"), include_str!("recorded/enrolment-future.json")),
    ] {
        let rig = Rig::start().await;
        rig.ensure("agent-1", 0).await;
        rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
        let token = rig.token();
        for report in serde_json::from_str::<Vec<Value>>(progress).unwrap() {
            assert_eq!(post(&rig, "bootstrap-progress", &token, &report.to_string()).await, (204, Value::Null));
        }
        let (status, answer) = post(&rig, "enroll", &token, enrolment).await;
        assert_eq!(status, 200, "{answer}");
        let bearer = answer["bearer_token"].as_str().unwrap();
        let future = include_str!("recorded/heartbeat-future.json");
        assert_eq!(post(&rig, "heartbeat", bearer, future).await.0, 200);
        rig.until_status("agent-1", EnvironmentStatus::Active).await;
    }
}

#[tokio::test]
async fn what_isnt_a_report_at_all_is_refused_whoever_says_it() {
    let rig = Rig::start().await;
    let (_, bearer) = rig.active("agent-1").await;
    for body in ["", "[]", "{\"dtma_version\": 1}", "{\"tool_statuses\": []}"] {
        let (status, answer) = post(&rig, "heartbeat", &bearer, body).await;
        assert_eq!((status, answer["code"].as_str()), (400, Some("invalid_json")), "{body}");
    }
    let report = json!({"phase": "network", "outcome": 7});
    assert_eq!(post(&rig, "bootstrap-progress", &rig.token(), &report.to_string()).await.0, 400);
}
