//! The client's side of a bridge: streamable HTTP in both eras.
//!
//! A call is answered with JSON when its answer is the first thing that comes, and with a stream of events when something else comes first, or
//! nothing does for a while. A client that hangs up cancels its call, in both eras: there are no streams to resume here, so nobody could be
//! told the answer any more.

use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::budget::Parcel;
use super::envelope::{self, Envelope, Kind};
use super::eras::Way;
use super::feed::{self, Call, Ear, Shape};
use super::line::{Came, NotSent, Pending};
use super::switchboard::{Abilities, Owner, Refusal};
use super::{Bridge, HANDSHAKE, IN_UNIT, IN_UNITS, InUse, STARTING};
use crate::mcp::MAX_MESSAGE_BYTES;
use crate::mcp::era::{LEGACY, MODERN};
use crate::mcp::link::LinkEnd;

const SESSION: &str = "mcp-session-id";
const VERSION: &str = "mcp-protocol-version";
const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";
/// Methods of whose results the newer era wants to know how long they may be kept.
const CACHEABLE: [&str; 5] =
    ["tools/list", "prompts/list", "resources/list", "resources/templates/list", "resources/read"];
/// How long a client waits for the head of an answer. After that it is a stream, whatever comes on it.
const HEAD: Duration = Duration::from_secs(5);
/// How long a request waits for memory.
const ROOM: Duration = Duration::from_secs(10);
/// The protocol's code for headers that say something else than the message.
const HEADER_MISMATCH: i64 = -32020;

/// Why a request wasn't taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Only POST, GET and DELETE mean anything here; in the newer era only POST.
    #[error("MCP over streamable HTTP has no such request; the Allow header says which there are")]
    Method {
        /// Those that there are.
        allowed: &'static str,
    },
    /// The client must be able to read what may come.
    #[error("the Accept header must name {0}")]
    NotAcceptable(&'static str),
    /// A message is JSON.
    #[error("the Content-Type of a message must be application/json")]
    NotJson,
    /// The message is too long.
    #[error("the message is longer than {MAX_MESSAGE_BYTES} bytes")]
    TooLong,
    /// The client broke off.
    #[error("the message broke off")]
    BrokeOff,
    /// It is no message.
    #[error("this is not one JSON-RPC message: {0}")]
    NoMessage(String),
    /// Nobody here speaks that.
    #[error("the protocol version {0} is not supported")]
    Version(String),
    /// Everything but `initialize` needs a session.
    #[error("the header Mcp-Session-Id is missing; begin with initialize")]
    NoSession,
    /// There is no such session, or not any more.
    #[error("there is no such session, or the server has been started again since; begin anew with initialize")]
    DeadSession,
    /// The session has one.
    #[error("a request with this id is under way in this session")]
    IdInUse,
    /// As many as may have one.
    #[error("{most} clients have a session with this server, and there can't be more; DELETE ends one")]
    TooManySessions {
        /// How many may have one.
        most: usize,
    },
    /// As many as may be are under way.
    #[error("too many calls are under way to this server")]
    TooManyCalls,
    /// Too many large messages at once.
    #[error("the agent is taking in as many messages for this server as it may")]
    Busy,
    /// There is no server at the other end, or none that speaks MCP.
    #[error("{0}")]
    Unreachable(LinkEnd),
    /// The server didn't answer a client's `initialize`.
    #[error("the server has not answered initialize in time; a shared one that is still starting answers a later try")]
    Silent,
}

impl From<NotSent> for Refused {
    fn from(not_sent: NotSent) -> Self {
        match not_sent {
            NotSent::Refused(Refusal::TooManyCalls) => Self::TooManyCalls,
            NotSent::Refused(Refusal::IdInUse) => Self::IdInUse,
            NotSent::Ended(end) => Self::Unreachable(end),
        }
    }
}

impl Bridge {
    /// Answers one request of a client.
    ///
    /// # Errors
    /// See [`Refused`]; nothing has been answered then.
    pub async fn serve(&self, request: Request<Body>) -> Result<Response<Body>, Refused> {
        let (parts, body) = request.into_parts();
        match parts.method {
            Method::POST => self.post(parts, body).await,
            Method::GET => self.get(&parts.headers),
            Method::DELETE => self.delete(&parts.headers),
            _ => Err(Refused::Method { allowed: "POST, GET, DELETE" }),
        }
    }

    async fn post(&self, parts: Parts, body: Body) -> Result<Response<Body>, Refused> {
        let headers = &parts.headers;
        if !essence(headers.get(header::CONTENT_TYPE)).eq_ignore_ascii_case(JSON) {
            return Err(Refused::NotJson);
        }
        if !accepts(headers, JSON) || !accepts(headers, EVENTS) {
            return Err(Refused::NotAcceptable("application/json and text/event-stream"));
        }
        let (message, room) = self.take_in(headers, body).await?;
        let envelope = Envelope::read(&message).map_err(|malformed| Refused::NoMessage(malformed.to_string()))?;
        let era = Era::of(headers, &envelope)?;
        let is_initialize = envelope.kind == Kind::Request && envelope.method == "initialize";
        match era {
            // Whoever says its version with it means the newer era, which has no such thing.
            _ if is_initialize && envelope.meta.protocol_version.is_none() => self.initialize(&envelope).await,
            Era::Modern if is_initialize => {
                let why = "this version of the protocol has no initialize";
                let error = envelope::error(envelope.id, envelope::METHOD_NOT_FOUND, why);
                Ok(json(StatusCode::NOT_FOUND, error))
            }
            Era::Modern => self.modern(headers, &envelope, room).await,
            Era::Legacy => self.legacy(headers, &envelope, room).await,
        }
    }

    /// Reads a message, and has the memory for it: for all of it beforehand where its length is known, otherwise for as much as has come.
    async fn take_in(&self, headers: &HeaderMap, body: Body) -> Result<(Bytes, OwnedSemaphorePermit), Refused> {
        let declared = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        let declared: usize = declared.unwrap_or(0);
        if declared > MAX_MESSAGE_BYTES {
            return Err(Refused::TooLong);
        }
        let mut room = self.room(units(declared)).await?;
        let mut message = BytesMut::with_capacity(declared);
        let mut body = Limited::new(body, MAX_MESSAGE_BYTES);
        while let Some(frame) = body.frame().await {
            let frame = frame
                .map_err(|error| if error.is::<LengthLimitError>() { Refused::TooLong } else { Refused::BrokeOff })?;
            let Ok(data) = frame.into_data() else { continue };
            let more = units(message.len() + data.len()).saturating_sub(room.num_permits());
            if more > 0 {
                // Several may wait for each other here; the first that has waited long enough makes room for the rest.
                room.merge(self.room(more).await?);
            }
            message.extend_from_slice(&data);
        }
        Ok((message.freeze(), room))
    }

    async fn room(&self, units: usize) -> Result<OwnedSemaphorePermit, Refused> {
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        match timeout(ROOM, self.inbound.clone().acquire_many_owned(units)).await {
            Ok(Ok(room)) => Ok(room),
            Ok(Err(_)) | Err(_) => Err(Refused::Busy),
        }
    }

    async fn initialize(&self, request: &Envelope<'_>) -> Result<Response<Body>, Refused> {
        if !self.sharing.has_own_links() {
            let (line, known) = self.common_in_time().await?;
            let nobody = || Refused::Unreachable(LinkEnd::because("nobody has shaken hands"));
            let known = known.ok_or_else(nobody)?;
            let wanted = envelope::string(request.params.protocol_version);
            return match known.answer(request.id, wanted.as_deref()) {
                Ok(answer) => {
                    let session = self.admit(line, abilities(request), self.seat()?);
                    Ok(with_session(json(StatusCode::OK, answer), &session))
                }
                Err(refusal) => Ok(json(StatusCode::OK, refusal)),
            };
        }
        // First of all: what there is no room for isn't even begun.
        let seat = self.seat()?;
        let line = self.open().await.map_err(Refused::Unreachable)?;
        let session = self.admit(line, Abilities::ANY, seat);
        // Until the server has agreed nobody knows of the session, so it ends with whatever goes wrong here.
        let unknown = Unknown { bridge: self, id: session.id.clone(), agreed: false };
        let pending = session.line.call(Owner::Session(session.key), request).await?;
        // A process that was started for this session goes with it, so a later try would find it no further.
        let patience = if self.sharing.has_shared_link() { STARTING } else { HANDSHAKE };
        let answer = timeout(patience, pending.answer()).await.map_err(|_| Refused::Silent)?;
        let refused = Envelope::read(&answer).map_or(true, |answer| answer.error_code.is_some());
        if refused {
            return Ok(json(StatusCode::OK, answer));
        }
        unknown.agreed();
        Ok(with_session(json(StatusCode::OK, answer), &session))
    }

    async fn legacy(
        &self,
        headers: &HeaderMap,
        message: &Envelope<'_>,
        room: OwnedSemaphorePermit,
    ) -> Result<Response<Body>, Refused> {
        let session = self.session_of(headers)?;
        let owner = Owner::Session(session.key);
        let gone = |_: LinkEnd| Refused::DeadSession;
        match message.kind {
            Kind::Request => {
                let pending = session.line.call(owner, message).await.map_err(|not_sent| match not_sent {
                    NotSent::Ended(end) => gone(end),
                    refused @ NotSent::Refused(_) => refused.into(),
                })?;
                drop(room);
                Ok(answer(pending, Some(session), Era::Legacy, |message| message).await)
            }
            Kind::Notification => {
                // To a shared server the agent has said so itself, once.
                if self.sharing.has_own_links() || message.method != "notifications/initialized" {
                    session.line.notify(owner, message).await.map_err(gone)?;
                }
                Ok(accepted())
            }
            Kind::Response => {
                session.line.respond(session.key, message).await.map_err(gone)?;
                Ok(accepted())
            }
        }
    }

    async fn modern(
        &self,
        headers: &HeaderMap,
        message: &Envelope<'_>,
        room: OwnedSemaphorePermit,
    ) -> Result<Response<Body>, Refused> {
        match message.kind {
            Kind::Request => {
                if envelope::string(message.meta.protocol_version).is_none() {
                    return Ok(incomplete(message, "the message's _meta does not name the protocol version"));
                }
                if let Err(mismatch) = headers_say_the_same(headers, message) {
                    let error = envelope::error(message.id, HEADER_MISMATCH, &mismatch);
                    return Ok(json(StatusCode::BAD_REQUEST, error));
                }
                let mut way = self.way().await?;
                // What knows only the older era doesn't look at it.
                if !way.translated && message.meta.client_capabilities.is_none() {
                    return Ok(incomplete(message, "the message's _meta does not name what its client is capable of"));
                }
                let mut pending = self.ask_on(&way, message).await?;
                if let Some(Err(NotSent::Ended(_))) = pending {
                    // It ended just now, and nothing was sent.
                    way = self.way().await?;
                    pending = self.ask_on(&way, message).await?;
                }
                let Some(pending) = pending else {
                    // Clients that know both eras begin a session upon this, in which the server can ask them things, too.
                    let why = "this server is spoken to in the older era of the protocol: begin with initialize";
                    let error = envelope::error(message.id, envelope::METHOD_NOT_FOUND, why);
                    return Ok(json(StatusCode::NOT_FOUND, error));
                };
                drop(room);
                let shape: Shape = match (way.translated, CACHEABLE.contains(&message.method.as_str())) {
                    (false, _) => |message| message,
                    (true, false) => |message| envelope::in_modern_words(message, false),
                    (true, true) => |message| envelope::in_modern_words(message, true),
                };
                Ok(answer(pending?, None, Era::Modern, shape).await)
            }
            Kind::Notification => {
                // To a shared server the agent has said so itself, once.
                if !self.sharing.has_shared_link() || message.method != "notifications/initialized" {
                    let Way { line, .. } = self.way().await?;
                    line.notify(Owner::Lone, message).await.map_err(Refused::Unreachable)?;
                }
                Ok(accepted())
            }
            Kind::Response => Err(Refused::NoMessage("in this version of the protocol nobody asks clients".to_owned())),
        }
    }

    /// Asks the server what a client without a session asks; nothing where the server has no such thing.
    async fn ask_on(&self, way: &Way, message: &Envelope<'_>) -> Result<Option<Result<Pending, NotSent>>, Refused> {
        if way.translated && message.method == "server/discover" {
            return Ok(None);
        }
        let in_its_words = if way.translated { message.in_legacy_words() } else { message.with(&[]) };
        let request = Envelope::read(&in_its_words);
        let request = request.map_err(|malformed| Refused::NoMessage(malformed.to_string()))?;
        Ok(Some(way.line.call(Owner::Lone, &request).await))
    }

    fn get(&self, headers: &HeaderMap) -> Result<Response<Body>, Refused> {
        if headers.get(VERSION).is_some_and(|version| version.as_bytes() >= MODERN.as_bytes()) {
            return Err(Refused::Method { allowed: "POST" });
        }
        if !accepts(headers, EVENTS) {
            return Err(Refused::NotAcceptable(EVENTS));
        }
        let session = self.session_of(headers)?;
        session.listened.store(true, Ordering::Relaxed);
        let listening = session.line.listen(session.key);
        Ok(feed::events(Ear::new(listening, self.shutdown.clone(), session), None))
    }

    fn delete(&self, headers: &HeaderMap) -> Result<Response<Body>, Refused> {
        if headers.get(VERSION).is_some_and(|version| version.as_bytes() >= MODERN.as_bytes()) {
            return Err(Refused::Method { allowed: "POST" });
        }
        let session = self.session_of(headers)?;
        self.end(&session.id);
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NO_CONTENT;
        Ok(response)
    }

    fn session_of(&self, headers: &HeaderMap) -> Result<InUse, Refused> {
        let id = headers.get(SESSION).ok_or(Refused::NoSession)?;
        id.to_str().ok().and_then(|id| self.session(id)).ok_or(Refused::DeadSession)
    }
}

/// How much of the room for requests so many bytes take.
fn units(bytes: usize) -> usize {
    bytes.div_ceil(IN_UNIT).clamp(1, IN_UNITS)
}

/// A session whose handshake isn't over yet.
struct Unknown<'a> {
    bridge: &'a Bridge,
    id: String,
    agreed: bool,
}

impl Unknown<'_> {
    fn agreed(mut self) {
        self.agreed = true;
    }
}

impl Drop for Unknown<'_> {
    fn drop(&mut self) {
        if !self.agreed {
            self.bridge.end(&self.id);
        }
    }
}

/// Which protocol a message is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Era {
    /// With sessions.
    Legacy,
    /// Without.
    Modern,
}

impl Era {
    fn of(headers: &HeaderMap, message: &Envelope<'_>) -> Result<Self, Refused> {
        let version = headers.get(VERSION).map(|version| String::from_utf8_lossy(version.as_bytes()));
        let legacy = version.as_deref().is_none_or(|version| LEGACY.contains(&version));
        if message.meta.protocol_version.is_some() || version.as_deref() == Some(MODERN) {
            // Whether they say the same is looked at later, and answered in the words of that era.
            return Ok(Self::Modern);
        }
        match version {
            Some(version) if !legacy => Err(Refused::Version(version.chars().take(32).collect())),
            Some(_) | None => Ok(Self::Legacy),
        }
    }
}

/// A request of the newer era that lacks what each has to bear.
fn incomplete(request: &Envelope<'_>, why: &str) -> Response<Body> {
    json(StatusCode::BAD_REQUEST, envelope::error(request.id, envelope::INVALID_PARAMS, why))
}

/// In the newer era headers repeat what the message says, for those on the way who don't read messages.
fn headers_say_the_same(headers: &HeaderMap, message: &Envelope<'_>) -> Result<(), String> {
    let given = |name: &str| -> Result<Option<&str>, String> {
        let mut values = headers.get_all(name).iter();
        let Some(value) = values.next() else { return Ok(None) };
        if values.next().is_some() {
            return Err(format!("the header {name} is there twice"));
        }
        value.to_str().map(Some).map_err(|_| format!("the header {name} is not plain ASCII"))
    };
    let same = |name: &str, wanted: Option<String>| match (given(name)?, wanted) {
        (None, Some(_)) => Err(format!("the header {name} is missing")),
        (Some(value), Some(wanted)) if decoded(value).as_deref() != Some(wanted.as_str()) => {
            Err(format!("the header {name} and the message differ"))
        }
        (Some(_) | None, Some(_) | None) => Ok(()),
    };
    same(VERSION, envelope::string(message.meta.protocol_version))?;
    same("mcp-method", Some(message.method.clone()))?;
    match message.method.as_str() {
        "tools/call" | "prompts/get" => same("mcp-name", envelope::string(message.params.name)),
        "resources/read" => same("mcp-name", envelope::string(message.params.uri)),
        _ => Ok(()),
    }
}

/// What isn't plain ASCII comes as `=?base64?…?=`.
fn decoded(value: &str) -> Option<String> {
    use base64::Engine as _;
    match value.strip_prefix("=?base64?").and_then(|rest| rest.strip_suffix("?=")) {
        Some(encoded) => String::from_utf8(base64::engine::general_purpose::STANDARD.decode(encoded).ok()?).ok(),
        None => Some(value.to_owned()),
    }
}

/// What the client said it can be asked.
fn abilities(initialize: &Envelope<'_>) -> Abilities {
    // The rest of it isn't read: it may be of any size.
    #[derive(Default, Deserialize)]
    struct Capabilities<'a> {
        #[serde(borrow)]
        sampling: Option<&'a RawValue>,
        #[serde(borrow)]
        elicitation: Option<&'a RawValue>,
        #[serde(borrow)]
        roots: Option<&'a RawValue>,
    }
    let capabilities = initialize.params.capabilities.map_or("", RawValue::get);
    let Capabilities { sampling, elicitation, roots } = serde_json::from_str(capabilities).unwrap_or_default();
    let can = |what: Option<&RawValue>| what.is_some_and(|what| what.get().starts_with('{'));
    Abilities { sampling: can(sampling), elicitation: can(elicitation), roots: can(roots) }
}

fn essence(media_type: Option<&HeaderValue>) -> &str {
    let text = media_type.and_then(|value| value.to_str().ok()).unwrap_or_default();
    text.split(';').next().unwrap_or_default().trim()
}

fn accepts(headers: &HeaderMap, media_type: &str) -> bool {
    let family = media_type.split('/').next().unwrap_or_default();
    let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|range| {
        let range = range.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        range == media_type || range == "*/*" || range.strip_suffix("/*") == Some(family)
    })
}

fn accepted() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::ACCEPTED;
    response
}

fn json(status: StatusCode, message: Bytes) -> Response<Body> {
    feed::json(status, Parcel::ours(message))
}

fn with_session(mut response: Response<Body>, session: &InUse) -> Response<Body> {
    if let Ok(id) = HeaderValue::from_str(&session.id) {
        response.headers_mut().insert(SESSION, id);
    }
    response
}

/// The status that goes with an answer.
fn status_of(answer: &[u8], era: Era) -> StatusCode {
    if era == Era::Legacy {
        return StatusCode::OK;
    }
    match Envelope::read(answer).ok().and_then(|answer| answer.error_code) {
        Some(envelope::METHOD_NOT_FOUND) => StatusCode::NOT_FOUND,
        // A header, a capability, or a version that isn't as it has to be.
        Some(-32022..=HEADER_MISMATCH) => StatusCode::BAD_REQUEST,
        Some(_) | None => StatusCode::OK,
    }
}

async fn answer(mut pending: Pending, session: Option<InUse>, era: Era, shape: Shape) -> Response<Body> {
    let first = match timeout(HEAD, pending.next()).await {
        Ok(Some(Came::Answer(mut message))) => {
            let status = message.read(|message| status_of(message, era));
            message.reword(shape);
            return feed::json(status, message);
        }
        Ok(Some(Came::Related(message))) => Some(message),
        Ok(None) | Err(_) => None,
    };
    feed::events(Call::new(pending, shape, session), first)
}
