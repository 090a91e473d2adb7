//! What the program says about itself: numbers that every layer adds to, what happened lately, and the log.
//!
//! A leaf: of ours it imports nothing but plain values. Log levels: ERROR someone must act; WARN unexpected, recovering;
//! INFO start, stop, changes of state, summaries; DEBUG single writes. Neither payload text nor passwords are logged.

mod activity;
mod formats;
mod logs;
mod metrics;

pub use activity::{Activity, BatchActivity, Noted, SessionActivity};
pub use formats::{UnknownFormat, UnknownFormats, is_name, name_or_none};
pub use logs::{LogFormat, start_logging};
pub use metrics::{
    Beat, Counter, CounterFamily, Database, DatabaseState, Gauge, Histogram, HistogramSnapshot, Metrics, OTHER,
    RescanCause,
};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A poisoned lock guards plain values here: what is inside is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
