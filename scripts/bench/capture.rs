//! A backlog: captured while Postgres is away, then drained, then verified; and how the watcher starts and stops
//! with it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::rows::{Aim, milliseconds, short};
use crate::stage::{Bench, Scene, Transcript, wait_for, watcher_program};

/// How long a stop may take.
const STOP_MS_MAX: Aim = Aim::Most(300.0);

/// Transcripts that the turns are in.
const TRANSCRIPTS: u32 = 20;

pub fn measure(bench: &mut Bench) -> Result<()> {
    let turns = bench.choose(1_000_000_u64, 40_000);
    let scene = Scene::new(bench, "capture")?;
    let mut line_bytes = 0;
    for number in 1..=TRANSCRIPTS {
        let mut transcript = Transcript::create(&scene.projects(), number)?;
        transcript.say(turns / u64::from(TRANSCRIPTS))?;
        line_bytes += std::fs::metadata(&transcript.path)?.len();
    }
    let events = turns + u64::from(TRANSCRIPTS);
    let database = bench.server.database()?;
    database.migrate()?;
    // Nobody listens there.
    let away = format!("postgresql:///nobody?host={}", bench.folder.display());

    let mut watcher = scene.start(&away, &[])?;
    watcher.wait_until("everything captured", |health| pending(health) >= events)?;
    let seconds = watcher.begun.elapsed().as_secs_f64();
    let usage = watcher.usage();
    let what = format!("captured with Postgres away, {turns} turns");
    let beside = format!("{} MB/s of transcript", short(line_bytes as f64 / 1e6 / seconds));
    bench.rows.add("capture.rate", &what, turns as f64 / seconds, "events/s", &beside, Aim::None)?;
    bench.rows.add("capture.memory", "memory meanwhile", usage.peak_mb(), "MB", "peak", Aim::Most(50.0))?;
    let cpu = 1e6 * usage.cpu.as_secs_f64() / turns as f64;
    bench.rows.add("capture.cpu", "processor time meanwhile", cpu, "µs/event", "", Aim::None)?;
    let written = usage.written_bytes as f64 / line_bytes as f64;
    bench.rows.add("capture.written", "bytes written to disk per byte of transcript", written, "×", "", Aim::None)?;
    let took = milliseconds(watcher.stop()?);
    let what = format!("stop with {turns} pending, Postgres down");
    bench.rows.add("stop.down", &what, took, "ms", "SIGTERM until gone", STOP_MS_MAX)?;

    bench.server.pause(true)?;
    let hanging = (|| {
        let mut watcher = scene.start(&database.url, &[])?;
        let ready = watcher.wait_until_ready()?;
        // In the middle of its try to connect.
        std::thread::sleep(Duration::from_millis(400));
        anyhow::Ok((ready, watcher.stop()?))
    })();
    bench.server.pause(false)?;
    let (ready, took) = hanging?;
    let what = format!("start with {turns} pending, until ready");
    bench.rows.add("start.pending", &what, milliseconds(ready), "ms", "", Aim::Most(3000.0))?;
    let what = format!("stop with {turns} pending, Postgres hanging");
    bench.rows.add("stop.hanging", &what, milliseconds(took), "ms", "SIGSTOP; SIGTERM until gone", STOP_MS_MAX)?;

    // A stop in the middle of draining, and one while Postgres hangs in the middle of it.
    let mut watcher = scene.start(&database.url, &[])?;
    watcher.wait_until("first rows", |health| pending(health) < events)?;
    let took = milliseconds(watcher.stop()?);
    let what = format!("stop with {turns} pending, draining");
    bench.rows.add("stop.draining", &what, took, "ms", "", STOP_MS_MAX)?;
    let mut watcher = scene.start(&database.url, &[])?;
    let before = database.rows()?;
    wait_for("rows again", Duration::from_millis(5), || Ok((database.rows()? > before).then_some(())))?;
    bench.server.pause(true)?;
    // As long as it takes until every answer that was under way has come.
    std::thread::sleep(Duration::from_millis(50));
    let took = watcher.stop();
    bench.server.pause(false)?;
    let what = "stop in the middle of draining, Postgres hanging";
    bench.rows.add("stop.stuck", what, milliseconds(took?), "ms", "", STOP_MS_MAX)?;

    let before = database.rows()?;
    watcher = scene.start(&database.url, &[])?;
    wait_for("rows again", Duration::from_millis(5), || Ok((database.rows()? > before).then_some(())))?;
    let (before, begun) = (database.rows()?, Instant::now());
    watcher.wait_until("an empty queue", |health| pending(health) == 0)?;
    let seconds = begun.elapsed().as_secs_f64();
    let rows = database.rows()?;
    ensure!(rows == events, "{rows} rows of {events} events");
    let what = format!("drained, {} pending", rows - before);
    bench.rows.add(
        "capture.drained",
        &what,
        (rows - before) as f64 / seconds,
        "events/s",
        "by the watcher",
        Aim::None,
    )?;
    let peak = watcher.usage().peak_mb();
    bench.rows.add("capture.drain_memory", "memory meanwhile", peak, "MB", "peak", Aim::Most(50.0))?;
    watcher.stop()?;

    let mut command = scene.command(&watcher_program()?, &database.url);
    command.args(["verify", "--json"]);
    let mut verify = scene.spawn(command)?;
    let status = verify.wait()?;
    let seconds = verify.begun.elapsed().as_secs_f64();
    ensure!(status.success(), "verify ended with {status}: {}", std::fs::read_to_string(scene.log())?);
    let beside = format!("{} turns/s", short(turns as f64 / seconds));
    bench.rows.add("verify.seconds", &format!("verify of {turns} turns"), seconds, "s", &beside, Aim::None)?;
    bench.rows.add("verify.memory", "memory meanwhile", verify.usage().peak_mb(), "MB", "peak", Aim::Most(100.0))?;
    bench.server.drop(database)?;
    Ok(std::fs::remove_dir_all(bench.folder.join("capture"))?)
}

fn pending(health: &serde_json::Value) -> u64 {
    health.pointer("/queue/pending").and_then(serde_json::Value::as_u64).unwrap_or(0)
}
