//! What the stories share: a scene with everything running, and waits that end. What should happen is in `tests/`, one story each,
//! over real processes and real droplets; they need Docker and root and are run by `cargo xtask test`.

pub mod backend;
pub mod chaos;
pub mod mcp;
pub mod traces;

use std::error::Error;
use std::time::{Duration, Instant};

use dtma_api::environment::{EnsureRequest, EnvironmentStatus, EnvironmentView};
use dtma_api::instance::InstanceState;
use stack::cloud::Power;
use stack::{Agent, Stack, StackOptions, Workspace};

/// How a story ends; the first surprise ends it.
pub type Story = Result<(), Box<dyn Error>>;

/// The platform's agent in whose name stories ask for an environment.
pub const AGENT: &str = "story-agent";

/// How long a droplet may take to be up again.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// A running stack, an active environment in it, and a client of its agent. Dropped, it takes everything with it.
#[derive(Debug)]
pub struct Scene {
    /// Local cloud, registry and provisioner.
    pub stack: Stack,
    /// The environment of [`AGENT`].
    pub environment: EnvironmentView,
    /// The agent on its droplet, called with the fleet key.
    pub agent: Agent,
}

impl Scene {
    /// Starts a stack and waits until an environment on a droplet made from `image` is active.
    ///
    /// # Errors
    /// The first step that failed, with the ends of all logs when the environment doesn't become active.
    pub async fn set(image: &str) -> Result<Self, Box<dyn Error>> {
        Self::on(Stack::start(StackOptions { base_images: vec![image.to_owned()], ..story_options() }).await?).await
    }

    /// The same on a stack that runs.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub async fn on(stack: Stack) -> Result<Self, Box<dyn Error>> {
        let environment = active(&stack, 140).await?;
        let agent = stack.agent(&environment)?;
        Ok(Self { stack, environment, agent })
    }

    /// The droplet's id.
    ///
    /// # Errors
    /// When the environment says none.
    pub fn droplet(&self) -> Result<i64, Box<dyn Error>> {
        self.environment.droplet_id.ok_or_else(|| "the environment has no droplet".into())
    }

    /// Runs a command in the droplet that has to succeed; its standard output.
    ///
    /// # Errors
    /// When it ends with anything but 0.
    pub async fn on_droplet(&self, command: &[&str]) -> Result<String, Box<dyn Error>> {
        let output = self.stack.droplet_exec(self.droplet()?, command).await?;
        if output.exit_code == 0 {
            return Ok(output.stdout);
        }
        Err(format!("{command:?} ended with {}: {}{}", output.exit_code, output.stdout, output.stderr).into())
    }

    /// Cuts the droplet's power, gives it back, and waits until it has booted; its agent and what runs there may take longer.
    ///
    /// # Errors
    /// When the cloud refuses, or it doesn't boot in time.
    pub async fn cut_power(&self) -> Story {
        // When its first process started.
        let boot_time = ["cut", "-d", " ", "-f", "22", "/proc/1/stat"];
        let boot = self.on_droplet(&boot_time).await?;
        self.stack.cloud().power(self.droplet()?, Power::Cycle).await?;
        until("the droplet has booted again", BOOT_LIMIT, async || {
            Ok((self.on_droplet(&boot_time).await? != boot).then_some(()))
        })
        .await
    }

    /// Everything Docker holds on the droplet that a failed deploy could leave there: containers, volumes, networks, by name.
    ///
    /// # Errors
    /// When Docker there can't be asked.
    pub async fn docker_inventory(&self) -> Result<String, Box<dyn Error>> {
        let script = "docker ps -a --format '{{.Names}}' | sort; docker volume ls -q | sort; docker network ls --format '{{.Name}}' | sort";
        self.on_droplet(&["sh", "-c", script]).await
    }
}

/// Options for stories: doubt about a create is settled in seconds, because the local cloud's lists lag by one.
pub fn story_options() -> StackOptions {
    StackOptions::default().provisioner_setting("LOOKUP_GRACE_SECONDS", "5")
}

/// Ensures the environment of [`AGENT`] and waits until it is active.
///
/// # Errors
/// When it is something else after `wait` seconds; with the ends of all logs.
pub async fn active(stack: &Stack, wait: u64) -> Result<EnvironmentView, Box<dyn Error>> {
    let environment = stack.provisioner().ensure(AGENT, &EnsureRequest::default(), wait).await?;
    if environment.status == EnvironmentStatus::Active {
        return Ok(environment);
    }
    Err(format!("not active after {wait} s: {environment:?}\n{}", all_logs(stack).await).into())
}

/// The end of every log of a stack, for a story's last words.
pub async fn all_logs(stack: &Stack) -> String {
    stack.logs(40).await.into_iter().map(|(name, text)| format!("--- {name}\n{text}\n")).collect()
}

/// Looks again and again until there is something to see, and gives up after `limit`.
///
/// # Errors
/// When there was nothing in time, naming `what` was waited for.
pub async fn until<T, F>(what: &str, limit: Duration, mut look: F) -> Result<T, Box<dyn Error>>
where
    F: AsyncFnMut() -> Result<Option<T>, Box<dyn Error>>,
{
    let begun = Instant::now();
    loop {
        let seen = look().await;
        match seen {
            Ok(Some(value)) => return Ok(value),
            _ if begun.elapsed() < limit => tokio::time::sleep(Duration::from_millis(20)).await,
            Ok(None) => return Err(format!("{what}: not within {} s", limit.as_secs()).into()),
            Err(error) => return Err(format!("{what}: not within {} s: {error}", limit.as_secs()).into()),
        }
    }
}

/// Waits until an agent answers and all its instances run.
///
/// # Errors
/// When that takes longer than `limit`.
pub async fn until_all_run(agent: &Agent, limit: Duration) -> Result<(), Box<dyn Error>> {
    until("every instance runs", limit, async || {
        let instances = agent.status().await?.tool_instances;
        let all = !instances.is_empty() && instances.iter().all(|it| it.state == InstanceState::Running);
        Ok(all.then_some(()))
    })
    .await
}

/// Nothing that passed between provisioner and cloud was outside DigitalOcean's description of its API. Where that description
/// is absent the check is skipped, and says so.
///
/// # Errors
/// The violations there were.
pub async fn assert_contract_kept(stack: &Stack) -> Story {
    if Workspace::find().cloud_contract().is_none() {
        println!(
            "skipped: DigitalOcean's API description is not here (DO_OPENAPI names it), so nothing was checked against it"
        );
        return Ok(());
    }
    let violations = stack.cloud().violations().await?;
    if violations.is_empty() {
        return Ok(());
    }
    Err(format!("outside DigitalOcean's API description: {violations:#?}").into())
}
