//! `status`: health at a glance.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use crate::event::Timestamp;
use crate::health::{Health, HttpHealth, Status};
use crate::intake::spool::Spool;
use crate::queue::{QueueError, QueueStats};
use serde_json::json;

use super::client::{self, ClientError};
use super::{Context, Exit, Failure, StatusArguments, block_on, inspect_queue, written};

/// How long the watcher may take; it needs milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// How things stand.
enum Standing {
    /// The watcher has answered, and this is what it said.
    Answered { health: Box<Health>, json: String },
    /// There is a watcher, but it does not answer.
    Silent { problem: String, pid: Option<u32> },
    /// There is none. What waits in its queue, or why that can't be said, and files that wait in its spool.
    Gone { queue: Result<QueueStats, QueueError>, spooled: Result<usize, String> },
}

pub fn status(context: &Context, arguments: &StatusArguments) -> Result<Exit, Failure> {
    let socket = &context.config().http.socket;
    let Some(interval) = arguments.watch else {
        let standing = look(context)?;
        print!("{}", standing.shown(arguments.json, socket));
        return standing.verdict(socket);
    };
    watch(context, arguments.json, Duration::from_secs(interval.into()))
}

/// Shows it again and again until interrupted, or until nobody reads it any more.
fn watch(context: &Context, json: bool, interval: Duration) -> Result<Exit, Failure> {
    let mut out = io::stdout();
    let clears = out.is_terminal() && !json;
    loop {
        let standing = look(context)?;
        let socket = &context.config().http.socket;
        let mut text = standing.shown(json, socket);
        if let (false, Err(failure)) = (json, standing.verdict(socket)) {
            // What else goes to stderr at the end: what is wrong and what to do.
            let _ = writeln!(text, "\n{}", failure.message);
        }
        if clears {
            // To the upper left, and away with what stands there.
            text.insert_str(0, "\x1b[H\x1b[2J");
        } else if !json {
            text.push('\n');
        }
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => std::thread::sleep(interval),
            failed => return written(failed),
        }
    }
}

fn look(context: &Context) -> Result<Standing, Failure> {
    let asking = async { client::body(client::get(&context.config().http.socket, "/health").await?).await };
    let no_answer = || ClientError::NoAnswer(format!("nothing within {} s", ANSWER_TIMEOUT.as_secs()));
    let answer =
        block_on(async { tokio::time::timeout(ANSWER_TIMEOUT, asking).await.unwrap_or_else(|_| Err(no_answer())) })?;
    let body = match answer {
        Ok(body) => body,
        Err(ClientError::NoAnswer(problem)) => {
            let pid = match inspect(context) {
                Err(QueueError::InUse { pid, .. }) => pid,
                _ => None,
            };
            return Ok(Standing::Silent { problem, pid });
        }
        Err(ClientError::NotRunning) => {
            return Ok(match inspect(context) {
                Err(QueueError::InUse { pid, .. }) => {
                    let problem =
                        "it holds the queue but does not listen: it is starting, ending, or uses another http.socket";
                    Standing::Silent { problem: problem.to_owned(), pid }
                }
                queue => Standing::Gone { queue, spooled: spooled(&context.config().queue.spool_path) },
            });
        }
    };
    let health = serde_json::from_slice(&body).map_err(|error| {
        Failure::new(Exit::Internal, format!("the watcher's answer is not understood: {error}; is it another version?"))
    })?;
    Ok(Standing::Answered { health, json: String::from_utf8_lossy(&body).into_owned() })
}

/// Files that wait in the spool, or why that can't be said.
fn spooled(folder: &Path) -> Result<usize, String> {
    Spool::new(folder)
        .waiting()
        .map(|files| files.len())
        .map_err(|error| format!("{} can't be read; correct its owner or mode: {error}", folder.display()))
}

/// The queue that nobody holds, in numbers.
fn inspect(context: &Context) -> Result<QueueStats, QueueError> {
    inspect_queue(context.config()).map(|queue| queue.stats())
}

impl Standing {
    fn shown(&self, json: bool, socket: &Path) -> String {
        match (self, json) {
            (Standing::Answered { json, .. }, true) => format!("{json}\n"),
            (Standing::Answered { health, .. }, false) => describe(health),
            (Standing::Silent { pid, .. }, true) => {
                let said = self.verdict(socket).err().map(|failure| failure.message);
                format!(
                    "{}\n",
                    json!({"status": "fail", "running": true, "pid": pid, "ready": false, "reasons": [said]})
                )
            }
            (Standing::Silent { .. }, false) => "status    NO ANSWER\n".to_owned(),
            (Standing::Gone { queue, spooled }, true) => {
                let queue = match queue {
                    Ok(stats) => json!({
                        "pending": stats.pending,
                        "pending_bytes": stats.pending_bytes,
                        "oldest_age_seconds": stats.oldest.map(|(_, since)| seconds_since(since)),
                        "dead_letters": stats.dead_letters,
                        "disk_bytes": stats.disk_bytes,
                        "full": stats.full,
                    }),
                    Err(_) => json!(null),
                };
                format!(
                    "{}\n",
                    json!({"status": "fail", "running": false, "ready": false, "queue": queue,
                    "spool": {"waiting_files": spooled.as_ref().ok(), "last_error": spooled.as_ref().err()}})
                )
            }
            (Standing::Gone { queue, spooled }, false) => {
                let queue = match queue {
                    Ok(stats) => queue_line(
                        stats.pending,
                        stats.pending_bytes,
                        stats.oldest.map(|(_, since)| seconds_since(since)),
                        stats.dead_letters,
                        stats.disk_bytes,
                    ),
                    Err(error) => error.to_string(),
                };
                let spool = match spooled {
                    Ok(0) => String::new(),
                    Ok(1) => "spool     1 file waits\n".to_owned(),
                    Ok(files) => format!("spool     {files} files wait\n"),
                    Err(problem) => format!("spool     {problem}\n"),
                };
                format!("status    not running\nqueue     {queue}\n{spool}")
            }
        }
    }

    fn verdict(&self, socket: &Path) -> Result<Exit, Failure> {
        let shown = socket.display();
        match self {
            Standing::Answered { health, .. } if health.status == Status::Fail => Ok(Exit::CheckFailed),
            Standing::Answered { .. } => Ok(Exit::Fine),
            Standing::Silent { problem, pid } => {
                let who = pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
                let message =
                    format!("the watcher on {shown}{who} does not answer: {problem}; if it stays so, restart it");
                Err(Failure::new(Exit::CheckFailed, message))
            }
            Standing::Gone { queue, .. } => {
                let waits = match queue {
                    Ok(_) => String::new(),
                    Err(error) => format!("; {error}"),
                };
                let message = format!("no watcher listens on {shown}{waits}; start it with scripts/run-watcher.sh");
                Err(Failure::new(Exit::NotRunning, message))
            }
        }
    }
}

fn seconds_since(then: Timestamp) -> f64 {
    Timestamp::now().duration_since(then).as_secs_f64().max(0.0)
}

fn describe(health: &Health) -> String {
    let status = match health.status {
        Status::Pass => "pass",
        Status::Warn => "warn",
        Status::Fail => "FAIL",
    };
    let mut text = String::new();
    let last_write = health.writes.last_write_timestamp.as_deref();
    let last_write = last_write.map_or_else(|| "never since start".to_owned(), |then| format!("{} ago", age(then)));
    // Writing to a String can't fail.
    let _ = writeln!(text, "status    {status}");
    for reason in &health.reasons {
        let _ = writeln!(text, "          {reason}");
    }
    let _ = writeln!(
        text,
        "watcher   pid {}, up {}, version {}",
        health.pid,
        duration(health.uptime_seconds),
        health.version
    );
    let _ = writeln!(
        text,
        "captured  {} files, {} sessions, {} lines read, {} bad",
        health.watcher.files, health.watcher.sessions, health.watcher.lines, health.watcher.bad_lines
    );
    let queue = &health.queue;
    let waits =
        queue_line(queue.pending, queue.pending_bytes, queue.oldest_age_seconds, queue.dead_letters, queue.disk_bytes);
    let _ = writeln!(text, "queue     {waits}");
    let _ = writeln!(text, "database  {} for {}", health.database.state, age(&health.database.since));
    if let Some(error) = &health.database.last_error {
        let _ = writeln!(text, "          {error}");
    }
    let _ = writeln!(
        text,
        "writes    {} stored, {} already there, {} failed; last {last_write}",
        health.writes.succeeded, health.writes.duplicates, health.writes.failed
    );
    let _ = writeln!(text, "page      {}", page_line(health.http.as_ref()));
    text
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

fn queue_line(pending: u64, pending_bytes: u64, oldest_age: Option<f64>, dead_letters: u64, disk_bytes: u64) -> String {
    let oldest = oldest_age.map_or_else(String::new, |age| format!(", oldest {}", duration(age as u64)));
    let letters = if dead_letters == 1 { "dead letter" } else { "dead letters" };
    format!(
        "{pending} pending ({}){oldest}; {dead_letters} {letters}; {} on disk",
        bytes(pending_bytes),
        bytes(disk_bytes)
    )
}

/// How long ago a time of the watcher's answer was, or that time where it can't be read.
fn age(then: &str) -> String {
    then.parse().map_or_else(|_| then.to_owned(), |then| duration(seconds_since(then) as u64))
}

/// `90061` → `1d 1h`, `75` → `1m 15s`.
pub fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// `1536` → `1.5 kB`, decimal units.
pub fn bytes(count: u64) -> String {
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
