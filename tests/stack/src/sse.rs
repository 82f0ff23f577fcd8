//! Reading server-sent events whose data is one JSON value each.

use std::marker::PhantomData;

use serde::de::DeserializeOwned;

use crate::error::{Result, StackError};

/// The events of one response.
#[derive(Debug)]
pub struct EventStream<T> {
    response: reqwest::Response,
    buffer: Lines,
    doing: String,
    item: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> EventStream<T> {
    /// Opens the stream; the request's own time limit is lifted, since it ends when its reader has seen enough.
    pub(crate) async fn open(doing: &str, request: reqwest::RequestBuilder) -> Result<Self> {
        let request = request.header("accept", "text/event-stream").timeout(std::time::Duration::from_hours(24));
        let response = request.send().await.map_err(StackError::http(doing))?;
        if !response.status().is_success() {
            let status = response.status().as_u16();
            let body = response.text().await.map_err(StackError::http(doing))?;
            return Err(StackError::Status { doing: doing.to_owned(), status, body });
        }
        Ok(Self { response, buffer: Lines::default(), doing: doing.to_owned(), item: PhantomData })
    }

    /// The next event; none when the server has ended the stream. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// When the connection breaks, or an event isn't a `T`.
    pub async fn next(&mut self) -> Result<Option<T>> {
        loop {
            if let Some(data) = self.buffer.event() {
                let event = serde_json::from_str(&data);
                return event.map(Some).map_err(StackError::json(format!("an event of: {}: {data}", self.doing)));
            }
            match self.response.chunk().await.map_err(StackError::http(self.doing.clone()))? {
                Some(chunk) => self.buffer.take(&chunk),
                None => return Ok(None),
            }
        }
    }
}

/// Bytes as they arrive, events as they are complete.
#[derive(Debug, Default)]
struct Lines {
    bytes: Vec<u8>,
    data: Vec<String>,
}

impl Lines {
    fn take(&mut self, chunk: &[u8]) {
        self.bytes.extend_from_slice(chunk);
    }

    /// The data of the next complete event, its lines joined. Comments and fields other than `data` are skipped.
    fn event(&mut self) -> Option<String> {
        while let Some(end) = self.bytes.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.bytes.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\r', '\n']);
            if let Some(data) = line.strip_prefix("data:") {
                self.data.push(data.strip_prefix(' ').unwrap_or(data).to_owned());
            } else if line.is_empty() && !self.data.is_empty() {
                return Some(std::mem::take(&mut self.data).join("\n"));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_out_whole_however_the_bytes_arrive() {
        let text = ": keep-alive\n\nevent: x\r\ndata: {\"a\":\r\ndata: 1}\r\n\r\nid: 7\ndata:2\n\n";
        for step in [1, 3, text.len()] {
            let mut lines = Lines::default();
            let mut events = Vec::new();
            for chunk in text.as_bytes().chunks(step) {
                lines.take(chunk);
                events.extend(std::iter::from_fn(|| lines.event()));
            }
            assert_eq!(events, ["{\"a\":\n1}", "2"], "in steps of {step}");
        }
    }
}
