//! Everything at once: callers who ask for all kinds of things, and somebody with a shell on the droplet who kills, removes and
//! renames. When it gets quiet, what is there has to be what was promised, no more and no less. Run from a seed, so that what was
//! tried can be tried again; what happens at which moment is the machine's affair.

mod client;
mod crew;
pub(crate) mod dice;
mod model;
mod monkey;
mod record;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use self::client::Client;
use self::crew::Crew;
use self::dice::Dice;
use self::model::Model;
use self::monkey::Monkey;
use self::record::Record;
use self::verdict::{Found, STRANGER};
use crate::Scene;

/// How long it may take until everything is in order once nobody disturbs it any more. The longest wait is for an instance that
/// failed several times in a row.
const QUIET: Duration = Duration::from_secs(180);
/// How long it has to stay in order.
const STILL: Duration = Duration::from_secs(4);
/// More than the agent needs for a handful of instances, whatever was done to it, MB.
const MEMORY_BAR: f64 = 30.0;
/// Instances of each caller that only it asks about.
const OWN: [[&str; 2]; 3] = [["mcp-alpha", "beta"], ["mcp-gamma", "delta"], ["epsilon", "zeta"]];
const CONTESTED: [&str; 1] = ["contested"];

/// What to do.
#[derive(Debug, Clone, Copy)]
pub struct Chaos {
    /// How long callers and the one with the shell are at it.
    pub length: Duration,
    /// What they do follows from it.
    pub seed: u64,
}

/// What came of it, when all is well.
#[derive(Debug)]
pub struct Aftermath {
    /// Requests accepted, refused, and without an answer.
    pub requests: (usize, usize, usize),
    /// How often each trick was played.
    pub tricks: BTreeMap<&'static str, usize>,
    /// From the end of the disturbance until everything was in order.
    pub settled_after: Duration,
    /// The agent's resident memory, MB: the most that was seen, and the last.
    pub memory: (f64, f64),
}

impl Chaos {
    /// Disturbs `scene` and waits until it is in order again. Each action is told to `tell` as it happens, one line.
    ///
    /// # Errors
    /// What isn't as promised, instance by instance, with what was done to each.
    pub async fn run(self, scene: &Scene, tell: &(dyn Fn(&str) + Sync)) -> Result<Aftermath, Box<dyn Error>> {
        let record = Record::new(tell);
        prepare(scene).await?;
        let end = Instant::now() + self.length;
        let image = scene.stack.mcp_image();
        let contested: Vec<String> = CONTESTED.map(str::to_owned).to_vec();
        let mut clients: Vec<Client<'_>> = OWN
            .iter()
            .zip(1..)
            .map(|(own, number)| Client {
                who: format!("caller {number}"),
                agent: &scene.agent,
                image: image.clone(),
                models: own.iter().map(|name| ((*name).to_owned(), Model::default())).collect(),
                contested: contested.clone(),
                dice: Dice::new(self.seed, &format!("caller {number}")),
                record: &record,
                heard: client::Heard::default(),
            })
            .collect();
        let mut crew = Crew {
            agent: &scene.agent,
            image,
            dice: Dice::new(self.seed, "crew"),
            record: &record,
            heard: client::Heard::default(),
        };
        let dice = Dice::new(self.seed, "monkey");
        let mut monkey = Monkey { scene, dice, record: &record, played: BTreeMap::new() };

        let asking = futures_util::future::join_all(clients.iter_mut().map(|client| client.ask_until(end)));
        let watching = watch_memory(scene, end);
        let (mistakes, of_the_crew, played, most) =
            tokio::join!(asking, crew.ask_until(end), monkey.play_until(end), watching);
        played?;
        let mut wrong: Vec<String> = mistakes.into_iter().flatten().chain(of_the_crew).collect();
        let mut models = BTreeMap::new();
        let mut contested: BTreeSet<String> = contested.into_iter().collect();
        contested.extend(crew::MEMBERS.map(str::to_owned));
        let mut requests = (crew.heard.accepted, crew.heard.refused, crew.heard.lost);
        for client in clients {
            requests.0 += client.heard.accepted;
            requests.1 += client.heard.refused;
            requests.2 += client.heard.lost;
            models.extend(client.models);
            contested.extend(client.contested);
        }

        let begun = record.elapsed();
        let differences = until_in_order(scene, &models, &contested).await?;
        let settled_after = record.elapsed().saturating_sub(begun);
        wrong.extend(differences.into_iter().map(|difference| {
            let name = difference.split(':').next().unwrap_or_default().to_owned();
            format!("{difference}\n{}", record.about(&name))
        }));
        let last = memory(scene).await?;
        if last > MEMORY_BAR {
            wrong.push(format!("the agent holds {last:.1} MB, more than {MEMORY_BAR}"));
        }
        if wrong.is_empty() {
            return Ok(Aftermath { requests, tricks: monkey.played, settled_after, memory: (most.max(last), last) });
        }
        Err(format!("seed {}: {} things are wrong\n{}", self.seed, wrong.len(), wrong.join("\n")).into())
    }
}

/// Somebody else's container and volume, which have to survive.
async fn prepare(scene: &Scene) -> Result<(), Box<dyn Error>> {
    let image = scene.stack.mcp_image();
    let script = format!(
        "docker volume create {STRANGER} && docker run --detach --name {STRANGER} --restart always --volume {STRANGER}:/data {image} sleep 1000000"
    );
    scene.on_droplet(&["sh", "-c", &script]).await.map(drop)
}

/// Waits until what is there is what was promised, and stays so; what still differs when that takes too long.
async fn until_in_order(
    scene: &Scene,
    models: &BTreeMap<String, Model>,
    contested: &BTreeSet<String>,
) -> Result<Vec<String>, Box<dyn Error>> {
    let begun = Instant::now();
    let mut in_order_since = None;
    loop {
        let differences = Found::on(scene).await?.differences(models, contested);
        let now = Instant::now();
        if differences.is_empty() {
            let since = *in_order_since.get_or_insert(now);
            if now.duration_since(since) >= STILL {
                return Ok(Vec::new());
            }
        } else {
            in_order_since = None;
            if begun.elapsed() > QUIET {
                return Ok(differences);
            }
        }
        sleep(Duration::from_millis(300)).await;
    }
}

/// The most memory the agent was seen to hold until `end`.
async fn watch_memory(scene: &Scene, end: Instant) -> f64 {
    let mut most = 0.0_f64;
    while Instant::now() < end {
        sleep(Duration::from_secs(3)).await;
        // It may just be dead.
        most = most.max(memory(scene).await.unwrap_or(0.0));
    }
    most
}

/// The agent's resident memory, MB.
async fn memory(scene: &Scene) -> Result<f64, Box<dyn Error>> {
    let script = "awk '/^VmRSS/ { print $2 }' /proc/$(systemctl show --property=MainPID --value dtma-agent)/status";
    let kilobytes: f64 = scene.on_droplet(&["sh", "-c", script]).await?.trim().parse()?;
    Ok(kilobytes * 1024.0 / 1e6)
}
