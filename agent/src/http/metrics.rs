//! `GET /metrics`: Prometheus text.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse as _, Response};

use super::App;
use super::table::{Content, Operation, Table};
use crate::backend::LinkState;
use crate::system;

pub(super) fn routes<T: Table>(table: T) -> T {
    table.get("/metrics", metrics, || {
        let text = Content::Text("text/plain");
        Operation::new("Figures for Prometheus").answer(200, "Prometheus' text format, version 0.0.4.", text)
    })
}

async fn metrics(State(app): State<App>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], exposition(&app)).into_response()
}

fn exposition(app: &App) -> String {
    let parts = app.parts();
    let snapshot = parts.instances.snapshot();
    let mut page = Page::default();
    page.one(
        "dtma_build_info",
        "gauge",
        "Always 1; the version is in the label",
        &[("version", crate::version())],
        1.0,
    );
    page.one(
        "dtma_started_at_seconds",
        "gauge",
        "When the agent started, Unix time",
        &[],
        parts.started_at.as_millisecond() as f64 / 1_000.0,
    );
    page.one("process_resident_memory_bytes", "gauge", "Memory of the agent", &[], system::resident_bytes() as f64);
    page.family("dtma_http_responses_total", "counter", "Requests answered, by class of status");
    for (class, count) in parts.gate.answered.by_class() {
        page.sample("dtma_http_responses_total", &[("class", class)], count as f64);
    }
    page.one(
        "dtma_refused_keys_total",
        "counter",
        "Requests that presented a wrong key",
        &[],
        parts.gate.callers.refused() as f64,
    );
    let open = parts.server.open_connections() as f64;
    page.one("dtma_connections_open", "gauge", "Connections open now", &[], open);
    let turned_away = parts.server.turned_away() as f64;
    page.one(
        "dtma_connections_turned_away_total",
        "counter",
        "Connections closed for being too many",
        &[],
        turned_away,
    );
    let (linked, taken, failing) = match &*parts.link.borrow() {
        LinkState::Offline | LinkState::Enrolling { .. } => (0, 0, 0),
        LinkState::Linked { taken, failing, .. } => (1, *taken, *failing),
    };
    page.one("dtma_enrolled", "gauge", "1 when the agent has a token of its own", &[], f64::from(linked));
    page.one("dtma_heartbeats_taken_total", "counter", "Heartbeats the backend took", &[], taken as f64);
    page.one("dtma_heartbeats_failing", "gauge", "Heartbeats that failed in a row", &[], f64::from(failing));
    let reachable = f64::from(u8::from(snapshot.engine.reachable));
    page.one("dtma_docker_reachable", "gauge", "1 when the Docker Engine answers", &[], reachable);
    page.one("dtma_passes_total", "counter", "Passes of the loop", &[], snapshot.pass.sequence as f64);
    let took = snapshot.pass.took.as_secs_f64();
    page.one("dtma_last_pass_seconds", "gauge", "How long the last pass took", &[], took);
    let short = f64::from(u8::from(parts.system.borrow().metrics.disk_pressure));
    page.one("dtma_disk_pressure", "gauge", "1 when a disk has less free than is kept in reserve", &[], short);
    let pruned = parts.instances.pruned();
    page.family("dtma_images_pruned_total", "counter", "Images removed because nobody needed them, by reason");
    page.sample("dtma_images_pruned_total", &[("reason", "age")], pruned.by_age as f64);
    page.sample("dtma_images_pruned_total", &[("reason", "disk_pressure")], pruned.for_room as f64);
    page.family("dtma_instances", "gauge", "Instances, by state and health");
    let mut counts = BTreeMap::<_, u32>::new();
    for view in &snapshot.instances {
        let word = |value: serde_json::Result<serde_json::Value>| {
            value.ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
        };
        let key = (word(serde_json::to_value(view.state)), word(serde_json::to_value(view.health)));
        *counts.entry(key).or_default() += 1;
    }
    for ((state, health), count) in counts {
        page.sample("dtma_instances", &[("state", &state), ("health", &health)], f64::from(count));
    }
    let egress = parts.instances.egress().figures();
    page.one(
        "dtma_egress_connections_open",
        "gauge",
        "Connections of instances to the egress proxy",
        &[],
        egress.open as f64,
    );
    page.family("dtma_egress_requests_total", "counter", "Requests to the egress proxy, by what became of them");
    for (outcome, count) in [("permitted", egress.permitted), ("refused", egress.refused), ("failed", egress.failed)] {
        page.sample("dtma_egress_requests_total", &[("outcome", outcome)], count as f64);
    }
    page.one(
        "dtma_egress_connections_turned_away_total",
        "counter",
        "Connections to the egress proxy closed for being too many",
        &[],
        egress.turned_away as f64,
    );
    let health = snapshot.health;
    page.family("dtma_probes_total", "counter", "Probes of MCP servers, by what came of them");
    for (result, count) in [("answered", health.answered), ("failed", health.failed), ("cannot_say", health.cannot_say)]
    {
        page.sample("dtma_probes_total", &[("result", result)], count as f64);
    }
    page.one(
        "dtma_hang_restarts_total",
        "counter",
        "Restarts of servers that hung, by the agent",
        &[],
        health.restarts as f64,
    );
    let looping = snapshot.instances.iter().filter(|view| view.crash_looping).count() as f64;
    page.one("dtma_instances_crash_looping", "gauge", "Instances whose process keeps ending", &[], looping);
    page.family("dtma_instance_restarts_total", "counter", "Restarts of an instance's container");
    for view in &snapshot.instances {
        let name = [("instance", view.instance_name_on_toolbox.as_str())];
        page.sample("dtma_instance_restarts_total", &name, view.restart_count as f64);
    }
    page.0
}

#[derive(Default)]
struct Page(String);

impl Page {
    fn one(&mut self, name: &str, kind: &str, what: &str, labels: &[(&str, &str)], value: f64) {
        self.family(name, kind, what);
        self.sample(name, labels, value);
    }

    fn family(&mut self, name: &str, kind: &str, what: &str) {
        // Writing to a string can't fail.
        let _ = writeln!(self.0, "# HELP {name} {what}\n# TYPE {name} {kind}");
    }

    /// Label values are versions, instance names and our own words: nothing that would need escaping.
    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}=\"{value}\"")).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let mut page = Page::default();
        page.one("a_total", "counter", "What", &[("x", "1"), ("y", "z")], 3.0);
        page.one("b", "gauge", "Else", &[], 0.5);
        assert_eq!(
            page.0,
            "# HELP a_total What\n# TYPE a_total counter\na_total{x=\"1\",y=\"z\"} 3\n# HELP b Else\n# TYPE b gauge\nb 0.5\n"
        );
    }
}
