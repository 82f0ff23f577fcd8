//! Secrets from the backend: `POST {base}/fetch-tool-secrets` with the droplet's own token, whoever answers there.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use dtma_api::Token;
use dtma_api::secrets::{SecretsAnswer, SecretsRequest};
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
                // 501: it has none to give, and won't have any a moment later.
                BackendError::Failed { status, .. } => (*status >= 500 && *status != 501) || *status == 429,
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

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, VecDeque};
    use std::net::Ipv4Addr;
    use std::sync::{Arc, Mutex};

    use axum::http::{HeaderMap, StatusCode, header};
    use axum::{Json, Router, routing::post};
    use serde_json::{Value, json};
    use tokio::net::TcpListener;

    use super::*;
    use crate::instance::Provider;

    type Calls = Arc<Mutex<Vec<(String, Value)>>>;

    /// A backend that answers with these in turn, and what it was asked.
    async fn backend(replies: Vec<(u16, Value)>) -> (BackendSecrets, watch::Sender<Option<Access>>, Calls) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (replies, calls) = (Arc::new(Mutex::new(VecDeque::from(replies))), Calls::default());
        let seen = Arc::clone(&calls);
        let answer = move |headers: HeaderMap, Json(body): Json<Value>| {
            let bearer = headers[header::AUTHORIZATION].to_str().unwrap().to_owned();
            seen.lock().unwrap().push((bearer, body));
            let (status, body) = replies.lock().unwrap().pop_front().unwrap();
            std::future::ready((StatusCode::from_u16(status).unwrap(), Json(body)))
        };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let base_url = format!("http://{}/agent/v1", listener.local_addr().unwrap());
        let router = Router::new().route("/agent/v1/fetch-tool-secrets", post(answer));
        tokio::spawn(async move { axum::serve(listener, router).await });
        let client = BackendClient::new(&base_url, Duration::from_secs(5)).unwrap();
        let access = Access { client, bearer: Token::from("own".to_owned()) };
        let (sender, receiver) = watch::channel(Some(access));
        (BackendSecrets(receiver), sender, calls)
    }

    fn wanted(all: bool, providers: &[&str]) -> SecretsWanted {
        SecretsWanted {
            instance: "one".parse().unwrap(),
            account_tool_instance_id: "id-1".parse().unwrap(),
            all,
            providers: providers.iter().map(|text| Provider::try_from((*text).to_owned()).unwrap()).collect(),
        }
    }

    fn names(fetched: &FetchedSecrets) -> BTreeSet<&str> {
        fetched.values.0.keys().map(SecretName::as_str).collect()
    }

    #[tokio::test]
    async fn an_old_backends_answer_and_a_new_ones_are_both_understood() {
        let at = Timestamp::now() + Duration::from_secs(3600);
        let old = json!({ "secrets": { "API_KEY": "a", "NOT_SET": null, "not a name": "b", "GITHUB_TOKEN": "g" } });
        let new =
            json!({ "success": true, "secrets": {}, "oauth": { "github": { "access_token": "g", "expires_at": at } } });
        let (secrets, _access, calls) = backend(vec![(200, old.clone()), (200, old), (200, new)]).await;
        let everything = secrets.fetch(&wanted(true, &[])).await.unwrap();
        assert_eq!(names(&everything), ["API_KEY", "GITHUB_TOKEN"].into());
        let of_github = ["GITHUB_PERSONAL_ACCESS_TOKEN", "GITHUB_TOKEN", "OAUTH_GITHUB_ACCESS_TOKEN"];
        for expires_at in [None, Some(at)] {
            let fetched = secrets.fetch(&wanted(false, &["github"])).await.unwrap();
            assert_eq!(names(&fetched), of_github.into(), "and nothing that wasn't asked for");
            assert_eq!(fetched.expires_at, expires_at);
            assert!(fetched.values.0.keys().all(|name| fetched.values.expose(name) == Some("g")));
        }
        let (bearer, body) = calls.lock().unwrap().last().cloned().unwrap();
        let asked = json!({
            "tool_instance_db_id": "id-1", "accountToolInstanceId": "id-1", "instanceNameOnToolbox": "one",
            "requiredOAuthProviders": ["github"],
        });
        assert_eq!((bearer.as_str(), body), ("Bearer own", asked));
    }

    #[tokio::test]
    async fn what_is_missing_or_of_no_use_is_said_without_a_value() {
        let past = Timestamp::now() - Duration::from_secs(1);
        let cases = [
            (200, json!({ "secrets": { "A": "hunter2" } }), "no access token of github"),
            (200, json!({ "oauth": { "github": { "access_token": "hunter2", "expires_at": past } } }), "have expired"),
            (200, json!({ "oauth": { "github": { "access_token": "hunter2\u{0}" } } }), "without NUL"),
            (200, json!({ "secrets": ["hunter2"] }), "was not understood"),
            (403, json!({ "success": false, "code": "not_yours", "error": "not yours" }), "not yours"),
            (501, json!({ "success": false, "code": "no_secrets", "error": "has no secrets" }), "has no secrets"),
            (404, json!({ "success": false, "code": "unknown", "error": "never heard of it" }), "never heard of it"),
        ];
        let replies = cases.iter().map(|(status, body, _)| (*status, body.clone())).collect();
        let (secrets, _access, calls) = backend(replies).await;
        for (number, (_, _, expected)) in cases.iter().enumerate() {
            let error = secrets.fetch(&wanted(false, &["github"])).await.unwrap_err();
            assert!(error.reason.contains(expected), "{error}");
            assert!(!format!("{error:?}").contains("hunter2"), "{error}");
            assert_eq!(calls.lock().unwrap().len(), number + 1, "it is not asked again");
        }
    }

    #[tokio::test]
    async fn a_backend_that_fails_is_asked_again_with_the_token_of_that_moment() {
        let failed = (503, json!({ "success": false, "code": "down", "error": "down" }));
        let good = (200, json!({ "secrets": { "A": "1" } }));
        let (secrets, _access, calls) =
            backend(vec![failed.clone(), failed.clone(), good, failed.clone(), failed.clone(), failed]).await;
        assert_eq!(names(&secrets.fetch(&wanted(true, &[])).await.unwrap()), ["A"].into());
        assert_eq!(calls.lock().unwrap().len(), 3);
        assert!(secrets.fetch(&wanted(true, &[])).await.unwrap_err().reason.contains("down"));
        assert_eq!(calls.lock().unwrap().len(), 6, "and no more");
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_without_backend_says_so_and_one_that_is_still_enrolling_too() {
        let (sender, receiver) = watch::channel(None);
        let secrets = BackendSecrets(receiver);
        let error = secrets.fetch(&wanted(true, &[])).await.unwrap_err();
        assert!(error.reason.contains("no token of its own yet"), "{error}");
        drop(sender);
        let error = secrets.fetch(&wanted(true, &[])).await.unwrap_err();
        assert!(error.reason.contains("OFFLINE_MODE"), "{error}");
    }
}
