//! Which instance calls from which address, for the egress proxy.
//!
//! Kept beside what is published, because a program asks for its way out from its first moment on, while the work that started it goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dtma_api::InstanceName;

use crate::egress::{Directory, Resident};
use crate::engine::Container;
use crate::instance::{Egress, SessionId, SessionOf, Spec};
use crate::store::ledger::Entry;

/// Addresses, by whose they are. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Residents(Arc<Mutex<Addresses>>);

#[derive(Debug, Default)]
struct Addresses {
    /// Those whose egress is a list, by the address that is their container's own.
    listed: BTreeMap<IpAddr, Resident>,
    /// Where any instance is reached.
    reached: BTreeMap<InstanceName, BTreeSet<IpAddr>>,
    /// Containers of sessions.
    guests: BTreeMap<SessionId, Guest>,
}

#[derive(Debug)]
struct Guest {
    addresses: BTreeSet<IpAddr>,
    /// The address by which it is known, and what it may do, if its egress is a list.
    listed: Option<(IpAddr, Resident)>,
}

impl Residents {
    fn addresses(&self) -> MutexGuard<'_, Addresses> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container of `instance`, made from `spec`, is about to run.
    pub(super) fn moves_in(&self, instance: &InstanceName, spec: &Spec, container: &Container) {
        let (Egress::AllowList(allowed), Some(address)) = (&spec.network.egress, container.own_address) else { return };
        let resident = Resident { instance: instance.clone(), allowed: Arc::new(allowed.clone()) };
        self.addresses().listed.insert(address, resident);
    }

    /// The container of a session is about to run, or runs. It may go where the instance may.
    pub(super) fn guest_moves_in(&self, session: &SessionOf, spec: &Spec, container: &Container) {
        let listed = match (&spec.network.egress, container.own_address) {
            (Egress::AllowList(allowed), Some(address)) => {
                let resident = Resident { instance: session.instance.clone(), allowed: Arc::new(allowed.clone()) };
                Some((address, resident))
            }
            (Egress::AllowList(_) | Egress::Open | Egress::None, _) => None,
        };
        let addresses = container.address.into_iter().chain(container.own_address).collect();
        self.addresses().guests.insert(session.id, Guest { addresses, listed });
    }

    /// Only these sessions have containers.
    pub(super) fn keep_guests(&self, is_there: impl Fn(SessionId) -> bool) {
        self.addresses().guests.retain(|session, _| is_there(*session));
    }

    /// What has been seen of an instance that nobody is working on.
    pub(super) fn settle(&self, instance: &InstanceName, entry: &Entry, containers: &[Container]) {
        let versions = || std::iter::once(entry.present()).chain(entry.next());
        let mut addresses = self.addresses();
        addresses.listed.retain(|_, resident| &resident.instance != instance);
        for container in containers {
            let spec = versions().find(|version| version.spec_hash == &container.spec_hash).map(|version| version.spec);
            // One of neither version may go nowhere.
            let Some(Egress::AllowList(allowed)) = spec.map(|spec| &spec.network.egress) else { continue };
            let Some(address) = container.own_address else { continue };
            let resident = Resident { instance: instance.clone(), allowed: Arc::new(allowed.clone()) };
            addresses.listed.insert(address, resident);
        }
        let reached =
            containers.iter().flat_map(|container| container.address.into_iter().chain(container.own_address));
        addresses.reached.insert(instance.clone(), reached.collect());
    }

    /// Only these instances are left.
    pub(super) fn keep(&self, is_left: impl Fn(&InstanceName) -> bool) {
        let mut addresses = self.addresses();
        addresses.listed.retain(|_, resident| is_left(&resident.instance));
        addresses.reached.retain(|instance, _| is_left(instance));
    }
}

impl Directory for Residents {
    fn resident(&self, address: IpAddr) -> Option<Resident> {
        let addresses = self.addresses();
        let guests = || addresses.guests.values().filter_map(|guest| guest.listed.as_ref());
        let guest = || guests().find(|(own, _)| *own == address).map(|(_, resident)| resident);
        addresses.listed.get(&address).or_else(guest).cloned()
    }

    fn is_instance(&self, address: IpAddr) -> bool {
        let addresses = self.addresses();
        addresses.listed.contains_key(&address)
            || addresses.reached.values().any(|reached| reached.contains(&address))
            || addresses.guests.values().any(|guest| guest.addresses.contains(&address))
    }
}
