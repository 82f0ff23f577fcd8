//! The processes in the containers of the engine in memory, as far as there are any.

use futures_util::StreamExt as _;
use futures_util::stream;

use super::{FakeEngine, World, is_running};
use crate::engine::{Attached, ContainerId, EngineError, Exec, ExecEnd, ExecError, Executed, Kept};

impl FakeEngine {
    /// To a process that reads everything and says nothing.
    pub(super) async fn attached(&self, id: &ContainerId) -> Result<Attached, EngineError> {
        let runs = move |world: &mut World| Ok(is_running(world, id));
        if !self.call("attach", id.as_str(), runs).await? {
            return Err(EngineError::ContainerGone { operation: "attach to the container" });
        }
        Ok(Attached { input: Box::pin(tokio::io::sink()), output: stream::pending().boxed() })
    }

    pub(super) async fn run(&self, id: &ContainerId, exec: &Exec) -> Result<Executed, ExecError> {
        let command = exec.command.join(" ");
        let runs = move |world: &mut World| Ok(is_running(world, id));
        if !self.call("exec", id.as_str(), runs).await? {
            return Err(ExecError::NotRunning);
        }
        if command == "sleep" {
            tokio::time::sleep(exec.patience).await;
            return Ok(Executed { end: ExecEnd::TimedOut { killed: true }, ..executed(&command) });
        }
        Ok(executed(&command))
    }
}

fn executed(output: &str) -> Executed {
    let stdout = Kept { bytes: output.as_bytes().to_vec(), dropped: 0 };
    Executed { end: ExecEnd::Exited { code: 0 }, stdout, stderr: Kept::default() }
}
