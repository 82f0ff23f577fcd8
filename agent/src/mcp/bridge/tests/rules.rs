//! What streamable HTTP asks of a server.

use super::envelope::MAX_ENTRIES;
use super::*;

const ECHO: &str = r#"{"jsonrpc":"2.0","id":1,"method":"echo","params":{}}"#;

#[tokio::test]
async fn requests_that_break_the_rules_are_turned_away_and_reach_nobody() {
    let mut world = world();
    let session = world.session().await;
    world.heard_so_far();
    let key = ("mcp-session-id", session.as_str());
    let post = |headers: Vec<(&'static str, &'static str)>, body: &'static str| {
        let (world, key) = (&world, key);
        async move { world.send("POST", &[&[key], &headers[..]].concat(), body).await.err() }
    };
    let both = Refused::NotAcceptable("application/json and text/event-stream");
    assert_eq!(post(vec![("accept", "application/json")], ECHO).await, Some(both.clone()));
    assert_eq!(post(vec![("accept", "text/event-stream;q=1")], ECHO).await, Some(both));
    assert_eq!(post(vec![("content-type", "text/plain")], ECHO).await, Some(Refused::NotJson));
    let version = post(vec![("mcp-protocol-version", "1999-01-01")], ECHO).await;
    assert_eq!(version, Some(Refused::Version("1999-01-01".to_owned())));
    for (body, why) in [("{", "it is not JSON"), ("[]", "each message comes by itself"), (r#"{"id":1}"#, "neither")] {
        let refused = post(vec![], body).await;
        assert!(matches!(&refused, Some(Refused::NoMessage(said)) if said.contains(why)), "{body}: {refused:?}");
    }
    assert_eq!(post(vec![("content-length", "99999999")], ECHO).await, Some(Refused::TooLong));
    assert_eq!(post(vec![("mcp-session-id", "none")], ECHO).await, Some(Refused::DeadSession));
    assert_eq!(world.send("POST", &[], ECHO).await.err(), Some(Refused::NoSession));
    assert_eq!(world.send("GET", &[], "").await.err(), Some(Refused::NoSession));
    assert_eq!(
        world.send("GET", &[key, ("accept", "application/json")], "").await.err(),
        Some(Refused::NotAcceptable("text/event-stream"))
    );
    assert_eq!(world.send("PUT", &[key], ECHO).await.err(), Some(Refused::Method { allowed: "POST, GET, DELETE" }));
    for accept in ["*/*", "Application/*, text/event-stream", "application/json;q=0.5,text/*"] {
        assert_eq!(
            post(vec![("accept", accept), ("content-type", "application/json; charset=utf-8")], ECHO).await,
            None
        );
    }
    assert_eq!(world.heard_so_far().len(), 3, "only what was taken was passed on");
}

#[tokio::test]
async fn in_the_newer_era_headers_say_what_the_message_says_and_errors_have_their_status() {
    let mut world = world();
    let meta = json!({"io.modelcontextprotocol/protocolVersion": "2026-07-28"});
    let call = request(1, "tools/call", json!({"name": "größe", "_meta": meta})).to_string();
    let version = ("mcp-protocol-version", "2026-07-28");
    let method = ("mcp-method", "tools/call");
    let name = ("mcp-name", "=?base64?Z3LDtsOfZQ==?=");
    let mismatches: [&[(&str, &str)]; 6] = [
        &[],
        &[version],
        &[version, method],
        &[version, ("mcp-method", "tools/list"), name],
        &[version, method, ("mcp-name", "other")],
        &[("mcp-protocol-version", "2025-11-25"), method, name],
    ];
    for headers in mismatches {
        let answer = world.send("POST", headers, call.clone()).await.unwrap();
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{headers:?}");
        assert_eq!(answer.json().await["error"]["code"], -32020, "{headers:?}");
    }
    // What each request has to bear, and what only the older era has.
    let older = json!({"protocolVersion": "2026-07-28", "capabilities": {}, "_meta": meta});
    for (asked, wanted) in [
        (request(1, "tools/call", json!({"name": "größe"})), (StatusCode::BAD_REQUEST, json!(-32602))),
        (request(1, "tools/call", json!({"name": "größe", "_meta": {}})), (StatusCode::BAD_REQUEST, json!(-32602))),
        (request(1, "initialize", older), (StatusCode::NOT_FOUND, json!(-32601))),
    ] {
        let answer = world.send("POST", &[version, method, name], asked.to_string()).await.unwrap();
        assert_eq!((answer.status, answer.json().await["error"]["code"].clone()), wanted, "{asked}");
    }
    assert_eq!(world.heard_so_far(), Vec::<Value>::new());
    let answer = world.send("POST", &[version, method, name], call).await.unwrap();
    assert_eq!((answer.status, answer.json().await["error"]["code"].clone()), (StatusCode::NOT_FOUND, json!(-32601)));
    assert_eq!(world.modern("echo", json!({})).await.unwrap().status, StatusCode::OK);
    // A server of the older era: clients that know both are led there, and others get what it has.
    let discovered = world.modern("server/discover", json!({})).await.unwrap();
    assert_eq!(
        (discovered.status, discovered.json().await["error"]["code"].clone()),
        (StatusCode::NOT_FOUND, json!(-32601))
    );
    let echoed = world.modern("echo", json!({"x": 1})).await.unwrap().json().await;
    assert_eq!(echoed["result"], json!({"resultType": "complete", "x": 1, "_meta": {}}));
    for other in ["GET", "DELETE"] {
        assert_eq!(world.send(other, &[version], "").await.err(), Some(Refused::Method { allowed: "POST" }));
    }
    let unknown = world.post(&world.session().await, request(1, "nothing", json!({}))).await.unwrap();
    assert_eq!(unknown.status, StatusCode::OK, "in the older era the status says nothing of the answer");
}

#[tokio::test]
async fn a_batch_of_the_server_is_taken_up_to_a_bound_and_one_beyond_it_fails_every_call_with_the_reason() {
    let world = world();
    let session = world.session().await;
    let batch = |others: usize| request(1, "batch", json!({"others": others}));
    let answer = world.post(&session, batch(MAX_ENTRIES - 1)).await.unwrap().json().await;
    assert_eq!(answer["result"], "in a batch");
    let failed = world.post(&session, batch(MAX_ENTRIES)).await.unwrap().json().await;
    assert_eq!(failed["error"]["code"], -32603);
    assert!(failed["error"]["message"].as_str().unwrap().contains("a batch of more than 1024 messages"), "{failed}");
    let dead = world.post(&session, request(2, "echo", json!(1))).await.err();
    assert_eq!(dead, Some(Refused::DeadSession));
    let again = world.session().await;
    assert_eq!(world.post(&again, request(3, "echo", json!(1))).await.unwrap().json().await["result"], 1);
}

/// None of these says how long it is.
#[tokio::test(start_paused = true)]
async fn a_message_of_unknown_length_takes_only_as_much_room_as_it_is_long() {
    let world = world();
    let session = world.session().await;
    world.holds.send_replace(true);
    let waiting =
        futures_util::future::join_all(
            (0..40).map(|id| {
                let (world, session) = (&world, &session);
                async move {
                    world.post(session, request(id, "echo", json!(id))).await.unwrap().json().await["result"] == id
                }
            }),
        );
    let release = async {
        // Longer than any of them would wait for room.
        tokio::time::sleep(Duration::from_secs(15)).await;
        world.holds.send_replace(false);
    };
    let (answered, ()) = tokio::join!(waiting, release);
    assert!(answered.into_iter().all(|answered| answered));

    let (chunks, body) = mpsc::channel::<Result<Bytes, std::io::Error>>(1);
    let body = Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(body));
    let room = Arc::clone(&world.bridge.inbound);
    let sending = async {
        let message = request(1, "echo", json!("x".repeat(3 * IN_UNIT))).to_string();
        for chunk in message.into_bytes().chunks(1000) {
            chunks.send(Ok(Bytes::copy_from_slice(chunk))).await.unwrap();
        }
        while chunks.capacity() == 0 {
            tokio::task::yield_now().await;
        }
        tokio::task::yield_now().await;
        assert_eq!(room.available_permits(), IN_UNITS - 4);
        drop(chunks);
    };
    let key = [("mcp-session-id", session.as_str())];
    let (answer, ()) = tokio::join!(world.send("POST", &key, body), sending);
    assert_eq!(answer.unwrap().json().await["result"].as_str().unwrap().len(), 3 * IN_UNIT);
    assert_eq!(world.bridge.inbound.available_permits(), IN_UNITS);
}
