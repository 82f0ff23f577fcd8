//! Who reaches whom, on a real Docker Engine: instances, groups, the world, and the agent that reaches them all.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use axum::http::{Method, StatusCode};
use dtma_agent::egress::{self, EgressState};
use dtma_agent::instance::{Policy, Spec, validate};
use serde_json::{Value, json};

use crate::host::agent::{Agent, body};
use crate::host::{Host, docker, docker_may_fail};

const WAIT: Duration = Duration::from_secs(60);
/// The server's exit code for a connection that can't be made.
const NO_WAY: Option<i32> = Some(7);

/// A server that answers, with what may be reached from it.
fn spec(host: &Host, word: &str, group: Option<&str>, egress: &Value) -> Spec {
    let group = group.map(|group| group.parse().unwrap());
    let policy = Policy { group, shared_network: true, ..Policy::default() };
    let asked = body(host, word, json!({ "mcpTransportType": "http", "egress": egress }));
    validate(&asked, &policy).unwrap().0
}

async fn deploy(agent: &Agent, host: &Host, word: &str, group: Option<&str>, egress: &Value) -> IpAddr {
    // That it is deployed means that the agent has reached it.
    let deployed = agent.instances.deploy(spec(host, word, group, egress), WAIT).await.unwrap();
    assert!(deployed.settled, "{deployed:?}");
    address(agent, host, word)
}

/// Where the agent reaches it.
fn address(agent: &Agent, host: &Host, word: &str) -> IpAddr {
    agent.instances.upstream(&host.name(word).parse().unwrap()).unwrap().address.ip()
}

/// Its address on a network.
fn address_on(host: &Host, word: &str, network: &str) -> IpAddr {
    let seen = host.inspect(&host.name(word));
    let endpoint = &seen["NetworkSettings"]["Networks"][format!("dtma-{}{network}", host.scope)];
    endpoint["IPAddress"].as_str().unwrap().parse().unwrap()
}

/// The exit code, and what was printed.
fn run_in(host: &Host, word: &str, command: &[&str]) -> (Option<i32>, String) {
    let output = docker_may_fail(&[&["exec", &host.name(word), "/server"], command].concat());
    (output.status.code(), String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn reach(host: &Host, from: &str, to: IpAddr, port: u16) -> Option<i32> {
    run_in(host, from, &["reach", &to.to_string(), &port.to_string()]).0
}

fn networks(host: &Host) -> Vec<String> {
    let label = format!("label=dtma.scope={}", host.scope);
    let all = docker(&["network", "ls", "--filter", &label, "--format", "{{.Name}}"]);
    let mut all: Vec<_> = all.lines().map(|name| name.replace(&format!("dtma-{}", host.scope), "dtma")).collect();
    all.sort();
    all
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn members_of_a_group_reach_each_other_by_name_and_nobody_else() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    for (word, group) in [("a1", Some("aa")), ("a2", Some("aa")), ("b1", Some("bb")), ("alone", None)] {
        deploy(&agent, &host, word, group, &json!("open")).await;
    }
    // Whatever each of them may reach beyond the group.
    for (word, egress) in [("a3", json!("none")), ("a4", json!({ "allow": ["192.0.2.1:443"] }))] {
        deploy(&agent, &host, word, Some("aa"), &egress).await;
    }
    for from in ["a1", "a2", "a3", "a4"] {
        for to in ["a1", "a2", "a3", "a4"].map(|word| host.name(word)) {
            for name in [to.clone(), format!("{to}.group")] {
                let (code, address) = run_in(&host, from, &["resolve", &name]);
                assert_eq!(code, Some(0), "{from} looks {name} up");
                assert_eq!(
                    reach(&host, from, address.parse().unwrap(), 8080),
                    Some(0),
                    "{from} to {name} at {address}"
                );
            }
        }
    }
    let (a2, a2_name) = (address_on(&host, "a2", ".group.aa"), host.name("a2"));
    // By whatever address, from outside the group or beside it.
    for from in ["b1", "alone"] {
        for to in [a2, address(&agent, &host, "a2")] {
            assert_eq!(reach(&host, from, to, 8080), NO_WAY, "{from} to a2 at {to}");
        }
        assert_ne!(run_in(&host, from, &["resolve", &format!("{a2_name}.group")]).0, Some(0), "{from}");
    }
    assert_eq!(reach(&host, "a1", address_on(&host, "b1", ".group.bb"), 8080), NO_WAY);
    assert_eq!(reach(&host, "b1", address_on(&host, "a1", ".group-open.aa"), 8080), NO_WAY);
    let of_aa = ["dtma.group-open.aa", "dtma.group.aa"];
    assert_eq!(networks(&host), ["dtma", of_aa[0], "dtma.group-open.bb", of_aa[1], "dtma.group.bb", "dtma.listed"]);

    // A network goes with the last member, also when that one doesn't run.
    agent.call(Method::POST, &format!("/tools/{a2_name}/stop")).await;
    agent.call(Method::DELETE, &format!("/tools/{}", host.name("a1"))).await;
    for word in ["a3", "a4"] {
        agent.call(Method::DELETE, &format!("/tools/{}", host.name(word))).await;
    }
    let left = networks(&host);
    assert!(of_aa.iter().all(|network| left.contains(&(*network).to_owned())), "{left:?}");
    agent.call(Method::DELETE, &format!("/tools/{a2_name}")).await;
    assert_eq!(networks(&host), ["dtma", "dtma.group-open.bb", "dtma.group.bb", "dtma.listed"]);
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn who_may_go_nowhere_goes_nowhere_and_the_agent_still_reaches_it() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let open = deploy(&agent, &host, "open", None, &json!("open")).await;
    let closed = deploy(&agent, &host, "closed", None, &json!("none")).await;
    let beside = deploy(&agent, &host, "beside", None, &json!("none")).await;
    host.stranger(&host.name("stranger"), &[]);
    let stranger: IpAddr =
        host.inspect(&host.name("stranger"))["NetworkSettings"]["IPAddress"].as_str().unwrap().parse().unwrap();
    for to in [open, beside, stranger] {
        assert_eq!(reach(&host, "closed", to, 8080), NO_WAY, "{to}");
    }
    assert_eq!(reach(&host, "open", closed, 8080), NO_WAY);
    // Docker's own names are answered; what would have to be asked outside is not.
    assert_eq!(run_in(&host, "closed", &["resolve", &host.name("closed")]).0, Some(0));
    assert_ne!(run_in(&host, "closed", &["resolve", "example.com"]).0, Some(0));
    let seen = host.inspect(&host.name("closed"));
    assert_eq!(seen["HostConfig"]["Dns"], json!(["127.0.0.1"]));
    assert_eq!(networks(&host), ["dtma", "dtma.closed"]);
    assert_eq!(docker(&["network", "inspect", &format!("dtma-{}.closed", host.scope), "-f", "{{.Internal}}"]), "true");
    // Also after a restart of the server.
    let (status, answer) = agent.call(Method::POST, &format!("/tools/{}/restart", host.name("closed"))).await;
    assert_eq!((status, &answer["data"]["health"]), (StatusCode::OK, &json!("healthy")), "{answer}");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_list_leads_where_it_says_through_the_agent_and_nowhere_else() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    host.stranger(&host.name("server"), &["-e", "GREETING=out there"]);
    host.stranger(&host.name("other"), &[]);
    let stranger = |word: &str| {
        let seen = host.inspect(&host.name(word));
        seen["NetworkSettings"]["IPAddress"].as_str().unwrap().to_owned()
    };
    let (server, other) = (stranger("server"), stranger("other"));
    let neighbour = deploy(&agent, &host, "neighbour", None, &json!("open")).await;
    let list = json!({ "allow": [format!("{server}:8080"), format!("{neighbour}:8080")] });
    deploy(&agent, &host, "listed", None, &list).await;
    let EgressState::Open(proxy) = agent.instances.egress().state() else { panic!("the proxy is needed") };
    let port = egress::PORT.to_string();
    // Elsewhere, because the agent's proxy has to go on meanwhile.
    let ask = async |word: &str, request: &str| {
        let command = ["exec", &host.name(word), "/server", "ask", &proxy.ip().to_string(), &port, request];
        let command = command.map(str::to_owned);
        let asked = tokio::task::spawn_blocking(move || docker_may_fail(&command.each_ref().map(String::as_str)));
        let output = asked.await.unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let get = |to: &str| format!("GET http://{to}:8080/ HTTP/1.1|Host: x|Connection: close||");

    let variables = host.inspect(&host.name("listed"))["Config"]["Env"].to_string();
    assert!(variables.contains(&format!("HTTPS_PROXY=http://{proxy}")), "{variables}");
    let (code, answer) = ask("listed", &get(&server)).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("out there"), "{code:?}: {answer}");
    let tunnel = format!("CONNECT {server}:8080 HTTP/1.1|Host: x||GET / HTTP/1.1||");
    let (_, answer) = ask("listed", &tunnel).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("out there"), "{answer}");

    for (to, why) in [
        (other.as_str(), "is not in this instance's egress list"),
        (&neighbour.to_string(), "is another instance's address"),
        ("169.254.169.254", "is not in this instance's egress list"),
    ] {
        let (_, answer) = ask("listed", &get(to)).await;
        assert!(answer.starts_with("HTTP/1.1 403") && answer.contains(why), "{to}: {answer}");
    }
    // What takes no notice of the proxy gets nowhere by itself.
    for to in [server.parse().unwrap(), neighbour] {
        assert_eq!(reach(&host, "listed", to, 8080), NO_WAY, "{to}");
    }
    // Whoever has no list has no use for the proxy.
    let (code, answer) = ask("neighbour", &get(&server)).await;
    assert!(code == NO_WAY || answer.starts_with("HTTP/1.1 403"), "{answer}");
    let figures = agent.instances.egress().figures();
    assert_eq!((figures.permitted, figures.failed), (2, 0));
    let (_, metrics) = agent.text(Method::GET, "/metrics", None).await;
    assert!(metrics.contains("dtma_egress_requests_total{outcome=\"permitted\"} 2"), "{metrics}");

    // The agent dies and comes back: the way out comes back with it, for the same server at the same address.
    let before = host.inspect(&host.name("listed"))["State"]["StartedAt"].clone();
    agent.kill().await;
    assert_eq!(ask("listed", &get(&server)).await.0, NO_WAY, "nobody lets it out while the agent is away");
    let agent = Agent::start(&host, state.path());
    let begun = Instant::now();
    let answer = loop {
        let (_, answer) = ask("listed", &get(&server)).await;
        if answer.starts_with("HTTP/1.1 200") || begun.elapsed() > WAIT {
            break answer;
        }
    };
    assert!(answer.ends_with("out there"), "{answer}");
    assert_eq!(host.inspect(&host.name("listed"))["State"]["StartedAt"], before);
    let (status, answer) = agent.call(Method::DELETE, &format!("/tools/{}", host.name("listed"))).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_program_that_asks_for_its_way_out_in_its_first_moment_gets_it() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    host.stranger(&host.name("server"), &[]);
    let server = host.inspect(&host.name("server"))["NetworkSettings"]["IPAddress"].as_str().unwrap().to_owned();
    deploy(&agent, &host, "first", None, &json!({ "allow": [format!("{server}:8080")] })).await;
    let EgressState::Open(proxy) = agent.instances.egress().state() else { panic!("the proxy is needed") };
    // It ends at once, so that all it ever does is its first moment.
    let request = format!("GET http://{server}:8080/ HTTP/1.1|Host: x|Connection: close||");
    let asked = body(
        &host,
        "second",
        json!({
            "egress": { "allow": [format!("{server}:8080")] },
            "baseConfigOverrideJson": {
                "Cmd": ["ask", proxy.ip().to_string(), egress::PORT.to_string(), request],
                "HostConfig": { "RestartPolicy": { "Name": "no" } },
            },
        }),
    );
    let (_, answer) = agent.deploy(&asked).await;
    let said = answer["details"]["log"].to_string();
    assert!(said.contains("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn networks_that_vanish_are_made_again_and_what_is_on_the_wrong_ones_is_made_anew() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let list = json!({ "allow": ["192.0.2.1:443"] });
    deploy(&agent, &host, "open", None, &json!("open")).await;
    deploy(&agent, &host, "closed", None, &json!("none")).await;
    deploy(&agent, &host, "member", Some("aa"), &json!("open")).await;
    deploy(&agent, &host, "listed", None, &list).await;
    let words = ["open", "closed", "member", "listed"];
    for word in words {
        let (_, answer) = agent.call(Method::POST, &format!("/tools/{}/stop", host.name(word))).await;
        assert_eq!(answer["data"]["state"], "stopped", "{answer}");
    }
    let all = networks(&host);
    assert_eq!(all, ["dtma", "dtma.closed", "dtma.group-open.aa", "dtma.group.aa", "dtma.listed"]);
    for network in &all {
        docker(&["network", "rm", &network.replace("dtma", &format!("dtma-{}", host.scope))]);
    }
    for word in words {
        let (status, answer) = agent.call(Method::POST, &format!("/tools/{}/start", host.name(word))).await;
        assert_eq!((status, &answer["data"]["health"]), (StatusCode::OK, &json!("healthy")), "{word}: {answer}");
    }
    assert_eq!(networks(&host), all);
    assert!(matches!(agent.instances.egress().state(), EgressState::Open(_)));

    // Taken off its group's network while it runs.
    let group = format!("dtma-{}.group.aa", host.scope);
    let before = host.inspect(&host.name("member"))["Id"].clone();
    docker(&["network", "disconnect", "-f", &group, &host.name("member")]);
    let begun = Instant::now();
    loop {
        let seen = docker_may_fail(&["inspect", &host.name("member")]);
        let seen: Value = serde_json::from_slice(&seen.stdout).unwrap_or_default();
        let anew = seen[0]["Id"] != before && seen[0]["State"]["Running"] == true;
        if anew && seen[0]["NetworkSettings"]["Networks"][&group].is_object() {
            break;
        }
        // Docker reports nothing of it, so that the agent's own look has to find it.
        assert!(begun.elapsed() < WAIT, "{seen}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_strangers_network_of_the_same_name_is_refused_and_left_alone() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&host, state.path());
    let theirs = format!("dtma-{}.closed", host.scope);
    // Labelled only so that it goes with the test.
    docker(&["network", "create", "--label", &format!("dtma.scope={}", host.scope), &theirs]);
    let (status, answer) = agent.deploy(&body(&host, "one", json!({ "egress": "none" }))).await;
    assert_eq!((status.as_u16(), &answer["code"]), (422, &json!("container_refused")), "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("exists that this agent did not make"), "{answer}");
    assert_eq!(networks(&host), ["dtma.closed"]);
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_way_out_that_cannot_be_opened_fails_the_deploy_and_is_said_by_ready() {
    let (host, state) = (Host::new(), tempfile::tempdir().unwrap());
    // Somebody has the proxy's port on every address.
    let taken = std::net::TcpListener::bind(("0.0.0.0", egress::PORT)).unwrap();
    let agent = Agent::start(&host, state.path());
    let asked = body(&host, "one", json!({ "egress": { "allow": ["example.com"] } }));
    let (status, answer) = agent.deploy(&asked).await;
    assert_eq!((status.as_u16(), &answer["code"]), (503, &json!("egress_unavailable")), "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("can't listen on"), "{answer}");
    let (status, answer) = agent.call(Method::GET, "/ready").await;
    assert_eq!((status.as_u16(), &answer["details"]["checks"]["egress"]), (503, &json!(false)), "{answer}");
    assert_eq!(host.left(), Vec::<String>::new());
    drop(taken);
    let (status, answer) = agent.deploy(&asked).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    assert_eq!(agent.call(Method::GET, "/ready").await.0, StatusCode::OK);
}
