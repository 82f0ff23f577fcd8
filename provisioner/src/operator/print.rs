//! A rollout as text.

use crate::rollout::{AgentView, Line, RolloutView};

/// Of the agents that something is to be said of, so many are listed.
const LISTED: usize = 40;

pub(super) fn line(line: &Line) {
    println!("{:.0}  {}", line.at, line.message);
}

/// Where it stands, and how many agents stand how.
pub(super) fn short(rollout: &RolloutView) {
    println!("Rollout {} to {}: {}", rollout.id, rollout.version, rollout.status);
    if let Some(reason) = &rollout.reason {
        println!("  why     {reason}");
    }
    for wave in &rollout.waves {
        let (mark, begun) = match wave.begun_at {
            Some(at) => (if wave.number == rollout.wave { ">" } else { " " }, format!("begun {at:.0}")),
            None => (" ", "not begun".to_owned()),
        };
        let agents = if wave.agents == 1 { "1 agent".to_owned() } else { format!("{} agents", wave.agents) };
        println!("{mark} wave {}  to {:>3} %  {agents:<13} {begun}", wave.number, wave.percent);
    }
    let counts: Vec<String> = rollout.counts.iter().map(|(standing, count)| format!("{count} {standing}")).collect();
    println!("  agents  {}", if counts.is_empty() { "none".to_owned() } else { counts.join(", ") });
}

/// The same, with the agents that something is to be said of, and what has happened.
pub(super) fn long(rollout: &RolloutView) {
    short(rollout);
    agents(rollout);
    for happened in &rollout.history {
        print!("  ");
        line(happened);
    }
}

/// The agents that something is to be said of.
pub(super) fn agents(rollout: &RolloutView) {
    let remarkable = |agent: &&AgentView| !matches!(agent.standing.as_str(), "waiting" | "updated" | "ahead");
    let mut agents: Vec<&AgentView> = rollout.agents.iter().flatten().filter(remarkable).collect();
    let urgency = |agent: &&AgentView| match agent.standing.as_str() {
        "failed" => 0,
        "silent" => 1,
        "pending" => 2,
        _ => 3,
    };
    agents.sort_by_key(|agent| (urgency(agent), agent.wave));
    for agent in agents.iter().take(LISTED) {
        let version = agent.version.as_deref().unwrap_or("?");
        let mut about = Vec::new();
        let outcome = agent.outcome.and_then(|outcome| serde_json::to_value(outcome).ok());
        about.extend(outcome.as_ref().and_then(|outcome| outcome.as_str()).map(ToOwned::to_owned));
        about.extend(agent.code.clone());
        about.extend(agent.reason.clone());
        if agent.forgiven {
            about.push("forgiven".to_owned());
        }
        let about = about.join(": ");
        println!("  {:<9} wave {}  {}  runs {version}  {about}", agent.standing, agent.wave, agent.environment_id);
    }
    if agents.len() > LISTED {
        println!("  … and {} more; --json has them all", agents.len() - LISTED);
    }
}
