//! The metadata service would hand out a droplet's user data: the droplet reads it, and no container does, whosever it is.

use stack::cloud::Power;
use stories::{Scene, Story, until};

use super::{SOON, get};

const USER_DATA: &str = "http://169.254.169.254/metadata/v1/user-data";
/// One of the agent's, a stranger's on Docker's own bridge, a stranger's on a bridge of its own.
const CONTAINERS: [&str; 3] = ["open", "stranger", "stranger-elsewhere"];

/// The droplet is answered, and no container is.
async fn assert_kept_away(scene: &Scene, when: &str) -> Story {
    let text = scene.on_droplet(&["curl", "-sS", "--fail", "-m", "5", USER_DATA]).await?;
    assert!(text.starts_with("#cloud-config"), "{when}, the droplet itself reads its user data: {text}");
    for container in CONTAINERS {
        let answer = get(scene, container, USER_DATA).await?;
        assert!(answer.starts_with("no answer"), "{when}, {container}: {answer}");
    }
    Ok(())
}

async fn until_containers_run(scene: &Scene) -> Story {
    until("every container runs", SOON, async || {
        let script = format!("docker inspect -f '{{{{.State.Running}}}}' {}", CONTAINERS.join(" "));
        let running = scene.on_droplet(&["sh", "-c", &script]).await?;
        Ok((running.matches("true").count() == CONTAINERS.len()).then_some(()))
    })
    .await
}

/// Nothing Docker does changes that.
pub(super) async fn assert_out_of_reach(scene: &Scene) -> Story {
    let image = scene.stack.mcp_image();
    let strangers = format!(
        "docker network create elsewhere && docker run -d --restart always --name stranger {image} && \
         docker run -d --restart always --network elsewhere --name stranger-elsewhere {image}"
    );
    scene.on_droplet(&["sh", "-c", &strangers]).await?;
    assert_kept_away(scene, "after the first boot").await?;

    scene.on_droplet(&["systemctl", "restart", "docker"]).await?;
    until_containers_run(scene).await?;
    assert_kept_away(scene, "after a restart of dockerd").await?;

    let boot_time = ["cut", "-d", " ", "-f", "22", "/proc/1/stat"];
    let boot = scene.on_droplet(&boot_time).await?;
    scene.stack.cloud().power(scene.droplet()?, Power::Cycle).await?;
    until("the droplet has booted again", SOON, async || {
        Ok((scene.on_droplet(&boot_time).await? != boot).then_some(()))
    })
    .await?;
    until_containers_run(scene).await?;
    assert_kept_away(scene, "after a reboot").await?;

    // It is the guard that does it: without it, everybody is answered.
    scene.on_droplet(&["systemctl", "stop", "dtma-metadata-guard"]).await?;
    for container in CONTAINERS {
        let answer = get(scene, container, USER_DATA).await?;
        assert!(answer.starts_with("200 #cloud-config"), "without the guard, {container}: {answer}");
    }
    scene.on_droplet(&["systemctl", "start", "dtma-metadata-guard"]).await?;
    assert_kept_away(scene, "with the guard again").await
}
