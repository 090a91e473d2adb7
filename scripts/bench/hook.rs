//! The hook's wall time, as Claude Code sees it: from starting the process to its end.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::rows::{Aim, quantile, quantiles};
use crate::stage::{Bench, Scene, watcher_program};

const INPUT: &str = r#"{"session_id":"7c9e6679-7425-40de-944b-e07fc1f90ae7","transcript_path":"/home/me/.claude/projects/-home-me-app/7c9e6679-7425-40de-944b-e07fc1f90ae7.jsonl","cwd":"/home/me/app","hook_event_name":"Stop","permission_mode":"default","stop_hook_active":false,"last_assistant_message":"It is done."}"#;

pub fn measure(bench: &mut Bench) -> Result<()> {
    let runs = bench.choose(1000, 40);
    let database = bench.server.database()?;
    let scene = Scene::new(bench, "hook")?;
    let nothing = spawn_nothing(runs)?;
    bench.rows.add(
        "hook.nothing",
        "a process that does nothing",
        quantile(&nothing, 0.5),
        "ms",
        &quantiles(&nothing),
        Aim::None,
    )?;
    let down = hooks(&scene, &database.url, runs)?;
    let mut watcher = scene.start(&database.url, &[])?;
    watcher.wait_until_ready()?;
    let up = hooks(&scene, &database.url, runs)?;
    watcher.stop()?;
    for (key, what, took) in [("hook.up", "the watcher runs", up), ("hook.down", "it does not", down)] {
        let what = format!("hook, {what}: p99");
        bench.rows.add(key, &what, quantile(&took, 0.99), "ms", &quantiles(&took), Aim::Most(30.0))?;
    }
    bench.server.drop(database)
}

fn hooks(scene: &Scene, url: &str, runs: u32) -> Result<Vec<Duration>> {
    let mut took = Vec::new();
    for _ in 0..runs {
        let mut command = scene.command(&watcher_program()?, url);
        command.arg("hook").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let begun = Instant::now();
        let mut child = command.spawn()?;
        // It may have read all it wants before we close.
        child.stdin.take().context("a pipe")?.write_all(INPUT.as_bytes())?;
        ensure!(child.wait()?.success(), "a hook failed");
        took.push(begun.elapsed());
    }
    Ok(took)
}

fn spawn_nothing(runs: u32) -> Result<Vec<Duration>> {
    let mut took = Vec::new();
    for _ in 0..runs {
        let begun = Instant::now();
        std::process::Command::new("true").env_clear().env("PATH", "/usr/bin:/bin").spawn()?.wait()?;
        took.push(begun.elapsed());
    }
    Ok(took)
}
