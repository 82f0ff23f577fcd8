//! Figures of the droplet, sampled in the background so that asking for them costs nothing.

use std::sync::Arc;
use std::time::Duration;

use dtma_api::status::{DiskMetrics, MemoryMetrics, SystemMetrics};
use sysinfo::{Disk, DiskRefreshKind};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use crate::disks::Disks;

/// Time between two samples; also the span `cpu_load_percent` is taken over.
const INTERVAL: Duration = Duration::from_secs(5);

/// Everything one sample tells.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// What `/status` and heartbeats show.
    pub metrics: SystemMetrics,
    /// Load averages over 1, 5 and 15 minutes.
    pub load_average: [f64; 3],
    /// Seconds since the droplet started.
    pub uptime_seconds: u64,
}

/// Takes a first sample, and one every few seconds for as long as somebody holds the receiver.
pub fn start(disks: Arc<Disks>) -> watch::Receiver<Sample> {
    let mut sampler = Sampler::new(disks);
    let (sender, receiver) = watch::channel(sampler.sample());
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = sender.closed() => return,
            }
            // A few reads of /proc and one statvfs: too little to be worth a thread.
            sender.send_replace(sampler.sample());
        }
    });
    receiver
}

/// The kernel's release, as `uname -r` prints it.
pub fn kernel() -> Option<String> {
    sysinfo::System::kernel_version().ok()
}

/// Memory of this process that is in RAM; 0 where the kernel doesn't tell.
pub fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes: Option<u64> = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    kibibytes.unwrap_or_default() * 1024
}

struct Sampler {
    system: Option<sysinfo::System>,
    disk: Option<Disk>,
    disks: Arc<Disks>,
}

impl Sampler {
    fn new(watched: Arc<Disks>) -> Self {
        let disks = sysinfo::Disks::new_with_refreshed_list_specifics(DiskRefreshKind::nothing().with_storage()).ok();
        let holds_state = |disk: &Disk| watched.state_dir().starts_with(disk.mount_point());
        let disk = disks
            .map(Vec::from)
            .unwrap_or_default()
            .into_iter()
            .filter(holds_state)
            .max_by_key(|disk| disk.mount_point().as_os_str().len());
        Self { system: sysinfo::System::new().ok(), disk, disks: watched }
    }

    fn sample(&mut self) -> Sample {
        let mut sample = Sample::default();
        if let Some(system) = &mut self.system {
            system.refresh_cpu_usage();
            system.refresh_memory();
            // One decimal is all a person reads, and keeps the JSON short.
            sample.metrics.cpu_load_percent = (f64::from(system.global_cpu_usage()) * 10.0).round() / 10.0;
            sample.metrics.memory = MemoryMetrics {
                total_bytes: system.total_memory(),
                active_bytes: system.total_memory().saturating_sub(system.available_memory()),
                free_bytes: system.free_memory(),
                used_bytes: system.used_memory(),
            };
        }
        if let Some(disk) = &mut self.disk {
            disk.refresh_specifics(DiskRefreshKind::nothing().with_storage());
            sample.metrics.disk = DiskMetrics {
                mount: disk.mount_point().to_string_lossy().into_owned(),
                total_bytes: disk.total_space(),
                used_bytes: disk.total_space().saturating_sub(disk.available_space()),
                free_bytes: disk.available_space(),
            };
        }
        let docker_room = self.disks.docker_room();
        // The same disk has the same size and, but for a moment's change, the same room.
        let other = docker_room.filter(|room| room.total != sample.metrics.disk.total_bytes);
        sample.metrics.docker_disk = other.map(|room| DiskMetrics {
            mount: room.folder.to_string_lossy().into_owned(),
            total_bytes: room.total,
            used_bytes: room.total.saturating_sub(room.free),
            free_bytes: room.free,
        });
        sample.metrics.disk_pressure = self.disks.short().is_some();
        if let Ok(load) = sysinfo::System::load_average() {
            sample.load_average = [load.one, load.five, load.fifteen];
        }
        sample.uptime_seconds = sysinfo::System::uptime().unwrap_or_default();
        sample
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::disks::Reserve;

    #[test]
    fn a_sample_adds_up() {
        let directory = tempfile::tempdir().unwrap();
        let disks = Arc::new(Disks::new(directory.path(), Reserve { bytes: 0, percent: 0 }));
        let mut sampler = Sampler::new(Arc::clone(&disks));
        sampler.sample();
        let sample = sampler.sample();
        let memory = sample.metrics.memory;
        assert!(memory.total_bytes > 0 && memory.used_bytes <= memory.total_bytes, "{memory:?}");
        let disk = sample.metrics.disk;
        assert!(directory.path().starts_with(&disk.mount), "{disk:?}");
        assert!(disk.total_bytes > 0 && disk.used_bytes + disk.free_bytes == disk.total_bytes, "{disk:?}");
        assert!((0.0..=100.0).contains(&sample.metrics.cpu_load_percent));
        assert!(!sample.metrics.disk_pressure && sample.metrics.docker_disk.is_none());
        assert!(sample.uptime_seconds > 0 && kernel().is_some() && resident_bytes() > 0);
    }

    #[test]
    fn a_sample_tells_of_a_disk_that_is_short_and_of_docker_s_own_disk() {
        let directory = tempfile::tempdir().unwrap();
        let measure = |folder: &Path| Some(if folder.ends_with("docker") { (1_000, 10) } else { (2_000, 2_000) });
        let disks = Disks::measured_by(directory.path(), Reserve { bytes: 0, percent: 5 }, measure);
        disks.learn_data_root("/docker".into());
        let metrics = Sampler::new(Arc::new(disks)).sample().metrics;
        let docker = metrics.docker_disk.unwrap();
        assert_eq!((docker.mount.as_str(), docker.total_bytes, docker.free_bytes), ("/docker", 1_000, 10));
        assert!(metrics.disk_pressure);
    }

    #[tokio::test(start_paused = true)]
    async fn samples_are_taken_over_and_over() {
        let mut samples = start(Arc::new(Disks::new(Path::new("/"), Reserve::default())));
        for _ in 0..3 {
            samples.changed().await.unwrap();
        }
    }
}
