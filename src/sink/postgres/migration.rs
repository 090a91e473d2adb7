//! Creates what the program needs in Postgres: the events' table where it is missing, the ledger, and the routines.

use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

use super::connect::{ConnectSettings, Pooler, connect, connect_and_look, open};
use super::layout::{Facts, Needs};
use super::verdict::step_error;
use crate::config::quote_identifier;
use crate::sink::DeliverError;

/// Serializes migrations of all watchers that use one database ("headspac" in ASCII).
const MIGRATION_LOCK: i64 = 0x6865_6164_7370_6163;

const EVENTS_SQL: &str = include_str!("sql/events.sql");
const LEDGER_SQL: &str = include_str!("sql/ledger.sql");
const EARLIER_SQL: &str = include_str!("sql/earlier.sql");
const WIDE_IDS_SQL: &str = include_str!("sql/wide_ids.sql");

/// Creates what is missing in the database, and removes routines that are not of this version and configuration. Returns the
/// names of what it created, and of what it removed.
pub(crate) async fn migrate(settings: &ConnectSettings) -> Result<(Vec<String>, Vec<String>), DeliverError> {
    let (mut client, _) = connect(settings, &Pooler::default(), open).await?;
    create_missing(&mut client, &settings.needs, true).await
}

/// The SQL of [`migrate`] for people to read and run: for the database of `settings`, else for an empty one.
pub(crate) async fn printable_sql(needs: &Needs, settings: Option<&ConnectSettings>) -> Result<String, DeliverError> {
    let Some(settings) = settings else { return sql_for(needs, &Facts::none(needs), None) };
    let (_client, facts) = connect_and_look(settings).await?;
    let user = (settings.target)().ok().flatten().map(|target| target.user);
    sql_for(needs, &facts, user.as_deref())
}

/// Creates what is missing, in one transaction; safe when several do it at once. Returns the names of what it created, and of
/// what it removed: with `tidy`, routines of other versions.
///
/// Waits for no synchronous standby: every event comes later in the write-ahead log, and its own commit waits.
pub(super) async fn create_missing(
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
        if !facts.has_routines(&routines.names()) {
            for sql in &routines.sql {
                run(sql).await?;
            }
        }
    }
    let mut made = facts.missing(needs)?;
    let has_views = facts.has_routines(&layout.views.names());
    if now.has_room_for_views && (tidy || !has_views) {
        for sql in statements(&layout.views.sql) {
            run(&sql).await?;
        }
        if !has_views {
            made.extend(["turns", "sessions"].map(|view| format!("{}.{view}", needs.ledger_schema)));
        }
    }
    let mut removed = Vec::new();
    if tidy {
        let used = [&layout.routines.names()[..], &plain.routines.names(), &layout.views.names()].concat();
        for name in facts.other_routines(&used) {
            run(&format!("DROP ROUTINE {}.{}", layout.ledger, quote_identifier(name))).await?;
            removed.push(name.to_owned());
        }
    }
    transaction.commit().await.map_err(|error| step_error(&error))?;
    Ok((made, removed))
}

/// The SQL for the database as it is, with the rights that `user` needs where another one runs it.
fn sql_for(needs: &Needs, facts: &Facts, user: Option<&str>) -> Result<String, DeliverError> {
    let mut sql = vec!["BEGIN ISOLATION LEVEL READ COMMITTED".to_owned()];
    sql.extend(table_statements(needs, facts)?);
    let (layout, plain) = (facts.layout(needs)?, facts.without_owners().layout(needs)?);
    for routines in [&layout.routines, &plain.routines] {
        if !facts.has_routines(&routines.names()) {
            sql.extend(routines.sql.iter().cloned());
        }
    }
    if facts.has_room_for_views && !facts.has_routines(&layout.views.names()) {
        sql.extend(statements(&layout.views.sql));
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
        let sql = sql_for(&needs, &Facts::none(&needs), Some("me")).unwrap();
        for name in
            ["schema", "events", "ledger", "store", "deliver", "insert", "notify", "next_id", "flush", "row_dropped"]
        {
            assert!(!sql.contains(&format!("{{{name}")), "{name}: {sql}");
        }
        assert!(sql.contains("CREATE TABLE \"audit\".\"my \"\"events\"\"\""), "{sql}");
        assert!(sql.contains("CREATE SCHEMA IF NOT EXISTS \"it's\""), "{sql}");
    }
}
