use dtma_api::instance::{PullPolicy, Transport};
use serde_json::{Value, json};

use super::*;
use crate::instance::network::Egress;
use crate::instance::session::SessionMode;
use crate::instance::spec::{Capability, HostPort, PortProtocol, RestartPolicy};

fn body(more: Value) -> Value {
    let mut body = json!({
        "dockerImageUrl": "registry.example/server:1",
        "instanceNameOnToolbox": "one",
        "accountToolInstanceId": "ati-1",
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn read(more: Value) -> Result<(Spec, Vec<Fault>), Refusal> {
    validate(&body(more), &Policy::default())
}

fn host(config: Value) -> Result<(Spec, Vec<Fault>), Refusal> {
    read(json!({ "baseConfigOverrideJson": { "HostConfig": config } }))
}

fn paths(refusal: &Refusal) -> Vec<&str> {
    refusal.faults.iter().map(|fault| fault.path.as_str()).collect()
}

#[test]
fn the_old_fields_alone_are_a_whole_deploy() {
    let (spec, warnings) = read(json!({})).unwrap();
    assert_eq!(warnings, []);
    assert_eq!(spec.name.as_str(), "one");
    assert_eq!(
        (spec.mcp, spec.pull_policy, spec.restart),
        (None, PullPolicy::IfNotPresent, RestartPolicy::UnlessStopped)
    );
    assert_eq!((spec.limits.memory_bytes, spec.limits.pids), (512 << 20, 256));
}

#[test]
fn what_the_old_callers_send_is_taken_and_the_agents_own_port_is_replaced() {
    let (spec, warnings) = read(json!({ "baseConfigOverrideJson": {
        "Env": ["A=1", "B=x=y"],
        "HostConfig": { "PortBindings": { "8080/tcp": [{ "HostPort": "30000" }] }, "RestartPolicy": { "Name": "always" } },
    }}))
    .unwrap();
    assert_eq!(spec.ports.len(), 1);
    assert_eq!(
        (spec.ports[0].container, spec.ports[0].protocol, spec.ports[0].host),
        (8080, PortProtocol::Tcp, HostPort::Any)
    );
    assert_eq!(spec.process.environment.0.get("B").map(String::as_str), Some("x=y"));
    let warned: Vec<&str> = warnings.iter().map(|warning| warning.path.as_str()).collect();
    assert_eq!(
        warned,
        [
            "$.baseConfigOverrideJson.HostConfig.PortBindings[\"8080/tcp\"][0].HostPort",
            "$.baseConfigOverrideJson.HostConfig.RestartPolicy.Name",
        ]
    );
}

#[test]
fn every_fault_is_named_at_once_with_its_place() {
    let refusal = validate(
        &json!({
            "instanceNameOnToolbox": "../etc",
            "accountToolInstanceId": 7,
            "pullPolicy": "sometimes",
            "mcpTransportType": "carrier pigeon",
            "mcpPort": 0,
            "environmentVariables": { "A B": "x", "GOOD": ["x"] },
            "resourceLimits": { "memory": "lots", "cpu": 0 },
            "volumes": [{ "name": "a.b", "path": "/proc/x" }, "nonsense"],
            "egress": "allow-list",
            "baseConfigOverrideJson": { "Env": ["NOPE", 1], "WorkingDir": "relative", "Labels": { "dtma.managed": "false" } },
        }),
        &Policy::default(),
    )
    .unwrap_err();
    assert!(!refusal.forbidden);
    let mut named = paths(&refusal);
    named.sort_unstable();
    assert_eq!(
        named,
        [
            "$.accountToolInstanceId",
            "$.baseConfigOverrideJson.Env[0]",
            "$.baseConfigOverrideJson.Env[1]",
            "$.baseConfigOverrideJson.Labels[\"dtma.managed\"]",
            "$.baseConfigOverrideJson.WorkingDir",
            "$.dockerImageUrl",
            "$.egress",
            "$.environmentVariables.GOOD",
            "$.environmentVariables[\"A B\"]",
            "$.instanceNameOnToolbox",
            "$.mcpPort",
            "$.mcpTransportType",
            "$.pullPolicy",
            "$.resourceLimits.cpu",
            "$.resourceLimits.memory",
            "$.volumes[0].name",
            "$.volumes[0].path",
            "$.volumes[1]",
        ]
    );
}

#[test]
fn nothing_that_hands_over_the_host_is_let_through() {
    for config in [
        json!({ "Privileged": true }),
        json!({ "Binds": ["/:/host"] }),
        json!({ "Binds": ["/var/run/docker.sock:/var/run/docker.sock"] }),
        json!({ "Binds": ["somebodys-volume:/data"] }),
        json!({ "Mounts": [{ "Type": "bind", "Source": "/", "Target": "/host" }] }),
        json!({ "VolumesFrom": ["other"] }),
        json!({ "Devices": [{ "PathOnHost": "/dev/sda" }] }),
        json!({ "DeviceRequests": [{ "Count": -1 }] }),
        json!({ "DeviceCgroupRules": ["a *:* rwm"] }),
        json!({ "NetworkMode": "host" }),
        json!({ "NetworkMode": "container:other" }),
        json!({ "NetworkMode": "somebodys-network" }),
        json!({ "PidMode": "host" }),
        json!({ "PidMode": "container:other" }),
        json!({ "IpcMode": "host" }),
        json!({ "UTSMode": "host" }),
        json!({ "UsernsMode": "host" }),
        json!({ "CgroupnsMode": "host" }),
        json!({ "CgroupParent": "/" }),
        json!({ "CapAdd": ["SYS_ADMIN"] }),
        json!({ "CapAdd": ["ALL"] }),
        json!({ "CapAdd": ["CAP_NET_ADMIN"] }),
        json!({ "CapAdd": ["NET_RAW"] }),
        json!({ "CapAdd": [7] }),
        json!({ "SecurityOpt": ["seccomp=unconfined"] }),
        json!({ "SecurityOpt": ["apparmor=unconfined"] }),
        json!({ "Sysctls": { "kernel.msgmax": "1" } }),
        json!({ "Runtime": "other" }),
        json!({ "OomKillDisable": true }),
        json!({ "OomScoreAdj": -1000 }),
        json!({ "MaskedPaths": [] }),
        json!({ "ReadonlyPaths": [] }),
    ] {
        let refusal = host(config.clone()).expect_err(&config.to_string());
        assert!(refusal.forbidden, "{config}");
        let key = config.as_object().unwrap().keys().next().unwrap();
        assert!(refusal.faults[0].path.contains(&format!(".HostConfig.{key}")), "{config}: {refusal:?}");
    }
}

#[test]
fn defaults_spelt_out_are_as_if_absent() {
    let (spec, warnings) = host(json!({
        "Privileged": false, "Binds": null, "Mounts": [], "Devices": [], "NetworkMode": "default", "IpcMode": "private",
        "PidMode": "", "CapAdd": null, "SecurityOpt": ["no-new-privileges"], "Sysctls": {}, "OomScoreAdj": 0, "Memory": 0,
        "MaskedPaths": null,
    }))
    .unwrap();
    assert_eq!(warnings, []);
    assert_eq!(spec, read(json!({})).unwrap().0);
}

#[test]
fn options_nobody_reads_are_named_in_a_warning() {
    let (_, warnings) = read(json!({
        "somethingNew": 1,
        "baseConfigOverrideJson": { "Hostname": "x", "HostConfig": { "DnsSearch": ["x"], "ExtraHosts": [] } },
    }))
    .unwrap();
    let mut warned: Vec<&str> = warnings.iter().map(|warning| warning.path.as_str()).collect();
    warned.sort_unstable();
    assert_eq!(
        warned,
        ["$.baseConfigOverrideJson.HostConfig.DnsSearch", "$.baseConfigOverrideJson.Hostname", "$.somethingNew"]
    );
}

#[test]
fn limits_are_read_in_dockers_units_and_the_newer_field_wins() {
    let (spec, _) = host(json!({ "Memory": "256m", "NanoCpus": 500_000_000, "PidsLimit": 64 })).unwrap();
    assert_eq!((spec.limits.memory_bytes, spec.limits.nano_cpus, spec.limits.pids), (256 << 20, 500_000_000, 64));
    let (spec, _) = read(json!({
        "resourceLimits": { "memory": "1g", "cpu": 0.25 },
        "baseConfigOverrideJson": { "HostConfig": { "Memory": 268_435_456 } },
    }))
    .unwrap();
    assert_eq!((spec.limits.memory_bytes, spec.limits.nano_cpus), (1 << 30, 250_000_000));
    for bad in [json!("5m"), json!(-1), json!("1t"), json!("99999999999g"), json!("m"), json!(true)] {
        assert!(host(json!({ "Memory": bad })).is_err(), "{bad}");
    }
}

#[test]
fn a_template_is_what_the_request_does_not_say() {
    let (spec, warnings) = read(json!({ "template": ["small", "hardened"] })).unwrap();
    assert_eq!(warnings, []);
    assert_eq!((spec.limits.memory_bytes, spec.limits.nano_cpus, spec.limits.pids), (128 << 20, 250_000_000, 64));
    assert!(spec.sandbox.read_only_root && spec.sandbox.tmpfs.contains_key("/tmp"));
    assert_eq!(spec.network.egress, Egress::None);
    let (spec, _) = read(json!({
        "template": ["hardened", "small"],
        "resourceLimits": { "cpu": 0.5 },
        "egress": "open",
        "volumes": [{ "name": "scratch", "path": "/tmp" }],
        "baseConfigOverrideJson": { "HostConfig": { "Memory": "256m", "ReadonlyRootfs": false, "Tmpfs": { "/run": "" } } },
    }))
    .unwrap();
    assert_eq!((spec.limits.memory_bytes, spec.limits.nano_cpus, spec.limits.pids), (256 << 20, 500_000_000, 64));
    assert!(!spec.sandbox.read_only_root && spec.network.egress == Egress::Open);
    assert_eq!(spec.sandbox.tmpfs.keys().collect::<Vec<_>>(), ["/run"]);
    for nothing in [json!(null), json!(""), json!([]), json!("standard")] {
        assert_eq!(read(json!({ "template": nothing })).unwrap().0, read(json!({})).unwrap().0);
    }
}

#[test]
fn a_template_that_is_none_is_a_fault_naming_those_there_are() {
    let refusal = read(json!({ "template": "huge" })).unwrap_err();
    let known = "is not a template of this agent; it has small, standard, large, hardened";
    assert_eq!((refusal.faults[0].path.as_str(), refusal.faults[0].problem.as_str()), ("$.template", known));
    assert_eq!(
        paths(&read(json!({ "template": ["small", 7, "large"] })).unwrap_err()),
        ["$.template[1]", "$.template[2]"]
    );
    assert_eq!(paths(&read(json!({ "template": { "name": "small" } })).unwrap_err()), ["$.template"]);
}

#[test]
fn a_review_also_warns_where_something_is_wrong_and_says_what_is_forbidden() {
    let review = review(
        &body(
            json!({ "mcpPort": 0, "unknown": 1, "baseConfigOverrideJson": { "HostConfig": { "Privileged": true } } }),
        ),
        &Policy::default(),
    );
    let paths = |faults: &[Fault]| faults.iter().map(|fault| fault.path.clone()).collect::<Vec<_>>();
    assert_eq!(paths(&review.faults), ["$.mcpPort", "$.baseConfigOverrideJson.HostConfig.Privileged"]);
    assert_eq!(paths(&review.forbidden), ["$.baseConfigOverrideJson.HostConfig.Privileged"]);
    assert_eq!((paths(&review.warnings), review.spec), (vec!["$.unknown".to_owned()], None));
}

#[test]
fn capabilities_docker_gives_anyway_may_be_asked_back() {
    let (spec, _) = host(json!({ "CapAdd": ["CAP_CHOWN", "setuid"] })).unwrap();
    assert_eq!(spec.sandbox.capabilities, [Capability::Chown, Capability::Setuid].into());
}

#[test]
fn egress_is_open_unless_something_else_is_asked_for() {
    let egress = |value: Value| read(json!({ "egress": value })).map(|(spec, _)| spec.network.egress);
    for open in [json!(null), json!("open")] {
        assert_eq!(egress(open).unwrap(), Egress::Open);
    }
    for none in [json!("none"), json!({ "allow": [] })] {
        assert_eq!(egress(none).unwrap(), Egress::None);
    }
    let list = ["api.github.com", "API.github.com:443", "*.example.com:8443", "10.1.2.3:5432"];
    let Egress::AllowList(list) = egress(json!({ "allow": list })).unwrap() else { panic!("a list was asked for") };
    let list: Vec<String> = list.iter().map(ToString::to_string).collect();
    assert_eq!(list, ["api.github.com:443", "*.example.com:8443", "10.1.2.3:5432"]);
}

#[test]
fn an_egress_that_is_none_is_a_fault_at_its_place_and_never_taken_for_open() {
    for (value, path) in [
        (json!("allow-list"), "$.egress"),
        (json!(true), "$.egress"),
        (json!(["api.github.com"]), "$.egress"),
        (json!({}), "$.egress.allow"),
        (json!({ "allow": "api.github.com" }), "$.egress.allow"),
        (json!({ "allow": [], "deny": ["a.b"] }), "$.egress.deny"),
        (json!({ "allow": ["a.b", "https://a.b"] }), "$.egress.allow[1]"),
        (json!({ "allow": [1] }), "$.egress.allow[0]"),
        (json!({ "allow": vec!["a.b"; 300] }), "$.egress.allow"),
    ] {
        let refusal = read(json!({ "egress": value })).unwrap_err();
        assert_eq!((paths(&refusal), refusal.forbidden), (vec![path], false), "{value}");
    }
    let refusal = read(json!({ "egress": "allow-list" })).unwrap_err();
    assert!(refusal.faults[0].problem.contains(r#"{"allow": ["#), "the fault shows how it is said: {refusal:?}");
    // The metadata service, the agent's own loopback.
    for never in ["169.254.169.254:80", "127.0.0.1:2375", "[::1]:22"] {
        let refusal = read(json!({ "egress": { "allow": [never] } })).unwrap_err();
        assert_eq!((paths(&refusal), refusal.forbidden), (vec!["$.egress.allow[0]"], true), "{never}");
    }
}

#[test]
fn a_proxy_of_the_callers_gives_way_to_the_agents_and_the_caller_is_told() {
    let (_, warnings) = read(json!({
        "egress": { "allow": ["a.b"] }, "environmentVariables": { "https_proxy": "http://x", "OTHER": "1" },
    }))
    .unwrap();
    let warned: Vec<&str> = warnings.iter().map(|warning| warning.path.as_str()).collect();
    assert_eq!(warned, ["$.environmentVariables.https_proxy"]);
    assert_eq!(read(json!({ "environmentVariables": { "https_proxy": "http://x" } })).unwrap().1, []);
}

#[test]
fn a_group_comes_from_the_groups_deploy_and_not_from_the_body() {
    let policy = Policy { group: Some("team".parse().unwrap()), shared_network: true, ..Policy::default() };
    let (spec, _) = validate(&body(json!({})), &policy).unwrap();
    assert_eq!(spec.network.group.unwrap().as_str(), "team");
    let (spec, warnings) = read(json!({ "group": "team" })).unwrap();
    assert_eq!((spec.network.group, warnings.len()), (None, 1));
}

#[test]
fn a_spec_from_before_there_was_a_choice_keeps_its_hash() {
    let (spec, _) = read(json!({})).unwrap();
    let written = serde_json::to_value(&spec).unwrap();
    assert!(written.get("network").is_none(), "{written}");
    assert_eq!(serde_json::from_value::<Spec>(written).unwrap(), spec);
}

#[test]
fn an_mcp_server_gets_the_usual_port_and_path() {
    let (spec, warnings) = read(json!({ "mcpTransportType": "http" })).unwrap();
    assert_eq!(
        spec.mcp,
        Some(McpServer { transport: Transport::Http, port: 8080, path: "/mcp".into(), sessions: SessionMode::Shared })
    );
    assert_eq!(warnings, []);
    for (transport, path) in [("stdio", "/mcp"), ("sse", "/sse"), ("websocket", "/ws")] {
        let (spec, warnings) = read(json!({ "mcpTransportType": transport })).unwrap();
        assert_eq!((spec.mcp.unwrap().path.as_str(), warnings), (path, Vec::new()), "{transport}");
    }
    for path in ["mcp", "/a b", "/a?b", "/a#b", "/ä"] {
        assert!(read(json!({ "mcpTransportType": "http", "mcpEndpointPath": path })).is_err(), "{path}");
    }
}

#[test]
fn clients_of_a_server_on_its_standard_input_share_it_or_have_a_container_each_and_no_others_have_the_choice() {
    let asked = |asked: Value| read(asked).map(|(spec, warnings)| (spec.mcp.map(|mcp| mcp.sessions), warnings.len()));
    let mode = |transport: &str, mode: Value| asked(json!({ "mcpTransportType": transport, "sessionMode": mode }));
    let per_session = |most| Some(SessionMode::PerSession { most });
    for shared in [json!("shared"), json!(null)] {
        assert_eq!(mode("stdio", shared).unwrap(), (Some(SessionMode::Shared), 0));
    }
    assert_eq!(mode("stdio", json!("per-session")).unwrap(), (per_session(16), 0));
    for refused in [json!("Shared"), json!("per_session"), json!(1)] {
        assert!(mode("stdio", refused.clone()).is_err(), "{refused}");
    }
    for transport in ["http", "sse", "websocket"] {
        let refused = mode(transport, json!("per-session")).unwrap_err();
        assert_eq!(refused.faults[0].path, "$.sessionMode", "{refused:?}");
        assert!(refused.faults[0].problem.contains("only for mcpTransportType stdio"), "{refused:?}");
        assert_eq!(mode(transport, json!("shared")).unwrap(), (Some(SessionMode::Shared), 1));
    }
    assert!(asked(json!({ "sessionMode": "per-session" })).is_err(), "without a transport it is no server");

    let most = |mode: &str, most: Value| {
        asked(json!({ "mcpTransportType": "stdio", "sessionMode": mode, "maxSessions": most }))
    };
    assert_eq!(most("per-session", json!(3)).unwrap(), (per_session(3), 0));
    assert_eq!(most("shared", json!(3)).unwrap(), (Some(SessionMode::Shared), 1));
    for refused in [json!(0), json!(65), json!("3"), json!(1.5)] {
        assert!(most("per-session", refused.clone()).is_err(), "{refused}");
    }
}

#[test]
fn a_spec_from_before_there_were_session_modes_keeps_its_hash() {
    let (shared, _) = read(json!({ "mcpTransportType": "stdio" })).unwrap();
    assert!(!serde_json::to_string(&shared).unwrap().contains("sessions"));
    let (own, _) = read(json!({ "mcpTransportType": "stdio", "sessionMode": "per-session" })).unwrap();
    assert_ne!(own.hash(), shared.hash());
    let read_again: Spec = serde_json::from_str(&serde_json::to_string(&own).unwrap()).unwrap();
    assert_eq!(read_again, own);
}

#[test]
fn ports_that_clash_or_are_none_are_faults() {
    let bindings = |bindings: Value| host(json!({ "PortBindings": bindings }));
    assert!(bindings(json!({ "80/tcp": [{ "HostPort": "8080" }], "81/tcp": [{ "HostPort": 8080 }] })).is_err());
    assert!(bindings(json!({ "80/tcp": [{ "HostPort": "8080" }], "80/udp": [{ "HostPort": 8080 }] })).is_ok());
    assert!(bindings(json!({ "80/sctp": [] })).is_err());
    assert!(bindings(json!({ "0": [] })).is_err());
    assert!(bindings(json!({ "80/tcp": [{ "HostPort": "8000-8010" }] })).is_err());
    let (spec, warnings) = bindings(json!({ "80": [{ "HostIp": "0.0.0.0", "HostPort": "" }] })).unwrap();
    assert_eq!((spec.ports[0].host, warnings.len()), (HostPort::Any, 1));
}

#[test]
fn a_value_never_appears_in_a_fault() {
    let refusal = read(json!({
        "environmentVariables": { "BAD NAME": "hunter2", "LIST": ["hunter2"] },
        "baseConfigOverrideJson": { "Env": ["hunter2", "1BAD=hunter2"] },
    }))
    .unwrap_err();
    assert_eq!(refusal.faults.len(), 4);
    assert!(!format!("{refusal:?}").contains("hunter2"));
}

#[test]
fn a_name_that_is_a_path_of_the_api_is_reserved() {
    let body = json!({ "dockerImageUrl": "a", "instanceNameOnToolbox": "status", "accountToolInstanceId": "x" });
    assert_eq!(paths(&validate(&body, &Policy::default()).unwrap_err()), ["$.instanceNameOnToolbox"]);
}

#[test]
fn anything_but_an_object_is_one_fault() {
    for body in [json!(null), json!([]), json!("x"), json!(1)] {
        assert_eq!(paths(&validate(&body, &Policy::default()).unwrap_err()), ["$"]);
    }
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
        ];
        let keys = prop::sample::select(vec![
            "HostConfig",
            "PortBindings",
            "8080/tcp",
            "HostPort",
            "HostIp",
            "Memory",
            "NanoCpus",
            "RestartPolicy",
            "Name",
            "CapAdd",
            "Env",
            "Cmd",
            "Labels",
            "Tmpfs",
            "volumes",
            "name",
            "path",
            "memory",
            "cpu",
            "resourceLimits",
            "mcpPort",
            "environmentVariables",
            "baseConfigOverrideJson",
            "Privileged",
            "Binds",
            "Mounts",
            "NetworkMode",
            "egress",
            "allow",
        ]);
        leaf.prop_recursive(5, 48, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(keys.clone().prop_map(str::to_owned), inner, 0..5)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn whatever_is_sent_is_answered_and_what_is_accepted_survives_the_ledger(more in any_json()) {
            let mut sent = body(json!({}));
            if let Some(members) = more.as_object() {
                sent.as_object_mut().unwrap().extend(members.clone());
            }
            match validate(&sent, &Policy::default()) {
                Ok((spec, _)) => {
                    let again: Spec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
                    prop_assert_eq!(&again, &spec);
                    prop_assert_eq!(again.hash(), spec.hash());
                }
                Err(refusal) => prop_assert!(!refusal.faults.is_empty()),
            }
        }
    }
}

#[test]
fn a_body_of_nothing_but_faults_gets_a_short_answer() {
    let refusal = read(json!({"baseConfigOverrideJson": {"Env": vec![1; 4096], "Cmd": vec![""; 5000]}})).unwrap_err();
    assert_eq!(refusal.faults.len(), 101);
    let last = refusal.faults.last().unwrap();
    assert_eq!((last.path.as_str(), last.problem.as_str()), ("$", "has 3997 more like these, which are not listed"));
    assert!(refusal.faults.iter().any(|fault| fault.problem == "has more than 4096 elements"), "{refusal:?}");
}
