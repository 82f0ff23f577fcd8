//! Droplets and actions as the API shows them.

use std::net::Ipv4Addr;

use jiff::{RoundMode, Timestamp, TimestampRound, Unit};
use serde_json::{Value, json};

use crate::action::{Action, Progress};
use crate::catalogue;
use crate::droplet::Droplet;
use crate::image;

/// A droplet at `now`.
pub(super) fn droplet(droplet: &Droplet, now: Timestamp) -> Value {
    let record = &droplet.record;
    let size = catalogue::size(&record.size);
    json!({
        "id": record.id,
        "name": record.name,
        "memory": size.map_or(0, |size| size.memory),
        "vcpus": size.map_or(0, |size| size.vcpus),
        "disk": size.map_or(0, |size| size.disk),
        "locked": droplet.locked(),
        "status": droplet.status(),
        "created_at": time(record.created_at),
        "features": ["private_networking"],
        "backup_ids": [],
        "next_backup_window": null,
        "snapshot_ids": [],
        "image": image::find(&record.image).map(catalogue::image_view),
        "volume_ids": [],
        "size": size.map(catalogue::Size::view),
        "size_slug": record.size,
        "networks": droplet.address(now).map_or_else(|| json!({ "v4": [], "v6": [] }), networks),
        "region": region(&record.region),
        "tags": record.tags,
        "vpc_uuid": "5a4981aa-9653-4bd1-bef5-d6bff52042e4",
    })
}

/// The public address, behind the private one of the account's private network, as on DigitalOcean. Nothing answers at the private one
/// here.
fn networks(address: Ipv4Addr) -> Value {
    let [a, b, c, d] = address.octets();
    let entry = |address: Ipv4Addr, kind: &str| {
        let [a, b, c, _] = address.octets();
        json!({
            "ip_address": address, "netmask": "255.255.255.0", "gateway": Ipv4Addr::new(a, b, c, 1), "type": kind,
        })
    };
    let private = Ipv4Addr::new(10, 116, c, d);
    json!({ "v4": [entry(private, "private"), entry(Ipv4Addr::new(a, b, c, d), "public")], "v6": [] })
}

fn region(slug: &str) -> Option<Value> {
    catalogue::REGIONS.iter().find(|region| region.slug == slug).map(catalogue::Region::view)
}

/// An action. `in-progress` until it is carried out.
pub(super) fn action(action: &Action) -> Value {
    let (status, completed_at) = match action.progress {
        Progress::InProgress => ("in-progress", None),
        Progress::Completed(at) => ("completed", Some(time(at))),
        Progress::Errored(at) => ("errored", Some(time(at))),
    };
    json!({
        "id": action.id, "status": status, "type": action.kind, "started_at": time(action.started_at), "completed_at": completed_at,
        "resource_id": action.droplet, "resource_type": "droplet", "region": region(&action.region), "region_slug": action.region,
    })
}

/// DigitalOcean's time stamps are whole seconds.
fn time(at: Timestamp) -> String {
    let whole = TimestampRound::new().smallest(Unit::Second).mode(RoundMode::Trunc);
    at.round(whole).unwrap_or(at).to_string()
}
