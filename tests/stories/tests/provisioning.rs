//! Exactly one droplet, then none: whoever dies, whatever the cloud answers.

use std::time::Duration;

use dtma_api::environment::{EnsureRequest, EnvironmentStatus};
use stack::cloud::{Fault, When};
use stack::{Stack, StackOptions};
use stories::{AGENT, Story, active, assert_contract_kept, story_options, until};

const SOON: Duration = Duration::from_secs(60);

async fn assert_droplets(stack: &Stack, expected: usize, when: &str) -> Story {
    let droplets = stack.cloud().droplets().await?;
    assert_eq!(droplets.len(), expected, "droplets {when}: {droplets:?}");
    Ok(())
}

async fn until_status(stack: &Stack, expected: EnvironmentStatus) -> Story {
    let provisioner = stack.provisioner();
    until(&format!("status {}", expected.as_str()), SOON, async || {
        Ok((provisioner.get(AGENT).await?.status == expected).then_some(()))
    })
    .await
}

async fn deprovision(stack: &Stack) -> Story {
    let reply = stack.provisioner().delete(AGENT, 60).await?;
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert_droplets(stack, 0, "after deprovisioning").await
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn fifty_callers_at_once_get_one_droplet() -> Story {
    let stack = Stack::start(story_options()).await?;
    let calls = (0..50).map(|_| {
        let provisioner = stack.provisioner();
        tokio::spawn(async move { provisioner.ensure(AGENT, &EnsureRequest::default(), 60).await })
    });
    let calls: Vec<_> = calls.collect();
    let mut droplets = Vec::new();
    for call in calls {
        let environment = call.await??;
        assert_eq!(environment.status, EnvironmentStatus::Active, "{environment:?}");
        droplets.extend(environment.droplet_id);
    }
    assert_eq!(droplets.len(), 50);
    droplets.dedup();
    assert_eq!(droplets.len(), 1, "all callers share one droplet: {droplets:?}");
    assert_droplets(&stack, 1, "after fifty calls").await?;
    let creates = stack.cloud().requests().await?;
    let creates = creates.iter().filter(|seen| seen.operation.as_deref() == Some("droplets_create")).count();
    assert_eq!(creates, 1, "the cloud was asked once");
    deprovision(&stack).await?;
    assert_contract_kept(&stack).await
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_connection_lost_around_create_still_makes_exactly_one_droplet() -> Story {
    let stack = Stack::start(story_options()).await?;
    for when in [When::After, When::Before] {
        stack.cloud().fault("droplets_create", Fault::Drop { when }, 1).await?;
        active(&stack, 120).await?;
        assert_droplets(&stack, 1, &format!("after a connection dropped {when:?} the effect")).await?;
        deprovision(&stack).await?;
    }
    assert_contract_kept(&stack).await
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_cloud_that_is_overloaded_for_a_while_is_waited_out() -> Story {
    let stack = Stack::start(story_options()).await?;
    for status in [429, 500] {
        for operation in ["droplets_create", "droplets_list", "droplets_get", "droplets_destroy"] {
            stack.cloud().fault(operation, Fault::Status { status }, 2).await?;
        }
        active(&stack, 140).await?;
        assert_droplets(&stack, 1, &format!("after a cloud that answered {status}")).await?;
        deprovision(&stack).await?;
        stack.cloud().clear_faults().await?;
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_droplet_the_cloud_cannot_place_is_replaced() -> Story {
    let stack = Stack::start(story_options()).await?;
    stack.cloud().fault("droplets_create", Fault::PlacementFailure, 1).await?;
    active(&stack, 120).await?;
    assert_droplets(&stack, 1, "after a placement failure").await?;
    deprovision(&stack).await
}

/// After which step of creating the provisioner dies.
#[derive(Debug, Clone, Copy)]
enum CreateStep {
    /// The intent is written and the request is on its way; the cloud hasn't acted on it.
    Asked,
    /// The cloud has made the droplet; its answer hasn't arrived.
    Made,
    /// The droplet's id is stored.
    Placed,
    /// The droplet is up; its agent is being installed.
    AwaitingHeartbeat,
    /// All done.
    Active,
}

impl CreateStep {
    async fn reach(self, stack: &Stack) -> Story {
        let provisioner = stack.provisioner();
        match self {
            Self::Asked => {
                stack.cloud().fault("droplets_create", Fault::Delay { when: When::Before, ms: 3_000 }, 1).await?;
            }
            Self::Made => {
                stack.cloud().fault("droplets_create", Fault::Delay { when: When::After, ms: 10_000 }, 1).await?;
            }
            Self::Placed | Self::AwaitingHeartbeat | Self::Active => {}
        }
        provisioner.ensure(AGENT, &EnsureRequest::default(), 0).await?;
        match self {
            Self::Asked => until_status(stack, EnvironmentStatus::Provisioning).await,
            Self::Made => {
                until(
                    "a droplet exists",
                    SOON,
                    async || Ok((!stack.cloud().droplets().await?.is_empty()).then_some(())),
                )
                .await
            }
            Self::Placed => {
                until("the id is stored", SOON, async || Ok(provisioner.get(AGENT).await?.droplet_id.map(drop))).await
            }
            Self::AwaitingHeartbeat => until_status(stack, EnvironmentStatus::AwaitingHeartbeat).await,
            Self::Active => until_status(stack, EnvironmentStatus::Active).await,
        }
    }
}

/// After which step of deleting the provisioner dies.
#[derive(Debug, Clone, Copy)]
enum DeleteStep {
    /// The intent is written.
    Accepted,
    /// The request is on its way; the cloud hasn't acted on it.
    Asked,
    /// The cloud has deleted the droplet; its answer hasn't arrived.
    Gone,
}

impl DeleteStep {
    async fn reach(self, stack: &Stack) -> Story {
        let cloud = stack.cloud();
        match self {
            Self::Accepted => {}
            Self::Asked => {
                cloud.fault("droplets_destroy", Fault::Delay { when: When::Before, ms: 3_000 }, 1).await?;
            }
            Self::Gone => {
                cloud.fault("droplets_destroy", Fault::Delay { when: When::After, ms: 10_000 }, 1).await?;
            }
        }
        let reply = stack.provisioner().delete(AGENT, 0).await?;
        assert!(matches!(reply.status, 200 | 202), "{}: {}", reply.status, reply.text);
        match self {
            Self::Accepted => Ok(()),
            Self::Asked => until_status(stack, EnvironmentStatus::Deprovisioning).await,
            Self::Gone => {
                until("the droplet is gone", SOON, async || Ok(cloud.droplets().await?.is_empty().then_some(()))).await
            }
        }
    }
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn the_provisioner_may_be_killed_after_every_step() -> Story {
    let stack = Stack::start(story_options()).await?;
    let creates =
        [CreateStep::Asked, CreateStep::Made, CreateStep::Placed, CreateStep::AwaitingHeartbeat, CreateStep::Active];
    let deletes = [DeleteStep::Accepted, DeleteStep::Asked, DeleteStep::Gone];
    for (create, delete) in creates.into_iter().zip(deletes.into_iter().cycle()) {
        println!("killing the provisioner after {create:?}, then after {delete:?}");
        create.reach(&stack).await?;
        stack.kill_provisioner().await?;
        stack.cloud().clear_faults().await?;
        stack.start_provisioner().await?;
        active(&stack, 120).await?;
        assert_droplets(&stack, 1, &format!("after a death at {create:?}")).await?;

        delete.reach(&stack).await?;
        stack.kill_provisioner().await?;
        stack.cloud().clear_faults().await?;
        stack.start_provisioner().await?;
        // Nobody asks again: the provisioner remembers.
        until("the environment is gone", SOON, async || {
            let reply = stack.provisioner().get_raw(AGENT).await?;
            let gone = reply.status == 404 || reply.text.contains("\"deprovisioned\"");
            Ok(gone.then_some(()))
        })
        .await?;
        assert_droplets(&stack, 0, &format!("after a death at {delete:?}")).await?;
    }
    assert_contract_kept(&stack).await
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_droplet_nobody_asked_for_survives() -> Story {
    let stack = Stack::start(StackOptions { ..story_options() }.provisioner_setting("ORPHAN_AGE_SECONDS", "1")).await?;
    let body = serde_json::json!({
        "name": "stranger", "region": "nyc3", "size": "s-1vcpu-1gb", "image": stack::prepare::DEFAULT_IMAGE, "tags": ["not-ours"],
    });
    let made = stack.cloud().send("POST".parse()?, "/v2/droplets", Some(&body)).await?;
    assert_eq!(made.status, 202, "{}", made.text);
    active(&stack, 60).await?;
    assert_droplets(&stack, 2, "with a stranger beside ours").await?;
    let reply = stack.provisioner().delete(AGENT, 60).await?;
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert_droplets(&stack, 1, "after ours has gone").await
}
