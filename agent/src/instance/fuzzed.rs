//! What must hold of names, whatever is put in their place. See [`crate::fuzz`].

// What tests are made of may fail as loudly as the tests themselves.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

use dtma_api::{AccountToolInstanceId, InstanceName};

use super::reference::{Reference, Unresolved, resolve};
use super::spec::ImageReference;

/// An image reference prints as it was read, and splits into what it was.
pub(crate) fn image(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let Ok(image) = text.parse::<ImageReference>() else { return };
    assert_eq!(image.to_string(), text);
    let json = serde_json::to_string(&image).unwrap();
    assert_eq!(serde_json::from_str::<ImageReference>(&json).unwrap(), image);
    // It goes into a URL's query, and into sentences.
    assert!(text.len() <= 512 && text.bytes().all(|byte| byte.is_ascii_graphic()), "{text:?}");
    let (name, version) = image.split();
    assert!(!name.is_empty() && !version.is_empty() && text.starts_with(name), "{name:?} {version:?}");
    let separator = if version.starts_with("sha256:") { '@' } else { ':' };
    let named: ImageReference = format!("{name}{separator}{version}").parse().unwrap();
    assert_eq!(named.split(), (name, version), "of {text:?}");
}

/// What a `{ref}` names is really called that. Lines: the reference, then `name id container` of each instance.
pub(crate) fn reference(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.lines();
    let Some(asked) = lines.next() else { return };
    let all: Vec<(InstanceName, AccountToolInstanceId, String)> = lines
        .take(20)
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (name, id) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            Some((name, id, words.next().unwrap_or_default().to_owned()))
        })
        .collect();
    let references = all.iter().map(|(name, id, container)| Reference {
        name,
        account_tool_instance_id: id,
        container_id: container,
    });
    let begins = |asked: &str| all.iter().filter(|(_, _, container)| container.starts_with(asked)).count();
    match resolve(asked, references) {
        Ok(found) => {
            let one = all.iter().any(|(name, id, container)| {
                name == found
                    && (name.as_str() == asked
                        || id.as_str() == asked
                        || (asked.len() >= 12 && container.starts_with(asked) && begins(asked) == 1))
            });
            assert!(one, "{asked:?} is not {found}");
            if let Some((own, _, _)) = all.iter().find(|(name, _, _)| name.as_str() == asked) {
                assert_eq!(found, own, "a name wins");
            }
        }
        Err(Unresolved::Ambiguous(text)) => assert!(text == asked && asked.len() >= 12 && begins(asked) > 1),
        Err(Unresolved::Unknown(text)) => {
            assert_eq!(text, asked);
            assert!(!all.iter().any(|(name, id, _)| name.as_str() == asked || id.as_str() == asked));
            assert!(asked.len() < 12 || begins(asked) == 0);
        }
    }
}
