//! The store's promises, on the real database.

use std::sync::Arc;
use std::time::Duration;

use dtma_api::environment::{EnvironmentEvent, EnvironmentStatus};
use dtma_api::{AgentId, EnvironmentId};
use dtma_provisioner::environment::{Attempt, Change, Environment, Placement, Progress, State, after};
use dtma_provisioner::store::sqlite::SqliteStore;
use dtma_provisioner::store::{Binding, InsertError, ReplaceError, Store, StoredHeartbeat};
use jiff::Timestamp;
use sqlx::ConnectOptions as _;
use sqlx::sqlite::SqliteConnectOptions;
use tempfile::TempDir;
use uuid::Uuid;

use super::rig::{a_token, spec};

async fn open(folder: &TempDir) -> SqliteStore {
    SqliteStore::open(&format!("sqlite:{}", folder.path().join("db.sqlite").display())).await.unwrap()
}

fn environment(account: &str) -> Environment {
    Environment::new(EnvironmentId(Uuid::now_v7()), account.parse().unwrap(), spec(), Timestamp::now())
}

fn event(message: &str) -> EnvironmentEvent {
    EnvironmentEvent {
        at: Timestamp::now(),
        status: EnvironmentStatus::PendingProvision,
        phase: Some("docker".to_owned()),
        message: message.to_owned(),
    }
}

fn gone(environment: &Environment) -> Environment {
    let now = Timestamp::now();
    environment.changed(Change::quiet(State::Deprovisioned { at: now }), now).0
}

#[tokio::test]
async fn an_account_has_one_live_environment_and_may_have_another_when_that_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let (first, second) = (environment("account"), environment("account"));
    store.insert(&first, &event("one")).await.unwrap();
    assert!(matches!(store.insert(&second, &event("two")).await, Err(InsertError::AccountTaken)));
    store.replace(&gone(&first), None).await.unwrap();
    store.insert(&second, &event("two")).await.unwrap();
    assert_eq!(store.of_account(&second.account).await.unwrap(), Some(second.clone()));
    assert_eq!(store.live().await.unwrap(), [second]);
}

#[tokio::test]
async fn of_two_changes_to_one_generation_one_is_refused_with_its_event() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let row = environment("account");
    store.insert(&row, &event("one")).await.unwrap();
    let next = gone(&row);
    store.replace(&next, Some(&event("two"))).await.unwrap();
    assert!(matches!(store.replace(&next, Some(&event("three"))).await, Err(ReplaceError::Changed)));
    let messages: Vec<_> =
        store.events(row.id, 1, 0).await.unwrap().into_iter().map(|(_, event)| event.message).collect();
    assert_eq!(messages, ["one", "two"]);
}

#[tokio::test]
async fn everything_survives_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let now = Timestamp::now();
    let token = a_token();
    let attempt = Attempt {
        id: Uuid::new_v4(),
        number: 2,
        started_at: now,
        run_started_at: now,
        deadline: after(now, Duration::from_secs(9)),
        token_hash: token.hash(),
        token_expires_at: now,
    };
    let state = State::Provisioning { attempt, placement: Placement::Asked, progress: Progress::default() };
    let row = environment("account");
    let (row, _) = (row.changed(Change::quiet(state), now).0, row);
    let store = open(&folder).await;
    let first = Environment { generation: row.generation - 1, ..row.clone() };
    store.insert(&first, &event("one")).await.unwrap();
    store.replace(&row, Some(&event("two"))).await.unwrap();
    store.close().await;

    let store = open(&folder).await;
    assert_eq!(store.environment(row.id).await.unwrap(), Some(row.clone()));
    assert_eq!(store.by_enrolment_token(token.hash()).await.unwrap(), Some(row.clone()));
    assert_eq!(store.by_enrolment_token(a_token().hash()).await.unwrap(), None);
    assert_eq!(store.unsettled().await.unwrap(), std::slice::from_ref(&row));
    let events = store.events(row.id, 1, 0).await.unwrap();
    assert_eq!(events[0].1.phase.as_deref(), Some("docker"));
    assert_eq!(store.events(row.id, 1, events[0].0).await.unwrap().len(), 1);
    assert_eq!(store.events(row.id, 2, 0).await.unwrap(), []);
    assert_eq!(store.counts().await.unwrap()["provisioning"], 1);
    store.replace(&gone(&row), None).await.unwrap();
    assert_eq!(store.unsettled().await.unwrap(), []);
    assert_eq!(store.by_enrolment_token(token.hash()).await.unwrap(), None);
}

#[tokio::test]
async fn bindings_and_heartbeats_keep_the_latest_word() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let agent: AgentId = "agent".parse().unwrap();
    let now = Timestamp::now();
    assert_eq!(store.binding(&agent).await.unwrap(), None);
    for (account, owner_known) in [("agent", false), ("user", true)] {
        let binding = Binding { account: account.parse().unwrap(), owner_known };
        store.bind(&agent, &binding, now).await.unwrap();
        assert_eq!(store.binding(&agent).await.unwrap(), Some(binding));
    }
    let id = EnvironmentId(Uuid::now_v7());
    let beat = |payload: &str| StoredHeartbeat { environment: id, received_at: now, payload: payload.to_owned() };
    store.keep_heartbeats(&[beat("1"), beat("2")]).await.unwrap();
    assert_eq!(store.heartbeat(id).await.unwrap(), Some(beat("2")));
}

#[tokio::test]
async fn settings_get_a_higher_number_only_when_they_change() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let mut numbers = Vec::new();
    for content in ["a", "a", "b", "b", "a"] {
        numbers.push(store.settings_generation(content).await.unwrap());
    }
    assert_eq!(numbers, [1, 1, 2, 2, 3]);
}

#[tokio::test]
async fn readers_and_the_writer_do_not_stand_in_each_others_way() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(open(&folder).await);
    let tasks: Vec<_> = (0..40)
        .map(|number| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let row = environment(&format!("account-{number}"));
                store.insert(&row, &event("one")).await.unwrap();
                store.check().await.unwrap();
                assert!(store.environment(row.id).await.unwrap().is_some());
                store.replace(&gone(&row), None).await.unwrap();
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(store.counts().await.unwrap()["deprovisioned"], 40);
}

#[tokio::test]
async fn old_events_are_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let row = environment("account");
    store.insert(&row, &event("one")).await.unwrap();
    store.forget_events(Timestamp::now() - Duration::from_secs(60)).await.unwrap();
    assert_eq!(store.events(row.id, 1, 0).await.unwrap().len(), 1);
    store.forget_events(Timestamp::now() + Duration::from_secs(60)).await.unwrap();
    assert_eq!(store.events(row.id, 1, 0).await.unwrap(), []);
}

#[tokio::test]
async fn after_sqlite_has_undone_a_transaction_by_itself_what_is_written_is_on_disk_again() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let (first, second) = (environment("first"), environment("second"));
    store.insert(&first, &event("one")).await.unwrap();
    let path = folder.path().join("db.sqlite");
    let mut beside = SqliteConnectOptions::new().filename(path).connect().await.unwrap();
    // What it does of itself when the disk is full.
    let trigger = "CREATE TRIGGER full BEFORE UPDATE ON environments BEGIN SELECT RAISE(ROLLBACK, 'full'); END";
    sqlx::raw_sql(trigger).execute(&mut beside).await.unwrap();
    let next = gone(&first);
    assert!(matches!(store.replace(&next, None).await, Err(ReplaceError::Store(_))));
    store.insert(&second, &event("two")).await.unwrap();
    assert!(matches!(store.replace(&gone(&second), None).await, Err(ReplaceError::Store(_))));
    sqlx::raw_sql("DROP TRIGGER full").execute(&mut beside).await.unwrap();

    store.replace(&next, Some(&event("three"))).await.unwrap();
    assert!(matches!(store.replace(&next, None).await, Err(ReplaceError::Changed)));
    assert!(matches!(store.insert(&environment("second"), &event("four")).await, Err(InsertError::AccountTaken)));
    let third = environment("third");
    store.insert(&third, &event("five")).await.unwrap();
    // Read by another connection, as after a crash.
    for written in [next, second, third] {
        assert_eq!(store.environment(written.id).await.unwrap(), Some(written));
    }
}
