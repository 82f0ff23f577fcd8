//! What a container uses.

use dtma_api::usage::ResourceUsage;
use jiff::Timestamp;

/// What a running container has used, as its engine counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// When this was read, by the engine's clock.
    pub at: Timestamp,
    /// Processor time since its start, nanoseconds, over all cores.
    pub cpu_nanos: u64,
    /// Memory in use, bytes, without files that are only cached.
    pub memory_bytes: u64,
    /// The most it may use, bytes.
    pub memory_limit_bytes: u64,
    /// Received since its start, bytes.
    pub network_rx_bytes: u64,
    /// Sent since its start, bytes.
    pub network_tx_bytes: u64,
    /// Read from disks since its start, bytes.
    pub block_read_bytes: u64,
    /// Written to disks since its start, bytes.
    pub block_write_bytes: u64,
    /// Processes and threads now.
    pub pids: u64,
}

impl Usage {
    /// As callers are shown it; how busy its processors are comes from the difference to what was read `before`.
    pub fn shown(&self, before: Option<&Self>) -> ResourceUsage {
        ResourceUsage {
            at: self.at,
            cpu_percent: before.and_then(|before| self.cpu_percent(before)),
            memory_usage_bytes: self.memory_bytes,
            memory_limit_bytes: self.memory_limit_bytes,
            network_rx_bytes: self.network_rx_bytes,
            network_tx_bytes: self.network_tx_bytes,
            block_read_bytes: self.block_read_bytes,
            block_write_bytes: self.block_write_bytes,
            pids: self.pids,
        }
    }

    /// Nothing, when the container was started anew in between, or no time has passed.
    fn cpu_percent(&self, before: &Self) -> Option<f64> {
        let worked = self.cpu_nanos.checked_sub(before.cpu_nanos)? as f64;
        let passed = self.at.duration_since(before.at).as_nanos();
        if passed <= 0 {
            return None;
        }
        let percent = worked / passed as f64 * 100.0;
        // One decimal is all a person reads, and keeps the JSON short.
        Some((percent * 10.0).round() / 10.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(millis: i64, cpu_nanos: u64) -> Usage {
        Usage {
            at: Timestamp::from_millisecond(millis).unwrap(),
            cpu_nanos,
            memory_bytes: 1,
            memory_limit_bytes: 2,
            network_rx_bytes: 3,
            network_tx_bytes: 4,
            block_read_bytes: 5,
            block_write_bytes: 6,
            pids: 7,
        }
    }

    #[test]
    fn how_busy_the_processors_are_is_the_difference_of_two_readings() {
        let percent = |before: &Usage, after: &Usage| after.shown(Some(before)).cpu_percent;
        let first = usage(1_000, 5_000_000_000);
        assert_eq!(percent(&first, &usage(3_000, 6_000_000_000)), Some(50.0));
        assert_eq!(percent(&first, &usage(2_000, 7_500_000_000)), Some(250.0), "two and a half cores");
        assert_eq!(percent(&first, &usage(2_000, 1_000)), None, "it was started anew");
        assert_eq!(percent(&first, &usage(1_000, 6_000_000_000)), None, "the same moment");
        assert_eq!(percent(&first, &usage(500, 6_000_000_000)), None, "the clock went back");
        assert_eq!(first.shown(None).cpu_percent, None);
    }
}
