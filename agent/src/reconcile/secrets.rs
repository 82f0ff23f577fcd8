//! Instances' secrets: there before a server starts, fetched again before they expire, gone with the version they belong to.
//!
//! Decisions. Values are in the [`Vault`] and nowhere else; the agent itself keeps none, so its restart loses none. Work looks whether
//! they are there before it changes anything, and fetches what is missing: a version that can't have them fails like one without an
//! image, the instance says `needs_secrets`, and it is tried again. After a reboot Docker can't start a container whose folder is gone
//! (it is mounted as something that has to be there), so the agent always comes first. What is fetched is written at the desk, where
//! it is known whether the version is still wanted. Secrets that can't be fetched again stay as they are; their server may still have
//! use for them, and a person is told.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use dtma_api::secrets::Refreshed;
use dtma_api::{AccountToolInstanceId, InstanceName};
use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Timing;
use super::apply::retry_pause;
use super::desk::{Desk, Shared};
use super::handle::{Instances, Rejection};
use super::plan::{Goal, Nudge, Step};
use super::work::{Stop, Work};
use crate::instance::{
    DeploymentId, Failure, FailureKind, Intent, Provider, SecretForm, SecretName, SecretSources, SecretValues, State,
    fetched_again_after,
};
use crate::store::ledger::{Contents, StrangeEntry, Version};
use crate::store::vault::{Vault, VaultError, Written};

/// How many instances' secrets are fetched side by side.
const SIDE_BY_SIDE: usize = 4;
/// Shortest time between two fetches, whatever is said about when something expires.
const SHORTEST_PAUSE: Duration = Duration::from_secs(10);

/// Who has secrets that don't come with a deploy.
#[async_trait]
pub trait SecretSource: Send + Sync + 'static {
    /// Asks for them. It ends by itself, within a minute or so, whatever the other side does.
    ///
    /// # Errors
    /// When not all that is wanted can be had.
    async fn fetch(&self, wanted: &SecretsWanted) -> Result<FetchedSecrets, NoSecrets>;
}

/// Which secrets are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretsWanted {
    /// Whose.
    pub instance: InstanceName,
    /// The backend's id of it.
    pub account_tool_instance_id: AccountToolInstanceId,
    /// All that there are, not only the providers' tokens.
    pub all: bool,
    /// Whose access tokens have to be among them, under all of [`Provider::names`].
    pub providers: BTreeSet<Provider>,
}

/// Secrets that were fetched.
#[derive(Debug, Clone)]
pub struct FetchedSecrets {
    /// By name.
    pub values: SecretValues,
    /// When the first of them is of no use any more.
    pub expires_at: Option<Timestamp>,
}

/// Why secrets can't be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct NoSecrets {
    /// For a person; nothing of a value.
    pub reason: String,
}

/// What the loop is given for secrets.
pub struct Secrets {
    /// Where values are kept.
    pub vault: Vault,
    /// Who has those that don't come with a deploy.
    pub source: Arc<dyn SecretSource>,
}

/// The loop's side of it.
pub(super) struct Keeper {
    vault: Vault,
    source: Arc<dyn SecretSource>,
    accounts: Mutex<HashMap<DeploymentId, Account>>,
    /// Rung when something is due at another time than before.
    rung: Notify,
}

/// What is known of one version's secrets, and may be forgotten: what matters is in the vault.
#[derive(Debug, Clone, Default)]
struct Account {
    /// When they are fetched again.
    due: Option<Instant>,
    /// Attempts that failed since the last that didn't.
    failures: u32,
    problem: Option<String>,
    /// So that an older answer never replaces a newer one.
    alone: Arc<tokio::sync::Mutex<()>>,
}

impl Keeper {
    pub(super) fn new(secrets: Secrets) -> Self {
        let Secrets { vault, source } = secrets;
        Self { vault, source, accounts: Mutex::new(HashMap::new()), rung: Notify::new() }
    }

    pub(super) fn vault(&self) -> &Vault {
        &self.vault
    }

    fn accounts(&self) -> MutexGuard<'_, HashMap<DeploymentId, Account>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the last attempt to fetch them failed, while that is so.
    pub(super) fn problem(&self, deployment: &DeploymentId) -> Option<String> {
        self.accounts().get(deployment).and_then(|account| account.problem.clone())
    }

    /// Removes what belongs to no version any more.
    pub(super) fn sweep(&self, contents: &Contents) {
        let versions = contents.entries.values().flat_map(|entry| [Some(entry.present()), entry.next()]).flatten();
        let strange = contents.strange.values().flat_map(StrangeEntry::deployments);
        let wanted: BTreeSet<uuid::Uuid> = versions.map(|version| version.deployment.0).chain(strange).collect();
        self.accounts().retain(|deployment, _| wanted.contains(&deployment.0));
        if let Err(error) = self.vault.keep(|deployment| wanted.contains(&deployment.0)) {
            tracing::error!(error = &error as &dyn std::error::Error, "secrets nobody needs could not be removed");
        }
    }

    /// When a version's secrets are to be fetched again; never by itself when they don't expire, or have yet to be fetched for its start.
    fn due(&self, version: Version<'_>) -> Option<Instant> {
        if let Some(due) = self.accounts().get(&version.deployment).and_then(|account| account.due) {
            return Some(due);
        }
        // After the agent's own restart the vault knows.
        let fetched = self.vault.held(&version.deployment).ok().flatten()?.fetched?;
        let age = Duration::try_from(Timestamp::now().duration_since(fetched.at)).unwrap_or_default();
        let due = fetched.expires_at.map(|at| Instant::now() + fetched_again_after(fetched.at, at).saturating_sub(age));
        self.accounts().entry(version.deployment).or_default().due = due;
        due
    }

    /// What a version lacks that came with its deploy, and whether it lacks something that can be fetched.
    fn lacks(&self, version: Version<'_>, now: Timestamp) -> Result<(BTreeSet<SecretName>, bool), VaultError> {
        let SecretSources { given, providers, .. } = &version.spec.secrets;
        let held = self.vault.held(&version.deployment)?.unwrap_or_default();
        let missing = given.difference(&held.names).cloned().collect();
        let fresh = held.fetched.is_some_and(|fetched| {
            let tokens = providers.iter().flat_map(Provider::names);
            fetched.expires_at.is_none_or(|at| at > now) && tokens.into_iter().all(|name| held.names.contains(&name))
        });
        Ok((missing, version.spec.secrets.is_fetched() && !fresh))
    }
}

/// What a fetch brought.
struct Applied {
    names: BTreeSet<SecretName>,
    expires_at: Option<Timestamp>,
    written: Written,
    restarting: bool,
}

fn unavailable(message: String) -> Failure {
    Failure::new(FailureKind::SecretsUnavailable, message)
}

fn not_kept(error: &VaultError) -> Failure {
    tracing::error!(error = error as &dyn std::error::Error, "secrets could not be kept");
    unavailable(error.to_string())
}

impl Shared {
    /// Fetches a version's secrets and keeps them. `serves`: its server may be running with those from before.
    async fn fetch_secrets(
        self: &Arc<Self>,
        version: Version<'_>,
        serves: bool,
        timing: &Timing,
    ) -> Result<Applied, Failure> {
        let (deployment, sources) = (version.deployment, version.spec.secrets.clone());
        let alone = Arc::clone(&self.secrets.accounts().entry(deployment).or_default().alone);
        let _alone = alone.lock().await;
        let result = self.fetch_and_keep(version, &sources, serves).await;
        let mut accounts = self.secrets.accounts();
        let account = accounts.entry(deployment).or_default();
        match &result {
            Ok(applied) => {
                let wait = applied.expires_at.map(|at| fetched_again_after(Timestamp::now(), at).max(SHORTEST_PAUSE));
                *account = Account {
                    due: wait.map(|wait| Instant::now() + wait),
                    alone: Arc::clone(&alone),
                    ..Account::default()
                };
            }
            Err(failure) => {
                // What never was there is fetched by the work that needs it.
                let pause = retry_pause(timing, account.failures);
                let due = (serves || account.due.is_some()).then(|| Instant::now() + pause);
                account.due = due;
                account.failures = account.failures.saturating_add(1);
                account.problem = Some(failure.message.clone());
            }
        }
        drop(accounts);
        self.secrets.rung.notify_one();
        result
    }

    async fn fetch_and_keep(
        self: &Arc<Self>,
        version: Version<'_>,
        sources: &SecretSources,
        serves: bool,
    ) -> Result<Applied, Failure> {
        let spec = version.spec;
        let wanted = SecretsWanted {
            instance: spec.name.clone(),
            account_tool_instance_id: spec.account_tool_instance_id.clone(),
            all: sources.from_backend,
            providers: sources.providers.clone(),
        };
        let fetched = self.secrets.source.fetch(&wanted).await;
        let FetchedSecrets { values, expires_at } =
            fetched.map_err(|error| unavailable(format!("its secrets could not be fetched: {error}")))?;
        let names: BTreeSet<SecretName> = values.0.keys().cloned().collect();
        let (name, deployment, sources) = (spec.name.clone(), version.deployment, sources.clone());
        let shared = Arc::clone(self);
        let kept = self.change(move |desk| {
            let wanted = desk.contents().entries.get(&name).is_some_and(|entry| {
                [Some(entry.present()), entry.next()].into_iter().flatten().any(|other| other.deployment == deployment)
            });
            if !wanted {
                return Ok(None);
            }
            let vault = shared.secrets.vault();
            let written = vault.give_fetched(&deployment, &sources.given, &values, Timestamp::now(), expires_at)?;
            // A folder that had gone is not the one its container has.
            // Nor is the version that takes over meanwhile to be restarted for it.
            let replaced = desk
                .contents()
                .entries
                .get(&name)
                .is_some_and(|entry| entry.next().is_some_and(|next| next.deployment != deployment));
            let restarting =
                serves && !replaced && (written.made || (written.changed && sources.form == SecretForm::Environment));
            if restarting {
                desk.nudge(&name, Nudge::Restart);
            }
            Ok(Some((written, restarting)))
        });
        match kept.await {
            Ok(Ok(Some((written, restarting)))) => Ok(Applied { names, expires_at, written, restarting }),
            Ok(Ok(None)) => Err(unavailable("it was changed or removed meanwhile".to_owned())),
            Ok(Err(error)) => Err(not_kept(&error)),
            Err(error) => Err(unavailable(error.to_string())),
        }
    }
}

impl Work {
    /// Sees that the version's secrets are there, before anything is done that ends in a start.
    pub(super) async fn have_secrets(&self) -> Result<(), Stop> {
        let version = self.version();
        let starts = |step: &Step| matches!(step, Step::Create | Step::Start | Step::Restart);
        if version.spec.secrets.is_none() || !self.job.steps.iter().any(starts) {
            return Ok(());
        }
        let lacks = self.shared.secrets.lacks(version, Timestamp::now());
        let (missing, fetch) = lacks.map_err(|error| Stop::Failed(not_kept(&error)))?;
        if !missing.is_empty() {
            let names: Vec<&str> = missing.iter().map(SecretName::as_str).collect();
            let name = self.name();
            let message = format!(
                "the values of {} are gone: they came with the deploy, are kept in memory only, and were lost when the droplet was \
                 restarted; repeat the deploy with the same body, secrets included, or PUT /tools/{name} with secretsFrom",
                names.join(", ")
            );
            return Err(Stop::Failed(Failure::new(FailureKind::NeedsSecrets, message)));
        }
        // One that hangs is started anew with those it has; they are fetched again beside it.
        if !fetch || self.job.goal == Goal::Revived {
            // An instance that was stopped has been left out of what is fetched again.
            self.shared.secrets.rung.notify_one();
            return Ok(());
        }
        self.enter(State::Creating, "fetching_secrets", "fetching its secrets");
        let fetched = tokio::select! {
            fetched = self.shared.fetch_secrets(version, false, &self.timing) => fetched,
            () = self.cancel.cancelled() => return Err(Stop::LookAgain),
        };
        fetched.map(drop).map_err(Stop::Failed)
    }
}

/// Fetches again what is about to expire, for as long as the loop runs.
pub(super) async fn watch(shared: Arc<Shared>, timing: Timing) {
    loop {
        let contents = shared.desk().await.contents().clone();
        let now = Instant::now();
        let mut late = Vec::new();
        let mut next: Option<Instant> = None;
        for entry in contents.entries.values().filter(|entry| entry.intent == Intent::Run) {
            // One that is being tried serves soon.
            for version in [Some(entry.present()), entry.next()].into_iter().flatten() {
                let due = Some(version).filter(|version| version.spec.secrets.is_fetched());
                match due.and_then(|version| shared.secrets.due(version)) {
                    Some(at) if at <= now => late.push(again(&shared, version, timing)),
                    Some(at) => next = Some(next.map_or(at, |next| next.min(at))),
                    None => {}
                }
            }
        }
        if !late.is_empty() {
            stream::iter(late).buffer_unordered(SIDE_BY_SIDE).for_each(|()| std::future::ready(())).await;
            continue;
        }
        // What an instance that comes needs is fetched by its work, which rings.
        let sleep = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = sleep => {}
            () = shared.secrets.rung.notified() => {}
        }
    }
}

async fn again(shared: &Arc<Shared>, version: Version<'_>, timing: Timing) {
    let name = &version.spec.name;
    match shared.fetch_secrets(version, true, &timing).await {
        Ok(applied) => told(shared, name, &applied),
        Err(failure) => {
            tracing::warn!(instance = %name, problem = failure.message, "secrets were not fetched again");
            let message = format!("{}; those it has stay, and it is tried again", failure.message);
            shared.journal.write(name, "secrets_refresh_failed", message);
            // So that its health says so.
            shared.wake.notify_one();
        }
    }
}

fn told(shared: &Shared, name: &InstanceName, applied: &Applied) {
    let message = match (applied.written.changed, applied.restarting) {
        (_, true) => "its secrets were fetched again, and its server is started anew to take them",
        (true, false) => "its secrets were fetched again; the files have the new values",
        (false, false) => "its secrets were fetched again, and are the same as before",
    };
    shared.journal.write(name, "secrets_refreshed", message);
}

impl Instances {
    /// Fetches the instance's secrets again and applies them; an instance that waited for them is started.
    ///
    /// # Errors
    /// When it has none to fetch, or they can't be had; those it has stay then.
    pub async fn refresh_secrets(&self, name: &InstanceName) -> Result<Refreshed, Rejection> {
        self.looked().await;
        let entry = self.shared.desk().await.contents().entries.get(name).cloned();
        let entry = entry.ok_or_else(|| Rejection::NotFound(name.clone()))?;
        if matches!(entry.intent, Intent::Remove(_)) {
            return Err(Rejection::BeingRemoved(name.clone()));
        }
        if !entry.spec.secrets.is_fetched() {
            return Err(Rejection::NothingToFetch(name.clone()));
        }
        let state = self.snapshot().known.get(name).map(|known| known.state.clone());
        let waits = matches!(&state, Some(State::Failed { failure, .. }) if failure.lacks_secrets());
        let serves = entry.intent == Intent::Run && !waits;
        let fetched = self.shared.fetch_secrets(entry.present(), serves, &Timing::default()).await;
        let applied = fetched.map_err(Rejection::Failed)?;
        told(&self.shared, name, &applied);
        if waits {
            let waiting = name.clone();
            let started = self.shared.change(move |desk: &mut Desk| desk.nudge(&waiting, Nudge::Restart)).await;
            started.map_err(Rejection::Ledger)?;
        }
        Ok(Refreshed {
            instance_name_on_toolbox: name.clone(),
            secrets: applied.names.into_iter().map(String::from).collect(),
            changed: applied.written.changed,
            restarting: applied.restarting || waits,
            expires_at: applied.expires_at,
        })
    }
}
