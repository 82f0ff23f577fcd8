//! Tells systemd that the agent lives, as long as what matters turns: the runtime (or this wouldn't run), the listener, the loop.

use std::time::Duration;

use dtma_agent::http::server::ServerState;
use dtma_agent::reconcile::Instances;
use jiff::Timestamp;
use sd_notify::NotifyState;

/// The listener turns every second.
const LISTENER_LIMIT: Duration = Duration::from_secs(10);
/// The loop looks around every 30 s, but a Docker Engine that hangs may hold it up for minutes, and ending the agent wouldn't cure that.
const LOOP_LIMIT_SECONDS: i64 = 600;

/// Pings for as long as it is polled, where systemd asked for it.
pub(crate) async fn run(instances: Instances, server: ServerState) {
    let Some(within) = sd_notify::watchdog_enabled() else { return };
    let started = Timestamp::now();
    let mut ticks = tokio::time::interval(within / 3);
    loop {
        ticks.tick().await;
        let last_pass = instances.snapshot().pass.at.unwrap_or(started);
        let pass_age_seconds = Timestamp::now().as_second() - last_pass.as_second();
        let listener_silent = server.since_last_turn();
        if listener_silent > LISTENER_LIMIT || pass_age_seconds > LOOP_LIMIT_SECONDS {
            tracing::error!(?listener_silent, pass_age_seconds, "THE AGENT HANGS; systemd is left to start it again");
            continue;
        }
        if let Err(error) = sd_notify::notify(&[NotifyState::Watchdog]) {
            tracing::warn!(%error, "systemd could not be told that the agent lives");
        }
    }
}
