//! What is asked of a running container and leaves it as it is: commands beside its server, its figures, its output.

use std::sync::Arc;
use std::time::Duration;

use dtma_api::InstanceName;
use dtma_api::usage::ResourceUsage;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, sleep_until};

use super::desk::Shared;
use super::handle::Instances;
use crate::engine::{Condition, ContainerId, EngineError, Exec, ExecError, Executed, LogLine, LogOptions, Usage};
use crate::instance::State;

/// Commands run at once; each holds its output, up to 2 MiB.
const EXECS: usize = 4;
/// Streams of figures at once; each is a call to Docker a second.
const STREAMS: usize = 16;
/// Between the two readings of one answer; long enough for the processors' clocks to tell something.
const BETWEEN_READINGS: Duration = Duration::from_millis(500);
/// Between two messages of a stream of figures, unless the engine takes longer.
const BETWEEN_MESSAGES: Duration = Duration::from_secs(1);
/// Before a log that ended is asked for again: what is published may be older than its end.
const BEFORE_FOLLOWING: Duration = Duration::from_millis(250);

/// How many may be inside at once.
#[derive(Debug)]
pub(super) struct Doors {
    execs: Arc<Semaphore>,
    streams: Arc<Semaphore>,
}

impl Doors {
    pub(super) fn new() -> Self {
        Self { execs: Arc::new(Semaphore::new(EXECS)), streams: Arc::new(Semaphore::new(STREAMS)) }
    }
}

/// Why nothing was to be had inside a container.
#[derive(Debug, thiserror::Error)]
pub enum NotInside {
    /// Its process doesn't run.
    #[error("the instance {0} does not run")]
    NotRunning(InstanceName),
    /// As many as may are inside already.
    #[error("the agent does as much of this at once as it may")]
    Busy,
    /// The container has no such program, or it can't be run.
    #[error("{0}")]
    CannotStart(String),
    /// It runs, and the engine has no figures of it.
    #[error("the container engine has no figures of the instance {0}")]
    NoFigures(InstanceName),
    /// The engine didn't do it.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl Instances {
    /// Runs a command inside the instance's container. A caller that goes away doesn't stop it, nor its time from running out.
    ///
    /// # Errors
    /// When it isn't run. That it took too long is no error, but in the answer.
    pub async fn exec(&self, name: &InstanceName, exec: Exec) -> Result<Executed, NotInside> {
        let container = self.running(name)?;
        let permit = admit(&self.shared.doors.execs)?;
        let engine = Arc::clone(&self.shared.engine);
        let work = tokio::spawn(async move {
            let executed = engine.exec(&container, &exec).await;
            drop(permit);
            executed
        });
        match work.await {
            Ok(Ok(executed)) => Ok(executed),
            Ok(Err(ExecError::NotRunning)) => Err(NotInside::NotRunning(name.clone())),
            Ok(Err(ExecError::CannotStart { message })) => Err(NotInside::CannotStart(message)),
            Ok(Err(ExecError::Engine(error))) => Err(error.into()),
            Err(broken) => {
                let message = broken.to_string();
                Err(EngineError::Failed { operation: "run a command in the container", message }.into())
            }
        }
    }

    /// What the instance uses, measured now; takes half a second, and up to three where the engine itself is slow (20.10 is).
    ///
    /// # Errors
    /// When it doesn't run, or the engine doesn't tell.
    pub async fn usage(&self, name: &InstanceName) -> Result<ResourceUsage, NotInside> {
        let before = self.read_usage(name).await?;
        sleep(BETWEEN_READINGS).await;
        Ok(self.read_usage(name).await?.shown(Some(&before)))
    }

    /// What the instance uses, measured every second until somebody drops it or it doesn't run any more.
    ///
    /// # Errors
    /// When it doesn't run now, or there are too many of these.
    pub async fn usage_stream(
        &self,
        name: &InstanceName,
    ) -> Result<BoxStream<'static, Result<ResourceUsage, NotInside>>, NotInside> {
        struct Measuring {
            instances: Instances,
            name: InstanceName,
            before: Usage,
            next: Instant,
            _permit: OwnedSemaphorePermit,
        }
        let permit = admit(&self.shared.doors.streams)?;
        let before = self.read_usage(name).await?;
        let (instances, name, next) = (self.clone(), name.clone(), Instant::now() + BETWEEN_READINGS);
        let measuring = Measuring { instances, name, before, next, _permit: permit };
        let messages = stream::unfold(Some(measuring), async |measuring| {
            let mut measuring = measuring?;
            sleep_until(measuring.next).await;
            // Some engines take a second to answer; that is no reason to be slower than promised.
            measuring.next = Instant::now() + BETWEEN_MESSAGES;
            match measuring.instances.read_usage(&measuring.name).await {
                Ok(now) => {
                    let shown = now.shown(Some(&measuring.before));
                    measuring.before = now;
                    Some((Ok(shown), Some(measuring)))
                }
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(messages.boxed())
    }

    /// The output of the instance's container. Followed, it goes on over restarts and new containers, and ends when the instance is stopped or
    /// removed; otherwise it is empty while there is no container.
    pub fn logs(&self, name: &InstanceName, options: LogOptions) -> BoxStream<'static, Result<LogLine, EngineError>> {
        if options.follow {
            let following = Following {
                shared: Arc::clone(&self.shared),
                name: name.clone(),
                options,
                begun: Timestamp::now(),
                lines: None,
                attached: false,
            };
            return stream::unfold(Some(following), async |following| {
                let mut following = following?;
                match following.next().await? {
                    Ok(line) => Some((Ok(line), Some(following))),
                    Err(error) => Some((Err(error), None)),
                }
            })
            .boxed();
        }
        match self.snapshot().known.get(name).and_then(|known| known.container.clone()) {
            Some(container) => self.shared.engine.logs(&container, options),
            None => stream::empty().boxed(),
        }
    }

    /// The instance's container, which runs as far as is known.
    fn running(&self, name: &InstanceName) -> Result<ContainerId, NotInside> {
        let snapshot = self.snapshot();
        let runs = snapshot.view(name).is_some_and(|view| view.status == "running");
        let container = snapshot.known.get(name).and_then(|known| known.container.clone());
        container.filter(|_| runs).ok_or_else(|| NotInside::NotRunning(name.clone()))
    }

    async fn read_usage(&self, name: &InstanceName) -> Result<Usage, NotInside> {
        let container = self.running(name)?;
        let engine = &self.shared.engine;
        if let Some(usage) = engine.usage(&container).await? {
            return Ok(usage);
        }
        let seen = engine.inspect(&container).await?;
        let runs = seen.is_some_and(|seen| matches!(seen.condition, Condition::Running { .. } | Condition::Paused));
        Err(if runs { NotInside::NoFigures(name.clone()) } else { NotInside::NotRunning(name.clone()) })
    }
}

fn admit(door: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, NotInside> {
    Arc::clone(door).try_acquire_owned().map_err(|_| NotInside::Busy)
}

/// Somebody following an instance's output. Docker's own stream ends with the container's process.
struct Following {
    shared: Arc<Shared>,
    name: InstanceName,
    /// What is still to come: after the first line, everything after the last one.
    options: LogOptions,
    begun: Timestamp,
    lines: Option<BoxStream<'static, Result<LogLine, EngineError>>>,
    attached: bool,
}

impl Following {
    async fn next(&mut self) -> Option<Result<LogLine, EngineError>> {
        loop {
            if let Some(lines) = &mut self.lines {
                match lines.next().await {
                    Some(Ok(line)) => {
                        // Docker's times are unique enough: they have nanoseconds.
                        let after = line.at.and_then(|at| at.checked_add(jiff::SignedDuration::from_nanos(1)).ok());
                        self.options.since = after.or(self.options.since);
                        return Some(Ok(line));
                    }
                    Some(Err(EngineError::ContainerGone { .. })) | None => {}
                    Some(Err(error)) => return Some(Err(error)),
                }
            }
            self.lines = Some(self.attach().await?);
        }
    }

    /// The next stream of lines, once there is one; nothing when there will be none.
    async fn attach(&mut self) -> Option<BoxStream<'static, Result<LogLine, EngineError>>> {
        // A container that doesn't run has left lines too.
        let first = !self.attached;
        if !first {
            self.options.tail = None;
            self.options.since = self.options.since.or(Some(self.begun));
            sleep(BEFORE_FOLLOWING).await;
        }
        let mut published = self.shared.published.subscribe();
        let name = &self.name;
        let snapshot = published.wait_for(|snapshot| {
            let Some(known) = snapshot.known.get(name) else { return true };
            let runs = snapshot.view(name).is_some_and(|view| view.status == "running");
            (first && known.container.is_some()) || runs || matches!(known.state, State::Stopped)
        });
        let container = {
            let snapshot = snapshot.await.ok()?;
            let known = snapshot.known.get(name)?;
            if !first && matches!(known.state, State::Stopped) {
                return None;
            }
            known.container.clone()?
        };
        self.attached = true;
        Some(self.shared.engine.logs(&container, self.options))
    }
}
