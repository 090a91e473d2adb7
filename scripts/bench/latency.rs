//! From a line appended to a transcript to its row being visible.
//!
//! The watcher runs with `database.notify_channel`; a notification comes with the commit, so its arrival is visibility.
//! Beside it: one synchronous INSERT by a client that does nothing else, which is the floor for anything durable, one after
//! another and one a second, as a processor that was idle has to be woken for each step; and write + fdatasync of a line to
//! a plain file.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio_postgres::{AsyncMessage, Client, NoTls};

use crate::queue::plain_writes;
use crate::rows::{Aim, quantile, quantiles};
use crate::stage::{Bench, PATIENCE, Scene, Transcript};

pub fn measure(bench: &mut Bench) -> Result<()> {
    let counts = bench.choose([(1, 20), (100, 1000), (1000, 5000)], [(1, 3), (100, 200), (1000, 1000)]);
    let [(_, slow), ..] = counts;
    let database = bench.server.database()?;
    let mut scene = Scene::new(bench, "latency")?;
    scene.set("database.notify_channel", "bench")?;
    let floor = bench.choose(500, 100);
    let disk = plain_writes(&scene.projects(), 900, floor)?;
    bench.rows.add(
        "latency.disk",
        "write + fdatasync of a line",
        quantile(&disk, 0.5),
        "ms",
        &quantiles(&disk),
        Aim::None,
    )?;
    let mut watcher = scene.start(&database.url, &[])?;
    watcher.wait_until_ready()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut transcript = Transcript::create(&scene.projects(), 1)?;
    let measured = runtime.block_on(async {
        let inserts = plain_inserts(&database.url, floor, slow).await?;
        let (client, mut notices) = listen(&database.url).await?;
        client.batch_execute("LISTEN bench").await?;
        // The first row also waits for the tables and the connection. The session's registration comes with it.
        one_by_one(&mut transcript, &mut notices, 10, 10, 1).await?;
        let mut measured = Vec::new();
        for (rate, lines) in counts {
            measured.push((rate, one_by_one(&mut transcript, &mut notices, lines, rate, 0).await?));
        }
        anyhow::Ok((inserts, measured))
    })?;
    let ((insert, insert_1), measured) = measured;
    let what = "one synchronous INSERT, nothing else";
    bench.rows.add("latency.insert", what, quantile(&insert, 0.5), "ms", &quantiles(&insert), Aim::None)?;
    let what = "the same, one a second";
    bench.rows.add("latency.insert_1", what, quantile(&insert_1, 0.5), "ms", &quantiles(&insert_1), Aim::None)?;
    for (rate, took) in measured {
        let what = format!("line to row, {rate} lines/s: p50");
        let (aim_50, aim_99) = if rate <= 100 { (Aim::Most(1.5), Aim::Most(5.0)) } else { (Aim::None, Aim::None) };
        bench.rows.add(&format!("latency.p50_{rate}"), &what, quantile(&took, 0.5), "ms", &quantiles(&took), aim_50)?;
        let what = format!("line to row, {rate} lines/s: p99");
        bench.rows.add(&format!("latency.p99_{rate}"), &what, quantile(&took, 0.99), "ms", "", aim_99)?;
    }
    bench.rows.add("latency.memory", "memory meanwhile", watcher.usage().peak_mb(), "MB", "peak", Aim::Most(32.0))?;
    watcher.stop()?;
    bench.server.drop(database)
}

/// A connection whose notifications arrive with their time.
pub async fn listen(url: &str) -> Result<(Client, mpsc::UnboundedReceiver<Instant>)> {
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

/// Appends lines at a rate; rows come in the order of lines, so the n-th notice is the n-th line's, after `beside` others.
pub async fn one_by_one(
    transcript: &mut Transcript,
    notices: &mut mpsc::UnboundedReceiver<Instant>,
    lines: usize,
    rate: u32,
    mut beside: u32,
) -> Result<Vec<Duration>> {
    let mut sent: VecDeque<Instant> = VecDeque::new();
    let mut took = Vec::new();
    let mut written = 0;
    let mut pace = tokio::time::interval(Duration::from_secs_f64(1.0 / f64::from(rate)));
    while took.len() < lines {
        tokio::select! {
            biased;
            notice = notices.recv() => {
                let notice = notice.context("the connection has ended")?;
                if beside > 0 {
                    beside -= 1;
                    continue;
                }
                took.push(notice - sent.pop_front().context("a row that nobody wrote")?);
            }
            _ = pace.tick(), if written < lines => {
                sent.push_back(Instant::now());
                transcript.say(1)?;
                written += 1;
            }
            () = tokio::time::sleep(PATIENCE) => bail!("no row within {PATIENCE:?}"),
        }
    }
    Ok(took)
}

/// How long an INSERT takes: `count` one after another, then `slow` of them a second apart.
async fn plain_inserts(url: &str, count: u64, slow: usize) -> Result<(Vec<Duration>, Vec<Duration>)> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    client.batch_execute("CREATE TABLE bench_plain (id serial PRIMARY KEY, payload text)").await?;
    let statement = client.prepare("INSERT INTO bench_plain (payload) VALUES ($1)").await?;
    let payload = "x".repeat(900);
    let insert = async || {
        let begun = Instant::now();
        client.execute(&statement, &[&payload]).await?;
        anyhow::Ok(begun.elapsed())
    };
    let (mut took, mut took_slow) = (Vec::new(), Vec::new());
    for _ in 0..count {
        took.push(insert().await?);
    }
    for _ in 0..slow {
        tokio::time::sleep(Duration::from_secs(1)).await;
        took_slow.push(insert().await?);
    }
    Ok((took, took_slow))
}
