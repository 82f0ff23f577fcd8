//! Secrets from the backend: `POST {base}/fetch-tool-secrets` with the droplet's own token, whoever answers there.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use dtma_api::secrets::{SecretsAnswer, SecretsRequest};
use dtma_api::Token;
use jiff::Timestamp;
use secrecy::SecretString;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::client::{BackendClient, BackendError};
use super::pace::{backoff, chance};
use crate::instance::{SecretName, SecretValues};
use crate::reconcile::{FetchedSecrets, NoSecrets, SecretSource, SecretsWanted};

/// How often a backend that gives no answer, or fails, is asked; whoever needs the secrets tries again later.
const ATTEMPTS: u32 = 3;
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// How long a fetch waits for an agent that has just started to have its token.
const LINKING: Duration = Duration::from_secs(10);

/// Whom to ask, and as whom.
#[derive(Debug, Clone)]
pub(super) struct Access {
    pub(super) client: BackendClient,
    pub(super) bearer: Token,
}

/// The backend as a source of secrets. Follows the link: it can be asked as soon as the agent has a token of its own.
#[derive(Debug, Clone)]
pub struct BackendSecrets(pub(super) watch::Receiver<Option<Access>>);

impl BackendSecrets {
    async fn access(&self) -> Result<Access, NoSecrets> {
        let mut access = self.0.clone();
        let linked = timeout(LINKING, access.wait_for(Option::is_some)).await;
        match linked.map(|linked| linked.map(|linked| linked.clone())) {
            Ok(Ok(Some(access))) => Ok(access),
            // The link has ended, which only one does that never was to be.
            Ok(Err(_)) => Err(no("this agent reports to no backend (OFFLINE_MODE)")),
            Ok(Ok(None)) | Err(_) => Err(no("the agent has no token of its own yet; GET /ready says why")),
        }
    }
}

fn no(reason: impl Into<String>) -> NoSecrets {
    NoSecrets { reason: reason.into() }
}

#[async_trait]
impl SecretSource for BackendSecrets {
    async fn fetch(&self, wanted: &SecretsWanted) -> Result<FetchedSecrets, NoSecrets> {
        let request = SecretsRequest {
            tool_instance_db_id: wanted.account_tool_instance_id.clone(),
            account_tool_instance_id: wanted.account_tool_instance_id.clone(),
            instance_name_on_toolbox: wanted.instance.clone(),
            required_oauth_providers: wanted.providers.iter().map(|provider| provider.as_str().to_owned()).collect(),
        };
        let mut attempt = 1;
        loop {
            // Each time anew: the token may have been replaced.
            let Access { client, bearer } = self.access().await?;
            let error = match client.fetch_secrets(&bearer, &request).await {
                Ok(answer) => return sorted(answer, wanted),
                Err(error) => error,
            };
            let again = match &error {
                BackendError::NoAnswer { .. } => true,
                BackendError::Failed { status, .. } => *status >= 500 || *status == 429,
                BackendError::Client { .. }
                | BackendError::TokenRefused { .. }
                | BackendError::NotUnderstood { .. } => false,
            };
            if !again || attempt >= ATTEMPTS {
                // Its causes are in the log: they may name what only an operator is to know.
                tracing::warn!(instance = %wanted.instance, error = &error as &dyn std::error::Error, "no secrets");
                return Err(no(error.to_string()));
            }
            sleep(backoff(attempt, FIRST_WAIT, LONGEST_WAIT, chance())).await;
            attempt += 1;
        }
    }
}

/// What of an answer is wanted, under the names servers look for.
fn sorted(answer: SecretsAnswer, wanted: &SecretsWanted) -> Result<FetchedSecrets, NoSecrets> {
    let SecretsAnswer { secrets, expires_at, mut oauth } = answer;
    let mut all: BTreeMap<SecretName, (Token, Option<Timestamp>)> = BTreeMap::new();
    for (text, value) in secrets {
        let Some(value) = value else { continue };
        match text.parse::<SecretName>() {
            Ok(name) => drop(all.insert(name, (value, expires_at.get(&text).copied()))),
            // What the answer calls it is as little to be trusted as the value.
            Err(_) => tracing::warn!(instance = %wanted.instance, "the backend gave a secret whose name isn't one"),
        }
    }
    let mut taken = if wanted.all { all.clone() } else { BTreeMap::new() };
    for provider in &wanted.providers {
        let names = provider.names();
        let own = oauth.remove(provider.as_str()).map(|token| (token.access_token, token.expires_at));
        let token = own.or_else(|| names.iter().find_map(|name| all.get(name).cloned()));
        let token = token.ok_or_else(|| no(format!("the backend has no access token of {provider}")))?;
        for name in names {
            taken.entry(name).or_insert_with(|| token.clone());
        }
    }
    let mut values = SecretValues::default();
    let mut first: Option<Timestamp> = None;
    for (name, (value, expires)) in taken {
        if let Some(problem) = SecretValues::problem(value.expose()) {
            return Err(no(format!("the backend's value of {name} {problem}")));
        }
        first = [first, expires].into_iter().flatten().min();
        values.0.insert(name, SecretString::from(value.expose().to_owned()));
    }
    if first.is_some_and(|at| at <= Timestamp::now()) {
        return Err(no("the backend gave secrets that have expired"));
    }
    Ok(FetchedSecrets { values, expires_at: first })
}
