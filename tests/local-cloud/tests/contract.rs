//! Every operation's answer against DigitalOcean's own description, and the checker against traffic that breaks it.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod support;

use local_cloud::contract::Contract;
use reqwest::Method;
use serde_json::{Value, json};

use support::{Setup, TestCloud, description, order};

#[tokio::test]
async fn every_operation_answers_as_described() {
    if description().is_none() {
        return;
    }
    let cloud = TestCloud::start(Setup::default()).await;
    let id = cloud.droplet("web-1", &["fleet", "attempt:1"]).await;
    let mut many = order("ignored", &["fleet"]);
    many.as_object_mut().unwrap().remove("name");
    many["names"] = json!(["web-2", "web-3"]);
    assert_eq!(cloud.post("/v2/droplets", many).await.0, 202);
    cloud.cloud.settled().await;
    let resources = json!({"resources": [{"resource_id": id.to_string(), "resource_type": "droplet"}]});
    let action = cloud.get("/v2/actions").await["actions"][0]["id"].clone();
    let (get, post, delete) = (Method::GET, Method::POST, Method::DELETE);
    let calls: Vec<(&Method, String, Option<Value>, u16)> = vec![
        (&get, "/v2/account".into(), None, 200),
        (&get, "/v2/account/keys".into(), None, 200),
        (&get, "/v2/regions".into(), None, 200),
        (&get, "/v2/sizes?per_page=2&page=2".into(), None, 200),
        (&get, "/v2/images?type=distribution".into(), None, 200),
        (&get, "/v2/images?private=true".into(), None, 200),
        (&get, "/v2/images/docker-debian-12".into(), None, 200),
        (&get, "/v2/images/129211873".into(), None, 200),
        (&get, "/v2/images/1".into(), None, 404),
        (&get, "/v2/droplets?tag_name=fleet&per_page=1&page=2".into(), None, 200),
        (&get, "/v2/droplets?name=web-2".into(), None, 200),
        (&get, format!("/v2/droplets/{id}"), None, 200),
        (&get, "/v2/droplets/1".into(), None, 404),
        (&get, format!("/v2/droplets/{id}/actions"), None, 200),
        (&get, format!("/v2/actions/{action}"), None, 200),
        (&get, "/v2/actions?per_page=1".into(), None, 200),
        (&get, "/v2/actions/1".into(), None, 404),
        (&post, "/v2/tags".into(), Some(json!({"name": "made"})), 201),
        (&post, "/v2/tags/made/resources".into(), Some(resources.clone()), 204),
        (&get, "/v2/tags/made".into(), None, 200),
        (&get, "/v2/tags".into(), None, 200),
        (&delete, "/v2/tags/made/resources".into(), Some(resources), 204),
        (&delete, "/v2/tags/made".into(), None, 204),
        (&get, "/v2/tags/made".into(), None, 404),
        (&post, format!("/v2/droplets/{id}/actions"), Some(json!({"type": "power_cycle"})), 201),
        (&get, format!("/v2/droplets/{id}"), None, 200),
        (&post, "/v2/droplets/actions?tag_name=fleet".into(), Some(json!({"type": "power_off"})), 201),
        (&delete, format!("/v2/droplets/{id}"), None, 204),
        (&delete, "/v2/droplets?tag_name=fleet".into(), None, 204),
        (&delete, "/v2/droplets/1".into(), None, 404),
    ];
    for (method, path, body, status) in calls {
        let (got, answer) = cloud.call(method.clone(), &path, body).await;
        assert_eq!(got.as_u16(), status, "{method} {path}: {answer}");
    }
    cloud.assert_contract_kept().await;
}

#[tokio::test]
async fn what_a_caller_sends_wrongly_is_held_against_it() {
    if description().is_none() {
        return;
    }
    let cloud = TestCloud::start(Setup::default()).await;
    let mut body = order("web", &[]);
    body["user-data"] = body["user_data"].take();
    cloud.post("/v2/droplets", body).await;
    cloud.call(Method::GET, "/v2/droplets?tag=fleet", None).await;
    let violations = cloud.get("/control/violations").await;
    let found: Vec<_> = violations
        .as_array()
        .unwrap()
        .iter()
        .map(|violation| (violation["sequence"].as_u64().unwrap(), violation["side"].as_str().unwrap()))
        .collect();
    assert!(found.contains(&(1, "request")) && found.contains(&(2, "request")), "{violations:#}");
    assert!(found.iter().all(|(_, side)| *side == "request"), "{violations:#}");
}

#[test]
fn the_checker_knows_good_from_bad() {
    let Some(path) = description() else { return };
    let contract = Contract::load(&path).unwrap();
    let request = |operation: &str, path: &str, query: &str, body: Value| {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        contract.check_request(operation, path, query, body.as_bytes())
    };
    let good = order("web", &["a:b"]);
    assert_eq!(request("droplets_create", "/v2/droplets", "", good.clone()), Vec::<String>::new());
    assert_eq!(
        request("droplets_list", "/v2/droplets", "tag_name=a%3Ab&per_page=200", Value::Null),
        Vec::<String>::new()
    );
    let bad = |change: Value| {
        let mut body = good.clone();
        for (key, value) in change.as_object().unwrap() {
            body[key] = value.clone();
        }
        !request("droplets_create", "/v2/droplets", "", body).is_empty()
    };
    assert!(bad(json!({"names": ["both"]})));
    assert!(bad(json!({"name": "under_score"})));
    assert!(bad(json!({"size": 1})));
    assert!(bad(json!({"unheard_of": true})));
    assert!(!request("droplets_list", "/v2/droplets", "per_page=201", Value::Null).is_empty());
    assert!(!request("droplets_get", "/v2/droplets/abc", "", Value::Null).is_empty());
    assert!(!request("droplets_destroy_byTag", "/v2/droplets", "", Value::Null).is_empty());
    assert!(!request("droplets_get", "/v2/droplets/1", "", json!({})).is_empty());
    assert!(contract.check_answer("droplets_get", 404, br#"{"id":"not_found","message":"no"}"#).is_empty());
    assert!(!contract.check_answer("droplets_get", 404, br#"{"error":"no"}"#).is_empty());
    assert!(!contract.check_answer("droplets_get", 200, br#"{"droplet":{"id":"1"}}"#).is_empty());
    assert!(!contract.check_answer("droplets_destroy", 204, b"{}").is_empty());
}
