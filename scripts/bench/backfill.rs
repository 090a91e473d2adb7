//! From file to Postgres: a transcript that is all there at the start, `run --until-idle`.

use anyhow::{Result, ensure};

use crate::rows::{Aim, median, short};
use crate::stage::{Bench, Scene, Transcript};

pub fn measure(bench: &mut Bench) -> Result<()> {
    let (rounds, turns) = bench.choose((2, 200_000), (1, 20_000));
    let (mut rates, mut peaks, mut written, mut cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut line_bytes = 0.0;
    for _ in 0..rounds {
        let database = bench.server.database()?;
        database.migrate()?;
        let scene = Scene::new(bench, "backfill")?;
        let mut transcript = Transcript::create(&scene.projects(), 1)?;
        transcript.say(turns)?;
        line_bytes = std::fs::metadata(&transcript.path)?.len() as f64 / turns as f64;
        database.execute("CHECKPOINT")?;
        let mut watcher = scene.start(&database.url, &["--until-idle"])?;
        let status = watcher.wait()?;
        let seconds = watcher.begun.elapsed().as_secs_f64();
        ensure!(status.success(), "it ended with {status}: {}", std::fs::read_to_string(scene.log())?);
        // The session's registration is a row too.
        let rows = database.rows()?;
        ensure!(rows == turns + 1, "{rows} rows of {turns} turns");
        let usage = watcher.usage();
        rates.push(turns as f64 / seconds);
        peaks.push(usage.peak_mb());
        let event_bytes = database.number("SELECT sum(octet_length(payload::text)) FROM events")?;
        written.push(usage.written_bytes as f64 / event_bytes);
        cpu.push(1e6 * usage.cpu.as_secs_f64() / turns as f64);
        bench.server.drop(database)?;
    }
    let what = format!("file to Postgres, {turns} turns, start and stop included");
    let beside =
        format!("{} bytes a line; lowest {}", short(line_bytes), short(rates.iter().copied().fold(f64::MAX, f64::min)));
    bench.rows.add("backfill.rate", &what, median(&rates), "events/s", &beside, Aim::Least(20_000.0))?;
    bench.rows.add("backfill.memory", "memory meanwhile", median(&peaks), "MB", "peak", Aim::Most(50.0))?;
    bench.rows.add(
        "backfill.cpu",
        "processor time meanwhile",
        median(&cpu),
        "µs/event",
        "both threads of it",
        Aim::None,
    )?;
    let beside = "the queue's files; an event is its payload's bytes";
    bench.rows.add(
        "backfill.written",
        "bytes written to disk per byte of event",
        median(&written),
        "×",
        beside,
        Aim::None,
    )?;
    Ok(std::fs::remove_dir_all(bench.folder.join("backfill"))?)
}
