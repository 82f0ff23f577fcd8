//! A backend that has secrets to give, between droplets and a provisioner, which has none: everything else is passed on to it.

use std::collections::BTreeMap;
use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::{Json, Router};
use dtma_api::Token;
use dtma_api::secrets::{SecretsAnswer, SecretsRequest};
use stack::Stack;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// By the instance's name and the secret's.
type Secrets = Arc<Mutex<BTreeMap<String, BTreeMap<String, Token>>>>;

#[derive(Debug, Clone)]
struct Behind {
    secrets: Secrets,
    provisioner: String,
    http: reqwest::Client,
}

/// It listens until it is dropped.
#[derive(Debug)]
pub struct Backend {
    address: SocketAddr,
    secrets: Secrets,
    task: JoinHandle<()>,
}

impl Backend {
    /// Puts itself before a stack's provisioner: droplets made from now on take it for the provisioner.
    ///
    /// # Errors
    /// When it can't listen, or the provisioner doesn't start again.
    pub async fn before(stack: &Stack) -> Result<Self, Box<dyn Error>> {
        let backend = Self::listen(stack.gateway(), stack.provisioner().url()).await?;
        stack.kill_provisioner().await?;
        let url = format!("http://{}", backend.address);
        stack.start_provisioner_with(&BTreeMap::from([("PUBLIC_URL".to_owned(), url)])).await?;
        Ok(backend)
    }

    async fn listen(host: IpAddr, provisioner: &str) -> Result<Self, Box<dyn Error>> {
        let listener = TcpListener::bind((host, 0)).await?;
        let (address, secrets) = (listener.local_addr()?, Secrets::default());
        let http = reqwest::Client::builder().no_proxy().build()?;
        let behind = Behind { secrets: secrets.clone(), provisioner: provisioner.to_owned(), http };
        let routes =
            Router::new().route("/agent/v1/fetch-tool-secrets", post(give)).fallback(pass_on).with_state(behind);
        let task = tokio::spawn(async move {
            // It never ends by itself, and what a single connection suffers is no error here.
            drop(axum::serve(listener, routes).await);
        });
        Ok(Self { address, secrets, task })
    }

    /// What an instance is given from now on, under this name.
    pub fn has(&self, instance: &str, name: &str, value: String) {
        let mut secrets = self.secrets.lock().unwrap_or_else(PoisonError::into_inner);
        secrets.entry(instance.to_owned()).or_default().insert(name.to_owned(), Token::from(value));
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn give(State(behind): State<Behind>, headers: HeaderMap, Json(wanted): Json<SecretsRequest>) -> Response {
    if !headers.contains_key(header::AUTHORIZATION) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let secrets = behind.secrets.lock().unwrap_or_else(PoisonError::into_inner);
    let own = secrets.get(&wanted.instance_name_on_toolbox.to_string()).cloned().unwrap_or_default();
    let secrets = own.into_iter().map(|(name, value)| (name, Some(value))).collect();
    Json(SecretsAnswer { secrets, ..SecretsAnswer::default() }).into_response()
}

async fn pass_on(State(behind): State<Behind>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut headers = parts.headers;
    // The next client says these for itself.
    for own in [header::HOST, header::CONNECTION, header::TRANSFER_ENCODING, header::CONTENT_LENGTH] {
        headers.remove(own);
    }
    let sent = behind.http.request(parts.method, format!("{}{path}", behind.provisioner)).headers(headers);
    match sent.body(reqwest::Body::wrap_stream(body.into_data_stream())).send().await {
        Ok(answer) => {
            let (status, headers) = (answer.status(), answer.headers().clone());
            let mut response = Response::new(Body::from_stream(answer.bytes_stream()));
            *response.status_mut() = status;
            *response.headers_mut() = headers;
            response.headers_mut().remove(header::CONNECTION);
            response.headers_mut().remove(header::TRANSFER_ENCODING);
            response
        }
        Err(error) => (StatusCode::BAD_GATEWAY, format!("{error:?}")).into_response(),
    }
}
