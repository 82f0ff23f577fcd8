//! What the cloud sells: regions, sizes, base images, and the account it sells to.

use serde_json::{Value, json};

use crate::image::{RECIPES, Recipe};

/// A place droplets can be in.
#[derive(Debug)]
pub struct Region {
    /// Its slug.
    pub slug: &'static str,
    name: &'static str,
    available: bool,
}

/// A kind of droplet.
#[derive(Debug)]
pub struct Size {
    /// Its slug.
    pub slug: &'static str,
    /// MiB.
    pub memory: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// GiB.
    pub disk: u32,
    /// TB a month.
    transfer: f64,
    /// US dollars.
    price_monthly: f64,
    /// US dollars.
    price_hourly: f64,
    regions: &'static [&'static str],
}

const EVERYWHERE: &[&str] = &["nyc3", "sfo3", "ams3", "fra1"];

/// Every region. One has no room left and one size isn't sold everywhere, because callers meet both.
pub const REGIONS: &[Region] = &[
    Region { slug: "nyc3", name: "New York 3", available: true },
    Region { slug: "sfo3", name: "San Francisco 3", available: true },
    Region { slug: "ams3", name: "Amsterdam 3", available: true },
    Region { slug: "fra1", name: "Frankfurt 1", available: true },
    Region { slug: "nyc2", name: "New York 2", available: false },
];

/// Every size.
pub const SIZES: &[Size] = &[
    Size {
        slug: "s-1vcpu-512mb-10gb",
        memory: 512,
        vcpus: 1,
        disk: 10,
        transfer: 0.5,
        price_monthly: 4.0,
        price_hourly: 0.00595,
        regions: EVERYWHERE,
    },
    Size {
        slug: "s-1vcpu-1gb",
        memory: 1024,
        vcpus: 1,
        disk: 25,
        transfer: 1.0,
        price_monthly: 6.0,
        price_hourly: 0.00893,
        regions: EVERYWHERE,
    },
    Size {
        slug: "s-1vcpu-2gb",
        memory: 2048,
        vcpus: 1,
        disk: 50,
        transfer: 2.0,
        price_monthly: 12.0,
        price_hourly: 0.01786,
        regions: EVERYWHERE,
    },
    Size {
        slug: "s-2vcpu-4gb",
        memory: 4096,
        vcpus: 2,
        disk: 80,
        transfer: 4.0,
        price_monthly: 24.0,
        price_hourly: 0.03571,
        regions: &["nyc3", "fra1"],
    },
];

/// When every base image was published, as far as anybody asks.
const IMAGES_PUBLISHED: &str = "2026-01-15T12:00:00Z";

/// The one SSH key of the account: `(id, fingerprint, public key)`.
const SSH_KEY: (u64, &str, &str) = (
    512_189,
    "3b:16:bf:e4:8b:00:8b:b8:59:8c:a9:d3:f0:19:45:fa",
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDCXpYNz1EP0NFvDlYQxR0Uj4qR7aCnVJ9h5VbCq1b3h local",
);

/// The region called `slug`, if droplets can be made there.
pub fn open_region(slug: &str) -> Option<&'static Region> {
    REGIONS.iter().find(|region| region.slug == slug && region.available)
}

/// The size called `slug`.
pub fn size(slug: &str) -> Option<&'static Size> {
    SIZES.iter().find(|size| size.slug == slug)
}

/// Whether a key is the account's, named by its id or its fingerprint.
pub fn knows_ssh_key(key: &Value) -> bool {
    key.as_u64() == Some(SSH_KEY.0)
        || key.as_str().is_some_and(|text| text == SSH_KEY.1 || text == SSH_KEY.0.to_string())
}

impl Region {
    /// As the API shows it.
    pub fn view(&self) -> Value {
        let sizes: Vec<_> =
            SIZES.iter().filter(|size| self.available && size.sold_in(self)).map(|size| size.slug).collect();
        json!({
            "slug": self.slug, "name": self.name, "available": self.available, "sizes": sizes,
            "features": ["metadata", "install_agent", "image_transfer"],
        })
    }
}

impl Size {
    /// Whether that region sells it.
    pub fn sold_in(&self, region: &Region) -> bool {
        self.regions.contains(&region.slug)
    }

    /// As the API shows it.
    pub fn view(&self) -> Value {
        json!({
            "slug": self.slug, "memory": self.memory, "vcpus": self.vcpus, "disk": self.disk, "transfer": self.transfer,
            "price_monthly": self.price_monthly, "price_hourly": self.price_hourly, "regions": self.regions,
            "available": true, "description": "Basic",
        })
    }
}

/// A base image as the API shows it.
pub fn image_view(recipe: &Recipe) -> Value {
    json!({
        "id": recipe.id, "name": recipe.name, "type": "base", "distribution": Recipe::DISTRIBUTION, "slug": recipe.slug,
        "public": true, "regions": EVERYWHERE, "created_at": IMAGES_PUBLISHED, "min_disk_size": 10, "size_gigabytes": 0.5,
        "description": recipe.name, "tags": [], "status": "available",
    })
}

/// The base image a create request's `image` names: a slug, or a number (as DigitalOcean, also one written as text).
pub fn image(wanted: &Value) -> Option<&'static Recipe> {
    let number = wanted.as_u64().or_else(|| wanted.as_str()?.parse().ok());
    RECIPES.iter().find(|recipe| Some(recipe.id) == number || wanted.as_str() == Some(recipe.slug))
}

/// The account as the API shows it.
pub fn account_view(droplet_limit: usize) -> Value {
    json!({
        "droplet_limit": droplet_limit, "floating_ip_limit": 3, "email": "somebody@example.com", "name": "Somebody",
        "uuid": "b6fc48dbf6d990a0c57ae4f3e7b3e9d4", "email_verified": true, "status": "active", "status_message": "",
        "team": { "uuid": "5df3e3a1-b0cb-4b5b-8a5f-5a2b9f3c2f11", "name": "My Team" },
    })
}

/// The account's SSH keys as the API shows them.
pub fn ssh_key_views() -> Vec<Value> {
    let (id, fingerprint, public_key) = SSH_KEY;
    vec![json!({ "id": id, "fingerprint": fingerprint, "public_key": public_key, "name": "local" })]
}
