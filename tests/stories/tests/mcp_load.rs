//! One stdio server shared by many clients, and servers that misbehave: what the others must not notice, and what whoever asked must be
//! told.

use std::error::Error;
use std::time::{Duration, Instant};

use dtma_api::instance::InstanceState;
use reqwest::Method;
use serde_json::{Value, json};
use stack::prepare::{self, DEFAULT_IMAGE};
use stack::{Unwatched, Workspace};
use stories::mcp::load::Load;
use stories::mcp::session::{Outcome, Session};
use stories::mcp::{Server, instance};
use stories::{Scene, Story, until};

const SOON: Duration = Duration::from_secs(90);
const TEN_MEGABYTES: u64 = 10_000_000;

/// A droplet with these on it; the path of the last one's endpoint.
async fn scene_with(server: &Server) -> Result<(Scene, String), Box<dyn Error>> {
    prepare::mcp(&Workspace::find(), &Unwatched).await?;
    let scene = Scene::set(DEFAULT_IMAGE).await?;
    let path = deployed(&scene, server).await?;
    Ok((scene, path))
}

async fn deployed(scene: &Scene, server: &Server) -> Result<String, Box<dyn Error>> {
    let reply = scene.agent.deploy_raw(&server.deploy(&scene.stack)).await?;
    assert_eq!(reply.status, 201, "{}: {}", server.name, reply.text);
    Ok(instance(scene, server.name).await?.mcp_url.ok_or("it has no MCP endpoint")?)
}

async fn reopened(scene: &Scene, path: &str) -> Result<Session, Box<dyn Error>> {
    until("a session", SOON, async || Session::open(&scene.agent, path, json!({})).await.map(Some)).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn thirty_two_clients_share_a_server_that_crashes_and_no_answer_is_lost_crossed_or_doubled() -> Story {
    let (scene, path) = scene_with(&Server::moody("shared", None)).await?;
    // 10,016 answers.
    let load = Load { clients: 32, answers: 313, hang_ups: 3, crashes: 4, seed: 20_261_125 };
    load.run(&scene.agent, &path).await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn what_a_server_does_to_one_call_the_others_do_not_notice() -> Story {
    let (scene, path) = scene_with(&Server::moody("moody", Some("noise"))).await?;
    let session = reopened(&scene, &path).await?;
    let bystander = reopened(&scene, &path).await?;

    // A call that is never answered holds up nobody.
    let hanging = session.call(1, "hang", json!({}));
    let hung = tokio::time::timeout(Duration::from_secs(8), hanging);
    let (hung, outcome) = tokio::join!(hung, bystander.call(1, "echo", json!({ "text": "beside a call that hangs" })));
    assert!(hung.is_err(), "nobody answered, so nobody may have said so: {hung:?}");
    assert_eq!(outcome.text(), Some("beside a call that hangs"));

    // Lines that are no messages are no messages, however many.
    let outcome = session.call(2, "noise", json!({ "lines": 20_000 })).await;
    assert_eq!(outcome.text(), Some("quiet again"), "{outcome:?}");

    // Ten megabytes arrive whole, while others are served.
    let big = session.call(3, "big", json!({ "bytes": TEN_MEGABYTES }));
    let (big, outcome) = tokio::join!(big, bystander.call(2, "echo", json!({ "text": "beside a big one" })));
    assert_eq!(outcome.text(), Some("beside a big one"));
    let text = big.text().ok_or("no text in the big answer")?;
    assert_eq!(u64::try_from(text.len())?, TEN_MEGABYTES);
    assert!(text.bytes().all(|byte| byte == b'x'));

    // Progress goes to the call it is about, under the token its client gave it.
    let (one, other) = tokio::join!(
        session.call(4, "progress", json!({ "steps": 5 })),
        bystander.call(4, "progress", json!({ "steps": 3 }))
    );
    for (outcome, steps) in [(one, 5), (other, 3)] {
        let Outcome::Answered { before, .. } = &outcome else { panic!("{outcome:?}") };
        let seen: Vec<_> = before.iter().filter_map(|it| it.pointer("/params/progress")?.as_u64()).collect();
        assert_eq!(seen, (1..=steps).collect::<Vec<u64>>(), "{outcome:?}");
        assert!(before.iter().all(|it| it.pointer("/params/progressToken") == Some(&json!("token-4"))), "{before:?}");
    }

    // A crash ends what is under way at once, and every session with it; a new one is had as soon as the server is back.
    let slow = async {
        let begun = Instant::now();
        (bystander.call(5, "slow", json!({ "seconds": 50, "text": "never" })).await, begun.elapsed())
    };
    let (crash, (slow, took)) = tokio::join!(session.call(5, "crash", json!({})), slow);
    assert!(matches!(crash, Outcome::Failed(-32603, _)), "{crash:?}");
    assert!(matches!(slow, Outcome::Failed(-32603, _) | Outcome::Away(404 | 502 | 503, _)), "{slow:?}");
    assert!(took < Duration::from_secs(10), "told after {took:?} only");
    let stale = until("the old session is refused by a server that is back", SOON, async || {
        let outcome = session.call(6, "echo", json!({ "text": "late" })).await;
        Ok((!matches!(outcome, Outcome::Away(502 | 503, _))).then_some(outcome))
    });
    let fresh = reopened(&scene, &path).await?;
    assert_eq!(fresh.call(1, "echo", json!({ "text": "anew" })).await.text(), Some("anew"));
    let stale = stale.await?;
    assert!(matches!(stale, Outcome::Away(404, _)), "{stale:?}");
    Ok(())
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_server_that_asks_back_is_answered_by_its_client_or_told_that_nobody_can() -> Story {
    let (scene, path) = scene_with(&Server::moody("asking", None)).await?;

    // A client that can't be asked: the server is told so instead of waiting.
    let mute = reopened(&scene, &path).await?;
    let begun = Instant::now();
    let outcome = mute.call(1, "ask", json!({ "text": "who are you?" })).await;
    let heard: Value = serde_json::from_str(outcome.text().ok_or_else(|| format!("{outcome:?}"))?)?;
    assert_eq!(heard.pointer("/error/code"), Some(&json!(-32601)), "{heard}");
    assert!(begun.elapsed() < Duration::from_secs(10), "told after {:?} only", begun.elapsed());

    // One that can: it is asked where it waits for the answer, and what it says is what the server hears.
    let able = Session::open(&scene.agent, &path, json!({ "sampling": {} })).await?;
    let said = json!({ "role": "assistant", "model": "story", "content": { "type": "text", "text": "a story" } });
    let outcome = able.call_and_reply(1, "ask", json!({ "text": "who are you?" }), |_| said.clone()).await?;
    let heard: Value = serde_json::from_str(outcome.text().ok_or_else(|| format!("{outcome:?}"))?)?;
    assert_eq!(heard.pointer("/result/content/text"), Some(&json!("a story")), "{heard}");
    Ok(())
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_server_that_never_begins_is_not_called_running() -> Story {
    let (scene, path) = scene_with(&Server::moody("well", None)).await?;
    let before = scene.docker_inventory().await?;
    for mood in ["exit", "hang"] {
        let server = Server::moody("ill", Some(mood));
        let mut deploy = server.deploy(&scene.stack);
        // It isn't waited for as long as for others.
        deploy["healthCheck"] = json!({ "startPeriodSeconds": 10, "timeoutSeconds": 2 });
        let request = scene.agent.request(Method::POST, "/tools?wait=140").json(&deploy);
        let reply = request.send().await?;
        let (status, answer) = (reply.status().as_u16(), reply.json::<Value>().await?);
        assert_ne!(status, 201, "{mood}: {answer}");
        let reason = match status {
            // It goes on trying, and says why it isn't there yet.
            202 => {
                let view = until("it says what is wrong", SOON, async || {
                    let view = instance(&scene, server.name).await?;
                    let reason = view.error.clone().or_else(|| view.health_reason.clone());
                    Ok(reason.filter(|_| view.state != InstanceState::Pulling))
                });
                view.await?
            }
            _ => answer["error"].as_str().unwrap_or_default().to_owned(),
        };
        println!("{mood}: {status}, {reason}");
        assert!(reason.len() > 10, "{mood}: {answer}");
        // The one beside it is as well as before.
        let session = reopened(&scene, &path).await?;
        assert_eq!(session.call(1, "echo", json!({ "text": mood })).await.text(), Some(mood));
        if status == 202 {
            let reply = scene.agent.send(Method::DELETE, "/tools/ill?volumes=true", None).await?;
            assert_eq!(reply.status, 200, "{}", reply.text);
        }
        assert_eq!(scene.docker_inventory().await?, before, "left behind by one that begins with {mood}");
    }
    Ok(())
}
