//! Health: one answer made of what the layers know, the same for `status`, `GET /health` and the supervisor.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::event::Timestamp;
use crate::queue::Queue;
use crate::telemetry::{Database, Metrics};

/// With the database up, the oldest event may wait this long before something is wrong.
const STALLED_AFTER: Duration = Duration::from_secs(60);

/// `GET /health` and `status --json`. Readers ignore fields that they do not know.
#[derive(Serialize, Deserialize, Debug)]
pub struct Health {
    pub status: Status,
    pub running: bool,
    pub pid: u32,
    pub version: String,
    pub started_at: String,
    pub uptime_seconds: u64,
    pub ready: bool,
    /// Why the status is not `pass`, in words for people.
    pub reasons: Vec<String>,
    pub queue: QueueHealth,
    pub database: DatabaseHealth,
    pub writes: WritesHealth,
    pub watcher: WatcherHealth,
}

#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Pass,
    /// Works, but something is not as it should be: the database is away, dead letters wait.
    Warn,
    /// Events can't be taken in, or wait although the database is up.
    Fail,
}

#[derive(Serialize, Deserialize, Debug)]
pub struct QueueHealth {
    pub pending: u64,
    pub pending_bytes: u64,
    pub oldest_age_seconds: Option<f64>,
    pub dead_letters: u64,
    pub disk_bytes: u64,
    pub full: bool,
}

#[derive(Serialize, Deserialize, Debug)]
pub struct DatabaseHealth {
    pub state: String,
    pub since: String,
    pub last_error: Option<String>,
}

#[derive(Serialize, Deserialize, Debug)]
pub struct WritesHealth {
    pub succeeded: u64,
    pub failed: u64,
    pub duplicates: u64,
    pub last_write_timestamp: Option<String>,
}

#[derive(Serialize, Deserialize, Debug)]
pub struct WatcherHealth {
    pub files: u64,
    pub sessions: u64,
    pub lines: u64,
    pub bad_lines: u64,
    pub last_rescan: Option<String>,
}

/// What health is made of.
pub struct HealthSource {
    pub queue: Queue,
    pub metrics: Arc<Metrics>,
    pub started_at: Timestamp,
    pub started: Instant,
    /// Whole time between two rescans: a rescan that is long overdue is a failure.
    pub polling_interval: Duration,
}

impl HealthSource {
    pub fn health(&self, now: Timestamp) -> Health {
        let stats = self.queue.stats();
        let database = self.metrics.database();
        let oldest_age = stats.oldest.map(|(_, captured_at)| age(captured_at, now));
        let mut status = Status::Pass;
        let mut reasons = Vec::new();
        let mut note = |at_least: Status, reason: String| {
            status = status.max(at_least);
            reasons.push(reason);
        };
        if let Some(error) = self.queue.failed().borrow().as_ref() {
            note(Status::Fail, format!("the queue can't be written: {error}"));
        }
        if stats.full {
            note(
                Status::Fail,
                "the queue is full: raise queue.max_pending_bytes or bring the database back".to_owned(),
            );
        }
        match database.state {
            Database::Up => {
                if oldest_age.is_some_and(|age| age > STALLED_AFTER) {
                    note(Status::Fail, "the oldest event waits although the database is up".to_owned());
                }
            }
            Database::Down => note(Status::Warn, "the database is away; events wait in the queue".to_owned()),
            Database::Misconfigured => {
                note(
                    Status::Warn,
                    "the database can't be used until someone mends this; events wait in the queue".to_owned(),
                );
            }
            Database::Unconfigured => {
                note(Status::Warn, "no database is configured; set database.url or DATABASE_URL".to_owned());
            }
        }
        if stats.dead_letters > 0 {
            note(
                Status::Warn,
                format!("{} dead letters; see \"headspace-watcher queue-dump --dead-letters\"", stats.dead_letters),
            );
        }
        Health {
            status,
            running: true,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: self.started_at.to_string(),
            uptime_seconds: self.started.elapsed().as_secs(),
            ready: self.ready(),
            reasons,
            queue: QueueHealth {
                pending: stats.pending,
                pending_bytes: stats.pending_bytes,
                oldest_age_seconds: oldest_age.map(|age| age.as_secs_f64()),
                dead_letters: stats.dead_letters,
                disk_bytes: stats.disk_bytes,
                full: stats.full,
            },
            database: DatabaseHealth {
                state: database.state.as_str().to_owned(),
                since: database.since.to_string(),
                last_error: database.last_error,
            },
            writes: WritesHealth {
                succeeded: self.metrics.events_delivered.get(),
                failed: self.metrics.write_failures.get(),
                duplicates: self.metrics.events_duplicate.get(),
                last_write_timestamp: self.metrics.last_write().map(|at| at.to_string()),
            },
            watcher: WatcherHealth {
                files: self.metrics.files_watched.get(),
                sessions: self.metrics.sessions_known.get(),
                lines: self.metrics.lines_read.get(),
                bad_lines: self.metrics.bad_lines.get(),
                last_rescan: self.metrics.last_rescan().map(|at| at.to_string()),
            },
        }
    }

    /// Whether events are taken in.
    pub fn ready(&self) -> bool {
        self.queue.failed().borrow().is_none() && !self.queue.stats().full
    }
}

/// Time from `then` to `now`; zero where the clock went back.
fn age(then: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or_default()
}
