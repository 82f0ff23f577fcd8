//! Writes the agent's vitals every second, by which the updater judges a version on trial, and its last word when it ends in order.

use std::collections::BTreeSet;

use dtma_agent::backend::LinkState;
use dtma_agent::reconcile::Instances;
use dtma_agent::update::Places;
use dtma_agent::update::vitals::{EVERY, Vitals};
use dtma_agent::version;
use jiff::Timestamp;
use tokio::sync::watch;

/// What the vitals are read from.
pub(crate) struct VitalSigns {
    places: Places,
    instances: Instances,
    link: watch::Receiver<LinkState>,
    port: u16,
    reports: bool,
    /// The instances there were before anybody could call; none until all are known.
    found: Option<BTreeSet<String>>,
    /// Said once; a folder that isn't there won't be there a second later.
    silent: bool,
}

impl VitalSigns {
    /// Before the agent listens: what is found now was there before.
    pub(crate) fn new(instances: Instances, link: watch::Receiver<LinkState>, port: u16, reports: bool) -> Self {
        let found = names_if_complete(&instances);
        Self { places: Places::default(), instances, link, port, reports, found, silent: false }
    }

    /// Writes for as long as it is polled.
    pub(crate) async fn run(&mut self) {
        // Where systemd made no folder for them nobody reads them, either.
        if !self.places.agent_run.is_dir() {
            return std::future::pending().await;
        }
        let mut ticks = tokio::time::interval(EVERY);
        loop {
            ticks.tick().await;
            self.note(|vitals, places| vitals.write(places));
        }
    }

    /// The last word.
    pub(crate) fn end(&mut self) {
        if self.places.agent_run.is_dir() {
            self.note(|vitals, places| vitals.write_last(places));
        }
    }

    fn note(&mut self, write: impl FnOnce(&Vitals, &Places) -> std::io::Result<()>) {
        if self.found.is_none() {
            self.found = names_if_complete(&self.instances);
        }
        let written = write(&self.vitals(), &self.places);
        if let Err(error) = &written
            && !self.silent
        {
            tracing::warn!(%error, "the agent's vitals can't be written; an update could not be judged");
        }
        self.silent = written.is_err();
    }

    fn vitals(&self) -> Vitals {
        let names = names_if_complete(&self.instances);
        let (heartbeats_taken, heartbeats_failing) = match &*self.link.borrow() {
            LinkState::Linked { taken, failing, .. } => (*taken, u64::from(*failing)),
            LinkState::Offline | LinkState::Enrolling { .. } => (0, 0),
        };
        Vitals {
            pid: std::process::id(),
            version: version().to_owned(),
            written_at: Timestamp::now(),
            port: self.port,
            docker_reachable: self.instances.engine_status().reachable,
            reports: self.reports,
            heartbeats_taken,
            heartbeats_failing,
            complete: names.is_some(),
            instances: names.unwrap_or_default(),
            found: self.found.clone(),
        }
    }
}

fn names_if_complete(instances: &Instances) -> Option<BTreeSet<String>> {
    let snapshot = instances.snapshot();
    snapshot.complete.then(|| snapshot.instances.iter().map(|view| view.instance_name_on_toolbox.to_string()).collect())
}
