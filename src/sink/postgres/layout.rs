//! The tables: finding them, creating what is missing, and the statements that fit them.

use tokio_postgres::types::private::BytesMut;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, GenericClient};

use super::procedure;
use super::verdict::step_error;
use crate::config::TableName;
use crate::sink::{DeliverError, Verdict};

/// Serializes migrations of all watchers that use one database ("headspac" in ASCII).
const MIGRATION_LOCK: i64 = 0x6865_6164_7370_6163;

const SCHEMA_SQL: &str = include_str!("../schema.sql");

/// What stands in the database, and the SQL that fits it.
pub struct Layout {
    /// Stores the first event of a window and its receipt; parameters are of [`Layout::FIRST_TYPES`].
    pub first_sql: String,
    /// Stores one of the others; parameters are of [`Layout::NEXT_TYPES`].
    pub next_sql: String,
    /// Makes the procedure that stores a whole window ([`procedure`]).
    pub procedure_sql: String,
    /// Which of the events `$1` the window of the time `$2` dealt with, and whether they had been stored before.
    pub stored_sql: String,
    /// Writes and commits synchronously without changing anything: `$1` is a host in `event_sources`. Only where the event
    /// `$2` was dealt with at the time of the window `$3`; else it returns no row.
    pub barrier_sql: String,
    /// The ids of the sources `($1::text, unnest($2::text[]))`, made where they are new.
    pub sources_sql: String,
    /// The tables, qualified and quoted.
    pub events: String,
    pub receipts: String,
}

/// What [`inspect`] found.
pub enum Found {
    Complete(Box<Layout>),
    /// Names the tables that are not there.
    Missing(Vec<String>),
}

/// Looks at the tables without changing anything.
pub async fn inspect(
    client: &impl GenericClient,
    events: &TableName,
    notify_channel: Option<&str>,
) -> Result<Found, DeliverError> {
    // One message and one answer, here and below: behind a pooler what was prepared before may be gone.
    let rows = client
        .query_typed(
            "SELECT n.nspname::text, pg_get_serial_sequence(to_regclass($1)::text, 'id'),
                    to_regclass(quote_ident(n.nspname) || '.event_receipts') IS NOT NULL,
                    to_regclass(quote_ident(n.nspname) || '.event_sources') IS NOT NULL,
                    (SELECT pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef d
                       JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
                      WHERE d.adrelid = c.oid AND a.attname = 'id'),
                    ARRAY(SELECT attname::text FROM pg_attribute
                           WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)
               FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE c.oid = to_regclass($1)",
            &[(&events.quoted(), Type::TEXT)],
        )
        .await
        .map_err(|error| step_error(&error))?;
    let Some(row) = rows.first() else {
        return Ok(Found::Missing(vec![events.quoted()]));
    };
    let schema: String = row.get(0);
    let (receipts, sources): (bool, bool) = (row.get(2), row.get(3));
    let missing: Vec<String> = [("event_receipts", receipts), ("event_sources", sources)]
        .into_iter()
        .filter(|(_, there)| !there)
        .map(|(name, _)| format!("{}.{name}", quote_identifier(&schema)))
        .collect();
    if !missing.is_empty() {
        return Ok(Found::Missing(missing));
    }
    let sequence: Option<String> = row.get(1);
    let id_default: Option<String> = row.get(4);
    let next_id = match (sequence, id_default) {
        (Some(sequence), _) => format!("nextval({})", quote_literal(&sequence)),
        (None, Some(default)) => default,
        (None, None) => return Err(odd_table(events, "its column \"id\" has neither a sequence nor a default")),
    };
    let columns: Vec<String> = row.get(5);
    let has = |name: &str| columns.iter().any(|column| column == name);
    for name in ["id", "timestamp", "event_type", "payload", "project_id", "agent_id", "turn_id"] {
        if !has(name) {
            return Err(odd_table(events, &format!("it has no column \"{name}\"")));
        }
    }
    let command = match (has("command_id"), has("task_id")) {
        (true, _) => "command_id",
        (false, true) => "task_id",
        (false, false) => return Err(odd_table(events, "it has neither a column \"command_id\" nor \"task_id\"")),
    };
    let schema = quote_identifier(&schema);
    let table = format!("{schema}.{}", quote_identifier(&events.table));
    Ok(Found::Complete(Box::new(Layout {
        first_sql: deliver_sql(&schema, &table, &next_id, command, notify_channel, &first_condition(&schema)),
        next_sql: deliver_sql(&schema, &table, &next_id, command, notify_channel, &next_condition(&schema)),
        procedure_sql: procedure::sql(&procedure::Parts {
            schema: &schema,
            table: &table,
            next_id: &next_id,
            command,
            notify: notify_channel
                .map(|channel| format!("PERFORM pg_notify({}, _row_id::text);", quote_literal(channel)))
                .unwrap_or_default(),
        }),
        stored_sql: format!(
            "SELECT event_id, seen_again_at IS NOT NULL FROM {schema}.event_receipts
              WHERE event_id = ANY ($1) AND (delivered_at = $2 OR seen_again_at = $2)"
        ),
        barrier_sql: format!(
            "WITH written AS (UPDATE {schema}.event_sources SET path = path
                               WHERE id = (SELECT id FROM {schema}.event_sources WHERE host = $1 LIMIT 1)
                                 AND EXISTS (SELECT FROM {schema}.event_receipts
                                              WHERE event_id = $2 AND (delivered_at = $3 OR seen_again_at = $3))
                               RETURNING id)
             SELECT {FLUSH} FROM written"
        ),
        sources_sql: format!(
            "INSERT INTO {schema}.event_sources AS s (host, path) SELECT $1::text, unnest($2::text[])
             ON CONFLICT (host, path) DO UPDATE SET path = s.path RETURNING id, path"
        ),
        receipts: format!("{schema}.event_receipts"),
        events: table,
    })))
}

/// Chooses durability inside the statement, for this transaction alone, so that it also holds behind a pooler that
/// hands every transaction another server connection.
///
/// A server or role that asks for less than `on` is overruled: what is taken out of the queue must be on the server's
/// disk, and on that of each standby the server requires. `remote_apply` asks for more and is kept. Warnings must reach
/// us: they tell that a commit did not wait ([`notices`](super::notices)).
pub const FLUSH: &str = "concat(set_config('client_min_messages', 'warning', true),
                          CASE WHEN current_setting('synchronous_commit') <> 'remote_apply'
                               THEN set_config('synchronous_commit', 'on', true) END)";

/// Leaves durability to a later transaction on the same connection, for this transaction alone.
pub const RELAX: &str = "set_config('synchronous_commit', 'off', true)";

/// One event, exactly once, in order, in one statement and so in one transaction.
///
/// * The receipt refuses a second copy. A copy marks the receipt (`seen_again_at`), so that it counts as a
///   predecessor below and so that its commit writes: a transaction that writes nothing flushes nothing. That mark is
///   also what tells a copy from a new event: `xmax`, which would too, can't be asked for in a partitioned table.
/// * The receipt is only made on a `condition`: that the predecessor has been here in *this* delivery of it (its
///   receipt carries its window's time). So nothing that follows a failed transaction is stored, duplicates or not.
/// * Result: no row: the condition does not hold, nothing was done. One row: whether the event was new.
fn deliver_sql(
    schema: &str,
    table: &str,
    next_id: &str,
    command: &str,
    notify_channel: Option<&str>,
    condition: &str,
) -> String {
    let notify = match notify_channel {
        Some(channel) => {
            format!(", CASE WHEN is_new THEN pg_notify({}, row_id::text)::text END", quote_literal(channel))
        }
        None => String::new(),
    };
    format!(
        "WITH receipt AS (
           INSERT INTO {schema}.event_receipts AS r (event_id, row_id, source_id, byte_offset, captured_at, delivered_at)
           SELECT $1, {next_id}, $2, $3, $4, $5 WHERE {condition}
           ON CONFLICT (event_id) DO UPDATE SET seen_again_at = $5
           RETURNING row_id, r.seen_again_at IS NULL AS is_new,
                     CASE WHEN $8 THEN {RELAX} ELSE {FLUSH} END
         ), stored AS (
           INSERT INTO {table} (id, \"timestamp\", event_type, payload, project_id, agent_id, {command}, turn_id)
           OVERRIDING SYSTEM VALUE
           SELECT row_id, $9, $10, $11, $12, $13, $14, $15 FROM receipt WHERE is_new
         )
         SELECT is_new{notify} FROM receipt"
    )
}

/// The event before this one has been dealt with, at the time of its window.
fn next_condition(schema: &str) -> String {
    format!(
        "EXISTS (SELECT FROM {schema}.event_receipts
                  WHERE event_id = $6 AND (delivered_at = $7 OR seen_again_at = $7))"
    )
}

/// As [`next_condition`] where there is an event before this one; and the sources that the window speaks of are still
/// what they were when this session asked for them.
fn first_condition(schema: &str) -> String {
    format!(
        "($6::uuid IS NULL OR {})
         AND NOT EXISTS (SELECT FROM unnest($16, $17) AS asked (id, path)
                          WHERE NOT EXISTS (SELECT FROM {schema}.event_sources AS s
                                             WHERE s.id = asked.id AND s.path = asked.path))",
        next_condition(schema)
    )
}

impl Layout {
    /// Types of the parameters of `next_sql`: event_id, source_id, byte_offset, captured_at, the window's time; the
    /// predecessor's event_id and the time of its window; whether durability waits for a later transaction; timestamp,
    /// event_type, payload, project_id, agent_id, command_id, turn_id.
    pub const NEXT_TYPES: [Type; 15] = [
        Type::UUID,
        Type::INT4,
        Type::INT8,
        Type::TIMESTAMPTZ,
        Type::TIMESTAMPTZ,
        Type::UUID,
        Type::TIMESTAMPTZ,
        Type::BOOL,
        Type::TIMESTAMPTZ,
        Type::TEXT,
        Type::JSONB,
        Type::INT4,
        Type::INT4,
        Type::INT4,
        Type::INT4,
    ];

    /// Those of `first_sql`: the same, then ids and paths of the window's sources.
    pub const FIRST_TYPES: [Type; 17] = [
        Type::UUID,
        Type::INT4,
        Type::INT8,
        Type::TIMESTAMPTZ,
        Type::TIMESTAMPTZ,
        Type::UUID,
        Type::TIMESTAMPTZ,
        Type::BOOL,
        Type::TIMESTAMPTZ,
        Type::TEXT,
        Type::JSONB,
        Type::INT4,
        Type::INT4,
        Type::INT4,
        Type::INT4,
        Type::INT4_ARRAY,
        Type::TEXT_ARRAY,
    ];
}

/// A null of whatever type.
#[derive(Debug)]
struct Null;

impl ToSql for Null {
    fn to_sql(&self, _: &Type, _: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        Ok(IsNull::Yes)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

/// Has the server plan the statement that stores events, and nothing more: whether the columns take what it gives them.
/// A privilege that is lacking counts as fitting: it is found by its name.
pub async fn try_out(client: &Client, layout: &Layout) -> Result<(), DeliverError> {
    let parameters = Layout::FIRST_TYPES.map(|parameter| (&Null as &(dyn ToSql + Sync), parameter));
    let Err(error) = client.query_typed(&format!("EXPLAIN {}", layout.first_sql), &parameters).await else {
        return Ok(());
    };
    let error = step_error(&error);
    match error.sqlstate.as_deref() {
        Some("42501") => Ok(()),
        _ => Err(error),
    }
}

/// Creates what is missing, in one transaction; safe when several do it at once. Gives the names of what it made.
///
/// Waits for no synchronous standby: every event comes later in the write-ahead log, and its own commit waits.
pub async fn migrate(client: &mut Client, events: &TableName) -> Result<Vec<String>, DeliverError> {
    let transaction = client.transaction().await.map_err(|error| step_error(&error))?;
    let locally = "SET LOCAL synchronous_commit = local";
    transaction.batch_execute(locally).await.map_err(|error| step_error(&error))?;
    transaction
        .query_typed("SELECT pg_advisory_xact_lock($1)", &[(&MIGRATION_LOCK, Type::INT8)])
        .await
        .map_err(|error| step_error(&error))?;
    let missing = match inspect(&transaction, events, None).await? {
        Found::Complete(_) => Vec::new(),
        Found::Missing(missing) => missing,
    };
    if !missing.is_empty() {
        let create_events = missing.contains(&events.quoted());
        let schema: String = match &events.schema {
            Some(schema) => schema.clone(),
            None => transaction
                .query_typed(
                    "SELECT coalesce((SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                                       WHERE c.oid = to_regclass($1)), current_schema())::text",
                    &[(&events.quoted(), Type::TEXT)],
                )
                .await
                .map_err(|error| step_error(&error))?
                .first()
                .and_then(|row| row.get::<_, Option<String>>(0))
                .ok_or_else(|| odd_table(events, "the role's search_path names no schema that exists"))?,
        };
        let sql = schema_sql(&quote_identifier(&schema), &quote_identifier(&events.table), create_events);
        transaction.batch_execute(&sql).await.map_err(|error| step_error(&error))?;
    }
    transaction.commit().await.map_err(|error| step_error(&error))?;
    Ok(missing)
}

/// The SQL of [`migrate`] for people to read and run.
pub fn printable_sql(events: &TableName) -> String {
    let schema = quote_identifier(events.schema.as_deref().unwrap_or("public"));
    schema_sql(&schema, &quote_identifier(&events.table), true)
}

fn schema_sql(schema: &str, events: &str, create_events: bool) -> String {
    let (events_part, ledger_part) = SCHEMA_SQL.split_once("-- ledger\n").unwrap_or((SCHEMA_SQL, ""));
    let sql = if create_events { format!("{events_part}\n{ledger_part}") } else { ledger_part.to_owned() };
    sql.replace("{schema}", schema).replace("{events}", events)
}

fn odd_table(events: &TableName, problem: &str) -> DeliverError {
    DeliverError {
        verdict: Verdict::Operator,
        sqlstate: None,
        message: format!(
            "the table {} can't be used: {problem}; set database.events_table to another name or mend the table",
            events.quoted()
        ),
    }
}

fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A literal that is right whatever standard_conforming_strings says.
fn quote_literal(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('\'', "''");
    if text.contains('\\') { format!("E'{escaped}'") } else { format!("'{escaped}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printed_sql_has_no_placeholder_left() {
        let sql = printable_sql(&TableName { schema: Some("audit".to_owned()), table: "my \"events\"".to_owned() });
        assert!(!sql.contains("{schema}") && !sql.contains("{events}"), "{sql}");
        assert!(sql.contains("CREATE TABLE \"audit\".\"my \"\"events\"\"\""), "{sql}");
    }

    #[test]
    fn literals_are_quoted() {
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal("a\\b"), "E'a\\\\b'");
    }
}
