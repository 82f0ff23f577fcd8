//! `GET /openapi.json`: the description of this API, generated from the table of routes and the wire types.
//!
//! What is served is the committed `agent/openapi.json`; the test below generates it and holds the two together, so that neither
//! the generator nor its result takes memory in an agent that nobody asks.

#[cfg(test)]
mod document;
pub(super) mod operation;

use axum::http::header;
use axum::response::IntoResponse;

use super::table::{Operation, Table};

const DESCRIPTION: &str = include_str!("../../openapi.json");

pub(super) fn routes<T: Table>(table: T) -> T {
    table.get("/openapi.json", openapi, || {
        Operation::new("This description").answers::<serde_json::Map<String, serde_json::Value>>(200, "OpenAPI 3.1")
    })
}

async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], DESCRIPTION)
}

#[cfg(test)]
mod tests;
