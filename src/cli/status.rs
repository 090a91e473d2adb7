//! `status`: health at a glance.

use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use crate::config::Config;
use crate::event::Timestamp;
use crate::health::{Health, HttpHealth, QueueHealth, Status, counted};
use crate::intake::spool::Spool;
use crate::queue::{QueueError, QueueStats};
use clap::Args;
use hyper::body::Bytes;
use serde_json::json;

use super::client::{self, ClientError};
use super::{Context, Exit, Failure, block_on, inspect_queue, written};

/// How long the watcher may take; it needs milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Health at a glance. Exit code 0: pass or warn, 1: fail, 3: not running
#[derive(Args)]
#[command(
    after_help = "Examples:\n  headspace-watcher status --json | jq .queue.pending\n  headspace-watcher status --watch 5"
)]
pub(super) struct StatusArguments {
    /// The object of GET /health
    #[arg(long)]
    json: bool,
    /// Show it again every so many seconds
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
          value_parser = clap::value_parser!(u32).range(1..=86_400))]
    watch: Option<u32>,
}

/// How things stand, as it is shown.
struct Standing {
    text: String,
    json: String,
    verdict: Result<Exit, Failure>,
}

pub(super) fn status(context: &Context, arguments: &StatusArguments) -> Result<Exit, Failure> {
    let Some(interval) = arguments.watch else {
        let Standing { text, json, verdict } = look(context)?;
        print!("{}", if arguments.json { json } else { text });
        return verdict;
    };
    watch(context, arguments.json, Duration::from_secs(interval.into()))
}

/// Shows it again and again until interrupted, or until nobody reads it any more.
fn watch(context: &Context, as_json: bool, interval: Duration) -> Result<Exit, Failure> {
    let mut out = io::stdout();
    let clears = out.is_terminal() && !as_json;
    loop {
        let Standing { text, json, verdict } = look(context)?;
        let mut shown = if as_json { json } else { text };
        if let (false, Err(failure)) = (as_json, verdict) {
            // What else goes to stderr at the end: what is wrong and what to do.
            shown.push_str(&format!("\n{}\n", failure.message));
        }
        if clears {
            // To the upper left, and clear the screen.
            shown.insert_str(0, "\x1b[H\x1b[2J");
        } else if !as_json {
            shown.push('\n');
        }
        match out.write_all(shown.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => std::thread::sleep(interval),
            failed => return written(failed),
        }
    }
}

/// The watcher's answer to `GET target`.
pub(super) async fn ask(socket: &Path, target: &str) -> Result<Bytes, ClientError> {
    let asking = async { client::body(client::get(socket, target).await?).await };
    let late = || ClientError::NoAnswer(format!("nothing within {} s", ANSWER_TIMEOUT.as_secs()));
    tokio::time::timeout(ANSWER_TIMEOUT, asking).await.unwrap_or_else(|_| Err(late()))
}

fn look(context: &Context) -> Result<Standing, Failure> {
    let config = context.config();
    let answer = block_on(ask(&config.http.socket, "/health"))?;
    let queue = || inspect_queue(config).map(|queue| queue.stats());
    Ok(match answer {
        Ok(body) => answered(&body)?,
        Err(ClientError::NoAnswer(problem)) => {
            let pid = if let Err(QueueError::InUse { pid, .. }) = queue() { pid } else { None };
            silent(config, &problem, pid)
        }
        Err(ClientError::NotRunning) => match queue() {
            Err(QueueError::InUse { pid, .. }) => {
                let problem =
                    "it holds the queue but does not listen: it is starting, ending, or uses another http.socket";
                silent(config, problem, pid)
            }
            queue => gone(config, queue),
        },
    })
}

/// The watcher has answered.
fn answered(body: &[u8]) -> Result<Standing, Failure> {
    let health: Health = serde_json::from_slice(body).map_err(|error| {
        Failure::new(Exit::Internal, format!("the watcher's answer is not understood: {error}; is it another version?"))
    })?;
    let exit = if health.status == Status::Fail { Exit::CheckFailed } else { Exit::Fine };
    let json = format!("{}\n", String::from_utf8_lossy(body));
    Ok(Standing { text: describe(&health), json, verdict: Ok(exit) })
}

/// There is a watcher, but it does not answer.
fn silent(config: &Config, problem: &str, pid: Option<u32>) -> Standing {
    let message = no_answer(&config.http.socket, problem, pid);
    let json = json!({"status": "fail", "running": true, "pid": pid, "ready": false, "reasons": [message]});
    Standing {
        text: "status    NO ANSWER\n".to_owned(),
        json: format!("{json}\n"),
        verdict: Err(Failure::new(Exit::CheckFailed, message)),
    }
}

/// Why the watcher on `socket` does not answer, and what to do.
pub(super) fn no_answer(socket: &Path, problem: &str, pid: Option<u32>) -> String {
    let process = pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
    // Of its folder, where that keeps others out.
    let owner = socket.ancestors().find_map(|path| path.metadata().ok()).map(|metadata| metadata.uid());
    let own = rustix::process::geteuid();
    let remedy = match owner {
        Some(owner) if !own.is_root() && owner != own.as_raw() => {
            format!("it belongs to user {owner}: run this as that user")
        }
        _ => "if it stays so, restart it".to_owned(),
    };
    format!("the watcher on {}{process} does not answer: {problem}; {remedy}", socket.display())
}

/// No watcher runs: what waits in its queue and its spool, or why that can't be read.
fn gone(config: &Config, queue: Result<QueueStats, QueueError>) -> Standing {
    let queue = queue.map(|stats| QueueHealth::of(&stats, Timestamp::now()));
    let folder = &config.queue.spool_path;
    let spooled = Spool::new(folder).waiting().map(|files| files.len());
    let spooled =
        spooled.map_err(|error| format!("{} can't be read; correct its owner or mode: {error}", folder.display()));
    let json = json!({
        "status": "fail", "running": false, "ready": false, "queue": queue.as_ref().ok(),
        "spool": {"waiting_files": spooled.as_ref().ok(), "last_error": spooled.as_ref().err()},
    });
    let spool = match spooled {
        Ok(0) => String::new(),
        Ok(files) => format!("spool     {} to be read\n", counted(files as u64, "file")),
        Err(problem) => format!("spool     {problem}\n"),
    };
    let problem = queue.as_ref().err().map_or_else(String::new, |error| format!("; {error}"));
    let queue = queue.map_or_else(|error| error.to_string(), |queue| queue_line(&queue));
    let message = format!(
        "no watcher listens on {}{problem}; start it with scripts/run-watcher.sh",
        config.http.socket.display()
    );
    Standing {
        text: format!("status    not running\nqueue     {queue}\n{spool}"),
        json: format!("{json}\n"),
        verdict: Err(Failure::new(Exit::NotRunning, message)),
    }
}

/// The lines of `status` about a running watcher.
pub(super) fn describe(health: &Health) -> String {
    let Health { writes, watcher, database, .. } = health;
    let status = match health.status {
        Status::Fail => "FAIL",
        status => status.as_str(),
    };
    let last_write = writes.last_write_timestamp.as_deref();
    let last_write = last_write.map_or_else(|| "none since start".to_owned(), |then| format!("last {} ago", age(then)));
    let (files, sessions) = (counted(watcher.files, "file"), counted(watcher.sessions, "session"));
    let lines = counted(watcher.lines, "line");
    let duplicates = counted(writes.duplicates, "duplicate");
    let mut told = vec![format!("status    {status}")];
    told.extend(health.reasons.iter().map(|reason| format!("          {reason}")));
    told.push(format!(
        "watcher   pid {}, up {}, version {}",
        health.pid,
        duration(health.uptime_seconds),
        health.version
    ));
    told.push(format!("captured  {files}, {sessions}, {lines} read, {} bad", watcher.bad_lines));
    told.push(format!("queue     {}", queue_line(&health.queue)));
    told.push(format!("database  {} for {}", database.state.as_str(), age(&database.since)));
    told.extend(database.last_error.iter().map(|error| format!("          {error}")));
    told.push(format!("writes    {} stored, {duplicates}, {} failed; {last_write}", writes.succeeded, writes.failed));
    told.push(format!("page      {}\n", page_line(health.http.as_ref())));
    told.join("\n")
}

/// Where the status page is, and the token that it asks for. Not while another process holds the port, which would be
/// given the token.
fn page_line(http: Option<&HttpHealth>) -> String {
    let Some(http) = http else { return "none: http.listen is null".to_owned() };
    if !http.listening {
        return format!("none: {} is taken by another process; set http.listen to a free port", http.address);
    }
    let mut url = format!("http://{}/", http.address);
    if let Ok(address) = http.address.parse::<SocketAddr>()
        && address.ip().is_unspecified()
    {
        url = format!("http://localhost:{}/", address.port());
    }
    match (&http.token_error, &http.token_file) {
        (Some(error), _) => format!("{url} (numbers only: {error})"),
        (None, Some(file)) => format!("{url} (its token: {file})"),
        (None, None) => format!("{url} (its token: http.token of the configuration)"),
    }
}

fn queue_line(queue: &QueueHealth) -> String {
    let QueueHealth { pending, dead_letters, oldest_age_seconds, .. } = queue;
    let oldest = oldest_age_seconds.map_or_else(String::new, |age| format!(", oldest {}", duration(age as u64)));
    let letters = counted(*dead_letters, "dead letter");
    format!(
        "{pending} pending ({}){oldest}; {letters}; {} on disk",
        bytes(queue.pending_bytes),
        bytes(queue.disk_bytes)
    )
}

/// How long ago a time of the watcher's answer was, or that time where it can't be read.
fn age(then: &str) -> String {
    let seconds = |then: Timestamp| Timestamp::now().duration_since(then).as_secs().max(0);
    then.parse().map_or_else(|_| then.to_owned(), |then| duration(seconds(then).unsigned_abs()))
}

/// `90061` → `1d 1h`, `75` → `1m 15s`.
pub(super) fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// `1536` → `1.5 kB`, decimal units.
pub(super) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short_and_never_negative() {
        let now = Timestamp::now();
        assert_eq!(age(&(now - jiff::SignedDuration::from_secs(75)).to_string()), "1m 15s");
        assert_eq!(age(&(now + jiff::SignedDuration::from_secs(75)).to_string()), "0s");
        assert_eq!(age("once"), "once");
    }

    #[test]
    fn durations_and_sizes_are_short() {
        assert_eq!(duration(59), "59s");
        assert_eq!(duration(75), "1m 15s");
        assert_eq!(duration(7260), "2h 1m");
        assert_eq!(duration(90_061), "1d 1h");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1536), "1.5 kB");
        assert_eq!(bytes(2_500_000_000_000), "2.5 TB");
    }
}
