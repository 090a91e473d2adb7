//! Health: one answer made of what the layers know, the same for `status`, `GET /health` and systemd's watchdog.
//!
//! ```text
//! fail   events can't be taken in: the queue failed or is full, or the thread that reads transcripts hangs
//!        or they don't leave: the database is up and nothing moves, or the drainer hangs
//! warn   it works, but someone should look: database away, misconfigured or not configured, dead letters, queue filling
//! pass   else
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::claude::retention::WARN_DAYS;
use crate::event::Timestamp;
use crate::intake::spool::{Spool, UnreadSpool};
use crate::queue::{Queue, QueueError, QueueStats};
use crate::telemetry::{Database, DatabaseState, Metrics, UnknownFormat};

/// With the database up and something waiting, so much time without anything leaving the queue is a stall.
pub const STALLED_AFTER: Duration = Duration::from_secs(30);

/// Silence of a part, on top of the longest wait that it is allowed, after which it is taken to hang.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Share of the queue's limit from which on it is said that it fills.
const FILLING_PERCENT: u64 = 80;

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
    #[serde(default)]
    pub spool: SpoolHealth,
    /// The listener on TCP; null where it is off, and for callers without the token.
    #[serde(default)]
    pub http: Option<HttpHealth>,
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

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Pass => "pass",
            Status::Warn => "warn",
            Status::Fail => "fail",
        }
    }
}

#[derive(Serialize, Deserialize, Debug)]
pub struct QueueHealth {
    pub pending: u64,
    pub pending_bytes: u64,
    pub oldest_age_seconds: Option<f64>,
    pub dead_letters: u64,
    /// Events that were missing when the queue was opened, because its files were damaged.
    #[serde(default)]
    pub missing: u64,
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
    /// Transcripts that Claude Code is about to delete and that are not wholly stored.
    #[serde(default)]
    pub transcripts_expiring: u64,
    /// What transcripts had since the start that this version does not know.
    #[serde(default)]
    pub unknown_formats: Vec<UnknownFormat>,
    pub last_rescan: Option<String>,
}

/// What hooks and other commands have left and the watcher could not read at its last look.
#[derive(Serialize, Deserialize, Clone, Default, Debug)]
pub struct SpoolHealth {
    pub unread_files: u64,
    /// Whether the folder itself can't be read.
    pub folder_unread: bool,
    /// Path and cause, of the first file or of the folder.
    pub last_error: Option<String>,
}

#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct HttpHealth {
    /// Address and port: the configured ones until it listens, then those it listens on.
    pub address: String,
    /// False while another process holds the port.
    pub listening: bool,
    /// The file with the generated token; null where `http.token` is configured, or the file is not used.
    pub token_file: Option<String>,
    /// Why there is no token, so that nobody is let in by one.
    pub token_error: Option<String>,
}

/// A moment on both clocks: the one of the world, and the one that never jumps.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub time: Timestamp,
    pub clock: Instant,
}

impl Moment {
    pub fn now() -> Moment {
        Moment { time: Timestamp::now(), clock: Instant::now() }
    }
}

/// What health is made of.
pub struct HealthSource {
    pub queue: Queue,
    pub spool: Spool,
    pub metrics: Arc<Metrics>,
    pub started: Moment,
    /// `queue.max_pending_bytes`.
    pub pending_bytes_max: u64,
    /// Whole time between two rescans.
    pub polling_interval: Duration,
    /// The longest that a delivery and the pause after it may take.
    pub delivery_max: Duration,
    /// The listener on TCP; `None`: off.
    pub http: watch::Receiver<Option<HttpHealth>>,
}

impl HealthSource {
    pub fn health(&self, now: Moment) -> Health {
        let facts = self.facts(now);
        let troubles = facts.troubles();
        let Facts { stats, database, oldest_age, unread_spool, .. } = facts;
        Health {
            status: troubles.iter().map(Trouble::status).max().unwrap_or(Status::Pass),
            running: true,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: self.started.time.to_string(),
            uptime_seconds: now.clock.saturating_duration_since(self.started.clock).as_secs(),
            ready: self.ready(),
            reasons: troubles.iter().map(Trouble::to_string).collect(),
            queue: QueueHealth {
                pending: stats.pending,
                pending_bytes: stats.pending_bytes,
                oldest_age_seconds: oldest_age.map(|age| age.as_secs_f64()),
                dead_letters: stats.dead_letters,
                missing: stats.missing,
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
                transcripts_expiring: self.metrics.transcripts_expiring.get(),
                unknown_formats: self.metrics.unknown_formats.list(),
                last_rescan: self.metrics.last_rescan().map(|at| at.to_string()),
            },
            spool: SpoolHealth {
                unread_files: unread_spool.files as u64,
                folder_unread: unread_spool.is_folder_unread,
                last_error: unread_spool.error,
            },
            http: self.http.borrow().clone(),
        }
    }

    /// Whether events are taken in.
    pub fn ready(&self) -> bool {
        self.queue.failed().borrow().is_none() && !self.queue.stats().full
    }

    /// Whether every part of this program makes progress: what systemd's watchdog and `GET /livez` ask. A full queue, a
    /// database that is unavailable or one in which somebody else holds a lock is no hang: a restart would not help.
    pub fn goes_on(&self, now: Moment) -> bool {
        !self.facts(now).troubles().iter().any(Trouble::is_hang)
    }

    fn facts(&self, now: Moment) -> Facts {
        let stats = self.queue.stats();
        let database = self.metrics.database();
        Facts {
            queue_error: self.queue.failed().borrow().as_ref().map(QueueError::to_string),
            pending_bytes_max: self.pending_bytes_max,
            oldest_age: stats.oldest.map(|(_, captured_at)| age(captured_at, now.time)),
            database_age: age(database.since, now.time),
            reading_silence: self.metrics.reading.age(now.clock),
            reading_silence_max: self.polling_interval + SILENCE_MAX,
            draining_silence: self.metrics.draining.age(now.clock),
            draining_silence_max: self.delivery_max + SILENCE_MAX,
            settling_silence: self.metrics.settling.age(now.clock),
            transcripts_expiring: self.metrics.transcripts_expiring.get(),
            unread_spool: self.spool.unread(),
            stats,
            database,
        }
    }
}

/// What health is judged by.
struct Facts {
    queue_error: Option<String>,
    stats: QueueStats,
    pending_bytes_max: u64,
    oldest_age: Option<Duration>,
    database: DatabaseState,
    database_age: Duration,
    reading_silence: Duration,
    reading_silence_max: Duration,
    draining_silence: Duration,
    draining_silence_max: Duration,
    settling_silence: Duration,
    transcripts_expiring: u64,
    unread_spool: UnreadSpool,
}

impl Facts {
    fn troubles(&self) -> Vec<Trouble> {
        let mut troubles = Vec::new();
        if let Some(error) = &self.queue_error {
            troubles.push(Trouble::QueueFailed(error.clone()));
        }
        let filled_percent = self.stats.pending_bytes.saturating_mul(100) / self.pending_bytes_max.max(1);
        if self.stats.full {
            troubles.push(Trouble::QueueFull);
        } else if filled_percent >= FILLING_PERCENT {
            troubles.push(Trouble::QueueFilling { percent: filled_percent });
        }
        if self.reading_silence > self.reading_silence_max {
            troubles.push(Trouble::ReadingHangs(self.reading_silence));
        }
        let has_drainer = self.database.state != Database::Unconfigured;
        if has_drainer && self.draining_silence > self.draining_silence_max {
            troubles.push(Trouble::DrainingHangs(self.draining_silence));
        }
        match self.database.state {
            Database::Up => {
                // All three: what has waited through an outage has been waiting long, but it is moving now.
                let still = self.oldest_age.unwrap_or_default().min(self.database_age).min(self.settling_silence);
                if still > STALLED_AFTER {
                    troubles.push(Trouble::Stalled(still));
                }
            }
            Database::Down => troubles.push(Trouble::DatabaseAway),
            Database::Misconfigured => troubles.push(Trouble::DatabaseMisconfigured),
            Database::Unconfigured => troubles.push(Trouble::DatabaseUnconfigured),
        }
        if self.stats.dead_letters > 0 {
            troubles.push(Trouble::DeadLetters(self.stats.dead_letters));
        }
        if self.stats.missing > 0 {
            troubles.push(Trouble::EventsMissing(self.stats.missing));
        }
        let UnreadSpool { files, error, is_folder_unread } = &self.unread_spool;
        if *is_folder_unread || *files > 0 {
            let error = error.clone().unwrap_or_default();
            let files = if *is_folder_unread { None } else { Some(*files) };
            troubles.push(Trouble::SpoolUnread { files, error });
        }
        if self.transcripts_expiring > 0 {
            troubles.push(Trouble::TranscriptsExpire(self.transcripts_expiring));
        }
        troubles
    }
}

/// What is not as it should be; displayed in words for people, with the way out.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
enum Trouble {
    #[error("the queue can't be written: {0}")]
    QueueFailed(String),
    #[error("the queue is full: nothing is taken in; bring the database back or raise queue.max_pending_bytes")]
    QueueFull,
    #[error("the queue is {percent} % full; bring the database back or raise queue.max_pending_bytes")]
    QueueFilling { percent: u64 },
    #[error("nothing was read for {} s: the thread that follows transcripts hangs; restart the watcher", .0.as_secs())]
    ReadingHangs(Duration),
    #[error("the drainer has not moved for {} s; restart the watcher", .0.as_secs())]
    DrainingHangs(Duration),
    #[error("stalled: the database is up, but nothing has left the queue for {} s; see who blocks the events table", .0.as_secs())]
    Stalled(Duration),
    #[error("the database is away; events wait in the queue")]
    DatabaseAway,
    #[error("the database can't be used until someone mends this; events wait in the queue")]
    DatabaseMisconfigured,
    #[error("no database is configured; events wait in the queue. Set database.url, DATABASE_URL or PGHOST")]
    DatabaseUnconfigured,
    #[error("{0} dead letter{plural}; see \"headspace-watcher queue-dump --dead-letters\"", plural = if *.0 == 1 { "" } else { "s" })]
    DeadLetters(u64),
    #[error(
        "{0} events are missing from the queue, whose files were damaged: those from transcripts are read again, hooks and emitted \
         ones are gone; see \"headspace-watcher queue-dump --dead-letters\""
    )]
    EventsMissing(u64),
    /// `files`: `None` where the folder itself can't be read.
    #[error("{} can't be read; correct its owner or mode: {error}", unread_spool(*.files))]
    SpoolUnread { files: Option<usize>, error: String },
    #[error(
        "{0} transcripts are not wholly stored and Claude Code deletes them within {WARN_DAYS} days; bring the database \
         back, or raise cleanupPeriodDays in Claude Code's settings.json"
    )]
    TranscriptsExpire(u64),
}

fn unread_spool(files: Option<usize>) -> String {
    match files {
        None => "the spool, in which hooks wait,".to_owned(),
        Some(1) => "1 file in the spool".to_owned(),
        Some(files) => format!("{files} files in the spool"),
    }
}

impl Trouble {
    fn status(&self) -> Status {
        match self {
            Trouble::QueueFailed(_) | Trouble::QueueFull | Trouble::Stalled(_) => Status::Fail,
            Trouble::ReadingHangs(_) | Trouble::DrainingHangs(_) => Status::Fail,
            Trouble::QueueFilling { .. } | Trouble::DeadLetters(_) | Trouble::TranscriptsExpire(_) => Status::Warn,
            Trouble::EventsMissing(_) | Trouble::SpoolUnread { .. } => Status::Warn,
            Trouble::DatabaseAway | Trouble::DatabaseMisconfigured | Trouble::DatabaseUnconfigured => Status::Warn,
        }
    }

    /// Whether a part of this program has come to a halt that only a restart ends.
    fn is_hang(&self) -> bool {
        match self {
            Trouble::ReadingHangs(_) | Trouble::DrainingHangs(_) => true,
            // The drainer moves, or it would hang as well: the database holds it up.
            Trouble::Stalled(_)
            | Trouble::QueueFailed(_)
            | Trouble::QueueFull
            | Trouble::QueueFilling { .. }
            | Trouble::DatabaseAway
            | Trouble::DatabaseMisconfigured
            | Trouble::DatabaseUnconfigured
            | Trouble::DeadLetters(_)
            | Trouble::EventsMissing(_)
            | Trouble::SpoolUnread { .. }
            | Trouble::TranscriptsExpire(_) => false,
        }
    }
}

/// Time from `then` to `now`; zero where the clock went back.
fn age(then: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// All is well, and one event has been waiting for a moment.
    fn well() -> Facts {
        Facts {
            queue_error: None,
            stats: QueueStats { pending: 1, pending_bytes: 10, ..QueueStats::default() },
            pending_bytes_max: 1000,
            oldest_age: Some(SECOND),
            database: DatabaseState { state: Database::Up, since: Timestamp::UNIX_EPOCH, last_error: None },
            database_age: 3600 * SECOND,
            reading_silence: SECOND,
            reading_silence_max: 32 * SECOND,
            draining_silence: SECOND,
            draining_silence_max: 38 * SECOND,
            settling_silence: SECOND,
            transcripts_expiring: 0,
            unread_spool: UnreadSpool::default(),
        }
    }

    /// The one trouble that a change to a healthy watcher leads to.
    #[track_caller]
    fn after(change: impl FnOnce(&mut Facts)) -> Option<Trouble> {
        let mut facts = well();
        change(&mut facts);
        let mut troubles = facts.troubles();
        assert!(troubles.len() <= 1, "{troubles:?}");
        troubles.pop()
    }

    #[test]
    fn every_trouble_is_found_alone_and_has_its_status() {
        assert_eq!(after(|_| {}), None);
        let long = 40 * SECOND;
        for (change, expected, status, is_hang) in [
            (
                (|facts| facts.queue_error = Some("gone".to_owned())) as fn(&mut Facts),
                Trouble::QueueFailed("gone".to_owned()),
                Status::Fail,
                false,
            ),
            (
                |facts| {
                    facts.stats.full = true;
                    facts.stats.pending_bytes = 999;
                },
                Trouble::QueueFull,
                Status::Fail,
                false,
            ),
            (|facts| facts.stats.pending_bytes = 800, Trouble::QueueFilling { percent: 80 }, Status::Warn, false),
            (|facts| facts.reading_silence = 40 * SECOND, Trouble::ReadingHangs(long), Status::Fail, true),
            (|facts| facts.draining_silence = 40 * SECOND, Trouble::DrainingHangs(long), Status::Fail, true),
            (
                |facts| {
                    facts.oldest_age = Some(50 * SECOND);
                    facts.settling_silence = 40 * SECOND;
                },
                Trouble::Stalled(long),
                Status::Fail,
                false,
            ),
            (|facts| facts.database.state = Database::Down, Trouble::DatabaseAway, Status::Warn, false),
            (
                |facts| facts.database.state = Database::Misconfigured,
                Trouble::DatabaseMisconfigured,
                Status::Warn,
                false,
            ),
            (
                |facts| {
                    facts.database.state = Database::Unconfigured;
                    facts.draining_silence = 40 * SECOND;
                },
                Trouble::DatabaseUnconfigured,
                Status::Warn,
                false,
            ),
            (|facts| facts.stats.dead_letters = 3, Trouble::DeadLetters(3), Status::Warn, false),
            (|facts| facts.stats.missing = 3, Trouble::EventsMissing(3), Status::Warn, false),
            (
                |facts| {
                    let error = Some("/spool/x.hook: denied".to_owned());
                    facts.unread_spool = UnreadSpool { files: 1, error, is_folder_unread: false };
                },
                Trouble::SpoolUnread { files: Some(1), error: "/spool/x.hook: denied".to_owned() },
                Status::Warn,
                false,
            ),
            (|facts| facts.transcripts_expiring = 2, Trouble::TranscriptsExpire(2), Status::Warn, false),
        ] {
            let found = after(change);
            assert_eq!(found, Some(expected.clone()));
            assert_eq!((expected.status(), expected.is_hang()), (status, is_hang), "{expected}");
        }
    }

    #[test]
    fn it_is_no_stall_while_something_moves_or_nothing_waits_or_the_database_is_just_back() {
        let old = Some(3600 * SECOND);
        assert_eq!(after(|facts| facts.oldest_age = old), None, "a backlog is drained");
        assert_eq!(after(|facts| (facts.oldest_age, facts.settling_silence) = (None, 3600 * SECOND)), None, "idle");
        let just_back = |facts: &mut Facts| {
            facts.oldest_age = Some(3600 * SECOND);
            facts.settling_silence = 3600 * SECOND;
            facts.database_age = SECOND;
        };
        assert_eq!(after(just_back), None);
        let away = |facts: &mut Facts| {
            just_back(facts);
            facts.database_age = 3600 * SECOND;
            facts.database.state = Database::Down;
        };
        assert_eq!(after(away), Some(Trouble::DatabaseAway), "it waits for the database, and that is said");
    }

    #[test]
    fn a_clock_that_went_back_ages_nothing() {
        let now = Timestamp::from_second(100).unwrap();
        assert_eq!(age(Timestamp::from_second(200).unwrap(), now), Duration::ZERO);
        assert_eq!(age(Timestamp::from_second(70).unwrap(), now), 30 * SECOND);
    }
}
