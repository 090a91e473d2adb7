//! Health: one answer made of what the layers know, the same for `status`, `GET /health` and systemd's watchdog.
//!
//! ```text
//! fail   events can't be taken in: the queue failed or is full, or the thread that reads transcripts hangs
//!        or they don't leave: the database is up and nothing moves, or the drainer hangs
//! warn   it works, but someone should look: database unavailable, misconfigured or not configured, dead letters,
//!        queue filling
//! pass   else
//! ```
//!
//! It decides by what the parts of the program say of themselves ([`LiveState`](crate::telemetry::LiveState)) and by the
//! state of the queue and the spool, never by a counter.

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
pub(crate) const STALLED_AFTER: Duration = Duration::from_secs(30);

/// Silence of a part, on top of the longest wait that it is allowed, after which it is taken to hang.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Share of the queue's limit from which on it is said that it fills.
const FILLING_PERCENT: u64 = 80;

/// `GET /health` and `status --json`. Readers ignore fields that they do not know.
#[derive(Serialize, Deserialize, Debug)]
pub(crate) struct Health {
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
    pub spool: SpoolHealth,
    /// The listener on TCP; null where it is off, and for callers without the token.
    pub http: Option<HttpHealth>,
}

impl Health {
    /// What callers without the token may see. What Postgres says can quote a payload, and the cause of an error can name a
    /// path: they learn that there is an error, and where its text is.
    pub(crate) fn without_details(mut self) -> Health {
        for reason in &mut self.reasons {
            *reason = without_cause(reason).to_owned();
        }
        for error in [&mut self.database.last_error, &mut self.spool.last_error] {
            *error = error.take().map(|_| ERROR_WITHHELD.to_owned());
        }
        self.watcher.unknown_formats.clear();
        self.http = None;
        self
    }
}

const ERROR_WITHHELD: &str = "shown with the token, and by \"headspace-watcher status\"";

/// A message without its cause, which follows the first colon.
fn without_cause(message: &str) -> &str {
    message.split_once(": ").map_or(message, |(what, _)| what)
}

#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    Pass,
    /// Works, but someone should look: the database is unavailable, there are dead letters.
    Warn,
    /// Events can't be taken in, or wait although the database is up.
    Fail,
}

impl Status {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Status::Pass => "pass",
            Status::Warn => "warn",
            Status::Fail => "fail",
        }
    }
}

#[derive(Serialize, Deserialize, Debug)]
pub(crate) struct QueueHealth {
    pub pending: u64,
    pub pending_bytes: u64,
    pub oldest_age_seconds: Option<f64>,
    pub dead_letters: u64,
    /// Events that were missing when the queue was opened, because its files were damaged.
    pub missing: u64,
    pub disk_bytes: u64,
    pub full: bool,
}

#[derive(Serialize, Deserialize, Debug)]
pub(crate) struct DatabaseHealth {
    pub state: String,
    pub since: String,
    pub last_error: Option<String>,
}

#[derive(Serialize, Deserialize, Debug)]
pub(crate) struct WritesHealth {
    pub succeeded: u64,
    pub failed: u64,
    pub duplicates: u64,
    pub last_write_timestamp: Option<String>,
}

#[derive(Serialize, Deserialize, Debug)]
pub(crate) struct WatcherHealth {
    pub files: u64,
    pub sessions: u64,
    pub lines: u64,
    pub bad_lines: u64,
    /// Transcripts that Claude Code is about to delete and that are not fully delivered.
    pub transcripts_expiring: u64,
    /// What transcripts had since the start that this version does not know.
    pub unknown_formats: Vec<UnknownFormat>,
    pub last_rescan: Option<String>,
}

/// What hooks and other commands have left and the watcher could not read at its last look.
#[derive(Serialize, Deserialize, Clone, Default, Debug)]
pub(crate) struct SpoolHealth {
    pub unread_files: u64,
    /// Whether the folder itself can't be read.
    pub folder_unread: bool,
    /// Path and cause, of the first file or of the folder.
    pub last_error: Option<String>,
}

#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct HttpHealth {
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
pub(crate) struct Moment {
    pub time: Timestamp,
    pub clock: Instant,
}

impl Moment {
    pub(crate) fn now() -> Moment {
        Moment { time: Timestamp::now(), clock: Instant::now() }
    }
}

/// What health is made of.
pub(crate) struct HealthSource {
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
    pub(crate) fn health(&self, now: Moment) -> Health {
        let facts = self.facts(now);
        let issues = facts.issues();
        let Facts { stats, database, oldest_age, unread_spool, .. } = facts;
        let (metrics, live) = (&self.metrics, &self.metrics.live);
        Health {
            status: issues.iter().map(HealthIssue::status).max().unwrap_or(Status::Pass),
            running: true,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: self.started.time.to_string(),
            uptime_seconds: self.uptime(now).as_secs(),
            ready: self.ready(),
            reasons: issues.iter().map(HealthIssue::to_string).collect(),
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
                succeeded: metrics.events_delivered.get(),
                failed: metrics.write_failures.get(),
                duplicates: metrics.events_duplicate.get(),
                last_write_timestamp: live.last_write.get().map(|at| at.to_string()),
            },
            watcher: WatcherHealth {
                files: live.files_watched.get(),
                sessions: live.sessions_known.get(),
                lines: metrics.lines_read.get(),
                bad_lines: metrics.bad_lines.get(),
                transcripts_expiring: live.transcripts_expiring.get(),
                unknown_formats: metrics.unknown_formats.list(),
                last_rescan: live.last_rescan.get().map(|at| at.to_string()),
            },
            spool: SpoolHealth {
                unread_files: unread_spool.files as u64,
                folder_unread: unread_spool.is_folder_unread,
                last_error: unread_spool.error,
            },
            http: self.http.borrow().clone(),
        }
    }

    /// Time since the start.
    pub(crate) fn uptime(&self, now: Moment) -> Duration {
        now.clock.saturating_duration_since(self.started.clock)
    }

    /// Whether events are taken in.
    pub(crate) fn ready(&self) -> bool {
        self.queue.failed().borrow().is_none() && !self.queue.stats().full
    }

    /// Whether every part of this program makes progress: what systemd's watchdog and `GET /livez` ask. A full queue, a
    /// database that is unavailable or one in which somebody else holds a lock is no hang: a restart would not help.
    pub(crate) fn is_alive(&self, now: Moment) -> bool {
        !self.facts(now).issues().iter().any(HealthIssue::is_hang)
    }

    fn facts(&self, now: Moment) -> Facts {
        let live = &self.metrics.live;
        let stats = self.queue.stats();
        let database = live.database.get();
        Facts {
            queue_error: self.queue.failed().borrow().as_ref().map(QueueError::to_string),
            pending_bytes_max: self.pending_bytes_max,
            oldest_age: stats.oldest.map(|(_, captured_at)| age(captured_at, now.time)),
            database_age: age(database.since, now.time),
            reading_silence: live.reading.age(now.clock),
            reading_silence_max: self.polling_interval + SILENCE_MAX,
            draining_silence: live.draining.age(now.clock),
            draining_silence_max: self.delivery_max + SILENCE_MAX,
            settling_silence: live.settling.age(now.clock),
            transcripts_expiring: live.transcripts_expiring.get(),
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
    fn issues(&self) -> Vec<HealthIssue> {
        let mut issues = Vec::new();
        if let Some(error) = &self.queue_error {
            issues.push(HealthIssue::QueueFailed(error.clone()));
        }
        let filled_percent = self.stats.pending_bytes.saturating_mul(100) / self.pending_bytes_max.max(1);
        if self.stats.full {
            issues.push(HealthIssue::QueueFull);
        } else if filled_percent >= FILLING_PERCENT {
            issues.push(HealthIssue::QueueFilling { percent: filled_percent });
        }
        if self.reading_silence > self.reading_silence_max {
            issues.push(HealthIssue::ReadingHangs(self.reading_silence));
        }
        let has_drainer = self.database.state != Database::Unconfigured;
        if has_drainer && self.draining_silence > self.draining_silence_max {
            issues.push(HealthIssue::DrainingHangs(self.draining_silence));
        }
        match self.database.state {
            Database::Up => {
                // All three: what has waited through an outage has been waiting long, but it is moving now.
                let still = self.oldest_age.unwrap_or_default().min(self.database_age).min(self.settling_silence);
                if still > STALLED_AFTER {
                    issues.push(HealthIssue::Stalled(still));
                }
            }
            Database::Down => issues.push(HealthIssue::DatabaseUnavailable),
            Database::Misconfigured => issues.push(HealthIssue::DatabaseMisconfigured),
            Database::Unconfigured => issues.push(HealthIssue::DatabaseUnconfigured),
        }
        if self.stats.dead_letters > 0 {
            issues.push(HealthIssue::DeadLetters(self.stats.dead_letters));
        }
        if self.stats.missing > 0 {
            issues.push(HealthIssue::EventsMissing(self.stats.missing));
        }
        let UnreadSpool { files, error, is_folder_unread } = &self.unread_spool;
        if *is_folder_unread || *files > 0 {
            let error = error.clone().unwrap_or_default();
            let files = if *is_folder_unread { None } else { Some(*files) };
            issues.push(HealthIssue::SpoolUnread { files, error });
        }
        if self.transcripts_expiring > 0 {
            issues.push(HealthIssue::TranscriptsExpire(self.transcripts_expiring));
        }
        issues
    }
}

/// What is not as it should be; displayed in words for people, with the way out.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
enum HealthIssue {
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
    #[error("the database is unavailable; events are queued")]
    DatabaseUnavailable,
    #[error("the database is misconfigured; delivery is paused until someone fixes it, events are queued")]
    DatabaseMisconfigured,
    #[error("no database is configured; events are queued. Set database.url, DATABASE_URL or PGHOST")]
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
        "{0} transcripts will be deleted by Claude Code within {WARN_DAYS} days but are not fully delivered; bring the \
         database back, or raise cleanupPeriodDays in Claude Code's settings.json"
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

impl HealthIssue {
    fn status(&self) -> Status {
        match self {
            HealthIssue::QueueFailed(_) | HealthIssue::QueueFull | HealthIssue::Stalled(_) => Status::Fail,
            _ if self.is_hang() => Status::Fail,
            _ => Status::Warn,
        }
    }

    /// Whether a part of this program has come to a halt that only a restart ends. A stall is none: the drainer moves, or it
    /// would hang as well, so the database holds it up.
    fn is_hang(&self) -> bool {
        matches!(self, HealthIssue::ReadingHangs(_) | HealthIssue::DrainingHangs(_))
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

    /// The one issue that a change to a healthy watcher leads to.
    #[track_caller]
    fn after(change: impl FnOnce(&mut Facts)) -> Option<HealthIssue> {
        let mut facts = well();
        change(&mut facts);
        let mut issues = facts.issues();
        assert!(issues.len() <= 1, "{issues:?}");
        issues.pop()
    }

    #[test]
    fn every_issue_is_found_alone_and_has_its_status() {
        assert_eq!(after(|_| {}), None);
        let long = 40 * SECOND;
        for (change, expected, status, is_hang) in [
            (
                (|facts| facts.queue_error = Some("gone".to_owned())) as fn(&mut Facts),
                HealthIssue::QueueFailed("gone".to_owned()),
                Status::Fail,
                false,
            ),
            (
                |facts| {
                    facts.stats.full = true;
                    facts.stats.pending_bytes = 999;
                },
                HealthIssue::QueueFull,
                Status::Fail,
                false,
            ),
            (|facts| facts.stats.pending_bytes = 800, HealthIssue::QueueFilling { percent: 80 }, Status::Warn, false),
            (|facts| facts.reading_silence = 40 * SECOND, HealthIssue::ReadingHangs(long), Status::Fail, true),
            (|facts| facts.draining_silence = 40 * SECOND, HealthIssue::DrainingHangs(long), Status::Fail, true),
            (
                |facts| {
                    facts.oldest_age = Some(50 * SECOND);
                    facts.settling_silence = 40 * SECOND;
                },
                HealthIssue::Stalled(long),
                Status::Fail,
                false,
            ),
            (|facts| facts.database.state = Database::Down, HealthIssue::DatabaseUnavailable, Status::Warn, false),
            (
                |facts| facts.database.state = Database::Misconfigured,
                HealthIssue::DatabaseMisconfigured,
                Status::Warn,
                false,
            ),
            (
                |facts| {
                    facts.database.state = Database::Unconfigured;
                    facts.draining_silence = 40 * SECOND;
                },
                HealthIssue::DatabaseUnconfigured,
                Status::Warn,
                false,
            ),
            (|facts| facts.stats.dead_letters = 3, HealthIssue::DeadLetters(3), Status::Warn, false),
            (|facts| facts.stats.missing = 3, HealthIssue::EventsMissing(3), Status::Warn, false),
            (
                |facts| {
                    let error = Some("/spool/x.hook: denied".to_owned());
                    facts.unread_spool = UnreadSpool { files: 1, error, is_folder_unread: false };
                },
                HealthIssue::SpoolUnread { files: Some(1), error: "/spool/x.hook: denied".to_owned() },
                Status::Warn,
                false,
            ),
            (|facts| facts.transcripts_expiring = 2, HealthIssue::TranscriptsExpire(2), Status::Warn, false),
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
        assert_eq!(after(away), Some(HealthIssue::DatabaseUnavailable), "it waits for the database, and that is said");
    }

    #[test]
    fn a_clock_that_went_back_ages_nothing() {
        let now = Timestamp::from_second(100).unwrap();
        assert_eq!(age(Timestamp::from_second(200).unwrap(), now), Duration::ZERO);
        assert_eq!(age(Timestamp::from_second(70).unwrap(), now), 30 * SECOND);
    }
    #[test]
    fn callers_without_the_token_read_what_is_wrong_without_its_cause() {
        let failed = "the queue can't be written: could not sync /home/me/data/queue: No space left on device";
        assert_eq!(without_cause(failed), "the queue can't be written");
        assert_eq!(without_cause("1 dead letter; see \"queue-dump\""), "1 dead letter; see \"queue-dump\"");
    }

    /// Every field is named here: whether a new one is for everybody is to be decided.
    #[test]
    fn callers_without_the_token_see_no_text_that_could_be_a_secret() {
        let text = || "secret".to_owned();
        let health = Health {
            status: Status::Warn,
            running: true,
            pid: 1,
            version: "1.0".to_owned(),
            started_at: "then".to_owned(),
            uptime_seconds: 1,
            ready: true,
            reasons: vec!["it is wrong: secret".to_owned()],
            queue: QueueHealth {
                pending: 1,
                pending_bytes: 1,
                oldest_age_seconds: None,
                dead_letters: 1,
                missing: 1,
                disk_bytes: 1,
                full: false,
            },
            database: DatabaseHealth { state: "up".to_owned(), since: "then".to_owned(), last_error: Some(text()) },
            writes: WritesHealth { succeeded: 1, failed: 1, duplicates: 1, last_write_timestamp: None },
            watcher: WatcherHealth {
                files: 1,
                sessions: 1,
                lines: 1,
                bad_lines: 1,
                transcripts_expiring: 1,
                unknown_formats: vec![UnknownFormat { field: text(), value: text(), version: text(), lines: 1 }],
                last_rescan: None,
            },
            spool: SpoolHealth { unread_files: 1, folder_unread: false, last_error: Some(text()) },
            http: Some(HttpHealth {
                address: text(),
                listening: true,
                token_file: Some(text()),
                token_error: Some(text()),
            }),
        };
        let shown = serde_json::to_string(&health.without_details()).unwrap();
        assert!(!shown.contains("secret") && shown.contains("it is wrong") && shown.contains("status"), "{shown}");
    }
}
