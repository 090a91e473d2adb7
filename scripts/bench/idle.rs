//! Nothing happens: what it costs to watch a thousand transcripts.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::rows::{Aim, milliseconds};
use crate::stage::{Bench, Scene, Transcript, Usage};

const TRANSCRIPTS: u32 = 1000;
const TURNS: u64 = 10;

pub fn measure(bench: &mut Bench) -> Result<()> {
    let database = bench.server.database()?;
    let scene = Scene::new(bench, "idle")?;
    for number in 1..=TRANSCRIPTS {
        Transcript::create(&scene.projects(), number)?.say(TURNS)?;
    }
    let mut watcher = scene.start(&database.url, &[])?;
    let events = u64::from(TRANSCRIPTS) * (TURNS + 1);
    watcher.wait_until("all stored", |health| {
        let number = |path: &str| health.pointer(path).and_then(serde_json::Value::as_u64);
        number("/writes/succeeded") == Some(events) && number("/queue/pending") == Some(0)
    })?;
    // What is done once after work has ended.
    std::thread::sleep(Duration::from_secs(2));
    let (before, begun) = (Usage::of(watcher.pid()), Instant::now());
    std::thread::sleep(Duration::from_secs(bench.choose(30, 5)));
    let (after, seconds) = (Usage::of(watcher.pid()), begun.elapsed().as_secs_f64());
    let share = 100.0 * after.cpu.saturating_sub(before.cpu).as_secs_f64() / seconds;
    let what = format!("processor, idle, {TRANSCRIPTS} transcripts");
    let beside = format!("of one processor, over {seconds:.0} s");
    bench.rows.add("idle.cpu", &what, share, "%", &beside, Aim::Most(0.5))?;
    let wake_ups = (after.wake_ups - before.wake_ups) as f64 / seconds;
    bench.rows.add("idle.wake_ups", "wake-ups", wake_ups, "/s", "voluntary context switches", Aim::None)?;
    bench.rows.add("idle.memory", "memory", after.peak_mb(), "MB", "peak, with the reading before", Aim::Most(32.0))?;
    let took = milliseconds(watcher.stop()?);
    bench.rows.add("stop.idle", "stop, idle", took, "ms", "SIGTERM until gone", Aim::Most(300.0))?;
    bench.server.drop(database)
}
