//! The real DigitalOcean client against a local HTTP server, status by status.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use dtma_provisioner::cloud::digitalocean::DigitalOcean;
use dtma_provisioner::cloud::{ActionStatus, Cloud, CloudError, CreateError, CreateRequest, Power};
use dtma_provisioner::environment::DropletId;
use dtma_provisioner::metrics::Metrics;
use http_body_util::BodyExt;
use secrecy::SecretString;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::rig::spec;

type Script = Vec<(u16, Value)>;

#[derive(Clone, Default)]
struct Server {
    answers: Arc<Mutex<Script>>,
    seen: Arc<Mutex<Vec<(String, Bytes)>>>,
}

impl Server {
    async fn start(answers: Script) -> (Self, DigitalOcean) {
        let server = Self { answers: Arc::new(Mutex::new(answers)), seen: Arc::default() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(answer).with_state(server.clone());
        drop(tokio::spawn(axum::serve(listener, router).into_future()));
        (server, client(&base))
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().map(|(line, _)| line.clone()).collect()
    }
}

async fn answer(State(server): State<Server>, request: Request) -> Response {
    assert_eq!(request.headers()["authorization"], "Bearer cloud-token");
    let line = format!("{} {}", request.method(), request.uri());
    let body = request.into_body().collect().await.unwrap().to_bytes();
    server.seen.lock().unwrap().push((line, body));
    let mut answers = server.answers.lock().unwrap();
    let (status, body) = if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() };
    let body = match body {
        Value::Null => String::new(),
        Value::String(raw) => raw,
        json => json.to_string(),
    };
    let mut response = (StatusCode::from_u16(status).unwrap(), body).into_response();
    response.headers_mut().insert("x-request-id", "req-1".parse().unwrap());
    response
}

fn client(base: &str) -> DigitalOcean {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let token = SecretString::from("cloud-token".to_owned());
    DigitalOcean::new(base, token, vec!["3b:16:e4".to_owned(), "42".to_owned()], Arc::new(Metrics::default())).unwrap()
}

fn request() -> CreateRequest {
    CreateRequest {
        name: "dtma-1".to_owned(),
        spec: spec(),
        tags: vec!["dtma-fleet".to_owned(), "dtma-attempt:1".to_owned()],
        user_data: SecretString::from("#cloud-config\n".to_owned()),
    }
}

fn droplet(id: i64) -> Value {
    json!({
        "id": id, "status": "active", "created_at": "2026-08-07T10:00:00Z", "tags": ["dtma-fleet"], "unknown": {"x": 1},
        "networks": {"v4": [
            {"ip_address": "10.1.2.3", "type": "private", "netmask": "255.0.0.0"},
            {"ip_address": "203.0.113.7", "type": "public"},
        ], "v6": []},
    })
}

fn error(id: &str, message: &str) -> Value {
    json!({"id": id, "message": message})
}

#[tokio::test]
async fn a_create_sends_what_the_api_asks_for_and_reads_the_acceptance() {
    let accepted = json!({"droplet": {"id": 7}, "links": {"actions": [{"id": 70, "rel": "create", "href": "h"}]}});
    let (server, client) = Server::start(vec![(202, accepted)]).await;
    let created = client.create(&request()).await.unwrap();
    assert_eq!((created.droplet, created.action), (DropletId(7), Some(70)));
    let (line, body) = server.seen.lock().unwrap()[0].clone();
    assert_eq!(line, "POST /v2/droplets");
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        body,
        json!({
            "name": "dtma-1", "region": "nyc3", "size": "s-1vcpu-1gb", "image": "debian-12-x64",
            "tags": ["dtma-fleet", "dtma-attempt:1"], "user_data": "#cloud-config\n", "with_droplet_agent": false,
            "ssh_keys": ["3b:16:e4", 42],
        })
    );
}

#[tokio::test]
async fn a_create_is_sent_once_whatever_comes_back_and_its_failures_are_told_apart() {
    let no = error("unprocessable_entity", "Size is not available in this region.");
    for (status, body, expected) in [
        (422, no.clone(), "refused"),
        (401, error("unauthorized", "Unable to authenticate you"), "refused"),
        (403, error("forbidden", "You do not have access"), "refused"),
        (429, error("too_many_requests", "API rate limit exceeded."), "rate limited"),
        (429, Value::Null, "rate limited"),
        (500, error("server_error", "Unexpected server-side error"), "doubtful"),
        (503, Value::String("<html>".to_owned()), "doubtful"),
        (504, Value::Null, "doubtful"),
        (408, error("timeout", "x"), "doubtful"),
        // Something between us and the cloud said this, and not the cloud.
        (403, Value::String("<html>".to_owned()), "doubtful"),
        (307, Value::Null, "doubtful"),
        (202, Value::String("{".to_owned()), "doubtful"),
        (202, json!({}), "doubtful"),
    ] {
        let (server, client) = Server::start(vec![(status, body.clone())]).await;
        let failure = client.create(&request()).await.unwrap_err();
        let kind = match &failure {
            CreateError::Refused(refusal) => {
                assert_eq!(refusal.request_id.as_deref(), Some("req-1"));
                assert_eq!(refusal.message, body["message"]);
                "refused"
            }
            CreateError::RateLimited(_) => "rate limited",
            CreateError::NotSent(_) => "not sent",
            CreateError::Doubtful { .. } => "doubtful",
        };
        assert_eq!(kind, expected, "{status} {body}: {failure}");
        assert_eq!(server.seen().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn a_create_that_never_left_is_told_from_one_whose_answer_was_lost() {
    // Nobody listens.
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let failure = client(&format!("http://{free}")).create(&request()).await.unwrap_err();
    assert!(matches!(failure, CreateError::NotSent(_)), "{failure}");

    // Read or not read, then hung up; and hung up in the middle of an answer.
    for (reads, says) in
        [(false, ""), (true, ""), (true, "HTTP/1.1 202 Accepted\r\ncontent-length: 999\r\n\r\n{\"drop")]
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let connections = tokio::spawn(async move {
            let mut connections = 0;
            while let Ok(accepted) =
                tokio::time::timeout(std::time::Duration::from_millis(300), listener.accept()).await
            {
                let (mut stream, _) = accepted.unwrap();
                connections += 1;
                if reads {
                    let mut buffer = [0; 4096];
                    let _ = stream.read(&mut buffer).await;
                }
                let _ = stream.write_all(says.as_bytes()).await;
            }
            connections
        });
        let failure = client(&base).create(&request()).await.unwrap_err();
        assert!(matches!(failure, CreateError::Doubtful { .. }), "{failure}");
        assert_eq!(connections.await.unwrap(), 1, "sent once");
    }
}

#[tokio::test]
async fn questions_are_repeated_until_they_are_answered() {
    let (server, client) = Server::start(vec![
        (500, Value::Null),
        (429, error("too_many_requests", "x")),
        (200, json!({"droplet": droplet(7)})),
    ])
    .await;
    let found = client.droplet(DropletId(7)).await.unwrap().unwrap();
    assert_eq!((found.id, found.power), (DropletId(7), Power::Active));
    assert_eq!(found.public_ip.unwrap().to_string(), "203.0.113.7");
    assert_eq!(server.seen(), ["GET /v2/droplets/7"; 3]);
}

#[tokio::test]
async fn repeating_ends_and_what_will_not_pass_is_not_repeated() {
    let (server, client) = Server::start(vec![(500, error("server_error", "still broken"))]).await;
    let failure = client.droplet(DropletId(7)).await.unwrap_err();
    assert!(failure.to_string().contains("still broken") && failure.to_string().contains("req-1"), "{failure}");
    assert_eq!(server.seen().len(), 4);

    let (server, client) = Server::start(vec![(403, error("forbidden", "no"))]).await;
    assert!(matches!(client.delete(DropletId(7)).await, Err(CloudError::Refused { .. })));
    assert_eq!(server.seen(), ["DELETE /v2/droplets/7"]);
}

#[tokio::test]
async fn an_absent_droplet_is_an_answer_and_deleting_it_a_success() {
    let (_, client) = Server::start(vec![(404, error("not_found", "x"))]).await;
    assert_eq!(client.droplet(DropletId(7)).await.unwrap(), None);
    assert_eq!(client.action(9).await.unwrap(), None);
    assert_eq!(client.tagged("t").await.unwrap(), []);
    client.delete(DropletId(7)).await.unwrap();
}

#[tokio::test]
async fn a_list_is_read_to_its_last_page_or_not_at_all() {
    let page = |ids: &[i64], more: bool| {
        let droplets: Vec<Value> = ids.iter().map(|id| droplet(*id)).collect();
        let links = if more { json!({"pages": {"next": "https://api/v2/droplets?page=9"}}) } else { json!({}) };
        json!({"droplets": droplets, "links": links, "meta": {"total": 3}})
    };
    let (server, client) = Server::start(vec![(200, page(&[1, 2], true)), (200, page(&[3], false))]).await;
    let ids: Vec<i64> = client.tagged("dtma-env:x").await.unwrap().iter().map(|droplet| droplet.id.0).collect();
    assert_eq!(ids, [1, 2, 3]);
    assert_eq!(
        server.seen(),
        [
            "GET /v2/droplets?tag_name=dtma-env:x&per_page=200&page=1",
            "GET /v2/droplets?tag_name=dtma-env:x&per_page=200&page=2"
        ]
    );
    let (_, client) = Server::start(vec![(200, page(&[1], true)), (500, Value::Null)]).await;
    assert!(client.tagged("t").await.is_err());
    let (_, client) = Server::start(vec![(200, Value::String("[".to_owned()))]).await;
    assert!(matches!(client.tagged("t").await, Err(CloudError::Unreadable { .. })));
}

#[tokio::test]
async fn words_and_fields_nobody_announced_are_no_error() {
    let odd = json!({"droplet": {"id": 7, "status": "archive", "created_at": "2026-08-07T10:00:00Z"}});
    let (_, client) = Server::start(vec![(200, odd)]).await;
    let found = client.droplet(DropletId(7)).await.unwrap().unwrap();
    assert_eq!((found.power, found.public_ip), (Power::Other, None));
    for (word, expected) in [
        ("completed", ActionStatus::Completed),
        ("errored", ActionStatus::Errored),
        ("in-progress", ActionStatus::InProgress),
        ("dancing", ActionStatus::InProgress),
    ] {
        let (_, client) = Server::start(vec![(200, json!({"action": {"id": 1, "status": word}}))]).await;
        assert_eq!(client.action(1).await.unwrap(), Some(expected));
    }
}
