//! Rows that a copy of a session brought, given to the session where they were first said.
//!
//! A copy has its history's own uuids, so a turn is stored once, with the payload of whoever came first. Where that was the
//! copy, the payload says so (`metadata.copied_at`: when the copy was made). When the same turn is then read from its
//! original, which is no copy, or from a copy that was made earlier, its receipt refuses it; and the row is corrected: it
//! gets that payload, its receipt that place. Of all that hold a turn the one made first wins, in whatever order they
//! come, and a repetition changes nothing.
//!
//! * Costs nothing unless a window holds turns that had been stored before. Then one question, by primary keys, tells
//!   whether any of their rows is to be corrected; mostly none is.
//! * All rows of a window are corrected in one transaction. A barrier behind it makes it durable before their events may
//!   leave the queue. What fails in passing is made again with the window.
//! * The events table is other people's. Where it takes no correction (no right to UPDATE, a trigger that refuses it, no
//!   index on `id`), rows stay as they are, delivery goes on, and it is said once.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};
use tracing::{debug, warn};
use uuid::Uuid;

use super::connect::Session;
use super::layout::RELAX;
use super::no_answer;
use super::rows::StatementRow;
use super::verdict::step_error;
use crate::event::{Envelope, Origin};
use crate::sink::{DeliverError, Delivered, Verdict};

/// Time-outs in a row after which rows stay as they are: corrections must not hold up delivery for ever.
const TIMEOUTS_MAX: u32 = 3;

/// How long nothing is corrected after the table has refused it.
const REST: Duration = Duration::from_secs(60);

/// What is said of the making of a copy in a payload. Texts of one form, so they are in the order of the times.
const COPIED_AT: &str = "payload->'metadata'->>'copied_at'";

/// Which of the events `$1` of the times `$2` have a row from a copy that was made later than the one they come from
/// (`$3`: when that was, null for an original).
pub fn find_sql(schema: &str, table: &str) -> String {
    // OFFSET 0 keeps the planner from joining whole tables.
    format!(
        "SELECT asked.event_id
           FROM unnest($1, $2, $3) AS asked (event_id, happened_at, copied_at)
          CROSS JOIN LATERAL (SELECT row_id FROM {schema}.event_receipts WHERE event_id = asked.event_id OFFSET 0) AS r
          CROSS JOIN LATERAL (SELECT payload FROM {table}
                               WHERE id = r.row_id AND \"timestamp\" = asked.happened_at OFFSET 0) AS e
          WHERE COALESCE(asked.copied_at, '') < (e.{COPIED_AT}) COLLATE \"C\""
    )
}

/// Gives the rows of the events `$1` of the times `$2` the payloads `$3`, and their receipts the sources `$4` and places
/// `$5`, each on condition that it is still to be corrected.
pub fn correct_sql(schema: &str, table: &str) -> String {
    format!(
        "WITH corrected AS (
           UPDATE {table} AS e SET payload = asked.payload
             FROM unnest($1, $2, $3, $4, $5) AS asked (event_id, happened_at, payload, source_id, byte_offset)
             JOIN {schema}.event_receipts AS r ON r.event_id = asked.event_id
            WHERE e.id = r.row_id AND e.\"timestamp\" = asked.happened_at AND e.event_type = 'turn_detected'
              AND e.payload->>'turn_uuid' = asked.payload->>'turn_uuid'
              AND COALESCE(asked.{COPIED_AT}, '') < (e.{COPIED_AT}) COLLATE \"C\"
           RETURNING asked.event_id, asked.source_id, asked.byte_offset
         ), placed AS (
           UPDATE {schema}.event_receipts AS r SET source_id = corrected.source_id, byte_offset = corrected.byte_offset
             FROM corrected WHERE r.event_id = corrected.event_id
           RETURNING r.event_id
         )
         SELECT count(*), {RELAX} FROM placed"
    )
}

/// Whether rows are corrected at present.
#[derive(Default)]
pub struct Corrections {
    resting_until: Mutex<Option<Instant>>,
    timeouts: AtomicU32,
    /// It was said that rows stay as they are.
    is_said: AtomicBool,
}

/// The places in a window of the turns that had been stored before.
pub fn repeated_turns(window: &[Envelope], done: &[Delivered]) -> Vec<usize> {
    let is_turn = |envelope: &Envelope| {
        matches!(envelope.event.origin(), Origin::Transcript { .. })
            && envelope.event.event_type().as_str() == "turn_detected"
    };
    let repeated = window.iter().zip(done).enumerate();
    repeated
        .filter(|(_, (envelope, delivered))| **delivered == Delivered::AlreadyStored && is_turn(envelope))
        .map(|(index, _)| index)
        .collect()
}

impl Corrections {
    /// Corrects the rows of these turns, which had been stored before, where they are to be. Returns whether any may have
    /// been; that is not durable yet. An error is the moment's: the turns are to be delivered again.
    pub async fn make(
        &self,
        session: &Session,
        turns: &[StatementRow<'_>],
        limit: Duration,
    ) -> Result<bool, DeliverError> {
        if self.resting().is_some_and(|until| Instant::now() < until) {
            return Ok(false);
        }
        match correct(session, turns, limit).await {
            Ok(corrected) => {
                self.timeouts.store(0, Ordering::Relaxed);
                if let Some(rows) = corrected {
                    debug!(rows, "turns that came from a copy were given to the session where they were said");
                }
                Ok(corrected.is_some())
            }
            Err(failed) if self.is_to_be_repeated(&failed) => Err(session.failed(failed.error)),
            Err(Failed { error, .. }) => {
                *self.resting() = Some(Instant::now() + REST);
                if !self.is_said.swap(true, Ordering::Relaxed) {
                    warn!(%error, "turns that were found in a copy of a session first stay under the copy's session: the \
                                   events table can't be corrected, which takes SELECT and UPDATE on it");
                }
                Ok(false)
            }
        }
    }

    fn is_to_be_repeated(&self, failed: &Failed) -> bool {
        let timeouts = if failed.is_timeout { self.timeouts.fetch_add(1, Ordering::Relaxed) + 1 } else { 0 };
        if timeouts >= TIMEOUTS_MAX {
            self.timeouts.store(0, Ordering::Relaxed);
            return false;
        }
        failed.error.verdict == Verdict::Again
    }

    fn resting(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.resting_until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why rows could not be looked at or corrected.
struct Failed {
    error: DeliverError,
    /// The server, or we ourselves, would wait no longer.
    is_timeout: bool,
}

impl From<DeliverError> for Failed {
    /// What the server said.
    fn from(error: DeliverError) -> Self {
        Failed { is_timeout: error.sqlstate.as_deref() == Some("57014"), error }
    }
}

/// Returns the number of rows that were corrected; `None` when none is to be.
async fn correct(session: &Session, turns: &[StatementRow<'_>], limit: Duration) -> Result<Option<i64>, Failed> {
    let layout = session.layout();
    let ids: Vec<Uuid> = turns.iter().map(|turn| turn.event_id).collect();
    let times: Vec<_> = turns.iter().map(|turn| turn.timestamp).collect();
    let copied_at: Vec<_> = turns.iter().map(|turn| copied_at(turn.payload.as_str())).collect();
    let parameters: [(&(dyn ToSql + Sync), Type); 3] =
        [(&ids, Type::UUID_ARRAY), (&times, Type::TIMESTAMPTZ_ARRAY), (&copied_at, Type::TEXT_ARRAY)];
    let found = ask(session, &layout.find_copied_sql, &parameters, limit).await?;
    let found: Vec<Uuid> = found.iter().map(|row| row.get(0)).collect();
    let turns: Vec<_> = turns.iter().filter(|turn| found.contains(&turn.event_id)).collect();
    if turns.is_empty() {
        return Ok(None);
    }
    let ids: Vec<Uuid> = turns.iter().map(|turn| turn.event_id).collect();
    let times: Vec<_> = turns.iter().map(|turn| turn.timestamp).collect();
    let payloads: Vec<_> = turns.iter().map(|turn| turn.payload).collect();
    let sources: Vec<i32> = turns.iter().map(|turn| turn.source_id).collect();
    let offsets: Vec<Option<i64>> = turns.iter().map(|turn| turn.byte_offset).collect();
    let parameters: [(&(dyn ToSql + Sync), Type); 5] = [
        (&ids, Type::UUID_ARRAY),
        (&times, Type::TIMESTAMPTZ_ARRAY),
        (&payloads, Type::JSONB_ARRAY),
        (&sources, Type::INT4_ARRAY),
        (&offsets, Type::INT8_ARRAY),
    ];
    let corrected = ask(session, &layout.correct_copied_sql, &parameters, limit).await?;
    Ok(Some(corrected.first().map_or(0, |row| row.get(0))))
}

/// As `Session::ask`, but that a refusal leaves the session as good as it was.
async fn ask(
    session: &Session,
    sql: &str,
    parameters: &[(&(dyn ToSql + Sync), Type)],
    limit: Duration,
) -> Result<Vec<Row>, Failed> {
    match tokio::time::timeout(limit, session.client().query_typed(sql, parameters)).await {
        Ok(answer) => answer.map_err(|error| step_error(&error).into()),
        Err(_) => {
            session.give_up();
            Err(Failed { error: no_answer(limit), is_timeout: true })
        }
    }
}

/// When the copy was made that a turn comes from, by its payload; `None` for an original.
fn copied_at(payload: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Payload {
        metadata: Option<Metadata>,
    }
    #[derive(Deserialize)]
    struct Metadata {
        copied_at: Option<String>,
    }
    serde_json::from_str::<Payload>(payload).ok()?.metadata?.copied_at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_says_when_its_copy_was_made() {
        let table = [
            (
                r#"{"text":"copied_at","metadata":{"copied_at":"2026-01-03T10:00:00.000Z"}}"#,
                Some("2026-01-03T10:00:00.000Z"),
            ),
            (r#"{"text":"one","metadata":{"repaired":true}}"#, None),
            (r#"{"text":"one","copied_at":"x"}"#, None),
            (r#"{"metadata":null}"#, None),
        ];
        for (payload, expected) in table {
            assert_eq!(copied_at(payload).as_deref(), expected, "{payload}");
        }
    }

    #[test]
    fn only_what_the_moment_is_to_blame_for_is_repeated_and_time_outs_not_for_ever() {
        let error = |code: Option<&str>| DeliverError {
            verdict: super::super::verdict::verdict(code),
            sqlstate: code.map(str::to_owned),
            message: String::new(),
        };
        let corrections = Corrections::default();
        let repeated = |code| corrections.is_to_be_repeated(&error(code).into());
        for code in ["40P01", "40001", "55P03", "57P01", "25006", "53100"] {
            assert!(repeated(Some(code)), "{code}");
        }
        assert!(repeated(None), "the connection was lost");
        for code in ["42501", "P0001", "23514", "42P01", "0A000", "XX000"] {
            assert!(!repeated(Some(code)), "{code}");
        }
        assert_eq!([57014; 4].map(|_| repeated(Some("57014"))), [true, true, false, true]);
        let corrections = Corrections::default();
        let timed_out =
            || corrections.is_to_be_repeated(&Failed { error: no_answer(Duration::ZERO), is_timeout: true });
        assert_eq!([(); 3].map(|()| timed_out()), [true, true, false]);
    }
}
