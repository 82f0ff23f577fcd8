//! The metadata service: what a droplet learns about itself at [`ADDRESS`], its user data included.
//!
//! Owns the document and the paths under `/metadata`, in DigitalOcean's words. A caller is known by the address it calls from and by nothing
//! else, as with every cloud's; that is why a container on a droplet is answered, too, unless something on the droplet keeps it away. How
//! the address comes to be on the droplets' network is the host's business.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use axum::Router;
use axum::extract::{ConnectInfo, Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::cloud::Cloud;
use crate::host::{Attachment, HostError, Record};

/// Where every cloud's droplets look for it, on port 80.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Serves on every listener that comes in, until no more can come.
pub async fn serve(mut listeners: mpsc::UnboundedReceiver<std::net::TcpListener>, cloud: Cloud) {
    while let Some(listener) = listeners.recv().await {
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%error, "the metadata service has no listener");
                continue;
            }
        };
        let router = router(cloud.clone()).into_make_service_with_connect_info::<SocketAddr>();
        tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "the metadata service ended");
            }
        });
    }
}

fn router(cloud: Cloud) -> Router {
    Router::new()
        .route("/metadata/v1.json", get(whole))
        .route("/metadata/v1", get(top))
        .route("/metadata/v1/", get(top))
        .route("/metadata/v1/{*path}", get(part))
        .with_state(cloud)
}

/// Why a caller gets nothing.
#[derive(Debug, thiserror::Error)]
enum NoMetadata {
    #[error("no droplet has this address")]
    Stranger,
    #[error("there is nothing at this path")]
    Nothing,
    #[error("the host of droplets failed")]
    Host(#[from] HostError),
}

impl IntoResponse for NoMetadata {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::Stranger | Self::Nothing => StatusCode::NOT_FOUND,
            Self::Host(error) => {
                tracing::error!(error = error as &dyn std::error::Error, "a droplet got no metadata");
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        (status, self.to_string()).into_response()
    }
}

/// What is known of the droplet that calls.
async fn caller(cloud: &Cloud, from: SocketAddr) -> Result<(Record, Attachment), NoMetadata> {
    let IpAddr::V4(address) = from.ip() else { return Err(NoMetadata::Stranger) };
    let id = cloud.droplet_at(address).await.ok_or(NoMetadata::Stranger)?;
    let record = cloud.ledger().droplet(id).map(|droplet| droplet.record.clone()).ok_or(NoMetadata::Stranger)?;
    Ok((record, cloud.attachment(id).await?))
}

async fn whole(
    State(cloud): State<Cloud>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
) -> Result<impl IntoResponse, NoMetadata> {
    let (record, attachment) = caller(&cloud, from).await?;
    Ok(axum::Json(document(&record, &attachment)))
}

async fn top(State(cloud): State<Cloud>, from: ConnectInfo<SocketAddr>) -> Result<Response, NoMetadata> {
    part(State(cloud), from, Path(String::new())).await
}

async fn part(
    State(cloud): State<Cloud>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    Path(path): Path<String>,
) -> Result<Response, NoMetadata> {
    let (record, attachment) = caller(&cloud, from).await?;
    let text = tree(&record, &attachment).at(&path).ok_or(NoMetadata::Nothing)?;
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response())
}

/// `/metadata/v1.json`.
fn document(record: &Record, attachment: &Attachment) -> Value {
    json!({
        "droplet_id": record.id,
        "hostname": record.name,
        "user_data": attachment.user_data,
        "vendor_data": "",
        "public_keys": [],
        "region": record.region,
        "interfaces": { "public": [{
            "ipv4": {
                "ip_address": attachment.address, "netmask": attachment.netmask, "gateway": attachment.gateway,
            },
            "mac": attachment.mac,
            "type": "public",
        }]},
        "floating_ip": { "ipv4": { "active": false } },
        "reserved_ip": { "ipv4": { "active": false } },
        "dns": { "nameservers": attachment.name_servers },
        "tags": record.tags,
        "features": { "dhcp_enabled": false },
    })
}

/// The same as a tree of paths, the way it is read from a shell.
enum Tree {
    Leaf(String),
    Branch(Vec<(&'static str, Tree)>),
}

fn tree(record: &Record, attachment: &Attachment) -> Tree {
    use Tree::{Branch, Leaf};
    let inactive = || Branch(vec![("ipv4", Branch(vec![("active", Leaf("false".to_owned()))]))]);
    let ipv4 = Branch(vec![
        ("address", Leaf(attachment.address.to_string())),
        ("netmask", Leaf(attachment.netmask.to_string())),
        ("gateway", Leaf(attachment.gateway.to_string())),
    ]);
    let interface =
        Branch(vec![("ipv4", ipv4), ("mac", Leaf(attachment.mac.clone())), ("type", Leaf("public".to_owned()))]);
    Branch(vec![
        ("id", Leaf(record.id.to_string())),
        ("hostname", Leaf(record.name.clone())),
        ("user-data", Leaf(attachment.user_data.clone())),
        ("vendor-data", Leaf(String::new())),
        ("public-keys", Leaf(String::new())),
        ("region", Leaf(record.region.clone())),
        ("interfaces", Branch(vec![("public", Branch(vec![("0", interface)]))])),
        ("dns", Branch(vec![("nameservers", Leaf(attachment.name_servers.join("\n")))])),
        ("floating_ip", inactive()),
        ("reserved_ip", inactive()),
        ("tags", Leaf(record.tags.join("\n"))),
        ("features", Branch(vec![("dhcp_enabled", Leaf("false".to_owned()))])),
    ])
}

impl Tree {
    /// The text at a path; a folder's is its members' names, folders with a slash.
    fn at(&self, path: &str) -> Option<String> {
        let mut here = self;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let Self::Branch(members) = here else { return None };
            here = members.iter().find(|(member, _)| *member == name).map(|(_, tree)| tree)?;
        }
        Some(match here {
            Self::Leaf(text) => text.clone(),
            Self::Branch(members) => {
                let names = members.iter().map(|(name, tree)| match tree {
                    Self::Leaf(_) => (*name).to_owned(),
                    Self::Branch(_) => format!("{name}/"),
                });
                names.collect::<Vec<_>>().join("\n")
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::droplet::DropletId;

    fn example() -> (Record, Attachment) {
        let record = Record {
            id: DropletId(7),
            name: "web-1".into(),
            region: "nyc3".into(),
            size: "s-1vcpu-1gb".into(),
            image: "debian-12-x64".into(),
            tags: vec!["one".into(), "two".into()],
            created_at: "2026-01-01T00:00:00Z".parse().unwrap(),
        };
        let attachment = Attachment {
            user_data: "#cloud-config\n".into(),
            address: Ipv4Addr::new(10, 0, 0, 10),
            netmask: Ipv4Addr::new(255, 255, 255, 0),
            gateway: Ipv4Addr::new(10, 0, 0, 1),
            mac: "02:42:0a:00:00:0a".into(),
            name_servers: vec!["192.0.2.53".into()],
        };
        (record, attachment)
    }

    #[test]
    fn every_path_is_a_value_or_a_list_of_what_is_under_it() {
        let (record, attachment) = example();
        let tree = tree(&record, &attachment);
        assert_eq!(tree.at("id").as_deref(), Some("7"));
        assert_eq!(tree.at("user-data").as_deref(), Some("#cloud-config\n"));
        assert_eq!(tree.at("tags").as_deref(), Some("one\ntwo"));
        assert_eq!(tree.at("interfaces/public/0/ipv4/address").as_deref(), Some("10.0.0.10"));
        assert_eq!(tree.at("interfaces/public/0/").as_deref(), Some("ipv4/\nmac\ntype"));
        assert!(tree.at("").unwrap().starts_with("id\nhostname\nuser-data\n"));
        assert_eq!(tree.at("id/more"), None);
        assert_eq!(tree.at("secrets"), None);
    }

    #[test]
    fn the_document_says_the_same_as_the_paths() {
        let (record, attachment) = example();
        let document = document(&record, &attachment);
        assert_eq!(document["droplet_id"], 7);
        assert_eq!(document["user_data"], "#cloud-config\n");
        assert_eq!(document["interfaces"]["public"][0]["ipv4"]["ip_address"], "10.0.0.10");
    }
}
