//! What scripts/bench/drain.sh measures: the program's own queue, sink and drainer, without what captures.
//!
//! ```text
//! drain payload                      prints a payload as the events below have it
//! drain fill QUEUE EVENTS            puts so many events into a new queue
//! drain drain QUEUE URL WINDOW       drains it; prints events/s and the peak of memory
//! drain loop URL EVENTS              BEGIN, INSERT, COMMIT in turn; prints events/s
//! drain single QUEUE URL EVENTS      one event at a time, append to visible; prints p50 and p99
//! ```

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use headspace_watcher::config::{Config, Environment, TableName};
use headspace_watcher::event::{EventId, ForeignKeys, Origin, Timestamp};
use headspace_watcher::intake::schema::{Candidate, Schemas};
use headspace_watcher::queue::{Batch, Queue, QueueConfig};
use headspace_watcher::sink::drain::{DrainConfig, Drainer};
use headspace_watcher::sink::postgres::{ConnectSettings, PostgresSink, TargetSource};
use headspace_watcher::telemetry::Metrics;
use tokio::sync::watch;
use tokio_postgres::NoTls;

/// Events of one append while filling.
const FILL_BATCH: u64 = 512;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    match arguments.as_slice() {
        ["payload"] => println!("{}", payload(0)),
        ["fill", queue, events] => fill(Path::new(queue), events.parse()?)?,
        ["drain", queue, url, window] => runtime.block_on(drain(Path::new(queue), url, window.parse()?))?,
        ["loop", url, events] => runtime.block_on(transactions(url, events.parse()?))?,
        ["single", queue, url, events] => runtime.block_on(single(Path::new(queue), url, events.parse()?))?,
        _ => bail!("see the head of scripts/bench/drain.rs"),
    }
    Ok(())
}

/// 0.9 kB of JSON, as a turn has them.
fn payload(number: u64) -> serde_json::Value {
    const WORDS: &str = "The drainer takes the oldest envelopes out of the queue and hands them to the sink. ";
    serde_json::json!({
        "session_uuid": "7c9e6679-7425-40de-944b-e07fc1f90ae7", "actor": "agent", "source": "polling",
        "turn_timestamp": "2026-01-02T03:04:05.678Z", "turn_uuid": uuid::Uuid::from_u128(u128::from(number)),
        "message_id": "msg_01XFDUDYJgAACzvnptvVoYEL", "project_path": "/home/me/work/app",
        "working_directory": "/home/me/work/app", "git_branch": "main", "is_final": true, "model": "claude-opus-4-8",
        "text": WORDS.repeat(6),
    })
}

fn batch(schemas: &Schemas, count: u64) -> anyhow::Result<Batch> {
    let mut batch = Batch::default();
    for number in 0..count {
        let serde_json::Value::Object(payload) = payload(number) else { bail!("a payload is an object") };
        let candidate = Candidate {
            id: EventId::new(),
            event_type: "turn_detected".to_owned(),
            timestamp: Timestamp::now(),
            payload,
            refs: ForeignKeys::default(),
            origin: Origin::Transcript {
                path: "/home/me/.claude/projects/-home-me-app/bench.jsonl".into(),
                offset: number,
            },
        };
        let event = schemas.check(candidate).map_err(|refused| anyhow::anyhow!("{}", refused.invalid))?;
        batch.events.push(event);
    }
    Ok(batch)
}

fn open(path: &Path) -> anyhow::Result<Queue> {
    let (queue, _) = Queue::open(&QueueConfig { path: path.to_owned(), max_pending_bytes: 1 << 40 })?;
    Ok(queue)
}

fn fill(path: &Path, events: u64) -> anyhow::Result<()> {
    let schemas = Schemas::load(None, 16 << 20)?;
    let queue = open(path)?;
    let mut left = events;
    while left > 0 {
        let count = left.min(FILL_BATCH);
        queue.append(batch(&schemas, count)?)?;
        left -= count;
    }
    queue.close()?;
    Ok(())
}

fn drainer(queue: &Queue, url: &str, window: usize, metrics: &Arc<Metrics>) -> anyhow::Result<Drainer<PostgresSink>> {
    let settings = ConnectSettings {
        target: target(url)?,
        pool_size: 2,
        connect_timeout: Duration::from_secs(1),
        statement_timeout: Duration::from_secs(5),
        events_table: TableName { schema: None, table: "events".to_owned() },
        auto_migrate: true,
        notify_channel: None,
    };
    let config = DrainConfig {
        window,
        attempts_max: 3,
        delay_first: Duration::from_millis(100),
        delay_max: Duration::from_secs(2),
    };
    Ok(Drainer::new(queue.clone(), PostgresSink::new(settings, "bench".to_owned()), config, metrics.clone()))
}

fn target(url: &str) -> anyhow::Result<TargetSource> {
    let environment = Environment::new("/", [("DATABASE_URL", url), ("HOME", "/")]);
    let database = Config::load(None, &environment)?.config.database;
    Ok(Arc::new(move || database.resolve(&environment).map_err(|error| error.to_string())))
}

async fn drain(path: &Path, url: &str, window: usize) -> anyhow::Result<()> {
    let queue = open(path)?;
    let metrics = Arc::new(Metrics::default());
    let events = queue.stats().pending;
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(drainer(&queue, url, window, &metrics)?.run(stopped));
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
    if delivered != events {
        bail!("{delivered} of {events} events were stored");
    }
    println!("{rate:.0} {}", peak_memory_kib()?);
    queue.close()?;
    Ok(())
}

/// Peak of resident memory of this process.
fn peak_memory_kib() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM in /proc/self/status")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// What a program does that knows nothing of pipelines.
async fn transactions(url: &str, events: u64) -> anyhow::Result<()> {
    let (mut client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    let sql =
        "INSERT INTO events (\"timestamp\", event_type, payload) VALUES (now(), 'turn_detected', $1::text::jsonb)";
    let statement = client.prepare(sql).await?;
    let payload = payload(0).to_string();
    let begun = Instant::now();
    for _ in 0..events {
        let transaction = client.transaction().await?;
        transaction.execute(&statement, &[&payload]).await?;
        transaction.commit().await?;
    }
    println!("{:.0}", events as f64 / begun.elapsed().as_secs_f64());
    Ok(())
}

/// Appends one event, waits until another connection sees it, and again.
async fn single(path: &Path, url: &str, events: u64) -> anyhow::Result<()> {
    let schemas = Schemas::load(None, 16 << 20)?;
    let queue = open(path)?;
    let metrics = Arc::new(Metrics::default());
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(drainer(&queue, url, 256, &metrics)?.run(stopped));
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    queue.append(batch(&schemas, 1)?)?;
    while metrics.events_delivered.get() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let statement = client.prepare("SELECT 1 FROM event_receipts WHERE event_id = $1").await?;
    let (mut visible, mut acknowledged) = (Vec::new(), Vec::new());
    for number in 0..events {
        // As lines arrive: 100 a second, not in step with anything.
        tokio::time::sleep(Duration::from_micros(7_000 + (number * 7_919) % 6_000)).await;
        let delivered = metrics.events_delivered.get();
        let batch = batch(&schemas, 1)?;
        let id = batch.events.first().context("a batch of one")?.id().0;
        let begun = Instant::now();
        let ticket = queue.submit(batch);
        ticket.await?;
        let durable = begun.elapsed();
        while client.query_opt(&statement, &[&id]).await?.is_none() {}
        visible.push(begun.elapsed());
        while metrics.events_delivered.get() == delivered {
            tokio::task::yield_now().await;
        }
        acknowledged.push(begun.elapsed() - durable);
    }
    stop.send_replace(true);
    task.await??;
    println!(
        "{} {} {} {}",
        quantile(&mut visible, 50),
        quantile(&mut visible, 99),
        quantile(&mut acknowledged, 50),
        quantile(&mut acknowledged, 99)
    );
    Ok(())
}

/// Microseconds that so many in a hundred do not exceed.
fn quantile(times: &mut [Duration], percent: usize) -> u128 {
    times.sort();
    times.get((times.len() * percent / 100).min(times.len().saturating_sub(1))).map_or(0, Duration::as_micros)
}
