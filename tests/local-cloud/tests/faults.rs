//! Faults on demand, as a caller suffers them.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod support;

use reqwest::{Method, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use support::{Setup, TOKEN, TestCloud, order};

/// What the wire carries in answer to one request.
async fn raw(cloud: &TestCloud, method: &str, path: &str, body: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect(cloud.address).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: cloud\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A reset is as good an end as a close.
    let _ = stream.read_to_end(&mut answer).await;
    answer
}

#[tokio::test]
async fn a_connection_dropped_after_the_effect_carries_no_byte_and_the_droplet_is_there() {
    let cloud = TestCloud::start(Setup::default()).await;
    cloud.arm("droplets_create", json!({"kind": "drop", "when": "after"}), 1).await;
    let body = order("web", &["attempt:1"]).to_string();
    assert_eq!(raw(&cloud, "POST", "/v2/droplets", &body).await, b"");
    assert_eq!(cloud.get("/v2/droplets?tag_name=attempt:1").await["meta"]["total"], 1);
    assert!(raw(&cloud, "POST", "/v2/droplets", &body).await.starts_with(b"HTTP/1.1 202 "), "the fault is used up");
    let log = cloud.get("/control/requests").await;
    assert_eq!((&log[0]["operation"], &log[0]["status"]), (&json!("droplets_create"), &json!(null)));
    assert_eq!((&log[0]["dropped"], &log[1]["operation"]), (&json!(true), &json!("droplets_list")));
}

#[tokio::test]
async fn a_connection_dropped_before_the_effect_leaves_nothing() {
    let cloud = TestCloud::start(Setup::default()).await;
    cloud.arm("droplets_create", json!({"kind": "drop", "when": "before"}), 2).await;
    for _ in 0..2 {
        assert_eq!(raw(&cloud, "POST", "/v2/droplets", &order("web", &[]).to_string()).await, b"");
    }
    assert_eq!(cloud.get("/v2/droplets").await["meta"]["total"], 0);
}

#[tokio::test]
async fn a_caller_that_hangs_up_has_still_been_heard() {
    let cloud = TestCloud::start(Setup::default()).await;
    cloud.arm("droplets_create", json!({"kind": "delay", "when": "after", "ms": 60_000}), 1).await;
    let request = cloud.request(Method::POST, "/v2/droplets").json(&order("web", &[]));
    let (_, ()) = tokio::join!(
        async { tokio::time::timeout(std::time::Duration::from_millis(200), request.send()).await.unwrap_err() },
        async {}
    );
    assert_eq!(cloud.get("/v2/droplets").await["meta"]["total"], 1);
}

#[tokio::test]
async fn any_operation_can_answer_an_error_and_does_nothing_then() {
    let cloud = TestCloud::start(Setup::default()).await;
    let id = cloud.droplet("web", &[]).await;
    let path = format!("/v2/droplets/{id}");
    cloud.arm("droplets_destroy", json!({"kind": "status", "status": 500}), 1).await;
    cloud.arm("droplets_destroy", json!({"kind": "status", "status": 429}), 1).await;
    let (status, error) = cloud.call(Method::DELETE, &path, None).await;
    assert_eq!((status.as_u16(), &error["id"]), (500, &json!("server_error")));
    let limited = cloud.send(Method::DELETE, &path, None).await;
    assert_eq!((limited.status().as_u16(), &limited.headers()["retry-after"]), (429, &"1".parse().unwrap()));
    cloud.get(&path).await;
    assert_eq!(cloud.call(Method::DELETE, &path, None).await.0, StatusCode::NO_CONTENT);
    cloud.arm("*", json!({"kind": "status", "status": 503}), 9).await;
    assert_eq!(cloud.call(Method::GET, "/v2/regions", None).await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(cloud.get("/control/faults").await[0]["times"], 8);
    assert_eq!(cloud.call(Method::DELETE, "/control/faults", None).await.0, StatusCode::NO_CONTENT);
    cloud.get("/v2/regions").await;
    cloud.assert_contract_kept().await;
}

#[tokio::test]
async fn a_droplet_without_a_place_vanishes_after_it_was_accepted() {
    let cloud = TestCloud::start(Setup::default()).await;
    cloud.arm("droplets_create", json!({"kind": "placement_failure"}), 1).await;
    let mut beyond_ascii = order("emoji", &[]);
    beyond_ascii["user_data"] = json!("#cloud-config\n# \u{1f600}");
    for body in [order("web", &[]), beyond_ascii] {
        let (status, created) = cloud.post("/v2/droplets", body).await;
        assert_eq!(status, StatusCode::ACCEPTED);
        cloud.cloud.settled().await;
        let gone = cloud.call(Method::GET, &format!("/v2/droplets/{}", created["droplet"]["id"]), None).await;
        assert_eq!(gone.0, StatusCode::NOT_FOUND);
        let action = cloud.get(&format!("/v2/actions/{}", created["links"]["actions"][0]["id"])).await;
        assert_eq!(action["action"]["status"], "errored");
    }
    assert!(cloud.host.droplets.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_fault_that_can_never_strike_is_refused() {
    let cloud = TestCloud::start(Setup::default()).await;
    let nonsense = json!({"operation": "droplet_get", "fault": {"kind": "status", "status": 500}});
    let (status, error) = cloud.post("/control/faults", nonsense).await;
    assert_eq!(
        (status, &error["error"]),
        (StatusCode::UNPROCESSABLE_ENTITY, &json!("there is no operation droplet_get"))
    );
}

#[tokio::test]
async fn the_power_switch_the_cable_and_the_console_are_at_hand() {
    let cloud = TestCloud::start(Setup::default()).await;
    let id = cloud.droplet("web", &[]).await;
    let path = format!("/control/droplets/{id}");
    for (what, body) in [
        ("power", json!({"action": "cycle"})),
        ("network", json!({"connected": false})),
        ("network", json!({"connected": true})),
        ("power", json!({"action": "off"})),
    ] {
        assert_eq!(cloud.post(&format!("{path}/{what}"), body).await.0, StatusCode::NO_CONTENT);
    }
    let done = cloud.host.done.lock().unwrap().join(" ").replace(&format!(" {id}"), "");
    assert_eq!(done, "create cut on disconnect connect cut");
    let shown = cloud.get("/control/droplets").await;
    let container = format!("container-{id}");
    assert_eq!(shown, json!([{"id": id, "name": "web", "container": container, "ip": "10.0.0.10", "status": "off"}]));
    let console = cloud.send(Method::GET, &format!("{path}/console"), None).await.text().await.unwrap();
    assert_eq!(console, format!("console of {id}"));
    let unknown = cloud.post("/control/droplets/1/power", json!({"action": "on"})).await;
    assert_eq!(unknown.0, StatusCode::NOT_FOUND);
}
