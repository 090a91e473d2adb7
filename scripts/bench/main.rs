//! What scripts/bench.sh runs: each part measures one thing beside what it is to be compared with, in the same run.
//!
//! ```text
//! bench --server DIR --folder DIR [--quick] [--rows FILE] [--published FILE]
//!       [--rsyslog ROOT | --no-rsyslog WHY] PART...
//! ```
//!
//! DIR is a server's folder as scripts/dev-postgres.sh has it, and a folder on the disk that is measured. The rows go to
//! FILE as well (see `rows`).

mod backfill;
mod capture;
mod drain;
mod hook;
mod idle;
mod latency;
mod outage;
mod queue;
mod restart;
mod rows;
mod rsyslog;
mod stage;
mod unnotified;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use self::rows::Rows;
use self::stage::{Bench, Server};

type Part = fn(&mut Bench) -> Result<()>;

/// What is measured, in this order, and how it is called in the table.
const PARTS: [(&str, &str, Part); 12] = [
    ("queue", "The queue beside the disk it is on", queue::measure),
    ("drain", "The drainer beside the database it writes to", drain::measure),
    ("ratio", "What CI checks", drain::ratio),
    ("backfill", "From file to Postgres, all there at the start", backfill::measure),
    ("rsyslog", "rsyslog, same file, same table", rsyslog::measure),
    ("latency", "From a line's end to its row", latency::measure),
    ("unnotified", "Without notifications", unnotified::measure),
    ("outage", "After an outage", outage::measure),
    ("restart", "After kill -9", restart::measure),
    ("capture", "A backlog: captured with Postgres away, then drained", capture::measure),
    ("idle", "Nothing happens", idle::measure),
    ("hook", "Claude Code's hook", hook::measure),
];

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (mut server, mut folder, mut rows, mut quick, mut published) = (None, None, None, false, None);
    let mut rsyslog = Err("it was not asked for".to_owned());
    let mut parts = Vec::new();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--server" => server = Some(PathBuf::from(value()?)),
            "--folder" => folder = Some(PathBuf::from(value()?)),
            "--rows" => rows = Some(PathBuf::from(value()?)),
            "--rsyslog" => rsyslog = Ok(PathBuf::from(value()?)),
            "--no-rsyslog" => rsyslog = Err(value()?),
            "--published" => published = Some(PathBuf::from(value()?)),
            "--quick" => quick = true,
            // So that what a measurement holds in memory is not counted for another.
            "open" => return queue::opened(Path::new(&value()?)),
            _ => parts.push(argument),
        }
    }
    let server = Server::at(&server.context("--server is missing")?)?;
    let folder = folder.context("--folder is missing")?.canonicalize()?;
    let mut bench = Bench { quick, folder, server, rows: Rows::to(rows.as_deref())?, published, rsyslog };
    let mut failed = Vec::new();
    for part in parts {
        let Some((_, title, measure)) = PARTS.iter().find(|(name, _, _)| *name == part) else {
            bail!("no part {part}; there are: {}", PARTS.map(|(name, _, _)| name).join(", "));
        };
        let begun = Instant::now();
        bench.rows.title(&part, title)?;
        if let Err(error) = measure(&mut bench) {
            // The others need not do without the server for it.
            let _ = bench.server.pause(false);
            bench.server.start()?;
            eprintln!("{part}: failed: {error:#}");
            failed.push(part);
            continue;
        }
        eprintln!("{part}: {:.0} s", begun.elapsed().as_secs_f64());
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}
