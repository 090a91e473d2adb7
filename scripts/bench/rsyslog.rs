//! rsyslog doing the same job: imfile, a disk queue, ompgsql; the same file, a table with the same indexes.
//!
//! It keeps no receipts, so a line may be stored twice or not at all after a crash, and it stores the whole line as the
//! payload, which is as long as an event's is.

use std::fmt::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::rows::Aim;
use crate::stage::{Bench, Database, Transcript};

/// The ways it is measured in: key, words, lines of one transaction, and the server's synchronous_commit.
const WAYS: [(&str, &str, Option<u32>, &str); 3] = [
    ("rsyslog.batches", "in batches of its default size", None, "on"),
    ("rsyslog.single", "one transaction a line", Some(1), "on"),
    ("rsyslog.relaxed", "one transaction a line, synchronous_commit off", Some(1), "off"),
];

pub fn measure(bench: &mut Bench) -> Result<()> {
    if let Err(why) = &bench.rsyslog {
        let why = why.clone();
        return WAYS.iter().try_for_each(|(key, what, _, _)| bench.rows.skip(key, &format!("rsyslog, {what}"), &why));
    }
    let folder = bench.make_folder("rsyslog")?;
    let turns = bench.choose(200_000, 20_000);
    let mut transcript = Transcript::create(&folder, 1)?;
    transcript.say(turns)?;
    let (mut rates, mut shown) = (Vec::new(), String::new());
    for (key, what, lines, synchronous_commit) in WAYS {
        let database = bench.server.database()?;
        database.migrate()?;
        database
            .execute(&format!("ALTER DATABASE {} SET synchronous_commit = {synchronous_commit}", database.name()?))?;
        let (rows, took) = run(bench, &transcript, &database, lines)?;
        rates.push((key, what, rows as f64 / took.as_secs_f64(), rows));
        bench.server.drop(database)?;
    }
    for (key, what, rate, rows) in rates {
        shown.clear();
        let all = if rows == turns { "all" } else { "time was up after" };
        write!(shown, "imfile, disk queue, ompgsql; {all} {rows} lines")?;
        bench.rows.add(key, &format!("rsyslog, {what}"), rate, "rows/s", &shown, Aim::None)?;
    }
    Ok(std::fs::remove_dir_all(folder)?)
}

/// Rows stored until all are or the time is up, and how long that took since its start.
fn run(bench: &Bench, transcript: &Transcript, database: &Database, batch: Option<u32>) -> Result<(u64, Duration)> {
    let Ok(root) = &bench.rsyslog else { bail!("there is no rsyslog") };
    let folder = bench.make_folder("rsyslog/run")?;
    let batch = batch.map(|lines| format!("queue.dequeueBatchSize=\"{lines}\"")).unwrap_or_default();
    let configuration = format!(
        "global(workDirectory=\"{work}\" maxMessageSize=\"64k\")\n\
         module(load=\"imfile\")\n\
         module(load=\"ompgsql\")\n\
         template(name=\"row\" type=\"string\" option.stdsql=\"on\" string=\"INSERT INTO events (\\\"timestamp\\\", event_type, \
         payload) VALUES (now(), 'turn_detected', '%msg%'::jsonb)\")\n\
         input(type=\"imfile\" File=\"{file}\" Tag=\"turn\" ruleset=\"store\")\n\
         ruleset(name=\"store\") {{\n  action(type=\"ompgsql\" conninfo=\"{url}\" template=\"row\" \
         queue.type=\"Disk\" queue.filename=\"turns\" {batch} action.resumeRetryCount=\"-1\")\n}}\n",
        url = database.url,
        work = folder.display(),
        file = transcript.path.display(),
    );
    let path = folder.join("rsyslog.conf");
    std::fs::write(&path, configuration)?;
    let log = std::fs::File::create(folder.join("log"))?;
    // Unpacked beside the system or part of it: what it loads is found by its folder.
    let libraries: Vec<_> = std::fs::read_dir(root.join("usr/lib"))?.flatten().map(|entry| entry.path()).collect();
    let modules = libraries.iter().map(|path| path.join("rsyslog")).find(|path| path.join("ompgsql.so").exists());
    let Some(modules) = modules else { bail!("no ompgsql.so below {}", root.display()) };
    let mut command = Command::new(root.join("usr/sbin/rsyslogd"));
    if let Some(libraries) = modules.parent().filter(|_| root.as_os_str() != "/") {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    let begun = Instant::now();
    let mut child = command
        .args(["-n", "-f"])
        .arg(&path)
        .arg("-i")
        .arg(folder.join("pid"))
        .arg("-M")
        .arg(&modules)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    bench.note(&child)?;
    let deadline = begun + Duration::from_secs(bench.choose(8, 2));
    let turns = transcript.turns();
    let result = loop {
        let rows: u64 = database.value("SELECT coalesce(max(id), 0) FROM events")?.parse()?;
        if rows >= turns || Instant::now() > deadline {
            break Ok((rows, begun.elapsed()));
        }
        if let Some(status) = child.try_wait()? {
            break Err(status);
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let _ = child.kill();
    let _ = child.wait();
    let said = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
    match result {
        Ok((rows, took)) => {
            ensure!(rows > 0, "rsyslog stored nothing: {said}");
            Ok((rows, took))
        }
        Err(status) => bail!("rsyslog has ended, {status}: {said}"),
    }
}
