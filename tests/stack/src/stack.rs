//! One running stack: a Docker network, a registry, the local cloud and a provisioner, all reachable at the network's gateway
//! address, and nothing left of them afterwards.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dtma_api::Token;
use dtma_api::environment::EnvironmentView;

use crate::agent::Agent;
use crate::cloud::Cloud;
use crate::command::tail_of;
use crate::docker::{Engine, ExecOutput, Leftovers, network_name};
use crate::error::{Result, StackError};
use crate::image::{self, Image};
use crate::prepare;
use crate::process::ProcessRecord;
use crate::provisioner::Provisioner;
use crate::ready::{free_port, free_port_at_both, wait_until_ok};
use crate::record::{self, Record, StackFile};
use crate::registry::{self, Access};
use crate::release::ReleaseError;
use crate::watch::{Unwatched, Watch};
use crate::workspace::Workspace;

const READY_LIMIT: Duration = Duration::from_secs(20);
const STOP_GRACE: Duration = Duration::from_secs(5);

/// What a stack may be given.
#[derive(Debug, Clone)]
pub struct StackOptions {
    /// Its name, lower-case letters, digits and dashes; a random one when absent.
    pub id: Option<String>,
    /// Settings of the provisioner that differ from the stack's own, by the name of the environment variable.
    pub provisioner_env: BTreeMap<String, String>,
    /// Image slugs droplets will be made from; the first is the provisioner's default.
    pub base_images: Vec<String>,
    /// It goes on after this process has ended, until `down`.
    pub stays: bool,
}

impl Default for StackOptions {
    fn default() -> Self {
        Self {
            id: None,
            provisioner_env: BTreeMap::new(),
            base_images: vec![prepare::DEFAULT_IMAGE.to_owned()],
            stays: false,
        }
    }
}

impl StackOptions {
    /// With a setting of the provisioner changed.
    #[must_use]
    pub fn provisioner_setting(mut self, name: &str, value: &str) -> Self {
        self.provisioner_env.insert(name.to_owned(), value.to_owned());
        self
    }
}

#[derive(Debug, Clone, Copy)]
struct Addresses {
    registry_push: SocketAddr,
    registry: SocketAddr,
    cloud: SocketAddr,
    provisioner: SocketAddr,
}

/// A running stack. Dropped, it takes everything it has made with it, droplets included, unless it was told to stay.
#[derive(Debug)]
pub struct Stack {
    id: String,
    workspace: Workspace,
    engine: Engine,
    folder: PathBuf,
    gateway: IpAddr,
    addresses: Addresses,
    fleet_key: Token,
    internal_secret: Token,
    cloud_token: Token,
    provisioner_env: BTreeMap<String, String>,
    mcp_image: Image,
    servers_image: Image,
    record: Mutex<Record>,
    provisioner: Provisioner,
    cloud: Cloud,
    /// Dropping it removes nothing more.
    removed: bool,
    /// Held for as long as this process uses the stack's name.
    _lock: File,
}

impl Stack {
    /// Prepares everything (once per process) and starts a stack.
    ///
    /// # Errors
    /// The first step that failed; what was started before it is gone again.
    pub async fn start(options: StackOptions) -> std::result::Result<Self, ReleaseError> {
        static PREPARED: tokio::sync::Mutex<Vec<String>> = tokio::sync::Mutex::const_new(Vec::new());
        let workspace = Workspace::find();
        let mut prepared = PREPARED.lock().await;
        let wanted: Vec<String> =
            options.base_images.iter().filter(|image| !prepared.contains(image)).cloned().collect();
        if !wanted.is_empty() {
            prepare::everything(&workspace, &wanted, &Unwatched).await?;
            remove_stale(&workspace).await?;
            prepared.extend(wanted);
        }
        drop(prepared);
        Ok(Self::start_prepared(options, &workspace, &Unwatched).await?)
    }

    /// Starts a stack for which [`prepare::everything`] has been done.
    ///
    /// # Errors
    /// As [`Stack::start`].
    pub async fn start_prepared(options: StackOptions, workspace: &Workspace, watch: &dyn Watch) -> Result<Self> {
        let id = match options.id {
            Some(id) => id,
            None => random_id()?,
        };
        let folder = record::folder_of(workspace, &id);
        std::fs::create_dir_all(&folder).map_err(StackError::io(format!("make {}", folder.display())))?;
        let lock = lock(&id, &folder)?;
        let engine = Engine::connect().await?;
        remove_by_id(&engine, workspace, &id).await?;
        std::fs::create_dir_all(&folder).map_err(StackError::io(format!("make {}", folder.display())))?;

        watch.now("Docker network");
        let gateway = engine.network(&id).await?;
        let gateway: IpAddr =
            gateway.parse().map_err(|_| StackError::DockerAnswer(format!("{gateway} is no gateway address")))?;
        let (registry_push, registry) = free_port_at_both([127, 0, 0, 1].into(), gateway)?;
        let addresses =
            Addresses { registry_push, registry, cloud: free_port(gateway)?, provisioner: free_port(gateway)? };
        let (internal_secret, cloud_token) = (Token::generate()?, Token::generate()?);
        let owner = if options.stays { None } else { Some(ProcessRecord::of_this_process()?) };
        let mut provisioner_env = options.provisioner_env;
        if let Some(image) = options.base_images.into_iter().next() {
            provisioner_env.entry("DO_DEFAULT_IMAGE".to_owned()).or_insert(image);
        }
        // From here on a failure drops the stack, and with it whatever runs already.
        let mut stack = Self {
            provisioner: Provisioner::new(format!("http://{}", addresses.provisioner), internal_secret.clone())?,
            cloud: Cloud::new(format!("http://{}", addresses.cloud), cloud_token.clone())?,
            mcp_image: Image::demo(workspace)?,
            servers_image: Image::servers(workspace)?,
            fleet_key: Token::generate()?,
            record: Mutex::new(Record { owner, processes: Vec::new() }),
            workspace: workspace.clone(),
            removed: false,
            _lock: lock,
            id,
            engine,
            folder,
            gateway,
            addresses,
            internal_secret,
            cloud_token,
            provisioner_env,
        };
        stack.remember(None)?;
        if let Err(error) = stack.start_processes(watch).await {
            stack.remove().await?;
            return Err(error);
        }
        stack.removed = options.stays;
        Ok(stack)
    }

    async fn start_processes(&self, watch: &dyn Watch) -> Result<()> {
        watch.now("registry");
        let storage = image::storage(&self.workspace);
        let writable = registry::spawn(Access::Write, self.addresses.registry_push, &storage, &self.folder)?;
        self.remember(Some(&writable))?;
        let read_only = registry::spawn(Access::ReadOnly, self.addresses.registry, &storage, &self.folder)?;
        self.remember(Some(&read_only))?;
        watch.now("local cloud");
        let cloud = self.spawn_cloud()?;
        self.remember(Some(&cloud))?;
        wait_until_ok(&format!("http://{}/v2/", self.addresses.registry_push), None, &writable, READY_LIMIT).await?;
        wait_until_ok(&format!("http://{}/v2/", self.addresses.registry), None, &read_only, READY_LIMIT).await?;
        let droplets = format!("{}/control/droplets", self.cloud.url());
        wait_until_ok(&droplets, Some(&self.cloud_token), &cloud, READY_LIMIT).await?;
        watch.now("provisioner");
        self.start_provisioner().await
    }

    fn spawn_cloud(&self) -> Result<ProcessRecord> {
        let program = self.workspace.program("local-cloud");
        let mut args = vec![
            "serve".to_owned(),
            format!("--stack={}", self.id),
            format!("--network={}", network_name(&self.id)),
            format!("--listen={}", self.addresses.cloud),
            format!("--registry={}", self.addresses.registry),
        ];
        args.extend(self.workspace.cloud_contract().map(|path| format!("--check-contract={}", path.display())));
        let mut env = surroundings(["RUST_LOG", "DOCKER_HOST"]);
        // Not an argument: those are for everybody to see.
        env.push(("LOCAL_CLOUD_TOKEN".to_owned(), self.cloud_token.expose().to_owned()));
        ProcessRecord::spawn("local-cloud", &program, args, env, &self.folder, &self.folder.join("local-cloud.log"))
    }

    /// The stack's id, the value of its label in Docker.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The host's address on the droplets' network.
    pub fn gateway(&self) -> IpAddr {
        self.gateway
    }

    /// A client of the provisioner.
    pub fn provisioner(&self) -> Provisioner {
        self.provisioner.clone()
    }

    /// A client of the local cloud.
    pub fn cloud(&self) -> Cloud {
        self.cloud.clone()
    }

    /// A client of the agent of an active environment, with the fleet key.
    ///
    /// # Errors
    /// When the environment names no agent URL or pin yet.
    pub fn agent(&self, environment: &EnvironmentView) -> Result<Agent> {
        Agent::of(environment, self.fleet_key.clone())
    }

    /// The key every agent of this stack accepts.
    pub fn fleet_key(&self) -> &Token {
        &self.fleet_key
    }

    /// The MCP server's image, as droplets pull it.
    pub fn mcp_image(&self) -> String {
        self.mcp_image.reference(self.addresses.registry)
    }

    /// The image with the servers people use, as droplets pull it, once [`prepare::mcp`] has been done.
    pub fn servers_image(&self) -> String {
        self.servers_image.reference(self.addresses.registry)
    }

    /// The same image, as this machine pulls it.
    pub fn servers_image_here(&self) -> String {
        self.servers_image.reference(self.addresses.registry_push)
    }

    /// Host and port of the registry as droplets pull from it, and as this machine pushes to it.
    pub fn registries(&self) -> (SocketAddr, SocketAddr) {
        (self.addresses.registry, self.addresses.registry_push)
    }

    /// What a stack that stays is reached by.
    pub fn file(&self) -> StackFile {
        StackFile {
            provisioner_url: self.provisioner.url().to_owned(),
            internal_api_secret: self.internal_secret.clone(),
            fleet_api_key: self.fleet_key.clone(),
            cloud_url: self.cloud.url().to_owned(),
            cloud_token: self.cloud_token.clone(),
            registry: self.addresses.registry,
            registry_push: self.addresses.registry_push,
            mcp_image: self.mcp_image(),
        }
    }

    /// Ends the provisioner as a power cut would (SIGKILL).
    ///
    /// # Errors
    /// When the signal can't be sent.
    pub async fn kill_provisioner(&self) -> Result<()> {
        let processes: Vec<ProcessRecord> = self.record().processes.clone();
        for process in processes.iter().filter(|process| process.name == "provisioner") {
            process.kill().await?;
        }
        self.record().processes.retain(|process| process.name != "provisioner");
        self.remember(None)
    }

    /// Starts the provisioner, with the database it had before, and waits until it is ready.
    ///
    /// # Errors
    /// When it doesn't become ready; with the end of its log.
    pub async fn start_provisioner(&self) -> Result<()> {
        self.start_provisioner_with(&BTreeMap::new()).await
    }

    /// As [`Stack::start_provisioner`], with more settings on top.
    ///
    /// # Errors
    /// As [`Stack::start_provisioner`].
    pub async fn start_provisioner_with(&self, settings: &BTreeMap<String, String>) -> Result<()> {
        let program = self.workspace.program("dtma-provisioner");
        let url = self.provisioner.url();
        let mut env: BTreeMap<String, String> = surroundings(["RUST_LOG"]).into_iter().collect();
        let own = [
            ("LISTEN_ADDRESS", self.gateway.to_string()),
            ("PORT", self.addresses.provisioner.port().to_string()),
            ("PUBLIC_URL", url.to_owned()),
            ("INTERNAL_API_SECRET", self.internal_secret.expose().to_owned()),
            ("BACKEND_TO_DTMA_API_KEY", self.fleet_key.expose().to_owned()),
            ("DO_API_BASE_URL", self.cloud.url().to_owned()),
            ("DO_API_TOKEN", self.cloud_token.expose().to_owned()),
            ("DATABASE_URL", format!("sqlite://{}", self.folder.join("provisioner.sqlite").display())),
            ("RELEASES_DIR", self.workspace.releases().display().to_string()),
            ("RELEASE_KEYS", "unsigned".to_owned()),
        ];
        env.extend(own.map(|(name, value)| (name.to_owned(), value)));
        env.extend(self.provisioner_env.clone());
        env.extend(settings.clone());
        let log = self.folder.join("provisioner.log");
        let process = ProcessRecord::spawn("provisioner", &program, [""; 0], env, &self.folder, &log)?;
        self.remember(Some(&process))?;
        wait_until_ok(&format!("{url}/ready"), None, &process, READY_LIMIT).await
    }

    /// Runs a command as root in a droplet.
    ///
    /// # Errors
    /// When there is no such droplet or Docker can't run it; a command that fails is an answer.
    pub async fn droplet_exec(&self, droplet: i64, command: &[&str]) -> Result<ExecOutput> {
        self.engine.exec_in_droplet(&self.id, droplet, command).await
    }

    /// What the stack has in Docker now, besides its network.
    ///
    /// # Errors
    /// When Docker can't be asked.
    pub async fn leftovers(&self) -> Result<Leftovers> {
        self.engine.leftovers(&self.id).await
    }

    /// The end of every log there is, by name: the stack's processes, each droplet's console, each agent's journal.
    pub async fn logs(&self, lines: usize) -> Vec<(String, String)> {
        let processes: Vec<ProcessRecord> = self.record().processes.clone();
        let mut logs: Vec<(String, String)> =
            processes.into_iter().map(|process| (process.name, tail_of(&process.log, lines))).collect();
        for droplet in self.cloud.droplets().await.unwrap_or_default() {
            let console = self.cloud.console(droplet.id).await.unwrap_or_else(|error| error.to_string());
            let console = crate::command::last_lines(&console, lines).to_owned();
            logs.push((format!("console of droplet {}", droplet.id), console));
            let lines = lines.to_string();
            let journal = ["journalctl", "--unit=dtma-agent", "--no-pager", "--lines", &lines];
            let journal = match self.droplet_exec(droplet.id, &journal).await {
                Ok(output) => output.stdout + &output.stderr,
                Err(error) => error.to_string(),
            };
            logs.push((format!("agent's journal on droplet {}", droplet.id), journal));
        }
        logs
    }

    /// Removes everything: processes, droplets, volumes, network, files.
    ///
    /// # Errors
    /// The first thing that could not be removed.
    pub async fn remove(mut self) -> Result<()> {
        self.removed = true;
        remove_by_id(&self.engine, &self.workspace, &self.id).await
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, process: Option<&ProcessRecord>) -> Result<()> {
        let mut record = self.record();
        record.processes.extend(process.cloned());
        record.write(&self.folder)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if self.removed {
            return;
        }
        // A failed test wants its logs; everything else goes. Dropping can't wait for a future on the runtime it may be
        // running on, so the work gets a thread and a runtime of its own.
        let (workspace, id) = (self.workspace.clone(), self.id.clone());
        let keep_logs = std::thread::panicking();
        let work = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(StackError::io("start a runtime"))?;
            runtime.block_on(async {
                let engine = Engine::connect().await?;
                if keep_logs {
                    let folder = record::folder_of(&workspace, &id);
                    return remove_running(&engine, &folder, &id).await;
                }
                remove_by_id(&engine, &workspace, &id).await
            })
        });
        match work.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(stack = %self.id, %error, "not everything of the stack could be removed"),
            Err(_) => tracing::error!(stack = %self.id, "removing the stack failed"),
        }
    }
}

/// Removes every stack nobody uses any more: those whose owner has ended, and what a killed test of the local cloud has left.
/// Leaves `up`'s alone.
///
/// # Errors
/// The first that could not be removed.
pub async fn remove_stale(workspace: &Workspace) -> Result<()> {
    let engine = Engine::connect().await?;
    for id in record::known(workspace) {
        let stale = Record::read(&record::folder_of(workspace, &id)).is_some_and(|record| record.is_stale());
        if stale {
            remove_by_id(&engine, workspace, &id).await?;
        }
    }
    for id in engine.stacks().await?.iter().filter(|id| maker_of(id).is_some_and(|maker| !is_alive(maker))) {
        engine.sweep(id).await?;
    }
    Ok(())
}

/// The process whose stack this is: the local cloud's own tests, which know nothing of records, name theirs `lc…` and the process.
fn maker_of(id: &str) -> Option<u32> {
    id.strip_prefix("lc")?.trim_start_matches(|c: char| c.is_ascii_lowercase()).parse().ok()
}

fn is_alive(process: u32) -> bool {
    Path::new("/proc").join(process.to_string()).exists()
}

/// Removes every trace of `up`'s stack and of those nobody uses any more; with `unknown`, also of everything in Docker that bears a
/// stack's label and isn't known here, which may be in use by a test that is just running. Tells which there were.
///
/// # Errors
/// The first that could not be removed.
pub async fn remove_all(workspace: &Workspace, unknown: bool) -> Result<Vec<String>> {
    let engine = Engine::connect().await?;
    let mut ids = record::known(workspace);
    if unknown {
        ids.extend(engine.stacks().await?);
    }
    ids.sort();
    ids.dedup();
    ids.retain(|id| {
        let record = Record::read(&record::folder_of(workspace, id)).unwrap_or_default();
        record.owner.is_none() || record.is_stale()
    });
    for id in &ids {
        remove_by_id(&engine, workspace, id).await?;
    }
    remove_file(&StackFile::path(workspace))?;
    Ok(ids)
}

async fn remove_by_id(engine: &Engine, workspace: &Workspace, id: &str) -> Result<()> {
    let folder = record::folder_of(workspace, id);
    remove_running(engine, &folder, id).await?;
    remove_file(&folder.with_extension("lock"))?;
    match std::fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(StackError::io(format!("remove {}", folder.display()))(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Processes first, last started first: a provisioner that still runs would make droplets again, a cloud would miss them.
async fn remove_running(engine: &Engine, folder: &Path, id: &str) -> Result<()> {
    let record = Record::read(folder).unwrap_or_default();
    for process in record.processes.iter().rev() {
        process.stop(STOP_GRACE).await?;
    }
    engine.sweep(id).await?;
    remove_file(&folder.join(record::FILE))
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(StackError::io(format!("remove {}", path.display()))(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn lock(id: &str, folder: &Path) -> Result<File> {
    let path = folder.with_extension("lock");
    let file = File::options().create(true).append(true).open(&path);
    let file = file.map_err(StackError::io(format!("open {}", path.display())))?;
    file.try_lock().map_err(|_| StackError::InUse(format!("another process is using stack {id}")))?;
    Ok(file)
}

fn random_id() -> Result<String> {
    let mut bytes = [0_u8; 4];
    getrandom::fill(&mut bytes)?;
    Ok(hex::encode(bytes))
}

/// The few variables a process of the stack takes over from us; everything else it is told.
fn surroundings<const N: usize>(names: [&str; N]) -> Vec<(String, String)> {
    let names = ["PATH", "HOME", "LANG"].into_iter().chain(names);
    names.filter_map(|name| std::env::var(name).ok().map(|value| (name.to_owned(), value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_stacks_of_the_local_clouds_tests_name_their_process() {
        assert_eq!(maker_of("lcpower4711"), Some(4711));
        for other in ["up-a1b2c3", "deadbeef", "lcpower", "lc-power4711", "power4711", "lcpower4711x"] {
            assert_eq!(maker_of(other), None, "{other}");
        }
        assert!(is_alive(std::process::id()));
    }
}
