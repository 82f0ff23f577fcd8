//! Strikes at the n-th thing that happens to a file in a folder: a draft made, or put in place.

use std::io;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

/// A watched folder.
pub(crate) struct FileTrap {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<(bool, Vec<String>)>,
}

impl FileTrap {
    /// Calls `strike` once, at the event with this number (from 1).
    pub(crate) fn set(folder: &Path, number: usize, strike: impl FnOnce() + Send + 'static) -> Self {
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
        let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO;
        inotify::add_watch(&watch, folder, flags).unwrap();
        let ended = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ended);
        let thread = std::thread::spawn(move || {
            let mut strike = Some(strike);
            let (mut seen, mut buffer) = (Vec::new(), [MaybeUninit::uninit(); 4096]);
            let mut events = inotify::Reader::new(&watch, &mut buffer);
            loop {
                match events.next() {
                    Ok(event) => seen.push(said(event.events(), event.file_name().map(|name| name.to_string_lossy()))),
                    Err(Errno::AGAIN) if told.load(Ordering::Acquire) => return (strike.is_none(), seen),
                    Err(Errno::AGAIN) => std::thread::sleep(Duration::from_micros(20)),
                    Err(error) => panic!("{}", io::Error::from(error)),
                }
                if seen.len() == number
                    && let Some(strike) = strike.take()
                {
                    strike();
                }
            }
        });
        Self { ended, thread }
    }

    /// Whether it has struck, and what has happened since it was set.
    pub(crate) fn disarm(self) -> (bool, Vec<String>) {
        self.ended.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }
}

fn said(events: ReadFlags, name: Option<impl AsRef<str>>) -> String {
    let verb = match events {
        events if events.contains(ReadFlags::CREATE) => "made",
        _ => "put in place",
    };
    format!("{} {verb}", name.as_ref().map_or("?", AsRef::as_ref))
}
