//! What every request to the API passes, in this order: the log, the token, the rate limits, faults, the handler; and what its answer
//! passes on the way back: headers, the contract check, the log.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use crate::api::{ApiError, NoRoom, find_operation};
use crate::cloud::Clock;
use crate::contract::Contract;
use crate::faults::{Fault, Faults, When};
use crate::limits::{Limiter, Limits, Refused, Verdict};

/// Bytes of a request body: the user data of a droplet, escaped as JSON, and the rest of the order.
const BODY_MAX: usize = 512 * 1024;

/// `GET /v2/account/keys` is limited more tightly than anything else.
const KEYS_A_MINUTE: usize = 10;

/// Marks an answer that must not be sent: the connection is closed instead.
#[derive(Debug, Clone, Copy)]
pub struct Dropped;

/// One request, as `GET /control/requests` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct LoggedRequest {
    /// Counts up from 1.
    pub sequence: usize,
    /// `operationId`; `None` for a path the API doesn't have.
    pub operation: Option<&'static str>,
    /// The verb.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Status of the answer; `None` while there is none and when there never will be.
    pub status: Option<u16>,
    /// Whether the connection was closed instead of an answer.
    pub dropped: bool,
    /// When it came in.
    pub at: Timestamp,
}

/// A request or an answer that isn't what DigitalOcean's description says, as `GET /control/violations` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct Violation {
    /// The request's.
    pub sequence: usize,
    /// The request's.
    pub operation: &'static str,
    /// `request` or `answer`.
    pub side: &'static str,
    /// What is wrong, with its place.
    pub message: String,
}

/// What the gate remembers.
#[derive(Debug)]
pub struct Book {
    limiter: Limiter,
    keys_limiter: Limiter,
    /// Faults waiting for requests.
    pub faults: Faults,
    /// Every request so far.
    pub requests: Vec<LoggedRequest>,
    /// Everything found wrong so far.
    pub violations: Vec<Violation>,
}

/// The gate. Cheap to clone.
#[derive(Clone)]
pub struct Gate(Arc<Inner>);

struct Inner {
    token: SecretString,
    contract: Option<Contract>,
    clock: Clock,
    book: Mutex<Book>,
}

/// One request's way through.
struct Passage {
    sequence: usize,
    operation: Option<&'static str>,
    path: String,
    query: String,
    verdict: Option<Verdict>,
}

impl Gate {
    /// A gate that lets through who bears `token`, and checks traffic where it is given a contract.
    pub fn new(token: SecretString, limits: Limits, contract: Option<Contract>, clock: Clock) -> Self {
        let keys = Limits { minute: KEYS_A_MINUTE, ..limits };
        let book = Book {
            limiter: Limiter::new(limits),
            keys_limiter: Limiter::new(keys),
            faults: Faults::default(),
            requests: Vec::new(),
            violations: Vec::new(),
        };
        Self(Arc::new(Inner { token, contract, clock, book: Mutex::new(book) }))
    }

    /// What the gate remembers. Not to be held over anything slow.
    pub fn book(&self) -> MutexGuard<'_, Book> {
        // A panic while it was held can only have happened between two complete changes.
        self.0.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the headers carry the token.
    pub fn admits(&self, headers: &HeaderMap) -> bool {
        let presented = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        presented
            .and_then(|value| value.strip_prefix("Bearer "))
            .is_some_and(|token| token == self.0.token.expose_secret())
    }

    fn enter(&self, method: &Method, route: Option<&str>, uri: &axum::http::Uri) -> Passage {
        let operation = route.and_then(|route| find_operation(method, route));
        let path = uri.path_and_query().map_or_else(|| uri.path().to_owned(), ToString::to_string);
        let mut book = self.book();
        let sequence = book.requests.len() + 1;
        let at = (self.0.clock)();
        book.requests.push(LoggedRequest {
            sequence,
            operation,
            method: method.to_string(),
            path,
            status: None,
            dropped: false,
            at,
        });
        Passage {
            sequence,
            operation,
            path: uri.path().to_owned(),
            query: uri.query().unwrap_or_default().to_owned(),
            verdict: None,
        }
    }

    fn limit(&self, operation: Option<&str>) -> Verdict {
        let now = (self.0.clock)();
        let mut book = self.book();
        if operation == Some("sshKeys_list") {
            let keys = book.keys_limiter.take(now);
            if keys.refused.is_some() {
                return keys;
            }
        }
        book.limiter.take(now)
    }

    fn blame(&self, passage: &Passage, side: &'static str, messages: Vec<String>) {
        let Some(operation) = passage.operation else { return };
        for message in messages {
            tracing::warn!(sequence = passage.sequence, operation, side, message, "traffic breaks the contract");
            self.book().violations.push(Violation { sequence: passage.sequence, operation, side, message });
        }
    }

    fn check_request(&self, passage: &Passage, body: &[u8]) {
        if let (Some(contract), Some(operation)) = (&self.0.contract, passage.operation) {
            self.blame(passage, "request", contract.check_request(operation, &passage.path, &passage.query, body));
        }
    }

    fn check_answer(&self, passage: &Passage, status: StatusCode, body: &[u8]) {
        if let (Some(contract), Some(operation)) = (&self.0.contract, passage.operation) {
            self.blame(passage, "answer", contract.check_answer(operation, status.as_u16(), body));
        }
    }

    /// Everything before the answer's way back.
    async fn carry(&self, passage: &mut Passage, request: Request, next: Next) -> Response {
        if !self.admits(request.headers()) {
            return ApiError::Unauthorized.into_response();
        }
        let verdict = self.limit(passage.operation);
        passage.verdict = Some(verdict);
        if let Some(refused) = verdict.refused {
            let mut response = ApiError::TooManyRequests.into_response();
            if let Refused::Minute { retry_after } = refused {
                response.headers_mut().insert(header::RETRY_AFTER, retry_after.into());
            }
            return response;
        }
        let (mut parts, body) = request.into_parts();
        let Ok(body) = to_bytes(body, BODY_MAX).await else {
            return ApiError::BadRequest(format!("The request body is longer than {BODY_MAX} bytes.")).into_response();
        };
        self.check_request(passage, &body);
        let fault = passage.operation.and_then(|operation| self.book().faults.strike(operation));
        match fault {
            Some(Fault::Status { status }) => return fault_answer(status),
            Some(Fault::Drop { when: When::Before }) => return dropped(),
            Some(Fault::Delay { when: When::Before, ms }) => tokio::time::sleep(Duration::from_millis(ms)).await,
            Some(Fault::PlacementFailure) => {
                parts.extensions.insert(NoRoom);
            }
            Some(Fault::Drop { when: When::After } | Fault::Delay { when: When::After, .. }) | None => {}
        }
        let response = next.run(Request::from_parts(parts, Body::from(body))).await;
        match fault {
            Some(Fault::Drop { when: When::After }) => return dropped(),
            Some(Fault::Delay { when: When::After, ms }) => tokio::time::sleep(Duration::from_millis(ms)).await,
            Some(Fault::Drop { .. } | Fault::Delay { .. } | Fault::Status { .. } | Fault::PlacementFailure) | None => {}
        }
        response
    }

    /// The answer's way back.
    async fn send(&self, passage: &Passage, response: Response) -> Response {
        if response.extensions().get::<Dropped>().is_some() {
            self.log(passage, |entry| entry.dropped = true);
            return response;
        }
        let request_id = Uuid::new_v4().to_string();
        let (mut parts, body) = response.into_parts();
        let body = to_bytes(body, usize::MAX).await.unwrap_or_default();
        let body = if parts.status.is_success() { body } else { with_request_id(&body, &request_id) };
        self.check_answer(passage, parts.status, &body);
        parts.headers.remove(header::CONTENT_LENGTH);
        if let Ok(value) = HeaderValue::from_str(&request_id) {
            parts.headers.insert("x-request-id", value);
        }
        if let Some(verdict) = passage.verdict {
            parts.headers.insert("ratelimit-limit", verdict.limit.into());
            parts.headers.insert("ratelimit-remaining", verdict.remaining.into());
            parts.headers.insert("ratelimit-reset", verdict.reset.as_second().into());
        }
        let status = parts.status.as_u16();
        self.log(passage, |entry| entry.status = Some(status));
        Response::from_parts(parts, Body::from(body))
    }

    fn log(&self, passage: &Passage, change: impl FnOnce(&mut LoggedRequest)) {
        if let Some(entry) = self.book().requests.get_mut(passage.sequence - 1) {
            change(entry);
        }
    }
}

/// Middleware: one request's whole way.
pub async fn pass(State(gate): State<Gate>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map(|route| route.as_str().to_owned());
    let mut passage = gate.enter(request.method(), route.as_deref(), request.uri());
    let response = gate.carry(&mut passage, request, next).await;
    gate.send(&passage, response).await
}

fn dropped() -> Response {
    let mut response = Response::new(Body::empty());
    response.extensions_mut().insert(Dropped);
    response
}

fn fault_answer(status: u16) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = ApiError::Fault(status).into_response();
    if status == StatusCode::TOO_MANY_REQUESTS {
        // As the limit on bursts answers; without it a caller would rightly wait for the hour to pass.
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// DigitalOcean's errors name the request in their body too.
fn with_request_id(body: &Bytes, request_id: &str) -> Bytes {
    match serde_json::from_slice(body) {
        Ok(Value::Object(mut error)) if error.contains_key("id") => {
            error.insert("request_id".to_owned(), request_id.into());
            Value::Object(error).to_string().into()
        }
        Ok(_) | Err(_) => body.clone(),
    }
}
