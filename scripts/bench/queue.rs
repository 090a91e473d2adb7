//! The queue alone, beside write + fdatasync of the same bytes to a plain file on the same disk.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use headspace_watcher::internals::{
    Batch, Candidate, EventId, ForeignKeys, Origin, Queue, QueueConfig, Schemas, Ticket, Timestamp,
};

use crate::rows::{Aim, median, milliseconds, short};
use crate::stage::{Bench, Usage};

/// Events of one append.
const BATCH_EVENTS: u64 = 256;

/// Batches whose sync is not awaited before the next, as the intake has them.
const BATCHES_IN_FLIGHT: usize = 2;

pub fn measure(bench: &mut Bench) -> Result<()> {
    let folder = bench.make_folder("queue")?;
    let schemas = schemas()?;
    let queue = open(&folder.join("queue"))?;
    let (rounds, batches, singles) = bench.choose((5, 100, 200_u32), (2, 40, 100));
    let (mut batched, mut single) = (Vec::new(), Vec::new());
    let (mut batched_disk, mut single_disk) = (Vec::new(), Vec::new());
    // The two take turns, so that a busy disk is busy for both.
    for _ in 0..rounds {
        let batch = batch(&schemas, BATCH_EVENTS)?;
        let bytes = event_bytes(&batch);
        let begun = Instant::now();
        let mut under_way = std::collections::VecDeque::new();
        for _ in 0..batches {
            under_way.push_back(queue.submit(batch.clone()));
            if under_way.len() > BATCHES_IN_FLIGHT {
                under_way.pop_front().map(Ticket::wait).transpose()?;
            }
        }
        under_way.into_iter().try_for_each(|ticket| ticket.wait().map(drop))?;
        batched.push((batches * BATCH_EVENTS) as f64 / begun.elapsed().as_secs_f64());
        let rate = plain_file(&folder, bytes, batches)?;
        batched_disk.push(rate * BATCH_EVENTS as f64);

        let one = self::batch(&schemas, 1)?;
        let begun = Instant::now();
        for _ in 0..singles {
            queue.append(one.clone())?;
        }
        single.push(f64::from(singles) / begun.elapsed().as_secs_f64());
        single_disk.push(plain_file(&folder, event_bytes(&one), singles.into())?);
    }
    queue.close()?;
    let share = |ours: &[f64], disk: &[f64]| {
        let ratios: Vec<f64> = ours.iter().zip(disk).map(|(ours, disk)| ours / disk).collect();
        median(&ratios)
    };
    let beside = format!("write + fdatasync of the same bytes: {}/s", short(median(&batched_disk)));
    let what = format!("durable append of 1 kB events, {BATCH_EVENTS} at a time");
    bench.rows.add("queue.batched", &what, median(&batched), "events/s", &beside, Aim::Least(50_000.0))?;
    let beside = format!("write + fdatasync of the same bytes: {}/s", short(median(&single_disk)));
    bench.rows.add("queue.single", "durable append, one at a time", median(&single), "events/s", &beside, Aim::None)?;
    let what = "the same, of what the disk can";
    bench.rows.add(
        "queue.single_share",
        what,
        100.0 * share(&single, &single_disk),
        "%",
        "median of rounds",
        Aim::Least(50.0),
    )?;
    std::fs::remove_dir_all(folder.join("queue"))?;

    let pending = bench.choose(1_000_000, 50_000);
    let path = folder.join("pending");
    fill(&path, pending)?;
    let (took, peak) = open_apart(&path)?;
    let what = format!("opening with {pending} pending");
    bench.rows.add("queue.open", &what, took, "s", "", Aim::Most(1.0))?;
    let what = format!("memory, {pending} pending, a first window read");
    bench.rows.add("queue.memory", &what, peak, "MB", "peak of a process that does nothing else", Aim::Most(50.0))?;
    // The first and the last segment: the one is read by itself, the other says what is in all of them.
    let mut segments: Vec<PathBuf> = std::fs::read_dir(&path)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    segments.retain(|path| path.join("db").exists());
    segments.sort_unstable_by_key(|path| std::fs::metadata(path).and_then(|metadata| metadata.created()).ok());
    for segment in [segments.first(), segments.last()].into_iter().flatten() {
        let db = File::options().write(true).open(segment.join("db"))?;
        db.set_len(db.metadata()?.len() / 2)?;
    }
    let (took, _) = open_apart(&path)?;
    let what = "the same, half of the first and the last segment's logs cut off";
    bench.rows.add("queue.open_damaged", what, took, "s", "", Aim::Most(60.0))?;
    Ok(std::fs::remove_dir_all(folder)?)
}

/// Opens a queue in a process of its own: seconds, and the peak of memory in MB.
fn open_apart(path: &Path) -> Result<(f64, f64)> {
    let output = Command::new(std::env::current_exe()?).arg("open").arg(path).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "opening failed");
    let output = String::from_utf8(output.stdout)?;
    let (took, peak) = output.trim().split_once(' ').context("two numbers")?;
    Ok((took.parse()?, peak.parse()?))
}

/// In a process of its own: opens a queue, reads a window, prints how many seconds the opening took and the peak of memory.
pub fn opened(path: &Path) -> Result<()> {
    let begun = Instant::now();
    let queue = open(path)?;
    let took = begun.elapsed();
    ensure!(!queue.window(None, 256, u64::MAX)?.is_empty(), "nothing is pending");
    println!("{} {:.1}", milliseconds(took) / 1000.0, Usage::of(std::process::id()).peak_mb());
    Ok(())
}

pub fn schemas() -> Result<Schemas> {
    Ok(Schemas::load(None, 16 << 20)?)
}

pub fn open(path: &Path) -> Result<Queue> {
    let (queue, _) = Queue::open(&QueueConfig { path: path.to_owned(), max_pending_bytes: 1 << 40 })?;
    Ok(queue)
}

/// A new queue with so many events in it.
pub fn fill(path: &Path, events: u64) -> Result<()> {
    let schemas = schemas()?;
    let queue = open(path)?;
    let mut left = events;
    while left > 0 {
        let count = left.min(2 * BATCH_EVENTS);
        queue.append(batch(&schemas, count)?)?;
        left -= count;
    }
    Ok(queue.close()?)
}

/// 0.9 kB of JSON, as a turn has them.
pub fn payload(number: u64) -> serde_json::Value {
    const WORDS: &str = "The drainer takes the oldest envelopes out of the queue and hands them to the sink. ";
    serde_json::json!({
        "session_uuid": "7c9e6679-7425-40de-944b-e07fc1f90ae7", "actor": "agent", "source": "polling",
        "turn_timestamp": "2026-01-02T03:04:05.678Z", "turn_uuid": uuid::Uuid::from_u128(u128::from(number)),
        "message_id": "msg_01XFDUDYJgAACzvnptvVoYEL", "project_path": "/home/me/work/app",
        "working_directory": "/home/me/work/app", "git_branch": "main", "is_final": true, "model": "claude-opus-4-8",
        "text": WORDS.repeat(6),
    })
}

pub fn batch(schemas: &Schemas, count: u64) -> Result<Batch> {
    let mut batch = Batch::default();
    for number in 0..count {
        let serde_json::Value::Object(payload) = payload(number) else { anyhow::bail!("a payload is an object") };
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

/// The payloads' bytes and what else an event has to keep, without any framing.
fn event_bytes(batch: &Batch) -> usize {
    const BESIDE_PAYLOAD: usize = 100;
    batch.events.iter().map(|event| event.payload().as_json().len() + BESIDE_PAYLOAD).sum()
}

/// Appends so many bytes and syncs, again and again: times a second.
pub fn plain_file(folder: &Path, bytes: usize, times: u64) -> Result<f64> {
    let took: Duration = plain_writes(folder, bytes, times)?.iter().sum();
    Ok(times as f64 / took.as_secs_f64())
}

/// How long each such write took.
pub fn plain_writes(folder: &Path, bytes: usize, times: u64) -> Result<Vec<Duration>> {
    let path = folder.join("plain");
    let mut file = File::create(&path)?;
    let content = vec![b'x'; bytes];
    let mut took = Vec::new();
    for _ in 0..times {
        let begun = Instant::now();
        file.write_all(&content)?;
        file.sync_data()?;
        took.push(begun.elapsed());
    }
    std::fs::remove_file(path)?;
    Ok(took)
}
