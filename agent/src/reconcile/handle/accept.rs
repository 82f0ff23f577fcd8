//! Taking a deploy into the ledger, or finding why it can't be.

use std::sync::Arc;

use super::{Rejection, update};
use crate::engine::exact_ports;
use crate::instance::{Intent, PortProtocol, Spec};
use crate::reconcile::desk::Desk;
use crate::store::ledger::{Contents, Entry};

/// What became of a deploy's wish.
pub(super) struct Accepted {
    pub(super) ticket: u64,
    pub(super) created: bool,
}

/// Takes a deploy into the ledger, or finds that the same was taken before.
pub(super) fn deploy(desk: &mut Desk, entry: Arc<Entry>) -> Result<Accepted, Rejection> {
    let name = entry.spec.name.clone();
    if let Some(there) = desk.contents().entries.get(&name) {
        return match &there.intent {
            Intent::Remove(_) => Err(Rejection::BeingRemoved(name)),
            Intent::Run | Intent::Stop => {
                update::not_updating(there)?;
                if there.spec == entry.spec {
                    Ok(Accepted { ticket: desk.take_ticket(&name), created: false })
                } else {
                    Err(Rejection::Exists(name))
                }
            }
        };
    }
    let id = &entry.spec.account_tool_instance_id;
    if let Some(there) = desk.contents().entries.values().find(|there| &there.spec.account_tool_instance_id == id) {
        return Err(Rejection::IdTaken { id: id.clone(), holder: there.spec.name.clone() });
    }
    ports_are_free(desk.contents(), &entry.spec)?;
    let mut contents = desk.contents().clone();
    contents.entries.insert(name.clone(), entry);
    desk.commit(contents).map_err(Rejection::Ledger)?;
    Ok(Accepted { ticket: desk.take_ticket(&name), created: true })
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
