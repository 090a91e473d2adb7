//! An outage while lines keep coming: Postgres is stopped, started again, and the watcher finds it by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};

use crate::rows::Aim;
use crate::stage::{Bench, Database, Scene, Transcript, wait_for};

const LINES_PER_SECOND: u32 = 500;

pub fn measure(bench: &mut Bench) -> Result<()> {
    let away = Duration::from_secs(bench.choose(60, 5));
    let database = bench.server.database()?;
    database.migrate()?;
    let url = database.url.clone();
    let scene = Scene::new(bench, "outage")?;
    let mut watcher = scene.start(&url, &[])?;
    watcher.wait_until_ready()?;
    let (written, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let writer = {
        let (written, stop) = (written.clone(), stop.clone());
        let mut transcript = Transcript::create(&scene.projects(), 1)?;
        std::thread::spawn(move || -> Result<()> {
            let begun = Instant::now();
            let mut lines = 0;
            while !stop.load(Ordering::Relaxed) {
                transcript.say(1)?;
                lines += 1;
                written.store(lines, Ordering::Relaxed);
                let due = Duration::from_secs(1) * u32::try_from(lines)? / LINES_PER_SECOND;
                std::thread::sleep(due.saturating_sub(begun.elapsed()));
            }
            Ok(())
        })
    };
    wait_for("rows", Duration::from_millis(5), || Ok((database.rows()? > 100).then_some(())))?;
    drop(database);
    bench.server.stop()?;
    std::thread::sleep(away);
    let before = watcher.pending().unwrap_or(0);
    let measured = std::thread::scope(|scope| {
        let starting = scope.spawn(|| bench.server.start());
        let database = wait_for("a connection", Duration::from_millis(2), || Ok(Database::open(&url).ok()))?;
        let back = Instant::now();
        let stored = database.rows()?;
        let step = Duration::from_millis(1);
        wait_for("a row", step, || Ok((database.rows()? > stored).then_some(())))?;
        let first = back.elapsed();
        // What is written while we look is under way, not waiting.
        wait_for("an empty queue", Duration::from_millis(5), || {
            let written = written.load(Ordering::Relaxed);
            Ok((database.rows()? + u64::from(LINES_PER_SECOND) / 20 > written).then_some(()))
        })?;
        let empty = back.elapsed();
        starting.join().map_err(|_| anyhow!("starting Postgres failed"))??;
        anyhow::Ok((database, first, empty))
    });
    stop.store(true, Ordering::Relaxed);
    writer.join().map_err(|_| anyhow!("the writer failed"))??;
    let (database, first, empty) = measured?;
    let events = written.load(Ordering::Relaxed) + 1;
    wait_for("all rows", Duration::from_millis(20), || Ok((database.rows()? >= events).then_some(())))?;
    let rows = database.rows()?;
    ensure!(rows == events, "{rows} rows of {events} events");
    let what = format!("Postgres {} s away, {LINES_PER_SECOND} lines/s: first row", away.as_secs());
    let beside = "since it accepts connections again";
    bench.rows.add("outage.first", &what, first.as_secs_f64(), "s", beside, Aim::Most(2.5))?;
    let beside = format!("{before} were pending, lines keep coming; each stored once");
    bench.rows.add("outage.empty", "until the queue is empty", empty.as_secs_f64(), "s", &beside, Aim::None)?;
    bench.rows.add("outage.memory", "memory meanwhile", watcher.usage().peak_mb(), "MB", "peak", Aim::Most(50.0))?;
    watcher.stop()?;
    bench.server.drop(database)
}
