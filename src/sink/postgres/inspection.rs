//! What `check` wants to know of the database. Changes nothing.

use std::time::Instant;

use tokio_postgres::types::{ToSql, Type};

use super::connect::{ConnectSettings, connect_and_look, limited};
use super::verdict::{no_answer, step_error};
use crate::event::Timestamp;
use crate::sink::DeliverError;

/// The database as `check` finds it.
pub struct Inspection {
    pub version: String,
    /// 150004 is 15.4.
    pub version_number: i32,
    /// Names of what is not there.
    pub missing: Vec<String>,
    /// Why events can't be stored in the tables though all are there: a column of another type, say.
    pub unfit: Option<String>,
    /// Privileges that are needed and not there: `INSERT on events`.
    pub lacks: Vec<String>,
    /// Whether the schema that the configuration names is not there.
    pub schema_missing: bool,
    /// Whether what is missing may be created.
    pub may_create: bool,
    pub is_read_only: bool,
    /// Of the database: `UTF8`.
    pub encoding: String,
    /// Triggers that may drop or change a row before it is stored.
    pub triggers: Vec<String>,
    /// The node of Citus that holds the events, `host:port`, when it is another one.
    pub other_node: Option<String>,
    /// How far the server's clock is ahead of ours.
    pub clock_ahead: jiff::SignedDuration,
}

const INSPECT_SQL: &str = include_str!("sql/inspect.sql");
const CITUS_SQL: &str = include_str!("sql/citus.sql");

pub async fn inspect(settings: &ConnectSettings) -> Result<Inspection, DeliverError> {
    let needs = &settings.needs;
    let (client, facts) = connect_and_look(settings).await?;
    let missing = facts.missing(needs)?;
    let mut routines = Vec::new();
    let mut unfit = None;
    if facts.has_events {
        let layout = facts.layout(needs)?;
        unfit = limited(settings, layout.try_out(&client)).await.err();
        routines = layout.routines.names().map(String::clone).to_vec();
    }
    let ask = async |sql: &str, parameters: &[(&(dyn ToSql + Sync), Type)]| {
        let asking = async { client.query_typed(sql, parameters).await.map_err(|error| step_error(&error)) };
        limited(settings, asking).await
    };
    let events = needs.events.quoted();
    let parameters: [(&(dyn ToSql + Sync), Type); 4] = [
        (&events, Type::TEXT),
        (&needs.events.schema, Type::TEXT),
        (&needs.ledger_schema, Type::TEXT),
        (&routines, Type::TEXT_ARRAY),
    ];
    let asked = Instant::now();
    let rows = ask(INSPECT_SQL, &parameters).await?;
    let Some(row) = rows.first() else { return Err(no_answer(settings.statement_timeout)) };
    // The server looked at its clock somewhere between asking and hearing.
    let ours = Timestamp::now() - asked.elapsed() / 2;
    let nodes = if row.get("has_citus") { ask(CITUS_SQL, &[(&events, Type::TEXT)]).await? } else { Vec::new() };
    Ok(Inspection {
        version: row.get("version"),
        version_number: row.get("version_number"),
        missing,
        unfit: unfit.map(|error| error.message),
        lacks: row.get("lacks"),
        may_create: row.get("may_create"),
        is_read_only: row.get("is_read_only"),
        clock_ahead: row.get::<_, Timestamp>("time").duration_since(ours),
        schema_missing: row.get("schema_missing"),
        encoding: row.get("encoding"),
        triggers: row.get("triggers"),
        other_node: nodes.first().map(|row| row.get(0)),
    })
}
