//! `status`: health at a glance.

use std::fmt::Write as _;

use headspace_watcher::health::{Health, Status};

use super::client::{self, ClientError};
use super::{Context, Exit, Failure, StatusArguments, block_on};

pub fn status(context: &Context, arguments: &StatusArguments) -> Result<Exit, Failure> {
    let socket = &context.config().http.socket;
    let answer = block_on(async { client::body(client::get(socket, "/health").await?).await })?;
    let body = match answer {
        Ok(body) => body,
        Err(ClientError::NotRunning) => {
            if arguments.json {
                println!("{}", serde_json::json!({"status": "fail", "running": false}));
            }
            let message = format!("no watcher listens on {}; start it with scripts/run-watcher.sh", socket.display());
            return Err(Failure::new(Exit::NotRunning, message));
        }
        Err(ClientError::NoAnswer(problem)) => {
            let message =
                format!("the watcher on {} does not answer: {problem}; if it stays so, restart it", socket.display());
            return Err(Failure::new(Exit::CheckFailed, message));
        }
    };
    let health: Health = serde_json::from_slice(&body).map_err(|error| {
        Failure::new(Exit::Internal, format!("the watcher's answer is not understood: {error}; is it another version?"))
    })?;
    if arguments.json {
        println!("{}", String::from_utf8_lossy(&body));
    } else {
        print!("{}", describe(&health));
    }
    Ok(if health.status == Status::Fail { Exit::CheckFailed } else { Exit::Fine })
}

fn describe(health: &Health) -> String {
    let status = match health.status {
        Status::Pass => "pass",
        Status::Warn => "warn",
        Status::Fail => "FAIL",
    };
    let mut text = String::new();
    let oldest = match health.queue.oldest_age_seconds {
        Some(age) => format!(", the oldest for {}", duration(age as u64)),
        None => String::new(),
    };
    let last_write = health.writes.last_write_timestamp.as_deref().unwrap_or("never since start");
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
    let _ = writeln!(
        text,
        "queue     {} pending ({}){oldest}; {} dead letters; {} on disk",
        health.queue.pending,
        bytes(health.queue.pending_bytes),
        health.queue.dead_letters,
        bytes(health.queue.disk_bytes)
    );
    let _ = writeln!(text, "database  {} since {}", health.database.state, health.database.since);
    if let Some(error) = &health.database.last_error {
        let _ = writeln!(text, "          {error}");
    }
    let _ = writeln!(
        text,
        "writes    {} stored, {} already there, {} failed; last {last_write}",
        health.writes.succeeded, health.writes.duplicates, health.writes.failed
    );
    text
}

/// `90061` → `1d 1h`, `75` → `1m 15s`.
fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// `1536` → `1.5 kB`, decimal units.
fn bytes(count: u64) -> String {
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
