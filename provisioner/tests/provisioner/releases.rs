//! Which release new droplets get, and which they never get.

use std::path::Path;
use std::sync::Arc;

use dtma_provisioner::releases::{NoRelease, Releases, Trust};
use dtma_release::Channel;
use jiff::Timestamp;

use super::signed::Maker;

fn releases(folder: &Path, maker: &Maker, pinned: Option<&str>) -> Arc<Releases> {
    let pinned = pinned.map(|version| version.parse().unwrap());
    Arc::new(Releases::new(folder.to_owned(), Trust::Signed(maker.keys()), pinned, "http://p:1/".to_owned()))
}

async fn version(releases: &Arc<Releases>) -> Result<String, &'static str> {
    releases.current().await.map(|release| release.version).map_err(|error: NoRelease| error.code())
}

#[tokio::test]
async fn a_new_droplet_gets_the_pinned_then_the_proven_then_the_stable_then_the_newest_release() {
    let folder = tempfile::tempdir().unwrap();
    let maker = Maker::new(1, folder.path());
    for version in ["1.0.0", "1.1.0", "1.2.0", "1.3.0-rc.1"] {
        maker.release(version);
    }
    let unpinned = releases(folder.path(), &maker, None);
    assert_eq!(version(&unpinned).await, Ok("1.3.0-rc.1".to_owned()));
    let stable = maker.release("1.2.0");
    maker.publish(&stable);
    let found = unpinned.current().await.unwrap();
    assert_eq!((found.version.as_str(), &found.sha256), ("1.2.0", &stable.artifacts[0].sha256.to_string()));
    unpinned.has_proved_itself("1.1.0".parse().unwrap());
    assert_eq!(version(&unpinned).await, Ok("1.1.0".to_owned()));
    // It is gone from the folder: back to what its makers call stable.
    std::fs::remove_dir_all(folder.path().join("1.1.0")).unwrap();
    assert_eq!(version(&unpinned).await, Ok("1.2.0".to_owned()));
    assert_eq!(version(&releases(folder.path(), &maker, Some("1.0.0"))).await, Ok("1.0.0".to_owned()));
    assert_eq!(version(&releases(folder.path(), &maker, Some("1.0.1"))).await, Err("missing"));
}

#[tokio::test]
async fn only_what_a_known_key_signed_is_installed_and_only_as_it_was_signed() {
    let folder = tempfile::tempdir().unwrap();
    let maker = Maker::new(1, folder.path());
    let all = releases(folder.path(), &maker, None);
    let whether = async || version(&all).await;
    // No manifest at all.
    let manifest = maker.archive("1.0.0", "content");
    assert_eq!(whether().await, Err("missing"));
    // Somebody else's signature.
    Maker::new(2, folder.path()).sign(&manifest);
    assert_eq!(whether().await, Err("wrong_key"));
    // A valid manifest of another version, under this one's name.
    let other = maker.archive("0.9.0", "older");
    maker.write("1.0.0/manifest.json", &maker.envelope(&other));
    assert_eq!(whether().await, Err("other_version"));
    let mut expired = manifest.clone();
    expired.expires_at = Timestamp::now();
    maker.sign(&expired);
    assert_eq!(whether().await, Err("expired"));
    maker.sign(&manifest);
    assert_eq!(whether().await, Ok("1.0.0".to_owned()));
    // The archive changes under its name, in length and in content.
    for content in ["longer content", "cOntent"] {
        maker.archive("1.0.0", content);
        assert_eq!(whether().await, Err("bad_archive"), "{content}");
    }
    // An older one that is all right is the newest there is.
    maker.sign(&other);
    assert_eq!(whether().await, Ok("0.9.0".to_owned()));
    assert_eq!(all.signed("1.0.0".parse().unwrap()).await.unwrap_err().code(), "bad_archive");
}

#[tokio::test]
async fn a_stable_channel_that_cant_be_used_is_not_replaced_by_somebody_elses_choice() {
    let folder = tempfile::tempdir().unwrap();
    let maker = Maker::new(1, folder.path());
    maker.release("1.1.0");
    let all = releases(folder.path(), &maker, None);
    let mut manifest = maker.release("1.0.0");
    manifest.channel = Channel::Canary;
    maker.write("channels/stable.json", &maker.envelope(&manifest));
    assert_eq!(version(&all).await, Err("other_channel"));
    Maker::new(2, folder.path()).publish(&maker.release("1.0.0"));
    assert_eq!(version(&all).await, Err("wrong_key"));
}

#[tokio::test]
async fn unsigned_releases_are_installed_where_that_is_asked_for_and_never_rolled_out() {
    let folder = tempfile::tempdir().unwrap();
    let maker = Maker::new(1, folder.path());
    maker.archive("1.0.0", "content");
    let unsigned = Releases::new(folder.path().to_owned(), Trust::Unsigned, None, "http://p:1".to_owned());
    let unsigned = Arc::new(unsigned);
    assert_eq!(version(&unsigned).await, Ok("1.0.0".to_owned()));
    assert_eq!(unsigned.signed("1.0.0".parse().unwrap()).await.unwrap_err().code(), "no_keys");
}
