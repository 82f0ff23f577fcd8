//! Counters of this process, in Prometheus' text form.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use dtma_api::environment::EnvironmentStatus;

use crate::rollout::{Rollout, Standing};

/// What is counted. Shared by everything that does something worth counting.
#[derive(Debug, Default)]
pub struct Metrics {
    cloud_requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    http_requests: Mutex<BTreeMap<u16, u64>>,
    heartbeats: AtomicU64,
    heartbeat_flushes: AtomicU64,
    passes: AtomicU64,
    orphans_deleted: AtomicU64,
    connections: AtomicU64,
    turned_away: AtomicU64,
    rollouts_halted: AtomicU64,
}

impl Metrics {
    /// A request to the cloud was answered with `status`, or not at all: 0.
    pub fn cloud_request(&self, operation: &'static str, status: u16) {
        let mut counts = self.cloud_requests.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((operation, status)).or_default() += 1;
    }

    /// A request to us was answered.
    pub fn http_request(&self, status: u16) {
        *self.http_requests.lock().unwrap_or_else(PoisonError::into_inner).entry(status).or_default() += 1;
    }

    /// `count` heartbeats were committed together.
    pub fn heartbeats_committed(&self, count: u64) {
        self.heartbeats.fetch_add(count, Ordering::Relaxed);
        self.heartbeat_flushes.fetch_add(1, Ordering::Relaxed);
    }

    /// The loop went round once.
    pub fn pass(&self) {
        self.passes.fetch_add(1, Ordering::Relaxed);
    }

    /// The sweeper deleted a droplet that no row wants.
    pub fn orphan_deleted(&self) {
        self.orphans_deleted.fetch_add(1, Ordering::Relaxed);
    }

    /// A rollout has stopped by itself.
    pub fn rollout_halted(&self) {
        self.rollouts_halted.fetch_add(1, Ordering::Relaxed);
    }

    /// So many connections are open now.
    pub fn connections(&self, open: u64) {
        self.connections.store(open, Ordering::Relaxed);
    }

    /// A connection was closed at once because there were too many.
    pub fn turned_away(&self) {
        self.turned_away.fetch_add(1, Ordering::Relaxed);
    }

    /// The page for Prometheus; `environments` counts the rows by status, `rollout` is the present or latest one.
    pub fn page(&self, environments: &BTreeMap<String, u64>, rollout: Option<&Rollout>) -> String {
        let mut page = String::new();
        head(&mut page, "dtma_environments", "gauge", "Environments by status.");
        for status in STATUSES {
            let name = status.as_str();
            let count = environments.get(name).copied().unwrap_or_default();
            line(&mut page, "dtma_environments", &[("status", name)], count);
        }
        head(&mut page, "dtma_cloud_requests_total", "counter", "Requests to the cloud; status 0 is no answer.");
        for ((operation, status), count) in self.cloud_requests.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let labels = [("operation", *operation), ("status", &status.to_string())];
            line(&mut page, "dtma_cloud_requests_total", &labels, *count);
        }
        head(&mut page, "dtma_http_requests_total", "counter", "Requests answered, by status.");
        for (status, count) in self.http_requests.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            line(&mut page, "dtma_http_requests_total", &[("status", &status.to_string())], *count);
        }
        if let Some(rollout) = rollout {
            let version = rollout.terms.version.to_string();
            head(
                &mut page,
                "dtma_rollout",
                "gauge",
                "The present or latest rollout: 1 for how it stands, with the wave begun last.",
            );
            let (status, wave) = (rollout.course.status.as_str(), rollout.course.wave.to_string());
            line(&mut page, "dtma_rollout", &[("version", &version), ("status", status), ("wave", &wave)], 1);
            head(&mut page, "dtma_rollout_agents", "gauge", "Agents of that rollout by how they stand.");
            let counts = rollout.counts();
            for standing in Standing::NAMES {
                let count = counts.get(standing).copied().unwrap_or_default() as u64;
                line(&mut page, "dtma_rollout_agents", &[("version", &version), ("standing", standing)], count);
            }
        }
        head(&mut page, "dtma_connections", "gauge", "Connections open now.");
        line(&mut page, "dtma_connections", &[], self.connections.load(Ordering::Relaxed));
        for (name, help, counter) in [
            (
                "dtma_connections_turned_away_total",
                "Connections refused because there were too many.",
                &self.turned_away,
            ),
            ("dtma_heartbeats_total", "Heartbeats committed.", &self.heartbeats),
            ("dtma_heartbeat_flushes_total", "Transactions they were committed in.", &self.heartbeat_flushes),
            ("dtma_reconcile_passes_total", "Rounds of the loop.", &self.passes),
            ("dtma_orphans_deleted_total", "Droplets of ours that no row wanted.", &self.orphans_deleted),
            ("dtma_rollouts_halted_total", "Rollouts that stopped by themselves.", &self.rollouts_halted),
        ] {
            head(&mut page, name, "counter", help);
            line(&mut page, name, &[], counter.load(Ordering::Relaxed));
        }
        page
    }
}

const STATUSES: [EnvironmentStatus; 10] = [
    EnvironmentStatus::PendingProvision,
    EnvironmentStatus::Provisioning,
    EnvironmentStatus::AwaitingHeartbeat,
    EnvironmentStatus::Active,
    EnvironmentStatus::Unresponsive,
    EnvironmentStatus::ErrorProvisioning,
    EnvironmentStatus::PendingDeprovision,
    EnvironmentStatus::Deprovisioning,
    EnvironmentStatus::Deprovisioned,
    EnvironmentStatus::ErrorDeprovisioning,
];

// Writing to a String cannot fail.
fn head(page: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(page: &mut String, name: &str, labels: &[(&str, &str)], value: u64) {
    page.push_str(name);
    for (index, (label, text)) in labels.iter().enumerate() {
        let _ = write!(page, "{}{label}=\"{text}\"", if index == 0 { '{' } else { ',' });
    }
    let _ = writeln!(page, "{} {value}", if labels.is_empty() { "" } else { "}" });
}
