//! A container engine in memory. Its containers have no processes; their address is loopback, so whatever a test serves there is
//! what they serve.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use dtma_agent::engine::{
    Attached, Condition, Container, ContainerId, Engine, EngineError, Exec, ExecEnd, ExecError, Executed, Exit,
    HeldImage, Image, Kept, Link, LogLine, LogOptions, Settings, Usage, Volumes,
};
use dtma_agent::instance::{DeploymentId, ImageReference, PortProtocol, RegistryCredentials, SessionOf, Spec};
use dtma_api::instance::Progress;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};

#[derive(Default)]
pub(crate) struct LoopbackEngine {
    containers: Mutex<BTreeMap<String, Container>>,
    gone: AtomicBool,
    /// Lets one command that `waits` end.
    #[allow(dead_code, reason = "each test program uses its part")]
    pub(crate) gate: tokio::sync::Notify,
}

impl LoopbackEngine {
    /// From now on nothing answers.
    pub(crate) fn vanish(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    fn answer<T>(&self, act: impl FnOnce(&mut BTreeMap<String, Container>) -> T) -> Result<T, EngineError> {
        if self.gone.load(Ordering::Relaxed) {
            return Err(EngineError::Unavailable { operation: "do anything", source: "it is gone".into() });
        }
        Ok(act(&mut self.containers.lock().unwrap()))
    }

    fn change(&self, id: &ContainerId, condition: Condition) -> Result<(), EngineError> {
        self.answer(|containers| {
            let container = containers.get_mut(&id.0).expect("the agent only acts on containers that are there");
            let runs = matches!(condition, Condition::Running { .. });
            container.address = runs.then_some(IpAddr::V4(Ipv4Addr::LOCALHOST));
            container.condition = condition;
        })
    }
}

#[async_trait]
impl Engine for LoopbackEngine {
    async fn version(&self) -> Result<String, EngineError> {
        self.answer(|_| "99".to_owned())
    }

    async fn list(&self) -> Result<Vec<Container>, EngineError> {
        self.answer(|containers| containers.values().cloned().collect())
    }

    async fn inspect(&self, id: &ContainerId) -> Result<Option<Container>, EngineError> {
        self.answer(|containers| containers.get(&id.0).cloned())
    }

    async fn image(&self, _: &ImageReference) -> Result<Option<Image>, EngineError> {
        self.answer(|_| Some(Image { id: "sha256:1".to_owned(), digest: None }))
    }

    async fn pull(
        &self,
        _: &ImageReference,
        _: Option<&RegistryCredentials>,
        _: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<(), EngineError> {
        self.answer(|_| ())
    }

    async fn images(&self) -> Result<Vec<HeldImage>, EngineError> {
        self.answer(|_| Vec::new())
    }

    async fn remove_image(&self, _: &str) -> Result<(), EngineError> {
        self.answer(|_| ())
    }

    async fn data_root(&self) -> Result<Option<PathBuf>, EngineError> {
        self.answer(|_| None)
    }

    async fn create(&self, name: &str, spec: &Spec, deployment: &DeploymentId) -> Result<ContainerId, EngineError> {
        self.answer(|containers| {
            let last = containers.last_key_value().map_or(0, |(id, _)| u64::from_str_radix(id, 16).unwrap());
            let id = ContainerId(format!("{:064x}", last + 1));
            let container = Container {
                id: id.clone(),
                name: name.to_owned(),
                instance: Some(spec.name.clone()),
                session: None,
                spec_hash: spec.hash(),
                spec_label: serde_json::to_string(spec).unwrap(),
                deployment: Some(*deployment),
                created: Timestamp::now().as_second(),
                condition: Condition::Created,
                settings: Settings::of(spec),
                restart_count: 0,
                ports: Vec::new(),
                address: None,
                own_address: None,
                links: Link::all_of(&spec.network),
            };
            containers.insert(id.0.clone(), container);
            id
        })
    }

    async fn create_for_session(
        &self,
        session: &SessionOf,
        spec: &Spec,
        deployment: &DeploymentId,
        _: &ContainerId,
    ) -> Result<ContainerId, EngineError> {
        let id = self.create(&session.id.container_name(), spec, deployment).await?;
        self.answer(|containers| {
            let container = containers.get_mut(&id.0).expect("it was made just now");
            container.instance = None;
            container.session = Some(session.clone());
        })?;
        Ok(id)
    }

    async fn rename(&self, id: &ContainerId, name: &str) -> Result<(), EngineError> {
        self.answer(|containers| {
            let container = containers.get_mut(&id.0).expect("the agent only acts on containers that are there");
            name.clone_into(&mut container.name);
        })
    }

    async fn adjust(&self, id: &ContainerId, spec: &Spec) -> Result<(), EngineError> {
        self.answer(|containers| {
            let container = containers.get_mut(&id.0).expect("the agent only acts on containers that are there");
            container.settings = Settings::of(spec);
        })
    }

    async fn start(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.change(id, Condition::Running { since: Timestamp::now() })
    }

    async fn stop(&self, id: &ContainerId, _: u32) -> Result<(), EngineError> {
        self.change(id, Condition::Exited(Exit { code: 0, out_of_memory: false, error: String::new() }))
    }

    async fn restart(&self, id: &ContainerId, _: u32) -> Result<(), EngineError> {
        self.start(id).await
    }

    async fn next_exit(&self, _id: &ContainerId) -> Result<i64, EngineError> {
        std::future::pending().await
    }

    async fn remove(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.answer(|containers| drop(containers.remove(&id.0)))
    }

    async fn remove_volumes(&self, _: &Volumes) -> Result<(), EngineError> {
        self.answer(|_| ())
    }

    async fn egress_gateway(&self) -> Result<IpAddr, EngineError> {
        self.answer(|_| Ipv4Addr::LOCALHOST.into())
    }

    async fn port_holder(&self, _: u16, _: PortProtocol) -> Result<Option<String>, EngineError> {
        self.answer(|_| None)
    }

    async fn environment(&self, _: &ContainerId) -> Result<Vec<(String, String)>, EngineError> {
        self.answer(|_| Vec::new())
    }

    async fn attach(&self, id: &ContainerId) -> Result<Attached, EngineError> {
        self.answer(|containers| assert!(matches!(containers[&id.0].condition, Condition::Running { .. })))?;
        let (input, process_input) = tokio::io::duplex(4096);
        let (process_output, output) = tokio::io::duplex(4096);
        tokio::spawn(stdio_server(process_input, process_output));
        let output = tokio_util::io::ReaderStream::new(output)
            .map(|piece| piece.map_err(|error| EngineError::Unavailable { operation: "read", source: error.into() }));
        Ok(Attached { input: Box::pin(input), output: output.boxed() })
    }

    async fn exec(&self, id: &ContainerId, exec: &Exec) -> Result<Executed, ExecError> {
        let running = self.answer(|containers| {
            containers.get(&id.0).is_some_and(|found| matches!(found.condition, Condition::Running { .. }))
        })?;
        let stdout = Kept { bytes: exec.command.join(" ").into_bytes(), dropped: 0 };
        let executed = |end| Executed { end, stdout, stderr: Kept { bytes: b"\xff".to_vec(), dropped: 3 } };
        match exec.command.first().map(String::as_str) {
            _ if !running => Err(ExecError::NotRunning),
            Some("nope") => Err(ExecError::CannotStart { message: "no such file".to_owned() }),
            Some("slow") => Ok(executed(ExecEnd::TimedOut { killed: false })),
            Some("waits") => {
                self.gate.notified().await;
                // One ring lets them all go, one after the other.
                self.gate.notify_one();
                Ok(executed(ExecEnd::Exited { code: 0 }))
            }
            Some(_) | None => Ok(executed(ExecEnd::Exited { code: 7 })),
        }
    }

    async fn usage(&self, id: &ContainerId) -> Result<Option<Usage>, EngineError> {
        self.answer(|containers| {
            let found = containers.get(&id.0)?;
            matches!(found.condition, Condition::Running { .. }).then(|| Usage {
                at: Timestamp::now(),
                cpu_nanos: 0,
                memory_bytes: 1,
                memory_limit_bytes: 2,
                network_rx_bytes: 3,
                network_tx_bytes: 4,
                block_read_bytes: 5,
                block_write_bytes: 6,
                pids: 7,
            })
        })
    }

    fn changes(&self) -> BoxStream<'static, Result<(), EngineError>> {
        stream::pending().boxed()
    }

    fn logs(&self, _: &ContainerId, _: LogOptions) -> BoxStream<'static, Result<LogLine, EngineError>> {
        stream::empty().boxed()
    }
}

/// Shakes hands, echoes every other request, and ends when it is told to.
async fn stdio_server(input: tokio::io::DuplexStream, mut output: tokio::io::DuplexStream) {
    let mut lines = BufReader::new(input).lines();
    output.write_all(b"listening on stdio\n").await.unwrap();
    while let Some(line) = lines.next_line().await.unwrap() {
        let message: Value = serde_json::from_str(&line).unwrap();
        let result = match message["method"].as_str() {
            Some("initialize") => json!({"protocolVersion": "2025-11-25", "capabilities": {}}),
            Some("exit") => return,
            _ => message.clone(),
        };
        if message.get("id").is_some() {
            let answer = json!({"jsonrpc": "2.0", "id": message["id"], "result": result});
            output.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
        }
    }
}
