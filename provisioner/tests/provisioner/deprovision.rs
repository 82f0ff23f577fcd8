//! Deleting, at every moment, and what is left afterwards: nothing of ours, everything of others.

use std::sync::Arc;
use std::time::Duration;

use dtma_api::environment::EnvironmentStatus;
use dtma_provisioner::reconcile::plan::Policy;

use super::fake_cloud::Create;
use super::rig::{FLEET_TAG, Rig, Wishes, policy};

#[tokio::test]
async fn an_active_environment_goes_and_its_agent_may_no_longer_report() {
    let rig = Rig::start().await;
    let (_, bearer) = rig.active("agent-1").await;
    let (status, answer) = rig.delete("agent-1", 10).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["data"]["status"], "deprovisioned");
    assert!(rig.cloud.ids().is_empty());
    let (status, refused) = rig.agent("heartbeat", &bearer, super::rig::heartbeat()).await;
    assert_eq!((status, refused["code"].as_str()), (401, Some("bearer_unknown")));
    // Again is a success, and it can be read that it is gone.
    assert_eq!(rig.delete("agent-1", 10).await.0, 200);
    let (status, answer) = rig.get("agent-1").await;
    assert_eq!((status, answer["data"]["status"].as_str()), (200, Some("deprovisioned")));
}

#[tokio::test]
async fn what_never_was_is_deleted_with_success() {
    let rig = Rig::start().await;
    let (status, answer) = rig.delete("agent-1", 0).await;
    assert_eq!((status, answer["success"].as_bool()), (200, Some(true)));
}

#[tokio::test]
async fn ignored_deletes_are_repeated_until_the_droplet_is_gone() {
    let rig = Rig::start().await;
    rig.active("agent-1").await;
    rig.cloud.ignore_deletes(3);
    let (status, answer) = rig.delete("agent-1", 10).await;
    assert_eq!(status, 200, "{answer}");
    assert!(rig.cloud.ids().is_empty());
}

#[tokio::test]
async fn a_refused_delete_is_an_error_with_the_clouds_words_and_asking_again_hurries_it() {
    let rig = Rig::start().await;
    rig.active("agent-1").await;
    rig.cloud.fail_deletes(1);
    let (status, _) = rig.delete("agent-1", 0).await;
    assert_eq!(status, 202);
    rig.until_status("agent-1", EnvironmentStatus::ErrorDeprovisioning).await;
    let (_, answer) = rig.get("agent-1").await;
    assert!(answer["error"].as_str().unwrap().contains("pending event"), "{answer}");
    assert_eq!(rig.delete("agent-1", 10).await.0, 200);
    assert!(rig.cloud.ids().is_empty());
}

#[tokio::test]
async fn a_delete_while_the_creates_answer_is_out_leaves_nothing() {
    let rig = Arc::new(Rig::start().await);
    rig.cloud.next_creates([Create::Held]);
    rig.ensure("agent-1", 0).await;
    rig.cloud.create_arrived().await;
    let (status, answer) = rig.delete("agent-1", 0).await;
    assert_eq!(status, 202, "{answer}");
    rig.cloud.release();
    rig.until("agent-1", |environment, cloud| {
        environment.state.status() == EnvironmentStatus::Deprovisioned && cloud.ids().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_delete_while_a_lost_create_may_still_show_up_waits_for_it() {
    let rig = Rig::start().await;
    rig.cloud.next_creates([Create::LostAfterAndLate(4)]);
    rig.ensure("agent-1", 0).await;
    rig.until("agent-1", |_, cloud| !cloud.ids().is_empty()).await;
    assert_eq!(rig.delete("agent-1", 10).await.0, 200);
    assert!(rig.cloud.ids().is_empty());
}

#[tokio::test]
async fn an_environment_can_be_deleted_in_every_state_on_its_way_up() {
    for status in [
        EnvironmentStatus::PendingProvision,
        EnvironmentStatus::Provisioning,
        EnvironmentStatus::AwaitingHeartbeat,
        EnvironmentStatus::ErrorProvisioning,
    ] {
        let rig = Rig::start().await;
        match status {
            EnvironmentStatus::PendingProvision => {
                rig.cloud.next_creates([Create::RateLimit(Duration::from_secs(60))]);
            }
            EnvironmentStatus::Provisioning => rig.cloud.never_active(),
            EnvironmentStatus::ErrorProvisioning => rig.cloud.next_creates([Create::Refuse(422, "no")]),
            _ => {}
        }
        rig.ensure("agent-1", 0).await;
        rig.until("agent-1", |environment, cloud| environment.state.status() == status && (cloud.create_count() > 0))
            .await;
        let (answered, answer) = rig.delete("agent-1", 10).await;
        assert_eq!(answered, 200, "{status:?}: {answer}");
        assert!(rig.cloud.ids().is_empty(), "{status:?}");
    }
}

#[tokio::test]
async fn ensure_while_it_goes_waits_and_makes_another() {
    let rig = Rig::start().await;
    let (first, _) = rig.active("agent-1").await;
    rig.cloud.ignore_deletes(2);
    assert_eq!(rig.delete("agent-1", 0).await.0, 202);
    let (status, answer) = rig.ensure("agent-1", 1).await;
    assert_eq!(status, 202, "{answer}");
    assert_ne!(answer["data"]["environment_id"], first.to_string());
    rig.until_status("agent-1", EnvironmentStatus::AwaitingHeartbeat).await;
    assert_eq!(rig.cloud.ids().len(), 1);
}

#[tokio::test]
async fn ensure_that_does_not_wait_is_told_that_it_goes() {
    let rig = Rig::start().await;
    rig.active("agent-1").await;
    rig.cloud.ignore_deletes(1000);
    rig.delete("agent-1", 0).await;
    let (status, answer) = rig.ensure("agent-1", 0).await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("deprovisioning")), "{answer}");
}

#[tokio::test]
async fn the_sweeper_deletes_old_orphans_of_ours_and_nothing_else() {
    let wishes = Wishes { policy: Policy { orphan_age: Duration::from_secs(600), ..policy() }, ..Wishes::default() };
    let cloud = Arc::clone(&wishes.cloud);
    let unknown = format!("dtma-env:{}", uuid::Uuid::now_v7());
    let ours = [FLEET_TAG.to_owned(), unknown];
    let old = cloud.add_aged(&ours, Duration::from_secs(601));
    let untagged = cloud.add_aged(&[FLEET_TAG.to_owned()], Duration::from_secs(601));
    let young = cloud.add_aged(&ours, Duration::from_secs(10));
    let stranger = cloud.add_aged(&[], Duration::from_secs(100_000));
    let other_fleet = cloud.add_aged(&["web".to_owned()], Duration::from_secs(100_000));
    let rig = Rig::with(wishes, async |_| {}).await;
    rig.active("agent-1").await;
    let wanted =
        rig.until("agent-1", |_, cloud| !cloud.ids().contains(&old.0) && !cloud.ids().contains(&untagged.0)).await;
    let droplet = wanted.state.droplet().unwrap();
    assert_eq!(rig.cloud.ids(), [young.0, stranger.0, other_fleet.0, droplet.0]);
    rig.delete("agent-1", 10).await;
    assert_eq!(rig.cloud.ids(), [young.0, stranger.0, other_fleet.0]);
}
