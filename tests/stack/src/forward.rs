//! A way to an agent for clients that know neither pins nor keys: plain HTTP on loopback, passed on over TLS to the pinned key, with
//! the fleet key as bearer. Bodies stream in both directions, and who hangs up is hung up on at the other end.

use std::net::SocketAddr;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::agent::Agent;
use crate::error::{Result, StackError};

/// What is said between neighbours, and `content-length` and `host`, which the next client says for itself.
const NOT_PASSED_ON: [HeaderName; 6] =
    [header::CONNECTION, header::TRANSFER_ENCODING, header::TE, header::UPGRADE, header::HOST, header::AUTHORIZATION];

/// It listens until it is dropped.
#[derive(Debug)]
pub struct Forward {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Forward {
    /// Listens on a free port of loopback.
    ///
    /// # Errors
    /// When it can't listen.
    pub async fn to(agent: Agent) -> Result<Self> {
        let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await;
        let listener = listener.map_err(StackError::io("listen on loopback"))?;
        let address = listener.local_addr().map_err(StackError::io("read a listener's address"))?;
        let routes = Router::new().fallback(pass_on).with_state(agent);
        let task = tokio::spawn(async move {
            // It never ends by itself, and what a single connection suffers is no error here.
            drop(axum::serve(listener, routes).await);
        });
        Ok(Self { address, task })
    }

    /// What `path` at the agent is called here.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass_on(State(agent): State<Agent>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = agent.request(parts.method, path).headers(passed_on(&parts.headers));
    // A GET with a chunked body of nothing is not what the client sent.
    let has_body =
        parts.headers.contains_key(header::CONTENT_LENGTH) || parts.headers.contains_key(header::TRANSFER_ENCODING);
    if has_body {
        request = request.body(reqwest::Body::wrap_stream(body.into_data_stream()));
    }
    match request.send().await {
        Ok(answer) => {
            let (status, headers) = (answer.status(), passed_on(answer.headers()));
            let mut response = Response::new(Body::from_stream(answer.bytes_stream()));
            *response.status_mut() = status;
            *response.headers_mut() = headers;
            response
        }
        Err(error) => (StatusCode::BAD_GATEWAY, format!("{error:?}")).into_response(),
    }
}

fn passed_on(headers: &HeaderMap) -> HeaderMap {
    let kept = headers.iter().filter(|(name, _)| !NOT_PASSED_ON.contains(name));
    // Appended one by one: a name may come more than once.
    let mut passed = HeaderMap::new();
    for (name, value) in kept {
        passed.append(name, value.clone());
    }
    passed
}
