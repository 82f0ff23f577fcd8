//! Whether a value is anywhere on a droplet: in any file of any file system, on disk or in memory, in what Docker tells and in the
//! journal; as it is or encoded.

use std::collections::BTreeSet;
use std::error::Error;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dtma_api::{Token, TokenHash};

use crate::Scene;

/// A value with characters that every notation writes otherwise, and random words around them that every notation leaves alone.
#[derive(Debug, Clone)]
pub struct Marked {
    word: String,
}

impl Marked {
    /// A new one, unlike all others.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub fn new() -> Result<Self, Box<dyn Error>> {
        Ok(Self { word: TokenHash::of(Token::generate()?.expose()).to_string() })
    }

    /// The value.
    pub fn value(&self) -> String {
        let (head, tail) = self.halves();
        format!("{head}\"&=\\ \u{e9}+'<%{tail}")
    }

    /// It in every form it is looked for, each with a name; what [`Self::patterns`] has to find.
    pub fn forms(&self) -> Vec<(&'static str, String)> {
        let value = self.value();
        let base64 = |before: &str| STANDARD.encode(format!("{before}{value}"));
        let json = serde_json::Value::from(value.as_str()).to_string();
        vec![
            ("plain", value.clone()),
            ("json", json.trim_matches('"').to_owned()),
            ("url", form_urlencoded::byte_serialize(value.as_bytes()).collect()),
            // As a part of something longer it begins anywhere in a group of three bytes.
            ("base64", base64("")),
            ("base64-second", base64("=")),
            ("base64-third", base64("K=")),
            ("hex", hex::encode(&value)),
            ("HEX", hex::encode_upper(&value)),
        ]
    }

    /// What to look for: at least one of these is in every form of the value, and in none of anything else. In the alphabets that Base64
    /// for URLs and the usual one share, because the words are plain hexadecimal digits.
    pub fn patterns(&self) -> Vec<String> {
        let (head, tail) = self.halves();
        let mut patterns = vec![head.to_owned(), tail.to_owned(), hex::encode(head), hex::encode_upper(head)];
        for before in ["", "=", "=="] {
            let encoded = STANDARD.encode(format!("{before}{head}"));
            // Without the groups that hold something of its neighbours.
            patterns.push(encoded.get(4..encoded.len() - 4).unwrap_or(&encoded).to_owned());
        }
        patterns
    }

    fn halves(&self) -> (&str, &str) {
        self.word.split_at(self.word.len() / 2)
    }
}

/// Where a file system keeps what is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// On a disk, as everything of which nothing else is known.
    Disk,
    Memory,
    /// The kernel's own tables, with nothing in them that anybody wrote.
    Nowhere,
}

impl Kept {
    fn by(kind: &str) -> Self {
        match kind {
            "tmpfs" | "ramfs" | "devtmpfs" | "hugetlbfs" => Self::Memory,
            "proc" | "sysfs" | "cgroup" | "cgroup2" | "devpts" | "mqueue" | "securityfs" | "debugfs" | "tracefs"
            | "bpf" | "pstore" | "configfs" | "fusectl" | "binfmt_misc" | "nsfs" | "autofs" => Self::Nowhere,
            _ => Self::Disk,
        }
    }
}

/// The mount points of `mountinfo` whose file systems keep things there.
fn mounts_of(mountinfo: &str, kept: Kept) -> BTreeSet<&str> {
    let lines = mountinfo.lines().filter_map(|line| line.split_once(" - "));
    let mounts = lines.filter_map(|(mount, system)| Some((mount.split(' ').nth(4)?, system.split(' ').next()?)));
    mounts.filter(|(_, kind)| Kept::by(kind) == kept).map(|(point, _)| point).collect()
}

/// Everywhere on a droplet's disks that any of the values is found: files, names of files and links, and what Docker and the journal say.
///
/// # Errors
/// When it can't be searched, all of it.
pub async fn on_disk(scene: &Scene, values: &[&Marked]) -> Result<Vec<String>, Box<dyn Error>> {
    let patterns = arguments(values);
    let mut found = in_files(scene, Kept::Disk, &patterns).await?;
    let said = [
        ("docker info", "docker version; docker info; docker system df --verbose"),
        (
            "docker inspect, containers",
            "docker ps --all --quiet --no-trunc | xargs --no-run-if-empty docker inspect --size",
        ),
        ("docker inspect, images", "docker image ls --all --quiet | xargs --no-run-if-empty docker image inspect"),
        ("docker history", "docker image ls --quiet | xargs --no-run-if-empty --max-args=1 docker history --no-trunc"),
        ("docker inspect, networks", "docker network ls --quiet | xargs docker network inspect --verbose"),
        ("docker inspect, volumes", "docker volume ls --quiet | xargs --no-run-if-empty docker volume inspect"),
        ("docker logs", "docker ps --all --quiet | xargs --no-run-if-empty --max-args=1 docker logs"),
        ("docker events", "docker events --since 2h --until 0s --format '{{json .}}'"),
        // It compresses what is long, which hides it from a search of its files.
        ("journal", "journalctl --all --output=export --no-pager"),
    ];
    for (name, command) in said {
        let script = format!(
            "{{ {command}; }} > /dev/shm/said 2>&1; ended=$?; grep -qaF {patterns} /dev/shm/said && echo found; \
                              [ $ended = 0 ] || cat /dev/shm/said >&2; rm /dev/shm/said; exit $ended"
        );
        if scene.on_droplet(&["sh", "-c", &script]).await?.contains("found") {
            found.push(name.to_owned());
        }
    }
    Ok(found)
}

/// Every file in a droplet's memory that any of the values is found in.
///
/// # Errors
/// As [`on_disk`].
pub async fn in_memory(scene: &Scene, values: &[&Marked]) -> Result<Vec<String>, Box<dyn Error>> {
    in_files(scene, Kept::Memory, &arguments(values)).await
}

/// Values as arguments of grep: on a command line they are in no file.
fn arguments(values: &[&Marked]) -> String {
    let patterns = values.iter().flat_map(|value| value.patterns());
    patterns.map(|pattern| format!("-e '{pattern}'")).collect::<Vec<_>>().join(" ")
}

async fn in_files(scene: &Scene, kept: Kept, patterns: &str) -> Result<Vec<String>, Box<dyn Error>> {
    let mountinfo = scene.on_droplet(&["cat", "/proc/self/mountinfo"]).await?;
    let mounts = mounts_of(&mountinfo, kept);
    if mounts.is_empty() {
        return Err(format!("no file system is {kept:?} among these:\n{mountinfo}").into());
    }
    let points = mounts.into_iter().map(|point| format!("'{point}'")).collect::<Vec<_>>().join(" ");
    // What is mounted on a file may be a device, which has no end.
    let script = format!(
        "find {points} -xdev -type f -print0 | \
         timeout 120 xargs --null --no-run-if-empty grep --devices=skip -laF {patterns} --; \
         [ $? != 124 ] || echo it took too long >&2; \
         find {points} -xdev -printf '%p -> %l\\n' | grep -aF {patterns}; true"
    );
    let output = scene.stack.droplet_exec(scene.droplet()?, &["sh", "-c", &script]).await?;
    // What vanishes meanwhile is nothing to complain about, and a namespace that is mounted on a file isn't one; everything else is.
    let tables = mounts_of(&mountinfo, Kept::Nowhere);
    let harmless = |line: &str| {
        let path = line.strip_prefix("grep: ").and_then(|line| line.split_once(": ")).map(|(path, _)| path);
        line.ends_with("No such file or directory") || path.is_some_and(|path| tables.contains(path))
    };
    let unread: Vec<&str> = output.stderr.lines().filter(|line| !harmless(line)).collect();
    if output.exit_code != 0 || !unread.is_empty() {
        return Err(format!("not everything {kept:?} could be searched: {unread:?}").into());
    }
    let found: BTreeSet<&str> = output.stdout.lines().collect();
    Ok(found.into_iter().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_value_holds_a_pattern_and_nothing_of_another_does() {
        let (value, other) = (Marked::new().unwrap(), Marked::new().unwrap());
        let holds = |text: &str, value: &Marked| value.patterns().iter().any(|pattern| text.contains(pattern));
        let mut forms = value.forms();
        forms.push(("within", STANDARD.encode(format!("{{\"Env\":[\"API_KEY={}\"]}}", value.value()))));
        for (name, text) in &forms {
            assert!(holds(text, &value), "{name}: {text}");
            assert!(!holds(text, &other), "{name}");
        }
        let texts: BTreeSet<&String> = forms.iter().map(|(_, text)| text).collect();
        assert_eq!(texts.len(), forms.len(), "they are all different");
        assert!(
            value
                .patterns()
                .iter()
                .all(|pattern| pattern.len() >= 32 && pattern.bytes().all(|it| it.is_ascii_alphanumeric()))
        );
    }

    #[test]
    fn a_file_system_nobody_knows_is_searched_as_a_disk() {
        let mountinfo = "\
22 1 0:20 / / rw,relatime shared:1 - overlay overlay rw
23 22 0:21 / /proc rw - proc proc rw
24 22 0:22 / /run rw,nosuid master:2 - tmpfs tmpfs rw,size=1k
25 22 0:23 /volumes/x /var/lib/docker rw - ext4 /dev/vda rw
26 22 0:24 / /new rw - brandnewfs none rw
";
        assert_eq!(mounts_of(mountinfo, Kept::Disk), BTreeSet::from(["/", "/new", "/var/lib/docker"]));
        assert_eq!(mounts_of(mountinfo, Kept::Memory), BTreeSet::from(["/run"]));
    }
}
