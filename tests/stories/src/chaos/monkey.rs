//! Whoever has a shell on the droplet and no good intentions: kills, removes, pauses, renames, restarts.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Duration;

use tokio::time::Instant;

use super::dice::Dice;
use super::record::Record;
use crate::Scene;

/// Everything it may do. A `$1` is the name of one of the agent's containers.
const TRICKS: [(u64, &str, &str); 15] = [
    (18, "kill -9 of the agent, everything", "systemctl kill --signal=KILL dtma-agent"),
    (4, "restart of the agent, everything", "systemctl restart --no-block dtma-agent"),
    (12, "docker kill", "docker kill $1"),
    (6, "docker stop", "docker stop --time 1 $1"),
    (6, "docker start", "docker start $1"),
    (12, "docker rm -f", "docker rm --force $1"),
    (8, "pause for a moment", "docker pause $1 && sleep $2 && docker unpause $1"),
    (8, "rename", "docker rename $1 somebody-elses-name-$2$$"),
    (8, "other limits", "docker update --memory 150m --memory-swap 150m --cpus 0.5 $1"),
    (3, "off the network", "docker network disconnect --force dtma $1"),
    (
        3,
        "the network removed, everything",
        "for one in $(docker ps --quiet --filter network=dtma); do docker network disconnect --force dtma $one; done; docker network rm dtma",
    ),
    (
        3,
        "another network removed, everything",
        "net=$(docker network ls --filter label=dtma.managed --format '{{.Name}}' | grep '[.]' | sort | sed -n \"$2p\"); [ -n \"$net\" ] || exit 1; \
         for one in $(docker ps --quiet --filter network=$net); do docker network disconnect --force $net $one; done; docker network rm $net",
    ),
    (4, "restart of Docker, everything", "systemctl restart docker"),
    (3, "kill -9 of Docker, everything", "systemctl kill --signal=KILL docker"),
    (2, "the agent's draft is in the way", "install -o dtma -g dtma -m 600 /dev/null /var/lib/dtma/ledger.json.new"),
];

/// What must be so again before it can get quiet.
const TIDY: &str = "systemctl start docker dtma-agent; \
    for one in $(docker ps --quiet --filter status=paused); do docker unpause $one; done";

pub(super) struct Monkey<'a> {
    pub(super) scene: &'a Scene,
    pub(super) dice: Dice,
    pub(super) record: &'a Record<'a>,
    /// How often each trick was played.
    pub(super) played: BTreeMap<&'static str, usize>,
}

impl Monkey<'_> {
    /// Plays tricks until `end`, then tidies up.
    pub(super) async fn play_until(&mut self, end: Instant) -> Result<(), Box<dyn Error>> {
        let tricks: Vec<(u64, (&str, &str))> =
            TRICKS.iter().map(|(weight, name, script)| (*weight, (*name, *script))).collect();
        while Instant::now() < end {
            let Some((trick, script)) = self.dice.weighted(&tricks) else { break };
            let victim = if script.contains("$1") { self.victim().await? } else { Some(String::new()) };
            if let Some(victim) = victim {
                let seconds = (1 + self.dice.below(4)).to_string();
                let command = ["sh", "-c", script, "sh", &victim, &seconds];
                let output = self.scene.stack.droplet_exec(self.scene.droplet()?, &command).await?;
                // It may have come too late; that is part of the game.
                let how = if output.exit_code == 0 { "" } else { " (in vain)" };
                self.record.write("monkey", &format!("'{victim}' {trick}{how}"));
                *self.played.entry(trick).or_default() += 1;
            }
            tokio::time::sleep(Duration::from_millis(300 + self.dice.below(2500))).await;
        }
        self.scene.on_droplet(&["sh", "-c", TIDY]).await?;
        self.record.write("monkey", "goes home, everything is left to the agent");
        Ok(())
    }

    async fn victim(&mut self) -> Result<Option<String>, Box<dyn Error>> {
        let list = ["docker", "ps", "--all", "--filter", "label=dtma.managed", "--format", "{{.Names}}"];
        let listed = self.scene.stack.droplet_exec(self.scene.droplet()?, &list).await?;
        let mut names: Vec<&str> = listed.stdout.split_whitespace().collect();
        // Docker's own order depends on when each was made.
        names.sort_unstable();
        Ok(self.dice.one_of(&names).map(|name| (*name).to_owned()))
    }
}
