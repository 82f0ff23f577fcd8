//! What `cargo xtask release` makes.

use dtma_release::{Envelope, TARGET};
use stack::release::{self, OLDEST_GLIBC};
use stack::{Unwatched, Workspace};

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn the_released_agent_asks_for_no_newer_glibc_and_the_archive_is_the_same_bytes_every_time() {
    let workspace = Workspace::find();
    let once = release::release(&workspace, None, &Unwatched).await.unwrap();
    assert!(once.glibc.unwrap() <= OLDEST_GLIBC, "{:?}", once.glibc);

    let elsewhere = tempfile::tempdir().unwrap();
    let again = release::release(&workspace, Some(elsewhere.path()), &Unwatched).await.unwrap();
    assert_eq!(again.sha256, once.sha256);
    let folder = elsewhere.path().join(&again.version);
    let name = format!("dtma-agent-{}-x86_64-linux-gnu.tar.gz", again.version);
    let note = std::fs::read_to_string(folder.join(format!("{name}.sha256")));
    assert_eq!(note.unwrap(), format!("{}  {name}\n", once.sha256));

    // What the droplet's updater makes of it.
    let keys = release::development_keys(&workspace).unwrap();
    let envelope = std::fs::read(folder.join("manifest.json")).unwrap();
    assert_eq!(std::fs::read(elsewhere.path().join("channels/stable.json")).unwrap(), envelope);
    let manifest = Envelope::open(&envelope, keys.public()).unwrap();
    let artifact = manifest.installable(TARGET, manifest.issued_at).unwrap();
    assert_eq!((artifact.size, artifact.sha256.to_string()), (again.size, again.sha256));
}
