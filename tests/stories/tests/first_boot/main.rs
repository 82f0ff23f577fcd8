//! The user data on real droplets: systemd, the real cloud-init, a nested Docker Engine. What goes wrong is reported with its
//! phase and its output; what goes well leaves an agent running under the unit as shipped.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod bench;

use bench::{Bench, Served, told};
use tokio::process::Command;

const WITH_DOCKER: &str = "docker-debian-12";

/// Says that it is ready, and writes down what the unit lets it do.
const GOOD_AGENT: &str = r#"#!/usr/bin/python3
import json, os, pwd, socket, time
def can(what):
    try:
        what()
        return "yes"
    except OSError as error:
        return type(error).__name__
def docker():
    s = socket.socket(socket.AF_UNIX)
    s.connect("/var/run/docker.sock")
    s.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
    assert b"200 OK" in s.recv(4096)
def listen():
    socket.create_server(("0.0.0.0", 30000))
seen = {
    "user": pwd.getpwuid(os.getuid()).pw_name,
    "capabilities": [l.split()[1] for l in open("/proc/self/status") if l.startswith("CapEff")][0],
    "base_url": os.environ["AGENTOPIA_API_BASE_URL"],
    "token": os.environ["DTMA_ENROLMENT_TOKEN"],
    "docker": can(docker),
    "listen": can(listen),
    "write /opt/dtma": can(lambda: open("/opt/dtma/x", "w")),
    "write /etc": can(lambda: open("/etc/x", "w")),
    "read /etc/dtma.conf": can(lambda: open("/etc/dtma.conf")),
    "read user data": can(lambda: open("/var/lib/cloud/instance/user-data.txt")),
    "list interfaces": can(socket.if_nameindex),
    "load": can(os.getloadavg),
}
with open("/var/lib/dtma/seen.json", "w") as f:
    json.dump(seen, f)
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
address = os.environ["NOTIFY_SOCKET"]
if address[0] == "@":
    address = "\0" + address[1:]
while True:
    notify.sendto(b"READY=1\nWATCHDOG=1", address)
    time.sleep(5)
"#;

/// Dies with the kind of output that breaks hand-made JSON, and gives its secret away.
const BROKEN_AGENT: &str = "#!/bin/bash\nprintf 'cannot start: \"quoted\" \\\\back\\\\slash\\ttab \\e[31mred\\e[0m caf\\xc3\\xa9 \\xff end\\n'\n\
                            echo \"token=$DTMA_ENROLMENT_TOKEN\"\nexit 3\n";

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_droplet_with_docker_ends_up_with_the_agent_running_as_the_unit_says() {
    let bench = Bench::boot(WITH_DOCKER, Served::Agent(GOOD_AGENT)).await;
    let (status, reports) = bench.set_up().await;
    assert_eq!(told(&reports), (vec!["network", "docker", "download", "install", "start"], None));
    assert_eq!(status, "done", "{}", bench.shell("cat /var/log/cloud-init-output.log").await);

    let seen: serde_json::Value = serde_json::from_str(&bench.shell("cat /var/lib/dtma/seen.json").await).unwrap();
    assert_eq!(seen["user"], "dtma");
    assert_eq!(seen["capabilities"], "0000000000000000");
    assert_eq!(seen["token"], bench.token());
    assert!(seen["base_url"].as_str().unwrap().ends_with("/agent/v1"), "{seen}");
    for allowed in ["docker", "listen", "list interfaces", "load"] {
        assert_eq!(seen[allowed], "yes", "{allowed}: {seen}");
    }
    for forbidden in ["write /opt/dtma", "write /etc", "read /etc/dtma.conf", "read user data"] {
        assert_ne!(seen[forbidden], "yes", "{forbidden}: {seen}");
    }

    assert_eq!(bench.shell("systemctl is-active dtma-agent; systemctl is-enabled dtma-agent").await, "active\nenabled");
    assert_eq!(
        bench.shell("stat -c '%U %a' /etc/dtma.conf /var/lib/dtma /opt/dtma").await,
        "root 600\ndtma 700\nroot 755"
    );
    assert_eq!(bench.shell("readlink /opt/dtma/current /opt/dtma/good").await, "versions/9.9.9\nversions/9.9.9");
    assert_eq!(bench.shell("systemctl is-active dtma-update.path dtma-update.timer").await, "active\nactive");
    assert_eq!(
        bench.shell("ls /run/dtma-bootstrap 2>&1 | grep -c 'No such file'").await,
        "1",
        "its token would be readable there"
    );
    let holding = format!("grep -rlF --exclude-dir=proc --exclude-dir=sys -- {} / 2>/dev/null | sort", bench.token());
    let holding = bench.shell(&holding).await;
    for file in holding.lines() {
        let expected = file == "/etc/dtma.conf"
            || file == "/var/lib/dtma/seen.json"
            || file.starts_with("/var/lib/cloud/")
            || file.starts_with("/run/cloud-init/");
        assert!(expected, "the token lies in {file}");
    }
    let readable = bench
        .shell(&format!("runuser -u nobody -- grep -rlF -- {} /etc /var /run /opt 2>/dev/null", bench.token()))
        .await;
    assert_eq!(readable, "", "only root reads the token");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn what_is_shipped_satisfies_cloud_init_and_systemd() {
    let bench = Bench::boot(WITH_DOCKER, Served::Agent(GOOD_AGENT)).await;
    bench.set_up().await;
    let schema = bench.run(&["cloud-init", "schema", "--system"]).await;
    assert_eq!(schema.exit_code, 0, "{}{}", schema.stdout, schema.stderr);
    assert!(schema.stdout.contains("Valid"), "{}", schema.stdout);

    // The guard changes the kernel's rules; nothing else on the droplet is its to touch.
    // The updater changes programs and starts the agent anew, as root; nothing else.
    let units =
        [("dtma-agent", "20"), ("dtma-metadata-guard", "60"), ("dtma-update", "55"), ("dtma-update-undo", "55")];
    for (unit, threshold) in units {
        let unit = format!("/etc/systemd/system/{unit}.service");
        let verified = bench.run(&["systemd-analyze", "verify", &unit]).await;
        assert_eq!((verified.exit_code, verified.stderr.as_str()), (0, ""), "{}", verified.stdout);
        let threshold = format!("--threshold={threshold}");
        let rated = bench.run(&["systemd-analyze", "security", "--offline=true", &threshold, &unit]).await;
        assert_eq!(rated.exit_code, 0, "{unit} is more exposed than {threshold}:\n{}", rated.stdout);
    }
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn installing_again_changes_nothing_and_removing_keeps_what_is_the_operators() {
    let bench = Bench::boot(WITH_DOCKER, Served::Agent(GOOD_AGENT)).await;
    bench.set_up().await;
    let state = "find /opt/dtma /etc/systemd/system -printf '%p %l %m %u\\n' | sort; \
                 systemctl is-active dtma-agent dtma-metadata-guard; iptables -t raw -S PREROUTING";
    let before = bench.shell(state).await;
    let again = "cp -rL /opt/dtma/current /tmp/r && bash /tmp/r/install.sh";
    assert_eq!(bench.shell(again).await, "dtma-install: version 9.9.9 is installed");
    assert_eq!(bench.shell(state).await, before);
    assert_eq!(before.matches("-d 169.254.169.254/32 ! -i lo -j DROP").count(), 1, "{before}");

    bench.shell("bash /opt/dtma/install.sh --uninstall").await;
    assert_eq!(bench.shell("find / -xdev -name 'dtma*.service' -o -xdev -path /opt/dtma").await, "");
    assert_eq!(
        bench.shell("iptables -t raw -S PREROUTING").await,
        "-P PREROUTING ACCEPT",
        "the guard goes with the agent"
    );
    assert_eq!(
        bench.shell("systemctl is-active dtma-agent; ls /etc/dtma.conf /var/lib/dtma/seen.json").await.lines().count(),
        3
    );
    bench.shell("bash /tmp/r/install.sh && bash /opt/dtma/install.sh --uninstall --purge").await;
    assert_eq!(bench.shell("ls -d /etc/dtma.conf /var/lib/dtma* /opt/dtma 2>&1 | grep -c 'No such file'").await, "3");
    assert_eq!(bench.shell("id dtma 2>&1 | grep -c 'no such user'").await, "1");
    assert_eq!(
        bench.shell("bash /tmp/r/install.sh --uninstall").await.lines().count(),
        2,
        "removing twice is no error"
    );
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn an_installer_that_cannot_put_the_guard_in_place_says_so_and_the_guard_is_tried_until_it_is_there() {
    let bench = Bench::boot(WITH_DOCKER, Served::Agent(GOOD_AGENT)).await;
    bench.set_up().await;
    let breaking = "mv /usr/sbin/iptables /usr/sbin/iptables.away && systemctl stop dtma-agent dtma-metadata-guard; \
                    iptables.away -t raw -F PREROUTING; cp -rL /opt/dtma/current /tmp/r; timeout 20 bash /tmp/r/install.sh; echo \"status $?\"";
    let said = bench.shell(breaking).await;
    for expected in ["there is no iptables; install it", "dtma-metadata-guard.service did not start", "status 1"] {
        assert!(said.contains(expected), "{said}");
    }
    bench.shell("mv /usr/sbin/iptables.away /usr/sbin/iptables").await;
    let back = "for i in $(seq 100); do systemctl is-active --quiet dtma-metadata-guard && break; sleep 0.1; done; \
                iptables -t raw -S PREROUTING | grep -c 169.254.169.254";
    assert_eq!(bench.shell(back).await, "1");
}

/// What the droplet reports when the release behind its URL is this.
async fn failure(served: Served) -> (String, String) {
    let bench = Bench::boot(WITH_DOCKER, served).await;
    let (status, reports) = bench.set_up().await;
    let (begun, failed) = told(&reports);
    let (phase, output) = failed.unwrap_or_else(|| panic!("no failure was reported: {begun:?}"));
    assert_eq!(begun.last(), Some(&phase), "it failed where it stood: {begun:?}");
    assert_eq!(status, "error", "cloud-init knows, too");
    assert!(output.len() <= 4096 && !output.contains(bench.token()), "{output}");
    assert_ne!(bench.shell("systemctl is-active dtma-agent").await, "active");
    assert_eq!(bench.shell("ls -d /run/dtma-bootstrap 2>&1 | grep -c 'No such file'").await, "1");
    if phase == "download" {
        assert_eq!(
            bench.shell("ls -d /opt/dtma /etc/dtma.conf 2>&1 | grep -c 'No such file'").await,
            "2",
            "nothing is unpacked"
        );
    }
    (phase.to_owned(), output.to_owned())
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn an_archive_with_another_checksum_is_not_unpacked_and_both_checksums_are_reported() {
    let (phase, output) = failure(Served::AnotherAgent(GOOD_AGENT)).await;
    assert_eq!(phase, "download");
    assert!(output.contains("SHA-256") && output.contains(&"0".repeat(64)), "{output}");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_release_that_is_not_there_is_reported_with_its_url_and_status() {
    let (phase, output) = failure(Served::Nothing).await;
    assert_eq!(phase, "download");
    assert!(output.contains("404") && output.contains("/releases/9.9.9/"), "{output}");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_download_without_an_end_is_cut_off() {
    let (phase, output) = failure(Served::Endless).await;
    assert_eq!(phase, "download");
    assert!(output.contains("cannot download"), "{output}");
}

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn an_agent_that_dies_is_reported_with_its_own_last_words() {
    let (phase, output) = failure(Served::Agent(BROKEN_AGENT)).await;
    assert_eq!(phase, "start");
    assert!(output.contains("cannot start: \"quoted\" \\back\\slash\ttab"), "{output}");
    assert!(output.contains("token=[token]"), "{output}");
}

#[tokio::test]
#[ignore = "needs shellcheck: cargo xtask test"]
async fn the_scripts_pass_shellcheck() {
    for script in ["cloud-init/bootstrap.sh", "packaging/install.sh", "packaging/metadata-guard.sh"] {
        let path = stack::Workspace::find().root().join(script);
        let checked = Command::new("shellcheck").arg(&path).output().await.expect("shellcheck is installed");
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    }
}
