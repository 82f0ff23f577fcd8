//! SQLite. The only place that names sqlx.
//!
//! One connection writes, with `synchronous=FULL`: an intent that isn't on disk when the cloud is asked is no intent. A few others
//! read; WAL lets them do so while the writer writes.

mod migrations;
mod rollouts;
mod writing;

use std::any::Any;
use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use dtma_api::environment::{EnvironmentEvent, EnvironmentStatus};
use dtma_api::id::AccountId;
use dtma_api::{AgentId, EnvironmentId, TokenHash};
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{QueryBuilder, Row, Sqlite, SqliteConnection};

use self::writing::Writing;
use super::{Binding, InsertError, ReplaceError, Store, StoreError, StoredHeartbeat};
use crate::environment::{DropletSpec, Environment};

const READERS: u32 = 4;
/// How long a write waits for another process' lock, and how long it waits for its turn.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
const TURN_TIMEOUT: Duration = Duration::from_secs(10);
const COLUMNS: &str = "id, account_id, generation, run, region, size, image, created_at, updated_at, state";

/// A database file.
pub struct SqliteStore {
    writer: SqlitePool,
    readers: SqlitePool,
}

impl SqliteStore {
    /// Opens the file `url` (`sqlite:PATH`) names, makes it when missing, and brings its tables up to date.
    ///
    /// # Errors
    /// When it can't be opened or migrated.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::from_str(url)
            .map_err(failed("reading DATABASE_URL"))?
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        let writer = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(TURN_TIMEOUT)
            .connect_with(options.clone())
            .await
            .map_err(failed("opening the file"))?;
        migrations::all().run(&writer).await.map_err(failed("migrating"))?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(TURN_TIMEOUT)
            .connect_with(options.pragma("query_only", "1"))
            .await
            .map_err(failed("opening the file for reading"))?;
        Ok(Self { writer, readers })
    }

    /// Writes everything back and closes the file.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn insert(&self, environment: &Environment, event: &EnvironmentEvent) -> Result<(), InsertError> {
        let operation = "adding an environment";
        let row = Columns::of(environment)?;
        let mut writing = Writing::begin(&self.writer).await.map_err(failed(operation))?;
        let added = sqlx::query(
            "INSERT INTO environments (id, account_id, generation, run, region, size, image, created_at, updated_at, status, settled, \
             enrolment_token_hash, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(environment.id.to_string())
        .bind(environment.account.as_str())
        .bind(row.generation)
        .bind(environment.run)
        .bind(&environment.spec.region)
        .bind(&environment.spec.size)
        .bind(&environment.spec.image)
        .bind(environment.created_at.to_string())
        .bind(environment.updated_at.to_string())
        .bind(row.status)
        .bind(row.settled)
        .bind(row.token_hash)
        .bind(row.state)
        .execute(writing.connection())
        .await;
        match added {
            Ok(_) => {}
            Err(sqlx::Error::Database(error)) if error.is_unique_violation() => {
                writing.undo().await.map_err(failed(operation))?;
                return Err(InsertError::AccountTaken);
            }
            Err(error) => return Err(failed(operation)(error).into()),
        }
        add_event(writing.connection(), environment, event).await?;
        writing.commit().await.map_err(failed(operation))?;
        Ok(())
    }

    async fn replace(&self, environment: &Environment, event: Option<&EnvironmentEvent>) -> Result<(), ReplaceError> {
        let operation = "changing an environment";
        let row = Columns::of(environment)?;
        let mut writing = Writing::begin(&self.writer).await.map_err(failed(operation))?;
        let replaced = sqlx::query(
            "UPDATE environments SET generation = ?, run = ?, region = ?, size = ?, image = ?, updated_at = ?, status = ?, \
             settled = ?, enrolment_token_hash = ?, state = ? WHERE id = ? AND generation = ?",
        )
        .bind(row.generation)
        .bind(environment.run)
        .bind(&environment.spec.region)
        .bind(&environment.spec.size)
        .bind(&environment.spec.image)
        .bind(environment.updated_at.to_string())
        .bind(row.status)
        .bind(row.settled)
        .bind(row.token_hash)
        .bind(row.state)
        .bind(environment.id.to_string())
        .bind(row.generation - 1)
        .execute(writing.connection())
        .await
        .map_err(failed(operation))?;
        if replaced.rows_affected() == 0 {
            writing.undo().await.map_err(failed(operation))?;
            return Err(ReplaceError::Changed);
        }
        if let Some(event) = event {
            add_event(writing.connection(), environment, event).await?;
        }
        writing.commit().await.map_err(failed(operation))?;
        Ok(())
    }

    async fn environment(&self, id: EnvironmentId) -> Result<Option<Environment>, StoreError> {
        let mut query = select();
        query.push(" WHERE id = ").push_bind(id.to_string());
        self.one("reading an environment", query).await
    }

    async fn of_account(&self, account: &AccountId) -> Result<Option<Environment>, StoreError> {
        let mut query = select();
        query.push(" WHERE account_id = ").push_bind(account.as_str().to_owned());
        query.push(" ORDER BY status = 'deprovisioned', id DESC LIMIT 1");
        self.one("reading an account's environment", query).await
    }

    async fn by_enrolment_token(&self, hash: TokenHash) -> Result<Option<Environment>, StoreError> {
        let mut query = select();
        query.push(" WHERE enrolment_token_hash = ").push_bind(hash.as_bytes().to_vec());
        self.one("finding an enrolment token", query).await
    }

    async fn unsettled(&self) -> Result<Vec<Environment>, StoreError> {
        let mut query = select();
        query.push(" WHERE settled = 0 ORDER BY id");
        self.many("reading what is in flight", query).await
    }

    async fn live(&self) -> Result<Vec<Environment>, StoreError> {
        let mut query = select();
        query.push(" WHERE status <> 'deprovisioned' ORDER BY id");
        self.many("reading the fleet", query).await
    }

    async fn page(
        &self,
        statuses: &[EnvironmentStatus],
        after: Option<EnvironmentId>,
        limit: u32,
    ) -> Result<Vec<Environment>, StoreError> {
        let mut query = select();
        query.push(" WHERE id > ").push_bind(after.map(|id| id.to_string()).unwrap_or_default());
        if !statuses.is_empty() {
            query.push(" AND status IN (");
            let mut list = query.separated(", ");
            for status in statuses {
                list.push_bind(status.as_str());
            }
            query.push(")");
        }
        query.push(" ORDER BY id LIMIT ").push_bind(limit);
        self.many("reading a page of environments", query).await
    }

    async fn counts(&self) -> Result<BTreeMap<String, u64>, StoreError> {
        let operation = "counting environments";
        let rows = sqlx::query("SELECT status, count(*) FROM environments GROUP BY status")
            .fetch_all(&self.readers)
            .await
            .map_err(failed(operation))?;
        rows.iter()
            .map(|row| Ok((row.try_get(0)?, row.try_get::<u32, _>(1)?.into())))
            .collect::<Result<_, _>>()
            .map_err(|error: sqlx::Error| failed(operation)(error))
    }

    async fn events(
        &self,
        id: EnvironmentId,
        run: u32,
        after: i64,
    ) -> Result<Vec<(i64, EnvironmentEvent)>, StoreError> {
        let operation = "reading events";
        let rows = sqlx::query(
            "SELECT sequence, at, status, phase, message FROM environment_events \
             WHERE environment_id = ? AND run = ? AND sequence > ? ORDER BY sequence LIMIT 1000",
        )
        .bind(id.to_string())
        .bind(run)
        .bind(after)
        .fetch_all(&self.readers)
        .await
        .map_err(failed(operation))?;
        rows.iter().map(read_event).collect::<Result<_, _>>().map_err(unreadable(operation))
    }

    async fn forget_events(&self, before: Timestamp) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM environment_events WHERE at < ?")
            .bind(before.to_string())
            .execute(&self.writer)
            .await
            .map(drop)
            .map_err(failed("forgetting old events"))
    }

    async fn binding(&self, agent: &AgentId) -> Result<Option<Binding>, StoreError> {
        let operation = "reading an agent's account";
        let row = sqlx::query("SELECT account_id, owner_known FROM agents WHERE agent_id = ?")
            .bind(agent.as_str())
            .fetch_optional(&self.readers)
            .await
            .map_err(failed(operation))?;
        row.map(|row| {
            let account: String = row.try_get("account_id")?;
            Ok(Binding { account: AccountId::try_from(account)?, owner_known: row.try_get("owner_known")? })
        })
        .transpose()
        .map_err(unreadable(operation))
    }

    async fn bind(&self, agent: &AgentId, binding: &Binding, now: Timestamp) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO agents (agent_id, account_id, owner_known, bound_at) VALUES (?, ?, ?, ?) ON CONFLICT (agent_id) DO \
             UPDATE SET account_id = excluded.account_id, owner_known = excluded.owner_known, bound_at = excluded.bound_at",
        )
        .bind(agent.as_str())
        .bind(binding.account.as_str())
        .bind(binding.owner_known)
        .bind(now.to_string())
        .execute(&self.writer)
        .await
        .map(drop)
        .map_err(failed("writing an agent's account"))
    }

    async fn keep_heartbeats(&self, heartbeats: &[StoredHeartbeat]) -> Result<(), StoreError> {
        let operation = "keeping heartbeats";
        let mut writing = Writing::begin(&self.writer).await.map_err(failed(operation))?;
        for heartbeat in heartbeats {
            sqlx::query(
                "INSERT INTO heartbeats (environment_id, received_at, payload) VALUES (?, ?, ?) ON CONFLICT (environment_id) \
                 DO UPDATE SET received_at = excluded.received_at, payload = excluded.payload",
            )
            .bind(heartbeat.environment.to_string())
            .bind(heartbeat.received_at.to_string())
            .bind(&heartbeat.payload)
            .execute(writing.connection())
            .await
            .map_err(failed(operation))?;
        }
        writing.commit().await.map_err(failed(operation))
    }

    async fn heartbeat(&self, id: EnvironmentId) -> Result<Option<StoredHeartbeat>, StoreError> {
        let operation = "reading a heartbeat";
        let row = sqlx::query("SELECT received_at, payload FROM heartbeats WHERE environment_id = ?")
            .bind(id.to_string())
            .fetch_optional(&self.readers)
            .await
            .map_err(failed(operation))?;
        row.map(|row| {
            let received_at = parsed(&row, "received_at")?;
            Ok(StoredHeartbeat { environment: id, received_at, payload: row.try_get("payload")? })
        })
        .transpose()
        .map_err(unreadable(operation))
    }

    async fn settings_generation(&self, content: &str) -> Result<u64, StoreError> {
        let operation = "numbering the agents' settings";
        let generation: i64 = sqlx::query_scalar(
            "INSERT INTO agent_settings (only_row, generation, content) VALUES (1, 1, ?) ON CONFLICT (only_row) DO UPDATE SET \
             generation = generation + (content <> excluded.content), content = excluded.content RETURNING generation",
        )
        .bind(content)
        .fetch_one(&self.writer)
        .await
        .map_err(failed(operation))?;
        u64::try_from(generation).map_err(failed(operation))
    }

    async fn check(&self) -> Result<(), StoreError> {
        let operation = "checking that it can be written to";
        Writing::begin(&self.writer).await.map_err(failed(operation))?.undo().await.map_err(failed(operation))
    }
}

impl SqliteStore {
    async fn one(
        &self,
        operation: &'static str,
        mut query: QueryBuilder<Sqlite>,
    ) -> Result<Option<Environment>, StoreError> {
        let row = query.build().fetch_optional(&self.readers).await.map_err(failed(operation))?;
        row.as_ref().map(read_environment).transpose().map_err(unreadable(operation))
    }

    async fn many(
        &self,
        operation: &'static str,
        mut query: QueryBuilder<Sqlite>,
    ) -> Result<Vec<Environment>, StoreError> {
        let rows = query.build().fetch_all(&self.readers).await.map_err(failed(operation))?;
        rows.iter().map(read_environment).collect::<Result<_, _>>().map_err(unreadable(operation))
    }
}

type Unreadable = Box<dyn std::error::Error + Send + Sync>;

/// What an environment's row holds besides what is bound as it is.
struct Columns {
    generation: i64,
    status: &'static str,
    settled: bool,
    token_hash: Option<Vec<u8>>,
    state: String,
}

impl Columns {
    fn of(environment: &Environment) -> Result<Self, StoreError> {
        let operation = "writing an environment's state";
        Ok(Self {
            generation: i64::try_from(environment.generation).map_err(failed(operation))?,
            status: environment.state.status().as_str(),
            settled: environment.state.settled(),
            token_hash: environment.state.attempt().map(|attempt| attempt.token_hash.as_bytes().to_vec()),
            state: serde_json::to_string(&environment.state).map_err(failed(operation))?,
        })
    }
}

async fn add_event(
    connection: &mut SqliteConnection,
    environment: &Environment,
    event: &EnvironmentEvent,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO environment_events (environment_id, run, at, status, phase, message) VALUES (?, ?, ?, ?, ?, ?)",
    )
    .bind(environment.id.to_string())
    .bind(environment.run)
    .bind(event.at.to_string())
    .bind(event.status.as_str())
    .bind(event.phase.as_deref())
    .bind(&event.message)
    .execute(connection)
    .await
    .map(drop)
    .map_err(failed("adding an event"))
}

fn select() -> QueryBuilder<Sqlite> {
    QueryBuilder::new(format!("SELECT {COLUMNS} FROM environments"))
}

fn read_environment(row: &SqliteRow) -> Result<Environment, Unreadable> {
    let state: String = row.try_get("state")?;
    let account: String = row.try_get("account_id")?;
    Ok(Environment {
        id: parsed(row, "id")?,
        account: AccountId::try_from(account)?,
        generation: u64::try_from(row.try_get::<i64, _>("generation")?)?,
        run: row.try_get("run")?,
        spec: DropletSpec { region: row.try_get("region")?, size: row.try_get("size")?, image: row.try_get("image")? },
        created_at: parsed(row, "created_at")?,
        updated_at: parsed(row, "updated_at")?,
        state: serde_json::from_str(&state)?,
    })
}

fn read_event(row: &SqliteRow) -> Result<(i64, EnvironmentEvent), Unreadable> {
    let event = EnvironmentEvent {
        at: parsed(row, "at")?,
        status: word(row.try_get("status")?)?,
        phase: row.try_get("phase")?,
        message: row.try_get("message")?,
    };
    Ok((row.try_get("sequence")?, event))
}

fn parsed<T>(row: &SqliteRow, column: &str) -> Result<T, Unreadable>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    Ok(row.try_get::<&str, _>(column)?.parse()?)
}

/// A value whose serialised form is one word.
fn word<T: DeserializeOwned>(text: String) -> Result<T, serde_json::Error> {
    serde_json::from_value(serde_json::Value::String(text))
}

fn failed<E: std::error::Error + Send + Sync + 'static>(operation: &'static str) -> impl FnOnce(E) -> StoreError {
    move |error| {
        let passing = (&error as &dyn Any).downcast_ref().is_some_and(may_pass);
        StoreError { operation, passing, source: Box::new(error) }
    }
}

fn unreadable(operation: &'static str) -> impl FnOnce(Unreadable) -> StoreError {
    move |source| StoreError { operation, passing: false, source }
}

/// Whether the same may succeed later.
fn may_pass(error: &sqlx::Error) -> bool {
    // The low byte tells the kind; what is above it tells more.
    let kind = |code: &str| code.parse::<i32>().ok().map(|code| code & 0xff);
    match error {
        sqlx::Error::PoolTimedOut | sqlx::Error::Io(_) => true,
        // BUSY, LOCKED, NOMEM, READONLY, IOERR, FULL, CANTOPEN.
        sqlx::Error::Database(error) => {
            error.code().and_then(|code| kind(&code)).is_some_and(|kind| matches!(kind, 5..=8 | 10 | 13 | 14))
        }
        _ => false,
    }
}
