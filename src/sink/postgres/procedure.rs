//! A window in one message: a procedure of our own session that stores the events one by one and commits each.
//!
//! A statement for each event costs the server a message, the start of a plan and an answer; here the window comes as
//! arrays, and what is left is the work of the rows themselves (`docs/benchmarks.md`). Each event is a transaction of its
//! own as before, in order, with its receipt; the ledger means the same, so that windows of both kinds can follow one
//! another.
//!
//! * The procedure is a temporary one (`pg_temp`): it belongs to the session and ends with it, nothing of it is seen by or
//!   left for others. It takes the right TEMP on the database, which everybody has unless it was revoked, and PL/pgSQL, which is
//!   always there unless it was dropped. Without it, and behind a pooler, windows go one statement at a time.
//! * It is made when there is a backlog, not before: who writes a few events a second never needs it.
//! * **It proves no durability.** A COMMIT inside a procedure runs under the `statement_timeout` of the CALL; once that has
//!   fired, it stops waiting for a synchronous standby and the CALL succeeds all the same. So all its commits are
//!   asynchronous, and a statement of its own behind the CALL makes them durable (`Layout::barrier_sql`).
//! * Which events the ledger has already is looked up for the whole window at its start, and durability is turned off for
//!   the session until its end: each would cost a tenth of the time if every event did it for itself, as expressions are
//!   prepared again in each transaction. An event that somebody else stores meanwhile is refused by the ledger; the
//!   window is sent again one statement at a time.
//! * A failure ends it where it is; what was committed stays, and the ledger says how far it came. One that came before
//!   the first event (a text that is no JSON for this server) has no event it could be blamed on: the window is sent again
//!   one statement at a time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Statement};
use tracing::info;

use super::rows::StatementRow;
use super::verdict::step_error;
use crate::event::Envelope;
use crate::sink::DeliverError;

/// Events from which on a window goes through the procedure: below it, a message saved is not worth the arrays.
const CALLED_FROM: usize = 16;

/// How long windows go one statement at a time after a time-out.
const REST: Duration = Duration::from_secs(60);

/// Types of the parameters of the call: of [`Layout::NEXT_TYPES`](super::layout::Layout::NEXT_TYPES) what each event has as
/// an array, and the sources of the window.
const CALL_TYPES: [Type; 16] = [
    Type::UUID_ARRAY,
    Type::INT4_ARRAY,
    Type::INT8_ARRAY,
    Type::TIMESTAMPTZ_ARRAY,
    Type::TIMESTAMPTZ,
    Type::UUID,
    Type::TIMESTAMPTZ,
    Type::TIMESTAMPTZ_ARRAY,
    Type::TEXT_ARRAY,
    Type::JSONB_ARRAY,
    Type::INT4_ARRAY,
    Type::INT4_ARRAY,
    Type::INT4_ARRAY,
    Type::INT4_ARRAY,
    Type::INT4_ARRAY,
    Type::TEXT_ARRAY,
];

const CALL: &str =
    "CALL pg_temp.headspace_deliver($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, NULL)";

/// What [`sql`] is made of: names and expressions as the statements have them.
pub struct Parts<'a> {
    pub schema: &'a str,
    pub table: &'a str,
    pub next_id: &'a str,
    /// The column for the command.
    pub command: &'a str,
    /// The statement that notifies, if any: of `_row_id`.
    pub notify: String,
}

/// Makes the procedure. `_repeated` is null when the predecessor or a source is not there, and nothing was done; else
/// the places of the events that had been stored before.
pub fn sql(parts: &Parts<'_>) -> String {
    let Parts { schema, table, next_id, command, notify } = parts;
    let store = format!(
        "_row_id := {next_id};
               INSERT INTO {schema}.event_receipts
                      (event_id, row_id, source_id, byte_offset, captured_at, delivered_at)
               VALUES (_event_ids[_i], _row_id, _source_ids[_i], _byte_offsets[_i], _captured_at[_i], _window_time);
               INSERT INTO {table} (id, \"timestamp\", event_type, payload, project_id, agent_id, {command}, turn_id)
               OVERRIDING SYSTEM VALUE
               VALUES (_row_id, _timestamps[_i], _event_types[_i], _payloads[_i],
                       _project_ids[_i], _agent_ids[_i], _command_ids[_i], _turn_ids[_i]);
               {notify}"
    );
    format!(
        "CREATE OR REPLACE PROCEDURE pg_temp.headspace_deliver(
           _event_ids uuid[], _source_ids integer[], _byte_offsets bigint[], _captured_at timestamptz[],
           _window_time timestamptz, _predecessor uuid, _predecessor_time timestamptz,
           _timestamps timestamptz[], _event_types text[], _payloads jsonb[],
           _project_ids integer[], _agent_ids integer[], _command_ids integer[], _turn_ids integer[],
           _asked_ids integer[], _asked_paths text[], INOUT _repeated integer[])
         LANGUAGE plpgsql AS $headspace$
         DECLARE
           _last CONSTANT integer := cardinality(_event_ids);
           _known uuid[];
           _row_id bigint;
           _is_new boolean;
           _setting text;
         BEGIN
           IF _predecessor IS NOT NULL
              AND NOT EXISTS (SELECT FROM {schema}.event_receipts AS r
                               WHERE r.event_id = _predecessor
                                 AND (r.delivered_at = _predecessor_time OR r.seen_again_at = _predecessor_time))
              OR EXISTS (SELECT FROM unnest(_asked_ids, _asked_paths) AS asked (id, path)
                          WHERE NOT EXISTS (SELECT FROM {schema}.event_sources AS s
                                             WHERE s.id = asked.id AND s.path = asked.path)) THEN
             RETURN;
           END IF;
           -- The plan is kept while the ledger grows: it must not be one for an empty table.
           _setting := set_config('enable_seqscan', 'off', true);
           SELECT array_agg(r.event_id) INTO _known FROM {schema}.event_receipts AS r WHERE r.event_id = ANY (_event_ids);
           _repeated := '{{}}';
           _setting := set_config('synchronous_commit', 'off', false);
           IF _known IS NULL THEN
             FOR _i IN 1 .. _last LOOP
               {store}
               COMMIT;
             END LOOP;
           ELSE
             FOR _i IN 1 .. _last LOOP
               _is_new := _event_ids[_i] <> ALL (_known);
               IF NOT _is_new THEN
                 UPDATE {schema}.event_receipts AS r SET seen_again_at = _window_time WHERE r.event_id = _event_ids[_i];
                 _is_new := NOT FOUND;
               END IF;
               IF _is_new THEN
                 {store}
               ELSE
                 _repeated := _repeated || _i;
               END IF;
               COMMIT;
             END LOOP;
           END IF;
           RESET synchronous_commit;
         END
         $headspace$"
    )
}

/// Makes the procedure in a session; `None` where that can't be done.
pub async fn make(client: &Client, sql: &str) -> Option<Statement> {
    // It sets synchronous_commit for the session. Where what we asked for at the start of the connection does not hold, the
    // session is not ours alone.
    const IS_OURS: &str = "SELECT FROM pg_settings WHERE name = 'statement_timeout' AND source = 'client'";
    let making = async {
        if client.query_typed(IS_OURS, &[]).await?.is_empty() {
            return Ok(None);
        }
        client.batch_execute(sql).await?;
        client.prepare_typed(CALL, &CALL_TYPES).await.map(Some)
    };
    match making.await {
        Ok(Some(call)) => Some(call),
        Ok(None) => {
            info!("a backlog goes one statement at a time: there seems to be a pooler");
            None
        }
        Err(error) => {
            let error = step_error(&error);
            info!(%error, "a backlog goes one statement at a time: no temporary procedure can be made");
            None
        }
    }
}

/// Whether a call failed in the middle, at the event after those it committed. Else it failed as a whole, before the first:
/// when its parameters were read, among them the text of every event.
pub fn is_of_an_event(error: &tokio_postgres::Error) -> bool {
    let context = error.as_db_error().and_then(|error| error.where_());
    context.is_some_and(|context| context.contains("headspace_deliver"))
}

/// Whether the ledger, or a constraint of the table's, refused a second copy: of an event that came in by another way since
/// the window looked, perhaps. Statements tell which.
pub fn is_of_a_copy(error: &DeliverError) -> bool {
    error.sqlstate.as_deref() == Some("23505")
}

/// Which windows go through the procedure.
#[derive(Default)]
pub struct Calls {
    /// The last envelope of a window that failed: what is not after it goes one statement at a time.
    singly_through: AtomicU64,
    resting_until: Mutex<Option<Instant>>,
    /// The procedure does not stay, or may not commit.
    refused: AtomicBool,
}

impl Calls {
    pub fn take(&self, window: &[Envelope]) -> bool {
        let after = self.singly_through.load(Ordering::Relaxed);
        window.len() >= CALLED_FROM
            && window.first().is_some_and(|first| first.sequence.get() > after)
            && !self.refused.load(Ordering::Relaxed)
            && self.resting().is_none_or(|until| until <= Instant::now())
    }

    /// Whether a failure lies in the procedure being one: it was looked for in another session (a pooler that nobody
    /// noticed), or something does not let it commit.
    pub fn are_to_blame(&self, error: &DeliverError) -> bool {
        let to_blame = matches!(error.sqlstate.as_deref(), Some("42883" | "2D000" | "0A000"));
        if to_blame && !self.refused.swap(true, Ordering::Relaxed) {
            info!(%error, "a backlog goes one statement at a time: the temporary procedure can't be used");
        }
        to_blame
    }

    /// This window failed, and nobody knows for which event.
    pub fn avoid(&self, window: &[Envelope]) {
        if let Some(last) = window.last() {
            self.singly_through.fetch_max(last.sequence.get(), Ordering::Relaxed);
        }
    }

    /// A time-out may be the call's own, which is longer than a statement: for a while there is none.
    pub fn heed(&self, error: &DeliverError) {
        if error.sqlstate.as_deref() == Some("57014") {
            *self.resting() = Some(Instant::now() + REST);
        }
    }

    fn resting(&self) -> MutexGuard<'_, Option<Instant>> {
        self.resting_until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a window; gives the places of those that had been stored before, from 1 on, or `None` when nothing was done.
pub async fn deliver(
    client: &Client,
    call: &Statement,
    rows: &[StatementRow<'_>],
) -> Result<Option<Vec<i32>>, tokio_postgres::Error> {
    fn column<'a, T>(rows: &'a [StatementRow<'a>], of: impl Fn(&'a StatementRow<'a>) -> T) -> Vec<T> {
        rows.iter().map(of).collect()
    }
    let Some(first) = rows.first() else { return Ok(Some(Vec::new())) };
    let sources = first.window_sources;
    let (asked_ids, asked_paths) = (sources.map(|sources| sources.ids), sources.map(|sources| sources.paths));
    let parameters: [&(dyn ToSql + Sync); 16] = [
        &column(rows, |row| row.event_id),
        &column(rows, |row| row.source_id),
        &column(rows, |row| row.byte_offset),
        &column(rows, |row| row.captured_at),
        &first.window_time,
        &first.predecessor,
        &first.predecessor_time,
        &column(rows, |row| row.timestamp),
        &column(rows, |row| row.event_type),
        &column(rows, |row| row.payload),
        &column(rows, |row| row.project_id),
        &column(rows, |row| row.agent_id),
        &column(rows, |row| row.command_id),
        &column(rows, |row| row.turn_id),
        &asked_ids,
        &asked_paths,
    ];
    client.query_one(call, &parameters).await?.try_get(0)
}
