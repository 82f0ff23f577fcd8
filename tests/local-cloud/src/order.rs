//! Creation requests: DigitalOcean's rules for them, in its words.

use serde::Deserialize;
use serde_json::Value;

use crate::catalogue;

/// Bytes of user data a droplet may have.
pub const USER_DATA_MAX: usize = 64 * 1024;

/// Droplets one request may create.
pub const CREATE_MAX: usize = 10;

/// Body of `POST /v2/droplets`, as far as this cloud looks at it. Everything else is accepted and has no effect here.
#[derive(Debug, Deserialize)]
pub struct CreateRequest {
    name: Option<String>,
    names: Option<Vec<String>>,
    region: Option<String>,
    size: Option<String>,
    image: Option<Value>,
    tags: Option<Vec<String>>,
    user_data: Option<String>,
    ssh_keys: Option<Vec<Value>>,
}

/// A creation request that keeps every rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// At least one.
    pub names: Vec<String>,
    /// Whether the caller asked for one droplet by `name`; the answer has another shape for `names`.
    pub single: bool,
    /// Slug.
    pub region: String,
    /// Slug.
    pub size: String,
    /// Slug.
    pub image: String,
    /// Without repetitions.
    pub tags: Vec<String>,
    /// As sent.
    pub user_data: Option<String>,
}

/// Which rule a creation request breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// `name` and `names`, or neither.
    #[error("You must specify exactly one of name and names.")]
    NameOrNames,
    /// Too many at once.
    #[error("You can create at most {CREATE_MAX} Droplets at a time.")]
    TooMany,
    /// Not a host name.
    #[error("Only valid hostname characters are allowed. (a-z, A-Z, 0-9, . and -)")]
    Name,
    /// Longer than 255.
    #[error("Name is too long (maximum is 255 characters)")]
    NameTooLong,
    /// No such region, or it has no room.
    #[error("You specified an invalid region for Droplet creation.")]
    Region,
    /// No such size.
    #[error("You specified an invalid size for Droplet creation.")]
    Size,
    /// A size that region doesn't sell.
    #[error("Size is not available in this region.")]
    SizeInRegion,
    /// No such image.
    #[error("You specified an invalid image for Droplet creation.")]
    Image,
    /// A tag with other characters.
    #[error("Tag name must be 1 to 255 letters, digits, colons, dashes and underscores: {0}")]
    Tag(String),
    /// Over 64 KiB.
    #[error("User data is too long (maximum is {USER_DATA_MAX} bytes)")]
    UserData,
    /// A key the account doesn't have.
    #[error("{0} are invalid key identifiers for Droplet creation.")]
    SshKeys(String),
}

impl CreateRequest {
    /// Checks every rule.
    ///
    /// # Errors
    /// The first one that is broken.
    pub fn check(self) -> Result<Order, Broken> {
        let (names, single) = match (self.name, self.names) {
            (Some(name), None) => (vec![name], true),
            (None, Some(names)) if !names.is_empty() => (names, false),
            _ => return Err(Broken::NameOrNames),
        };
        if names.len() > CREATE_MAX {
            return Err(Broken::TooMany);
        }
        for name in &names {
            check_name(name)?;
        }
        let size = self.size.as_deref().and_then(catalogue::size).ok_or(Broken::Size)?;
        let image = self.image.as_ref().and_then(catalogue::image).ok_or(Broken::Image)?;
        let region = catalogue::open_region(self.region.as_deref().unwrap_or("nyc3")).ok_or(Broken::Region)?;
        if !size.sold_in(region) {
            return Err(Broken::SizeInRegion);
        }
        let mut tags: Vec<String> = Vec::new();
        for tag in self.tags.unwrap_or_default() {
            if !is_tag(&tag) {
                return Err(Broken::Tag(tag));
            }
            if !tags.contains(&tag) {
                tags.push(tag);
            }
        }
        if self.user_data.as_ref().is_some_and(|text| text.len() > USER_DATA_MAX) {
            return Err(Broken::UserData);
        }
        let strangers: Vec<String> = self
            .ssh_keys
            .unwrap_or_default()
            .into_iter()
            .filter(|key| !catalogue::knows_ssh_key(key))
            .map(|key| key.to_string())
            .collect();
        if !strangers.is_empty() {
            return Err(Broken::SshKeys(strangers.join(", ")));
        }
        Ok(Order {
            names,
            single,
            region: region.slug.to_owned(),
            size: size.slug.to_owned(),
            image: image.slug.to_owned(),
            tags,
            user_data: self.user_data,
        })
    }
}

impl Order {
    /// Whether the cloud will find no place for it after accepting it: DigitalOcean accepts user data that isn't ASCII and then loses
    /// the droplet.
    pub fn is_unplaceable(&self) -> bool {
        self.user_data.as_ref().is_some_and(|text| !text.is_ascii())
    }
}

/// `^[a-zA-Z0-9]?[a-z0-9A-Z.\-]*[a-z0-9A-Z]$`, at most 255 characters.
fn check_name(name: &str) -> Result<(), Broken> {
    if name.len() > 255 {
        return Err(Broken::NameTooLong);
    }
    let allowed = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.' || byte == b'-');
    if allowed && name.bytes().last().is_some_and(|byte| byte.is_ascii_alphanumeric()) {
        Ok(())
    } else {
        Err(Broken::Name)
    }
}

/// Whether a text can be a tag: 1 to 255 of `[a-zA-Z0-9_\-:]`.
pub fn is_tag(text: &str) -> bool {
    (1..=255).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b':'))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(change: Value) -> Result<Order, Broken> {
        let mut body = json!({"name": "web-1", "size": "s-1vcpu-1gb", "image": "debian-12-x64", "region": "sfo3"});
        for (key, value) in change.as_object().unwrap() {
            body[key] = value.clone();
        }
        serde_json::from_value::<CreateRequest>(body).unwrap().check()
    }

    #[test]
    fn a_plain_order_passes_and_repeated_tags_count_once() {
        let order = check(json!({"tags": ["a:b", "c_d", "a:b"], "monitoring": true, "image": 129_211_874})).unwrap();
        assert_eq!((order.tags, order.image), (vec!["a:b".to_owned(), "c_d".into()], "docker-debian-12".to_owned()));
        assert_eq!(check(json!({"image": "129211873", "region": null})).unwrap().region, "nyc3");
        assert_eq!(check(json!({"tags": null})).unwrap().tags, Vec::<String>::new());
    }

    #[test]
    fn every_rule_is_kept() {
        let cases = [
            (json!({"name": null}), Broken::NameOrNames),
            (json!({"names": ["a"]}), Broken::NameOrNames),
            (json!({"name": null, "names": []}), Broken::NameOrNames),
            (json!({"name": null, "names": vec!["a"; 11]}), Broken::TooMany),
            (json!({"name": "under_score"}), Broken::Name),
            (json!({"name": "trailing-"}), Broken::Name),
            (json!({"name": ""}), Broken::Name),
            (json!({"name": "a".repeat(256)}), Broken::NameTooLong),
            (json!({"size": "s-huge"}), Broken::Size),
            (json!({"size": "s-2vcpu-4gb"}), Broken::SizeInRegion),
            (json!({"image": "windows"}), Broken::Image),
            (json!({"region": "nyc2"}), Broken::Region),
            (json!({"tags": ["no spaces"]}), Broken::Tag("no spaces".into())),
            (json!({"user_data": "x".repeat(USER_DATA_MAX + 1)}), Broken::UserData),
            (json!({"ssh_keys": [1]}), Broken::SshKeys("1".into())),
        ];
        for (change, broken) in cases {
            assert_eq!(check(change), Err(broken));
        }
        assert!(check(json!({"user_data": "x".repeat(USER_DATA_MAX), "ssh_keys": [512_189]})).is_ok());
    }

    #[test]
    fn user_data_beyond_ascii_is_accepted_but_finds_no_place() {
        assert!(check(json!({"user_data": "#cloud-config\n# \u{1f600}"})).unwrap().is_unplaceable());
        assert!(!check(json!({"user_data": "#cloud-config"})).unwrap().is_unplaceable());
    }
}
