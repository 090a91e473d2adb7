//! What the program says about itself: counters that every layer adds to, and the set-up of the log.
//!
//! A leaf: imports nothing of ours but plain values. Log levels: ERROR someone must act; WARN unexpected, recovering;
//! INFO start, stop, changes of state, summaries; DEBUG single writes. Neither payload text nor passwords are logged.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use tracing_subscriber::EnvFilter;

/// A number that only grows.
#[derive(Default, Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Default, Debug)]
pub struct Gauge(AtomicU64);

impl Gauge {
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters since the start of the process.
#[derive(Default, Debug)]
pub struct Metrics {
    // intake
    pub lines_read: Counter,
    pub bad_lines: Counter,
    pub events_captured: Counter,
    pub events_rejected: Counter,
    pub files_watched: Gauge,
    pub sessions_known: Gauge,
    pub unknown_line_types: Mutex<BTreeMap<String, u64>>,
    last_rescan: Mutex<Option<Timestamp>>,
    // sink
    pub events_delivered: Counter,
    pub events_duplicate: Counter,
    pub events_dead_lettered: Counter,
    pub write_failures: Counter,
    last_write: Mutex<Option<Timestamp>>,
    database: Mutex<DatabaseState>,
}

impl Metrics {
    pub fn rescanned(&self, now: Timestamp) {
        *lock(&self.last_rescan) = Some(now);
    }

    pub fn last_rescan(&self) -> Option<Timestamp> {
        *lock(&self.last_rescan)
    }

    pub fn wrote(&self, now: Timestamp) {
        *lock(&self.last_write) = Some(now);
    }

    pub fn last_write(&self) -> Option<Timestamp> {
        *lock(&self.last_write)
    }

    pub fn database(&self) -> DatabaseState {
        lock(&self.database).clone()
    }

    pub fn set_database(&self, state: DatabaseState) {
        *lock(&self.database) = state;
    }

    /// Counts a line type that is not known, under its name. Only so many names are kept apart.
    pub fn unknown_line_type(&self, name: &str) {
        const NAMES_MAX: usize = 64;
        let mut types = lock(&self.unknown_line_types);
        let name = if types.contains_key(name) || types.len() < NAMES_MAX { name } else { "other" };
        *types.entry(name.to_owned()).or_default() += 1;
    }
}

/// A poisoned lock guards plain values here: what is inside is still whole.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is known of the database.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DatabaseState {
    pub state: Database,
    pub since: Timestamp,
    /// Why it is not up, in the server's words where it spoke.
    pub last_error: Option<String>,
}

impl Default for DatabaseState {
    fn default() -> Self {
        DatabaseState { state: Database::Down, since: Timestamp::now(), last_error: None }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Database {
    Up,
    Down,
    /// It answers, but someone must mend something.
    Misconfigured,
    /// Nothing says where it is.
    Unconfigured,
}

impl Database {
    pub fn as_str(self) -> &'static str {
        match self {
            Database::Up => "up",
            Database::Down => "down",
            Database::Misconfigured => "misconfigured",
            Database::Unconfigured => "unconfigured",
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    #[default]
    Auto,
    Text,
    Json,
}

/// Starts logging to stderr. `level` is one of tracing's levels; libraries log warnings and errors only.
pub fn start_logging(format: LogFormat, level: tracing::Level) {
    let terminal = std::io::stderr().is_terminal();
    let filter = EnvFilter::new(format!("warn,headspace_watcher={level}"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second start (in tests) keeps the first.
    let _ = match format {
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
        LogFormat::Auto if !terminal => builder.json().flatten_event(true).try_init(),
        LogFormat::Auto | LogFormat::Text => builder.with_target(false).with_ansi(terminal).try_init(),
    };
}
