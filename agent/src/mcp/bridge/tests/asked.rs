//! What a server asks its clients of its own accord: it is answered, whatever becomes of the client.

use super::*;

fn asks(id: impl Into<Value>) -> Value {
    request(id, "sampling/createMessage", json!({}))
}

fn noise() -> Value {
    json!({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
}

#[tokio::test]
async fn a_request_of_the_server_waits_for_the_stream_of_its_session() {
    let mut world = world_of(Manner::Legacy, Sharing::Own);
    let session = world.session().await;
    let long = request("s", "sampling/createMessage", json!({"text": "x".repeat(50_000)}));
    // Nor is it pushed out by what matters less.
    world.server_says(&session, [long].into_iter().chain(std::iter::repeat_n(noise(), 40))).await;
    let mut stream = world.listen(&session).await;
    let asked = next(&mut stream).await;
    assert_eq!(asked["params"]["text"].as_str().unwrap().len(), 50_000);
    let answer = json!({"jsonrpc": "2.0", "id": asked["id"], "result": {"role": "assistant"}});
    world.post(&session, answer).await.unwrap();
    let heard = world.hears_an_answer().await;
    assert_eq!((&heard["id"], &heard["result"]), (&json!("s"), &json!({"role": "assistant"})));
    assert_eq!(next(&mut stream).await["method"], "notifications/tools/list_changed");
}

#[tokio::test]
async fn what_a_client_has_not_read_when_its_stream_breaks_off_is_on_the_next_one() {
    let mut world = world_of(Manner::Legacy, Sharing::Own);
    let session = world.session().await;
    let unread = world.listen(&session).await;
    world.server_says(&session, [asks("s"), noise()]).await;
    drop(unread);
    let mut stream = world.listen(&session).await;
    assert_eq!(next(&mut stream).await["method"], "sampling/createMessage");
    assert_eq!(next(&mut stream).await["method"], "notifications/tools/list_changed");
    // Also when that one is there already.
    world.server_says(&session, [asks("t")]).await;
    let unread = std::mem::replace(&mut stream, world.listen(&session).await);
    drop(unread);
    assert_eq!(next(&mut stream).await["method"], "sampling/createMessage");
}

#[tokio::test(start_paused = true)]
async fn a_request_of_the_server_nobody_listens_for_is_refused_in_time_and_not_asked_afterwards() {
    let mut world = world_of(Manner::Legacy, Sharing::Own);
    let session = world.session().await;
    let begun = Instant::now();
    world.server_says(&session, [asks("s"), noise()]).await;
    let refused = world.hears_an_answer().await;
    assert_eq!((&refused["id"], &refused["error"]["code"]), (&json!("s"), &json!(-32603)));
    let waited = begun.elapsed().as_secs();
    assert!((30..40).contains(&waited), "{waited}");
    let mut stream = world.listen(&session).await;
    assert_eq!(next(&mut stream).await["method"], "notifications/tools/list_changed");
}

#[tokio::test]
async fn what_there_is_no_room_for_is_refused_at_once() {
    let mut world = world_of(Manner::Legacy, Sharing::Own);
    let session = world.session().await;
    let too_long = request("long", "sampling/createMessage", json!({"text": "x".repeat(2 * 1024 * 1024)}));
    let mut refused = world.server_says(&session, [too_long].into_iter().chain((0..17).map(asks))).await;
    // Their order isn't kept while the server does not read.
    while refused.len() < 2 {
        refused.push(world.hears_an_answer().await);
    }
    assert!(refused.iter().all(|refused| refused["error"]["code"] == -32603), "{refused:?}");
    refused.sort_by_key(|refused| refused["id"].to_string());
    assert_eq!((&refused[0]["id"], &refused[1]["id"]), (&json!("long"), &json!(16)));
    let mut stream = world.listen(&session).await;
    for _ in 0..16 {
        assert_eq!(next(&mut stream).await["method"], "sampling/createMessage");
    }
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_a_client_that_does_not_listen_makes_room_for_others_and_is_answered() {
    let mut world = world_with(Manner::Legacy, Sharing::Own, Budget::of(60_000));
    let session = world.session().await;
    let long = request("s", "sampling/createMessage", json!({"text": "x".repeat(50_000)}));
    world.server_says(&session, [long, noise()]).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let answer = world.post(&session, request(1, "big", json!({"bytes": 30_000}))).await.unwrap();
    assert_eq!(answer.json().await["result"].as_str().unwrap().len(), 30_000);
    let mut stream = world.listen(&session).await;
    let refused = world.hears_an_answer().await;
    assert_eq!((&refused["id"], &refused["error"]["code"]), (&json!("s"), &json!(-32603)));
    // The stream goes on with what is still there.
    assert_eq!(next(&mut stream).await["method"], "notifications/tools/list_changed");
}
