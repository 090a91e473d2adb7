//! Health: one answer for `status`, `GET /health` and systemd's watchdog.
//!
//! ```text
//! fail   events can't be accepted: the queue failed or is full, or the thread that reads transcripts hangs;
//!        or they are not delivered: the database is up and nothing moves, or the drainer hangs
//! warn   degraded: database unavailable, misconfigured or not configured, dead letters, queue filling
//! pass   otherwise
//! ```
//!
//! It is judged by the program's live state ([`LiveState`](crate::telemetry::LiveState)), the queue and the spool, never by
//! a counter.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::claude::retention::WARN_DAYS;
use crate::event::Timestamp;
use crate::intake::spool::Spool;
use crate::queue::{Queue, QueueError, QueueStats};
use crate::telemetry::{Database, Metrics, UnknownFormat};

/// Delivery is stalled when events wait, the database is up, and nothing has left the queue for this long.
pub(crate) const STALLED_AFTER: Duration = Duration::from_secs(30);

/// A part hangs when it has been silent for this long on top of its longest allowed wait.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// The queue is reported as filling from this share of its limit.
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
    /// Degraded: the database is unavailable, there are dead letters.
    Warn,
    /// Events can't be accepted, or wait although the database is up.
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
    pub state: Database,
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
        let mut health = self.unjudged(now);
        let issues = self.progress(now).issues(&health);
        health.status = issues.iter().map(|(status, _)| *status).max().unwrap_or(Status::Pass);
        health.reasons = issues.into_iter().map(|(_, reason)| reason).collect();
        health
    }

    /// Whether events are accepted.
    pub(crate) fn ready(&self) -> bool {
        self.queue.failed().borrow().is_none() && !self.queue.stats().full
    }

    /// Whether every part of the program makes progress, for systemd's watchdog and `GET /livez`. A full queue, an
    /// unavailable database or a lock held in it is not a hang: a restart would not help.
    pub(crate) fn is_alive(&self, now: Moment) -> bool {
        let progress = self.progress(now);
        progress.reading_hangs.is_none() && progress.draining_hangs.is_none()
    }

    fn unjudged(&self, now: Moment) -> Health {
        let (metrics, live) = (&self.metrics, &self.metrics.live);
        let (database, unread_spool) = (live.database.get(), self.spool.unread());
        Health {
            status: Status::Pass,
            running: true,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: self.started.time.to_string(),
            uptime_seconds: now.clock.saturating_duration_since(self.started.clock).as_secs(),
            ready: self.ready(),
            reasons: Vec::new(),
            queue: QueueHealth::of(&self.queue.stats(), now.time),
            database: DatabaseHealth {
                state: database.state,
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

    fn progress(&self, now: Moment) -> Progress {
        let live = &self.metrics.live;
        let database = live.database.get();
        let has_drainer = database.state != Database::Unconfigured;
        Progress {
            queue_error: self.queue.failed().borrow().as_ref().map(QueueError::to_string),
            pending_bytes_max: self.pending_bytes_max,
            reading_hangs: hang(live.reading.age(now.clock), self.polling_interval),
            draining_hangs: hang(live.draining.age(now.clock), self.delivery_max).filter(|_| has_drainer),
            still: age(database.since, now.time).min(live.settling.age(now.clock)),
        }
    }
}

/// How long a part has been silent, if that is longer than it may wait.
fn hang(silence: Duration, wait_max: Duration) -> Option<Duration> {
    (silence > wait_max + SILENCE_MAX).then_some(silence)
}

/// What health is judged by in addition to its own fields.
struct Progress {
    queue_error: Option<String>,
    pending_bytes_max: u64,
    reading_hangs: Option<Duration>,
    draining_hangs: Option<Duration>,
    /// For how long the database's state has not changed and nothing has left the queue.
    still: Duration,
}

impl Progress {
    /// Everything that is wrong: its status, and a message that says what to do.
    fn issues(&self, health: &Health) -> Vec<(Status, String)> {
        let mut issues = Vec::new();
        let mut add = |status, reason: String| issues.push((status, reason));
        if let Some(error) = &self.queue_error {
            add(Status::Fail, format!("the queue can't be written: {error}"));
        }
        let QueueHealth { pending_bytes, dead_letters, missing, full, .. } = health.queue;
        let filled_percent = pending_bytes.saturating_mul(100) / self.pending_bytes_max.max(1);
        let room = "bring the database back or raise queue.max_pending_bytes";
        if full {
            add(Status::Fail, format!("the queue is full: no events are accepted; {room}"));
        } else if filled_percent >= FILLING_PERCENT {
            add(Status::Warn, format!("the queue is {filled_percent} % full; {room}"));
        }
        if let Some(silence) = self.reading_hangs {
            let hangs = "the thread that follows transcripts hangs; restart the watcher";
            add(Status::Fail, format!("nothing was read for {} s: {hangs}", silence.as_secs()));
        }
        if let Some(silence) = self.draining_hangs {
            add(Status::Fail, format!("the drainer has not moved for {} s; restart the watcher", silence.as_secs()));
        }
        if let Some((status, reason)) = self.database_issue(health) {
            add(status, reason);
        }
        if dead_letters > 0 {
            add(Status::Warn, format!("{}; {SEE_DEAD_LETTERS}", counted(dead_letters, "dead letter")));
        }
        if missing > 0 {
            let lost = "those from transcripts are read again, hooks and emitted ones are gone";
            let missing = format!("{missing} events are missing from the queue, whose files were damaged");
            add(Status::Warn, format!("{missing}: {lost}; {SEE_DEAD_LETTERS}"));
        }
        let SpoolHealth { unread_files, folder_unread, last_error } = &health.spool;
        if *folder_unread || *unread_files > 0 {
            let what = match folder_unread {
                true => "the spool, in which hooks wait,".to_owned(),
                false => format!("{} in the spool", counted(*unread_files, "file")),
            };
            let error = last_error.as_deref().unwrap_or_default();
            add(Status::Warn, format!("{what} can't be read; correct its owner or mode: {error}"));
        }
        if health.watcher.transcripts_expiring > 0 {
            let transcripts = counted(health.watcher.transcripts_expiring, "transcript");
            let expiring =
                format!("{transcripts} not fully delivered will be deleted by Claude Code within {WARN_DAYS} days");
            let remedy = "bring the database back, or raise cleanupPeriodDays in Claude Code's settings.json";
            add(Status::Warn, format!("{expiring}; {remedy}"));
        }
        issues
    }

    fn database_issue(&self, health: &Health) -> Option<(Status, String)> {
        let warning = match health.database.state {
            Database::Up => {
                // What has waited through an outage has been waiting long, but it is moving now.
                let still = self.still.as_secs_f64().min(health.queue.oldest_age_seconds.unwrap_or_default());
                // No hang: the drainer moves, so it is the database that holds it up.
                let stalled = format!("stalled: the database is up, but nothing has left the queue for {still:.0} s");
                let issue = (Status::Fail, format!("{stalled}; see who blocks the events table"));
                return (still > STALLED_AFTER.as_secs_f64()).then_some(issue);
            }
            Database::Down => "the database is unavailable; events are queued",
            Database::Misconfigured => {
                "the database is misconfigured; delivery is paused until someone fixes it, events are queued"
            }
            Database::Unconfigured => {
                "no database is configured; events are queued. Set database.url, DATABASE_URL or PGHOST"
            }
        };
        Some((Status::Warn, warning.to_owned()))
    }
}

const SEE_DEAD_LETTERS: &str = "see \"headspace-watcher dead-letters list\"";

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

    /// Every field is named here: whether callers without the token may see a new one is to be decided.
    fn health(text: &str) -> Health {
        let text = || text.to_owned();
        Health {
            status: Status::Warn,
            running: true,
            pid: 1,
            version: "1.0".to_owned(),
            started_at: "then".to_owned(),
            uptime_seconds: 1,
            ready: true,
            reasons: vec![format!("it is wrong: {}", text())],
            queue: QueueHealth {
                pending: 1,
                pending_bytes: 10,
                oldest_age_seconds: Some(1.0),
                dead_letters: 0,
                missing: 0,
                disk_bytes: 1,
                full: false,
            },
            database: DatabaseHealth { state: Database::Up, since: "then".to_owned(), last_error: Some(text()) },
            writes: WritesHealth { succeeded: 1, failed: 1, duplicates: 1, last_write_timestamp: None },
            watcher: WatcherHealth {
                files: 1,
                sessions: 1,
                lines: 1,
                bad_lines: 1,
                transcripts_expiring: 0,
                unknown_formats: vec![UnknownFormat { field: text(), value: text(), version: text(), lines: 1 }],
                last_rescan: None,
            },
            spool: SpoolHealth { unread_files: 0, folder_unread: false, last_error: Some(text()) },
            http: Some(HttpHealth {
                address: text(),
                listening: true,
                token_file: Some(text()),
                token_error: Some(text()),
            }),
        }
    }

    /// How bad the one issue is that a change to a healthy watcher leads to, and its reason.
    #[track_caller]
    fn after(change: impl FnOnce(&mut Health, &mut Progress)) -> Option<(Status, String)> {
        let mut health = health("");
        let mut progress = Progress {
            queue_error: None,
            pending_bytes_max: 1000,
            reading_hangs: None,
            draining_hangs: None,
            still: SECOND,
        };
        change(&mut health, &mut progress);
        let mut issues = progress.issues(&health);
        assert!(issues.len() <= 1, "{issues:?}");
        issues.pop()
    }

    #[test]
    fn every_issue_is_found_alone_and_has_its_status() {
        use Status::{Fail, Warn};
        assert_eq!(after(|_, _| {}), None);
        type Change = fn(&mut Health, &mut Progress);
        let stalled: Change =
            |health, progress| (health.queue.oldest_age_seconds, progress.still) = (Some(50.0), 40 * SECOND);
        let unread: Change =
            |health, _| (health.spool.unread_files, health.spool.last_error) = (1, Some("/spool/x: denied".to_owned()));
        let changes: [(Change, Status, &str); 13] = [
            (|_, progress| progress.queue_error = Some("gone".to_owned()), Fail, "can't be written: gone"),
            (|health, _| (health.queue.full, health.queue.pending_bytes) = (true, 999), Fail, "the queue is full"),
            (|health, _| health.queue.pending_bytes = 800, Warn, "80 % full"),
            (|_, progress| progress.reading_hangs = Some(40 * SECOND), Fail, "nothing was read for 40 s"),
            (|_, progress| progress.draining_hangs = Some(40 * SECOND), Fail, "the drainer has not moved for 40 s"),
            (stalled, Fail, "stalled: the database is up, but nothing has left the queue for 40 s"),
            (|health, _| health.database.state = Database::Down, Warn, "unavailable"),
            (|health, _| health.database.state = Database::Misconfigured, Warn, "misconfigured"),
            (|health, _| health.database.state = Database::Unconfigured, Warn, "no database is configured"),
            (|health, _| health.queue.dead_letters = 3, Warn, "3 dead letters; see"),
            (|health, _| health.queue.missing = 3, Warn, "3 events are missing"),
            (unread, Warn, "1 file in the spool can't be read; correct its owner or mode: /spool/x: denied"),
            (|health, _| health.watcher.transcripts_expiring = 1, Warn, "1 transcript not fully delivered will be"),
        ];
        for (change, expected, told) in changes {
            let (status, reason) = after(change).unwrap_or_else(|| panic!("no issue: {told}"));
            assert!(status == expected && reason.contains(told), "{status:?}: {reason}");
        }
    }

    #[test]
    fn a_part_hangs_that_is_silent_for_longer_than_it_may_wait() {
        assert_eq!(hang(32 * SECOND, 2 * SECOND), None);
        assert_eq!(hang(33 * SECOND, 2 * SECOND), Some(33 * SECOND));
    }

    #[test]
    fn it_is_no_stall_while_something_moves_or_nothing_waits_or_the_database_is_down() {
        let hour = 3600 * SECOND;
        assert_eq!(after(|health, _| health.queue.oldest_age_seconds = Some(3600.0)), None, "a backlog is drained");
        let idle = |health: &mut Health, progress: &mut Progress| {
            (health.queue.oldest_age_seconds, progress.still) = (None, hour);
        };
        assert_eq!(after(idle), None);
        let (status, reason) = after(|health, progress| {
            (health.queue.oldest_age_seconds, progress.still) = (Some(3600.0), hour);
            health.database.state = Database::Down;
        })
        .unwrap();
        assert!(status == Status::Warn && reason.contains("unavailable"), "it waits for the database: {reason}");
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

    #[test]
    fn callers_without_the_token_see_no_text_that_could_be_a_secret() {
        let shown = serde_json::to_string(&health("secret").without_details()).unwrap();
        assert!(!shown.contains("secret") && shown.contains("it is wrong") && shown.contains("status"), "{shown}");
    }
}
