//! The metadata service would hand out a droplet's user data: the droplet reads it, and no container does, whosever it is.

use std::time::Duration;

use dtma_api::instance::DeployAnswer;
use serde_json::json;
use stack::cloud::Power;
use stack::prepare::DEFAULT_IMAGE;
use stories::{Scene, Story, until};

const SOON: Duration = Duration::from_secs(60);
const USER_DATA: &str = "http://169.254.169.254/metadata/v1/user-data";
/// Containers there are in the story: one of the agent's, a stranger's on Docker's own bridge, a stranger's on a bridge of its own.
const CONTAINERS: [&str; 3] = ["ours", "stranger", "stranger-elsewhere"];

/// What a container gets when it asks for the user data: `answered`, or `silence`.
async fn what_it_gets(scene: &Scene, container: &str) -> Result<String, Box<dyn std::error::Error>> {
    let script = format!(
        "import urllib.request\n\
         try:\n    print('answered' if b'cloud-config' in urllib.request.urlopen('{USER_DATA}', timeout=2).read() else 'nonsense')\n\
         except OSError as error:\n    print('silence' if 'timed out' in str(error) else error)"
    );
    let said = scene.on_droplet(&["docker", "exec", container, "/usr/bin/python3.11", "-c", &script]).await?;
    Ok(said.trim().to_owned())
}

async fn assert_kept_away(scene: &Scene, when: &str) -> Story {
    let text = scene.on_droplet(&["curl", "-sS", "--fail", "-m", "5", USER_DATA]).await?;
    assert!(text.starts_with("#cloud-config"), "{when}, the droplet itself reads its user data: {text}");
    for container in CONTAINERS {
        assert_eq!(what_it_gets(scene, container).await?, "silence", "{when}, {container}");
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

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn no_container_reaches_the_metadata_service_and_nothing_docker_does_changes_that() -> Story {
    let scene = Scene::set(DEFAULT_IMAGE).await?;
    let image = scene.stack.mcp_image();
    let body = json!({
        "dockerImageUrl": image, "instanceNameOnToolbox": "ours", "accountToolInstanceId": "ati-1", "mcpTransportType": "http",
    });
    scene.agent.deploy_raw(&body).await?.decode::<DeployAnswer>()?;
    let strangers = format!(
        "docker network create elsewhere && docker run -d --restart always --name stranger {image} && \
         docker run -d --restart always --network elsewhere --name stranger-elsewhere {image}"
    );
    scene.on_droplet(&["sh", "-c", &strangers]).await?;
    assert_kept_away(&scene, "after the first boot").await?;

    scene.on_droplet(&["systemctl", "restart", "docker"]).await?;
    until_containers_run(&scene).await?;
    assert_kept_away(&scene, "after a restart of dockerd").await?;

    let boot_time = ["cut", "-d", " ", "-f", "22", "/proc/1/stat"];
    let boot = scene.on_droplet(&boot_time).await?;
    scene.stack.cloud().power(scene.droplet()?, Power::Cycle).await?;
    until("the droplet has booted again", SOON, async || {
        Ok((scene.on_droplet(&boot_time).await? != boot).then_some(()))
    })
    .await?;
    until_containers_run(&scene).await?;
    assert_kept_away(&scene, "after a reboot").await?;

    // It is the guard that does it: without it, everybody is answered.
    scene.on_droplet(&["systemctl", "stop", "dtma-metadata-guard"]).await?;
    for container in CONTAINERS {
        assert_eq!(what_it_gets(&scene, container).await?, "answered", "without the guard, {container}");
    }
    scene.on_droplet(&["systemctl", "start", "dtma-metadata-guard"]).await?;
    assert_kept_away(&scene, "with the guard again").await
}
