//! How long Claude Code keeps transcripts: it deletes those that were not changed for `cleanupPeriodDays`.

use serde_json::Value;

use crate::json::without_byte_order_mark;

/// Claude Code's own default.
pub(crate) const CLEANUP_PERIOD_DAYS: u64 = 30;

/// Days before its end from which on a transcript is about to be deleted.
pub(crate) const WARN_DAYS: u64 = 3;

/// What the settings say; `None` where they say nothing.
pub(crate) fn cleanup_period_days(settings: &[u8]) -> Option<u64> {
    let settings: Value = serde_json::from_slice(without_byte_order_mark(settings)).ok()?;
    settings.get("cleanupPeriodDays")?.as_u64()
}
