//! DigitalOcean's API as its callers meet it, over a host that only remembers.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use jiff::SignedDuration;
use local_cloud::droplet::{DropletId, Lag, Status};
use local_cloud::limits::Limits;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use support::{Setup, TestCloud, ids, order};

fn lagging() -> Setup {
    let lag = Lag { list: SignedDuration::from_millis(1_000), address: SignedDuration::from_millis(300) };
    Setup { lag, ..Setup::default() }
}

#[tokio::test]
async fn a_droplet_is_new_then_active_then_has_an_address() {
    let cloud = TestCloud::start(lagging()).await;
    cloud.host.open(false);
    let (status, created) = cloud.post("/v2/droplets", order("web-1", &["fleet"])).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    assert_eq!(created["droplet"]["status"], "new");
    assert_eq!(created["droplet"]["networks"]["v4"], json!([]));
    let link = created["links"]["actions"][0].clone();
    assert_eq!(link["rel"], "create");
    let action = format!("/v2/actions/{}", link["id"]);
    assert_eq!(link["href"], format!("http://{}{action}", cloud.address));
    assert_eq!(cloud.get(&action).await["action"]["status"], "in-progress");

    cloud.host.open(true);
    cloud.cloud.settled().await;
    let path = format!("/v2/droplets/{}", created["droplet"]["id"]);
    let droplet = cloud.get(&path).await["droplet"].clone();
    assert_eq!((&droplet["status"], &droplet["networks"]["v4"]), (&json!("active"), &json!([])));
    assert_eq!(cloud.get(&action).await["action"]["status"], "completed");
    cloud.advance(300);
    let networks = cloud.get(&path).await["droplet"]["networks"]["v4"].clone();
    let public: Vec<_> = networks.as_array().unwrap().iter().filter(|network| network["type"] == "public").collect();
    assert_eq!(public.len(), 1);
    assert_eq!(public[0]["ip_address"], "10.0.0.10");
    cloud.assert_contract_kept().await;
}

#[tokio::test]
async fn lists_lag_behind_a_creation_but_the_id_works_at_once() {
    let cloud = TestCloud::start(lagging()).await;
    let id = cloud.droplet("web-1", &["fleet"]).await;
    for list in ["/v2/droplets", "/v2/droplets?tag_name=fleet", "/v2/droplets?name=web-1"] {
        assert_eq!(cloud.get(list).await["droplets"], json!([]), "{list}");
    }
    assert_eq!(cloud.get(&format!("/v2/droplets/{id}")).await["droplet"]["id"], id);
    cloud.advance(1_000);
    for list in ["/v2/droplets", "/v2/droplets?tag_name=fleet", "/v2/droplets?name=web-1"] {
        assert_eq!(ids(&cloud.get(list).await["droplets"]), [id], "{list}");
    }
    assert_eq!(cloud.get("/v2/droplets?tag_name=other").await["droplets"], json!([]));
}

#[tokio::test]
async fn every_droplet_is_seen_once_by_following_the_links() {
    let cloud = TestCloud::start(Setup::default()).await;
    let mut all = order("ignored", &["fleet"]);
    all.as_object_mut().unwrap().remove("name");
    all["names"] = json!(["a", "b", "c", "d", "e"]);
    let (status, created) = cloud.post("/v2/droplets", all).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    assert_eq!(created["links"]["actions"].as_array().unwrap().len(), 5);
    let mut seen = vec![];
    let mut next = Some("/v2/droplets?tag_name=fleet&per_page=2".to_owned());
    while let Some(path) = next {
        let page = cloud.get(&path).await;
        assert_eq!(page["meta"]["total"], 5);
        seen.extend(ids(&page["droplets"]));
        let link = page["links"]["pages"]["next"].as_str();
        next = link.map(|link| link.replace(&format!("http://{}", cloud.address), ""));
    }
    assert_eq!(seen, ids(&created["droplets"]));
    cloud.assert_contract_kept().await;
}

#[tokio::test]
async fn only_the_right_token_gets_in() {
    let cloud = TestCloud::start(Setup::default()).await;
    let url = format!("http://{}/v2/account", cloud.address);
    for token in [None, Some("another")] {
        let mut request = reqwest::Client::new().get(&url);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        let request_id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
        let body: Value = response.json().await.unwrap();
        assert_eq!(
            body,
            json!({"id": "unauthorized", "message": "Unable to authenticate you.", "request_id": request_id})
        );
    }
    let control = reqwest::get(format!("http://{}/control/requests", cloud.address)).await.unwrap();
    assert_eq!(control.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn errors_have_digitaloceans_shape() {
    let cloud = TestCloud::start(Setup { droplet_limit: 1, ..Setup::default() }).await;
    let mut wrong_size = order("web", &[]);
    wrong_size["size"] = json!("s-huge");
    let cases = [
        (Method::GET, "/v2/droplets/12", None, 404, "not_found"),
        (Method::GET, "/v2/droplets/nonsense", None, 404, "not_found"),
        (Method::DELETE, "/v2/droplets/12", None, 404, "not_found"),
        (Method::GET, "/v2/nothing", None, 404, "not_found"),
        (Method::PATCH, "/v2/droplets", None, 404, "not_found"),
        (Method::POST, "/v2/droplets", Some(wrong_size), 422, "unprocessable_entity"),
        (Method::POST, "/v2/droplets", Some(json!([])), 400, "bad_request"),
        (Method::GET, "/v2/droplets?name=a&tag_name=b", None, 400, "bad_request"),
        (Method::DELETE, "/v2/droplets", None, 422, "unprocessable_entity"),
        (Method::POST, "/v2/droplets/12/actions", Some(json!({"type": "reboot"})), 404, "not_found"),
    ];
    for (method, path, body, status, id) in cases {
        let (got, error) = cloud.call(method.clone(), path, body).await;
        assert_eq!((got.as_u16(), &error["id"]), (status, &json!(id)), "{method} {path}: {error}");
        assert!(error["message"].is_string() && error["request_id"].is_string(), "{error}");
    }
    cloud.droplet("first", &[]).await;
    let (status, error) = cloud.post("/v2/droplets", order("second", &[])).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(error["message"], "creating this/these droplet(s) will exceed your droplet limit");
}

#[tokio::test]
async fn a_deleted_droplet_is_shown_until_it_is_gone_and_may_be_deleted_twice() {
    let cloud = TestCloud::start(Setup::default()).await;
    let id = cloud.droplet("web", &[]).await;
    let path = format!("/v2/droplets/{id}");
    cloud.host.open(false);
    assert_eq!(cloud.call(Method::DELETE, &path, None).await.0, StatusCode::NO_CONTENT);
    assert_eq!(cloud.get(&path).await["droplet"]["locked"], true);
    assert_eq!(cloud.call(Method::DELETE, &path, None).await.0, StatusCode::NO_CONTENT);
    cloud.host.open(true);
    cloud.cloud.settled().await;
    assert_eq!(cloud.call(Method::GET, &path, None).await.0, StatusCode::NOT_FOUND);
    assert_eq!(cloud.call(Method::DELETE, &path, None).await.0, StatusCode::NOT_FOUND);
    assert!(cloud.host.droplets.lock().unwrap().is_empty());
    cloud.assert_contract_kept().await;
}

#[tokio::test]
async fn a_droplet_deleted_while_new_is_made_and_then_removed() {
    let cloud = TestCloud::start(Setup::default()).await;
    cloud.host.open(false);
    let (_, created) = cloud.post("/v2/droplets", order("web", &["fleet"])).await;
    let id = created["droplet"]["id"].as_u64().unwrap();
    let deleted = cloud.call(Method::DELETE, "/v2/droplets?tag_name=fleet", None).await;
    assert_eq!(deleted.0, StatusCode::NO_CONTENT);
    cloud.host.open(true);
    cloud.cloud.settled().await;
    assert_eq!(*cloud.host.done.lock().unwrap(), [format!("create {id}"), format!("remove {id}")]);
    assert_eq!(cloud.call(Method::GET, &format!("/v2/droplets/{id}"), None).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_host_that_cannot_delete_keeps_the_droplet_deletable() {
    let cloud = TestCloud::start(Setup::default()).await;
    let id = cloud.droplet("web", &[]).await;
    let path = format!("/v2/droplets/{id}");
    *cloud.host.broken.lock().unwrap() = true;
    cloud.call(Method::DELETE, &path, None).await;
    cloud.cloud.settled().await;
    assert_eq!(cloud.get(&path).await["droplet"]["locked"], false);
    *cloud.host.broken.lock().unwrap() = false;
    cloud.call(Method::DELETE, &path, None).await;
    cloud.cloud.settled().await;
    assert_eq!(cloud.call(Method::GET, &path, None).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn actions_change_the_power_one_at_a_time() {
    let cloud = TestCloud::start(Setup::default()).await;
    let id = cloud.droplet("web", &["fleet"]).await;
    let actions = format!("/v2/droplets/{id}/actions");
    let act = async |kind: &str| cloud.post(&actions, json!({"type": kind})).await;
    cloud.host.open(false);
    let (status, begun) = act("power_off").await;
    assert_eq!((status, &begun["action"]["status"]), (StatusCode::CREATED, &json!("in-progress")));
    let (status, error) = act("reboot").await;
    assert_eq!(
        (status, &error["message"]),
        (StatusCode::UNPROCESSABLE_ENTITY, &json!("Droplet already has a pending event."))
    );
    cloud.host.open(true);
    cloud.cloud.settled().await;
    assert_eq!(cloud.get(&format!("/v2/droplets/{id}")).await["droplet"]["status"], "off");
    for kind in ["power_on", "reboot", "power_cycle", "shutdown"] {
        assert_eq!(act(kind).await.0, StatusCode::CREATED, "{kind}");
        cloud.cloud.settled().await;
    }
    let done = cloud.host.done.lock().unwrap().join(" ").replace(&format!(" {id}"), "");
    assert_eq!(done, "create cut on shutdown on cut on shutdown");
    assert_eq!(act("snapshot").await.0, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(act("create").await.0, StatusCode::UNPROCESSABLE_ENTITY);
    let (status, tagged) = cloud.post("/v2/droplets/actions?tag_name=fleet", json!({"type": "power_on"})).await;
    assert_eq!((status, tagged["actions"].as_array().unwrap().len()), (StatusCode::CREATED, 1));
    cloud.cloud.settled().await;
    let listed = cloud.get(&actions).await;
    assert_eq!(listed["meta"]["total"], 7);
    assert_eq!((&listed["actions"][0]["type"], &listed["actions"][6]["type"]), (&json!("power_on"), &json!("create")));
}

#[tokio::test]
async fn an_action_the_host_fails_at_ends_errored() {
    let cloud = TestCloud::start(Setup::default()).await;
    let id = cloud.droplet("web", &[]).await;
    *cloud.host.broken.lock().unwrap() = true;
    let (_, begun) = cloud.post(&format!("/v2/droplets/{id}/actions"), json!({"type": "power_cycle"})).await;
    cloud.cloud.settled().await;
    let action = cloud.get(&format!("/v2/droplets/{id}/actions/{}", begun["action"]["id"])).await;
    assert_eq!(action["action"]["status"], "errored");
    assert_eq!(cloud.get(&format!("/v2/droplets/{id}")).await["droplet"]["status"], "active");
}

#[tokio::test]
async fn tags_are_made_put_on_and_taken_off() {
    let cloud = TestCloud::start(Setup::default()).await;
    let id = cloud.droplet("web", &["given"]).await;
    let (status, made) = cloud.post("/v2/tags", json!({"name": "extra:1"})).await;
    assert_eq!((status, &made["tag"]["resources"]["count"]), (StatusCode::CREATED, &json!(0)));
    let resources = json!({"resources": [{"resource_id": id.to_string(), "resource_type": "droplet"}]});
    let path = "/v2/tags/extra:1/resources";
    assert_eq!(cloud.post(path, resources.clone()).await.0, StatusCode::NO_CONTENT);
    assert_eq!(cloud.get("/v2/tags/extra:1").await["tag"]["resources"]["droplets"]["count"], 1);
    assert_eq!(ids(&cloud.get("/v2/droplets?tag_name=extra:1").await["droplets"]), [id]);
    assert_eq!(cloud.call(Method::DELETE, path, Some(resources.clone())).await.0, StatusCode::NO_CONTENT);
    assert_eq!(cloud.get("/v2/droplets?tag_name=extra:1").await["meta"]["total"], 0);
    assert_eq!(cloud.get("/v2/tags").await["meta"]["total"], 2);
    assert_eq!(cloud.call(Method::DELETE, "/v2/tags/extra:1", None).await.0, StatusCode::NO_CONTENT);
    assert_eq!(cloud.call(Method::GET, "/v2/tags/extra:1", None).await.0, StatusCode::NOT_FOUND);
    assert_eq!(cloud.post(path, resources).await.0, StatusCode::NOT_FOUND);
    cloud.assert_contract_kept().await;
    let (status, error) = cloud.post("/v2/tags", json!({"name": "no spaces"})).await;
    assert_eq!((status, error["root_causes"].is_array()), (StatusCode::BAD_REQUEST, true));
}

#[tokio::test]
async fn a_burst_is_refused_with_the_time_to_wait_and_every_answer_counts_down() {
    let cloud = TestCloud::start(Setup { limits: Limits { hour: 100, minute: 2 }, ..Setup::default() }).await;
    let first = cloud.send(Method::GET, "/v2/account", None).await;
    assert_eq!(
        (&first.headers()["ratelimit-limit"], &first.headers()["ratelimit-remaining"]),
        (&"100".parse().unwrap(), &"99".parse().unwrap())
    );
    cloud.get("/v2/account").await;
    let third = cloud.send(Method::GET, "/v2/account", None).await;
    assert_eq!(third.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(third.headers()["retry-after"], "60");
    assert_eq!(third.json::<Value>().await.unwrap()["id"], "too_many_requests");
    cloud.advance(60_000);
    cloud.get("/v2/account").await;
    cloud.assert_contract_kept().await;
}

#[tokio::test]
async fn a_cloud_started_anew_finds_its_droplets() {
    let before = TestCloud::start(Setup::default()).await;
    let id = before.droplet("web", &["fleet"]).await;
    before.post(&format!("/v2/droplets/{id}/actions"), json!({"type": "power_off"})).await;
    before.cloud.settled().await;
    let after = TestCloud::start_on(before.host.clone(), lagging()).await;
    let found = after.get("/v2/droplets?tag_name=fleet").await["droplets"][0].clone();
    assert_eq!((&found["id"], &found["name"], &found["status"]), (&json!(id), &json!("web"), &json!("off")));
    assert_eq!(found["networks"]["v4"][1]["ip_address"], "10.0.0.10");
    assert!(after.droplet("another", &[]).await > id);
}

#[tokio::test]
async fn tags_given_and_taken_later_are_known_to_a_cloud_started_anew() {
    let before = TestCloud::start(Setup::default()).await;
    let id = before.droplet("web", &["fleet", "gone"]).await;
    before.post("/v2/tags", json!({"name": "later"})).await;
    let resources = json!({"resources": [{"resource_id": id.to_string(), "resource_type": "droplet"}]});
    before.post("/v2/tags/later/resources", resources).await;
    before.call(Method::DELETE, "/v2/tags/gone", None).await;
    before.cloud.settled().await;
    let after = TestCloud::start_on(before.host.clone(), Setup::default()).await;
    assert_eq!(after.get(&format!("/v2/droplets/{id}")).await["droplet"]["tags"], json!(["fleet", "later"]));
    assert_eq!(ids(&after.get("/v2/droplets?tag_name=later").await["droplets"]), [id]);
}

#[tokio::test]
async fn a_droplet_that_reboots_itself_comes_back_and_one_that_powers_itself_off_is_off() {
    let cloud = TestCloud::start(Setup::default()).await;
    let id = DropletId(cloud.droplet("web", &[]).await);
    let path = format!("/v2/droplets/{id}");
    cloud.host.end(id, true);
    until(|| cloud.host.runs(id)).await;
    assert_eq!(cloud.get(&path).await["droplet"]["status"], "active");
    assert_eq!(cloud.get("/v2/actions").await["actions"].as_array().unwrap().len(), 1, "nobody asked for it");

    cloud.host.end(id, false);
    until(|| cloud.cloud.ledger().droplet(id).unwrap().status() == Status::Off).await;
    assert_eq!(cloud.get(&path).await["droplet"]["status"], "off");
    assert!(!cloud.host.runs(id));
    let (status, _) = cloud.post(&format!("{path}/actions"), json!({"type": "power_on"})).await;
    assert_eq!(status, StatusCode::CREATED);
    cloud.cloud.settled().await;
    assert!(cloud.host.runs(id));
}

#[tokio::test]
async fn a_droplet_that_rebooted_while_there_was_no_cloud_is_started_by_the_next() {
    let before = TestCloud::start(Setup::default()).await;
    let id = DropletId(before.droplet("web", &[]).await);
    before.host.end_unseen(id, true);
    let next = TestCloud::start_on(before.host.clone(), Setup::default()).await;
    until(|| next.host.runs(id)).await;
    assert_eq!(next.get(&format!("/v2/droplets/{id}")).await["droplet"]["status"], "active");
}

/// Waits, a few seconds at most, for what other tasks bring about.
async fn until(reached: impl Fn() -> bool) {
    let turns = async {
        while !reached() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), turns).await.unwrap();
}
