//! Many clients on one shared server, with the ids of their calls the same everywhere, while some hang up and the server dies now and
//! then: no answer may get lost, go to somebody else, or come twice, and no call may be carried out twice.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde::Deserialize;
use serde_json::json;
use stack::Agent;

use super::session::{Outcome, Session};
use crate::chaos::dice::Dice;
use crate::until;

/// From a server's end to the first session with the next one, Docker's and the agent's waits included.
const BACK: Duration = Duration::from_secs(90);

/// How much.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Clients at once.
    pub clients: u64,
    /// Answers each of them has to get.
    pub answers: u64,
    /// How often in a hundred a client hangs up on a call first.
    pub hang_ups: u64,
    /// How often the server is made to crash.
    pub crashes: u64,
    /// What the dice are made from.
    pub seed: u64,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcomes {
    /// Calls that got their right answer, by what was asked.
    answered: BTreeSet<String>,
    /// Calls that were hung up on.
    hung_up: u64,
    /// Calls that were told at once that the server is gone.
    failed: u64,
    /// Sessions that had to be begun anew.
    renewed: u64,
    /// What must not be.
    wrongs: Vec<String>,
    /// Of right answers, microseconds.
    latencies: Vec<u128>,
}

impl fmt::Display for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { answered, hung_up, failed, renewed, wrongs, latencies } = self;
        let mut sorted = latencies.clone();
        sorted.sort_unstable();
        let at = |percent: usize| {
            let micros = sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1)));
            Duration::from_micros(micros.copied().and_then(|it| u64::try_from(it).ok()).unwrap_or_default())
        };
        write!(
            f,
            "{} answered (p50 {:?}, p95 {:?}), {hung_up} hung up on, {failed} failed at once, {renewed} sessions begun anew, {} wrong",
            answered.len(),
            at(50),
            at(95),
            wrongs.len()
        )
    }
}

impl Load {
    /// Loads the server at `path`, which has to be the moody one with a tally.
    ///
    /// # Errors
    /// Everything that was wrong.
    pub async fn run(self, agent: &Agent, path: &str) -> Result<Outcomes, Box<dyn Error>> {
        let progress = Arc::new(AtomicU64::new(0));
        let begun = Instant::now();
        let clients = (0..self.clients).map(|number| {
            let dice = Dice::new(self.seed, &format!("client {number}"));
            let client =
                Client { load: self, number, agent, path, dice, session: None, progress: Arc::clone(&progress) };
            client.ask_all()
        });
        let mut all = Outcomes::default();
        let (outcomes, crashes) = tokio::join!(join_all(clients), self.crash_now_and_then(agent, path, &progress));
        for outcomes in outcomes {
            all.answered.extend(outcomes.answered);
            all.hung_up += outcomes.hung_up;
            all.failed += outcomes.failed;
            all.renewed += outcomes.renewed;
            all.wrongs.extend(outcomes.wrongs);
            all.latencies.extend(outcomes.latencies);
        }
        println!("seed {}: {all} in {:.1} s", self.seed, begun.elapsed().as_secs_f64());
        crashes?;
        let wanted = self.clients * self.answers;
        if u64::try_from(all.answered.len())? != wanted {
            all.wrongs.push(format!("{} answers instead of {wanted}", all.answered.len()));
        }
        self.look_at_tally(agent, path, &mut all).await?;
        if all.wrongs.is_empty() { Ok(all) } else { Err(all.wrongs.join("\n").into()) }
    }

    /// Ends the server whenever so many more answers have come.
    async fn crash_now_and_then(self, agent: &Agent, path: &str, progress: &AtomicU64) -> Result<(), Box<dyn Error>> {
        let wanted = self.clients * self.answers;
        for crash in 1..=self.crashes {
            let due = wanted * crash / (self.crashes + 1);
            until("enough answers for the next crash", Duration::from_secs(600), async || {
                Ok((progress.load(Ordering::Relaxed) >= due).then_some(()))
            })
            .await?;
            let session = reopened(agent, path).await?;
            let outcome = session.call(1, "crash", json!({})).await;
            if !matches!(outcome, Outcome::Failed(..)) {
                return Err(format!("the call that ended the server came to {outcome:?}").into());
            }
        }
        Ok(())
    }

    /// What the server says it has carried out.
    async fn look_at_tally(self, agent: &Agent, path: &str, all: &mut Outcomes) -> Result<(), Box<dyn Error>> {
        #[derive(Deserialize)]
        struct Tally {
            noted: BTreeSet<String>,
            twice: Vec<String>,
        }
        let outcome = reopened(agent, path).await?.call(1, "tally", json!({})).await;
        let tally: Tally = serde_json::from_str(outcome.text().ok_or_else(|| format!("no tally: {outcome:?}"))?)?;
        all.wrongs.extend(tally.twice.iter().map(|text| format!("carried out twice: {text}")));
        let invented =
            all.answered.difference(&tally.noted).map(|text| format!("answered and never carried out: {text}"));
        all.wrongs.extend(invented);
        Ok(())
    }
}

async fn reopened(agent: &Agent, path: &str) -> Result<Session, Box<dyn Error>> {
    until("a session", BACK, async || Session::open(agent, path, json!({})).await.map(Some)).await
}

struct Client<'a> {
    load: Load,
    number: u64,
    agent: &'a Agent,
    path: &'a str,
    dice: Dice,
    session: Option<Session>,
    progress: Arc<AtomicU64>,
}

impl Client<'_> {
    async fn ask_all(mut self) -> Outcomes {
        let mut outcomes = Outcomes::default();
        // The same ids as everybody else's, and never one twice.
        let mut id = 0;
        let mut got = 0;
        while got < self.load.answers && outcomes.wrongs.len() < 5 {
            id += 1;
            let session = match self.session.take() {
                Some(session) => session,
                None => match reopened(self.agent, self.path).await {
                    Ok(session) => session,
                    Err(error) => {
                        outcomes.wrongs.push(format!("client {}: {error}", self.number));
                        return outcomes;
                    }
                },
            };
            let text = format!("client {}, call {id}", self.number);
            if self.dice.percent(self.load.hang_ups) {
                let arguments = json!({ "seconds": 0.03, "text": text });
                let limit = Duration::from_millis(self.dice.below(25));
                if tokio::time::timeout(limit, session.call(id, "slow", arguments)).await.is_err() {
                    outcomes.hung_up += 1;
                }
                self.session = Some(session);
                continue;
            }
            let begun = Instant::now();
            match session.call(id, "echo", json!({ "text": text })).await {
                outcome @ Outcome::Answered { .. } if outcome.text() == Some(&text) => {
                    outcomes.latencies.push(begun.elapsed().as_micros());
                    outcomes.answered.insert(text);
                    self.progress.fetch_add(1, Ordering::Relaxed);
                    got += 1;
                    self.session = Some(session);
                }
                // The server has gone: told at once, and the session with it.
                Outcome::Failed(..) if begun.elapsed() < Duration::from_secs(5) => {
                    outcomes.failed += 1;
                    self.session = Some(session);
                }
                Outcome::Away(404 | 502 | 503, _) => outcomes.renewed += 1,
                wrong => outcomes.wrongs.push(format!("client {}, call {id}: {wrong:?}", self.number)),
            }
        }
        outcomes
    }
}
