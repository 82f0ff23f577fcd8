//! Which web pages may speak to an MCP endpoint. MCP asks servers to check `Origin`, because a page can rebind its own name to our
//! address; it must be answered with 403.

use axum::http::{HeaderMap, Uri, header};

/// Whether a request with these headers may go on. Only browsers send `Origin`, and the only page that may call is one served from this
/// very address, named by its number: a name could be anybody's.
pub fn permitted(headers: &HeaderMap, authority: Option<&str>) -> bool {
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let Some(origin) = origins.next() else { return true };
    if origins.next().is_some() {
        return false;
    }
    let asked = authority.or_else(|| headers.get(header::HOST).and_then(|host| host.to_str().ok()));
    let origin = origin.to_str().ok().and_then(|origin| origin.parse::<Uri>().ok());
    let from = origin.as_ref().and_then(Uri::authority).map(axum::http::uri::Authority::as_str);
    match (asked, from) {
        (Some(asked), Some(from)) => asked.eq_ignore_ascii_case(from) && is_numeric(from),
        _ => false,
    }
}

fn is_numeric(authority: &str) -> bool {
    use std::net::{IpAddr, SocketAddr};
    authority.parse::<SocketAddr>().is_ok()
        || authority.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_from_elsewhere_are_turned_away() {
        let check = |origin: Option<&str>, host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().unwrap());
            if let Some(origin) = origin {
                headers.insert(header::ORIGIN, origin.parse().unwrap());
            }
            permitted(&headers, None)
        };
        assert!(check(None, "203.0.113.7:30000"));
        assert!(check(Some("https://203.0.113.7:30000"), "203.0.113.7:30000"));
        assert!(check(Some("https://[2001:db8::1]:30000"), "[2001:db8::1]:30000"));
        for origin in
            ["https://evil.example", "https://203.0.113.8:30000", "https://203.0.113.7", "null", "", "file://"]
        {
            assert!(!check(Some(origin), "203.0.113.7:30000"), "{origin}");
        }
        // Rebinding: the page's own name leads here, so both are the same, and that proves nothing.
        assert!(!check(Some("http://evil.example:30000"), "evil.example:30000"));
    }

    #[test]
    fn two_origins_are_none_and_http2_names_the_host_elsewhere() {
        let mut headers = HeaderMap::new();
        headers.append(header::ORIGIN, "https://203.0.113.7:30000".parse().unwrap());
        assert!(permitted(&headers, Some("203.0.113.7:30000")));
        headers.append(header::ORIGIN, "https://203.0.113.7:30000".parse().unwrap());
        assert!(!permitted(&headers, Some("203.0.113.7:30000")));
    }
}
