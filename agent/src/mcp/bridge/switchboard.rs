//! Who asked what over one link, and so whom a message from the server is for. Pure: messages go in, and what is to be delivered comes out.
//!
//! Every request gets an id of the link's own on its way to the server, and its own back on its answer, so that clients may use the same
//! ids. A progress token is replaced by that id too. Requests of the server get an id of the link's own on their way to a client.
//!
//! An answer is taken once: whatever else bears its id, or comes after the call was given up, is nobody's.
//!
//! Lines of log (`notifications/message`) say nowhere for whose sake they were written, and may hold what a client has asked for. One written
//! while the server works for one client alone is for that, on the stream of its call; where the newer era's client didn't ask for them,
//! for nobody. One written while it works for several is for nobody: it is in the instance's log, as is everything the server writes. One
//! written while it works for nobody is about the server itself, and for all sessions. Whoever needs every line has to have a process of
//! its own. That a client listens (`subscriptions/listen`) is no work.
//!
//! Every request of the server is answered: by its client, or in its place when that can't be asked, goes, or takes too long.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use serde_json::value::RawValue;
use tokio::time::Instant;

use super::envelope::{self, Envelope, INTERNAL_ERROR, Kind, METHOD_NOT_FOUND, Malformed};

/// Calls under way over one link.
pub(super) const MAX_CALLS: usize = 1024;
/// Requests of the server that clients haven't answered, and how many of them one client may have: one that answers nothing leaves the others
/// theirs.
const MAX_ASKED: usize = 1024;
const MAX_ASKED_OF_ONE: usize = 64;
/// For so long one waits for its client to listen.
const HEARD_WITHIN: Duration = Duration::from_secs(30);
/// And for so long for the answer of one that does: there may be a person who is asked.
const ANSWERED_WITHIN: Duration = Duration::from_secs(30 * 60);
/// And for so long once the call is over for whose sake it was asked: hardly anybody wants to know any more.
const ANSWERED_AFTERWARDS: Duration = Duration::from_secs(60);
/// Ids stay below this: some servers hold them in 32 bits.
const LAST_ID: u32 = i32::MAX as u32;
/// What the server is told about what it asked somebody who has left.
const GONE: &str = "the client is gone";

/// A request under way to the server, by the id it has there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct CallId(u32);

/// A request of the server to a client, by the id it has there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AskId(u32);

/// A client's session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SessionKey(pub(super) u64);

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owner {
    /// A client with a session.
    Session(SessionKey),
    /// A client without one; nothing but the answer, and what belongs to it, is for it.
    Lone,
    /// The agent itself.
    Agent,
}

/// What a client said it can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Abilities {
    pub(super) sampling: bool,
    pub(super) elicitation: bool,
    pub(super) roots: bool,
}

impl Abilities {
    /// Whatever the server asks is between the two of them.
    pub(super) const ANY: Self = Self { sampling: true, elicitation: true, roots: true };

    fn cover(self, method: &str) -> bool {
        match method.split('/').next() {
            Some("sampling") => self.sampling,
            Some("elicitation") => self.elicitation,
            Some("roots") => self.roots,
            Some(_) | None => true,
        }
    }
}

/// Something to be delivered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// The answer to a call; nothing comes after it.
    Answer(CallId, Bytes),
    /// To whoever waits for this call.
    Related(CallId, Bytes),
    /// To whoever listens for this session.
    Session(SessionKey, Bytes),
    /// The same, and the server waits for an answer.
    Ask(SessionKey, AskId, Bytes),
    /// To the server.
    Server(Bytes),
}

/// Why a request isn't sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// As many as may are under way.
    #[error("{MAX_CALLS} calls are under way already")]
    TooManyCalls,
    /// The session has one with this id under way.
    #[error("a request with this id is under way")]
    IdInUse,
}

#[derive(Debug)]
struct Call {
    owner: Owner,
    /// As the client wrote it.
    id: String,
    /// Likewise.
    token: Option<String>,
    /// Goes up with every call.
    order: u64,
    /// The protocol forbids it for the handshake.
    cancellable: bool,
    /// It only listens: nothing the server does is for its sake.
    listens: bool,
    /// It asked for lines of log.
    logs: bool,
}

/// A request of the server that a client has to answer.
#[derive(Debug)]
struct Asked {
    /// As the server wrote it.
    id: String,
    session: SessionKey,
    /// Whose stream it went out on.
    call: Option<CallId>,
    /// Nobody waits longer for the answer.
    until: Instant,
}

/// For whom the server works, as far as calls under way tell.
enum AtWork {
    Nobody,
    /// For one, and what reaches that.
    One(Owner, Option<CallId>),
    Several,
}

#[derive(Debug)]
struct Session {
    abilities: Abilities,
    listening: bool,
}

/// What is under way over one link.
#[derive(Debug)]
pub(super) struct Switchboard {
    next: u32,
    order: u64,
    calls: BTreeMap<CallId, Call>,
    asked: BTreeMap<u32, Asked>,
    sessions: BTreeMap<SessionKey, Session>,
    /// The link is of one client only, who may be asked things whether it seems to listen or not.
    exclusive: bool,
}

impl Switchboard {
    /// Nothing is under way. `first` is the first id; by chance, so that what an earlier link over the same server left unanswered is not
    /// taken for an answer.
    pub(super) fn new(first: u32, exclusive: bool) -> Self {
        let next = first % LAST_ID;
        Self { next, order: 0, calls: BTreeMap::new(), asked: BTreeMap::new(), sessions: BTreeMap::new(), exclusive }
    }

    /// How many calls are under way.
    pub(super) fn calls(&self) -> usize {
        self.calls.len()
    }

    /// Somebody waits for this call.
    #[cfg(test)]
    pub(super) fn is_under_way(&self, call: CallId) -> bool {
        self.calls.contains_key(&call)
    }

    /// The session is one.
    pub(super) fn is_open(&self, session: SessionKey) -> bool {
        self.sessions.contains_key(&session)
    }

    /// A client comes.
    pub(super) fn open(&mut self, session: SessionKey, abilities: Abilities) {
        self.sessions.insert(session, Session { abilities, listening: false });
    }

    /// A session's client listens from now on, or doesn't any more.
    pub(super) fn listens(&mut self, session: SessionKey, listening: bool) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.listening = listening;
        }
    }

    /// A client goes. What it has under way is cancelled, and what it was asked is answered for it.
    pub(super) fn close(&mut self, session: SessionKey) -> Vec<Bytes> {
        self.sessions.remove(&session);
        let its: Vec<CallId> = self.calls_of(Owner::Session(session)).collect();
        let mut out: Vec<Bytes> = its.into_iter().flat_map(|call| self.hang_up(call)).collect();
        out.extend(self.answer_for(|asked| asked.session == session, GONE));
        out
    }

    /// A request for the server, and the id it has there.
    pub(super) fn request(&mut self, owner: Owner, envelope: &Envelope<'_>) -> Result<(CallId, Bytes), Refusal> {
        // The agent's own are few, and tell whether the server is well.
        if owner != Owner::Agent && self.calls.len() >= MAX_CALLS {
            return Err(Refusal::TooManyCalls);
        }
        if let Owner::Session(_) = owner
            && self.find(owner, envelope.id).is_some()
        {
            return Err(Refusal::IdInUse);
        }
        let id = self.free_id();
        let call = CallId(id);
        let id = id.to_string();
        let token = envelope.meta.progress_token.map(RawValue::get);
        let mut replaced = vec![(envelope.id, id.as_str())];
        replaced.extend(token.map(|token| (token, id.as_str())));
        let message = envelope.with(&replaced);
        self.order += 1;
        let entry = Call {
            owner,
            id: envelope.id.to_owned(),
            token: token.map(str::to_owned),
            order: self.order,
            cancellable: envelope.method != "initialize",
            listens: envelope.method == "subscriptions/listen",
            // In the older era a session asks for them; in the newer each call for its own.
            logs: owner != Owner::Lone || envelope.meta.log_level.is_some(),
        };
        self.calls.insert(call, entry);
        Ok((call, message))
    }

    /// A notification of a client.
    pub(super) fn notification(&mut self, owner: Owner, envelope: &Envelope<'_>) -> Vec<Delivery> {
        if envelope.method != "notifications/cancelled" {
            return vec![Delivery::Server(envelope.with(&[]))];
        }
        // Of a client without a session nobody knows which of several equal ids it means; it hangs up instead.
        let Owner::Session(_) = owner else { return Vec::new() };
        let Some(id) = envelope.params.request_id.map(RawValue::get) else { return Vec::new() };
        let Some(call) = self.find(owner, id).filter(|call| self.calls.get(call).is_some_and(|call| call.cancellable))
        else {
            return Vec::new();
        };
        self.calls.remove(&call);
        let cancelled = envelope.with(&[(id, &call.0.to_string())]);
        let mut out = vec![
            Delivery::Server(cancelled),
            // The server won't answer; whoever still waits for it shall not wait for ever.
            Delivery::Answer(call, envelope::error(id, INTERNAL_ERROR, "the request was cancelled")),
        ];
        out.extend(self.answer_for(|asked| asked.call == Some(call), GONE).into_iter().map(Delivery::Server));
        out
    }

    /// A client's answer to something the server asked. Nothing where it wasn't asked that.
    pub(super) fn response(&mut self, session: SessionKey, envelope: &Envelope<'_>) -> Option<Bytes> {
        let id: u32 = envelope.id.parse().ok()?;
        self.asked.get(&id).filter(|asked| asked.session == session)?;
        let asked = self.asked.remove(&id)?;
        Some(envelope.with(&[(envelope.id, &asked.id)]))
    }

    /// The server waits for an answer to this.
    pub(super) fn is_asked(&self, ask: AskId) -> bool {
        self.asked.contains_key(&ask.0)
    }

    /// A request of the server waits for its client to listen; or doesn't any more, as that does.
    pub(super) fn waits(&mut self, ask: AskId, waits: bool, now: Instant) {
        if let Some(asked) = self.asked.get_mut(&ask.0) {
            asked.until = now + if waits { HEARD_WITHIN } else { ANSWERED_WITHIN };
        }
    }

    /// A request of the server can't be put to its client. What the server is told.
    pub(super) fn refuse(&mut self, ask: AskId, why: &str) -> Option<Bytes> {
        self.asked.remove(&ask.0).map(|asked| envelope::error(&asked.id, INTERNAL_ERROR, why))
    }

    /// When the next request of the server has waited long enough.
    pub(super) fn due(&self) -> Option<Instant> {
        self.asked.values().map(|asked| asked.until).min()
    }

    /// Answers what has waited long enough.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<Bytes> {
        self.answer_for(|asked| asked.until <= now, "the client did not answer in time")
    }

    /// Nobody waits for this call any more.
    pub(super) fn hang_up(&mut self, call: CallId) -> Vec<Bytes> {
        let Some(gone) = self.calls.remove(&call) else { return Vec::new() };
        let mut out = self.answer_for(|asked| asked.call == Some(call), GONE);
        if gone.cancellable {
            let id = call.0;
            out.push(Bytes::from(format!(
                r#"{{"jsonrpc":"2.0","method":"notifications/cancelled","params":{{"requestId":{id},"reason":"the client hung up"}}}}"#
            )));
        }
        out
    }

    /// The link has ended: nothing is under way any more.
    pub(super) fn end(&mut self) {
        self.calls.clear();
        self.asked.clear();
    }

    /// A message from the server.
    pub(super) fn take(&mut self, message: &[u8], now: Instant) -> Result<Vec<Delivery>, Malformed> {
        let envelope = Envelope::read(message)?;
        Ok(match envelope.kind {
            Kind::Response => self.answered(&envelope, now).into_iter().collect(),
            Kind::Notification => self.told(&envelope),
            Kind::Request => vec![self.asks(&envelope, now)],
        })
    }

    fn answered(&mut self, envelope: &Envelope<'_>, now: Instant) -> Option<Delivery> {
        let call = CallId(envelope.id.parse().ok()?);
        let entry = self.calls.remove(&call)?;
        // Whatever was asked for the sake of this call needs no answer any more, but may still get one.
        for asked in self.asked.values_mut().filter(|asked| asked.call == Some(call)) {
            asked.until = asked.until.min(now + ANSWERED_AFTERWARDS);
        }
        Some(Delivery::Answer(call, envelope.with(&[(envelope.id, &entry.id)])))
    }

    fn told(&mut self, envelope: &Envelope<'_>) -> Vec<Delivery> {
        if envelope.method == "notifications/progress" {
            let token = envelope.params.progress_token.map(RawValue::get);
            let related = token.and_then(|token| {
                let call = CallId(token.parse().ok()?);
                let own = self.calls.get(&call)?.token.as_deref()?;
                Some(Delivery::Related(call, envelope.with(&[(token, own)])))
            });
            return related.into_iter().collect();
        }
        if envelope.method == "notifications/cancelled" {
            let id = envelope.params.request_id.map(RawValue::get);
            let cancelled = id.and_then(|id| {
                let (own, _) = self.asked.iter().find(|(_, asked)| asked.id == id)?;
                let own = *own;
                let asked = self.asked.remove(&own)?;
                let message = envelope.with(&[(id, &own.to_string())]);
                Some(match asked.call.filter(|call| self.calls.contains_key(call)) {
                    Some(call) => Delivery::Related(call, message),
                    None => Delivery::Session(asked.session, message),
                })
            });
            return cancelled.into_iter().collect();
        }
        if let Some(subscription) = envelope.meta.subscription_id.map(RawValue::get)
            && let Ok(id) = subscription.trim_matches('"').parse()
            && let Some(call) = self.calls.get(&CallId(id))
        {
            return vec![Delivery::Related(CallId(id), envelope.with(&[(subscription, &call.id)]))];
        }
        self.spread(envelope)
    }

    /// For everybody, but for what can only be for one.
    fn spread(&self, envelope: &Envelope<'_>) -> Vec<Delivery> {
        let message = envelope.with(&[]);
        if envelope.method == "notifications/message" {
            match self.at_work() {
                // About the server itself.
                AtWork::Nobody => {}
                AtWork::One(_, call) => {
                    let call = call.filter(|call| self.calls.get(call).is_some_and(|call| call.logs));
                    return call.map(|call| Delivery::Related(call, message)).into_iter().collect();
                }
                AtWork::Several => return Vec::new(),
            }
        }
        let to = |(key, session): (&SessionKey, &Session)| {
            // Both ways lead to the same client; one that doesn't listen may still be reached by a call.
            let call = if session.listening { None } else { self.latest_call(Owner::Session(*key)) };
            match call {
                Some(call) => Delivery::Related(call, message.clone()),
                None => Delivery::Session(*key, message.clone()),
            }
        };
        self.sessions.iter().map(to).collect()
    }

    fn asks(&mut self, envelope: &Envelope<'_>, now: Instant) -> Delivery {
        if envelope.method == "ping" {
            return Delivery::Server(envelope::result(envelope.id, "{}"));
        }
        let refuse = |code, why: &str| Delivery::Server(envelope::error(envelope.id, code, why));
        let Some((key, call)) = self.responsible() else {
            return refuse(METHOD_NOT_FOUND, "the server is shared, and nobody can tell which client this is for");
        };
        if !self.sessions.get(&key).is_some_and(|session| session.abilities.cover(&envelope.method)) {
            return refuse(METHOD_NOT_FOUND, "the client can't be asked this");
        }
        let its = self.asked.values().filter(|asked| asked.session == key).count();
        if self.asked.len() >= MAX_ASKED || its >= MAX_ASKED_OF_ONE {
            return refuse(INTERNAL_ERROR, "too many requests of the server are unanswered");
        }
        let id = self.free_id();
        self.asked.insert(id, Asked { id: envelope.id.to_owned(), session: key, call, until: now + ANSWERED_WITHIN });
        let message = envelope.with(&[(envelope.id, &id.to_string())]);
        match call {
            Some(call) => Delivery::Related(call, message),
            None => Delivery::Ask(key, AskId(id), message),
        }
    }

    /// Whom a request of the server is for: the one session for which it works, or the only one there is. Nobody is asked on a guess.
    fn responsible(&self) -> Option<(SessionKey, Option<CallId>)> {
        match self.at_work() {
            AtWork::One(Owner::Session(key), call) => Some((key, call)),
            AtWork::Nobody => {
                let mut sessions = self.sessions.iter();
                let (key, session) = sessions.next()?;
                let reached = session.listening || self.exclusive;
                (sessions.next().is_none() && reached).then_some((*key, None))
            }
            AtWork::One(..) | AtWork::Several => None,
        }
    }

    /// For whom the server works.
    fn at_work(&self) -> AtWork {
        let calls = self.calls.values().filter(|call| call.owner != Owner::Agent && !call.listens);
        let mut owners = calls.map(|call| call.owner).collect::<BTreeSet<Owner>>().into_iter();
        match (owners.next(), owners.next()) {
            (None, _) => AtWork::Nobody,
            (Some(owner), None) => AtWork::One(owner, self.latest_call(owner)),
            (Some(_), Some(_)) => AtWork::Several,
        }
    }

    pub(super) fn calls_of(&self, owner: Owner) -> impl Iterator<Item = CallId> + '_ {
        self.calls.iter().filter(move |(_, call)| call.owner == owner).map(|(id, _)| *id)
    }

    fn latest_call(&self, owner: Owner) -> Option<CallId> {
        let its = || self.calls.iter().filter(|(_, call)| call.owner == owner && !call.listens);
        // Clients without a session have nothing in common but that.
        if owner == Owner::Lone && its().nth(1).is_some() {
            return None;
        }
        its().max_by_key(|(_, call)| call.order).map(|(id, _)| *id)
    }

    fn find(&self, owner: Owner, id: &str) -> Option<CallId> {
        self.calls.iter().find(|(_, call)| call.owner == owner && call.id == id).map(|(call, _)| *call)
    }

    /// Tells the server about what nobody will answer.
    fn answer_for(&mut self, which: impl Fn(&Asked) -> bool, why: &str) -> Vec<Bytes> {
        let gone: Vec<u32> = self.asked.iter().filter(|(_, asked)| which(asked)).map(|(id, _)| *id).collect();
        let gone = gone.into_iter().filter_map(|id| self.asked.remove(&id));
        gone.map(|asked| envelope::error(&asked.id, INTERNAL_ERROR, why)).collect()
    }

    fn free_id(&mut self) -> u32 {
        loop {
            self.next = if self.next >= LAST_ID { 1 } else { self.next + 1 };
            if !self.calls.contains_key(&CallId(self.next)) && !self.asked.contains_key(&self.next) {
                return self.next;
            }
        }
    }
}

#[cfg(test)]
mod tests;
