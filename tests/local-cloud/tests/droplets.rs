//! Real droplets on this machine's Docker Engine: they boot, run what their user data says, and come back after the power was cut.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use local_cloud::api::App;
use local_cloud::cloud::{Cloud, CloudOptions};
use local_cloud::droplet::Lag;
use local_cloud::gate::Gate;
use local_cloud::host::{DockerHost, DockerHostOptions};
use local_cloud::image::PackageSource;
use local_cloud::limits::Limits;
use local_cloud::{metadata, server};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

const TOKEN: &str = "real";

/// One stack of its own: a network, a local cloud on its gateway, and whatever droplets it makes. Everything goes when it is dropped.
struct Stack {
    name: String,
    base: String,
    client: reqwest::Client,
}

fn docker(arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("docker").args(arguments).output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if output.status.success() { Ok(text) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

impl Stack {
    /// `number` tells the tests of this file apart; runs are told apart by their process.
    async fn start(name: &str, number: u32) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let subnet = std::process::id() % 126 * 2 + number;
        let name = format!("{name}{}", std::process::id());
        let stack = Self { base: format!("http://10.213.{subnet}.1:8080"), client: reqwest::Client::new(), name };
        let label = format!("dtma.stack={}", stack.name);
        let cidr = format!("10.213.{subnet}.0/24");
        docker(&["network", "create", "--label", &label, "--subnet", &cidr, &stack.name]).unwrap();
        stack.serve(subnet).await;
        stack
    }

    /// Starts a local cloud over whatever droplets the stack has.
    async fn serve(&self, subnet: u32) {
        let (door, listeners) = mpsc::unbounded_channel();
        let host = DockerHost::connect(DockerHostOptions {
            stack: self.name.clone(),
            network: self.name.clone(),
            registry: Some(format!("10.213.{subnet}.1:5000")),
            packages: PackageSource::of_this_machine().await.unwrap(),
            image_cache: std::env::temp_dir().join("dtma-local-cloud"),
            metadata: Some(door),
        })
        .await
        .unwrap();
        let options = CloudOptions { droplet_limit: 5, lag: Lag::NONE, clock: Arc::new(Timestamp::now) };
        let cloud = Cloud::start(Arc::new(host), options).await.unwrap();
        let gate = Gate::new(TOKEN.into(), Limits::default(), None, Arc::new(Timestamp::now));
        let listener = TcpListener::bind(self.base.strip_prefix("http://").unwrap()).await.unwrap();
        tokio::spawn(metadata::serve(listeners, cloud.clone()));
        tokio::spawn(server::serve(listener, App { cloud, gate }, std::future::pending()));
    }

    async fn call(&self, method: reqwest::Method, path: &str, body: Value) -> (u16, String) {
        let mut request = self.client.request(method, format!("{}{path}", self.base)).bearer_auth(TOKEN);
        if !body.is_null() {
            request = request.json(&body);
        }
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    async fn post(&self, path: &str, body: Value) -> (u16, String) {
        self.call(reqwest::Method::POST, path, body).await
    }

    async fn droplet(&self, image: &str, user_data: &str) -> Droplet<'_> {
        let order = json!({
            "name": "droplet-1", "size": "s-1vcpu-1gb", "image": image, "region": "nyc3", "tags": ["fleet"], "user_data": user_data,
        });
        let (status, body) = self.post("/v2/droplets", order).await;
        assert_eq!(status, 202, "{body}");
        let created: Value = serde_json::from_str(&body).unwrap();
        let id = created["droplet"]["id"].as_u64().unwrap();
        Droplet { stack: self, id, container: format!("dtma-{}-{id}", self.name) }
    }

    /// Everything that is there, but for the container that has the metadata address while the cloud is served.
    fn leftovers(&self) -> Vec<String> {
        let label = format!("label=dtma.stack={}", self.name);
        let containers = docker(&["ps", "-aq", "--filter", &label, "--filter", "label=dtma.droplet"]).unwrap();
        let volumes = docker(&["volume", "ls", "-q", "--filter", &label]).unwrap();
        containers.lines().chain(volumes.lines()).map(str::to_owned).collect()
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // Also after a failed assertion, so nothing here may panic.
        let _ = Command::new(env!("CARGO_BIN_EXE_local-cloud")).args(["destroy", "--stack", &self.name]).output();
        let _ = docker(&["network", "rm", &self.name]);
    }
}

struct Droplet<'a> {
    stack: &'a Stack,
    id: u64,
    container: String,
}

impl Droplet<'_> {
    fn try_run(&self, script: &str) -> Result<String, String> {
        docker(&["exec", &self.container, "sh", "-c", script])
    }

    fn run(&self, script: &str) -> String {
        self.try_run(script).unwrap_or_else(|error| panic!("{script}: {error}"))
    }

    /// Waits until a command in the droplet succeeds.
    async fn until(&self, script: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(180);
        loop {
            match self.try_run(script) {
                Ok(output) => return output,
                Err(error) if Instant::now() > deadline => {
                    let console = self.control(reqwest::Method::GET, "console", Value::Null).await.1;
                    panic!("{script} never succeeded: {error}\n{console}");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    async fn control(&self, method: reqwest::Method, what: &str, body: Value) -> (u16, String) {
        self.stack.call(method, &format!("/control/droplets/{}/{what}", self.id), body).await
    }

    async fn view(&self) -> Value {
        let (status, body) =
            self.stack.call(reqwest::Method::GET, &format!("/v2/droplets/{}", self.id), Value::Null).await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_str::<Value>(&body).unwrap()["droplet"].clone()
    }

    async fn public_address(&self) -> String {
        let networks = self.view().await["networks"]["v4"].clone();
        let public = networks.as_array().unwrap().iter().find(|network| network["type"] == "public").cloned();
        public.unwrap()["ip_address"].as_str().unwrap().to_owned()
    }
}

/// A root file system with one program in it that waits for ever, as a tar archive for `docker import`.
fn pause_image(folder: &Path) -> std::path::PathBuf {
    let source = folder.join("pause.rs");
    // Static, so the image needs nothing else.
    std::fs::write(&source, "fn main() { loop { std::thread::park(); } }").unwrap();
    let binary = folder.join("pause");
    let built = Command::new("rustc")
        .args(["-O", "-C", "target-feature=+crt-static", "-o"])
        .args([&binary, &source])
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let archive = folder.join("pause.tar");
    let packed =
        Command::new("tar").arg("-C").arg(folder).arg("-cf").args([&archive, Path::new("pause")]).status().unwrap();
    assert!(packed.success());
    archive
}

/// What a droplet reads about itself.
fn assert_metadata(droplet: &Droplet<'_>, address: &str, user_data: &str) {
    let get = |path: &str| droplet.run(&format!("curl -sS --fail -m 5 http://169.254.169.254/metadata/{path}"));
    assert_eq!(get("v1/id"), droplet.id.to_string());
    assert_eq!(get("v1/hostname"), "droplet-1");
    assert_eq!(get("v1/user-data"), user_data.trim_end());
    assert_eq!(get("v1/region"), "nyc3");
    assert_eq!(get("v1/interfaces/public/0/ipv4/address"), address);
    assert!(get("v1/").lines().any(|name| name == "user-data"));
    let document: Value = serde_json::from_str(&get("v1.json")).unwrap();
    assert_eq!((&document["droplet_id"], &document["tags"]), (&json!(droplet.id), &json!(["fleet"])));
    assert_eq!(document["user_data"], user_data);
    assert!(
        droplet.run("ip -br link show eth0").contains(document["interfaces"]["public"][0]["mac"].as_str().unwrap())
    );
    droplet.try_run("curl -sS --fail -m 5 http://169.254.169.254/metadata/v1/secrets").unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_droplet_boots_runs_its_user_data_and_comes_back_after_a_power_cut() {
    let stack = Stack::start("lcpower", 1).await;
    let user_data = "#cloud-config\nwrite_files:\n  - path: /root/written\n    content: by cloud-init\n\
                     runcmd:\n  - [sh, -c, 'echo ran >> /root/ran']\n";
    let droplet = stack.droplet("docker-debian-12", user_data).await;
    droplet.until("test -s /root/ran && cloud-init status | grep -q done").await;
    assert_eq!(droplet.run("cat /root/written"), "by cloud-init");
    let names = format!("droplet-1\n{}", droplet.id);
    assert_eq!(droplet.run("hostname; cat /var/lib/cloud/data/instance-id"), names);
    assert_eq!(droplet.run("stat -c %a /var/lib/cloud/instance/user-data.txt"), "600");
    assert_eq!(droplet.run("systemctl is-system-running --wait"), "running");
    let address = droplet.public_address().await;
    assert_metadata(&droplet, &address, user_data);
    let folder = tempfile::tempdir().unwrap();
    let archive = pause_image(folder.path());
    docker(&["cp", archive.to_str().unwrap(), &format!("{}:/root/pause.tar", droplet.container)]).unwrap();
    droplet.run(
        "docker import -c 'CMD [\"/pause\"]' /root/pause.tar pause:1 && \
         docker run -d --name nested --restart unless-stopped --memory 64m --cpus 0.5 --pids-limit 20 --read-only --cap-drop ALL \
         --security-opt no-new-privileges pause:1",
    );
    droplet.run("touch /run/in-memory");

    let (status, body) = droplet.control(reqwest::Method::POST, "power", json!({"action": "cycle"})).await;
    assert_eq!(status, 204, "{body}");
    droplet.until("docker inspect -f '{{.State.Running}}' nested | grep -q true").await;
    droplet.until("cloud-init status | grep -q done").await;
    droplet.try_run("test -e /run/in-memory").unwrap_err();
    assert_eq!(droplet.run("cat /root/ran"), "ran", "per-instance modules run once");
    assert_eq!(droplet.public_address().await, address);
    assert!(droplet.run("ip -4 addr show eth0").contains(&format!("inet {address}/")));
    assert_metadata(&droplet, &address, user_data);
    let console = droplet.control(reqwest::Method::GET, "console", Value::Null).await.1;
    assert!(console.contains("Reached target") && console.contains("Cloud-init v."), "{console}");

    let (status, body) = stack.post(&format!("/v2/droplets/{}/actions", droplet.id), json!({"type": "reboot"})).await;
    assert_eq!(status, 201, "{body}");
    let action = serde_json::from_str::<Value>(&body).unwrap()["action"]["id"].clone();
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let (_, body) = stack.call(reqwest::Method::GET, &format!("/v2/actions/{action}"), Value::Null).await;
        if body.contains("\"completed\"") {
            break;
        }
        assert!(Instant::now() < deadline, "{body}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    droplet.until("docker inspect -f '{{.State.Running}}' nested | grep -q true").await;
    assert_eq!(droplet.public_address().await, address);

    // Typed in the droplet, which ends the command as well.
    droplet.run("touch /run/in-memory");
    let _ = droplet.try_run("reboot");
    droplet.until("! test -e /run/in-memory && docker inspect -f '{{.State.Running}}' nested | grep -q true").await;
    assert_eq!((&droplet.view().await["status"], droplet.public_address().await), (&json!("active"), address));
    let _ = droplet.try_run("systemctl poweroff");
    let deadline = Instant::now() + Duration::from_secs(60);
    while droplet.view().await["status"] != "off" {
        assert!(Instant::now() < deadline, "it never went off");
        // The API allows 250 requests a minute.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let (status, body) = stack.post(&format!("/v2/droplets/{}/actions", droplet.id), json!({"type": "power_on"})).await;
    assert_eq!(status, 201, "{body}");
    droplet.until("docker inspect -f '{{.State.Running}}' nested | grep -q true").await;

    assert_eq!(stack.call(reqwest::Method::DELETE, &format!("/v2/droplets/{}", droplet.id), Value::Null).await.0, 204);
    let deadline = Instant::now() + Duration::from_secs(30);
    while stack.call(reqwest::Method::GET, &format!("/v2/droplets/{}", droplet.id), Value::Null).await.0 != 404 {
        assert!(Instant::now() < deadline, "the droplet never went away");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(stack.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_bare_droplet_installs_packages_and_can_be_cut_off_and_found_again() {
    let stack = Stack::start("lcbare", 2).await;
    let droplet = stack
        .droplet(
            "debian-12-x64",
            "#cloud-config\nruncmd:\n  - [sh, -c, 'apt-get update > /root/apt 2>&1; echo $? > /root/done']\n",
        )
        .await;
    assert_eq!(droplet.until("cat /root/done").await, "0", "{}", droplet.run("cat /root/apt"));
    assert_eq!(stack.post("/v2/tags", json!({"name": "later"})).await.0, 201);
    let resources = json!({"resources": [{"resource_id": droplet.id.to_string(), "resource_type": "droplet"}]});
    assert_eq!(stack.post("/v2/tags/later/resources", resources).await.0, 204);
    droplet.until("test -s /var/lib/dtma-local-cloud/tags.json").await;
    droplet.try_run("command -v dockerd").unwrap_err();
    let address = droplet.public_address().await;
    // Whether the droplet reaches the machine it runs on.
    let reach = format!("curl -sS -m 3 -o /dev/null {}/v2/account", stack.base);
    droplet.run(&reach);
    for connected in [false, false, true, true] {
        let (status, body) = droplet.control(reqwest::Method::POST, "network", json!({"connected": connected})).await;
        assert_eq!(status, 204, "{body}");
        assert_eq!(droplet.try_run(&reach).is_ok(), connected);
        assert_eq!(
            droplet.try_run("curl -sS -m 3 -o /dev/null http://169.254.169.254/metadata/v1/id").is_ok(),
            connected
        );
    }
    assert_eq!(droplet.public_address().await, address);
    assert!(droplet.run("hostname -I").split_whitespace().any(|own| own == address));
    let off = droplet.control(reqwest::Method::POST, "power", json!({"action": "off"})).await;
    assert_eq!((off.0, droplet.view().await["status"].clone()), (204, json!("off")));

    let anew = DockerHost::connect(DockerHostOptions {
        stack: stack.name.clone(),
        network: stack.name.clone(),
        registry: None,
        packages: PackageSource::default(),
        image_cache: std::env::temp_dir(),
        metadata: None,
    });
    let found = local_cloud::host::Host::found(&anew.await.unwrap()).await.unwrap();
    assert_eq!(found.len(), 1);
    let found = &found[0];
    assert_eq!((found.record.id.0, found.record.name.as_str(), found.running), (droplet.id, "droplet-1", false));
    assert_eq!(
        (found.address.to_string(), found.record.tags.clone()),
        (address, vec!["fleet".to_owned(), "later".to_owned()])
    );
    let destroyed =
        Command::new(env!("CARGO_BIN_EXE_local-cloud")).args(["destroy", "--stack", &stack.name]).output().unwrap();
    assert!(destroyed.status.success());
    assert_eq!(stack.leftovers(), Vec::<String>::new());
    assert_eq!(docker(&["ps", "-aq", "--filter", &format!("label=dtma.stack={}", stack.name)]).unwrap(), "");
}
