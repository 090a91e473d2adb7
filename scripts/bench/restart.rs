//! kill -9 with a backlog, under the supervisor.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::queue::fill;
use crate::rows::Aim;
use crate::stage::{Bench, Scene, project, send, wait_for, watcher_program};

pub fn measure(bench: &mut Bench) -> Result<()> {
    let pending = bench.choose(100_000, 20_000);
    let database = bench.server.database()?;
    database.migrate()?;
    let scene = Scene::new(bench, "restart")?;
    fill(&scene.queue(), pending)?;
    let mut command = scene.command(&project().join("scripts/run-watcher.sh"), &database.url);
    command.env("HEADSPACE_WATCHER_BIN", watcher_program()?);
    // So that all of it is still pending when it is killed.
    bench.server.pause(true)?;
    let killed = (|| {
        let supervisor = scene.spawn(command)?;
        let first = wait_for("ready", Duration::from_millis(5), || Ok(supervisor.health()))?;
        let pid = first.pointer("/pid").and_then(serde_json::Value::as_i64).context("no pid")?;
        ensure!(supervisor.pending() == Some(pending), "{:?} are pending", supervisor.pending());
        send(i32::try_from(pid)?, Signal::KILL)?;
        anyhow::Ok((supervisor, pid))
    })();
    let begun = Instant::now();
    bench.server.pause(false)?;
    let (supervisor, pid) = killed?;
    let step = Duration::from_millis(1);
    wait_for("ready again", step, || {
        let health = supervisor.health();
        Ok(health.filter(|health| health.pointer("/pid").and_then(serde_json::Value::as_i64) != Some(pid)))
    })?;
    let ready = begun.elapsed();
    wait_for("a row", step, || Ok((database.rows()? > 0).then_some(())))?;
    let first = begun.elapsed();
    let what = format!("kill -9 with {pending} pending: ready again");
    bench.rows.add("restart.ready", &what, ready.as_secs_f64(), "s", "by scripts/run-watcher.sh", Aim::Most(3.0))?;
    bench.rows.add("restart.first", "first new row", first.as_secs_f64(), "s", "since the kill", Aim::Most(3.0))?;
    wait_for("all rows", Duration::from_millis(50), || Ok((supervisor.pending() == Some(0)).then_some(())))?;
    let rows = database.rows()?;
    ensure!(rows == pending, "{rows} rows of {pending} events");
    supervisor.stop()?;
    bench.server.drop(database)?;
    Ok(std::fs::remove_dir_all(bench.folder.join("restart"))?)
}
