//! Why a release isn't taken.

use jiff::Timestamp;
use semver::Version;

use crate::{Channel, KeysError};

/// Why a release isn't taken. Each is final for this manifest; none changes anything on the droplet.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// There are no keys to check it with.
    #[error("this build can't check releases")]
    NoKeys(#[source] KeysError),
    /// It isn't an envelope, or no manifest is in it.
    #[error("the release's manifest is not understood")]
    NotUnderstood(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Nobody signed it.
    #[error("the release's manifest is not signed")]
    NotSigned,
    /// Nobody we trust signed it, or it was changed after signing.
    #[error(
        "the release's manifest is signed by none of the keys this agent trusts, or was changed after signing (signed with: {named})"
    )]
    WrongKey {
        /// Whom it names.
        named: String,
    },
    /// Its time is over.
    #[error("the release's manifest expired at {at}; sign the release again to offer it for longer")]
    Expired {
        /// When.
        at: Timestamp,
    },
    /// It is about another version than was asked for.
    #[error("the manifest is of version {found}, not of {wanted}")]
    OtherVersion {
        /// What was asked for.
        wanted: Version,
        /// What it is of.
        found: Version,
    },
    /// It is of another channel than was asked for.
    #[error("the manifest is of channel {found}, not of {wanted}")]
    OtherChannel {
        /// What was asked for.
        wanted: Channel,
        /// What it is of.
        found: Channel,
    },
    /// Its version is lower than one that has been in use here.
    #[error(
        "version {found} is older than {highest}, which has been in use here; versions never go down by themselves"
    )]
    Older {
        /// What it is of.
        found: Version,
        /// What has been in use.
        highest: Version,
    },
    /// It was made before one that has been accepted here: somebody offers the past.
    #[error("the manifest was issued at {issued_at}, before one accepted here that was issued at {accepted}")]
    Replayed {
        /// When it was made.
        issued_at: Timestamp,
        /// When the newest accepted one was.
        accepted: Timestamp,
    },
    /// The version in use is too old to go to it in one step.
    #[error("version {running} can't go to this release in one step; update to {least} first")]
    TooFar {
        /// What is in use.
        running: Version,
        /// The oldest that can.
        least: Version,
    },
    /// There is no build for this machine.
    #[error("the release has no build for {target}")]
    NoArtifact {
        /// This machine's target.
        target: String,
    },
    /// The manifest announces an archive beyond all bounds, or one without a proper name.
    #[error("the release's archive can't be right: {why}")]
    Archive {
        /// Why.
        why: String,
    },
}

impl Refusal {
    pub(crate) fn not_understood(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::NotUnderstood(source.into())
    }

    /// A stable word for it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoKeys(_) => "no_keys",
            Self::NotUnderstood(_) => "not_understood",
            Self::NotSigned => "not_signed",
            Self::WrongKey { .. } => "wrong_key",
            Self::Expired { .. } => "expired",
            Self::OtherVersion { .. } => "other_version",
            Self::OtherChannel { .. } => "other_channel",
            Self::Older { .. } => "older",
            Self::Replayed { .. } => "replayed",
            Self::TooFar { .. } => "too_far",
            Self::NoArtifact { .. } => "no_artifact",
            Self::Archive { .. } => "bad_archive",
        }
    }
}
