//! What every request goes through before and after its handler: a request id, the credential, a net under panics, a line in the log.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use dtma_api::REQUEST_ID_HEADER;
use futures_util::FutureExt as _;
use tracing::Instrument as _;
use uuid::Uuid;

use super::callers::{Callers, Credential};
use super::error::ApiError;
use super::rest::Rest;
use crate::config::PublicStatus;

/// Where a request came from.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub SocketAddr);

/// Whether a request may know everything, or only what anybody may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// It bore a key.
    Known,
    /// It bore none, and asked for something open.
    Anybody,
}

/// What stands before every handler.
#[derive(Debug)]
pub struct Gate {
    /// Who may call.
    pub callers: Arc<Callers>,
    /// What `GET /status` tells those who bear no key.
    pub public_status: PublicStatus,
    /// What has been answered.
    pub answered: Answered,
}

/// Requests answered since the agent started, by class of status code.
#[derive(Debug, Default)]
pub struct Answered {
    classes: [AtomicU64; 5],
}

impl Answered {
    fn count(&self, status: StatusCode) {
        if let Some(class) = self.classes.get(usize::from(status.as_u16() / 100).saturating_sub(1)) {
            class.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The class (`2xx`) and how many, for each.
    pub fn by_class(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let counts = self.classes.iter().map(|class| class.load(Ordering::Relaxed));
        ["1xx", "2xx", "3xx", "4xx", "5xx"].into_iter().zip(counts)
    }
}

/// The middleware around the whole router, unknown paths included.
pub async fn frame(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    let (mut request, rest) = Rest::of(request);
    let id = request_id(request.headers());
    let method = request.method().clone();
    let span = tracing::info_span!(
        "request",
        id = id.to_str().unwrap_or_default(),
        method = method.as_str(),
        path = request.uri().path()
    );
    let answer = async {
        let caller = match admit(&gate, &request) {
            Ok(caller) => caller,
            Err(refusal) => {
                let Refusal { source, error } = *refusal;
                if let Some(source) = source {
                    tracing::warn!(%source, "a wrong key was presented");
                    gate.callers.punish(source).await;
                }
                return error.into_response();
            }
        };
        request.extensions_mut().insert(caller);
        request.headers_mut().insert(REQUEST_ID_HEADER, id.clone());
        AssertUnwindSafe(next.run(request)).catch_unwind().await.unwrap_or_else(|_| {
            // The panic hook has logged what and where.
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "the agent failed; its log says why")
                .into_response()
        })
    };
    let mut response = answer.instrument(span.clone()).await;
    if let Some(rest) = rest {
        rest.discard().await;
    }
    response.headers_mut().insert(REQUEST_ID_HEADER, id);
    let status = response.status();
    gate.answered.count(status);
    span.in_scope(|| {
        if status.is_server_error() {
            tracing::warn!(status = status.as_u16(), "answered");
        } else if method.is_safe() {
            tracing::debug!(status = status.as_u16(), "answered");
        } else {
            tracing::info!(status = status.as_u16(), "answered");
        }
    });
    response
}

/// The caller's id where it is one we'd put in a log, otherwise a new one.
pub(super) fn request_id(headers: &HeaderMap) -> HeaderValue {
    let usable = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        !bytes.is_empty() && bytes.len() <= 128 && bytes.iter().all(u8::is_ascii_graphic)
    };
    let new = || HeaderValue::from_str(&Uuid::new_v4().to_string()).unwrap_or(HeaderValue::from_static("unknown"));
    headers.get(REQUEST_ID_HEADER).filter(usable).cloned().unwrap_or_else(new)
}

/// Why a request goes no further.
struct Refusal {
    error: ApiError,
    /// Who presented a wrong key, and has to wait for the answer.
    source: Option<IpAddr>,
}

fn admit(gate: &Gate, request: &Request) -> Result<Caller, Box<Refusal>> {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if reads && request.uri().path() == "/health" {
        return Ok(Caller::Anybody);
    }
    match gate.callers.judge(request.headers()) {
        Credential::Accepted => Ok(Caller::Known),
        Credential::Absent if reads && request.uri().path() == "/status" => match gate.public_status {
            PublicStatus::Liveness => Ok(Caller::Anybody),
            PublicStatus::Full => Ok(Caller::Known),
        },
        Credential::Absent => Err(unauthorized("credential_missing", "send the header Authorization: Bearer KEY")),
        Credential::Malformed => Err(unauthorized(
            "credential_malformed",
            "the Authorization header must be the word Bearer, a space and one key",
        )),
        Credential::Wrong => Err(Box::new(Refusal {
            error: ApiError::new(StatusCode::FORBIDDEN, "credential_wrong", "this key is not accepted here"),
            source: Some(request.extensions().get().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |Peer(peer)| peer.ip())),
        })),
    }
}

fn unauthorized(code: &str, error: &str) -> Box<Refusal> {
    let error = ApiError::new(StatusCode::UNAUTHORIZED, code, error)
        .with_header(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    Box::new(Refusal { error, source: None })
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::body::Body;
    use axum::routing::get;
    use dtma_api::{Failure, TokenHash};
    use http_body_util::BodyExt as _;
    use tower::ServiceExt as _;

    use super::*;

    fn gate(public_status: PublicStatus) -> Arc<Gate> {
        let callers = Arc::new(Callers::new(vec![TokenHash::of("key")]));
        Arc::new(Gate { callers, public_status, answered: Answered::default() })
    }

    fn router(gate: &Arc<Gate>) -> Router {
        let who = |request: Request| async move { format!("{:?}", request.extensions().get::<Caller>().unwrap()) };
        let panics = async || -> &'static str { panic!("a secret inside") };
        Router::new()
            .route("/health", get(who))
            .route("/status", get(who).post(who))
            .route("/panics", get(panics))
            .layer(axum::middleware::from_fn_with_state(gate.clone(), frame))
    }

    async fn call(router: &Router, request: &str, headers: &[(&str, &str)]) -> (StatusCode, HeaderMap, String) {
        let (method, path) = request.split_once(' ').unwrap();
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (parts.status, parts.headers, String::from_utf8(body.to_vec()).unwrap())
    }

    fn code(body: &str) -> String {
        serde_json::from_str::<Failure>(body).unwrap().code
    }

    #[tokio::test(start_paused = true)]
    async fn only_health_and_a_little_status_are_open() {
        let gate = gate(PublicStatus::Liveness);
        let router = router(&gate);
        assert_eq!(call(&router, "GET /health", &[]).await.2, "Anybody");
        assert_eq!(call(&router, "GET /status", &[]).await.2, "Anybody");
        let key = ("authorization", "Bearer key");
        assert_eq!(call(&router, "GET /status", &[key]).await.2, "Known");
        for closed in ["POST /status", "GET /panics", "GET /unknown", "GET /health/", "GET //health"] {
            let (status, headers, body) = call(&router, closed, &[]).await;
            assert_eq!((status, code(&body).as_str()), (StatusCode::UNAUTHORIZED, "credential_missing"), "{closed}");
            assert_eq!(headers[header::WWW_AUTHENTICATE], "Bearer");
        }
        let (status, _, body) = call(&router, "GET /status", &[("authorization", "key")]).await;
        assert_eq!((status, code(&body).as_str()), (StatusCode::UNAUTHORIZED, "credential_malformed"));
        let (status, _, body) = call(&router, "GET /status", &[("authorization", "Bearer no")]).await;
        assert_eq!((status, code(&body).as_str()), (StatusCode::FORBIDDEN, "credential_wrong"));
        assert_eq!(gate.callers.refused(), 1);
        assert_eq!(gate.answered.by_class().collect::<Vec<_>>()[3], ("4xx", 7));
    }

    #[tokio::test]
    async fn status_is_open_in_full_where_the_operator_says_so() {
        let router = router(&gate(PublicStatus::Full));
        assert_eq!(call(&router, "GET /status", &[]).await.2, "Known");
    }

    #[tokio::test]
    async fn every_answer_has_the_callers_request_id_or_a_new_one() {
        let router = router(&gate(PublicStatus::Liveness));
        let (_, headers, _) = call(&router, "GET /unknown", &[("x-request-id", "abc-1")]).await;
        assert_eq!(headers[REQUEST_ID_HEADER], "abc-1");
        for unusable in ["", "with space", &"x".repeat(129)] {
            let (_, headers, _) = call(&router, "GET /health", &[("x-request-id", unusable)]).await;
            assert_eq!(headers[REQUEST_ID_HEADER].len(), 36, "{unusable:?}");
        }
    }

    #[tokio::test]
    async fn a_panic_is_an_answer_that_reveals_nothing() {
        let router = router(&gate(PublicStatus::Liveness));
        let (status, headers, body) = call(&router, "GET /panics", &[("authorization", "Bearer key")]).await;
        assert_eq!((status, code(&body).as_str()), (StatusCode::INTERNAL_SERVER_ERROR, "internal_error"));
        assert!(!body.contains("secret") && headers.contains_key(REQUEST_ID_HEADER), "{body}");
    }
}
