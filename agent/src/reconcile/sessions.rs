//! Containers of sessions: servers on their standard input and output whose clients don't share a process have one for each session.
//!
//! Whoever has a session asks for its container here, and gives it back by dropping what it was given. That is intent like any other: it stands
//! in the book before the loop makes anything, and the loop alone makes and removes. It isn't written to the disk, on purpose: sessions are in
//! the agent's memory, so those of an agent that died are over, and an empty book says exactly that. What is found that stands in no book goes.
//!
//! [`plan`] compares, [`work`] acts.

pub(super) mod plan;
pub(super) mod work;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dtma_api::InstanceName;
use tokio::sync::{Notify, watch};

use crate::engine::ContainerId;
use crate::instance::SessionId;

/// Who wants a container for a session. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Sessions(Arc<Book>);

#[derive(Debug, Default)]
struct Book {
    wishes: Mutex<BTreeMap<SessionId, Entered>>,
    /// Rung when there is another wish, or one less.
    changed: Notify,
}

#[derive(Debug)]
struct Entered {
    wish: Wish,
    standing: watch::Sender<Standing>,
}

/// One session's wish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) session: SessionId,
    pub(super) instance: InstanceName,
    /// The instance's own container when the session began. The session lasts no longer than that is the one that serves.
    pub(super) beside: ContainerId,
    /// The instance may have so many containers of clients' sessions. None: it isn't one of those, and doesn't count.
    pub(super) most: Option<u16>,
    /// The session's container, once it runs.
    pub(super) container: Option<ContainerId>,
}

#[derive(Debug, Clone)]
enum Standing {
    Wanted,
    Runs(ContainerId),
    Over(String),
}

impl Sessions {
    /// Asks for a container for a new session with the server of `instance`, whose own container is `beside`. There will be no more than `most`
    /// of them; who comes when there are as many waits until one is gone. Without `most` it is a session of the agent itself for several
    /// clients, beyond those.
    pub fn ask(&self, instance: &InstanceName, beside: &ContainerId, most: Option<u16>) -> Place {
        let session = SessionId(uuid::Uuid::new_v4());
        let wish = Wish { session, instance: instance.clone(), beside: beside.clone(), most, container: None };
        let (standing, told) = watch::channel(Standing::Wanted);
        self.wishes().insert(session, Entered { wish, standing });
        self.0.changed.notify_one();
        Place { sessions: self.clone(), session, told }
    }

    /// How many clients' sessions with the instance's server have a container that runs.
    pub(super) fn count(&self, instance: &InstanceName) -> u32 {
        let wishes = self.wishes();
        let there = wishes.values().filter(|entered| &entered.wish.instance == instance);
        let counts = |wish: &Wish| wish.most.is_some() && wish.container.is_some();
        u32::try_from(there.filter(|entered| counts(&entered.wish)).count()).unwrap_or(u32::MAX)
    }

    pub(super) async fn changed(&self) {
        self.0.changed.notified().await;
    }

    pub(super) fn all(&self) -> Vec<Wish> {
        self.wishes().values().map(|entered| entered.wish.clone()).collect()
    }

    /// Whether somebody still wants it.
    pub(super) fn is_wanted(&self, session: SessionId) -> bool {
        self.wishes().contains_key(&session)
    }

    /// Its container runs.
    pub(super) fn runs(&self, session: SessionId, container: &ContainerId) {
        if let Some(entered) = self.wishes().get_mut(&session) {
            entered.wish.container = Some(container.clone());
            entered.standing.send_replace(Standing::Runs(container.clone()));
        }
    }

    /// It has no container any more, or gets none. Whoever has it is told why.
    pub(super) fn over(&self, session: SessionId, why: &str) {
        if let Some(entered) = self.wishes().remove(&session) {
            entered.standing.send_replace(Standing::Over(why.to_owned()));
        }
    }

    /// The same for all sessions with an instance's server.
    pub(super) fn all_over(&self, instance: &InstanceName, why: &str) {
        let its = self.all().into_iter().filter(|wish| &wish.instance == instance);
        its.for_each(|wish| self.over(wish.session, why));
    }

    fn wishes(&self) -> MutexGuard<'_, BTreeMap<SessionId, Entered>> {
        self.0.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a session has of the loop: a container, sooner or later. Dropped, it is given back.
#[derive(Debug)]
pub struct Place {
    sessions: Sessions,
    session: SessionId,
    told: watch::Receiver<Standing>,
}

impl Place {
    /// The container, as soon as it runs.
    ///
    /// # Errors
    /// When there is none to be had; the reason is for a person.
    pub async fn container(&mut self) -> Result<ContainerId, String> {
        let decided = self.told.wait_for(|standing| !matches!(standing, Standing::Wanted)).await;
        match decided.map(|standing| standing.clone()) {
            Ok(Standing::Runs(container)) => Ok(container),
            Ok(Standing::Over(why)) => Err(why),
            Ok(Standing::Wanted) | Err(_) => Err("the agent is ending".to_owned()),
        }
    }

    /// Answers when the container is taken away, with the reason.
    pub async fn over(&mut self) -> String {
        let over = self.told.wait_for(|standing| matches!(standing, Standing::Over(_))).await;
        match over.map(|standing| standing.clone()) {
            Ok(Standing::Over(why)) => why,
            Ok(Standing::Wanted | Standing::Runs(_)) | Err(_) => "the agent is ending".to_owned(),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.sessions.wishes().remove(&self.session).is_some() {
            self.sessions.0.changed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_wish_stands_in_the_book_until_its_place_is_dropped_or_taken_away() {
        let (sessions, name) = (Sessions::default(), "one".parse().unwrap());
        let (main, own) = (ContainerId("main".into()), ContainerId("own".into()));
        let mut place = sessions.ask(&name, &main, Some(2));
        let other = sessions.ask(&"two".parse().unwrap(), &main, Some(2));
        let wish = sessions.all().into_iter().find(|wish| wish.instance == name).unwrap();
        assert_eq!((wish.beside, wish.container, sessions.count(&name)), (main, None, 0));
        assert!(place.container().now_or_never().is_none(), "nobody has made it yet");
        sessions.runs(wish.session, &own);
        assert_eq!((place.container().await, sessions.count(&name)), (Ok(own), 1));
        assert!(place.over().now_or_never().is_none());
        sessions.all_over(&name, "it is gone");
        assert_eq!((place.over().await.as_str(), sessions.count(&name)), ("it is gone", 0));
        assert!(!sessions.is_wanted(wish.session));
        assert_eq!(sessions.all().len(), 1, "the other's stays");
        drop(place);
        sessions.changed().await;
        drop(other);
        sessions.changed().await;
        assert_eq!(sessions.all(), []);
    }
}
