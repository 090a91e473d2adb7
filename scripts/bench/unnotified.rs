//! No file notification ever arrives, as on network file systems: what checking costs, and how soon a line is a row.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};

use crate::latency::{listen, one_by_one};
use crate::rows::{Aim, quantile, quantiles};
use crate::stage::{Bench, Scene, Transcript, project};

const TRANSCRIPTS: u32 = 1000;
const TURNS: u64 = 10;

/// Transcripts to which a line is added every ten seconds.
const ACTIVE: usize = 10;

/// Lines a second. Their times are at no fixed distance from those of the checks.
const RATE: u32 = 7;

pub fn measure(bench: &mut Bench) -> Result<()> {
    let database = bench.server.database()?;
    let mut scene = Scene::new(bench, "unnotified")?;
    scene.set("database.notify_channel", "bench")?;
    scene.add_variable("LD_PRELOAD", &library(&scene)?.display().to_string());
    let mut transcripts = Vec::new();
    for number in 1..=TRANSCRIPTS {
        let mut transcript = Transcript::create(&scene.projects(), number)?;
        transcript.say(TURNS)?;
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        File::options().append(true).open(&transcript.path)?.set_modified(long_ago)?;
        transcripts.push(transcript);
    }
    let mut watcher = scene.start(&database.url, &[])?;
    watcher.wait_until_stored(u64::from(TRANSCRIPTS) * (TURNS + 1))?;
    // What is done once after work has ended.
    std::thread::sleep(Duration::from_secs(2));
    let seconds = bench.choose(30, 5);
    let (idle, _) = watcher.effort(|| {
        std::thread::sleep(Duration::from_secs(seconds));
        Ok(())
    })?;
    let beside = format!("of one processor, over {seconds} s");
    let what = format!("processor, idle, {TRANSCRIPTS} transcripts");
    bench.rows.add("unnotified.cpu", &what, idle, "%", &beside, Aim::Most(0.5))?;
    transcripts.truncate(ACTIVE);
    let (active, _) = watcher.effort(|| {
        for second in 0..seconds {
            if let Some(transcript) = transcripts.get_mut(second as usize % ACTIVE) {
                transcript.say(1)?;
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(())
    })?;
    let what = format!("the same, {ACTIVE} of them active");
    let beside = "one line a second among them";
    bench.rows.add("unnotified.cpu_active", &what, active, "%", beside, Aim::Most(1.0))?;

    let lines = bench.choose(200, 30);
    let sessions = bench.choose(10, 2);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (to_row, to_session) = runtime.block_on(async {
        let (client, mut notices) = listen(&database.url).await?;
        client.batch_execute("LISTEN bench").await?;
        let mut to_row = Vec::new();
        if let Some(transcript) = transcripts.first_mut() {
            to_row = one_by_one(transcript, &mut notices, lines, RATE, 0).await?;
        }
        let mut to_session = Vec::new();
        for number in 1..=sessions {
            let mut transcript = Transcript::create(&scene.projects(), TRANSCRIPTS + number)?;
            // Beside its row comes that of the session's registration.
            to_session.extend(one_by_one(&mut transcript, &mut notices, 1, 1, 1).await?);
            // At another time between two rescans for each.
            tokio::time::sleep(Duration::from_millis(u64::from(number) * 170)).await;
        }
        anyhow::Ok((to_row, to_session))
    })?;
    let what = "line to row: p50";
    bench.rows.add("unnotified.p50", what, quantile(&to_row, 0.5), "ms", &quantiles(&to_row), Aim::Most(350.0))?;
    let beside = format!("{lines} lines, {RATE} a second");
    bench.rows.add("unnotified.max", "line to row: max", quantile(&to_row, 1.0), "ms", &beside, Aim::Most(1000.0))?;
    let what = "new session to row: max";
    bench.rows.add(
        "unnotified.new",
        what,
        quantile(&to_session, 1.0),
        "ms",
        &quantiles(&to_session),
        Aim::Most(2500.0),
    )?;
    watcher.stop()?;
    bench.server.drop(database)
}

/// A library over whose functions the program's file notifications never arrive.
fn library(scene: &Scene) -> Result<PathBuf> {
    let library = scene.projects().with_file_name("no_notifications.so");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let source = project().join("scripts/bench/no_notifications.c");
    let compiled = Command::new(compiler).args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status()?;
    ensure!(compiled.success(), "could not compile scripts/bench/no_notifications.c");
    Ok(library)
}
