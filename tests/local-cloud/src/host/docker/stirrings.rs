//! What droplets do of themselves: reboot, power off, end; and the tags they are given later, which a container's labels can't take.

use std::collections::HashMap;

use bollard::Docker;
use bollard::models::{ContainerState, EventMessage};
use bollard::query_parameters::EventsOptionsBuilder;
use futures_util::future;
use futures_util::stream::{BoxStream, StreamExt as _};
use jiff::Timestamp;

use super::{DROPLET_LABEL, STACK_LABEL};
use crate::droplet::DropletId;
use crate::host::Vitals;

/// Where a droplet's tags are, in the droplet itself: they go when it goes.
pub(super) const TAGS_FILE: &str = "/var/lib/dtma-local-cloud/tags.json";

/// How a container ends whose init asks the kernel for a reboot: by SIGHUP. One that asks to be powered off is ended by SIGINT.
const REBOOT: i64 = 128 + 1;

/// Droplets of `stack` whose containers start or end from now on.
pub(super) fn stirrings<'a>(docker: &'a Docker, stack: &str) -> BoxStream<'a, DropletId> {
    let filters = HashMap::from([
        ("type", vec!["container".to_owned()]),
        ("event", vec!["start".to_owned(), "die".to_owned()]),
        ("label", vec![format!("{STACK_LABEL}={stack}")]),
    ]);
    // The request goes out when the stream is first read; what happens until then counts too.
    let since = Timestamp::now().as_second().to_string();
    let options = EventsOptionsBuilder::default().since(&since).filters(&filters).build();
    docker
        .events(Some(options))
        .take_while(|event| future::ready(event.is_ok()))
        .filter_map(|event| future::ready(event.ok().and_then(whose)))
        .boxed()
}

fn whose(event: EventMessage) -> Option<DropletId> {
    event.actor?.attributes?.get(DROPLET_LABEL)?.parse().ok().map(DropletId)
}

/// What a container's state says of its droplet.
pub(super) fn vitals(state: Option<&ContainerState>) -> Vitals {
    match state {
        Some(state) if state.running == Some(true) => Vitals::Running,
        Some(state) if state.exit_code == Some(REBOOT) => Vitals::Rebooting,
        Some(_) | None => Vitals::Off,
    }
}

/// The same, from what a list of containers says in words.
pub(super) fn rebooting(status: Option<&str>) -> bool {
    status.is_some_and(|status| status.starts_with(&format!("Exited ({REBOOT})")))
}

/// The tags as a file to unpack in the droplet.
pub(super) fn tags_archive(tags: &[String]) -> std::io::Result<Vec<u8>> {
    let text = serde_json::to_vec(tags)?;
    let mut header = tar::Header::new_ustar();
    header.set_size(text.len() as u64);
    header.set_mode(0o600);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, TAGS_FILE.trim_start_matches('/'), text.as_slice())?;
    archive.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reboot_is_told_from_every_other_end() {
        let state = |running, exit_code| ContainerState {
            running: Some(running),
            exit_code: Some(exit_code),
            ..ContainerState::default()
        };
        assert_eq!(vitals(Some(&state(true, 0))), Vitals::Running);
        assert_eq!(vitals(Some(&state(false, 129))), Vitals::Rebooting);
        for code in [0, 130, 137] {
            assert_eq!(vitals(Some(&state(false, code))), Vitals::Off);
        }
        assert!(rebooting(Some("Exited (129) 3 seconds ago")) && !rebooting(Some("Exited (137) 1 second ago")));
    }
}
