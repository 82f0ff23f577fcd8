use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const ALICE: Owner = Owner::Session(SessionKey(1));
const BOB: Owner = Owner::Session(SessionKey(2));

fn board() -> Switchboard {
    let mut board = Switchboard::new(100, false);
    board.open(SessionKey(1), Abilities::ANY);
    board.open(SessionKey(2), Abilities { sampling: false, ..Abilities::ANY });
    board
}

fn text(message: &Value) -> Vec<u8> {
    message.to_string().into_bytes()
}

fn read(message: &Bytes) -> Value {
    serde_json::from_slice(message).unwrap()
}

/// The call, and the id and the progress token the server sees.
fn ask(board: &mut Switchboard, owner: Owner, message: &Value) -> (CallId, Value) {
    let text = text(message);
    let (call, sent) = board.request(owner, &Envelope::read(&text).unwrap()).unwrap();
    let sent = read(&sent);
    assert_eq!(sent["id"], json!(call.0));
    (call, sent)
}

fn call(board: &mut Switchboard, owner: Owner, id: Value) -> CallId {
    ask(board, owner, &json!({"jsonrpc": "2.0", "id": id, "method": "tools/call"})).0
}

fn says(board: &mut Switchboard, message: &Value) -> Vec<Delivery> {
    board.take(&text(message), Instant::now()).unwrap()
}

fn one(mut deliveries: Vec<Delivery>) -> Delivery {
    assert_eq!(deliveries.len(), 1, "{deliveries:?}");
    deliveries.remove(0)
}

#[test]
fn two_clients_use_the_same_id_and_each_gets_its_own_answer_once() {
    let mut board = board();
    let (of_alice, of_bob) = (call(&mut board, ALICE, json!(1)), call(&mut board, BOB, json!(1)));
    let lone = call(&mut board, Owner::Lone, json!(1));
    for (call, what) in [(of_bob, "bob"), (lone, "nobody"), (of_alice, "alice")] {
        let answer = json!({"jsonrpc": "2.0", "id": call.0, "result": what});
        let Delivery::Answer(to, message) = one(says(&mut board, &answer)) else { panic!() };
        assert_eq!((to, read(&message)), (call, json!({"jsonrpc": "2.0", "id": 1, "result": what})));
        assert_eq!(says(&mut board, &answer), [], "an answer is taken once");
    }
    assert!(board.calls.is_empty());
}

#[test]
fn an_id_is_used_once_at_a_time_in_a_session_and_there_is_an_end_to_calls() {
    let mut board = board();
    call(&mut board, ALICE, json!("x"));
    let again = text(&json!({"id": "x", "method": "m"}));
    assert_eq!(board.request(ALICE, &Envelope::read(&again).unwrap()).unwrap_err(), Refusal::IdInUse);
    for id in 1..MAX_CALLS {
        call(&mut board, Owner::Lone, json!(id));
    }
    let more = text(&json!({"id": 0, "method": "m"}));
    assert_eq!(board.request(BOB, &Envelope::read(&more).unwrap()).unwrap_err(), Refusal::TooManyCalls);
    assert!(board.request(Owner::Agent, &Envelope::read(&more).unwrap()).is_ok(), "the server's health is asked for");
}

#[test]
fn progress_goes_to_the_call_that_asked_for_it_with_its_own_token() {
    let mut board = board();
    let asked = |id| json!({"id": id, "method": "m", "params": {"_meta": {"progressToken": "mine"}}});
    let (first, sent) = ask(&mut board, ALICE, &asked(1));
    let (second, _) = ask(&mut board, BOB, &asked(1));
    assert_eq!(sent["params"]["_meta"]["progressToken"], json!(first.0));
    let progress = |call: CallId| json!({"method": "notifications/progress", "params": {"progressToken": call.0}});
    let Delivery::Related(to, message) = one(says(&mut board, &progress(second))) else { panic!() };
    assert_eq!((to, &read(&message)["params"]["progressToken"]), (second, &json!("mine")));
    let silent = call(&mut board, ALICE, json!(2));
    assert_eq!(says(&mut board, &progress(silent)), [], "nobody asked for it");
    assert_eq!(says(&mut board, &json!({"method": "notifications/progress", "params": {"progressToken": "x"}})), []);
}

#[test]
fn a_client_cancels_its_own_call_and_is_not_left_waiting() {
    let mut board = board();
    let (of_alice, of_bob) = (call(&mut board, ALICE, json!(1)), call(&mut board, BOB, json!(1)));
    let cancel = text(&json!({"method": "notifications/cancelled", "params": {"requestId": 1, "reason": "enough"}}));
    let cancel = Envelope::read(&cancel).unwrap();
    let deliveries = board.notification(BOB, &cancel);
    let [Delivery::Server(told), Delivery::Answer(to, _)] = &deliveries[..] else { panic!("{deliveries:?}") };
    assert_eq!(read(told)["params"], json!({"requestId": of_bob.0, "reason": "enough"}));
    assert_eq!(*to, of_bob);
    assert_eq!(board.notification(BOB, &cancel), [], "it is gone");
    assert_eq!(board.notification(Owner::Lone, &cancel), []);
    assert!(board.is_under_way(of_alice) && !board.is_under_way(of_bob));
    let hung_up = board.hang_up(of_alice);
    assert_eq!(read(&hung_up[0])["params"]["requestId"], json!(of_alice.0));
    assert_eq!((hung_up.len(), board.hang_up(of_alice).len()), (1, 0));
    let (handshake, _) = ask(&mut board, Owner::Agent, &json!({"id": 1, "method": "initialize"}));
    assert_eq!(board.hang_up(handshake), Vec::<Bytes>::new(), "the protocol forbids it");
}

#[test]
fn a_request_of_the_server_goes_to_the_one_client_it_works_for_and_to_nobody_on_a_guess() {
    let mut board = board();
    let asked = json!({"jsonrpc": "2.0", "id": "s", "method": "sampling/createMessage"});
    let refused = |delivery: Delivery| {
        let Delivery::Server(message) = delivery else { panic!("{delivery:?}") };
        assert_eq!((&read(&message)["id"], &read(&message)["error"]["code"]), (&json!("s"), &json!(-32601)));
    };
    refused(one(says(&mut board, &asked)));
    let of_bob = call(&mut board, BOB, json!(1));
    refused(one(says(&mut board, &asked)));
    board.hang_up(of_bob);
    let first = call(&mut board, ALICE, json!(1));
    let latest = call(&mut board, ALICE, json!(2));
    call(&mut board, Owner::Agent, json!(1));
    let Delivery::Related(to, message) = one(says(&mut board, &asked)) else { panic!() };
    let id = read(&message)["id"].clone();
    assert_eq!((to, id.is_u64()), (latest, true));
    let answer = text(&json!({"id": id, "result": {"role": "assistant"}}));
    let answer = Envelope::read(&answer).unwrap();
    assert_eq!(board.response(SessionKey(2), &answer), None, "Bob wasn't asked");
    let given = board.response(SessionKey(1), &answer).unwrap();
    assert_eq!(read(&given), json!({"id": "s", "result": {"role": "assistant"}}));
    assert_eq!(board.response(SessionKey(1), &answer), None, "it is taken once");
    call(&mut board, BOB, json!(1));
    refused(one(says(&mut board, &asked)));
    assert!(board.is_under_way(first));
    let ping = one(says(&mut board, &json!({"id": 9, "method": "ping"})));
    assert_eq!(ping, Delivery::Server(envelope::result("9", "{}")));
}

#[test]
fn what_is_not_answered_is_forgotten_in_time_and_one_client_does_not_use_up_what_all_may_be_asked() {
    let mut board = Switchboard::new(100, false);
    board.open(SessionKey(1), Abilities::ANY);
    board.open(SessionKey(2), Abilities::ANY);
    let begun = Instant::now();
    let later = |seconds| begun + Duration::from_secs(seconds);
    let asks = |board: &mut Switchboard, id: usize, now| {
        one(board.take(&text(&json!({"id": id, "method": "sampling/createMessage"})), now).unwrap())
    };
    let of_alice = call(&mut board, ALICE, json!(1));
    for id in 0..MAX_ASKED_OF_ONE {
        assert!(matches!(asks(&mut board, id, begun), Delivery::Related(to, _) if to == of_alice));
    }
    let Delivery::Server(refused) = asks(&mut board, 1000, begun) else { panic!() };
    assert_eq!(read(&refused)["error"]["code"], json!(-32603));
    board.take(&text(&json!({"id": of_alice.0, "result": {}})), later(10)).unwrap();
    assert_eq!(board.due(), Some(later(70)), "its call is over");
    let of_bob = call(&mut board, BOB, json!(1));
    assert!(matches!(asks(&mut board, 2000, later(20)), Delivery::Related(to, _) if to == of_bob));
    assert_eq!(board.expire(later(69)), Vec::<Bytes>::new());
    let told = board.expire(later(70));
    assert_eq!(told.len(), MAX_ASKED_OF_ONE);
    assert_eq!((&read(&told[0])["id"], &read(&told[0])["error"]["code"]), (&json!(0), &json!(-32603)));
    // Bob's call is still under way: there may be a person who has to think.
    assert_eq!(board.due(), Some(later(20) + ANSWERED_WITHIN));
    assert_eq!((board.expire(later(20) + ANSWERED_WITHIN).len(), board.due()), (1, None));
}

#[test]
fn whoever_goes_leaves_nothing_behind() {
    let mut board = board();
    let of_alice = call(&mut board, ALICE, json!(1));
    let asked = json!({"id": "s", "method": "elicitation/create"});
    assert!(matches!(one(says(&mut board, &asked)), Delivery::Related(to, _) if to == of_alice));
    let of_bob = call(&mut board, BOB, json!(1));
    let told: Vec<Value> = board.close(SessionKey(1)).iter().map(read).collect();
    assert!(told.iter().any(|message| message["id"] == "s" && message["error"]["code"] == -32603), "{told:?}");
    assert!(told.iter().any(|message| message["params"]["requestId"] == json!(of_alice.0)), "{told:?}");
    assert_eq!((told.len(), board.asked.len(), board.calls.len()), (2, 0, 1));
    board.end();
    assert!(!board.is_under_way(of_bob));
}

#[test]
fn what_is_for_everybody_reaches_everybody_and_a_line_of_log_who_works_alone() {
    let mut board = board();
    let changed = json!({"method": "notifications/tools/list_changed"});
    let to = |deliveries: Vec<Delivery>| -> Vec<String> {
        let name = |delivery| match delivery {
            Delivery::Related(call, _) => format!("call {}", call.0),
            Delivery::Session(key, _) => format!("session {}", key.0),
            other => panic!("{other:?}"),
        };
        deliveries.into_iter().map(name).collect()
    };
    assert_eq!(to(says(&mut board, &changed)), ["session 1", "session 2"]);
    board.listens(SessionKey(2), true);
    let of_alice = call(&mut board, ALICE, json!(1));
    assert_eq!(to(says(&mut board, &changed)), [format!("call {}", of_alice.0), "session 2".to_owned()]);
    let log = json!({"method": "notifications/message", "params": {"level": "info"}});
    assert_eq!(to(says(&mut board, &log)), [format!("call {}", of_alice.0)]);
    // Nobody is told of another's work on a guess.
    let of_bob = call(&mut board, BOB, json!(1));
    assert_eq!(to(says(&mut board, &log)), Vec::<String>::new());
    board.hang_up(of_alice);
    assert_eq!(to(says(&mut board, &log)), [format!("call {}", of_bob.0)]);
    // Who only listens has nothing done for it, and what the server says of itself is for every session.
    let listen = json!({"id": 1, "method": "subscriptions/listen"});
    ask(&mut board, Owner::Lone, &listen);
    assert_eq!(to(says(&mut board, &log)), [format!("call {}", of_bob.0)]);
    let asked = json!({"id": "s", "method": "elicitation/create"});
    assert!(matches!(one(says(&mut board, &asked)), Delivery::Related(call, _) if call == of_bob));
    board.hang_up(of_bob);
    assert_eq!(to(says(&mut board, &log)), ["session 1", "session 2"]);
}

#[test]
fn without_a_session_a_call_has_the_lines_of_log_it_asked_for_and_no_others() {
    let mut board = board();
    let log = json!({"method": "notifications/message", "params": {"level": "info"}});
    let wants = json!({"id": 1, "method": "m", "params": {"_meta": {"io.modelcontextprotocol/logLevel": "info"}}});
    let silent = call(&mut board, Owner::Lone, json!(1));
    assert_eq!(says(&mut board, &log), []);
    let (asked, _) = ask(&mut board, Owner::Lone, &wants);
    assert_eq!(says(&mut board, &log), [], "nobody knows whose it is");
    board.hang_up(silent);
    assert!(matches!(one(says(&mut board, &log)), Delivery::Related(call, _) if call == asked));
}

#[test]
fn what_belongs_to_a_subscription_goes_to_the_request_that_made_it() {
    let mut board = board();
    let lone = call(&mut board, Owner::Lone, json!("listen"));
    let key = "io.modelcontextprotocol/subscriptionId";
    let event = json!({"method": "notifications/tools/list_changed", "params": {"_meta": {key: lone.0.to_string()}}});
    let Delivery::Related(to, message) = one(says(&mut board, &event)) else { panic!() };
    assert_eq!((to, &read(&message)["params"]["_meta"][key]), (lone, &json!("listen")));
}

/// Something that happens, in terms of what has happened before.
#[derive(Debug, Clone)]
enum Event {
    Ask { client: u64, id: u8 },
    Answer(prop::sample::Index),
    AnswerAgain(prop::sample::Index),
    HangUp(prop::sample::Index),
    Cancel { client: u64, id: u8 },
    Leave { client: u64 },
    Come { client: u64 },
    ServerAsks { id: u8 },
    ClientAnswers { client: u64, which: prop::sample::Index },
    ServerCancels { id: u8 },
}

fn event() -> impl Strategy<Value = Event> {
    let index = any::<prop::sample::Index>;
    let client = || 0_u64..4;
    prop_oneof![
        5 => (client(), 0_u8..4).prop_map(|(client, id)| Event::Ask { client, id }),
        4 => index().prop_map(Event::Answer),
        2 => index().prop_map(Event::AnswerAgain),
        1 => index().prop_map(Event::HangUp),
        1 => (client(), 0_u8..4).prop_map(|(client, id)| Event::Cancel { client, id }),
        1 => client().prop_map(|client| Event::Leave { client }),
        1 => client().prop_map(|client| Event::Come { client }),
        2 => (0_u8..4).prop_map(|id| Event::ServerAsks { id }),
        2 => (client(), index()).prop_map(|(client, which)| Event::ClientAnswers { client, which }),
        1 => (0_u8..4).prop_map(|id| Event::ServerCancels { id }),
    ]
}

/// What a client or the server holds, told apart by a number of its own.
#[derive(Debug, Clone, PartialEq)]
struct Open {
    client: u64,
    id: String,
    number: u64,
}

/// 0 has no session.
fn owner(client: u64) -> Owner {
    if client == 0 { Owner::Lone } else { Owner::Session(SessionKey(client)) }
}

#[derive(Default)]
struct World {
    waiting: BTreeMap<CallId, Open>,
    done: Vec<CallId>,
    /// What the server waits for, by the id it gave; and what clients were asked, by the id they saw.
    asked: Vec<(String, u64, u64)>,
    numbers: u64,
}

impl World {
    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    fn gave_up(&mut self, call: CallId) {
        self.waiting.remove(&call);
        self.done.push(call);
    }
}

proptest! {
    /// Whatever happens in whatever order, no answer is lost, crossed or doubled, in either direction.
    #[test]
    fn answers_are_neither_lost_nor_crossed_nor_doubled(events in prop::collection::vec(event(), 1..80)) {
        let mut board = Switchboard::new(7, false);
        let mut world = World::default();
        for client in 1..4 {
            board.open(SessionKey(client), Abilities::ANY);
        }
        for event in events {
            match event {
                Event::Ask { client, id } => {
                    let number = world.number();
                    let message = text(&json!({"id": id, "method": "m", "params": {"number": number}}));
                    let taken = client != 0
                        && world.waiting.values().any(|open| open.client == client && open.id == id.to_string());
                    match board.request(owner(client), &Envelope::read(&message).unwrap()) {
                        Ok((call, _)) => {
                            prop_assert!(!taken && !world.waiting.contains_key(&call));
                            world.waiting.insert(call, Open { client, id: id.to_string(), number });
                        }
                        Err(refusal) => prop_assert!(taken && refusal == Refusal::IdInUse),
                    }
                }
                Event::Answer(which) => {
                    if world.waiting.is_empty() { continue }
                    let (call, open) = world.waiting.iter().nth(which.index(world.waiting.len())).unwrap();
                    let (call, open) = (*call, open.clone());
                    let deliveries = says(&mut board, &json!({"id": call.0, "result": open.number}));
                    let [Delivery::Answer(to, message)] = &deliveries[..] else { panic!("lost: {deliveries:?}") };
                    prop_assert_eq!(*to, call);
                    prop_assert_eq!(read(message), json!({"id": open.id.parse::<u8>().unwrap(), "result": open.number}));
                    world.gave_up(call);
                }
                Event::AnswerAgain(which) => {
                    let call = if world.done.is_empty() { CallId(3) } else { *which.get(&world.done) };
                    prop_assert_eq!(says(&mut board, &json!({"id": call.0, "result": "again"})), []);
                }
                Event::HangUp(which) => {
                    if world.waiting.is_empty() { continue }
                    let call = *world.waiting.keys().nth(which.index(world.waiting.len())).unwrap();
                    let told = board.hang_up(call);
                    let cancelled = told.iter().filter(|message| read(message)["params"]["requestId"] == json!(call.0));
                    prop_assert_eq!(cancelled.count(), 1);
                    forget_answered(&mut world, &told);
                    world.gave_up(call);
                }
                Event::Cancel { client, id } => {
                    let message = text(&json!({"method": "notifications/cancelled", "params": {"requestId": id}}));
                    let mut told = Vec::new();
                    for delivery in board.notification(owner(client), &Envelope::read(&message).unwrap()) {
                        match delivery {
                            Delivery::Server(message) => told.push(message),
                            Delivery::Answer(call, message) => {
                                let open = world.waiting.get(&call).cloned().unwrap();
                                prop_assert_eq!((open.client, &open.id), (client, &id.to_string()));
                                prop_assert_eq!(&read(&message)["id"], &json!(id));
                                world.gave_up(call);
                            }
                            other => panic!("{other:?}"),
                        }
                    }
                    forget_answered(&mut world, &told);
                }
                Event::Leave { client } => {
                    let told = board.close(SessionKey(client));
                    let its: Vec<CallId> = world.waiting.iter().filter(|(_, open)| client != 0 && open.client == client).map(|(call, _)| *call).collect();
                    its.into_iter().for_each(|call| world.gave_up(call));
                    forget_answered(&mut world, &told);
                    prop_assert!(!world.asked.iter().any(|(_, _, asked)| *asked == client));
                }
                Event::Come { client } if client != 0 => board.open(SessionKey(client), Abilities::ANY),
                Event::Come { .. } => {}
                Event::ServerAsks { id } => {
                    let number = world.number();
                    let id = format!("{id}-{number}");
                    let delivery = one(says(&mut board, &json!({"id": id, "method": "roots/list", "params": number})));
                    let owners: BTreeSet<u64> = world.waiting.values().map(|open| open.client).collect();
                    match delivery {
                        Delivery::Related(call, message) => {
                            let to = world.waiting[&call].client;
                            prop_assert_eq!(owners, BTreeSet::from([to]));
                            prop_assert!(to != 0);
                            world.asked.push((id, read(&message)["id"].as_u64().unwrap(), to));
                        }
                        Delivery::Server(message) => {
                            prop_assert_eq!(&read(&message)["id"], &json!(id));
                            prop_assert!(owners.len() != 1 || owners.contains(&0) || !board.is_open(SessionKey(*owners.first().unwrap())));
                        }
                        other => panic!("{other:?}"),
                    }
                }
                Event::ClientAnswers { client, which } => {
                    if world.asked.is_empty() { continue }
                    let at = which.index(world.asked.len());
                    let (id, seen, asked) = world.asked[at].clone();
                    let message = text(&json!({"id": seen, "result": seen}));
                    let given = board.response(SessionKey(client), &Envelope::read(&message).unwrap());
                    if asked == client {
                        prop_assert_eq!(read(&given.unwrap()), json!({"id": id, "result": seen}));
                        world.asked.remove(at);
                    } else {
                        prop_assert_eq!(given, None);
                    }
                }
                Event::ServerCancels { id } => {
                    let Some(at) = world.asked.iter().position(|(asked, _, _)| asked.starts_with(&id.to_string())) else { continue };
                    let (id, seen, client) = world.asked.remove(at);
                    let cancelled = json!({"method": "notifications/cancelled", "params": {"requestId": id}});
                    match one(says(&mut board, &cancelled)) {
                        Delivery::Related(call, message) => {
                            prop_assert_eq!(world.waiting[&call].client, client);
                            prop_assert_eq!(&read(&message)["params"]["requestId"], &json!(seen));
                        }
                        Delivery::Session(key, message) => {
                            prop_assert_eq!(key.0, client);
                            prop_assert_eq!(&read(&message)["params"]["requestId"], &json!(seen));
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
            prop_assert_eq!(board.calls.keys().collect::<Vec<_>>(), world.waiting.keys().collect::<Vec<_>>());
            prop_assert_eq!(board.asked.len(), world.asked.len());
        }
    }
}

/// What the server has been answered in a client's place.
fn forget_answered(world: &mut World, told: &[Bytes]) {
    for message in told.iter().map(read) {
        if let Some(id) = message.get("id").and_then(Value::as_str) {
            let before = world.asked.len();
            world.asked.retain(|(asked, _, _)| asked != id);
            assert_eq!(world.asked.len() + 1, before, "{id} was answered and nobody waited for it");
        }
    }
}
