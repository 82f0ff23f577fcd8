//! Servers that know both eras, in one process or in two.

use super::super::eras::{AGAIN, UNUSED};
use super::*;

/// What a client of the newer era finds: whether it is told of the era, and what reaches the server of its own `_meta`.
async fn found(world: &mut World) -> (StatusCode, bool) {
    let discovered = world.modern("server/discover", json!({})).await.unwrap();
    let status = discovered.status;
    assert_eq!(discovered.json().await.get("result").is_some(), status == StatusCode::OK);
    assert_eq!(world.modern("echo", json!({"x": 1})).await.unwrap().json().await["result"]["x"], 1);
    let heard = world.hears("echo").await;
    (status, heard["params"]["_meta"]["io.modelcontextprotocol/protocolVersion"] == "2026-07-28")
}

fn count(heard: &[Value], method: &str) -> usize {
    heard.iter().filter(|message| message["method"] == method).count()
}

#[tokio::test]
async fn a_server_of_the_older_era_is_asked_for_the_newer_once_and_costs_no_other_process() {
    for manner in [Manner::Legacy, Manner::Chatty] {
        let mut world = world_of(manner, Sharing::Shared);
        let first = world.modern("server/discover", json!({})).await.unwrap();
        assert_eq!((first.status, first.json().await["error"]["code"].clone()), (StatusCode::NOT_FOUND, json!(-32601)));
        let heard = world.heard_so_far();
        assert_eq!((count(&heard, "initialize"), count(&heard, "server/discover")), (1, 1), "{heard:?}");
        assert_eq!(found(&mut world).await, (StatusCode::NOT_FOUND, false));
        let heard = world.heard_so_far();
        assert_eq!((count(&heard, "initialize"), count(&heard, "server/discover")), (0, 0), "{heard:?}");
    }
}

#[tokio::test]
async fn a_request_that_does_not_say_what_its_client_can_is_refused_where_the_server_looks_at_it() {
    let meta = json!({"io.modelcontextprotocol/protocolVersion": "2026-07-28"});
    let asked = request(1, "echo", json!({"_meta": meta})).to_string();
    let headers = [("mcp-protocol-version", "2026-07-28"), ("mcp-method", "echo")];
    for (manner, wanted) in [(Manner::Modern, StatusCode::BAD_REQUEST), (Manner::Legacy, StatusCode::OK)] {
        let world = world_of(manner, Sharing::Shared);
        let answer = world.send("POST", &headers, asked.clone()).await.unwrap();
        assert_eq!(answer.status, wanted, "{manner:?}");
        assert_eq!(answer.json().await["error"]["code"] == -32602, wanted == StatusCode::BAD_REQUEST);
    }
}

#[tokio::test]
async fn a_server_that_takes_both_over_one_link_has_one_process() {
    let mut world = world_of(Manner::Both, Sharing::Shared);
    let session = world.session().await;
    assert_eq!(found(&mut world).await, (StatusCode::OK, true));
    assert_eq!(world.post(&session, request(1, "echo", json!(1))).await.unwrap().json().await["result"], 1);
    let heard = world.heard_so_far();
    assert_eq!(count(&heard, "initialize"), 0, "the one from the beginning is enough: {heard:?}");
    world.modern("crash", json!({})).await.unwrap().json().await;
    assert_eq!(world.post(&session, request(2, "echo", json!(1))).await.err(), Some(Refused::DeadSession));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_keeps_to_one_era_has_a_process_for_the_other_while_somebody_uses_it() {
    let mut world = world_of(Manner::Locks, Sharing::Shared);
    let session = world.session().await;
    assert_eq!(found(&mut world).await, (StatusCode::OK, true));
    world.heard_so_far();
    assert_eq!(found(&mut world).await, (StatusCode::OK, true));
    let heard = world.heard_so_far();
    assert_eq!(count(&heard, "initialize"), 0, "it is the same process: {heard:?}");

    // Neither process minds what happens to the other.
    let crashed = world.modern("crash", json!({})).await.unwrap().json().await;
    assert_eq!(crashed["error"]["code"], -32603);
    assert_eq!(world.post(&session, request(1, "echo", json!(1))).await.unwrap().json().await["result"], 1);
    world.heard_so_far();
    assert_eq!(found(&mut world).await, (StatusCode::OK, true), "there is another at once");

    // It goes when nobody uses it any more, and not under a call.
    let busy = world.modern("hang", json!({})).await.unwrap();
    tokio::time::advance(UNUSED).await;
    world.bridge.expire(Instant::now());
    assert!(world.bridge.eras.is_of_use());
    drop(busy);
    world.heard_so_far();
    world.bridge.expire(Instant::now());
    assert!(!world.bridge.eras.is_of_use());
    let ended = async { while world.heard.recv().await.unwrap() != json!("end") {} };
    tokio::time::timeout(LIMIT, ended).await.unwrap();
    assert_eq!(world.post(&session, request(2, "echo", json!(1))).await.unwrap().json().await["result"], 1);
    world.heard_so_far();
    assert_eq!(found(&mut world).await, (StatusCode::OK, true));
}

#[tokio::test(start_paused = true)]
async fn where_no_other_process_can_be_had_clients_are_served_as_well_as_one_can() {
    let mut world = world_of(Manner::Locks, Sharing::Shared);
    world.session().await;
    world.absent.send_replace(true);
    assert_eq!(found(&mut world).await, (StatusCode::NOT_FOUND, false));
    world.absent.send_replace(false);
    assert_eq!(found(&mut world).await, (StatusCode::NOT_FOUND, false), "not again at once");
    tokio::time::advance(AGAIN).await;
    assert_eq!(found(&mut world).await, (StatusCode::OK, true));
}

#[tokio::test(start_paused = true)]
async fn a_process_that_does_not_answer_any_more_is_let_go_of() {
    let mut world = world_of(Manner::Locks, Sharing::Shared);
    assert_eq!(found(&mut world).await, (StatusCode::OK, true));
    world.holds.send_replace(true);
    let hangs = world.modern("echo", json!({})).await.unwrap();
    let answer = tokio::time::timeout(Duration::from_secs(3600), hangs.body.collect()).await.unwrap().unwrap();
    let answer = String::from_utf8(answer.to_bytes().to_vec()).unwrap();
    assert!(answer.contains("-32603"), "{answer}");
    world.holds.send_replace(false);
    world.heard_so_far();
    assert_eq!(found(&mut world).await, (StatusCode::OK, true));
}

#[tokio::test]
async fn with_processes_of_their_own_for_sessions_there_is_one_for_all_who_have_none() {
    let (mut world, mut own) = world_of_processes_of(Manner::Locks, 1);
    let session = world.session().await;
    assert_eq!(found(&mut world).await, (StatusCode::OK, true));
    assert_eq!(
        world.post(&session, request(1, "tally", json!(1))).await.unwrap().json().await["error"]["code"],
        -32601
    );
    let heard: Vec<Value> = std::iter::from_fn(|| own.try_recv().ok()).collect();
    assert_eq!((count(&heard, "initialize"), count(&heard, "server/discover"), count(&heard, "echo")), (1, 0, 0));
}
