//! What callers may call an instance by.

use dtma_api::{AccountToolInstanceId, InstanceName};

/// One instance's three names.
#[derive(Debug, Clone, Copy)]
pub struct Reference<'a> {
    /// Its name.
    pub name: &'a InstanceName,
    /// The backend's id.
    pub account_tool_instance_id: &'a AccountToolInstanceId,
    /// Full id of its container, empty while there is none.
    pub container_id: &'a str,
}

/// Why a `{ref}` names no instance.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unresolved {
    /// Nothing is called that.
    #[error("no instance is called {0:?}")]
    Unknown(String),
    /// Several container ids begin with it.
    #[error("several containers' ids begin with {0:?}; give more of the id")]
    Ambiguous(String),
}

/// Fewest characters of a container id that name it.
const MIN_PREFIX: usize = 12;

/// The instance called `text`: by name first, then by the backend's id, then by container id (whole, or a unique beginning of at
/// least twelve characters). A name always wins, so that an instance called like another's container id stays reachable.
///
/// # Errors
/// When nothing, or more than one container, is called that.
pub fn resolve<'a>(
    text: &str,
    instances: impl Iterator<Item = Reference<'a>> + Clone,
) -> Result<&'a InstanceName, Unresolved> {
    if let Some(found) = instances.clone().find(|instance| instance.name.as_str() == text) {
        return Ok(found.name);
    }
    if let Some(found) = instances.clone().find(|instance| instance.account_tool_instance_id.as_str() == text) {
        return Ok(found.name);
    }
    if text.len() >= MIN_PREFIX {
        let mut matching = instances.filter(|instance| instance.container_id.starts_with(text));
        match (matching.next(), matching.next()) {
            (Some(found), None) => return Ok(found.name),
            (Some(_), Some(_)) => return Err(Unresolved::Ambiguous(text.to_owned())),
            (None, _) => {}
        }
    }
    Err(Unresolved::Unknown(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Vec<(InstanceName, AccountToolInstanceId, String)> {
        [("one", "id-1", "aaaaaaaaaaaa1111"), ("two", "id-2", "aaaaaaaaaaaa2222"), ("aaaaaaaaaaaa1111", "id-3", "")]
            .map(|(name, id, container)| (name.parse().unwrap(), id.parse().unwrap(), container.to_owned()))
            .to_vec()
    }

    fn look_up(text: &str) -> Result<String, Unresolved> {
        let all = three();
        resolve(
            text,
            all.iter().map(|(name, id, container)| Reference {
                name,
                account_tool_instance_id: id,
                container_id: container,
            }),
        )
        .map(|name| name.as_str().to_owned())
    }

    #[test]
    fn an_instance_answers_to_its_name_its_id_and_its_container() {
        assert_eq!(look_up("two").unwrap(), "two");
        assert_eq!(look_up("id-1").unwrap(), "one");
        assert_eq!(look_up("aaaaaaaaaaaa2222").unwrap(), "two");
        assert_eq!(look_up("aaaaaaaaaaaa2").unwrap(), "two");
    }

    #[test]
    fn a_name_wins_over_a_container_id() {
        assert_eq!(look_up("aaaaaaaaaaaa1111").unwrap(), "aaaaaaaaaaaa1111");
    }

    #[test]
    fn a_short_or_ambiguous_beginning_names_nothing() {
        assert_eq!(look_up("aaaaaaaaaaaa"), Err(Unresolved::Ambiguous("aaaaaaaaaaaa".into())));
        assert_eq!(look_up("aaaaaaaaaaa"), Err(Unresolved::Unknown("aaaaaaaaaaa".into())));
        assert_eq!(look_up(""), Err(Unresolved::Unknown(String::new())));
    }
}
