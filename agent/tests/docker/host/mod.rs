//! A real Docker Engine for tests: images made on the spot, names of their own, and nothing left behind, also when a test fails.

pub(crate) mod agent;

use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use dtma_agent::engine::docker::DockerEngine;
use serde_json::Value;
use tempfile::TempDir;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// One test's corner of the engine.
pub(crate) struct Host {
    /// Tells what this test made from everything else.
    pub(crate) scope: String,
    /// The server's image, which is on this engine and in no registry.
    pub(crate) image: String,
    registry: Option<(Child, TempDir)>,
    port: OnceLock<u16>,
}

impl Host {
    pub(crate) fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let scope = format!("test-{}-{number}", std::process::id());
        let image = format!("dtma-test/{scope}:1");
        let host = Self { scope, image, registry: None, port: OnceLock::new() };
        host.import();
        host
    }

    /// An image with a shell and little else, under a name of its own: what the host's shell needs, copied.
    pub(crate) fn with_shell(&self) -> String {
        let image = format!("dtma-test/{}:shell", self.scope);
        let listing =
            "for f in sh cat sleep id dd tr head; do echo /bin/$f; ldd /bin/$f | grep -o '/[^ ]*'; done | sort -u";
        let files = Command::new("sh").args(["-c", listing]).output().unwrap().stdout;
        let files = String::from_utf8(files).unwrap();
        let folders = "--transform=s,^,/,";
        let tar = Command::new("tar")
            .args(["-C", "/", "--dereference", "--hard-dereference", folders, "-c"])
            .args(files.lines().map(|path| path.trim_start_matches('/')))
            .output()
            .unwrap();
        assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
        let label = format!("LABEL dtma.scope={}", self.scope);
        let path = "ENV PATH=/bin";
        import(&tar.stdout, &["--change", r#"CMD ["sleep", "1000"]"#, "--change", path, "--change", &label], &image);
        image
    }

    fn import(&self) {
        static SERVER: OnceLock<Vec<u8>> = OnceLock::new();
        let tar = SERVER.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/docker/host/server.c");
            let server = folder.path().join("server");
            let cc = Command::new("cc").args(["-static", "-O1", "-o"]).arg(&server).arg(&source).output().unwrap();
            assert!(cc.status.success(), "{}", String::from_utf8_lossy(&cc.stderr));
            let tar = Command::new("tar").args(["-C"]).arg(folder.path()).args(["-c", "server"]).output().unwrap();
            assert!(tar.status.success());
            tar.stdout
        });
        let label = format!("LABEL dtma.scope={}", self.scope);
        let changes =
            ["--change", r#"ENTRYPOINT ["/server"]"#, "--change", r#"CMD ["serve", "8080"]"#, "--change", &label];
        import(tar, &changes, &self.image);
    }

    /// The engine the `docker` command speaks to, as an agent of this test sees it.
    pub(crate) fn engine(&self) -> DockerEngine {
        let host = std::env::var("DOCKER_HOST").ok();
        DockerEngine::connect(host.as_deref()).unwrap().scoped(&self.scope)
    }

    /// Name for an instance, no other test's.
    pub(crate) fn name(&self, word: &str) -> String {
        format!("{}-{word}", self.scope)
    }

    /// A container of somebody else's.
    pub(crate) fn stranger(&self, name: &str, more: &[&str]) {
        let label = format!("dtma.scope={}", self.scope);
        let mut arguments = vec!["run", "-d", "--name", name, "--label", &label];
        arguments.extend_from_slice(more);
        arguments.push(&self.image);
        docker(&arguments);
    }

    pub(crate) fn inspect(&self, container: &str) -> Value {
        let all: Value = serde_json::from_str(&docker(&["inspect", container])).unwrap();
        all[0].clone()
    }

    /// A host port of this test's own, the same every time.
    pub(crate) fn port(&self) -> u16 {
        *self.port.get_or_init(free_port)
    }

    /// Waits until `reached`, which it has to be within ten seconds.
    pub(crate) async fn until(&self, what: &str, reached: impl Fn() -> bool) {
        let begun = Instant::now();
        while !reached() {
            assert!(begun.elapsed() < Duration::from_secs(10), "{what}: not in time");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Everything of this test that is there: containers, volumes, endpoints on the agent's network.
    pub(crate) fn left(&self) -> Vec<String> {
        let label = format!("label=dtma.scope={}", self.scope);
        let mut left: Vec<String> = Vec::new();
        for list in [["ps", "-aq"], ["volume", "ls"]] {
            let mut arguments = list.to_vec();
            if list[0] == "volume" {
                arguments.push("-q");
            }
            arguments.extend_from_slice(&["--filter", &label]);
            left.extend(docker(&arguments).lines().map(str::to_owned));
        }
        let network =
            docker_may_fail(&["network", "inspect", &format!("dtma-{}", self.scope), "-f", "{{len .Containers}}"]);
        let endpoints = String::from_utf8_lossy(&network.stdout).trim().to_owned();
        if network.status.success() && endpoints != "0" {
            left.push(format!("{endpoints} endpoints"));
        }
        left
    }

    /// A registry on loopback holding the server's image and nothing on the engine; its reference there.
    pub(crate) fn registry(&mut self) -> String {
        self.serve(None)
    }

    /// The same for one user and password only.
    pub(crate) fn private_registry(&mut self, user: &str, password: &str) -> String {
        self.serve(Some((user, password)))
    }

    fn serve(&mut self, only: Option<(&str, &str)>) -> String {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let storage = folder.path().join("storage");
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n",
            storage.display()
        );
        if let Some((user, password)) = only {
            let passwords = folder.path().join("passwords");
            std::fs::write(&passwords, format!("{user}:{}\n", bcrypt(password))).unwrap();
            config.push_str(&format!("auth: {{htpasswd: {{realm: tests, path: {}}}}}\n", passwords.display()));
        }
        let path = folder.path().join("config.yml");
        std::fs::write(&path, config).unwrap();
        let quiet = || Stdio::null();
        let child =
            Command::new("docker-registry").arg("serve").arg(&path).stdout(quiet()).stderr(quiet()).spawn().unwrap();
        self.registry = Some((child, folder));
        let begun = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(20), "the registry did not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Some((user, password)) = only {
            self.docker_as_client(&["login", "-u", user, "-p", password, &format!("127.0.0.1:{port}")]);
        }
        let there = format!("127.0.0.1:{port}/{}", self.image);
        self.push(&self.image, &there);
        there
    }

    /// Puts an image of this engine into the registry; what the engine itself calls so stays what it was.
    pub(crate) fn push(&self, image: &str, there: &str) {
        let before = docker(&["images", "-q", "--no-trunc", there]);
        docker(&["tag", image, there]);
        self.docker_as_client(&["push", there]);
        if before.is_empty() {
            docker(&["rmi", there])
        } else {
            docker(&["tag", &before, there])
        };
    }

    /// An image like the server's, of two layers and one megabyte, which only a registry has: `there` is what it is called.
    pub(crate) fn publish_variant(&self, there: &str) {
        let folder = tempfile::tempdir().unwrap();
        let noise = "head -c 1048576 /dev/urandom > noise";
        assert!(Command::new("sh").args(["-c", noise]).current_dir(folder.path()).status().unwrap().success());
        let file = format!("FROM {}\nCOPY noise /noise\nLABEL dtma.scope={}\n", self.image, self.scope);
        std::fs::write(folder.path().join("Dockerfile"), file).unwrap();
        let made = format!("{}-variant", self.image);
        let mut build = Command::new("docker");
        build.args(["build", "-q", "-t", &made]).arg(folder.path()).env("DOCKER_BUILDKIT", "0");
        let built = build.output().unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        self.push(&made, there);
        docker(&["rmi", &made]);
    }

    /// With a login of its own, kept beside the registry.
    fn docker_as_client(&self, arguments: &[&str]) {
        let (_, folder) = self.registry.as_ref().unwrap();
        let login = folder.path().join("client");
        docker(&[&["--config", login.to_str().unwrap()], arguments].concat());
    }
}

/// As a registry wants it. Perl is on every Debian; `htpasswd` is not.
fn bcrypt(password: &str) -> String {
    let crypt = ["-e", r#"print crypt($ARGV[0], '$2b$05$' . 'abcdefghijklmnopqrstuu')"#, password];
    let hash = String::from_utf8(Command::new("perl").args(crypt).output().unwrap().stdout).unwrap();
    assert!(hash.starts_with("$2b$05$"), "{hash}");
    hash
}

impl Drop for Host {
    fn drop(&mut self) {
        let label = format!("label=dtma.scope={}", self.scope);
        for (list, remove) in [
            (&["ps", "-aq"][..], &["rm", "-fv"][..]),
            (&["volume", "ls", "-q"], &["volume", "rm"]),
            (&["network", "ls", "-q"], &["network", "rm"]),
            (&["images", "-q"], &["rmi", "-f"]),
        ] {
            let mut arguments = list.to_vec();
            arguments.extend_from_slice(&["--filter", &label]);
            let found = docker_may_fail(&arguments).stdout;
            let found = String::from_utf8_lossy(&found).into_owned();
            let mut ids: Vec<&str> = found.split_whitespace().collect();
            ids.dedup();
            if !ids.is_empty() {
                docker_may_fail(&[remove, &ids].concat());
            }
        }
        if let Some((child, _)) = &mut self.registry {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Makes an image of one layer.
fn import(tar: &[u8], changes: &[&str], image: &str) {
    let mut import = Command::new("docker")
        .arg("import")
        .args(changes)
        .args(["-", image])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    import.stdin.take().unwrap().write_all(tar).unwrap();
    assert!(import.wait().unwrap().success());
}

/// A port nobody listens on now.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

pub(crate) fn docker_may_fail(arguments: &[&str]) -> Output {
    Command::new("docker").args(arguments).output().unwrap()
}

/// What `docker` printed; it has to succeed.
pub(crate) fn docker(arguments: &[&str]) -> String {
    let output = docker_may_fail(arguments);
    assert!(output.status.success(), "docker {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
