//! Taking deploys into the ledger, or finding why they can't be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use dtma_api::InstanceName;
use dtma_api::instance::InstanceView;

use super::{Rejection, update};
use crate::engine::exact_ports;
use crate::instance::{Failure, FailureKind, Intent, PortProtocol, RegistryCredentials, Spec};
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
pub(super) fn deploy(
    desk: &mut Desk,
    entry: &Arc<Entry>,
    credentials: Option<RegistryCredentials>,
) -> Result<Accepted, Rejection> {
    let created = is_new(desk.contents(), entry)?;
    let name = &entry.spec.name;
    let mut contents = desk.contents().clone();
    if created {
        contents.entries.insert(name.clone(), Arc::clone(entry));
    }
    let credentials = credentials.map(|credentials| (name.clone(), credentials)).into_iter().collect();
    commit_with(desk, contents, credentials)?;
    Ok(Accepted::new(desk, entry, created))
}

/// Takes the members of a group into the ledger, all that can be at once; of an atomic group all or none.
pub(super) fn group(
    desk: &mut Desk,
    entries: Vec<Arc<Entry>>,
    mut credentials: BTreeMap<InstanceName, RegistryCredentials>,
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
        rejected.insert(name.clone(), Rejection::Failed(Failure::new(kind, message)));
    }
    let refused = atomic && !rejected.is_empty();
    if !refused {
        credentials.retain(|name, _| !rejected.contains_key(name));
        commit_with(desk, contents, credentials)?;
    }
    let first = rejected.keys().next().cloned();
    let members = entries.iter().map(|entry| {
        let name = entry.spec.name.clone();
        let member = match (rejected.remove(&name), &first) {
            (Some(rejection), _) => Err(rejection),
            (None, Some(member)) if refused => {
                let message = format!("the group is atomic, and {member} was not accepted");
                let kind = FailureKind::MemberFailed { member: member.clone() };
                Err(Rejection::Failed(Failure::new(kind, message)))
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

/// Registry credentials for an instance that is there already; they replace those it had.
pub(super) fn take_credentials(
    desk: &mut Desk,
    name: &InstanceName,
    credentials: Option<RegistryCredentials>,
) -> Result<(), Rejection> {
    let credentials = credentials.map(|credentials| (name.clone(), credentials)).into_iter().collect();
    commit_with(desk, desk.contents().clone(), credentials)
}

/// Writes down what is wanted, if that has changed, and that there are credentials, which themselves are only kept here.
fn commit_with(
    desk: &mut Desk,
    mut contents: Contents,
    credentials: BTreeMap<InstanceName, RegistryCredentials>,
) -> Result<(), Rejection> {
    contents.with_credentials.extend(credentials.keys().cloned());
    if &contents != desk.contents() {
        desk.commit(contents).map_err(Rejection::Ledger)?;
    }
    for (name, credentials) in credentials {
        desk.keep_credentials(&name, credentials);
    }
    Ok(())
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
