//! What all clients of a stack share: a client with ring as its crypto, and answers that keep status, headers and body, so
//! that a test can look at an error as easily as at a success.

use std::sync::Once;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Result, StackError};

/// Longer than the longest `wait` of either service.
const TIMEOUT: Duration = Duration::from_secs(170);

/// One answer, whatever its status.
#[derive(Debug, Clone)]
pub struct Reply {
    /// HTTP status code.
    pub status: u16,
    /// The answer's headers.
    pub headers: reqwest::header::HeaderMap,
    /// The answer's body.
    pub text: String,
    doing: String,
}

impl Reply {
    /// The body as JSON; `null` when it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or(Value::Null)
    }

    /// One header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The body as `T`, if the status is a success.
    ///
    /// # Errors
    /// On any other status, and when the body isn't a `T`.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T> {
        self.success()?;
        serde_json::from_str(&self.text).map_err(StackError::json(format!("the answer to: {}", self.doing)))
    }

    /// Nothing, if the status is a success.
    ///
    /// # Errors
    /// On any other status.
    pub fn success(&self) -> Result<()> {
        if (200..300).contains(&self.status) {
            return Ok(());
        }
        Err(StackError::Status { doing: self.doing.clone(), status: self.status, body: self.text.clone() })
    }
}

/// Sends a request and reads the whole answer.
pub(crate) async fn send(doing: impl Into<String>, request: reqwest::RequestBuilder) -> Result<Reply> {
    let doing = doing.into();
    let response = request.send().await.map_err(StackError::http(doing.clone()))?;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let text = response.text().await.map_err(StackError::http(doing.clone()))?;
    Ok(Reply { status, headers, text, doing })
}

/// A client for plain HTTP and public certificates.
pub(crate) fn client() -> Result<reqwest::Client> {
    install_crypto();
    builder().build().map_err(StackError::http("make an HTTP client"))
}

pub(crate) fn builder() -> reqwest::ClientBuilder {
    // Everything is on this machine; a proxy meant for the world outside can't reach it.
    reqwest::Client::builder().no_proxy().timeout(TIMEOUT).connect_timeout(Duration::from_secs(5))
}

/// rustls wants one process-wide choice of crypto before the first client is built.
pub(crate) fn install_crypto() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Refused only when somebody else in this process has chosen already, which is as good.
        drop(rustls::crypto::ring::default_provider().install_default());
    });
}
