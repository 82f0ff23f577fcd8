//! Calls and what belongs to them: answers, progress, requests of the server, cancelling, ends.

use super::*;

#[tokio::test]
async fn clients_that_use_the_same_ids_share_one_handshake_and_get_their_own_answers() {
    let mut world = world();
    let (alice, bob) = (world.session().await, world.session().await);
    assert_ne!(alice, bob);
    let ask = |session: String, what: &'static str| {
        let world = &world;
        async move { world.post(&session, request(1, "echo", json!(what))).await.unwrap().json().await }
    };
    let (of_alice, of_bob) = tokio::join!(ask(alice.clone(), "a"), ask(bob, "b"));
    assert_eq!(of_alice, json!({"jsonrpc": "2.0", "id": 1, "result": "a"}));
    assert_eq!(of_bob, json!({"jsonrpc": "2.0", "id": 1, "result": "b"}));
    let methods: Vec<Value> = world.heard_so_far().iter().map(|message| message["method"].clone()).collect();
    assert_eq!(methods, ["initialize", "notifications/initialized", "echo", "echo"]);
}

#[tokio::test]
async fn a_client_is_told_what_the_server_said_in_a_version_it_asked_for() {
    let world = world();
    let told = world.initialize(json!({})).await.json().await;
    let wanted = json!({"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}});
    assert_eq!(told, json!({"jsonrpc": "2.0", "id": 0, "result": wanted}));
    let (known, id) = (world.bridge.handshake().await.unwrap(), "7");
    for (asked, agreed) in [("2025-11-25", "2025-11-25"), ("2031-01-01", "2025-11-25"), ("2024-11-05", "2024-11-05")] {
        let answer: Value = serde_json::from_slice(&known.known().answer(id, Some(asked)).unwrap()).unwrap();
        assert_eq!(answer["result"]["protocolVersion"], agreed, "{asked}");
    }
}

#[tokio::test]
async fn when_the_server_ends_every_call_fails_at_once_sessions_are_dead_and_the_next_call_works() {
    let mut world = world();
    let (alice, bob) = (world.session().await, world.session().await);
    let mut listening = world.listen(&bob).await;
    let hang = |session: String, id: &'static str| {
        let world = &world;
        async move { world.post(&session, request(id, "hang", json!({}))).await.unwrap().json().await }
    };
    let crash = async {
        while world.bridge.common().await.unwrap().0.under_way() < 3 {
            tokio::task::yield_now().await;
        }
        world.post(&alice, request("c", "crash", json!({}))).await.unwrap().json().await
    };
    let lone = async { world.modern("hang", json!({})).await.unwrap().json().await };
    let (a, b, lone, crash) = tokio::join!(hang(alice.clone(), "a"), hang(bob.clone(), "b"), lone, crash);
    for (answer, id) in [(a, json!("a")), (b, json!("b")), (lone, json!(1)), (crash, json!("c"))] {
        assert_eq!((&answer["id"], &answer["error"]["code"]), (&id, &json!(-32603)), "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains("its process ended"), "{answer}");
    }
    assert!(listening.frame().await.is_none(), "nothing comes any more");
    for session in [alice, bob] {
        let dead = world.post(&session, request(2, "echo", json!(1))).await.err();
        assert_eq!(dead, Some(Refused::DeadSession));
    }
    assert_eq!(world.modern("echo", json!({"x": 1})).await.unwrap().json().await["result"]["x"], 1);
    let again = world.session().await;
    assert_eq!(world.post(&again, request(2, "echo", json!(1))).await.unwrap().json().await["result"], 1);
    let handshakes = world.heard_so_far().iter().filter(|message| message["method"] == "initialize").count();
    assert_eq!(handshakes, 2, "one for each process");
}

#[tokio::test]
async fn calls_that_the_agents_end_cuts_off_are_told_so() {
    let world = world();
    let session = world.session().await;
    let hang = async { world.post(&session, request("a", "hang", json!({}))).await.unwrap().json().await };
    let end = async {
        while world.bridge.common().await.unwrap().0.under_way() < 1 {
            tokio::task::yield_now().await;
        }
        world.bridge.part();
    };
    let (answer, ()) = tokio::join!(hang, end);
    assert_eq!((&answer["id"], &answer["error"]["code"]), (&json!("a"), &json!(-32603)), "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("the agent is being restarted"), "{answer}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_said_to_be_so_and_dialled_again() {
    let world = world();
    world.absent.send_replace(true);
    let away = Some(Refused::Unreachable(LinkEnd::because("nobody is there")));
    assert_eq!(world.modern("echo", json!({})).await.err(), away);
    assert_eq!(world.bridge.handshake().await.err(), Some(LinkEnd::because("nobody is there")));
    world.absent.send_replace(false);
    assert_eq!(world.modern("echo", json!({})).await.unwrap().status, StatusCode::OK);
}

#[tokio::test]
async fn progress_comes_at_once_on_the_stream_of_the_call_that_asked() {
    let world = world();
    let session = world.session().await;
    let params = json!({"times": 3, "_meta": {"progressToken": "mine"}});
    let answer = world.post(&session, request(1, "flood", params)).await.unwrap();
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let messages = answer.messages().await;
    let progress: Vec<&Value> = messages[..3].iter().map(|message| &message["params"]["progress"]).collect();
    assert_eq!(progress, [0, 1, 2]);
    assert!(messages[..3].iter().all(|message| message["params"]["progressToken"] == "mine"));
    assert_eq!(messages[3], json!({"jsonrpc": "2.0", "id": 1, "result": "done"}));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_takes_long_comes_on_a_stream_that_shows_signs_of_life() {
    let world = world();
    let session = world.session().await;
    world.holds.send_replace(true);
    let mut answer = world.post(&session, request(1, "echo", json!("at last"))).await.unwrap();
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    assert_eq!(answer.body.frame().await.unwrap().unwrap().into_data().unwrap(), ":\n\n");
    world.holds.send_replace(false);
    assert_eq!(next(&mut answer.body).await["result"], "at last");
    assert!(answer.body.frame().await.is_none());
}

#[tokio::test]
async fn a_request_of_the_server_is_answered_by_the_client_it_works_for() {
    let world = world();
    let (alice, bob) = (world.session().await, world.session().await);
    let mut call = world.post(&alice, request(1, "ask", json!({"method": "sampling/createMessage"}))).await.unwrap();
    let asked = next(&mut call.body).await;
    assert_eq!(asked["method"], "sampling/createMessage");
    let answer = json!({"jsonrpc": "2.0", "id": asked["id"], "result": {"role": "assistant"}});
    for session in [&bob, &alice] {
        assert_eq!(world.post(session, answer.clone()).await.unwrap().status, StatusCode::ACCEPTED);
    }
    let result = next(&mut call.body).await;
    assert_eq!((&result["id"], &result["result"]["result"]), (&json!(1), &json!({"role": "assistant"})));

    // Its client can't be asked that; and without a session nobody can.
    let roots = request(2, "ask", json!({"method": "roots/list"}));
    let refused = world.post(&alice, roots).await.unwrap().json().await;
    assert_eq!(refused["result"]["error"]["code"], -32601);
    let refused = world.modern("ask", json!({"method": "sampling/createMessage"})).await.unwrap().json().await;
    assert_eq!(refused["result"]["error"]["code"], -32601);
}

#[tokio::test]
async fn a_client_that_hangs_up_cancels_its_call_and_no_other() {
    let mut world = world();
    let session = world.session().await;
    for _ in 0..2 {
        let (sent, cancelled) = {
            // The agent's shape of a client that goes away: the future of its request is dropped.
            let bridge = Arc::clone(&world.bridge);
            let message = request("x", "hang", json!({})).to_string();
            let request = Request::post("/")
                .header("content-type", "application/json")
                .header("accept", "*/*")
                .header("mcp-session-id", &session)
                .body(Body::from(message))
                .unwrap();
            let client = tokio::spawn(async move { bridge.serve(request).await.map(|_| ()) });
            let sent = world.hears("hang").await;
            client.abort();
            (sent, world.hears("notifications/cancelled").await)
        };
        assert_eq!(cancelled["params"]["requestId"], sent["id"]);
    }
    // Its own word for it: the call is over at once, though the server says nothing.
    let cancelling = async {
        let sent = world.heard.recv().await.unwrap();
        assert_eq!(sent["method"], "hang");
        let cancel = json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": "y"}});
        let bridge = Arc::clone(&world.bridge);
        let request = Request::post("/")
            .header("content-type", "application/json")
            .header("accept", "*/*")
            .header("mcp-session-id", &session)
            .body(Body::from(cancel.to_string()))
            .unwrap();
        assert_eq!(bridge.serve(request).await.unwrap().status(), StatusCode::ACCEPTED);
        let cancelled = world.heard.recv().await.unwrap();
        assert_eq!(
            (&cancelled["params"]["requestId"], &cancelled["method"]),
            (&sent["id"], &json!("notifications/cancelled"))
        );
    };
    let bridge = Arc::clone(&world.bridge);
    let message = request("y", "hang", json!({})).to_string();
    let hang = Request::post("/")
        .header("content-type", "application/json")
        .header("accept", "*/*")
        .header("mcp-session-id", &session)
        .body(Body::from(message))
        .unwrap();
    let (answer, ()) =
        tokio::join!(async { bridge.serve(hang).await.unwrap().into_body().collect().await.unwrap() }, cancelling);
    let answer: Value = serde_json::from_slice(&answer.to_bytes()).unwrap();
    assert_eq!((&answer["id"], &answer["error"]["code"]), (&json!("y"), &json!(-32603)));
}

#[tokio::test]
async fn ten_megabytes_come_through_whole_in_both_directions() {
    let world = world();
    let session = world.session().await;
    let bytes = 10 * 1024 * 1024;
    let answer = world.post(&session, request(1, "big", json!({"bytes": bytes}))).await.unwrap().text().await;
    assert_eq!(answer.matches('x').count(), bytes);
    let answer = world.post(&session, request(2, "echo", json!("y".repeat(bytes)))).await.unwrap().text().await;
    assert_eq!(answer.matches('y').count(), bytes);
    let too_long = world.post(&session, request(3, "echo", json!("z".repeat(16 * 1024 * 1024)))).await.err();
    assert_eq!(too_long, Some(Refused::TooLong));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_is_cut_off_and_holds_nobody_up_for_long() {
    let world = world();
    let (slow, quick) = (world.session().await, world.session().await);
    let params = json!({"times": 1000, "message": "m".repeat(100_000), "_meta": {"progressToken": 1}});
    let unread = world.post(&slow, request(1, "flood", params)).await.unwrap();
    let begun = Instant::now();
    let answer = world.post(&quick, request(1, "echo", json!("quick"))).await.unwrap().json().await;
    assert_eq!(answer["result"], "quick");
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    // What was on its way is there to be read, and then why there is no more.
    let messages = unread.messages().await;
    assert!(messages.len() < 20, "{}", messages.len());
    assert_eq!(messages.last().unwrap()["error"]["code"], -32603);
}

/// Answers that nobody reads, of many clients, are cut off before they fill memory, and whoever reads gets its own in time.
#[tokio::test(start_paused = true)]
async fn many_clients_that_do_not_read_large_answers_share_one_bound_and_hold_nobody_up_for_long() {
    let bytes = 1_000_000;
    let budget = Budget::of(4 * bytes);
    let world = world_with(Manner::Legacy, Sharing::Shared, budget.clone());
    let mut unread = Vec::new();
    let mut waited = Duration::ZERO;
    for number in 0..24 {
        // Some listen to their call's stream, some wait for its answer; none reads.
        let session = world.session().await;
        let begun = Instant::now();
        unread.push(world.post(&session, request(number, "big", json!({"bytes": bytes}))).await.unwrap());
        waited += begun.elapsed();
        assert!(budget.taken() <= 4 * bytes, "{} bytes wait", budget.taken());
    }
    assert!(waited < Duration::from_secs(24 * 3), "{waited:?}");
    let quick = world.session().await;
    let begun = Instant::now();
    let answer = world.post(&quick, request(1, "big", json!({"bytes": 2 * bytes}))).await.unwrap().text().await;
    assert_eq!(answer.matches('x').count(), 2 * bytes);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    // Of those that came too late to read, none is taken for whole.
    let mut whole = 0;
    for answer in unread {
        whole += usize::from(answer.body.collect().await.is_ok());
    }
    assert!((1..=4).contains(&whole), "{whole}");
    assert_eq!(budget.taken(), 0);
}

/// The same over real connections, which take more than they have been read: what is left of an answer is given up, not only what waits before it.
#[tokio::test]
async fn a_connection_that_is_not_read_gives_up_what_it_has_of_an_answer() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let bytes = 15_000_000;
    let budget = Budget::of(bytes);
    let world = world_with(Manner::Legacy, Sharing::Shared, budget.clone());
    let (slow, quick) = (world.session().await, world.session().await);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let bridge = Arc::clone(&world.bridge);
    let serving = axum::Router::new().fallback(move |request: Request<Body>| {
        let bridge = Arc::clone(&bridge);
        async move { bridge.serve(request).await.unwrap() }
    });
    tokio::spawn(async move { axum::serve(listener, serving).await });
    let ask = async |session: &str, bytes: usize| {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(64 * 1024).unwrap();
        let mut stream = socket.connect(address).await.unwrap();
        let message = request(1, "big", json!({"bytes": bytes})).to_string();
        let head = format!(
            "POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\naccept: */*\r\n\
             mcp-session-id: {session}\r\ncontent-length: {}\r\n\r\n",
            message.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(message.as_bytes()).await.unwrap();
        stream
    };
    let all_of = async |mut stream: tokio::net::TcpStream| {
        let mut text = Vec::new();
        // One that was cut off may end in an error.
        drop(tokio::time::timeout(LIMIT, stream.read_to_end(&mut text)).await.unwrap());
        text.iter().filter(|byte| **byte == b'x').count()
    };
    let unread = ask(&slow, bytes).await;
    let begun = async {
        while budget.taken() == 0 || budget.taken() == bytes {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, begun).await.unwrap();
    let read = ask(&quick, 14_000_000).await;
    assert!(all_of(read).await >= 14_000_000);
    let got = all_of(unread).await;
    assert!((1..bytes).contains(&got), "{got}");
    let settled = async {
        while budget.taken() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, settled).await.unwrap();
}

#[tokio::test]
async fn what_is_for_everybody_comes_to_all_who_listen() {
    let world = world();
    let (alice, bob) = (world.session().await, world.session().await);
    let (mut of_alice, mut of_bob) = (world.listen(&alice).await, world.listen(&bob).await);
    let method = "notifications/tools/list_changed";
    world.modern("tell", json!({"method": method})).await.unwrap();
    assert_eq!(next(&mut of_alice).await["method"], method);
    assert_eq!(next(&mut of_bob).await["method"], method);
    // Another stream takes the place of the first, and what came while there was none is kept.
    let mut instead = world.listen(&alice).await;
    assert!(of_alice.frame().await.is_none());
    drop(of_bob);
    world.modern("tell", json!({"method": method})).await.unwrap();
    assert_eq!(next(&mut instead).await["method"], method);
    assert_eq!(next(&mut world.listen(&bob).await).await["method"], method);
    world.shutdown.cancel();
    assert!(instead.frame().await.is_none());
}

/// Whoever hangs up, whoever crashes: every client gets its own answers, each once, or is told that there is none.
#[tokio::test]
async fn among_many_clients_no_answer_is_lost_crossed_or_doubled() {
    const CLIENTS: u64 = 32;
    const CALLS: u64 = 60;
    let world = Arc::new(world());
    let clients = futures_util::stream::iter(0..CLIENTS).map(|client| {
        let world = Arc::clone(&world);
        tokio::spawn(async move {
            // Not random, but as good: each client has its own sequence.
            let mut dice = client.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let (mut session, mut answered, mut failed) = (world.session().await, 0, 0);
            for number in 0..CALLS {
                dice ^= dice << 13;
                dice ^= dice >> 7;
                dice ^= dice << 17;
                let method = match dice % 100 {
                    0 if client == 3 => "crash",
                    0..10 => "late",
                    _ => "echo",
                };
                let call = request(number, method, json!([client, number]));
                let call = async {
                    match world.post(&session, call).await {
                        Ok(answer) => Ok(answer.messages().await),
                        Err(refused) => Err(refused),
                    }
                };
                let hangs_up = (dice >> 20) % 10 == 0;
                let patience = if hangs_up || method == "late" { Duration::from_millis(2) } else { LIMIT };
                let Ok(answer) = tokio::time::timeout(patience, call).await else {
                    assert!(patience < LIMIT, "client {client} was left without an answer");
                    continue;
                };
                match answer {
                    Ok(messages) => {
                        assert_eq!((messages.len(), &messages[0]["id"]), (1, &json!(number)));
                        if messages[0].get("error").is_some() {
                            assert_eq!(messages[0]["error"]["code"], -32603);
                            failed += 1;
                        } else {
                            assert_eq!(messages[0]["result"], json!([client, number]));
                            answered += 1;
                        }
                    }
                    Err(Refused::DeadSession) => session = world.session().await,
                    Err(other) => panic!("{other}"),
                }
            }
            (answered, failed)
        })
    });
    let results: Vec<(u64, u64)> = clients.buffer_unordered(32).map(|joined| joined.unwrap()).collect().await;
    let (answered, failed) = results.iter().fold((0, 0), |(a, f), (x, y)| (a + x, f + y));
    assert!(answered > CLIENTS * CALLS / 2, "{answered} answered, {failed} failed");
    // Nothing stays behind.
    let (line, _) = world.bridge.common().await.unwrap();
    let settled = async {
        while line.under_way() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, settled).await.unwrap();
}
