//! A local cloud on a loopback port whose droplets are only remembered, and a clock that goes when it is told to.

#![allow(dead_code, reason = "each test file uses its own part of it")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use jiff::{SignedDuration, Timestamp};
use local_cloud::api::App;
use local_cloud::cloud::{Clock, Cloud, CloudOptions};
use local_cloud::contract::Contract;
use local_cloud::droplet::{DropletId, Lag};
use local_cloud::gate::Gate;
use local_cloud::host::{Attachment, Found, Host, HostError, Power, Record, Vitals};
use local_cloud::limits::Limits;
use local_cloud::server;
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{broadcast, watch};

pub(crate) const TOKEN: &str = "a-token";

/// Droplets that are only remembered.
pub(crate) struct FakeHost {
    pub(crate) droplets: Mutex<BTreeMap<DropletId, Found>>,
    /// Everything done, in order.
    pub(crate) done: Mutex<Vec<String>>,
    open: watch::Sender<bool>,
    pub(crate) broken: Mutex<bool>,
    rebooting: Mutex<BTreeSet<DropletId>>,
    stirrings: broadcast::Sender<DropletId>,
}

impl Default for FakeHost {
    fn default() -> Self {
        Self {
            droplets: Mutex::default(),
            done: Mutex::default(),
            open: watch::Sender::new(true),
            broken: Mutex::new(false),
            rebooting: Mutex::default(),
            stirrings: broadcast::Sender::new(64),
        }
    }
}

impl FakeHost {
    /// While closed, everything asked for waits.
    pub(crate) fn open(&self, open: bool) {
        self.open.send_replace(open);
    }

    /// A droplet ends by itself, to be started again or not.
    pub(crate) fn end(&self, droplet: DropletId, to_reboot: bool) {
        self.end_unseen(droplet, to_reboot);
        let _ = self.stirrings.send(droplet);
    }

    /// The same, while nobody looks.
    pub(crate) fn end_unseen(&self, droplet: DropletId, to_reboot: bool) {
        self.droplets.lock().unwrap().get_mut(&droplet).unwrap().running = false;
        if to_reboot {
            self.rebooting.lock().unwrap().insert(droplet);
        }
    }

    pub(crate) fn runs(&self, droplet: DropletId) -> bool {
        self.droplets.lock().unwrap()[&droplet].running
    }

    async fn begin(&self, operation: &'static str, droplet: DropletId) -> Result<(), HostError> {
        let _ = self.open.subscribe().wait_for(|open| *open).await;
        if *self.broken.lock().unwrap() {
            return Err(HostError { operation, droplet, source: "the host is broken".into() });
        }
        self.done.lock().unwrap().push(format!("{operation} {droplet}"));
        Ok(())
    }
}

#[async_trait]
impl Host for FakeHost {
    async fn create(&self, record: &Record, _: Option<&str>) -> Result<Ipv4Addr, HostError> {
        self.begin("create", record.id).await?;
        let mut droplets = self.droplets.lock().unwrap();
        let address = Ipv4Addr::new(10, 0, 0, u8::try_from(droplets.len() + 10).unwrap());
        droplets.insert(record.id, Found { record: record.clone(), address, running: true });
        Ok(address)
    }

    async fn power(&self, droplet: DropletId, power: Power) -> Result<(), HostError> {
        let operation = match power {
            Power::Cut => "cut",
            Power::Shutdown => "shutdown",
            Power::On => "on",
        };
        self.begin(operation, droplet).await?;
        self.droplets.lock().unwrap().get_mut(&droplet).unwrap().running = power == Power::On;
        self.rebooting.lock().unwrap().remove(&droplet);
        Ok(())
    }

    async fn connect(&self, droplet: DropletId, connected: bool) -> Result<(), HostError> {
        self.begin(if connected { "connect" } else { "disconnect" }, droplet).await
    }

    async fn remove(&self, droplet: DropletId) -> Result<(), HostError> {
        self.begin("remove", droplet).await?;
        self.droplets.lock().unwrap().remove(&droplet);
        Ok(())
    }

    async fn found(&self) -> Result<Vec<Found>, HostError> {
        let rebooting = self.rebooting.lock().unwrap();
        let mut found: Vec<Found> = self.droplets.lock().unwrap().values().cloned().collect();
        found.iter_mut().for_each(|found| found.running |= rebooting.contains(&found.record.id));
        Ok(found)
    }

    async fn console(&self, droplet: DropletId) -> Result<String, HostError> {
        Ok(format!("console of {droplet}"))
    }

    async fn vitals(&self, droplet: DropletId) -> Result<Vitals, HostError> {
        Ok(match (self.runs(droplet), self.rebooting.lock().unwrap().contains(&droplet)) {
            (true, _) => Vitals::Running,
            (false, true) => Vitals::Rebooting,
            (false, false) => Vitals::Off,
        })
    }

    fn stirrings(&self) -> BoxStream<'_, DropletId> {
        let told = self.stirrings.subscribe();
        stream::unfold(told, |mut told| async { told.recv().await.ok().map(|id| (id, told)) }).boxed()
    }

    async fn keep_tags(&self, droplet: DropletId, tags: &[String]) -> Result<(), HostError> {
        self.droplets.lock().unwrap().get_mut(&droplet).unwrap().record.tags = tags.to_vec();
        Ok(())
    }

    async fn droplet_at(&self, address: Ipv4Addr) -> Option<DropletId> {
        self.droplets.lock().unwrap().values().find(|found| found.address == address).map(|found| found.record.id)
    }

    async fn attachment(&self, droplet: DropletId) -> Result<Attachment, HostError> {
        Err(HostError { operation: "attachment", droplet, source: "a droplet that is only remembered has none".into() })
    }

    fn container_name(&self, droplet: DropletId) -> String {
        format!("container-{droplet}")
    }
}

/// DigitalOcean's API description where it is present; says so where it isn't.
pub(crate) fn description() -> Option<PathBuf> {
    let path = std::env::var_os("DO_OPENAPI").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/digitalocean-subset.openapi.yaml")),
        PathBuf::from,
    );
    if path.exists() {
        return Some(path);
    }
    println!("skipped: the contract check needs DigitalOcean's API description at {} (or DO_OPENAPI)", path.display());
    None
}

pub(crate) struct Setup {
    pub(crate) lag: Lag,
    pub(crate) limits: Limits,
    pub(crate) droplet_limit: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Self { lag: Lag::NONE, limits: Limits { hour: 5_000, minute: 1_000 }, droplet_limit: 25 }
    }
}

/// A running local cloud.
pub(crate) struct TestCloud {
    pub(crate) host: Arc<FakeHost>,
    pub(crate) cloud: Cloud,
    pub(crate) gate: Gate,
    pub(crate) address: SocketAddr,
    now: Arc<Mutex<Timestamp>>,
    client: reqwest::Client,
}

impl TestCloud {
    pub(crate) async fn start(setup: Setup) -> Self {
        Self::start_on(Arc::default(), setup).await
    }

    /// On a host that may have droplets already.
    pub(crate) async fn start_on(host: Arc<FakeHost>, setup: Setup) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let now = Arc::new(Mutex::new("2026-06-01T12:00:00Z".parse::<Timestamp>().unwrap()));
        let clock: Clock = {
            let now = Arc::clone(&now);
            Arc::new(move || *now.lock().unwrap())
        };
        let options = CloudOptions { droplet_limit: setup.droplet_limit, lag: setup.lag, clock: Arc::clone(&clock) };
        let cloud = Cloud::start(host.clone(), options).await.unwrap();
        let contract = description().map(|path| Contract::load(&path).unwrap());
        let gate = Gate::new(TOKEN.into(), setup.limits, contract, clock);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = App { cloud: cloud.clone(), gate: gate.clone() };
        tokio::spawn(server::serve(listener, app, std::future::pending()));
        Self { host, cloud, gate, address, now, client: reqwest::Client::new() }
    }

    pub(crate) fn advance(&self, milliseconds: i64) {
        let mut now = self.now.lock().unwrap();
        *now += SignedDuration::from_millis(milliseconds);
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("http://{}{path}", self.address)).bearer_auth(TOKEN)
    }

    pub(crate) async fn send(&self, method: Method, path: &str, body: Option<Value>) -> Response {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.json(&body);
        }
        request.send().await.unwrap()
    }

    /// Status and body; no body reads as null.
    pub(crate) async fn call(&self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        let response = self.send(method, path, body).await;
        let status = response.status();
        let text = response.text().await.unwrap();
        (status, if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() })
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        let (status, body) = self.call(Method::GET, path, None).await;
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
        body
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.call(Method::POST, path, Some(body)).await
    }

    /// Creates a droplet and waits until it runs.
    pub(crate) async fn droplet(&self, name: &str, tags: &[&str]) -> u64 {
        let (status, body) = self.post("/v2/droplets", order(name, tags)).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{body}");
        self.cloud.settled().await;
        body["droplet"]["id"].as_u64().unwrap()
    }

    pub(crate) async fn arm(&self, operation: &str, fault: Value, times: u32) {
        let (status, body) =
            self.post("/control/faults", json!({"operation": operation, "fault": fault, "times": times})).await;
        assert_eq!(status, StatusCode::NO_CONTENT, "{body}");
    }

    /// Fails when anything that was sent or answered so far breaks the contract. Says nothing where the description is absent.
    pub(crate) async fn assert_contract_kept(&self) {
        assert_eq!(self.get("/control/violations").await, json!([]));
    }
}

/// A creation request that keeps every rule.
pub(crate) fn order(name: &str, tags: &[&str]) -> Value {
    json!({
        "name": name, "region": "nyc3", "size": "s-1vcpu-1gb", "image": "docker-debian-12", "tags": tags,
        "user_data": "#cloud-config\n", "monitoring": false, "with_droplet_agent": false,
    })
}

/// `id` of everything in a list.
pub(crate) fn ids(list: &Value) -> Vec<u64> {
    list.as_array().unwrap().iter().map(|item| item["id"].as_u64().unwrap()).collect()
}
