//! Taking deploys into the ledger, or finding why they can't be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use dtma_api::InstanceName;
use dtma_api::instance::InstanceView;

use super::{Rejection, update};
use crate::engine::exact_ports;
use crate::instance::{Confidential, Failure, FailureKind, Intent, PortProtocol, SecretForm, SecretValues, Spec};
use crate::reconcile::desk::Desk;
use crate::reconcile::plan::Nudge;
use crate::reconcile::status::Facts;
use crate::store::ledger::{Contents, Entry};
use crate::store::vault::Vault;

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
    confidential: Confidential,
    vault: &Vault,
) -> Result<Accepted, Rejection> {
    let created = is_new(desk.contents(), entry)?;
    let name = &entry.spec.name;
    let mut contents = desk.contents().clone();
    if created {
        contents.entries.insert(name.clone(), Arc::clone(entry));
    }
    commit_with(desk, contents, BTreeMap::from([(name.clone(), confidential)]), vault)?;
    Ok(Accepted::new(desk, entry, created))
}

/// Takes the members of a group into the ledger, all that can be at once; of an atomic group all or none.
pub(super) fn group(
    desk: &mut Desk,
    entries: Vec<Arc<Entry>>,
    mut confidential: BTreeMap<InstanceName, Confidential>,
    vault: &Vault,
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
        confidential.retain(|name, _| !rejected.contains_key(name));
        commit_with(desk, contents, confidential, vault)?;
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
    if contents.strange.contains_key(&name) {
        return Err(Rejection::Unread(name));
    }
    let id = &entry.spec.account_tool_instance_id;
    if let Some(there) = contents.entries.values().find(|there| &there.spec.account_tool_instance_id == id) {
        return Err(Rejection::IdTaken { id: id.clone(), holder: there.spec.name.clone() });
    }
    ports_are_free(contents, &entry.spec)?;
    Ok(true)
}

/// What is kept in memory only, for an instance that is there already; it replaces what it had.
pub(super) fn take_confidential(
    desk: &mut Desk,
    name: &InstanceName,
    confidential: Confidential,
    vault: &Vault,
) -> Result<(), Rejection> {
    commit_with(desk, desk.contents().clone(), BTreeMap::from([(name.clone(), confidential)]), vault)
}

/// Writes down what is wanted, if that has changed, and that there are registry credentials, which themselves are only kept here.
///
/// Values of secrets are in the vault before: of what is written down nothing may be missing. Should the agent die in between, the
/// vault has a folder too many, which goes with the next start.
pub(super) fn commit_with(
    desk: &mut Desk,
    mut contents: Contents,
    confidential: BTreeMap<InstanceName, Confidential>,
    vault: &Vault,
) -> Result<(), Rejection> {
    let mut nudges = Vec::new();
    let mut credentials = Vec::new();
    for (name, Confidential { registry, secrets }) in confidential {
        if let Some(entry) = contents.entries.get(&name).filter(|_| !secrets.0.is_empty()) {
            nudges.extend(keep(desk, entry, &secrets, vault)?.map(|nudge| (name.clone(), nudge)));
        }
        credentials.extend(registry.map(|registry| (name, registry)));
    }
    contents.with_credentials.extend(credentials.iter().map(|(name, _)| name.clone()));
    if &contents != desk.contents() {
        desk.commit(contents).map_err(Rejection::Ledger)?;
    }
    for (name, nudge) in nudges {
        desk.nudge(&name, nudge);
    }
    for (name, credentials) in credentials {
        desk.keep_credentials(&name, credentials);
    }
    Ok(())
}

/// Puts the values of secrets where the newest version of the instance finds them; what has to be done so that it takes them.
fn keep(desk: &Desk, entry: &Entry, secrets: &SecretValues, vault: &Vault) -> Result<Option<Nudge>, Rejection> {
    let version = entry.next().unwrap_or(entry.present());
    let written = vault.give(&version.deployment, secrets).map_err(Rejection::Vault)?;
    let was_there = desk.contents().entries.contains_key(&entry.spec.name) && entry.update.is_none();
    let in_environment = version.spec.secrets.form == SecretForm::Environment;
    Ok(match (was_there, written.made, written.changed) {
        (false, _, _) | (true, false, false) => None,
        // A folder that was gone isn't the one its container has; one that waits for it is started by the same word.
        (true, true, _) => Some(Nudge::Restart),
        (true, false, true) => Some(if in_environment { Nudge::Restart } else { Nudge::Start }),
    })
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
