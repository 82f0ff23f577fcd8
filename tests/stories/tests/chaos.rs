//! The agent among people who don't leave it alone; `cargo xtask chaos` does it for longer.

use std::time::{Duration, SystemTime};

use stack::prepare::DEFAULT_IMAGE;
use stories::chaos::Chaos;
use stories::{Scene, Story, all_logs, assert_contract_kept};

#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn whatever_is_done_to_it_what_was_promised_is_there_when_it_gets_quiet() -> Story {
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let scene = Scene::set(DEFAULT_IMAGE).await?;
    println!("seed {seed}");
    let aftermath = Chaos { length: Duration::from_secs(60), seed }.run(&scene, &|line| println!("{line}")).await;
    match aftermath {
        Ok(aftermath) => println!("{aftermath:?}"),
        Err(wrong) => return Err(format!("{wrong}\n{}", all_logs(&scene.stack).await).into()),
    }
    assert_contract_kept(&scene.stack).await
}
