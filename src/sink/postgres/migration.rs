//! The SQL of what the program needs in Postgres, and its being made: the events' table where it is missing, the ledger, and
//! the routines that store events (`sql/`).
//!
//! The routines' names carry a hash of their text. So watchers of different versions, and those that found another column or
//! setting, each use their own.

use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

use super::layout::{Facts, Needs};
use super::verdict::step_error;
use crate::config::quote_identifier;
use crate::sink::DeliverError;

/// Serializes migrations of all watchers that use one database ("headspac" in ASCII).
const MIGRATION_LOCK: i64 = 0x6865_6164_7370_6163;

/// SQLSTATE of our own: a trigger dropped the row.
pub const ROW_DROPPED: &str = "HW001";

/// Chooses durability inside the statement, for this transaction alone, so that it also holds behind a pooler that
/// hands every transaction another server connection, and so that nothing of it is left for the pooler's next client.
///
/// A server or role that asks for less than `on` is overruled: what is taken out of the queue must be on the server's
/// disk, and on that of each standby the server requires. `remote_apply` asks for more and is kept. Warnings must reach
/// us: they tell that a commit did not wait ([`notices`](super::notices)). And plans are kept while the ledger grows: they must not
/// be those for an empty table.
pub const FLUSH: &str = "concat(set_config('enable_seqscan', 'off', true), set_config('client_min_messages', 'warning', true), \
     CASE WHEN current_setting('synchronous_commit') <> 'remote_apply' THEN set_config('synchronous_commit', 'on', true) END)";

const EVENTS_SQL: &str = include_str!("sql/events.sql");
const LEDGER_SQL: &str = include_str!("sql/ledger.sql");
const EARLIER_SQL: &str = include_str!("sql/earlier.sql");
const WIDE_IDS_SQL: &str = include_str!("sql/wide_ids.sql");
const SOURCE_SQL: &str = include_str!("sql/source.sql");
const STORE_SQL: &str = include_str!("sql/store.sql");
const DELIVER_SQL: &str = include_str!("sql/deliver.sql");

/// The routines that store events in one table, and their names.
#[derive(Clone)]
pub struct Routines {
    pub source: String,
    pub store: String,
    pub deliver: String,
    /// What creates them.
    pub sql: [String; 3],
}

/// What [`Routines`] are made of: names, safe in SQL, and expressions.
pub struct RoutineParts<'a> {
    pub ledger: &'a str,
    pub events: &'a str,
    /// The next `id` of the events.
    pub next_id: &'a str,
    /// The column for the command.
    pub command: &'a str,
    pub notify_channel: Option<&'a str>,
    /// The tables that say whose an event is, where they are to be asked.
    pub projects: Option<&'a str>,
    pub agents: Option<&'a str>,
}

impl Routines {
    pub fn new(parts: &RoutineParts<'_>) -> Routines {
        let notify = parts.notify_channel.map(quote_literal);
        let notify = notify.map(|channel| format!("PERFORM pg_notify({channel}, _row_id::text);")).unwrap_or_default();
        let insert = insert_sql(parts);
        let sql = [SOURCE_SQL, STORE_SQL, DELIVER_SQL].map(|sql| {
            sql.replace("{insert}", &insert)
                .replace("{notify}", &notify)
                .replace("{ledger}", parts.ledger)
                .replace("{events_literal}", &quote_literal(parts.events))
                .replace("{events}", parts.events)
                .replace("{next_id}", parts.next_id)
                .replace("{flush}", FLUSH)
                .replace("{row_dropped}", ROW_DROPPED)
        });
        let hash = xxhash_rust::xxh3::xxh3_64(sql.concat().as_bytes());
        let [source, store, deliver] = ["source", "store", "deliver"].map(|name| format!("{name}_{hash:016x}"));
        let sql =
            sql.map(|sql| sql.replace("{source}", &source).replace("{store}", &store).replace("{deliver}", &deliver));
        Routines { source, store, deliver, sql }
    }

    pub fn names(&self) -> [&String; 3] {
        [&self.source, &self.store, &self.deliver]
    }
}

/// Whose an event is, is looked up where the caller did not say it. What was found may be gone before the row refers to it: then
/// the row goes without.
fn insert_sql(parts: &RoutineParts<'_>) -> String {
    let insert = |project: &str, agent: &str| {
        format!(
            "INSERT INTO {{events}} (id, \"timestamp\", event_type, payload, project_id, agent_id, {}, turn_id)
             OVERRIDING SYSTEM VALUE
             VALUES (_row_id, _timestamp, _event_type, _json, {project}, {agent}, _command_id, _turn_id);",
            parts.command
        )
    };
    let given = insert("_project_id", "_agent_id");
    if parts.projects.is_none() && parts.agents.is_none() {
        return given;
    }
    let project = parts.projects.map(|projects| {
        format!(
            "IF _project_id IS NULL THEN
               SELECT id INTO _found_project FROM {projects} WHERE path = _json->>'project_path' LIMIT 1;
             END IF;"
        )
    });
    let agent = parts.agents.map(|agents| {
        format!(
            "IF _agent_id IS NULL THEN
               SELECT id INTO _found_agent FROM {agents}
                WHERE claude_session_id::text = _json->>'session_uuid' ORDER BY id DESC LIMIT 1;
             END IF;"
        )
    });
    let found = insert("coalesce(_project_id, _found_project)", "coalesce(_agent_id, _found_agent)");
    format!(
        "{}{}
         BEGIN
           {found}
         EXCEPTION WHEN foreign_key_violation THEN
           {given}
         END;",
        project.unwrap_or_default(),
        agent.unwrap_or_default()
    )
}

/// Creates what is missing, in one transaction; safe when several do it at once. Gives the names of what it made, and of what
/// it removed: with `tidy`, routines of other versions.
///
/// Waits for no synchronous standby: every event comes later in the write-ahead log, and its own commit waits.
pub async fn migrate(
    client: &mut Client,
    needs: &Needs,
    tidy: bool,
) -> Result<(Vec<String>, Vec<String>), DeliverError> {
    let transaction = client.transaction().await.map_err(|error| step_error(&error))?;
    let run = async |sql: &str| {
        let none: &[(&(dyn ToSql + Sync), Type)] = &[];
        transaction.query_typed(sql, none).await.map(drop).map_err(|error| step_error(&error))
    };
    // Whatever the default is: what is copied is what is there once the lock is held.
    run("SET TRANSACTION ISOLATION LEVEL READ COMMITTED").await?;
    run("SET LOCAL synchronous_commit = local").await?;
    // Receipts of an earlier version are copied, and there may be many.
    run("SET LOCAL statement_timeout = 0").await?;
    run("SET LOCAL lock_timeout = '5s'").await?;
    run(&format!("SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")).await?;
    let facts = Facts::find(&transaction, needs).await?;
    for sql in table_statements(needs, &facts)? {
        run(&sql).await?;
    }
    let now = Facts::find(&transaction, needs).await?;
    let (layout, plain) = (now.layout(needs)?, now.without_owners().layout(needs)?);
    for routines in [&layout.routines, &plain.routines] {
        if !facts.has_routines(routines) {
            for sql in &routines.sql {
                run(sql).await?;
            }
        }
    }
    let mut removed = Vec::new();
    if tidy {
        for name in facts.other_routines(&[&layout.routines, &plain.routines]) {
            run(&format!("DROP ROUTINE {}.{}", layout.ledger, quote_identifier(name))).await?;
            removed.push(name.to_owned());
        }
    }
    transaction.commit().await.map_err(|error| step_error(&error))?;
    Ok((facts.missing(needs)?, removed))
}

/// The SQL of [`migrate`] for people to read and run: for the database as it is, with the rights that `user` needs where
/// another one runs it.
pub fn printable_sql(needs: &Needs, facts: &Facts, user: Option<&str>) -> Result<String, DeliverError> {
    let mut sql = vec!["BEGIN ISOLATION LEVEL READ COMMITTED".to_owned()];
    sql.extend(table_statements(needs, facts)?);
    let (layout, plain) = (facts.layout(needs)?, facts.without_owners().layout(needs)?);
    for routines in [&layout.routines, &plain.routines] {
        if !facts.has_routines(routines) {
            sql.extend(routines.sql.iter().cloned());
        }
    }
    if let Some(user) = user.map(quote_identifier) {
        let ledger = &layout.ledger;
        sql.push(format!("GRANT USAGE ON SCHEMA {ledger} TO {user}"));
        sql.push(format!("GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA {ledger} TO {user}"));
        sql.push(format!("GRANT USAGE ON ALL SEQUENCES IN SCHEMA {ledger} TO {user}"));
        sql.push(format!("GRANT EXECUTE ON ALL ROUTINES IN SCHEMA {ledger} TO {user}"));
        sql.push(format!("GRANT INSERT ON {} TO {user}", layout.events));
        sql.extend(layout.sequence.map(|sequence| format!("GRANT USAGE ON SEQUENCE {sequence} TO {user}")));
    }
    sql.push("COMMIT".to_owned());
    Ok(sql.iter().map(|statement| format!("{};\n", statement.trim_end())).collect())
}

/// What makes the tables.
fn table_statements(needs: &Needs, facts: &Facts) -> Result<Vec<String>, DeliverError> {
    let ledger = quote_identifier(&needs.ledger_schema);
    let mut sql = Vec::new();
    if !facts.has_events {
        let text = EVENTS_SQL.replace("{schema}", &quote_identifier(facts.schema(needs)?));
        sql.extend(statements(&text.replace("{events}", &quote_identifier(&needs.events.table))));
    }
    if !facts.has_schema {
        sql.push(format!("CREATE SCHEMA IF NOT EXISTS {ledger}"));
    }
    if !facts.has_ledger {
        sql.extend(statements(&LEDGER_SQL.replace("{ledger}", &ledger)));
    }
    if facts.has_narrow_ids {
        sql.extend(statements(&WIDE_IDS_SQL.replace("{ledger}", &ledger)));
    }
    if let Some(earlier) = facts.earlier_ledger.as_deref().map(quote_identifier) {
        sql.extend(statements(&EARLIER_SQL.replace("{ledger}", &ledger).replace("{earlier}", &earlier)));
    }
    Ok(sql)
}

/// The statements of a text in which each ends a line.
fn statements(sql: &str) -> impl Iterator<Item = String> {
    sql.split(";\n").map(|statement| statement.trim().to_owned()).filter(|statement| !statement.is_empty())
}

/// A literal that is right whatever standard_conforming_strings says.
pub fn quote_literal(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('\'', "''");
    if text.contains('\\') { format!("E'{escaped}'") } else { format!("'{escaped}'") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TableName;

    fn needs() -> Needs {
        Needs {
            events: TableName { schema: Some("audit".to_owned()), table: "my \"events\"".to_owned() },
            ledger_schema: "it's".to_owned(),
            notify_channel: Some("news".to_owned()),
        }
    }

    #[test]
    fn printed_sql_has_no_placeholder_left() {
        let needs = needs();
        let sql = printable_sql(&needs, &Facts::none(&needs), Some("me")).unwrap();
        for name in
            ["schema", "events", "ledger", "store", "deliver", "insert", "notify", "next_id", "flush", "row_dropped"]
        {
            assert!(!sql.contains(&format!("{{{name}")), "{name}: {sql}");
        }
        assert!(sql.contains("CREATE TABLE \"audit\".\"my \"\"events\"\"\""), "{sql}");
        assert!(sql.contains("CREATE SCHEMA IF NOT EXISTS \"it's\""), "{sql}");
    }

    #[test]
    fn literals_are_quoted() {
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal("a\\b"), "E'a\\\\b'");
    }
}
