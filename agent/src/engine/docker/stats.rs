//! What containers use, from Docker's own figures.

use std::collections::HashMap;

use bollard::Docker;
use bollard::models::{ContainerBlkioStatEntry, ContainerMemoryStats, ContainerStatsResponse};
use bollard::query_parameters::StatsOptionsBuilder;
use futures_util::StreamExt as _;
use jiff::Timestamp;

use super::errors::{is_conflict, is_missing, sort};
use crate::engine::{ContainerId, EngineError, Usage};

/// One reading, which Docker answers at once (20.10 within a second). Nothing when the container doesn't run, or when Docker can't read its control groups, which
/// it answers in the same way.
pub(super) async fn read(docker: &Docker, id: &ContainerId) -> Result<Option<Usage>, EngineError> {
    const OPERATION: &str = "read a container's figures";
    // Without `one-shot` Docker would take a second reading of its own, a second or two later.
    let options = StatsOptionsBuilder::new().stream(false).one_shot(true).build();
    let mut answers = std::pin::pin!(docker.stats(id.as_str(), Some(options)));
    match answers.next().await {
        Some(Ok(answer)) => Ok(usage(&answer)),
        Some(Err(error)) if is_missing(&error) || is_conflict(&error) => Ok(None),
        Some(Err(error)) => Err(sort(OPERATION, error)),
        None => Err(EngineError::Unavailable { operation: OPERATION, source: "the answer broke off".into() }),
    }
}

/// Of what Docker can't read it tells nothing but zeroes, at no time.
fn usage(answer: &ContainerStatsResponse) -> Option<Usage> {
    let at = answer.read.as_ref()?.to_string().parse::<Timestamp>().ok().filter(|at| at.as_second() > 0)?;
    let memory = answer.memory_stats.as_ref();
    let pids = answer.pids_stats.as_ref().and_then(|pids| pids.current).unwrap_or(0);
    let cpu_nanos = answer.cpu_stats.as_ref().and_then(|cpu| cpu.cpu_usage.as_ref()?.total_usage).unwrap_or(0);
    if pids == 0 && cpu_nanos == 0 {
        return None;
    }
    let networks = answer.networks.iter().flat_map(HashMap::values);
    let received = networks.clone().filter_map(|network| network.rx_bytes);
    let sent = networks.filter_map(|network| network.tx_bytes);
    let blocks = answer.blkio_stats.as_ref().and_then(|blocks| blocks.io_service_bytes_recursive.as_deref());
    Some(Usage {
        at,
        cpu_nanos,
        memory_bytes: memory.map_or(0, without_cache),
        memory_limit_bytes: memory.and_then(|memory| memory.limit).unwrap_or(0),
        network_rx_bytes: received.fold(0, u64::saturating_add),
        network_tx_bytes: sent.fold(0, u64::saturating_add),
        block_read_bytes: moved(blocks, "read"),
        block_write_bytes: moved(blocks, "write"),
        pids,
    })
}

/// What is in use less the file cache that nobody has used lately, as `docker stats` has it. Control groups v1 and v2 call that differently.
fn without_cache(memory: &ContainerMemoryStats) -> u64 {
    let usage = memory.usage.unwrap_or(0);
    let figure = |name: &str| memory.stats.as_ref().and_then(|stats| stats.get(name)).copied();
    let cache = figure("total_inactive_file").or_else(|| figure("inactive_file")).filter(|cache| *cache < usage);
    usage.saturating_sub(cache.unwrap_or(0))
}

/// Bytes over all disks; the word for it is `Read` with control groups v1 and `read` with v2.
fn moved(entries: Option<&[ContainerBlkioStatEntry]>, way: &str) -> u64 {
    let this_way = |entry: &&ContainerBlkioStatEntry| {
        entry.op.as_deref().is_some_and(|operation| operation.eq_ignore_ascii_case(way))
    };
    let bytes = entries.unwrap_or_default().iter().filter(this_way).filter_map(|entry| entry.value);
    bytes.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(answer: Value) -> Option<Usage> {
        usage(&serde_json::from_value(answer).unwrap())
    }

    /// With control groups v1, as Docker 20.10 answers on Debian 12 when told so, shortened.
    fn version_1() -> Value {
        json!({
            "read": "2026-01-02T03:04:05.123456789Z", "preread": "0001-01-01T00:00:00Z",
            "pids_stats": { "current": 2 },
            "blkio_stats": { "io_service_bytes_recursive": [
                { "major": 254, "minor": 0, "op": "Read", "value": 4096 },
                { "major": 254, "minor": 0, "op": "Write", "value": 512 },
                { "major": 8, "minor": 0, "op": "Read", "value": 4 },
                { "major": 254, "minor": 0, "op": "Total", "value": 4608 },
            ]},
            "cpu_stats": { "cpu_usage": { "total_usage": 77, "usage_in_kernelmode": 1 } },
            "memory_stats": { "usage": 1000, "max_usage": 2000, "limit": 4000,
                "stats": { "cache": 500, "inactive_file": 1, "total_inactive_file": 300 } },
            "networks": { "eth0": { "rx_bytes": 10, "tx_bytes": 20 }, "eth1": { "rx_bytes": 1, "tx_bytes": 2 } },
        })
    }

    #[test]
    fn version_1_of_control_groups_is_understood() {
        let usage = read(version_1()).unwrap();
        assert_eq!((usage.cpu_nanos, usage.pids), (77, 2));
        assert_eq!((usage.memory_bytes, usage.memory_limit_bytes), (700, 4000));
        assert_eq!((usage.network_rx_bytes, usage.network_tx_bytes), (11, 22));
        assert_eq!((usage.block_read_bytes, usage.block_write_bytes), (4100, 512));
        assert_eq!(usage.at.to_string(), "2026-01-02T03:04:05.123456789Z");
    }

    #[test]
    fn version_2_of_control_groups_is_understood() {
        let mut answer = version_1();
        answer["memory_stats"] =
            json!({ "usage": 1000, "limit": 4000, "stats": { "file": 500, "inactive_file": 200 } });
        answer["blkio_stats"]["io_service_bytes_recursive"] = json!([{ "major": 8, "minor": 0, "op": "read", "value": 5 }, { "major": 8, "minor": 0, "op": "write", "value": 6 }]);
        let usage = read(answer).unwrap();
        assert_eq!((usage.memory_bytes, usage.block_read_bytes, usage.block_write_bytes), (800, 5, 6));
    }

    #[test]
    fn what_is_not_told_is_nothing_and_a_container_that_does_not_run_uses_nothing() {
        let mut bare = json!({ "read": "2026-01-02T03:04:05Z", "pids_stats": { "current": 1 } });
        bare["blkio_stats"] = json!({ "io_service_bytes_recursive": null });
        assert_eq!(read(bare).unwrap().block_read_bytes, 0);
        assert_eq!(read(json!({ "read": "0001-01-01T00:00:00Z", "pids_stats": {}, "cpu_stats": {} })), None);
        assert_eq!(read(json!({ "read": "2026-01-02T03:04:05Z", "pids_stats": {}, "cpu_stats": {} })), None);
    }
}
