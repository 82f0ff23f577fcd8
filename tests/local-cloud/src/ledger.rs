//! Everything the cloud knows, in memory: droplets, actions, tags and the numbers not yet given out. Pure, given `now`.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use crate::action::{Action, ActionId, ActionKind, Progress};
use crate::droplet::{Droplet, DropletId, Lag};
use crate::host::{Found, Record};
use crate::order::Order;

/// Which droplets a list is about.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Filter {
    /// Every one.
    #[default]
    All,
    /// Those with a tag.
    Tag(String),
    /// Those with a name.
    Name(String),
}

/// What [`Ledger`] holds, behind one lock.
#[derive(Debug)]
pub struct Ledger {
    droplets: BTreeMap<DropletId, Droplet>,
    actions: BTreeMap<ActionId, Action>,
    tags: BTreeSet<String>,
    next_droplet: u64,
    next_action: u64,
    droplet_limit: usize,
    lag: Lag,
}

/// More droplets than the account may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("creating this/these droplet(s) will exceed your droplet limit")]
pub struct OverLimit;

/// Where the numbers given out begin: sixteen a second since then, so that a cloud started anew never repeats one of a droplet that is
/// gone and that somebody may still ask for.
const NUMBERS_BEGIN: i64 = 1_735_689_600;

impl Ledger {
    /// A ledger that knows of `found`.
    pub fn new(found: Vec<Found>, droplet_limit: usize, lag: Lag, now: Timestamp) -> Self {
        let first = u64::try_from(now.as_second().saturating_sub(NUMBERS_BEGIN)).unwrap_or(1) * 16;
        let beyond = found.iter().map(|found| found.record.id.0 + 1).max().unwrap_or(1);
        Self {
            tags: found.iter().flat_map(|found| found.record.tags.iter().cloned()).collect(),
            droplets: found.into_iter().map(|found| (found.record.id, Droplet::found(found))).collect(),
            actions: BTreeMap::new(),
            next_droplet: first.max(beyond),
            next_action: first,
            droplet_limit,
            lag,
        }
    }

    /// How far what is shown lags behind.
    pub fn lag(&self) -> Lag {
        self.lag
    }

    /// Droplets the account may have.
    pub fn droplet_limit(&self) -> usize {
        self.droplet_limit
    }

    /// Accepts an order: one new droplet and one action for each name.
    ///
    /// # Errors
    /// When the account would have too many; nothing is made then.
    pub fn accept(&mut self, order: &Order, now: Timestamp) -> Result<Vec<(Droplet, Action)>, OverLimit> {
        if self.droplets.len() + order.names.len() > self.droplet_limit {
            return Err(OverLimit);
        }
        self.tags.extend(order.tags.iter().cloned());
        let mut accepted = Vec::new();
        for name in &order.names {
            let record = Record {
                id: DropletId(self.next_droplet),
                name: name.clone(),
                region: order.region.clone(),
                size: order.size.clone(),
                image: order.image.clone(),
                tags: order.tags.clone(),
                created_at: now,
            };
            self.next_droplet += 1;
            let action = self.note(ActionKind::Create, record.id, record.region.clone(), now);
            let droplet = Droplet::accepted(record, action.id, self.lag);
            self.droplets.insert(droplet.record.id, droplet.clone());
            accepted.push((droplet, action));
        }
        Ok(accepted)
    }

    /// Writes down a new action.
    pub fn note(&mut self, kind: ActionKind, droplet: DropletId, region: String, now: Timestamp) -> Action {
        let id = self.next_action_id();
        self.next_action += 1;
        let action = Action { id, kind, droplet, region, started_at: now, progress: Progress::InProgress };
        self.actions.insert(id, action.clone());
        action
    }

    /// The number the next action gets.
    pub fn next_action_id(&self) -> ActionId {
        ActionId(self.next_action)
    }

    /// Writes down how an action ended.
    pub fn close(&mut self, action: ActionId, progress: Progress) {
        if let Some(action) = self.actions.get_mut(&action) {
            action.progress = progress;
        }
    }

    /// One action.
    pub fn action(&self, id: ActionId) -> Option<&Action> {
        self.actions.get(&id)
    }

    /// Every action, newest first; of one droplet if asked.
    pub fn actions(&self, droplet: Option<DropletId>) -> Vec<&Action> {
        let wanted = |action: &&Action| droplet.is_none_or(|droplet| action.droplet == droplet);
        self.actions.values().rev().filter(wanted).collect()
    }

    /// One droplet.
    pub fn droplet(&self, id: DropletId) -> Option<&Droplet> {
        self.droplets.get(&id)
    }

    /// One droplet, to change it.
    pub fn droplet_mut(&mut self, id: DropletId) -> Option<&mut Droplet> {
        self.droplets.get_mut(&id)
    }

    /// Forgets a droplet.
    pub fn forget(&mut self, id: DropletId) {
        self.droplets.remove(&id);
    }

    /// Every droplet's number.
    pub fn ids(&self) -> Vec<DropletId> {
        self.droplets.keys().copied().collect()
    }

    /// Droplets in the order of their creation, whether lists show them yet or not.
    pub fn all(&self, filter: &Filter) -> Vec<&Droplet> {
        self.droplets
            .values()
            .filter(|droplet| match filter {
                Filter::All => true,
                Filter::Tag(tag) => droplet.record.tags.contains(tag),
                Filter::Name(name) => droplet.record.name == *name,
            })
            .collect()
    }

    /// Droplets a list shows at `now`.
    pub fn listed(&self, filter: &Filter, now: Timestamp) -> Vec<&Droplet> {
        self.all(filter).into_iter().filter(|droplet| droplet.listed(now)).collect()
    }

    /// Every tag.
    pub fn tags(&self) -> impl Iterator<Item = &String> {
        self.tags.iter()
    }

    /// Whether there is such a tag.
    pub fn has_tag(&self, tag: &str) -> bool {
        self.tags.contains(tag)
    }

    /// Makes a tag; one that is there stays.
    pub fn add_tag(&mut self, tag: String) {
        self.tags.insert(tag);
    }

    /// Removes a tag from everywhere, if there is such a tag: the droplets that had it.
    pub fn remove_tag(&mut self, tag: &str) -> Option<Vec<DropletId>> {
        if !self.tags.remove(tag) {
            return None;
        }
        let tagged: Vec<_> =
            self.droplets.values_mut().filter(|droplet| droplet.record.tags.iter().any(|t| t == tag)).collect();
        Some(
            tagged
                .into_iter()
                .map(|droplet| {
                    droplet.record.tags.retain(|other| other != tag);
                    droplet.record.id
                })
                .collect(),
        )
    }

    /// Tags a droplet, or takes the tag off: false when there is no such droplet.
    pub fn mark(&mut self, id: DropletId, tag: &str, marked: bool) -> bool {
        let Some(droplet) = self.droplets.get_mut(&id) else { return false };
        droplet.record.tags.retain(|other| other != tag);
        if marked {
            droplet.record.tags.push(tag.to_owned());
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use jiff::SignedDuration;

    use super::*;

    fn order(names: &[&str]) -> Order {
        Order {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            single: false,
            region: "nyc3".into(),
            size: "s-1vcpu-1gb".into(),
            image: "debian-12-x64".into(),
            tags: vec!["fleet".into()],
            user_data: None,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(NUMBERS_BEGIN + second).unwrap()
    }

    #[test]
    fn an_order_over_the_limit_makes_nothing_at_all() {
        let mut ledger = Ledger::new(vec![], 2, Lag::NONE, at(0));
        ledger.accept(&order(&["a"]), at(0)).unwrap();
        assert_eq!(ledger.accept(&order(&["b", "c"]), at(0)), Err(OverLimit));
        assert_eq!((ledger.all(&Filter::All).len(), ledger.actions(None).len()), (1, 1));
    }

    #[test]
    fn lists_by_tag_and_name_lag_like_every_list() {
        let lag = Lag { list: SignedDuration::from_secs(1), address: SignedDuration::ZERO };
        let mut ledger = Ledger::new(vec![], 10, lag, at(0));
        ledger.accept(&order(&["a", "b"]), at(10)).unwrap();
        let tag = Filter::Tag("fleet".into());
        assert_eq!((ledger.listed(&tag, at(10)).len(), ledger.listed(&tag, at(11)).len()), (0, 2));
        assert_eq!(ledger.listed(&Filter::Name("a".into()), at(11)).len(), 1);
        assert_eq!(ledger.listed(&Filter::Tag("other".into()), at(11)).len(), 0);
    }

    #[test]
    fn a_cloud_started_anew_knows_its_droplets_and_tags_and_repeats_no_number() {
        let mut before = Ledger::new(vec![], 10, Lag::NONE, at(100));
        let (gone, _) = before.accept(&order(&["gone"]), at(100)).unwrap().remove(0);
        let (kept, _) = before.accept(&order(&["kept"]), at(100)).unwrap().remove(0);
        let found = Found { record: kept.record.clone(), address: Ipv4Addr::LOCALHOST, running: false };
        let mut after = Ledger::new(vec![found], 10, Lag::NONE, at(101));
        assert_eq!(
            after.droplet(kept.record.id).and_then(|droplet| droplet.address(at(101))),
            Some(Ipv4Addr::LOCALHOST)
        );
        assert!(after.has_tag("fleet"));
        let (new, _) = after.accept(&order(&["new"]), at(101)).unwrap().remove(0);
        assert!(new.record.id > gone.record.id && new.record.id > kept.record.id);
    }

    #[test]
    fn removing_a_tag_takes_it_off_every_droplet() {
        let mut ledger = Ledger::new(vec![], 10, Lag::NONE, at(0));
        let id = ledger.accept(&order(&["a"]), at(0)).unwrap()[0].0.record.id;
        ledger.add_tag("extra".into());
        assert!(ledger.mark(id, "extra", true) && ledger.mark(id, "extra", true));
        assert_eq!(ledger.droplet(id).unwrap().record.tags, ["fleet", "extra"]);
        assert_eq!(ledger.remove_tag("fleet"), Some(vec![id]));
        assert_eq!(ledger.remove_tag("fleet"), None);
        assert_eq!(ledger.droplet(id).unwrap().record.tags, ["extra"]);
    }
}
