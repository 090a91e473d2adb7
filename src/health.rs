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

impl QueueHealth {
    pub(crate) fn of(stats: &QueueStats, now: Timestamp) -> QueueHealth {
        QueueHealth {
            pending: stats.pending,
            pending_bytes: stats.pending_bytes,
            oldest_age_seconds: stats.oldest.map(|(_, captured_at)| age(captured_at, now).as_secs_f64()),
            dead_letters: stats.dead_letters,
            missing: stats.missing,
            disk_bytes: stats.disk_bytes,
            full: stats.full,
        }
    }
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
        let Facts { stats, database, unread_spool, .. } = facts;
        let (metrics, live) = (&self.metrics, &self.metrics.live);
        Health {
            status: issues.iter().map(|issue| issue.severity.status()).max().unwrap_or(Status::Pass),
            running: true,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: self.started.time.to_string(),
            uptime_seconds: now.clock.saturating_duration_since(self.started.clock).as_secs(),
            ready: self.ready(),
            reasons: issues.into_iter().map(|issue| issue.reason).collect(),
            queue: QueueHealth::of(&stats, now.time),
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

    /// Whether events are taken in.
    pub(crate) fn ready(&self) -> bool {
        self.queue.failed().borrow().is_none() && !self.queue.stats().full
    }

    /// Whether every part of this program makes progress: what systemd's watchdog and `GET /livez` ask. A full queue, a
    /// database that is unavailable or one in which somebody else holds a lock is no hang: a restart would not help.
    pub(crate) fn is_alive(&self, now: Moment) -> bool {
        !self.facts(now).issues().iter().any(|issue| issue.severity == Severity::Hang)
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
    fn issues(&self) -> Vec<Issue> {
        let mut issues = Vec::new();
        let mut add = |severity, reason: String| issues.push(Issue { severity, reason });
        if let Some(error) = &self.queue_error {
            add(Severity::Fail, format!("the queue can't be written: {error}"));
        }
        let filled_percent = self.stats.pending_bytes.saturating_mul(100) / self.pending_bytes_max.max(1);
        let room = "bring the database back or raise queue.max_pending_bytes";
        if self.stats.full {
            add(Severity::Fail, format!("the queue is full: nothing is taken in; {room}"));
        } else if filled_percent >= FILLING_PERCENT {
            add(Severity::Warn, format!("the queue is {filled_percent} % full; {room}"));
        }
        let silence = self.reading_silence;
        if silence > self.reading_silence_max {
            let seconds = silence.as_secs();
            let hangs = "the thread that follows transcripts hangs; restart the watcher";
            add(Severity::Hang, format!("nothing was read for {seconds} s: {hangs}"));
        }
        let silence = self.draining_silence;
        if self.database.state != Database::Unconfigured && silence > self.draining_silence_max {
            add(Severity::Hang, format!("the drainer has not moved for {} s; restart the watcher", silence.as_secs()));
        }
        if let Some((severity, reason)) = self.database_issue() {
            add(severity, reason);
        }
        let QueueStats { dead_letters, missing, .. } = self.stats;
        if dead_letters > 0 {
            add(Severity::Warn, format!("{}; {SEE_DEAD_LETTERS}", counted(dead_letters, "dead letter")));
        }
        if missing > 0 {
            let lost = "those from transcripts are read again, hooks and emitted ones are gone";
            let missing = format!("{missing} events are missing from the queue, whose files were damaged");
            add(Severity::Warn, format!("{missing}: {lost}; {SEE_DEAD_LETTERS}"));
        }
        let UnreadSpool { files, error, is_folder_unread } = &self.unread_spool;
        if *is_folder_unread || *files > 0 {
            let what = match is_folder_unread {
                true => "the spool, in which hooks wait,".to_owned(),
                false => format!("{} in the spool", counted(*files as u64, "file")),
            };
            let error = error.as_deref().unwrap_or_default();
            add(Severity::Warn, format!("{what} can't be read; correct its owner or mode: {error}"));
        }
        if self.transcripts_expiring > 0 {
            let transcripts = counted(self.transcripts_expiring, "transcript");
            let expiring =
                format!("{transcripts} not fully delivered will be deleted by Claude Code within {WARN_DAYS} days");
            let remedy = "bring the database back, or raise cleanupPeriodDays in Claude Code's settings.json";
            add(Severity::Warn, format!("{expiring}; {remedy}"));
        }
        issues
    }

    fn database_issue(&self) -> Option<(Severity, String)> {
        let warning = match self.database.state {
            Database::Up => {
                // All three: what has waited through an outage has been waiting long, but it is moving now.
                let still = self.oldest_age.unwrap_or_default().min(self.database_age).min(self.settling_silence);
                let seconds = still.as_secs();
                // No hang: the drainer moves, so it is the database that holds it up.
                let stalled = format!("stalled: the database is up, but nothing has left the queue for {seconds} s");
                let issue = (Severity::Fail, format!("{stalled}; see who blocks the events table"));
                return (still > STALLED_AFTER).then_some(issue);
            }
            Database::Down => "the database is unavailable; events are queued",
            Database::Misconfigured => {
                "the database is misconfigured; delivery is paused until someone fixes it, events are queued"
            }
            Database::Unconfigured => {
                "no database is configured; events are queued. Set database.url, DATABASE_URL or PGHOST"
            }
        };
        Some((Severity::Warn, warning.to_owned()))
    }
}

const SEE_DEAD_LETTERS: &str = "see \"headspace-watcher dead-letters list\"";

/// What is not as it should be.
struct Issue {
    severity: Severity,
    /// In words for people, with what to do.
    reason: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Severity {
    Warn,
    Fail,
    /// A part of this program has come to a halt that only a restart ends.
    Hang,
}

impl Severity {
    fn status(self) -> Status {
        match self {
            Severity::Warn => Status::Warn,
            Severity::Fail | Severity::Hang => Status::Fail,
        }
    }
}

/// `1 file`, `2 files`.
pub(crate) fn counted(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
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

    /// How bad the one issue is that a change to a healthy watcher leads to, and its reason.
    #[track_caller]
    fn after(change: impl FnOnce(&mut Facts)) -> Option<(Severity, String)> {
        let mut facts = well();
        change(&mut facts);
        let mut issues = facts.issues();
        assert!(issues.len() <= 1, "{} issues", issues.len());
        issues.pop().map(|issue| (issue.severity, issue.reason))
    }

    #[test]
    fn every_issue_is_found_alone_and_has_its_status() {
        use Severity::{Fail, Hang, Warn};
        assert_eq!(after(|_| {}), None);
        type Change = fn(&mut Facts);
        let full: Change = |facts| (facts.stats.full, facts.stats.pending_bytes) = (true, 999);
        let stalled: Change = |facts| (facts.oldest_age, facts.settling_silence) = (Some(50 * SECOND), 40 * SECOND);
        let unconfigured: Change =
            |facts| (facts.database.state, facts.draining_silence) = (Database::Unconfigured, 40 * SECOND);
        let unread: Change = |facts| {
            let error = Some("/spool/x.hook: denied".to_owned());
            facts.unread_spool = UnreadSpool { files: 1, error, is_folder_unread: false };
        };
        let changes: [(Change, Severity, &str); 13] = [
            (|facts| facts.queue_error = Some("gone".to_owned()), Fail, "can't be written: gone"),
            (full, Fail, "the queue is full"),
            (|facts| facts.stats.pending_bytes = 800, Warn, "80 % full"),
            (|facts| facts.reading_silence = 40 * SECOND, Hang, "nothing was read for 40 s"),
            (|facts| facts.draining_silence = 40 * SECOND, Hang, "the drainer has not moved for 40 s"),
            (stalled, Fail, "stalled: the database is up, but nothing has left the queue for 40 s"),
            (|facts| facts.database.state = Database::Down, Warn, "unavailable"),
            (|facts| facts.database.state = Database::Misconfigured, Warn, "misconfigured"),
            (unconfigured, Warn, "no database is configured"),
            (|facts| facts.stats.dead_letters = 3, Warn, "3 dead letters; see"),
            (|facts| facts.stats.missing = 3, Warn, "3 events are missing"),
            (unread, Warn, "1 file in the spool can't be read; correct its owner or mode: /spool/x.hook: denied"),
            (|facts| facts.transcripts_expiring = 1, Warn, "1 transcript not fully delivered will be deleted"),
        ];
        for (change, expected, told) in changes {
            let (severity, reason) = after(change).unwrap_or_else(|| panic!("no issue: {told}"));
            assert!(severity == expected && reason.contains(told), "{severity:?}: {reason}");
        }
        assert_eq!([Warn, Fail, Hang].map(Severity::status), [Status::Warn, Status::Fail, Status::Fail]);
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
        let down = after(|facts: &mut Facts| {
            just_back(facts);
            facts.database_age = 3600 * SECOND;
            facts.database.state = Database::Down;
        });
        let (severity, reason) = down.unwrap();
        assert_eq!(severity, Severity::Warn, "it waits for the database, and that is said: {reason}");
        assert!(reason.contains("unavailable"), "{reason}");
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
