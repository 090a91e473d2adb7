//! The live state of the program's parts, from which health is judged. Not kept across restarts.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::lock;
use crate::event::Timestamp;

/// A value that is read and replaced as a whole.
#[derive(Default, Debug)]
pub(crate) struct Shared<T>(Mutex<T>);

impl<T: Clone> Shared<T> {
    pub(crate) fn get(&self) -> T {
        lock(&self.0).clone()
    }

    pub(crate) fn set(&self, value: T) {
        *lock(&self.0) = value;
    }
}

/// When a part of the program last made progress.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    epoch: Instant,
    /// Milliseconds after `epoch`.
    last: AtomicU64,
}

impl Default for Heartbeat {
    fn default() -> Self {
        Heartbeat { epoch: Instant::now(), last: AtomicU64::new(0) }
    }
}

impl Heartbeat {
    pub(crate) fn beat(&self) {
        let now = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.fetch_max(now, Ordering::Relaxed);
    }

    /// Time since the last beat, or since the start when there was none.
    pub(crate) fn age(&self, now: Instant) -> Duration {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        now.saturating_duration_since(self.epoch).saturating_sub(last)
    }
}

/// What is known of the database, and since when.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct DatabaseState {
    pub(crate) state: Database,
    pub(crate) since: Timestamp,
    /// In the server's words where it spoke.
    pub(crate) last_error: Option<String>,
}

impl Default for DatabaseState {
    fn default() -> Self {
        DatabaseState { state: Database::Down, since: Timestamp::now(), last_error: None }
    }
}

#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Database {
    Up,
    Down,
    /// It answers, but someone must fix something.
    Misconfigured,
    /// Nothing says where it is.
    Unconfigured,
}

impl Database {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Database::Up => "up",
            Database::Down => "down",
            Database::Misconfigured => "misconfigured",
            Database::Unconfigured => "unconfigured",
        }
    }
}

#[derive(Default, Debug)]
pub(crate) struct LiveState {
    pub(crate) files_watched: Shared<u64>,
    pub(crate) sessions_known: Shared<u64>,
    /// Transcripts that Claude Code is about to delete and that are not fully delivered.
    pub(crate) transcripts_expiring: Shared<u64>,
    /// When all transcripts were last scanned.
    pub(crate) last_rescan: Shared<Option<Timestamp>>,
    /// The thread that follows transcripts goes on, also when it waits for room.
    pub(crate) reading: Heartbeat,
    /// The drainer goes on, also when all it does is to try to reach the database.
    pub(crate) draining: Heartbeat,
    /// Something left the queue.
    pub(crate) settling: Heartbeat,
    /// When Postgres last stored something.
    pub(crate) last_write: Shared<Option<Timestamp>>,
    pub(crate) database: Shared<DatabaseState>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_tells_how_long_it_was_silent() {
        let heartbeat = Heartbeat::default();
        let later = Instant::now() + Duration::from_secs(60);
        assert!(heartbeat.age(later) >= Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(3));
        heartbeat.beat();
        assert!(heartbeat.age(later) < Duration::from_secs(60));
        assert_eq!(heartbeat.age(heartbeat.epoch), Duration::ZERO);
    }
}
