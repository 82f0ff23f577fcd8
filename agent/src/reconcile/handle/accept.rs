//! Taking deploys into the ledger, or finding why they can't be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use dtma_api::InstanceName;
use dtma_api::instance::InstanceView;

use super::{Rejection, update};
use crate::engine::exact_ports;
use crate::instance::{Failure, FailureKind, Intent, PortProtocol, Spec};
use crate::reconcile::desk::Desk;
use crate::reconcile::status::Facts;
use crate::store::ledger::{Contents, Entry};

/// What became of a deploy's wish.
pub(super) struct Accepted {
    pub(super) ticket: u64,
    pub(super) created: bool,
    /// The instance as it is before the loop has seen it.
    pub(super) pending: Box<InstanceView>,
}

impl Accepted {
    fn new(desk: &mut Desk, entry: &Entry, created: bool) -> Self {
        let ticket = desk.take_ticket(&entry.spec.name);
        Self { ticket, created, pending: Box::new(Facts::accepted(entry)) }
    }
}

/// Takes a deploy into the ledger, or finds that the same was taken before.
pub(super) fn deploy(desk: &mut Desk, entry: &Arc<Entry>) -> Result<Accepted, Rejection> {
    let created = is_new(desk.contents(), entry)?;
    if created {
        let mut contents = desk.contents().clone();
        contents.entries.insert(entry.spec.name.clone(), Arc::clone(entry));
        desk.commit(contents).map_err(Rejection::Ledger)?;
    }
    Ok(Accepted::new(desk, entry, created))
}

/// Takes the members of a group into the ledger, all that can be at once; of an atomic group all or none.
pub(super) fn group(
    desk: &mut Desk,
    entries: Vec<Arc<Entry>>,
    atomic: bool,
) -> Result<BTreeMap<InstanceName, Result<Accepted, Rejection>>, Rejection> {
    let mut contents = desk.contents().clone();
    let mut created = BTreeSet::new();
    let mut rejected: BTreeMap<InstanceName, Rejection> = BTreeMap::new();
    for entry in &entries {
        let name = &entry.spec.name;
        match is_new(&contents, entry) {
            Ok(true) => {
                contents.entries.insert(name.clone(), Arc::clone(entry));
                created.insert(name.clone());
            }
            Ok(false) => {}
            Err(rejection) => drop(rejected.insert(name.clone(), rejection)),
        }
    }
    // Nor can those be that come after one that can't.
    while let Some((entry, member)) = entries.iter().find_map(|entry| {
        let waits_for = entry.batch.as_ref()?.after.iter().find(|name| rejected.contains_key(*name))?;
        (!rejected.contains_key(&entry.spec.name)).then_some((entry, waits_for))
    }) {
        let name = &entry.spec.name;
        if created.remove(name) {
            contents.entries.remove(name);
        }
        let message = format!("it comes after {member}, which was not accepted");
        let kind = FailureKind::MemberFailed { member: member.clone() };
        rejected.insert(name.clone(), Rejection::Failed(Failure { kind, message, log: Vec::new() }));
    }
    let refused = atomic && !rejected.is_empty();
    if !refused && !created.is_empty() {
        desk.commit(contents).map_err(Rejection::Ledger)?;
    }
    let first = rejected.keys().next().cloned();
    let members = entries.iter().map(|entry| {
        let name = entry.spec.name.clone();
        let member = match (rejected.remove(&name), &first) {
            (Some(rejection), _) => Err(rejection),
            (None, Some(member)) if refused => {
                let message = format!("the group is atomic, and {member} was not accepted");
                let kind = FailureKind::MemberFailed { member: member.clone() };
                Err(Rejection::Failed(Failure { kind, message, log: Vec::new() }))
            }
            (None, _) => Ok(Accepted::new(desk, entry, created.contains(&name))),
        };
        (name, member)
    });
    Ok(members.collect())
}

/// Whether a deploy is one that nobody has asked for before.
fn is_new(contents: &Contents, entry: &Entry) -> Result<bool, Rejection> {
    let name = entry.spec.name.clone();
    if let Some(there) = contents.entries.get(&name) {
        return match &there.intent {
            Intent::Remove(_) => Err(Rejection::BeingRemoved(name)),
            Intent::Run | Intent::Stop => {
                update::not_updating(there)?;
                if there.spec == entry.spec { Ok(false) } else { Err(Rejection::Exists(name)) }
            }
        };
    }
    let id = &entry.spec.account_tool_instance_id;
    if let Some(there) = contents.entries.values().find(|there| &there.spec.account_tool_instance_id == id) {
        return Err(Rejection::IdTaken { id: id.clone(), holder: there.spec.name.clone() });
    }
    ports_are_free(contents, &entry.spec)?;
    Ok(true)
}

/// No other instance, in either of its versions, was promised a port of this spec.
pub(super) fn ports_are_free(contents: &Contents, spec: &Spec) -> Result<(), Rejection> {
    let others = contents.entries.values().filter(|there| there.spec.name != spec.name);
    for there in others {
        let next = there.next().map(|version| version.spec);
        let taken: Vec<(u16, PortProtocol)> =
            [Some(&there.spec), next].into_iter().flatten().flat_map(exact_ports).collect();
        if let Some((port, _)) = exact_ports(spec).find(|wanted| taken.contains(wanted)) {
            return Err(Rejection::PortTaken { port, holder: format!("instance {}", there.spec.name) });
        }
    }
    Ok(())
}
