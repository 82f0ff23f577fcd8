//! What a bridge has to know of a JSON-RPC message, and how it changes it: only the envelope is read, everything else stays the bytes
//! it was. Results may be megabytes, and whatever extension is in them isn't ours.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// A message that isn't JSON-RPC.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    /// It isn't JSON.
    #[error("it is not JSON")]
    NotJson,
    /// It is JSON, and no message.
    #[error("it is no JSON-RPC message: {0}")]
    NotRpc(&'static str),
}

/// A message by what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Wants an answer.
    Request,
    /// Wants none.
    Notification,
    /// Is one.
    Response,
}

/// One message, its parts still lying in the text it was read from.
#[derive(Debug)]
pub(super) struct Envelope<'a> {
    text: &'a str,
    pub(super) kind: Kind,
    /// As written; empty in a notification.
    pub(super) id: &'a str,
    /// Empty in a response.
    pub(super) method: String,
    /// Empty unless it is a response with one.
    pub(super) result: &'a str,
    /// The code, where the response is an error.
    pub(super) error_code: Option<i64>,
    pub(super) params: Params<'a>,
    pub(super) meta: Meta<'a>,
}

#[derive(Deserialize)]
struct Raw<'a> {
    #[serde(borrow)]
    jsonrpc: Option<&'a RawValue>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    method: Option<String>,
    #[serde(borrow)]
    params: Option<&'a RawValue>,
    // `null` is an answer, too.
    #[serde(borrow, default, deserialize_with = "present")]
    result: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// Parameters that matter on the way, each as written.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Params<'a> {
    #[serde(borrow, rename = "_meta")]
    meta: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) request_id: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) progress_token: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) name: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) uri: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) protocol_version: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) capabilities: Option<&'a RawValue>,
}

/// What matters of `params._meta`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Meta<'a> {
    #[serde(borrow, rename = "progressToken")]
    pub(super) progress_token: Option<&'a RawValue>,
    #[serde(borrow, rename = "io.modelcontextprotocol/subscriptionId")]
    pub(super) subscription_id: Option<&'a RawValue>,
    #[serde(borrow, rename = "io.modelcontextprotocol/protocolVersion")]
    pub(super) protocol_version: Option<&'a RawValue>,
    #[serde(borrow, rename = "io.modelcontextprotocol/logLevel")]
    pub(super) log_level: Option<&'a RawValue>,
    #[serde(borrow, rename = "io.modelcontextprotocol/clientCapabilities")]
    pub(super) client_capabilities: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RpcError {
    code: i64,
}

impl<'a> Envelope<'a> {
    /// Reads the envelope of one message.
    pub(super) fn read(message: &'a [u8]) -> Result<Self, Malformed> {
        let text = std::str::from_utf8(message).map_err(|_| Malformed::NotJson)?;
        // Before anything of it is read: it may have millions of entries.
        if text.trim_ascii_start().starts_with('[') {
            return Err(Malformed::NotRpc("it is a batch, and here each message comes by itself"));
        }
        let raw: Raw<'_> = serde_json::from_str(text).map_err(|error| {
            if error.is_data() {
                Malformed::NotRpc("its envelope is not an object as it should be")
            } else {
                Malformed::NotJson
            }
        })?;
        // Without it in use everywhere, but nobody means anything else.
        if raw.jsonrpc.is_some_and(|version| version.get() != r#""2.0""#) {
            return Err(Malformed::NotRpc("jsonrpc is not \"2.0\""));
        }
        let id = raw.id.map_or("", RawValue::get);
        if !id.is_empty()
            && !id.starts_with('"')
            && !id.starts_with('-')
            && !id.starts_with(|c: char| c.is_ascii_digit())
        {
            return Err(Malformed::NotRpc("its id is neither a string nor a number"));
        }
        let answered = raw.result.is_some() || raw.error.is_some();
        let kind = match (&raw.method, id.is_empty(), answered) {
            (Some(_), false, false) => Kind::Request,
            (Some(_), true, false) => Kind::Notification,
            (None, false, true) => Kind::Response,
            (Some(_), _, true) => return Err(Malformed::NotRpc("it is request and response at once")),
            (None, true, true) => return Err(Malformed::NotRpc("it answers nobody: it has no id")),
            (None, _, false) => return Err(Malformed::NotRpc("it has neither a method nor a result")),
        };
        let error_code = raw
            .error
            .map(|error| serde_json::from_str::<RpcError>(error.get()).map_or(INTERNAL_ERROR, |error| error.code));
        let params: Params<'_> = object(raw.params)?;
        let meta = object(params.meta)?;
        Ok(Self {
            text,
            kind,
            id,
            method: raw.method.unwrap_or_default(),
            result: raw.result.map_or("", RawValue::get),
            error_code,
            params,
            meta,
        })
    }

    /// The message with parts of it, as they were read, replaced.
    pub(super) fn with(&self, replaced: &[(&'a str, &str)]) -> Bytes {
        let start = self.text.as_ptr().addr();
        // Where each part lies in the text: it was borrowed from there.
        let mut places: Vec<(usize, usize, &str)> = replaced
            .iter()
            .filter_map(|(part, by)| {
                let at = part.as_ptr().addr().checked_sub(start)?;
                Some((at, at.checked_add(part.len())?, *by))
            })
            .collect();
        places.sort_unstable();
        let more: usize = replaced.iter().map(|(_, by)| by.len()).sum();
        let mut out = String::with_capacity(self.text.len() + more);
        let mut from = 0;
        for (at, end, by) in places {
            out.push_str(self.text.get(from..at).unwrap_or_default());
            out.push_str(by);
            from = end;
        }
        out.push_str(self.text.get(from..).unwrap_or_default());
        Bytes::from(out)
    }
}

/// What the newer era puts into every request in place of a handshake.
const CLIENT_KEYS: [&str; 3] = [
    "io.modelcontextprotocol/protocolVersion",
    "io.modelcontextprotocol/clientInfo",
    "io.modelcontextprotocol/clientCapabilities",
];

impl Envelope<'_> {
    /// A request of the newer era as one of the older: some servers refuse what names another version than they have agreed on.
    pub(super) fn in_legacy_words(&self) -> Bytes {
        let Some(meta) = self.params.meta else { return self.with(&[]) };
        let Ok(Few(mut fields)) = serde_json::from_str::<Few<BTreeMap<String, &RawValue>>>(meta.get()) else {
            return self.with(&[]);
        };
        fields.retain(|name, _| !CLIENT_KEYS.contains(&name.as_str()));
        match serde_json::to_string(&fields) {
            Ok(left) => self.with(&[(meta.get(), &left)]),
            Err(_) => self.with(&[]),
        }
    }
}

/// A response of a server of the older era with what the newer one asks of it: that it is complete, and how long a list may be kept, which is
/// not at all.
pub(super) fn in_modern_words(response: Bytes, cacheable: bool) -> Bytes {
    #[derive(Deserialize)]
    struct Typed {
        #[serde(rename = "resultType")]
        result_type: Option<IgnoredAny>,
    }
    let changed = Envelope::read(&response).ok().and_then(|envelope| {
        let typed: Typed = serde_json::from_str(envelope.result).ok()?;
        let inside = envelope.result.strip_prefix('{')?;
        if typed.result_type.is_some() {
            return None;
        }
        let begun = envelope.result.get(..1)?;
        let more = if cacheable { r#","ttlMs":0,"cacheScope":"private""# } else { "" };
        let comma = if inside.trim_start().starts_with('}') { "" } else { "," };
        Some(envelope.with(&[(begun, &format!(r#"{{"resultType":"complete"{more}{comma}"#))]))
    });
    changed.unwrap_or(response)
}

/// How many entries of a list or an object are looked at one by one. More fit into 16 MiB than into memory.
pub(super) const MAX_ENTRIES: usize = 1024;

/// What has no more than [`MAX_ENTRIES`].
struct Few<T>(T);

impl<'de: 'a, 'a> Deserialize<'de> for Few<Vec<&'a RawValue>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Few<Vec<&'de RawValue>>;
            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(formatter, "a list of at most {MAX_ENTRIES} entries")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
                let mut few = Vec::new();
                while let Some(entry) = entries.next_element()? {
                    if few.len() >= MAX_ENTRIES {
                        return Err(A::Error::custom("it has too many entries"));
                    }
                    few.push(entry);
                }
                Ok(Few(few))
            }
        }
        deserializer.deserialize_seq(Entries)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Few<BTreeMap<String, &'a RawValue>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Few<BTreeMap<String, &'de RawValue>>;
            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(formatter, "an object of at most {MAX_ENTRIES} fields")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Self::Value, A::Error> {
                let mut few = BTreeMap::new();
                while let Some((name, value)) = fields.next_entry()? {
                    if few.len() >= MAX_ENTRIES {
                        return Err(A::Error::custom("it has too many fields"));
                    }
                    few.insert(name, value);
                }
                Ok(Few(few))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// Why something is no batch that is taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoBatch {
    /// It isn't JSON.
    NotJson,
    /// It has more than [`MAX_ENTRIES`].
    TooMany,
}

/// The messages of a batch.
pub(super) fn batch(message: &[u8]) -> Result<Vec<&RawValue>, NoBatch> {
    let few: Result<Few<Vec<&RawValue>>, _> = serde_json::from_slice(message);
    few.map(|few| few.0).map_err(|error| if error.is_data() { NoBatch::TooMany } else { NoBatch::NotJson })
}

fn object<'a, T: Default + Deserialize<'a>>(raw: Option<&'a RawValue>) -> Result<T, Malformed> {
    match raw {
        Some(raw) if raw.get().starts_with('{') => {
            serde_json::from_str(raw.get()).map_err(|_| Malformed::NotRpc("it says the same thing twice"))
        }
        Some(_) | None => Ok(T::default()),
    }
}

/// The text of a JSON string; nothing for anything else.
pub(super) fn string(raw: Option<&RawValue>) -> Option<String> {
    serde_json::from_str(raw?.get()).ok()
}

/// A line of its own: between the parts of a JSON text a line break is a space, and inside strings there is none.
pub(crate) fn single_line(message: Bytes) -> Bytes {
    if !message.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
        return message;
    }
    message.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }).collect::<Vec<u8>>().into()
}

/// A response that says what went wrong.
pub(super) fn error(id: &str, code: i64, message: &str) -> Bytes {
    let error = serde_json::json!({ "code": code, "message": message });
    Bytes::from(format!(r#"{{"jsonrpc":"2.0","id":{id},"error":{error}}}"#))
}

/// A response.
pub(super) fn result(id: &str, result: &str) -> Bytes {
    Bytes::from(format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{result}}}"#))
}

/// What a request needs to be answered in its server's place.
pub(crate) struct Unanswered {
    id: String,
}

impl Unanswered {
    /// Of a message that wants an answer.
    pub(crate) fn of(message: &[u8]) -> Option<Self> {
        let envelope = Envelope::read(message).ok()?;
        (envelope.kind == Kind::Request).then(|| Self { id: envelope.id.to_owned() })
    }

    /// The answer that it failed.
    pub(crate) fn because(&self, why: &str) -> Bytes {
        error(&self.id, INTERNAL_ERROR, why)
    }
}

/// JSON-RPC's code for a failure that isn't the caller's.
pub(super) const INTERNAL_ERROR: i64 = -32603;
/// For a method nobody here knows.
pub(super) const METHOD_NOT_FOUND: i64 = -32601;
/// What some servers say instead, which check what is asked before they look whether they know it.
pub(super) const INVALID_PARAMS: i64 = -32602;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_named_is_replaced_and_the_rest_stays_as_written() {
        let text = "{ \"jsonrpc\":\"2.0\",\n \"params\":{\"_meta\":{\"progressToken\":\"t\"},\"x\":[1.00, \"\\u00e9\"]}, \"id\" : 7,\"method\":\"m\"}";
        let envelope = Envelope::read(text.as_bytes()).unwrap();
        assert_eq!((envelope.kind, envelope.id, envelope.method.as_str()), (Kind::Request, "7", "m"));
        let token = envelope.meta.progress_token.unwrap().get();
        let sent = envelope.with(&[(envelope.id, "123"), (token, "45")]);
        let wanted = text.replace("\"t\"", "45").replace(": 7", ": 123");
        assert_eq!(sent, wanted);
        assert_eq!(envelope.with(&[]), text);
        assert_eq!(single_line(sent), wanted.replace('\n', " "));
    }

    #[test]
    fn what_is_no_message_is_not_taken_for_one() {
        let read = |text: &str| Envelope::read(text.as_bytes()).map(|envelope| envelope.kind);
        assert_eq!(read(r#"{"jsonrpc":"2.0","method":"m"}"#), Ok(Kind::Notification));
        assert_eq!(read(r#"{"id":"a","error":{"code":-1,"message":""}}"#), Ok(Kind::Response));
        assert_eq!(read(r#"{"id":"a","result":null}"#), Ok(Kind::Response));
        assert_eq!(read(r#"{"jsonrpc":"2.0","id":-1,"method":"m","params":[1]}"#), Ok(Kind::Request));
        for not_json in ["", "hello", "{", "{\"id\":1,}", "\u{feff}{}"] {
            assert_eq!(read(not_json), Err(Malformed::NotJson), "{not_json}");
        }
        for not_rpc in [
            "1",
            "[]",
            " [{\"id\":1,\"method\":\"m\"}]",
            r#"["2.0",1,null,null,{},null]"#,
            "{}",
            r#"{"id":1}"#,
            r#"{"id":1,"error":null}"#,
            r#"{"id":null,"error":{}}"#,
            r#"{"id":{},"method":"m"}"#,
            r#"{"id":true,"result":1}"#,
            r#"{"id":1,"method":"m","result":1}"#,
            r#"{"id":1,"id":2,"method":"m"}"#,
            r#"{"jsonrpc":"1.0","id":1,"method":"m"}"#,
            r#"{"id":1,"method":"m","params":{"_meta":{},"_meta":{}}}"#,
        ] {
            assert!(matches!(read(not_rpc), Err(Malformed::NotRpc(_))), "{not_rpc}: {:?}", read(not_rpc));
        }
        assert_eq!(Envelope::read(b"\xff{}").map(|envelope| envelope.kind), Err(Malformed::NotJson));
    }

    #[test]
    fn of_what_has_millions_of_entries_no_more_are_read_than_are_taken() {
        let list = |entries: usize| format!("[{}1]", "1,".repeat(entries - 1)).into_bytes();
        assert_eq!(batch(&list(MAX_ENTRIES)).unwrap().len(), MAX_ENTRIES);
        assert_eq!(batch(&list(MAX_ENTRIES + 1)).unwrap_err(), NoBatch::TooMany);
        // The rest isn't even looked at.
        assert_eq!(batch(format!("[{}", "1,".repeat(MAX_ENTRIES + 1)).as_bytes()).unwrap_err(), NoBatch::TooMany);
        assert_eq!(batch(b"[1,").unwrap_err(), NoBatch::NotJson);
        let meta = |fields: usize| {
            let fields: Vec<String> = (1..fields).map(|field| format!("\"{field}\":1")).collect();
            let version = r#""io.modelcontextprotocol/protocolVersion":"2026-07-28""#;
            format!(r#"{{"id":1,"method":"m","params":{{"_meta":{{{version},{}}}}}}}"#, fields.join(","))
        };
        let (few, many) = (meta(MAX_ENTRIES), meta(MAX_ENTRIES + 1));
        let words = |text: &str| Envelope::read(text.as_bytes()).unwrap().in_legacy_words();
        assert!(!words(&few).windows(10).any(|part| part == b"2026-07-28"));
        assert_eq!(words(&many), many);
    }

    #[test]
    fn between_the_eras_only_what_they_differ_in_is_changed() {
        let request = r#"{"id":1,"method":"m","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","a":[1.0]}, "b":2}}"#;
        let legacy = Envelope::read(request.as_bytes()).unwrap().in_legacy_words();
        assert_eq!(legacy, r#"{"id":1,"method":"m","params":{"_meta":{"a":[1.0]}, "b":2}}"#);
        let modern =
            |response: &str, cacheable| in_modern_words(Bytes::copy_from_slice(response.as_bytes()), cacheable);
        assert_eq!(modern(r#"{"id":1,"result":{ }}"#, false), r#"{"id":1,"result":{"resultType":"complete" }}"#);
        let list = modern(r#"{"id":1,"result":{"tools":[]}}"#, true);
        assert_eq!(list, r#"{"id":1,"result":{"resultType":"complete","ttlMs":0,"cacheScope":"private","tools":[]}}"#);
        for same in
            [r#"{"id":1,"result":{"resultType":"x"}}"#, r#"{"id":1,"result":7}"#, r#"{"id":1,"error":{"code":1}}"#]
        {
            assert_eq!(modern(same, true), same);
        }
    }

    #[test]
    fn what_we_say_ourselves_is_a_message() {
        let failed = error("\"a\"", INTERNAL_ERROR, "it \"broke\"");
        let envelope = Envelope::read(&failed).unwrap();
        assert_eq!((envelope.kind, envelope.id, envelope.error_code), (Kind::Response, "\"a\"", Some(INTERNAL_ERROR)));
        assert_eq!(Envelope::read(&result("1", "{}")).unwrap().error_code, None);
    }
}
