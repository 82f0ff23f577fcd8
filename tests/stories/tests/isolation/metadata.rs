//! The metadata service would hand out a droplet's user data: the droplet reads it, and no container does, whosever it is.

use stories::{Scene, Story, until};

use super::{SOON, assert_unanswered, get};

const USER_DATA: &str = "http://169.254.169.254/metadata/v1/user-data";
/// One of the agent's, a stranger's on Docker's own bridge, a stranger's on a bridge of its own.
const CONTAINERS: [&str; 3] = ["open", "stranger", "stranger-elsewhere"];

/// The droplet is answered, and no container is.
async fn assert_kept_away(scene: &Scene, when: &str) -> Story {
    let text = scene.on_droplet(&["curl", "-sS", "--fail", "-m", "5", USER_DATA]).await?;
    assert!(text.starts_with("#cloud-config"), "{when}, the droplet itself reads its user data: {text}");
    let asked = CONTAINERS.map(|container| (container, USER_DATA.to_owned()));
    assert_unanswered(scene, when, &asked).await
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

    scene.cut_power().await?;
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
