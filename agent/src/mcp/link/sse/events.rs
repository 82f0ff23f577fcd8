//! Reads a stream of server-sent events (HTML standard, 9.2.6) piece by piece, however it is cut, and never holds more than one event.

use bytes::{Buf as _, Bytes};

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";
/// What a line may have around its share of the data.
const FIELD_NAME_BYTES: usize = 64;

/// An event whose name is one of legacy HTTP+SSE's; others are passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) kind: Kind,
    /// The lines of data, joined by line feeds.
    pub(super) data: Bytes,
}

/// What an event is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Kind {
    /// Where messages are to be posted to.
    Endpoint,
    /// A JSON-RPC message; also what an event without a name is.
    #[default]
    Message,
    /// Of no meaning to us.
    Other,
}

/// An event, or a line, is longer than allowed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("it sent a message longer than {0} bytes")]
pub(super) struct TooLong(usize);

/// A parser and what it has of the event that isn't whole yet.
#[derive(Debug)]
pub(super) struct Events {
    limit: usize,
    /// The line that isn't whole yet.
    line: Vec<u8>,
    /// The last byte was a carriage return: a line feed right after it belongs to it.
    after_return: bool,
    /// The first line has been read; only before it may there be a byte order mark.
    begun: bool,
    kind: Kind,
    /// Each line of data and a line feed after it.
    data: Vec<u8>,
}

impl Events {
    /// A parser for a new stream. No event's data may be longer than `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, line: Vec::new(), after_return: false, begun: false, kind: Kind::default(), data: Vec::new() }
    }

    /// Takes bytes off the front of `received` up to the end of the next event and returns that; `None` when all were taken and the
    /// event isn't whole yet.
    ///
    /// # Errors
    /// When an event is too long; the stream is of no use then.
    pub(super) fn next(&mut self, received: &mut Bytes) -> Result<Option<Event>, TooLong> {
        while !received.is_empty() {
            if std::mem::take(&mut self.after_return) && received.first() == Some(&b'\n') {
                received.advance(1);
                continue;
            }
            let end = received.iter().position(|byte| matches!(byte, b'\r' | b'\n'));
            let piece = received.split_to(end.unwrap_or(received.len()));
            if self.line.len() + piece.len() > self.limit.saturating_add(FIELD_NAME_BYTES) {
                return Err(TooLong(self.limit));
            }
            self.line.extend_from_slice(&piece);
            if end.is_none() {
                break;
            }
            self.after_return = received.first() == Some(&b'\r');
            received.advance(1);
            let line = std::mem::take(&mut self.line);
            if let Some(event) = self.end_line(&line)? {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    /// Takes in a whole line. Returns the event that it ends, if it is one for us.
    fn end_line(&mut self, line: &[u8]) -> Result<Option<Event>, TooLong> {
        let first = !std::mem::replace(&mut self.begun, true);
        let line = if first { line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line) } else { line };
        if line.is_empty() {
            return Ok(self.end_event());
        }
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let (name, rest) = line.split_at_checked(colon).unwrap_or((line, &[]));
        let value = rest.strip_prefix(b":").unwrap_or(rest);
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match name {
            b"data" => {
                if self.data.len() + value.len() > self.limit {
                    return Err(TooLong(self.limit));
                }
                self.data.extend_from_slice(value);
                self.data.push(b'\n');
            }
            b"event" => {
                self.kind = match value {
                    b"endpoint" => Kind::Endpoint,
                    b"message" | b"" => Kind::Message,
                    _ => Kind::Other,
                };
            }
            // A comment has no name. We never resume, so that `id` and `retry` mean nothing to us.
            _ => {}
        }
        Ok(None)
    }

    fn end_event(&mut self) -> Option<Event> {
        let kind = std::mem::take(&mut self.kind);
        let mut data = std::mem::take(&mut self.data);
        // The line feed after the last line. Without any line of data there is no event.
        data.pop()?;
        (kind != Kind::Other).then(|| Event { kind, data: data.into() })
    }
}

/// What must hold whatever a server sends.
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed {
    // What tests are made of may fail as loudly as the tests themselves.
    #![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

    use super::*;

    const LIMIT: usize = 48;

    /// However a stream is cut, it has the same events, and none is longer than allowed.
    pub(crate) fn events(data: &[u8]) {
        let whole = read([data]);
        assert_eq!(whole, read(data.chunks(1)), "cut into bytes");
        let half = data.len() / 2;
        assert_eq!(whole, read([&data[..half], &data[half..]]), "cut in half");
        for event in &whole.0 {
            assert!(event.data.len() <= LIMIT && event.kind != Kind::Other, "{event:?}");
        }
    }

    fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Event>, Option<TooLong>) {
        let mut parser = Events::new(LIMIT);
        let mut events = Vec::new();
        for piece in pieces {
            let mut piece = Bytes::copy_from_slice(piece);
            loop {
                match parser.next(&mut piece) {
                    Ok(Some(event)) => events.push(event),
                    Ok(None) => break,
                    Err(too_long) => return (events, Some(too_long)),
                }
                assert!(parser.line.len() <= LIMIT + FIELD_NAME_BYTES && parser.data.len() <= LIMIT + 1);
            }
            assert!(piece.is_empty(), "bytes were left lying");
        }
        (events, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(limit: usize, stream: &[u8]) -> Result<Vec<(Kind, String)>, TooLong> {
        let mut parser = Events::new(limit);
        let mut rest = Bytes::copy_from_slice(stream);
        let mut events = Vec::new();
        while let Some(event) = parser.next(&mut rest)? {
            events.push((event.kind, String::from_utf8_lossy(&event.data).into_owned()));
        }
        Ok(events)
    }

    #[test]
    fn events_are_read_as_the_standard_says() {
        let stream = "\u{FEFF}event: endpoint\r\ndata: /messages?session=1\r\n\r\n\
            : a comment\rdata: {\"a\":\rdata:1}\r\r\
            id: 7\nretry: 10\ndata:  two spaces\n\n\
            event: other\ndata: not for us\n\nevent: nothing\n\n\
            event: message\ndata\ndata\n\ndata: never ended\n";
        let expected = [
            (Kind::Endpoint, "/messages?session=1"),
            (Kind::Message, "{\"a\":\n1}"),
            (Kind::Message, " two spaces"),
            (Kind::Message, "\n"),
        ];
        let events = read(64, stream.as_bytes()).unwrap();
        assert_eq!(events.iter().map(|(kind, data)| (*kind, data.as_str())).collect::<Vec<_>>(), expected);
        for end in 0..stream.len() {
            fuzzed::events(&stream.as_bytes()[..end]);
        }
    }

    #[test]
    fn an_event_may_be_just_as_long_as_allowed() {
        let stream = |length| format!("data: {}\n\n", "x".repeat(length));
        assert_eq!(read(1000, stream(1000).as_bytes()).unwrap()[0].1.len(), 1000);
        assert_eq!(read(1000, stream(1001).as_bytes()), Err(TooLong(1000)));
        // Also when it comes in many lines, or as one without an end.
        assert_eq!(read(1000, "data: xxxx\n".repeat(201).as_bytes()), Err(TooLong(1000)));
        assert_eq!(read(1000, &[b':'; 2000]), Err(TooLong(1000)));
    }
}
