//! How fast a backlog is drained, beside what the server can on the same table: pgbench, COPY, and a program that knows
//! nothing of pipelines.
//!
//! ```text
//! drain     the program's own queue, sink and drainer: one lane, in order, each event a transaction of its own, exactly
//!           once, and durable before it leaves the queue
//! pgbench   single INSERTs as fast as they go: prepared, the payload a parameter, nothing promised
//! lane      the same INSERT in flight on one connection, as many at a time as the drainer: what one backend can
//! COPY      all rows in one transaction
//! loop      BEGIN, INSERT, COMMIT in turn on one connection
//! ```
//!
//! Rates are medians of rounds in which all take turns, so that a busy machine is busy for all; what counts is the ratio.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::{StreamExt, TryStreamExt};
use headspace_watcher::internals::{
    Config, ConnectSettings, DrainConfig, Drainer, Environment, Metrics, Needs, PostgresSink, Queue, TableName,
    TargetSource,
};
use tokio::sync::watch;
use tokio_postgres::NoTls;

use crate::queue::{fill, open, payload};
use crate::rows::{Aim, median, short};
use crate::stage::{Bench, Database};

/// Transactions in flight: the default of queue.drain_window.
const WINDOW: usize = 256;

const INSERT: &str = "INSERT INTO events (\"timestamp\", event_type, payload) VALUES (now(), 'turn_detected', ";

pub fn measure(bench: &mut Bench) -> Result<()> {
    let folder = bench.make_folder("drain")?;
    let database = prepared(bench, &folder)?;
    let (rounds, events, seconds, loops) = bench.choose((3, 60_000, 2, 3000), (1, 15_000, 1, 300));
    let clients = [1, 4, 16];
    let (mut drained, mut copied, mut looped, mut lane) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut relaxed = clients.map(|_| Vec::new());
    let mut durable = clients.map(|_| Vec::new());
    let (mut to_best, mut to_durable, mut to_lane, mut to_loop) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let rate = drain_new(&folder, &database, events)?;
        let mut best = (0.0_f64, 0.0_f64);
        for (index, count) in clients.into_iter().enumerate() {
            let fast = pgbench(bench, &database, &folder, count, seconds, "off")?;
            let slow = pgbench(bench, &database, &folder, count, seconds, "on")?;
            best = (best.0.max(fast), best.1.max(slow));
            relaxed.get_mut(index).context("a client count")?.push(fast);
            durable.get_mut(index).context("a client count")?.push(slow);
        }
        copied.push(copy(bench, &database, &folder, events)?);
        database.empty()?;
        let pipelined = pipelined(&database.url, events / 2)?;
        database.empty()?;
        let in_turn = transactions(&database.url, loops)?;
        drained.push(rate);
        lane.push(pipelined);
        looped.push(in_turn);
        to_lane.push(rate / pipelined);
        to_best.push(rate / best.0);
        to_durable.push(rate / best.1);
        to_loop.push(rate / in_turn);
    }
    let all = |rates: &[Vec<f64>]| rates.iter().map(|rates| short(median(rates))).collect::<Vec<_>>().join(", ");
    let indexes = database.value("SELECT count(*) FROM pg_indexes WHERE tablename = 'events'")?;
    let beside = format!("{} bytes of payload, {indexes} indexes", payload(0).to_string().len());
    let rows = &mut bench.rows;
    rows.add("drain.rate", &format!("drained, {events} pending"), median(&drained), "events/s", &beside, Aim::None)?;
    let beside = format!("1, 4, 16 clients, synchronous_commit off: {}/s", all(&relaxed));
    rows.add(
        "drain.pgbench",
        "drained : pgbench at its best, relaxed",
        median(&to_best),
        "×",
        &beside,
        Aim::Least(0.8),
    )?;
    let beside = format!("1, 4, 16 clients, synchronous_commit on: {}/s", all(&durable));
    rows.add(
        "drain.pgbench_durable",
        "drained : pgbench at its best, durable",
        median(&to_durable),
        "×",
        &beside,
        Aim::None,
    )?;
    let beside = format!("one connection, {WINDOW} in flight, relaxed, no ledger: {}/s", short(median(&lane)));
    rows.add("drain.lane", "drained : the INSERT alone, pipelined", median(&to_lane), "×", &beside, Aim::None)?;
    let beside = format!("BEGIN, INSERT, COMMIT in turn: {}/s", short(median(&looped)));
    rows.add("drain.loop", "drained : a loop of transactions", median(&to_loop), "×", &beside, Aim::Least(8.0))?;
    rows.add("drain.copy", "COPY of as many rows, in one transaction", median(&copied), "rows/s", "", Aim::None)?;
    bench.server.drop(database)?;
    Ok(std::fs::remove_dir_all(folder)?)
}

/// The drainer beside pgbench with one client: each is one process with one of the server's, so they share a busy machine
/// alike. This is what CI compares with what was published, both in a debug build; it fails under half of that.
pub fn ratio(bench: &mut Bench) -> Result<()> {
    const KEY: &str = "ratio.drain";
    let least = match &bench.published {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("could not read {}", path.display()))?;
            let line = text.lines().find_map(|line| line.strip_prefix(KEY)?.strip_prefix('\t'));
            let line = line.with_context(|| format!("{} has no {KEY}", path.display()))?;
            let value: f64 = line.split('\t').nth(1).context("a value")?.parse()?;
            Some(value / 2.0)
        }
        None => None,
    };
    let folder = bench.make_folder("ratio")?;
    let database = prepared(bench, &folder)?;
    let (mut ratios, mut drained, mut inserted) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.choose(3, 1) {
        let ours = drain_new(&folder, &database, 8000)?;
        let theirs = pgbench(bench, &database, &folder, 1, 1, "off")?;
        ratios.push(ours / theirs);
        drained.push(ours);
        inserted.push(theirs);
    }
    bench.server.drop(database)?;
    std::fs::remove_dir_all(folder)?;
    let ratio = median(&ratios);
    let beside = format!("{} : {}/s, synchronous_commit off", short(median(&drained)), short(median(&inserted)));
    let what =
        if cfg!(debug_assertions) { "drained : pgbench, 1 client; debug build" } else { "drained : pgbench, 1 client" };
    bench.rows.add(KEY, what, ratio, "×", &beside, least.map_or(Aim::None, Aim::Least))?;
    if let Some(least) = least {
        ensure!(ratio >= least, "the drain has become slow: under half of the published ratio {:.2}", 2.0 * least);
    }
    Ok(())
}

/// A database with the tables, everything warmed up.
fn prepared(bench: &mut Bench, folder: &Path) -> Result<Database> {
    let database = bench.server.database()?;
    database.migrate()?;
    std::fs::write(folder.join("insert.sql"), format!("{INSERT}:payload::jsonb);\n"))?;
    drain_new(folder, &database, 2000)?;
    Ok(database)
}

/// Fills a queue, empties the table, drains the one into the other: events a second.
fn drain_new(folder: &Path, database: &Database, events: u64) -> Result<f64> {
    let path = folder.join("queue");
    fill(&path, events)?;
    database.empty()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let queue = open(&path)?;
    let rate = runtime.block_on(drain(&queue, &database.url))?;
    queue.close()?;
    drop(queue);
    std::fs::remove_dir_all(path)?;
    Ok(rate)
}

async fn drain(queue: &Queue, url: &str) -> Result<f64> {
    let metrics = Arc::new(Metrics::default());
    let events = queue.stats().pending;
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(drainer(queue, url, &metrics)?.run(stopped));
    // The clock starts with the first rows, not with connecting.
    while metrics.events_delivered.get() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
        if task.is_finished() {
            bail!("the drainer has ended: {:?}", task.await);
        }
    }
    let (begun, before) = (Instant::now(), metrics.events_delivered.get());
    while queue.stats().pending > 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let rate = (events - before) as f64 / begun.elapsed().as_secs_f64();
    stop.send_replace(true);
    task.await??;
    let delivered = metrics.events_delivered.get();
    ensure!(delivered == events, "{delivered} of {events} events were stored");
    Ok(rate)
}

fn drainer(queue: &Queue, url: &str, metrics: &Arc<Metrics>) -> Result<Drainer<PostgresSink>> {
    let settings = ConnectSettings {
        target: target(url)?,
        pool_size: 2,
        connect_timeout: Duration::from_secs(1),
        statement_timeout: Duration::from_secs(5),
        needs: Needs {
            events: TableName { schema: None, table: "events".to_owned() },
            ledger_schema: "headspace_watcher".to_owned(),
            notify_channel: None,
        },
        auto_migrate: true,
    };
    let config = DrainConfig {
        window: WINDOW,
        attempts_max: 3,
        delay_first: Duration::from_millis(100),
        delay_max: Duration::from_secs(2),
    };
    Ok(Drainer::new(queue.clone(), PostgresSink::new(settings, "bench".to_owned()), config, metrics.clone()))
}

fn target(url: &str) -> Result<TargetSource> {
    let environment = Environment::new("/", [("DATABASE_URL", url), ("HOME", "/")]);
    let database = Config::load(None, &environment)?.config.database;
    Ok(Arc::new(move || database.resolve(&environment).map_err(|error| error.to_string())))
}

fn pgbench(
    bench: &Bench,
    database: &Database,
    folder: &Path,
    clients: u32,
    seconds: u32,
    synchronous_commit: &str,
) -> Result<f64> {
    database.empty()?;
    let output = Command::new(bench.server.program("pgbench"))
        .env("PGOPTIONS", format!("-c synchronous_commit={synchronous_commit}"))
        .args(["-n", "-M", "prepared", "-j", "2", "-c", &clients.to_string(), "-T", &seconds.to_string(), "-f"])
        .arg(folder.join("insert.sql"))
        .args(["-D", &format!("payload={}", payload(0)), &database.url])
        .output()
        .context("could not run pgbench")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let rate = text.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    rate.with_context(|| format!("pgbench: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

fn copy(bench: &Bench, database: &Database, folder: &Path, events: u64) -> Result<f64> {
    let path = folder.join("copy");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&path)?);
    for number in 0..events {
        writeln!(file, "2026-01-02T03:04:05.678Z\tturn_detected\t{}", payload(number))?;
    }
    file.into_inner()?.sync_data()?;
    database.empty()?;
    let begun = Instant::now();
    let command = format!("\\copy events (\"timestamp\", event_type, payload) from '{}'", path.display());
    let output = Command::new(bench.server.program("psql"))
        .args(["-qAtX", "-v", "ON_ERROR_STOP=1", "-c", &command, &database.url])
        .output()?;
    ensure!(output.status.success(), "copy: {}", String::from_utf8_lossy(&output.stderr));
    let rate = events as f64 / begun.elapsed().as_secs_f64();
    std::fs::remove_file(path)?;
    Ok(rate)
}

/// pgbench's INSERT, but without waiting for its answer before the next is sent: no ledger, no order, nothing durable.
fn pipelined(url: &str, events: u64) -> Result<f64> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
        tokio::spawn(connection);
        client.batch_execute("SET synchronous_commit = off").await?;
        let statement = client.prepare(&format!("{INSERT}$1::text::jsonb)")).await?;
        let payload = payload(0).to_string();
        let begun = Instant::now();
        futures_util::stream::iter(0..events)
            .map(|_| client.execute_raw(&statement, [&payload]))
            .buffered(WINDOW)
            .try_for_each(|_| std::future::ready(Ok(())))
            .await?;
        Ok(events as f64 / begun.elapsed().as_secs_f64())
    })
}

/// What a program does that knows nothing of pipelines.
fn transactions(url: &str, events: u64) -> Result<f64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut client, connection) = tokio_postgres::connect(url, NoTls).await?;
        tokio::spawn(connection);
        let statement = client.prepare(&format!("{INSERT}$1::text::jsonb)")).await?;
        let payload = payload(0).to_string();
        let begun = Instant::now();
        for _ in 0..events {
            let transaction = client.transaction().await?;
            transaction.execute(&statement, &[&payload]).await?;
            transaction.commit().await?;
        }
        Ok(events as f64 / begun.elapsed().as_secs_f64())
    })
}
