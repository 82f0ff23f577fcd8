//! What a release must be, and whether it is one to go to from here.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use semver::Version;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{MAX_ARCHIVE_BYTES, Refusal, archive_name};

/// A release as its makers describe it. Fields that a later version adds are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Whom it is for.
    pub channel: Channel,
    /// Its version.
    pub version: Version,
    /// When it was signed. Of two manifests the later one counts.
    pub issued_at: Timestamp,
    /// Until when it may be installed.
    pub expires_at: Timestamp,
    /// The oldest version that can go to it in one step.
    pub min_version: Version,
    /// One for each target.
    pub artifacts: Vec<Artifact>,
}

/// An archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// The machines it is for, such as `x86_64-linux-gnu`.
    pub target: String,
    /// Its file's name; it lies beside the manifest.
    pub file: String,
    /// Its exact length in bytes.
    pub size: u64,
    /// SHA-256 of the whole file.
    pub sha256: Digest,
}

/// Who gets a release first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channel {
    /// Everybody.
    Stable,
    /// Those who want to find its faults.
    Canary,
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stable => "stable",
            Self::Canary => "canary",
        })
    }
}

/// There is no such channel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the channel must be stable or canary")]
pub struct UnknownChannel;

impl FromStr for Channel {
    type Err = UnknownChannel;

    fn from_str(text: &str) -> Result<Self, UnknownChannel> {
        match text {
            "stable" => Ok(Self::Stable),
            "canary" => Ok(Self::Canary),
            _ => Err(UnknownChannel),
        }
    }
}

/// A SHA-256, 64 lower-case hexadecimal digits as text.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(&text, &mut bytes)
            .map_err(|_| serde::de::Error::custom("a SHA-256 has 64 hexadecimal digits"))?;
        Ok(Self(bytes))
    }
}

/// What a droplet remembers of the manifests it took, over all restarts: what makes the past recognisable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The highest version that has proved itself here.
    pub highest_version: Version,
    /// The latest `issued_at` of those that were taken, whether or not they proved themselves.
    #[serde(default)]
    pub issued_at: Option<Timestamp>,
}

impl Manifest {
    /// Whether this may still be installed anywhere, and announces an archive that can be right for `target`.
    ///
    /// # Errors
    /// [`Refusal::Expired`], [`Refusal::NoArtifact`], [`Refusal::Archive`].
    pub fn installable(&self, target: &str, now: Timestamp) -> Result<&Artifact, Refusal> {
        if now >= self.expires_at {
            return Err(Refusal::Expired { at: self.expires_at });
        }
        let artifact = self.artifacts.iter().find(|artifact| artifact.target == target);
        let artifact = artifact.ok_or_else(|| Refusal::NoArtifact { target: target.to_owned() })?;
        let name = archive_name(&self.version, target);
        if artifact.file != name {
            return Err(Refusal::Archive { why: format!("its name is not {name}") });
        }
        if artifact.size == 0 || artifact.size > MAX_ARCHIVE_BYTES {
            let why = format!("{} bytes, where 1 to {MAX_ARCHIVE_BYTES} are possible", artifact.size);
            return Err(Refusal::Archive { why });
        }
        Ok(artifact)
    }

    /// Where this stands to what is in use, and to what was taken before.
    ///
    /// # Errors
    /// [`Refusal::Older`], [`Refusal::Replayed`], [`Refusal::TooFar`].
    pub fn standing(&self, running: &Version, accepted: Option<&Accepted>) -> Result<Standing, Refusal> {
        let highest = accepted.map_or(running, |accepted| running.max(&accepted.highest_version));
        // Build metadata is no order: two builds of one version are one version.
        match self.version.cmp_precedence(highest) {
            Ordering::Less => {
                return Err(Refusal::Older { found: self.version.clone(), highest: highest.clone() });
            }
            // It isn't in use where a person went back from it. It isn't gone to again by itself.
            Ordering::Equal => return Ok(Standing::HasBeenTaken),
            Ordering::Greater => {}
        }
        if let Some(latest) = accepted.and_then(|accepted| accepted.issued_at)
            && self.issued_at < latest
        {
            return Err(Refusal::Replayed { issued_at: self.issued_at, accepted: latest });
        }
        if running.cmp_precedence(&self.min_version).is_lt() {
            return Err(Refusal::TooFar { running: running.clone(), least: self.min_version.clone() });
        }
        Ok(Standing::Newer)
    }
}

/// Where a release stands to what is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It can be gone to.
    Newer,
    /// It is the newest that has proved itself here.
    HasBeenTaken,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            channel: Channel::Stable,
            version: Version::new(1, 4, 0),
            issued_at: "2026-03-01T00:00:00Z".parse().unwrap(),
            expires_at: "2026-06-01T00:00:00Z".parse().unwrap(),
            min_version: Version::new(1, 2, 0),
            artifacts: vec![Artifact {
                target: "x86_64-linux-gnu".to_owned(),
                file: "dtma-agent-1.4.0-x86_64-linux-gnu.tar.gz".to_owned(),
                size: 4_000_000,
                sha256: Digest::from([7; 32]),
            }],
        }
    }

    fn code<T: fmt::Debug>(result: Result<T, Refusal>) -> &'static str {
        result.unwrap_err().code()
    }

    #[test]
    fn only_a_whole_and_current_description_of_a_build_for_this_machine_is_installable() {
        let now = "2026-03-02T00:00:00Z".parse().unwrap();
        let good = manifest();
        assert_eq!(good.installable("x86_64-linux-gnu", now).unwrap().size, 4_000_000);
        assert_eq!(code(good.installable("aarch64-linux-gnu", now)), "no_artifact");
        assert_eq!(code(good.installable("x86_64-linux-gnu", good.expires_at)), "expired");
        for (size, file) in [(0, None), (MAX_ARCHIVE_BYTES + 1, None), (1, Some("../../etc/passwd"))] {
            let mut bad = manifest();
            let artifact = bad.artifacts.first_mut().unwrap();
            artifact.size = size;
            if let Some(file) = file {
                artifact.file = file.to_owned();
            }
            assert_eq!(code(bad.installable("x86_64-linux-gnu", now)), "bad_archive");
        }
    }

    #[test]
    fn versions_never_go_down_and_the_past_is_not_taken_for_news() {
        let running = Version::new(1, 3, 0);
        let accepted = |highest: &str, issued_at: &str| Accepted {
            highest_version: highest.parse().unwrap(),
            issued_at: Some(issued_at.parse().unwrap()),
        };
        let manifest = manifest();
        assert_eq!(manifest.standing(&running, None).unwrap(), Standing::Newer);
        let earlier = accepted("1.3.0", "2026-02-01T00:00:00Z");
        assert_eq!(manifest.standing(&running, Some(&earlier)).unwrap(), Standing::Newer);
        assert_eq!(manifest.standing(&Version::new(1, 4, 0), None).unwrap(), Standing::HasBeenTaken);
        assert_eq!(code(manifest.standing(&Version::new(1, 5, 0), None)), "older");
        // Gone back to 1.3.0 by hand: neither 1.4.0 nor anything below 1.5.0 is news.
        assert_eq!(code(manifest.standing(&running, Some(&accepted("1.5.0", "2026-02-01T00:00:00Z")))), "older");
        // 1.5.0 was tried and failed: its manifest was seen, so an earlier one is the past.
        assert_eq!(code(manifest.standing(&running, Some(&accepted("1.3.0", "2026-03-02T00:00:00Z")))), "replayed");
        assert_eq!(code(manifest.standing(&Version::new(1, 1, 9), None)), "too_far");
        // A pre-release comes before its release.
        assert_eq!(manifest.standing(&"1.4.0-rc.1".parse().unwrap(), None).unwrap(), Standing::Newer);
    }
}
