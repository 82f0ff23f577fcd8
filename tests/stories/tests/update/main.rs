//! Updates of the agent on a real droplet: whatever is wrong with a release, and whoever dies when, the droplet ends with a version that
//! serves, and its tools never notice.

#![allow(clippy::indexing_slicing)]

mod droplet;
mod load;
mod offers;
mod rollout;

use dtma_api::update::{UpdateOutcome, UpdatePhase};
use dtma_release::Manifest;
use jiff::{SignedDuration, Timestamp};
use reqwest::Method;
use stack::Workspace;
use stack::release::{self, ReleaseKeys, Terms};
use stories::{Story, until};

use crate::droplet::{Droplet, TWO_MINUTES};
use crate::load::Load;
use crate::offers::Makers;

/// Refused before anything changes: one after the other, on one droplet.
#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_release_that_is_not_what_it_must_be_changes_nothing() -> Story {
    let (droplet, makers) = (Droplet::new(15, 5).await?, Makers::new()?);
    let strangers = tempfile::tempdir()?;
    ReleaseKeys::make(strangers.path())?;
    let strangers = ReleaseKeys::load(strangers.path())?;

    let now = Timestamp::now();
    let good = makers.real(&makers.terms("0.1.1"))?;
    let signed = |change: fn(&mut Manifest)| makers.changed(&good, &makers.keys, change);
    let mut unsigned = good.clone();
    let mut envelope: serde_json::Value = serde_json::from_slice(&unsigned.envelope)?;
    envelope["signatures"] = serde_json::json!([]);
    unsigned.envelope = serde_json::to_vec(&envelope)?.into();
    let mut truncated = good.clone();
    truncated.archive.truncate(good.archive.len() / 2);
    let mut exchanged = good.clone();
    let mut bytes = exchanged.archive.to_vec();
    *bytes.get_mut(1000).ok_or("a short archive")? ^= 1;
    exchanged.archive = bytes.into();
    let old_terms = Terms { issued_at: now, ..makers.terms("0.0.9") };
    // A validly signed archive of an older version, announced by a validly signed manifest as a newer one.
    let mut relabelled = makers.real(&old_terms)?;
    relabelled.manifest.version = "0.1.1".parse()?;
    if let Some(artifact) = relabelled.manifest.artifacts.first_mut() {
        artifact.file = dtma_release::archive_name(&relabelled.manifest.version, dtma_release::TARGET);
    }
    let relabelled = makers.changed(&relabelled, &makers.keys, |_| {})?;
    // ELF's e_machine: 183 is AArch64.
    let mut aarch64 = std::fs::read(release::built_agent(&Workspace::find()))?;
    *aarch64.get_mut(18).ok_or("a short program")? = 183;

    let mut cases = vec![
        ("not_signed", unsigned),
        ("wrong_key", makers.changed(&good, &strangers, |_| {})?),
        ("expired", signed(|manifest| manifest.expires_at = Timestamp::now())?),
        ("older", makers.real(&old_terms)?),
        ("bad_archive", signed(|manifest| manifest.artifacts.iter_mut().for_each(|artifact| artifact.size = 1 << 40))?),
        (
            "no_artifact",
            signed(|manifest| manifest.artifacts.iter_mut().for_each(|artifact| artifact.target.push('x')))?,
        ),
        ("too_far", signed(|manifest| manifest.min_version = dtma_release::Version::new(0, 1, 1))?),
        ("truncated", truncated),
        ("wrong_digest", exchanged),
        ("wrong_archive_key", relabelled),
    ];
    // One that is what it says in all but its program.
    let lying = makers.program(&makers.terms("0.1.2"), b"#!/bin/sh\necho 'dtma-agent 0.0.9 (x86_64-linux-gnu)'\n")?;
    cases.push(("other_program", lying));
    cases.push(("wrong_architecture", makers.program(&makers.terms("0.1.3"), &aarch64)?));
    for (code, offer) in cases {
        droplet.host.offer(&offer);
        let (ok, said, took) = droplet.update(&["--apply"]).await?;
        println!("{code}: {took:.1?}");
        assert!(!ok && said.contains(&format!("({code})")), "{code}: {said}");
        assert_eq!(droplet.last().await?, (UpdateOutcome::Refused, code.to_owned()));
        assert_eq!(droplet.links().await?, (droplet.first.clone(), droplet.first.clone()), "{code}");
    }
    droplet.host.offer_endless(&makers.real(&makers.terms("0.1.4"))?);
    let (ok, said, _) = droplet.update(&["--apply"]).await?;
    assert!(!ok && said.contains("(not_fetched)"), "{said}");

    droplet.tool_is_untouched().await?;
    let pid = droplet.scene.on_droplet(&["systemctl", "show", "--property=NRestarts", "dtma-agent"]).await?;
    assert_eq!(pid.trim(), "NRestarts=0");

    // It takes the good one, and then no older manifest, however well it is signed.
    let later = makers.real(&Terms { issued_at: now, ..makers.terms("0.2.0") })?;
    droplet.host.offer(&later);
    let (ok, said, _) = droplet.update(&["--check"]).await?;
    assert!(ok && said.contains("0.2.0 can be installed"), "{said}");
    let (ok, said, took) = droplet.update(&["--apply", "0.2.0"]).await?;
    println!("a good one: {took:.1?}");
    assert!(ok && said.contains("0.2.0 is in use"), "{said}");
    droplet.host.offer(&good);
    let (ok, said, _) = droplet.update(&["--apply"]).await?;
    assert!(!ok && said.contains("(older)"), "{said}");
    let issued_before = now - SignedDuration::from_hours(1);
    droplet.host.offer(&makers.real(&Terms { issued_at: issued_before, ..makers.terms("0.3.0") })?);
    let (ok, said, _) = droplet.update(&["--apply"]).await?;
    assert!(!ok && said.contains("(replayed)"), "{said}");
    droplet.settles_on("0.2.0").await?;
    droplet.tool_is_untouched().await
}

/// Releases that are signed and sound, and don't work.
#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_version_that_does_not_work_goes_again_and_does_not_come_back() -> Story {
    let (droplet, makers) = (Droplet::new(10, 12).await?, Makers::new()?);
    let cases = [
        ("crashed", "0.1.1", "exit 1"),
        ("not_ready", "0.1.2", "exec sleep 1000"),
        ("crashed", "0.1.3", "(sleep 8; kill -KILL $$) &"),
        ("silent", "0.1.4", "(sleep 6; kill -STOP $$) &"),
        ("no_docker", "0.1.5", "export DOCKER_HOST=unix:///run/nowhere.sock"),
        ("no_heartbeat", "0.1.6", "export AGENTOPIA_API_BASE_URL=http://127.0.0.1:9/agent/v1"),
    ];
    for (code, version, script) in cases {
        droplet.host.offer(&makers.mistreated(&makers.terms(version), script)?);
        let (ok, said, took) = droplet.update(&["--apply"]).await?;
        println!("{version} {code}: the version before serves again after {took:.1?}");
        assert!(!ok && said.contains("did not prove itself") && said.contains(&format!("({code})")), "{said}");
        droplet.settles_on(&droplet.first).await?;
        assert_eq!(droplet.last().await?, (UpdateOutcome::Reverted, code.to_owned()));
        droplet.tool_is_untouched().await?;

        let (ok, said, _) = droplet.update(&["--apply"]).await?;
        assert!(!ok && said.contains("(failed_before)") && said.contains("--again"), "{said}");
        until("the provisioner knows why", TWO_MINUTES, async || {
            let reported = droplet.reported().await?;
            let known = reported["failed_versions"].as_array().is_some_and(|failed| {
                failed.iter().any(|failed| failed["version"] == version && failed["code"] == code)
            });
            if known { Ok(Some(())) } else { Err(reported.to_string().into()) }
        })
        .await?;
    }
    Ok(())
}

/// Whatever dies in the middle.
#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn an_updater_that_dies_leaves_a_droplet_that_serves() -> Story {
    let (droplet, makers) = (Droplet::new(30, 60).await?, Makers::new()?);
    let offer = makers.real(&makers.terms("0.1.1"))?;
    let asked = async || {
        let reply = droplet.scene.agent.send(Method::POST, "/redeploy", None).await?;
        assert_eq!(reply.status, 202, "{}", reply.text);
        Ok::<_, Box<dyn std::error::Error>>(())
    };
    let kill = ["systemctl", "kill", "--signal=KILL", "dtma-update.service"];

    droplet.host.offer_stuck(&offer);
    asked().await?;
    droplet.until_phase(UpdatePhase::Downloading).await?;
    droplet.scene.on_droplet(&kill).await?;
    droplet.settles_on(&droplet.first).await?;
    asked().await?;
    droplet.until_phase(UpdatePhase::Downloading).await?;
    droplet.scene.cut_power().await?;
    droplet.settles_on(&droplet.first).await?;
    droplet.tool_answers().await?;

    droplet.host.offer(&offer);
    for death in ["the updater is killed", "the power goes", "the updater is stopped", "updater and agent are killed"] {
        println!("on trial, {death}");
        asked().await?;
        droplet.until_phase(UpdatePhase::Trial).await?;
        until("the new version is in use", TWO_MINUTES, async || {
            Ok((droplet.links().await?.0 == "0.1.1").then_some(()))
        })
        .await?;
        match death {
            "the updater is killed" => drop(droplet.scene.on_droplet(&kill).await?),
            "the power goes" => droplet.scene.cut_power().await?,
            "the updater is stopped" => {
                drop(droplet.scene.on_droplet(&["systemctl", "stop", "dtma-update.service"]).await?)
            }
            _ => {
                let script = "systemctl kill --signal=KILL dtma-update.service dtma-agent.service";
                droplet.scene.on_droplet(&["sh", "-c", script]).await?;
            }
        }
        droplet.settles_on(&droplet.first).await?;
        droplet.tool_answers().await?;
        assert_eq!(droplet.last().await?, (UpdateOutcome::Reverted, "interrupted".to_owned()), "{death}");
        if death == "the updater is stopped" {
            // Interrupted three times; a person's word is needed now.
            let (ok, said, _) = droplet.update(&["--apply"]).await?;
            assert!(!ok && said.contains("(interrupted)"), "{said}");
            break;
        }
    }
    Ok(())
}

/// A good one, while clients call.
#[tokio::test]
#[ignore = "needs Docker and root: cargo xtask test"]
async fn a_good_update_is_a_blink_for_those_who_call_and_can_be_gone_back_from() -> Story {
    let (droplet, makers) = (Droplet::new(30, 5).await?, Makers::new()?);
    droplet.host.offer(&makers.real(&makers.terms("0.1.1"))?);
    let load = Load::start(&droplet, 4).await?;
    let (ok, said, took) = droplet.update(&["--apply"]).await?;
    assert!(ok && said.contains("version 0.1.1 is in use"), "{said}");
    let calls = load.end().await?;
    println!("updated in {took:.1?} under load: {calls}");
    calls.assert_only_a_blink();
    droplet.settles_on("0.1.1").await?;
    droplet.tool_is_untouched().await?;
    until("the provisioner knows", TWO_MINUTES, async || {
        let reported = droplet.reported().await?;
        if reported["last"]["to_version"] == "0.1.1" { Ok(Some(())) } else { Err(reported.to_string().into()) }
    })
    .await?;

    let (ok, said, _) = droplet.update(&["--rollback"]).await?;
    assert!(ok && said.contains(&format!("{} is in use again", droplet.first)), "{said}");
    droplet.settles_on(&droplet.first).await?;
    let (ok, said, _) = droplet.update(&["--apply"]).await?;
    assert!(ok && said.contains("nothing to do"), "what was gone back from isn't gone to again: {said}");
    droplet.tool_is_untouched().await
}
