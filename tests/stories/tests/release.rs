//! What `cargo xtask release` makes.

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
    let note = std::fs::read_to_string(
        elsewhere.path().join(format!("{0}/dtma-agent-{0}-x86_64-linux-gnu.tar.gz.sha256", again.version)),
    );
    assert_eq!(note.unwrap(), format!("{}  dtma-agent-{}-x86_64-linux-gnu.tar.gz\n", once.sha256, once.version));
}
