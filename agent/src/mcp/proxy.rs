//! Passes one HTTP exchange through to an instance that speaks streamable HTTP, both bodies as they come.

use std::net::SocketAddr;
use std::time::Duration;

use axum::body::Body;
use axum::http::uri::{Authority, PathAndQuery, Scheme};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, Version, header};
use futures_util::StreamExt as _;
use http_body_util::{LengthLimitError, Limited};
use hyper_util::client::legacy::Error as ClientError;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{HttpClient, MAX_MESSAGE_BYTES, http_client};
use crate::reconcile::Upstream;

/// From the whole request to the head of the answer. A server that answers with plain JSON sends its head only when a tool has
/// finished, and tools may take minutes.
const HEAD_TIMEOUT: Duration = Duration::from_secs(300);

/// Headers of one connection, not of the message (RFC 9110, 7.6.1); besides what `Connection` names.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Passes exchanges through. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Proxy {
    client: HttpClient,
    /// Ends streams that would otherwise go on for ever.
    shutdown: CancellationToken,
}

/// One exchange to pass through.
#[derive(Debug)]
pub struct Forwarding<'a> {
    /// Where to.
    pub upstream: &'a Upstream,
    /// What follows `/tools/{ref}/mcp` in the path as it was sent: empty, or beginning with `/`.
    pub suffix: &'a str,
    /// The part before it, for redirects to point back through us.
    pub prefix: &'a str,
}

/// Why an exchange didn't go through.
#[derive(Debug, thiserror::Error)]
pub enum Obstacle {
    /// The server doesn't accept connections.
    #[error("the server does not accept connections")]
    Unreachable(#[source] ClientError),
    /// It accepted, and hung up before it answered.
    #[error("the server hung up before it answered")]
    HungUp(#[source] ClientError),
    /// It took too long.
    #[error("the server did not begin to answer within {} seconds", HEAD_TIMEOUT.as_secs())]
    Silent,
    /// The message is too long.
    #[error("the message is longer than {MAX_MESSAGE_BYTES} bytes")]
    TooLong,
    /// The caller's path or headers can't be passed on.
    #[error("the path can't be passed on to the server")]
    BadPath,
}

impl Proxy {
    /// A proxy with a pool of its own. Streams end when `shutdown` says so; calls under way don't.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self { client: http_client(), shutdown }
    }

    /// Passes `request` on and returns the answer as soon as its head is there. Dropping either cancels the exchange upstream.
    ///
    /// # Errors
    /// See [`Obstacle`]; nothing has been answered then.
    pub async fn forward(&self, to: Forwarding<'_>, request: Request<Body>) -> Result<Response<Body>, Obstacle> {
        let (mut parts, body) = request.into_parts();
        if declared_length(&parts.headers).is_some_and(|length| length > MAX_MESSAGE_BYTES as u64) {
            return Err(Obstacle::TooLong);
        }
        let streams = parts.method == Method::GET;
        parts.uri = target(&to, parts.uri.query()).ok_or(Obstacle::BadPath)?;
        parts.version = Version::HTTP_11;
        for_the_server(&mut parts.headers, to.upstream.address);
        // Whoever's connection this came by, nothing of it goes on.
        parts.extensions.clear();
        let request = Request::from_parts(parts, Body::new(Limited::new(body, MAX_MESSAGE_BYTES)));
        let response = match timeout(HEAD_TIMEOUT, self.client.request(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(obstacle(error)),
            Err(_) => return Err(Obstacle::Silent),
        };
        let (mut parts, body) = response.into_parts();
        parts.version = Version::default();
        parts.extensions.clear();
        drop_hop_by_hop(&mut parts.headers);
        point_back(&mut parts.headers, &to);
        let body = if streams {
            // A listening stream has no end of its own; the agent doesn't wait for it when it ends.
            let end = self.shutdown.clone().cancelled_owned();
            Body::from_stream(Body::new(body).into_data_stream().take_until(end))
        } else {
            Body::new(body)
        };
        Ok(Response::from_parts(parts, body))
    }
}

fn declared_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The server's own URL. The suffix stays as it was written, except that it can't lead out of the endpoint.
fn target(to: &Forwarding<'_>, query: Option<&str>) -> Option<Uri> {
    // Servers differ in when they decode a path, so what is a slash or a dot to any of them counts as one.
    let decoded = to.suffix.to_ascii_lowercase().replace("%2e", ".").replace("%2f", "/").replace("%5c", "/");
    if decoded.split(['/', '\\']).any(|segment| matches!(segment, "." | "..")) {
        return None;
    }
    let mut path = if to.suffix.is_empty() {
        to.upstream.path.clone()
    } else {
        format!("{}{}", to.upstream.path.trim_end_matches('/'), to.suffix)
    };
    if let Some(query) = query {
        path.push('?');
        path.push_str(query);
    }
    let mut parts = axum::http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(Authority::try_from(to.upstream.address.to_string()).ok()?);
    parts.path_and_query = Some(PathAndQuery::try_from(path).ok()?);
    Uri::from_parts(parts).ok()
}

/// How the server is named to itself: many accept only their own host by name, to keep web pages out.
pub(super) fn host_of(address: SocketAddr) -> HeaderValue {
    HeaderValue::from_str(&format!("localhost:{}", address.port())).unwrap_or(HeaderValue::from_static("localhost"))
}

fn for_the_server(headers: &mut HeaderMap, address: SocketAddr) {
    drop_hop_by_hop(headers);
    // Ours, not the server's; and it has been checked here, against our own address.
    headers.remove(header::AUTHORIZATION);
    headers.remove(header::ORIGIN);
    // We have the body and will send it.
    headers.remove(header::EXPECT);
    headers.insert(header::HOST, host_of(address));
}

/// Takes off what is about one connection and not about the message.
pub(crate) fn drop_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// A redirect to the server's own address would lead callers nowhere.
fn point_back(headers: &mut HeaderMap, to: &Forwarding<'_>) {
    let Some(location) = headers.get(header::LOCATION).and_then(|value| value.to_str().ok()) else { return };
    let Ok(location) = location.parse::<Uri>() else { return };
    let port = to.upstream.address.port();
    let elsewhere = location.authority().is_some_and(|authority| authority.port_u16().unwrap_or(80) != port);
    let Some(path) = location.path_and_query().map(PathAndQuery::as_str).filter(|_| !elsewhere) else { return };
    if let Some(rest) = path.strip_prefix(to.upstream.path.trim_end_matches('/'))
        && let Ok(back) = HeaderValue::from_str(&format!("{}{rest}", to.prefix))
    {
        headers.insert(header::LOCATION, back);
    }
}

fn obstacle(error: ClientError) -> Obstacle {
    if error.is_connect() {
        return Obstacle::Unreachable(error);
    }
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        if inner.is::<LengthLimitError>() {
            return Obstacle::TooLong;
        }
        cause = inner.source();
    }
    Obstacle::HungUp(error)
}

#[cfg(test)]
mod tests {
    use dtma_api::instance::Transport;

    use super::*;
    use crate::engine::ContainerId;
    use crate::instance::SessionMode;

    fn upstream(path: &str) -> Upstream {
        Upstream {
            instance: "echo".parse().unwrap(),
            container: ContainerId("c".to_owned()),
            transport: Transport::Http,
            sessions: SessionMode::Shared,
            address: "172.18.0.2:8080".parse().unwrap(),
            path: path.to_owned(),
        }
    }

    #[test]
    fn the_suffix_and_query_are_appended_as_written_and_cannot_climb() {
        let url = |path, suffix, query| {
            let upstream = upstream(path);
            target(&Forwarding { upstream: &upstream, suffix, prefix: "" }, query).map(|uri| uri.to_string())
        };
        assert_eq!(url("/mcp", "", None).unwrap(), "http://172.18.0.2:8080/mcp");
        assert_eq!(url("/mcp", "", Some("a=b%20c")).unwrap(), "http://172.18.0.2:8080/mcp?a=b%20c");
        assert_eq!(url("/", "/a%2Fb/", None).unwrap(), "http://172.18.0.2:8080/a%2Fb/");
        assert_eq!(url("/mcp", "/x", Some("q")).unwrap(), "http://172.18.0.2:8080/mcp/x?q");
        for climbing in ["/..%2fadmin", "/x%5C..%5C", "/../admin", "/x/%2e%2E/..", "/%2E./x", "/./x"] {
            assert_eq!(url("/mcp", climbing, None), None, "{climbing}");
        }
    }

    #[test]
    fn what_belongs_to_a_connection_or_to_us_goes_no_further() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, X-Mine"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("te", "trailers"),
            ("upgrade", "websocket"),
            ("expect", "100-continue"),
            ("authorization", "Bearer fleet"),
            ("origin", "https://203.0.113.7:30000"),
            ("host", "203.0.113.7:30000"),
            ("accept", "text/event-stream"),
            ("mcp-session-id", "s"),
        ] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        for_the_server(&mut headers, "172.18.0.2:8080".parse().unwrap());
        let mut left: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        left.sort_unstable();
        assert_eq!(left, [("accept", "text/event-stream"), ("host", "localhost:8080"), ("mcp-session-id", "s")]);
    }

    #[test]
    fn a_redirect_of_the_server_leads_back_through_us_and_others_are_left_alone() {
        let upstream = upstream("/mcp");
        let to = Forwarding { upstream: &upstream, suffix: "", prefix: "/tools/echo/mcp" };
        for (location, expected) in [
            ("http://localhost:8080/mcp/", "/tools/echo/mcp/"),
            ("/mcp/?x=1", "/tools/echo/mcp/?x=1"),
            ("https://login.example/", "https://login.example/"),
            ("/elsewhere", "/elsewhere"),
        ] {
            let mut headers = HeaderMap::from_iter([(header::LOCATION, HeaderValue::from_static(location))]);
            point_back(&mut headers, &to);
            assert_eq!(headers[header::LOCATION], expected);
        }
    }
}
