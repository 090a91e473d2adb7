//! Nothing happens: what it costs to watch a thousand transcripts.

use std::time::Duration;

use anyhow::Result;

use crate::rows::{Aim, milliseconds};
use crate::stage::{Bench, Scene, Transcript};

const TRANSCRIPTS: u32 = 1000;
const TURNS: u64 = 10;

pub fn measure(bench: &mut Bench) -> Result<()> {
    let database = bench.server.database()?;
    let scene = Scene::new(bench, "idle")?;
    for number in 1..=TRANSCRIPTS {
        Transcript::create(&scene.projects(), number)?.say(TURNS)?;
    }
    let mut watcher = scene.start(&database.url, &[])?;
    watcher.wait_until_stored(u64::from(TRANSCRIPTS) * (TURNS + 1))?;
    // What is done once after work has ended.
    std::thread::sleep(Duration::from_secs(2));
    let seconds = bench.choose(30, 5);
    let (share, wake_ups) = watcher.effort(|| {
        std::thread::sleep(Duration::from_secs(seconds));
        Ok(())
    })?;
    let what = format!("processor, idle, {TRANSCRIPTS} transcripts");
    let beside = format!("of one processor, over {seconds} s");
    bench.rows.add("idle.cpu", &what, share, "%", &beside, Aim::Most(0.5))?;
    bench.rows.add("idle.wake_ups", "wake-ups", wake_ups, "/s", "voluntary context switches", Aim::None)?;
    bench.rows.add(
        "idle.memory",
        "memory",
        watcher.usage().peak_mb(),
        "MB",
        "peak, with the reading before",
        Aim::Most(32.0),
    )?;
    let took = milliseconds(watcher.stop()?);
    bench.rows.add("stop.idle", "stop, idle", took, "ms", "SIGTERM until gone", Aim::Most(300.0))?;
    bench.server.drop(database)
}
