//! Rollouts, their agents, and what was decided about single ones.

use std::collections::{BTreeMap, HashMap};

use async_trait::async_trait;
use dtma_api::EnvironmentId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row, SqliteConnection};

use super::{SqliteStore, Unreadable, failed, parsed, unreadable};
use crate::rollout::{Course, Preference, Rollout, RolloutId, Target, Terms};
use crate::store::sqlite::writing::Writing;
use crate::store::{RolloutStore, StoreError, StoredHeartbeat, Summary};

const COLUMNS: &str = "SELECT id, started_at, updated_at, state FROM rollouts";

/// What a rollout's row holds as JSON.
#[derive(Serialize, Deserialize)]
struct State {
    terms: Terms,
    course: Course,
}

impl State {
    fn of(rollout: &Rollout) -> Result<String, StoreError> {
        let state = Self { terms: rollout.terms.clone(), course: rollout.course.clone() };
        serde_json::to_string(&state).map_err(failed("writing a rollout's state"))
    }
}

#[async_trait]
impl RolloutStore for SqliteStore {
    async fn add_rollout(&self, rollout: &Rollout) -> Result<bool, StoreError> {
        let operation = "adding a rollout";
        let state = State::of(rollout)?;
        let mut writing = Writing::begin(&self.writer).await.map_err(failed(operation))?;
        let added = sqlx::query(
            "INSERT INTO rollouts (id, version, status, open, started_at, updated_at, state) VALUES (?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(rollout.id.to_string())
        .bind(rollout.terms.version.to_string())
        .bind(rollout.course.status.as_str())
        .bind(rollout.course.status.is_open())
        .bind(rollout.started_at.to_string())
        .bind(rollout.updated_at.to_string())
        .bind(state)
        .execute(writing.connection())
        .await;
        match added {
            Ok(_) => {}
            Err(sqlx::Error::Database(error)) if error.is_unique_violation() => {
                writing.undo().await.map_err(failed(operation))?;
                return Ok(false);
            }
            Err(error) => return Err(failed(operation)(error)),
        }
        for target in rollout.targets.values() {
            keep_target(writing.connection(), rollout.id, target).await?;
        }
        writing.commit().await.map_err(failed(operation))?;
        Ok(true)
    }

    async fn keep_rollout(&self, rollout: &Rollout, changed: &[EnvironmentId]) -> Result<(), StoreError> {
        let operation = "changing a rollout";
        let state = State::of(rollout)?;
        let mut writing = Writing::begin(&self.writer).await.map_err(failed(operation))?;
        sqlx::query("UPDATE rollouts SET status = ?, open = ?, updated_at = ?, state = ? WHERE id = ?")
            .bind(rollout.course.status.as_str())
            .bind(rollout.course.status.is_open())
            .bind(rollout.updated_at.to_string())
            .bind(state)
            .bind(rollout.id.to_string())
            .execute(writing.connection())
            .await
            .map_err(failed(operation))?;
        for target in changed.iter().filter_map(|id| rollout.targets.get(id)) {
            keep_target(writing.connection(), rollout.id, target).await?;
        }
        writing.commit().await.map_err(failed(operation))
    }

    async fn open_rollout(&self) -> Result<Option<Rollout>, StoreError> {
        self.one_rollout("WHERE open = 1", "").await
    }

    async fn completed_rollout(&self) -> Result<Option<Rollout>, StoreError> {
        self.one_rollout("WHERE status = ? ORDER BY id DESC LIMIT 1", "completed").await
    }

    async fn rollout(&self, id: RolloutId) -> Result<Option<Rollout>, StoreError> {
        self.one_rollout("WHERE id = ?", &id.to_string()).await
    }

    async fn rollouts(&self, limit: u32) -> Result<Vec<Summary>, StoreError> {
        let operation = "reading the rollouts";
        let sql = AssertSqlSafe(format!("{COLUMNS} ORDER BY id DESC LIMIT ?"));
        let rows = sqlx::query(sql).bind(limit).fetch_all(&self.readers).await.map_err(failed(operation))?;
        let mut summaries = Vec::new();
        for row in rows {
            let rollout = read_rollout(&row).map_err(unreadable(operation))?;
            let counted = sqlx::query(
                "SELECT wave, standing, count(*) FROM rollout_targets WHERE rollout_id = ? GROUP BY wave, standing",
            )
            .bind(rollout.id.to_string())
            .fetch_all(&self.readers)
            .await
            .map_err(failed(operation))?;
            let (mut counts, mut sizes) = (BTreeMap::new(), BTreeMap::new());
            for row in counted {
                let (wave, standing, count) = read_count(&row).map_err(unreadable(operation))?;
                *counts.entry(standing).or_default() += count;
                *sizes.entry(wave).or_default() += count;
            }
            summaries.push(Summary { rollout, counts, sizes });
        }
        Ok(summaries)
    }

    async fn heartbeats(&self) -> Result<Vec<StoredHeartbeat>, StoreError> {
        let operation = "reading all heartbeats";
        let rows = sqlx::query("SELECT environment_id, received_at, payload FROM heartbeats")
            .fetch_all(&self.readers)
            .await
            .map_err(failed(operation))?;
        let read = |row: &SqliteRow| {
            Ok(StoredHeartbeat {
                environment: parsed(row, "environment_id")?,
                received_at: parsed(row, "received_at")?,
                payload: row.try_get("payload")?,
            })
        };
        rows.iter().map(read).collect::<Result<_, _>>().map_err(unreadable(operation))
    }

    async fn preferences(&self) -> Result<HashMap<EnvironmentId, Preference>, StoreError> {
        let operation = "reading what was decided about updates";
        let rows = sqlx::query("SELECT environment_id, pin, excluded FROM update_preferences")
            .fetch_all(&self.readers)
            .await
            .map_err(failed(operation))?;
        let read = |row: &SqliteRow| {
            let pin: Option<String> = row.try_get("pin")?;
            let pin = pin.map(|pin| pin.parse()).transpose()?;
            Ok((parsed(row, "environment_id")?, Preference { pin, excluded: row.try_get("excluded")? }))
        };
        rows.iter().map(read).collect::<Result<_, _>>().map_err(unreadable(operation))
    }

    async fn prefer(&self, id: EnvironmentId, preference: &Preference, now: Timestamp) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO update_preferences (environment_id, pin, excluded, changed_at) VALUES (?, ?, ?, ?) ON CONFLICT (environment_id) \
             DO UPDATE SET pin = excluded.pin, excluded = excluded.excluded, changed_at = excluded.changed_at",
        )
        .bind(id.to_string())
        .bind(preference.pin.as_ref().map(ToString::to_string))
        .bind(preference.excluded)
        .bind(now.to_string())
        .execute(&self.writer)
        .await
        .map(drop)
        .map_err(failed("writing what was decided about updates"))
    }
}

impl SqliteStore {
    /// The one rollout that meets a condition, with its agents.
    async fn one_rollout(&self, condition: &'static str, value: &str) -> Result<Option<Rollout>, StoreError> {
        let operation = "reading a rollout";
        let mut query = sqlx::query(AssertSqlSafe(format!("{COLUMNS} {condition}")));
        if condition.contains('?') {
            query = query.bind(value.to_owned());
        }
        let row = query.fetch_optional(&self.readers).await.map_err(failed(operation))?;
        let Some(row) = row else { return Ok(None) };
        let mut rollout = read_rollout(&row).map_err(unreadable(operation))?;
        let rows = sqlx::query("SELECT state FROM rollout_targets WHERE rollout_id = ?")
            .bind(rollout.id.to_string())
            .fetch_all(&self.readers)
            .await
            .map_err(failed(operation))?;
        for row in rows {
            let target = read_target(&row).map_err(unreadable(operation))?;
            rollout.targets.insert(target.environment, target);
        }
        Ok(Some(rollout))
    }
}

async fn keep_target(connection: &mut SqliteConnection, id: RolloutId, target: &Target) -> Result<(), StoreError> {
    let operation = "writing an agent of a rollout";
    let state = serde_json::to_string(target).map_err(failed(operation))?;
    sqlx::query(
        "INSERT INTO rollout_targets (rollout_id, environment_id, wave, standing, state) VALUES (?, ?, ?, ?, ?) \
         ON CONFLICT (rollout_id, environment_id) DO UPDATE SET wave = excluded.wave, standing = excluded.standing, \
         state = excluded.state",
    )
    .bind(id.to_string())
    .bind(target.environment.to_string())
    .bind(target.wave)
    .bind(target.standing.as_str())
    .bind(state)
    .execute(connection)
    .await
    .map(drop)
    .map_err(failed(operation))
}

fn read_rollout(row: &SqliteRow) -> Result<Rollout, Unreadable> {
    let State { terms, course } = serde_json::from_str(row.try_get("state")?)?;
    Ok(Rollout {
        id: parsed(row, "id")?,
        terms,
        started_at: parsed(row, "started_at")?,
        updated_at: parsed(row, "updated_at")?,
        course,
        targets: BTreeMap::new(),
    })
}

fn read_target(row: &SqliteRow) -> Result<Target, Unreadable> {
    Ok(serde_json::from_str(row.try_get("state")?)?)
}

fn read_count(row: &SqliteRow) -> Result<(u32, String, usize), Unreadable> {
    let count: u32 = row.try_get(2)?;
    Ok((row.try_get(0)?, row.try_get(1)?, usize::try_from(count)?))
}
