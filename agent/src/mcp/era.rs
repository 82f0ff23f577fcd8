//! The protocol's two eras as the agent itself speaks them: versions, and who it says it is.

use serde_json::{Value, json};

/// Versions that begin with `initialize`, oldest first.
pub(super) const LEGACY: [&str; 4] = ["2024-11-05", "2025-03-26", "2025-06-18", NEWEST_LEGACY];
/// The last of them.
pub(super) const NEWEST_LEGACY: &str = "2025-11-25";
/// The first that doesn't.
pub(super) const MODERN: &str = "2026-07-28";

/// The agent, as a client.
pub(super) fn client_info() -> Value {
    json!({ "name": "dtma-agent", "version": crate::version() })
}

/// What every request of the newer era has as its `_meta`.
pub(super) fn modern_meta() -> Value {
    json!({
        "io.modelcontextprotocol/protocolVersion": MODERN,
        "io.modelcontextprotocol/clientInfo": client_info(),
        "io.modelcontextprotocol/clientCapabilities": {},
    })
}
