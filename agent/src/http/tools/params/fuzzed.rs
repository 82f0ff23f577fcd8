//! What must hold of a query, whatever it is. See [`crate::fuzz`].

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use axum::response::IntoResponse as _;

use super::*;

/// Each parameter is read, or refused with 400.
pub(crate) fn query(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let Ok(uri) = format!("/tools?{text}").parse::<Uri>() else { return };
    let Ok(parameters) = Parameters::of(&uri) else { return };
    if let Ok(wait) = sound(parameters.wait()) {
        assert!(wait <= Duration::from_secs(MAX_WAIT));
    }
    for name in ["volumes", "follow", "timestamps", "stream", "tail", "lines", "since"] {
        let _ = sound(parameters.flag(name));
        let _ = sound(parameters.flag_or(name, true));
        let _ = sound(parameters.time(name));
        if let Ok(Some(count)) = sound(parameters.count(name)) {
            assert!(parameters.has(name), "{count} lines, and nobody asked");
        }
    }
}

fn sound<T>(read: Result<T, ApiError>) -> Result<T, ()> {
    read.map_err(|error| assert_eq!(error.into_response().status(), StatusCode::BAD_REQUEST))
}
