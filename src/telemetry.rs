//! What the program says about itself: what it counts, what its parts last did, what happened lately, and the log.
//!
//! A leaf: of ours it imports nothing but plain values. Log levels: ERROR someone must act; WARN unexpected, recovering;
//! INFO start, stop, changes of state, summaries; DEBUG single writes. Neither payload text nor passwords are logged.

mod formats;
mod logs;
mod metrics;
mod recent;
mod state;

pub(crate) use formats::{UnknownFormat, UnknownFormats, is_name, name_or_none};
pub(crate) use logs::{LogFormat, start_logging};
pub use metrics::Metrics;
pub(crate) use metrics::TEXT_FORMAT;
pub(crate) use metrics::{HistogramSnapshot, RescanCause};
pub(crate) use recent::{RecentEvent, RecentEvents};
pub(crate) use state::{Database, DatabaseState, LiveState};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A poisoned lock guards plain values here: what is inside is still whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
