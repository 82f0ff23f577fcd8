//! An agent that never comes up: the environment says what failed, in time, and the next try cleans up.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use dtma_api::environment::{EnsureRequest, EnvironmentStatus, EnvironmentView};
use stack::release::{self, Terms};
use stack::{Stack, Workspace};
use stories::{AGENT, Story, active, story_options, until};

async fn until_failed(stack: &Stack, limit: Duration) -> Result<EnvironmentView, Box<dyn std::error::Error>> {
    let provisioner = stack.provisioner();
    until("the environment says that it failed", limit, async || {
        let environment = provisioner.get(AGENT).await?;
        Ok((environment.status == EnvironmentStatus::ErrorProvisioning).then_some(environment))
    })
    .await
}

/// A release like the real one, whose agent says something and ends.
fn broken_release(folder: &Path) -> Story {
    let agent = folder.join("broken-agent");
    std::fs::write(&agent, "#!/bin/sh\necho 'this release is broken' >&2\nexit 1\n")?;
    let workspace = Workspace::find();
    let keys = release::development_keys(&workspace)?;
    release::pack(&workspace, &Terms::of(&workspace), &agent, &keys, folder)?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_broken_release_is_reported_with_its_last_words_and_the_next_try_works() -> Story {
    let releases = tempfile::tempdir()?;
    let stack = Stack::start(story_options()).await?;
    broken_release(releases.path())?;
    stack.kill_provisioner().await?;
    let broken = BTreeMap::from([("RELEASES_DIR".to_owned(), releases.path().display().to_string())]);
    stack.start_provisioner_with(&broken).await?;

    stack.provisioner().ensure(AGENT, &EnsureRequest::default(), 0).await?;
    let failed = until_failed(&stack, Duration::from_secs(120)).await?;
    let error = failed.error.ok_or("an error without a reason")?;
    assert_eq!(error.code, "bootstrap_failed", "{error:?}");
    assert_eq!(error.phase.as_deref(), Some("start"), "{error:?}");
    assert!(error.output.as_deref().is_some_and(|output| output.contains("this release is broken")), "{error:?}");

    stack.kill_provisioner().await?;
    stack.start_provisioner().await?;
    let environment = active(&stack, 120).await?;
    let droplets = stack.cloud().droplets().await?;
    assert_eq!(droplets.iter().map(|droplet| Some(droplet.id)).collect::<Vec<_>>(), [environment.droplet_id]);
    Ok(())
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_droplet_without_network_is_reported_at_its_deadline_and_the_next_try_works() -> Story {
    let stack = Stack::start(story_options().provisioner_setting("BOOTSTRAP_DEADLINE_SECONDS", "20")).await?;
    stack.provisioner().ensure(AGENT, &EnsureRequest::default(), 0).await?;
    let cut_off = until("a droplet exists", Duration::from_secs(30), async || {
        Ok(stack.cloud().droplets().await?.first().map(|droplet| droplet.id))
    })
    .await?;
    stack.cloud().set_network(cut_off, false).await?;

    let failed = until_failed(&stack, Duration::from_secs(60)).await?;
    let error = failed.error.ok_or("an error without a reason")?;
    assert_eq!(error.code, "bootstrap_timeout", "{error:?}");

    let environment = active(&stack, 120).await?;
    assert_ne!(environment.droplet_id, Some(cut_off), "a new droplet");
    let droplets = stack.cloud().droplets().await?;
    assert_eq!(droplets.len(), 1, "the failed one is gone: {droplets:?}");
    Ok(())
}
