//! Sessions: how many, how long, and one with a link of its own.

use super::*;

#[tokio::test]
async fn a_session_ends_when_it_is_told_to_and_what_it_has_under_way_with_it() {
    let mut world = world();
    let session = world.session().await;
    let mut call = world.post(&session, request(1, "ask", json!({"method": "elicitation/create"}))).await.unwrap();
    let asked = next(&mut call.body).await;
    assert_eq!(asked["method"], "elicitation/create");
    let sent = world.hears("ask").await;
    let gone = world.send("DELETE", &[("mcp-session-id", &session)], "").await.unwrap();
    assert_eq!(gone.status, StatusCode::NO_CONTENT);
    assert_eq!(next(&mut call.body).await["error"]["code"], -32603);
    assert_eq!(world.hears("notifications/cancelled").await["params"]["requestId"], sent["id"]);
    for method in ["DELETE", "GET", "POST"] {
        let body = request(1, "echo", json!(1)).to_string();
        let dead = world.send(method, &[("mcp-session-id", &session)], body).await.err();
        assert_eq!(dead, Some(Refused::DeadSession), "{method}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_nobody_uses_expires_and_one_that_listens_does_not() {
    let world = world();
    let (idle, listens) = (world.session().await, world.session().await);
    let listening = world.listen(&listens).await;
    world.bridge.expire(Instant::now() + IDLE - Duration::from_secs(1));
    assert!(world.bridge.session(&idle).is_some());
    tokio::time::advance(IDLE).await;
    world.bridge.expire(Instant::now());
    assert!(world.bridge.session(&idle).is_none());
    assert!(world.bridge.session(&listens).is_some());
    drop(listening);
    world.bridge.expire(Instant::now() + IDLE);
    assert!(lock(&world.bridge.sessions).is_empty());
    assert!(world.bridge.is_of_use(), "its link stays for the next");
}

#[tokio::test(start_paused = true)]
async fn when_there_are_too_many_sessions_the_longest_unused_makes_room() {
    let world = world();
    let first = world.session().await;
    tokio::time::advance(Duration::from_secs(1)).await;
    for _ in 1..MAX_SESSIONS {
        world.initialize(json!({})).await;
    }
    let params = json!({"protocolVersion": "2025-06-18", "capabilities": {}});
    let one_more = request(0, "initialize", params).to_string();
    let refused = world.send("POST", &[], one_more).await.err();
    assert_eq!(refused, Some(Refused::TooManySessions { most: MAX_SESSIONS }));
    tokio::time::advance(SPARE).await;
    world.session().await;
    assert_eq!(lock(&world.bridge.sessions).len(), MAX_SESSIONS);
    assert!(world.bridge.session(&first).is_none());
}

#[tokio::test]
async fn a_session_with_a_link_of_its_own_shakes_hands_itself_and_takes_the_link_with_it() {
    let mut world = world_of(Manner::Legacy, Sharing::Own);
    let told = world.initialize(json!({"roots": {}})).await;
    let (alice, told) = (told.session(), told.json().await);
    assert_eq!(told["result"]["protocolVersion"], "2025-11-25", "as the server has it");
    assert_eq!(world.hears("initialize").await["params"]["capabilities"], json!({"roots": {}}));
    world.post(&alice, json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await.unwrap();
    world.hears("notifications/initialized").await;
    let bob = world.session().await;
    assert_eq!(world.hears("initialize").await["params"]["capabilities"], json!({"sampling": {}, "elicitation": {}}));
    let crashed = world.post(&bob, request(5, "crash", json!({}))).await.unwrap().json().await;
    assert_eq!((&crashed["id"], &crashed["error"]["code"]), (&json!(5), &json!(-32603)));
    assert_eq!(world.post(&bob, request(6, "echo", json!(1))).await.err(), Some(Refused::DeadSession));
    assert_eq!(world.post(&alice, request(6, "echo", json!(1))).await.unwrap().json().await["result"], 1);
    world.heard_so_far();
    world.send("DELETE", &[("mcp-session-id", &alice)], "").await.unwrap();
    let end = tokio::time::timeout(LIMIT, world.heard.recv()).await.unwrap();
    assert_eq!(end, Some(json!("end")), "the server sees that its client is gone");
    assert!(world.bridge.handshake().await.unwrap().known().initialized().is_some());
}

#[tokio::test]
async fn sessions_with_processes_of_their_own_leave_the_shared_one_to_whoever_has_none() {
    let (mut world, mut own) = world_of_processes(8);
    let mut own_hears = async |method: &str| {
        loop {
            let message = tokio::time::timeout(LIMIT, own.recv()).await.unwrap().unwrap();
            if message["method"] == method {
                return message;
            }
        }
    };
    let (alice, bob) = (world.session().await, world.session().await);
    for _ in [&alice, &bob] {
        assert_eq!(own_hears("initialize").await["params"]["protocolVersion"], "2025-06-18", "as its client has it");
        own_hears("notifications/initialized").await;
    }
    assert_eq!(world.heard_so_far(), Vec::<Value>::new(), "nobody has asked the shared one anything");
    world.post(&alice, request(5, "crash", json!({}))).await.unwrap().json().await;
    assert_eq!(world.post(&alice, request(6, "echo", json!(1))).await.err(), Some(Refused::DeadSession));
    assert_eq!(world.post(&bob, request(6, "echo", json!(1))).await.unwrap().json().await["result"], 1);

    let modern = world.modern("echo", json!({"x": 1})).await.unwrap().json().await;
    assert_eq!(modern["result"]["x"], 1);
    assert_eq!(world.hears("initialize").await["params"]["protocolVersion"], "2025-11-25", "the agent's own");
    world.hears("echo").await;
    assert!(world.bridge.handshake().await.unwrap().known().initialized().is_some());
    world.hears("ping").await;
}

#[tokio::test(start_paused = true)]
async fn there_are_no_more_processes_than_there_may_be_and_one_that_ended_makes_room_at_once() {
    let (world, _own) = world_of_processes(2);
    let (first, second) = (world.session().await, world.session().await);
    let params = json!({"protocolVersion": "2025-06-18", "capabilities": {}});
    let one_more = || request(0, "initialize", params.clone()).to_string();
    let refused = world.send("POST", &[], one_more()).await.err();
    assert_eq!(refused, Some(Refused::TooManySessions { most: 2 }));
    tokio::time::advance(SPARE).await;
    assert!(world.send("POST", &[], one_more()).await.is_err(), "what a server remembers isn't thrown away so soon");

    world.post(&first, request(5, "crash", json!({}))).await.unwrap().json().await;
    let third = world.session().await;
    world.send("DELETE", &[("mcp-session-id", &third)], "").await.unwrap();
    world.session().await;
    tokio::time::advance(SPARE_PROCESS).await;
    world.session().await;
    assert!(world.bridge.session(&second).is_none(), "the longest unused went");
    assert_eq!(lock(&world.bridge.sessions).len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_process_whose_client_has_stopped_listening_is_not_kept_as_long_as_one_whose_client_never_has() {
    let (world, _own) = world_of_processes(3);
    let (quiet, leaves, stays) = (world.session().await, world.session().await, world.session().await);
    drop(world.listen(&leaves).await);
    let _listening = world.listen(&stays).await;
    let there = || [&quiet, &leaves, &stays].map(|session| lock(&world.bridge.sessions).contains_key(session));
    let later = |by: Duration| world.bridge.expire(Instant::now() + by);
    later(LEFT - Duration::from_secs(1));
    assert_eq!(there(), [true, true, true]);
    later(LEFT);
    assert_eq!(there(), [true, false, true]);
    later(IDLE);
    assert_eq!(there(), [false, false, true]);
}

#[tokio::test]
async fn a_handshake_that_is_refused_leaves_no_session() {
    let world = world_of(Manner::Modern, Sharing::Own);
    let refused = world.initialize(json!({})).await;
    assert!(!refused.headers.contains_key("mcp-session-id"));
    assert_eq!(refused.json().await["error"]["code"], -32601);
    assert!(lock(&world.bridge.sessions).is_empty());
}

#[tokio::test]
async fn a_server_without_initialize_is_known_by_what_it_discovers() {
    let world = world_of(Manner::Modern, Sharing::Shared);
    let met = world.bridge.handshake().await.unwrap();
    let known = met.known();
    assert_eq!(
        (known.initialized(), known.discovered().unwrap()["supportedVersions"][0].as_str()),
        (None, Some("2026-07-28"))
    );
    let refused = world.initialize(json!({})).await;
    assert!(!refused.headers.contains_key("mcp-session-id"));
    assert_eq!(
        refused.json().await,
        json!({"jsonrpc": "2.0", "id": 0, "error": {"code": -32601, "message": "Method not found"}})
    );
}

#[tokio::test]
async fn whoever_waits_for_the_handshake_may_go_and_the_next_waits_for_the_same_one() {
    let mut world = world();
    world.holds.send_replace(true);
    let bridge = Arc::clone(&world.bridge);
    let impatient = tokio::spawn(async move { bridge.handshake().await });
    world.hears("initialize").await;
    impatient.abort();
    assert!(impatient.await.unwrap_err().is_cancelled());
    let bridge = Arc::clone(&world.bridge);
    let patient = tokio::spawn(async move { bridge.handshake().await });
    world.holds.send_replace(false);
    assert!(tokio::time::timeout(LIMIT, patient).await.unwrap().unwrap().is_ok());
    assert!(world.heard_so_far().iter().all(|message| message["method"] != "initialize"));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_takes_minutes_to_start_is_asked_to_initialize_once_and_works_then() {
    let mut world = world();
    world.holds.send_replace(true);
    let params = json!({"protocolVersion": "2025-06-18", "capabilities": {}});
    let begin = request(0, "initialize", params).to_string();
    for _ in 0..3 {
        let begun = Instant::now();
        assert_eq!(world.send("POST", &[], begin.clone()).await.err(), Some(Refused::Silent));
        assert_eq!(world.modern("echo", json!({})).await.err(), Some(Refused::Silent));
        assert_eq!(begun.elapsed().as_secs(), 2 * HANDSHAKE.as_secs(), "nobody is left waiting");
    }
    // Also when nobody asks any more.
    tokio::time::advance(10 * HANDSHAKE).await;
    world.bridge.expire(Instant::now());
    assert!(world.bridge.is_of_use());
    world.holds.send_replace(false);
    let session = world.session().await;
    assert_eq!(world.post(&session, request(1, "echo", json!("well"))).await.unwrap().json().await["result"], "well");
    let handshakes = world.heard_so_far().iter().filter(|message| message["method"] == "initialize").count();
    assert_eq!(handshakes, 1);
}
