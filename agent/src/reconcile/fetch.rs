//! Seeing that an instance's image is there, and writing down which images the agent brought.

use std::collections::BTreeSet;
use std::sync::Arc;

use dtma_api::instance::{Progress, PullPolicy};
use jiff::{SignedDuration, Timestamp};

use super::failure::{Meaning, meaning};
use super::work::{Stop, Work};
use crate::engine::{EngineError, Image};
use crate::instance::{Failure, FailureKind, ImageReference, RegistryCredentials, Spec, State};
use crate::store::ledger::PulledImage;

/// A record of an image used no longer ago than this is left as it is: each change of it is a write.
const RECENT: SignedDuration = SignedDuration::from_hours(12);

impl Work {
    /// Sees that the image is there; its digest.
    pub(super) async fn fetch(&self) -> Result<Option<String>, Stop> {
        let engine = &self.shared.engine;
        let spec = self.spec();
        let image = &spec.image;
        let policy = spec.pull_policy;
        self.shared.prune.spared(&image.familiar()).await;
        if policy != PullPolicy::Always {
            match engine.image(image).await {
                Ok(Some(found)) => return Ok(found.digest),
                Ok(None) => {}
                Err(error) => return Err(self.explain(&error).await),
            }
        }
        if policy == PullPolicy::Never {
            let message = format!("the image {image} is not on the droplet, and pullPolicy is never");
            return Err(Stop::Failed(Failure::new(FailureKind::ImageNotFound, message)));
        }
        self.enter(State::Pulling, "pulling", format!("pulling {image}"));
        let _permit = tokio::select! {
            permit = self.gates.pulls.acquire() => permit,
            () = self.cancel.cancelled() => return Err(Stop::LookAgain),
        };
        self.room().await?;
        let before = match engine.images().await {
            Ok(held) => held.into_iter().map(|image| image.id).collect(),
            Err(error) => return Err(self.explain(&error).await),
        };
        let credentials = self.shared.desk().await.credentials(self.name());
        let tell = |progress: Progress| {
            self.shared.journal.pulling(self.name(), format!("pulling {image}"), progress);
        };
        // Dropping a pull is safe: the engine keeps the layers it has, and the next pull goes on from there.
        let pulled = tokio::select! {
            pulled = engine.pull(image, credentials.as_deref(), &tell) => pulled,
            () = self.cancel.cancelled() => return Err(Stop::LookAgain),
        };
        if let Err(error) = pulled {
            return Err(self.explain_pull(&error, credentials, spec).await);
        }
        match engine.image(image).await {
            Ok(Some(found)) => {
                self.record(image, &found, &before).await;
                Ok(found.digest)
            }
            Ok(None) => Err(Stop::LookAgain),
            Err(error) => Err(self.explain(&error).await),
        }
    }

    /// Sees that there is room for another image; what nobody uses goes first.
    async fn room(&self) -> Result<(), Stop> {
        if self.shared.short_disk().await.is_none() {
            return Ok(());
        }
        let removed = match self.shared.make_room().await {
            Ok(removed) => removed,
            Err(error) => return Err(self.explain(&error).await),
        };
        let Some(room) = self.shared.disks.short() else { return Ok(()) };
        let message = format!(
            "the droplet has too little disk space for another image: {room}; {removed} unused images were removed just now. Remove instances, \
             or volumes, that are not needed, or use a larger droplet"
        );
        Err(Stop::Failed(Failure::new(FailureKind::NoSpace, message)))
    }

    /// An image that wasn't on the host before is the agent's to remove one day. Should the agent die right here it stays for good, as
    /// somebody else's would.
    async fn record(&self, image: &ImageReference, found: &Image, before: &BTreeSet<String>) {
        let (id, reference, now) = (found.id.clone(), image.familiar(), Timestamp::now());
        let known = self.shared.desk().await.contents().images.get(&id).cloned();
        match known {
            None if before.contains(&id) => return,
            Some(record) if record.references.contains(&reference) && now.duration_since(record.last_used) < RECENT => {
                return;
            }
            None | Some(_) => {}
        }
        self.shared
            .note_quietly(move |contents| {
                let record = contents
                    .images
                    .entry(id)
                    .or_insert_with(|| PulledImage { references: BTreeSet::new(), last_used: now });
                record.references.insert(reference);
                record.last_used = now;
            })
            .await;
    }

    /// Why a pull failed. A registry that wants credentials and isn't shown any may only lack those that were given once.
    async fn explain_pull(
        &self,
        error: &EngineError,
        credentials: Option<Arc<RegistryCredentials>>,
        spec: &Spec,
    ) -> Stop {
        let lost = credentials.is_none() && self.shared.desk().await.contents().with_credentials.contains(self.name());
        match meaning(error, spec) {
            Meaning::Failed(mut failure)
                if lost && matches!(failure.kind, FailureKind::PullDenied | FailureKind::ImageNotFound) =>
            {
                failure.kind = FailureKind::PullDenied;
                failure.message.push_str(
                    ". It was deployed with registry credentials, which are kept in memory only and were lost when the agent was \
                     restarted; repeat the deploy, with the same body, registryCredentials included",
                );
                Stop::Failed(failure)
            }
            Meaning::Failed(_) | Meaning::LookAgain | Meaning::NameTaken | Meaning::PortTaken(_) => {
                self.explain(error).await
            }
        }
    }
}
