//! Appends lines to a transcript at a given rate and listens for their rows: how long each takes.
//!
//! Arguments: database URL, projects folder, lines, then rates in lines a second. The watcher runs with
//! `database.notify_channel: bench`; a notification comes with the commit, so its arrival is visibility.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio_postgres::{AsyncMessage, Client, NoTls};

/// How long a row may take before the measurement gives up.
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, projects, lines, rates @ ..] = arguments.as_slice() else {
        bail!("usage: bench-latency URL PROJECTS LINES RATE...");
    };
    let lines: u32 = lines.parse().context("LINES")?;
    let (client, mut notices) = listen(url).await?;
    println!("{:<34} {:>8} {:>8} {:>8} {:>8}", "milliseconds", "p50", "p95", "p99", "max");
    show("write + fdatasync, plain file", plain_file(Path::new(projects), lines)?);
    show("synchronous INSERT, nothing else", plain_insert(url, lines).await?);
    client.batch_execute("LISTEN bench").await?;
    let mut transcript = Transcript::create(Path::new(projects))?;
    // The first row also waits for the tables and the connection.
    one_by_one(&mut transcript, &mut notices, 1, 10).await?;
    for rate in rates {
        let rate: u32 = rate.parse().context("RATE")?;
        let took = one_by_one(&mut transcript, &mut notices, lines, rate).await?;
        show(&format!("line to row, {rate} lines/s"), took);
    }
    Ok(())
}

/// A connection whose notifications arrive with their time.
async fn listen(url: &str) -> Result<(Client, mpsc::UnboundedReceiver<Instant>)> {
    let (client, mut connection) = tokio_postgres::connect(url, NoTls).await?;
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut messages = futures_util::stream::poll_fn(move |context| connection.poll_message(context));
        while let Some(Ok(message)) = messages.next().await {
            if let AsyncMessage::Notification(_) = message {
                let _ = sender.send(Instant::now());
            }
        }
    });
    Ok((client, receiver))
}

/// Appends lines at a rate; rows come in the order of lines, so the n-th notice is the n-th line's.
async fn one_by_one(
    transcript: &mut Transcript,
    notices: &mut mpsc::UnboundedReceiver<Instant>,
    lines: u32,
    rate: u32,
) -> Result<Vec<Duration>> {
    let mut sent: HashMap<u32, Instant> = HashMap::new();
    let mut took = Vec::new();
    let mut pace = tokio::time::interval(Duration::from_secs_f64(1.0 / f64::from(rate)));
    let rows = lines + transcript.rows_beside();
    let (mut written, mut arrived) = (0, rows - lines);
    let mut beside = rows - lines;
    while arrived < rows {
        tokio::select! {
            biased;
            notice = notices.recv() => {
                let notice = notice.context("the connection has ended")?;
                if beside > 0 {
                    beside -= 1;
                    continue;
                }
                let line = arrived - (rows - lines);
                let begun = sent.remove(&line).context("a row that nobody wrote")?;
                took.push(notice - begun);
                arrived += 1;
            }
            _ = pace.tick(), if written < lines => {
                sent.insert(written, Instant::now());
                transcript.append()?;
                written += 1;
            }
            () = tokio::time::sleep(PATIENCE) => bail!("no row within {PATIENCE:?}"),
        }
    }
    Ok(took)
}

struct Transcript {
    file: File,
    lines: u32,
}

const SESSION: &str = "00000001-0000-4000-8000-000000000000";

impl Transcript {
    fn create(projects: &Path) -> Result<Transcript> {
        let folder = projects.join("-bench");
        std::fs::create_dir_all(&folder)?;
        let file = OpenOptions::new().create(true).append(true).open(folder.join(format!("{SESSION}.jsonl")))?;
        Ok(Transcript { file, lines: 0 })
    }

    /// Rows that come with the next line but are not its own: the session's registration.
    fn rows_beside(&self) -> u32 {
        u32::from(self.lines == 0)
    }

    fn append(&mut self) -> Result<()> {
        self.lines += 1;
        let text = "x".repeat(600);
        let line = format!(
            "{{\"parentUuid\":null,\"isSidechain\":false,\"type\":\"user\",\"message\":{{\"role\":\"user\",\"content\":\"{text}\"}},\
             \"uuid\":\"{:08x}-0000-4000-8000-000000000001\",\"timestamp\":\"2026-01-02T03:04:05.678Z\",\
             \"cwd\":\"/bench\",\"sessionId\":\"{SESSION}\"}}\n",
            self.lines
        );
        self.file.write_all(line.as_bytes())?;
        Ok(())
    }
}

fn plain_file(folder: &Path, lines: u32) -> Result<Vec<Duration>> {
    let path = folder.join("plain");
    let mut file = File::create(&path)?;
    let line = [b'x'; 900];
    let mut took = Vec::new();
    for _ in 0..lines {
        let begun = Instant::now();
        file.write_all(&line)?;
        file.sync_data()?;
        took.push(begun.elapsed());
    }
    std::fs::remove_file(path)?;
    Ok(took)
}

async fn plain_insert(url: &str, lines: u32) -> Result<Vec<Duration>> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    client.batch_execute("CREATE TABLE bench_plain (id serial PRIMARY KEY, payload text)").await?;
    let statement = client.prepare("INSERT INTO bench_plain (payload) VALUES ($1)").await?;
    let payload = "x".repeat(900);
    let mut took = Vec::new();
    for _ in 0..lines {
        let begun = Instant::now();
        client.execute(&statement, &[&payload]).await?;
        took.push(begun.elapsed());
    }
    Ok(took)
}

fn show(what: &str, mut took: Vec<Duration>) {
    took.sort();
    let at = |share: f64| {
        let index = ((took.len() as f64 * share).ceil() as usize).clamp(1, took.len()) - 1;
        took.get(index).map(Duration::as_secs_f64).unwrap_or_default() * 1000.0
    };
    println!("{what:<34} {:>8.2} {:>8.2} {:>8.2} {:>8.2}", at(0.5), at(0.95), at(0.99), at(1.0));
}
