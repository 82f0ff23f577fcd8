//! The platform's `agents` table through PostgREST. The only file that knows its URL and headers.

use std::time::Duration;

use async_trait::async_trait;
use dtma_api::AgentId;
use dtma_api::id::AccountId;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use uuid::Uuid;

use super::{Owner, Owners, OwnersError};

const TIMEOUT: Duration = Duration::from_secs(8);

/// A client of one project.
pub struct SupabaseOwners {
    http: reqwest::Client,
    url: String,
    key: SecretString,
}

/// The HTTP client could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("setting up the HTTP client for Supabase")]
pub struct BuildError(#[source] reqwest::Error);

impl SupabaseOwners {
    /// A client for the project at `url`, with the service role's `key`.
    ///
    /// # Errors
    /// When the HTTP client can't be set up.
    pub fn new(url: &str, key: SecretString) -> Result<Self, BuildError> {
        let http = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(BuildError)?;
        Ok(Self { http, url: url.to_owned(), key })
    }
}

#[derive(Deserialize)]
struct Row {
    user_id: Option<String>,
}

#[async_trait]
impl Owners for SupabaseOwners {
    async fn owner(&self, agent: &AgentId) -> Result<Owner, OwnersError> {
        // The column is a uuid: anything else would only be answered with a 400.
        let Ok(id) = Uuid::parse_str(agent.as_str()) else { return Ok(Owner::NoSuchAgent) };
        let url = format!("{}/rest/v1/agents?select=user_id&limit=1&id=eq.{id}", self.url);
        let key = self.key.expose_secret();
        let answer = self.http.get(url).header("apikey", key).bearer_auth(key).send().await;
        let answer = answer.map_err(|error| OwnersError::Unanswered(error.without_url()))?;
        if !answer.status().is_success() {
            return Err(OwnersError::Refused(answer.status().as_u16()));
        }
        let rows: Vec<Row> = answer.json().await.map_err(|error| OwnersError::Unanswered(error.without_url()))?;
        match rows.into_iter().next() {
            None => Ok(Owner::NoSuchAgent),
            Some(Row { user_id: None }) => Ok(Owner::Nobody),
            Some(Row { user_id: Some(user) }) => {
                AccountId::try_from(user).map(Owner::Account).map_err(OwnersError::Unusable)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::extract::RawQuery;
    use axum::http::{HeaderMap, StatusCode};
    use axum::routing::get;

    use super::*;

    const AGENT: &str = "0198c5a4-1111-7222-8333-444455556666";

    async fn asked(status: u16, body: &'static str) -> Result<Owner, OwnersError> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let handler = move |RawQuery(query): RawQuery, headers: HeaderMap| async move {
            assert_eq!(query.unwrap(), format!("select=user_id&limit=1&id=eq.{AGENT}"));
            assert_eq!(headers["apikey"], "service");
            assert_eq!(headers["authorization"], "Bearer service");
            (StatusCode::from_u16(status).unwrap(), body)
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = axum::serve(listener, Router::new().route("/rest/v1/agents", get(handler)));
        let server = tokio::spawn(server.into_future());
        let owners = SupabaseOwners::new(&url, SecretString::from("service".to_owned())).unwrap();
        let owner = owners.owner(&AGENT.parse().unwrap()).await;
        server.abort();
        owner
    }

    #[tokio::test]
    async fn answers_are_told_apart() {
        let user = "6f9619ff-8b86-d011-b42d-00cf4fc964ff";
        let found = asked(200, r#"[{"user_id":"6f9619ff-8b86-d011-b42d-00cf4fc964ff"}]"#).await.unwrap();
        assert_eq!(found, Owner::Account(user.parse().unwrap()));
        assert_eq!(asked(200, "[]").await.unwrap(), Owner::NoSuchAgent);
        assert_eq!(asked(200, r#"[{"user_id":null}]"#).await.unwrap(), Owner::Nobody);
        assert!(matches!(asked(401, r#"{"message":"no"}"#).await, Err(OwnersError::Refused(401))));
        assert!(matches!(asked(500, "").await, Err(OwnersError::Refused(500))));
        assert!(matches!(asked(200, "<html>").await, Err(OwnersError::Unanswered(_))));
        assert!(matches!(asked(200, r#"[{"user_id":"a/b"}]"#).await, Err(OwnersError::Unusable(_))));
    }

    #[tokio::test]
    async fn an_id_that_is_no_uuid_needs_no_question_and_silence_is_an_error() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let owners = SupabaseOwners::new("http://127.0.0.1:1", SecretString::from("service".to_owned())).unwrap();
        assert_eq!(owners.owner(&"agent-1".parse().unwrap()).await.unwrap(), Owner::NoSuchAgent);
        let error = owners.owner(&AGENT.parse().unwrap()).await.unwrap_err();
        assert!(matches!(error, OwnersError::Unanswered(_)), "{error}");
    }
}
