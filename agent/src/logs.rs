//! The agent's own log: JSON lines to standard error, where the journal picks them up, and the latest of them in memory for
//! `GET /logs`. What must not be logged (secrets, request bodies) is up to those who log.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use tokio::sync::broadcast;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// At most this many bytes of lines are remembered.
const MAX_BYTES: usize = 256 * 1024;
/// At most this many lines.
const MAX_LINES: usize = 2_000;
/// How far a follower may fall behind before it loses lines.
const FOLLOW_DEPTH: usize = 256;

/// One line as it was written.
#[derive(Debug, Clone)]
pub struct LogLine {
    /// When it was written.
    pub at: Timestamp,
    /// A JSON object, without the line break.
    pub json: Arc<str>,
}

/// The latest lines. Clones share them.
#[derive(Debug, Clone)]
pub struct LogRing {
    lines: Arc<Mutex<Lines>>,
    follow: broadcast::Sender<LogLine>,
}

#[derive(Debug, Default)]
struct Lines {
    kept: VecDeque<LogLine>,
    bytes: usize,
}

impl Lines {
    fn tail(&self, count: usize, since: Option<Timestamp>) -> Vec<LogLine> {
        let recent = self.kept.iter().rev().take_while(|line| since.is_none_or(|since| line.at >= since));
        let mut tail: Vec<_> = recent.take(count).cloned().collect();
        tail.reverse();
        tail
    }
}

impl Default for LogRing {
    fn default() -> Self {
        Self { lines: Arc::default(), follow: broadcast::channel(FOLLOW_DEPTH).0 }
    }
}

impl LogRing {
    /// The last `count` lines not older than `since`, oldest first.
    pub fn tail(&self, count: usize, since: Option<Timestamp>) -> Vec<LogLine> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).tail(count, since)
    }

    /// The same, and every line from then on; none is lost or doubled in between.
    pub fn follow(&self, count: usize, since: Option<Timestamp>) -> (Vec<LogLine>, broadcast::Receiver<LogLine>) {
        // Lines are published while the lock is held, so what the tail lacks the receiver gets.
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        (lines.tail(count, since), self.follow.subscribe())
    }

    fn push(&self, line: LogLine) {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.bytes += line.json.len();
        lines.kept.push_back(line.clone());
        while lines.bytes > MAX_BYTES || lines.kept.len() > MAX_LINES {
            let Some(oldest) = lines.kept.pop_front() else { break };
            lines.bytes -= oldest.json.len();
        }
        // Nobody following is no failure.
        let _ = self.follow.send(line);
    }
}

/// Starts logging for this process: to standard error and into the ring that is returned.
///
/// # Errors
/// When the filter is not one, or the process logs already.
pub fn start(filter: &str) -> Result<LogRing, Box<dyn std::error::Error + Send + Sync>> {
    let ring = LogRing::default();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false)
        .with_env_filter(EnvFilter::try_new(filter)?)
        .with_writer(Tee { ring: ring.clone() })
        .finish();
    // Not `try_init`, which would also take what libraries write through the `log` crate: at `debug`, bollard writes whole requests there,
    // environment variables included.
    tracing::subscriber::set_global_default(subscriber)?;
    Ok(ring)
}

struct Tee {
    ring: LogRing,
}

impl<'a> MakeWriter<'a> for Tee {
    type Writer = TeeWriter<'a>;
    fn make_writer(&'a self) -> TeeWriter<'a> {
        TeeWriter { ring: &self.ring }
    }
}

/// Gets every event in one `write`, because the formatter hands over its whole buffer.
struct TeeWriter<'a> {
    ring: &'a LogRing,
}

impl Write for TeeWriter<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let json = String::from_utf8_lossy(buffer);
        self.ring.push(LogLine { at: Timestamp::now(), json: Arc::from(json.trim_end()) });
        // A broken standard error is no reason to lose the ring, nor can it be reported anywhere.
        let _ = io::stderr().lock().write_all(buffer);
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(second: i64, json: &str) -> LogLine {
        LogLine { at: Timestamp::from_second(second).unwrap(), json: Arc::from(json) }
    }

    #[test]
    fn the_tail_is_the_latest_lines_in_order() {
        let ring = LogRing::default();
        for second in 0..10 {
            ring.push(line(second, &second.to_string()));
        }
        let texts = |lines: Vec<LogLine>| lines.iter().map(|line| line.json.to_string()).collect::<Vec<_>>();
        assert_eq!(texts(ring.tail(3, None)), ["7", "8", "9"]);
        assert_eq!(texts(ring.tail(100, Some(Timestamp::from_second(8).unwrap()))), ["8", "9"]);
        let (tail, mut receiver) = ring.follow(1, None);
        ring.push(line(10, "10"));
        assert_eq!(texts(tail), ["9"]);
        assert_eq!(&*receiver.try_recv().unwrap().json, "10");
        assert!(receiver.try_recv().is_err());
    }

    #[test]
    fn what_is_remembered_is_bounded_by_lines_and_by_bytes() {
        let ring = LogRing::default();
        for second in 0..5_000 {
            ring.push(line(second, "x"));
        }
        assert_eq!(ring.tail(usize::MAX, None).len(), MAX_LINES);
        ring.push(line(5_000, &"x".repeat(MAX_BYTES)));
        assert_eq!(ring.tail(usize::MAX, None).len(), 1);
    }

    #[test]
    fn an_event_becomes_one_json_object() {
        let ring = LogRing::default();
        let subscriber =
            tracing_subscriber::fmt().json().flatten_event(true).with_writer(Tee { ring: ring.clone() }).finish();
        tracing::subscriber::with_default(subscriber, || tracing::warn!(attempt = 2, "it did not work"));
        let lines = ring.tail(10, None);
        let value: serde_json::Value = serde_json::from_str(&lines[0].json).unwrap();
        assert_eq!((lines.len(), &value["level"], &value["attempt"]), (1, &"WARN".into(), &2.into()));
        assert_eq!(value["message"], "it did not work");
    }
}
