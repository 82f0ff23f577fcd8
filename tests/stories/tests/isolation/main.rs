//! Who reaches what on a droplet of each Debian a droplet may have: its first boot, an instance's life, and what is kept apart.

mod metadata;

use std::error::Error;
use std::time::Duration;

use dtma_api::instance::{DeployAnswer, InstanceAnswer};
use futures_util::future::try_join_all;
use reqwest::Method;
use serde_json::{Value, json};
use stack::prepare::DEFAULT_IMAGE;
use stories::{Scene, Story, until};

const SOON: Duration = Duration::from_secs(60);

/// What a container is answered at a URL: `200` and the first of the body, another status and a reason, or `no answer` and why not.
async fn ask(scene: &Scene, container: &str, url: &str, opener: &str) -> Result<String, Box<dyn Error>> {
    let script = format!(
        "import ssl, urllib.error, urllib.request as request\n\
         unchecked = ssl._create_unverified_context()\n\
         try:\n\
         \x20   answer = request.build_opener(request.HTTPSHandler(context=unchecked){opener}).open('{url}', timeout=3)\n\
         \x20   print(answer.status, answer.read(200).decode())\n\
         except urllib.error.HTTPError as error:\n\
         \x20   print(error.code, error.read(200).decode())\n\
         except OSError as error:\n\
         \x20   print('no answer:', error)"
    );
    let said = scene.on_droplet(&["docker", "exec", container, "/usr/bin/python3.11", "-c", &script]).await?;
    Ok(said.trim().to_owned())
}

/// Asked as any program asks: through a proxy, where its environment names one.
async fn get(scene: &Scene, container: &str, url: &str) -> Result<String, Box<dyn Error>> {
    ask(scene, container, url, "").await
}

/// Asked by a program that takes no notice of proxies.
async fn get_directly(scene: &Scene, container: &str, url: &str) -> Result<String, Box<dyn Error>> {
    ask(scene, container, url, ", request.ProxyHandler({})").await
}

/// Each of these gets no answer, not even from past a proxy. Asked all at once, because each waits as long as it can.
async fn assert_unanswered(scene: &Scene, when: &str, asked: &[(&str, String)]) -> Story {
    let answers = try_join_all(asked.iter().map(|(from, url)| get_directly(scene, from, url))).await?;
    for ((from, url), answer) in asked.iter().zip(answers) {
        assert!(answer.starts_with("no answer"), "{when}, {from} to {url}: {answer}");
    }
    Ok(())
}

async fn deploy(scene: &Scene, name: &str, egress: &Value) -> Story {
    let body = server(scene, name, egress);
    scene.agent.deploy_raw(&body).await?.decode::<DeployAnswer>()?;
    Ok(())
}

fn server(scene: &Scene, name: &str, egress: &Value) -> Value {
    json!({
        "dockerImageUrl": scene.stack.mcp_image(), "instanceNameOnToolbox": name, "accountToolInstanceId": format!("id-of-{name}"),
        "mcpTransportType": "http", "egress": egress,
    })
}

async fn assert_adds(scene: &Scene, name: &str) -> Story {
    let instance = scene.agent.get(&format!("/tools/{name}")).await?.decode::<InstanceAnswer>()?.data;
    let client = scene.agent.mcp(&instance).await?;
    assert_eq!(client.call("add", json!({ "a": 19, "b": 23 })).await?, "42");
    client.close().await?;
    Ok(())
}

/// Address of the droplet on a network of its Docker Engine.
async fn gateway(scene: &Scene, network: &str) -> Result<String, Box<dyn Error>> {
    let format = "{{(index .IPAM.Config 0).Gateway}}";
    Ok(scene.on_droplet(&["docker", "network", "inspect", network, "-f", format]).await?.trim().to_owned())
}

async fn assert_reach(scene: &Scene, when: &str) -> Story {
    // Something outside the droplet that may be in a list, and something that isn't.
    let (listed, unlisted) = (format!("http://{}/v2/", scene.stack.registries().0), scene.stack.provisioner());
    let unlisted = format!("{}/health", unlisted.url());
    let mut unanswered = Vec::new();
    for url in [&listed, &unlisted] {
        let answer = get(scene, "open", url).await?;
        assert!(answer.starts_with("200"), "{when}, open: {answer}");
        unanswered.extend([("closed", url.clone()), ("listed", url.clone())]);
    }
    let answer = get(scene, "listed", &listed).await?;
    assert!(answer.starts_with("200"), "{when}, listed: {answer}");
    let answer = get(scene, "listed", &unlisted).await?;
    assert!(answer.starts_with("403") && answer.contains("is not in this instance's egress list"), "{when}: {answer}");

    // Nobody gets at another, and the agent gets at all of them.
    for name in ["open", "closed", "listed"] {
        assert_adds(scene, name).await?;
        let address = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        let address = scene.on_droplet(&["docker", "inspect", name, "-f", address]).await?;
        let url = format!("http://{}:8080/mcp", address.trim());
        let others = ["open", "closed", "listed", "stranger"].into_iter().filter(|from| *from != name);
        unanswered.extend(others.map(|from| (from, url.clone())));
    }
    assert_unanswered(scene, when, &unanswered).await?;

    // The agent's own port, at whichever of the droplet's addresses, is no use without the key.
    let droplet = scene.environment.ip_address.ok_or("the droplet has no address")?;
    let agent = format!("https://{droplet}:30000/tools");
    let answer = get(scene, "open", &agent).await?;
    assert!(answer.starts_with("401"), "{when}: {answer}");
    let agent = format!("https://{}:30000/tools", gateway(scene, "dtma.closed").await?);
    let answer = get(scene, "closed", &agent).await?;
    assert!(answer.starts_with("401"), "{when}: {answer}");
    Ok(())
}

async fn assert_groups_are_kept_apart(scene: &Scene) -> Story {
    for (group, servers) in [("first", vec!["f1", "f2"]), ("second", vec!["s1"])] {
        let servers: Vec<_> = servers.into_iter().map(|name| server(scene, name, &json!("open"))).collect();
        let body = json!({ "groupId": group, "servers": servers, "options": { "sharedNetworking": true } });
        let reply = scene.agent.send(Method::POST, "/mcp/groups", Some(&body)).await?;
        assert_eq!(reply.status, 201, "{}", reply.text);
    }
    // Whatever the server thinks of a plain GET, it has been reached.
    let answer = get(scene, "f1", "http://f2:8080/mcp").await?;
    assert!(!answer.starts_with("no answer"), "{answer}");
    let address = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}";
    let addresses = scene.on_droplet(&["docker", "inspect", "f2", "-f", address]).await?;
    assert_eq!(addresses.split_whitespace().count(), 2, "{addresses}");
    let urls = addresses.split_whitespace().map(|address| format!("http://{address}:8080/mcp"));
    let unanswered: Vec<_> = urls.flat_map(|url| [("s1", url.clone()), ("open", url)]).collect();
    assert_unanswered(scene, "of another group, or of none", &unanswered).await
}

async fn assert_lives_and_goes(scene: &Scene, name: &str) -> Story {
    for (verb, status) in [("stop", "exited"), ("start", "running"), ("restart", "running")] {
        let reply = scene.agent.send(Method::POST, &format!("/tools/{name}/{verb}"), None).await?;
        assert_eq!(reply.status, 200, "{verb}: {}", reply.text);
        assert_eq!(reply.json().pointer("/data/status"), Some(&json!(status)), "{verb}: {}", reply.text);
    }
    assert_adds(scene, name).await?;
    for status in [200, 404] {
        let reply = scene.agent.send(Method::DELETE, &format!("/tools/{name}"), None).await?;
        assert_eq!(reply.status, status, "{}", reply.text);
    }
    Ok(())
}

/// The whole of it on a droplet made from `image`, whose Docker Engine is to have this version.
async fn all_of_it(image: &str, docker: &str) -> Story {
    let scene = Scene::set(image).await?;
    let version = scene.on_droplet(&["docker", "version", "-f", "{{.Server.Version}}"]).await?;
    assert!(version.starts_with(docker), "{image} has Docker {version}");
    let registry = scene.stack.registries().0;
    deploy(&scene, "open", &json!("open")).await?;
    deploy(&scene, "closed", &json!("none")).await?;
    deploy(&scene, "listed", &json!({ "allow": [registry.to_string()] })).await?;
    metadata::assert_out_of_reach(&scene).await?;
    // The droplet has just booted a second time, and Docker was restarted before that.
    until("the agent reaches every instance again", SOON, async || {
        for name in ["open", "closed", "listed"] {
            assert_adds(&scene, name).await?;
        }
        Ok(Some(()))
    })
    .await?;
    assert_reach(&scene, "after a reboot").await?;
    assert_groups_are_kept_apart(&scene).await?;
    for name in ["open", "closed", "listed"] {
        assert_lives_and_goes(&scene, name).await?;
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn on_debian_12_containers_reach_what_they_are_to_reach_and_no_metadata() -> Story {
    all_of_it(DEFAULT_IMAGE, "20.10.").await
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn on_debian_11_where_cloud_init_installs_docker_it_is_the_same() -> Story {
    all_of_it("debian-11-x64", "20.10.").await
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn on_debian_13_it_is_the_same() -> Story {
    all_of_it("docker-debian-13", "26.").await
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn the_other_images_serve_as_well_one_with_docker_and_one_whose_docker_comes_without_its_command_line() -> Story {
    for image in ["docker-debian-11", "debian-13-x64"] {
        let scene = Scene::set(image).await?;
        deploy(&scene, "open", &json!("open")).await?;
        deploy(&scene, "listed", &json!({ "allow": [scene.stack.registries().0.to_string()] })).await?;
        for name in ["open", "listed"] {
            assert_lives_and_goes(&scene, name).await?;
        }
        scene.on_droplet(&["systemctl", "is-active", "dtma-metadata-guard"]).await?;
        scene.stack.remove().await?;
    }
    Ok(())
}
