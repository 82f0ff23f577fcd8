//! The standard input and output of a container as a link: one message a line.

use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{DEPTH, Dial, Link, LinkEnd};
use crate::engine::{Attached, ContainerId, Engine, EngineError};
use crate::mcp::MAX_MESSAGE_BYTES;
use crate::mcp::bridge::single_line;

/// So many skipped lines are logged one by one, and then every so-manieth.
const NOISE_LOGGED: u64 = 10;
const NOISE_EVERY: u64 = 1000;

/// Up to this length a message and the end of its line are one write. Docker passes on every write for itself, from one process to the
/// next, and no server begins before the end of the line has come.
const AT_ONCE: usize = 32 * 1024;

/// Attaches to a container.
pub struct StdioDialer {
    engine: Arc<dyn Engine>,
    container: ContainerId,
}

impl StdioDialer {
    /// A dialer for the process of `container`, whichever runs in it at the time.
    pub fn new(engine: Arc<dyn Engine>, container: ContainerId) -> Self {
        Self { engine, container }
    }
}

#[async_trait]
impl Dial for StdioDialer {
    async fn dial(&self) -> Result<Link, LinkEnd> {
        let attached = self.engine.attach(&self.container).await.map_err(|error| match error {
            EngineError::ContainerGone { .. } => LinkEnd::because("its container is gone"),
            EngineError::Unavailable { .. } => LinkEnd::because("the Docker Engine does not answer"),
            error => LinkEnd::because(error.to_string()),
        })?;
        Ok(over(attached))
    }
}

/// A link over something attached to. The tasks behind it end when it is dropped.
fn over(attached: Attached) -> Link {
    let (to_server, messages) = mpsc::channel(DEPTH);
    let (lines, from_server) = mpsc::channel(DEPTH);
    let Attached { input, mut output } = attached;
    let written = CancellationToken::new();
    let writing = written.clone().drop_guard();
    tokio::spawn(async move {
        write(input, messages).await;
        drop(writing);
    });
    tokio::spawn(async move {
        read(&mut output, lines).await;
        // Both halves are one connection: as long as the other is open, what nobody reads holds the process up.
        tokio::select! {
            () = written.cancelled() => {}
            () = async { while output.next().await.is_some() {} } => {}
        }
    });
    Link { to_server, from_server }
}

async fn write(mut input: Pin<Box<dyn AsyncWrite + Send>>, mut messages: mpsc::Receiver<Bytes>) {
    while let Some(message) = messages.recv().await {
        let message = single_line(message);
        let end = &b"\n"[..];
        let written = if message.len() < AT_ONCE {
            let mut line = BytesMut::with_capacity(message.len() + end.len());
            line.extend_from_slice(&message);
            line.extend_from_slice(end);
            input.write_all(&line).await
        } else {
            input.write_all_buf(&mut message.chain(end)).await
        };
        // The end is told by whoever reads.
        if written.is_err() || input.flush().await.is_err() {
            return;
        }
    }
}

async fn read(
    output: &mut futures_util::stream::BoxStream<'static, Result<Bytes, EngineError>>,
    lines: mpsc::Sender<Result<Bytes, LinkEnd>>,
) {
    let mut frames = Frames::default();
    let mut noted = 0;
    let end = loop {
        let chunk = tokio::select! {
            chunk = output.next() => chunk,
            () = lines.closed() => return,
        };
        match chunk {
            Some(Ok(chunk)) => {
                let mut whole = Vec::new();
                let fits = frames.take(&chunk, &mut whole);
                for line in whole {
                    if lines.send(Ok(line)).await.is_err() {
                        return;
                    }
                }
                if fits.is_err() {
                    break format!("it wrote a line longer than {MAX_MESSAGE_BYTES} bytes");
                }
                if frames.skipped > noted
                    && (frames.skipped <= NOISE_LOGGED || frames.skipped / NOISE_EVERY > noted / NOISE_EVERY)
                {
                    tracing::debug!(
                        lines = frames.skipped,
                        "a server wrote what is no message on its standard output; it is in its log"
                    );
                    noted = frames.skipped;
                }
            }
            Some(Err(error)) => break format!("the connection to its container broke: {error}"),
            None => break "its process ended".to_owned(),
        }
    };
    let _ = lines.send(Err(LinkEnd::because(end))).await;
}

/// A line longer than any message may be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLong;

/// Puts lines together from whatever pieces they come in, and skips those that can't be messages without keeping them.
#[derive(Debug, Default)]
pub(super) struct Frames {
    line: Vec<u8>,
    place: Place,
    /// Lines that can't be messages.
    pub(super) skipped: u64,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nothing but space has come of the line.
    #[default]
    Start,
    /// It may be a message.
    Message,
    /// It isn't one.
    Noise,
}

impl Frames {
    /// Takes a piece, and puts what is whole with it into `whole`. After an error nothing is to be expected.
    pub(super) fn take(&mut self, mut piece: &[u8], whole: &mut Vec<Bytes>) -> Result<(), TooLong> {
        while !piece.is_empty() {
            if self.place == Place::Start {
                let space = piece.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
                piece = piece.get(space..).unwrap_or_default();
                self.place = match piece.first() {
                    None => Place::Start,
                    Some(b'{' | b'[') => Place::Message,
                    Some(_) => Place::Noise,
                };
                continue;
            }
            let end = piece.iter().position(|byte| *byte == b'\n');
            let (part, rest) = piece.split_at(end.unwrap_or(piece.len()));
            if self.place == Place::Message {
                if self.line.len() + part.len() > MAX_MESSAGE_BYTES {
                    self.line = Vec::new();
                    return Err(TooLong);
                }
                self.line.extend_from_slice(part);
            }
            piece = rest;
            if end.is_some() {
                match self.place {
                    Place::Message => {
                        let mut line = std::mem::take(&mut self.line);
                        line.truncate(line.trim_ascii_end().len());
                        whole.push(line.into());
                    }
                    Place::Start | Place::Noise => self.skipped += 1,
                }
                self.place = Place::Start;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::task::{Context, Poll};

    use super::*;

    fn frames(pieces: &[&[u8]]) -> (Vec<String>, u64, Result<(), TooLong>) {
        let (mut frames, mut whole) = (Frames::default(), Vec::new());
        let fits = pieces.iter().try_for_each(|piece| frames.take(piece, &mut whole));
        (whole.iter().map(|line| String::from_utf8(line.to_vec()).unwrap()).collect(), frames.skipped, fits)
    }

    #[test]
    fn lines_are_put_together_however_they_are_cut_and_noise_is_skipped() {
        let text = b"Starting up...\n{\"a\":1}\r\n\n  \n  [1]  \nnoise {\n{\"b\":2}\n{\"not whole";
        let wanted = (vec!["{\"a\":1}".to_owned(), "[1]".to_owned(), "{\"b\":2}".to_owned()], 2, Ok(()));
        assert_eq!(frames(&[text]), wanted);
        for size in 1..text.len() {
            assert_eq!(frames(&text.chunks(size).collect::<Vec<_>>()), wanted, "in pieces of {size}");
        }
    }

    #[test]
    fn a_message_may_be_as_long_as_any_and_no_longer_while_noise_may() {
        let long = |first: &[u8], length: usize| [first, &vec![b'x'; length - first.len()], b"\n{}\n"].concat();
        let pieces = |text: &[u8]| frames(&text.chunks(32 * 1024).collect::<Vec<_>>());
        let (lines, skipped, fits) = pieces(&long(b"{", MAX_MESSAGE_BYTES));
        assert_eq!((lines[0].len(), lines.len(), skipped, fits), (MAX_MESSAGE_BYTES, 2, 0, Ok(())));
        assert_eq!(pieces(&long(b"{", MAX_MESSAGE_BYTES + 1)).2, Err(TooLong));
        let (lines, skipped, fits) = pieces(&long(b"x", 2 * MAX_MESSAGE_BYTES));
        assert_eq!((lines, skipped, fits), (vec!["{}".to_owned()], 1, Ok(())));
    }

    fn attached(output: tokio::io::DuplexStream, input: tokio::io::DuplexStream) -> Attached {
        let output = tokio_util::io::ReaderStream::new(output)
            .map(|piece| piece.map_err(|error| EngineError::Unavailable { operation: "read", source: error.into() }));
        Attached { input: Box::pin(input), output: output.boxed() }
    }

    #[tokio::test]
    async fn a_message_is_written_on_one_line_and_the_end_of_the_process_is_the_last_word() {
        use tokio::io::AsyncReadExt as _;
        let (mut process_out, output) = tokio::io::duplex(64);
        let (input, mut process_in) = tokio::io::duplex(64);
        let mut link = over(attached(output, input));
        link.to_server.send(Bytes::from_static(b"{\n\"a\":\r\n1}")).await.unwrap();
        let mut written = [0; 11];
        process_in.read_exact(&mut written).await.unwrap();
        assert_eq!(&written, b"{ \"a\":  1}\n");
        process_out.write_all(b"hello\n{\"id\":1}\n{half").await.unwrap();
        drop(process_out);
        assert_eq!(link.from_server.recv().await, Some(Ok(Bytes::from_static(b"{\"id\":1}"))));
        assert_eq!(link.from_server.recv().await, Some(Err(LinkEnd::because("its process ended"))));
        assert_eq!(link.from_server.recv().await, None);
    }

    /// Remembers every write for itself.
    #[derive(Clone, Default)]
    struct Writes(Arc<std::sync::Mutex<Vec<Vec<u8>>>>);

    impl AsyncWrite for Writes {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.0.lock().unwrap().push(bytes.to_vec());
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_message_and_the_end_of_its_line_are_one_write_unless_it_is_long() {
        let (writes, long) = (Writes::default(), vec![b'x'; AT_ONCE]);
        let (to_server, messages) = mpsc::channel(2);
        to_server.send(Bytes::from_static(b"{}")).await.unwrap();
        to_server.send(Bytes::from(long.clone())).await.unwrap();
        drop(to_server);
        write(Box::pin(writes.clone()), messages).await;
        assert_eq!(*writes.0.lock().unwrap(), [b"{}\n".to_vec(), long, b"\n".to_vec()]);
    }
}
