//! A database that can't be written to: locked by another process, or on a disk that is full. Nothing ends, nothing is promised that isn't
//! written, and everything goes on by itself afterwards.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dtma_api::environment::EnvironmentStatus;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _};

use super::rig::{Rig, Wishes, heartbeat};

#[tokio::test]
async fn while_another_process_holds_the_lock_callers_are_told_to_come_again_and_afterwards_all_goes_on() {
    let rig = Rig::start().await;
    let (_, bearer) = rig.active("agent-1").await;
    let database = rig.folder.path().join("db.sqlite");
    let mut other = SqliteConnectOptions::new().filename(database).connect().await.unwrap();
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();

    let (ensured, beaten, ready) = tokio::join!(
        rig.ensure("agent-2", 0),
        rig.agent("heartbeat", &bearer, heartbeat()),
        rig.internal("GET", "/ready", None)
    );
    for (status, answer) in [ensured, beaten] {
        assert_eq!((status, answer["code"].as_str()), (503, Some("database_unavailable")), "{answer}");
    }
    assert_eq!((ready.0, ready.1["code"].as_str()), (503, Some("not_ready")));
    // Who only reads is answered.
    assert_eq!(rig.get("agent-1").await.1["data"]["status"], "active");
    assert_eq!(rig.cloud.create_count(), 1, "nothing is asked of the cloud that isn't written down");

    sqlx::raw_sql("ROLLBACK").execute(&mut other).await.unwrap();
    other.close().await.unwrap();
    assert_eq!(rig.ensure("agent-2", 0).await.0, 202);
    rig.until_status("agent-2", EnvironmentStatus::AwaitingHeartbeat).await;
    assert_eq!(rig.agent("heartbeat", &bearer, heartbeat()).await.0, 204);
}

/// A disk of its own, small enough to be filled, and large enough for the four megabytes that the log grows to.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Self {
        let disk = Self(tempfile::tempdir().unwrap());
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "tmpfs"]).arg(disk.0.path()).status();
        assert!(mounted.unwrap().success(), "mounting a tmpfs needs root");
        disk
    }

    fn fill(&self) {
        let written = std::fs::write(self.filler(), vec![0_u8; 32 << 20]);
        assert_eq!(written.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    }

    fn empty(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }

    fn filler(&self) -> std::path::PathBuf {
        self.0.path().join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the database may still be open.
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

/// Processor time this process has used so far.
fn used() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let (_, rest) = stat.rsplit_once(')').unwrap();
    let fields: Vec<u64> = rest.split_whitespace().skip(11).take(2).map(|field| field.parse().unwrap()).collect();
    Duration::from_millis((fields[0] + fields[1]) * 10)
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn on_a_full_disk_callers_are_told_nothing_is_lost_and_space_is_all_it_takes() {
    let disk = SmallDisk::mount();
    let database = Some(Path::new(disk.0.path()).join("db.sqlite"));
    let rig = Rig::with(Wishes { database, ..Wishes::default() }, async |_| {}).await;
    let (_, bearer) = rig.active("agent-1").await;
    // One whose droplet is asked for now, and answered when nothing can be written any more.
    rig.cloud.next_creates([super::fake_cloud::Create::Held]);
    rig.ensure("agent-2", 0).await;
    rig.cloud.create_arrived().await;
    disk.fill();
    // What room there is in the log's file is used up first.
    let mut refused = None;
    for attempt in 0..2_000 {
        let (status, answer) = rig.ensure(&format!("filler-{attempt}"), 0).await;
        if status != 202 {
            refused = Some((status, answer["code"].as_str().map(str::to_owned)));
            break;
        }
    }
    assert_eq!(refused, Some((503, Some("database_unavailable".to_owned()))));
    rig.cloud.release();
    let before = used();
    let mut statuses = Vec::new();
    for _ in 0..20 {
        statuses.push(rig.agent("heartbeat", &bearer, heartbeat()).await.0);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(statuses.contains(&503), "{statuses:?}");
    assert!(
        used() - before < Duration::from_secs(1),
        "it keeps trying, and not as fast as it can: {:?}",
        used() - before
    );
    assert_eq!(rig.get("agent-1").await.0, 200);

    disk.empty();
    rig.until_status("agent-2", EnvironmentStatus::AwaitingHeartbeat).await;
    assert_eq!(rig.agent("heartbeat", &bearer, heartbeat()).await.0, 204);
    let second = rig.store.of_account(&"agent-2".parse().unwrap()).await.unwrap().unwrap();
    assert_eq!(
        rig.cloud.tagged_with(&second.tag()).len(),
        1,
        "the droplet made meanwhile was found, and no other made"
    );
}
