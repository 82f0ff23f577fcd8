//! Identifiers as types: a value that exists has been checked.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Why a text is not an identifier; the message says what would be one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} must be {rule}")]
pub struct InvalidId {
    what: &'static str,
    rule: &'static str,
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $rule:literal, $pattern:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The identifier as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                let valid: fn(&str) -> bool = $valid;
                if valid(&text) { Ok(Self(text)) } else { Err(InvalidId { what: $what, rule: $rule }) }
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::try_from(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "pattern": $pattern, "description": concat!($rule, ".") })
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

fn word(text: &str, extra: &[u8], max: usize) -> bool {
    !text.is_empty() && text.len() <= max && text.bytes().all(|b| b.is_ascii_alphanumeric() || extra.contains(&b))
}

text_id!(
    /// An agent of the platform (`agents.id`), as the internal API's callers name it.
    AgentId,
    "an agent id",
    "1 to 128 of A-Z a-z 0-9 _ -",
    "^[A-Za-z0-9_-]{1,128}$",
    |text| word(text, b"_-", 128)
);

text_id!(
    /// Who owns an environment: a user id, or an agent id where no owner is known.
    AccountId,
    "an account id",
    "1 to 128 of A-Z a-z 0-9 _ -",
    "^[A-Za-z0-9_-]{1,128}$",
    |text| word(text, b"_-", 128)
);

text_id!(
    /// The name callers give an instance (`instanceNameOnToolbox`); also the container's name.
    InstanceName,
    "an instance name",
    "2 to 128 of A-Z a-z 0-9 _ . - and begin with a letter or digit",
    "^[A-Za-z0-9][A-Za-z0-9_.-]{1,127}$",
    |text| text.len() >= 2 && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && word(text, b"_.-", 128)
);

text_id!(
    /// The name callers give a group of instances (`groupId`); part of its network's name.
    GroupId,
    "a group id",
    "2 to 128 of A-Z a-z 0-9 _ . - and begin with a letter or digit",
    "^[A-Za-z0-9][A-Za-z0-9_.-]{1,127}$",
    |text| text.len() >= 2 && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && word(text, b"_.-", 128)
);

text_id!(
    /// The backend's id of an instance (`account_tool_instances.id`), opaque here.
    AccountToolInstanceId,
    "an accountToolInstanceId",
    "1 to 128 of A-Z a-z 0-9 _ . : -",
    "^[A-Za-z0-9_.:-]{1,128}$",
    |text| word(text, b"_.:-", 128)
);

/// One environment, for its whole life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EnvironmentId(pub Uuid);

impl fmt::Display for EnvironmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for EnvironmentId {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        Uuid::parse_str(text).map(Self).map_err(|_| InvalidId { what: "an environment id", rule: "a UUID" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_escape_a_path_or_a_header_are_refused() {
        for bad in ["", "a", "../x", "a/b", "a b", "a\nb", ".hidden", "-dash", "ä1", &"a".repeat(129)] {
            assert!(InstanceName::from_str(bad).is_err(), "{bad:?}");
        }
        for good in ["ab", "a.b-c_d", "0x", &"a".repeat(128)] {
            assert!(InstanceName::from_str(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_bad_id_in_json_is_an_error_that_says_the_rule() {
        let error = serde_json::from_str::<AgentId>("\"a/b\"").unwrap_err().to_string();
        assert!(error.contains("1 to 128"), "{error}");
    }
}
