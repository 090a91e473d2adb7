//! What stands in the database, and the statements that fit it.

use std::ops::RangeInclusive;

use tokio_postgres::types::Type;
use tokio_postgres::{Client, GenericClient};

use super::routines::{FLUSH, NAMES, RoutineParts, Routines, Views, quote_literal};
use super::verdict::step_error;
use crate::config::{TableName, quote_identifier};
use crate::sink::{DeliverError, Verdict};

/// Bytes of the longest name that Postgres keeps whole.
const NAME_BYTES_MAX: usize = 63;

/// What the configuration asks for.
#[derive(Clone, Debug)]
pub struct Needs {
    pub events: TableName,
    /// The schema of the program's own tables and routines.
    pub ledger_schema: String,
    /// NOTIFY this channel with each row's id.
    pub notify_channel: Option<String>,
}

/// What stands in the database.
#[derive(Clone)]
pub(super) struct Facts {
    pub has_events: bool,
    /// Of the events; where they are missing, the one in which they would be made.
    schema: Option<String>,
    /// The sequence of the events' `id`, and its default.
    sequence: Option<String>,
    id_default: Option<String>,
    columns: Vec<String>,
    /// Whether the tables that say whose an event is are there, and may be read.
    has_projects: bool,
    has_agents: bool,
    pub has_schema: bool,
    pub has_ledger: bool,
    /// Ids of the ledger are integers, as an earlier version made them.
    pub has_narrow_ids: bool,
    /// Where an earlier version's ledger stands beside the events.
    pub earlier_ledger: Option<String>,
    /// Whether no relation of others has a name of our views.
    pub has_room_for_views: bool,
    /// Functions and procedures in the ledger's schema.
    routines: Vec<String>,
}

/// Names of the tables and routines, qualified and quoted, and the statements that use them.
pub(super) struct Layout {
    pub events: String,
    pub ledger: String,
    pub receipts: String,
    pub sources: String,
    /// That of the events' `id`, if it has one.
    pub sequence: Option<String>,
    pub routines: Routines,
    pub views: Views,
    /// Stores one event.
    pub store_sql: String,
    /// Stores a window.
    pub deliver_sql: String,
    /// Tells how far a window came, and makes that durable.
    pub progress_sql: String,
    try_out_sql: String,
}

/// One message and one answer: behind a pooler what was prepared before may be gone.
const FACTS_SQL: &str = include_str!("sql/facts.sql");
const PROGRESS_SQL: &str = include_str!("sql/progress.sql");
const TRY_OUT_SQL: &str = include_str!("sql/try_out.sql");

impl Facts {
    /// Looks without changing anything.
    pub(super) async fn find(client: &impl GenericClient, needs: &Needs) -> Result<Facts, DeliverError> {
        let Needs { events, ledger_schema, .. } = needs;
        let rows = client
            .query_typed(
                FACTS_SQL,
                &[(&events.quoted(), Type::TEXT), (&events.schema, Type::TEXT), (ledger_schema, Type::TEXT)],
            )
            .await
            .map_err(|error| step_error(&error))?;
        let row = rows.first().ok_or_else(|| unusable(events, "the server says nothing about it"))?;
        let schema: Option<String> = row.get("schema");
        Ok(Facts {
            has_events: row.get("has_events"),
            earlier_ledger: schema.clone().filter(|_| row.get("has_earlier_ledger")),
            schema,
            sequence: row.get("sequence"),
            id_default: row.get("id_default"),
            columns: row.get("columns"),
            has_projects: row.get("has_projects"),
            has_agents: row.get("has_agents"),
            has_schema: row.get("has_schema"),
            has_ledger: row.get("has_ledger"),
            has_narrow_ids: row.get("has_narrow_ids"),
            has_room_for_views: row.get("has_room_for_views"),
            routines: row.get("routines"),
        })
    }

    /// An empty database.
    pub(super) fn none(needs: &Needs) -> Facts {
        Facts {
            has_events: false,
            schema: Some(needs.events.schema.clone().unwrap_or_else(|| "public".to_owned())),
            sequence: None,
            id_default: None,
            columns: Vec::new(),
            has_projects: false,
            has_agents: false,
            has_schema: false,
            has_ledger: false,
            has_narrow_ids: false,
            has_room_for_views: true,
            earlier_ledger: None,
            routines: Vec::new(),
        }
    }

    /// That of the events.
    pub(super) fn schema(&self, needs: &Needs) -> Result<&str, DeliverError> {
        let none = || unusable(&needs.events, "the role's search_path names no schema that exists");
        self.schema.as_deref().ok_or_else(none)
    }

    /// Tables that are not there, and what is not as it should be with those that are.
    pub(super) fn missing_tables(&self, needs: &Needs) -> Vec<String> {
        let ledger = &needs.ledger_schema;
        let events = (!self.has_events).then(|| needs.events.to_string());
        let tables = (!self.has_ledger).then(|| format!("{ledger}.event_receipts, {ledger}.event_sources"));
        let narrow = self.has_narrow_ids.then(|| format!("bigint ids in {ledger}"));
        let earlier = self
            .earlier_ledger
            .as_ref()
            .map(|schema| format!("the receipts in {schema}.event_receipts, which belong into {ledger}"));
        [events, tables, narrow, earlier].into_iter().flatten().collect()
    }

    /// As [`Facts::missing_tables`], with the routines.
    pub(super) fn missing(&self, needs: &Needs) -> Result<Vec<String>, DeliverError> {
        let mut missing = self.missing_tables(needs);
        if self.has_events {
            let layout = self.layout(needs)?;
            if !self.has_routines(&layout.routines.names()) {
                let names = layout.routines.names().map(|name| format!("{}.{name}", needs.ledger_schema));
                missing.extend(names);
            }
        }
        Ok(missing)
    }

    /// As a role that may not ask whose an event is. Its routines always stand beside the others.
    pub(super) fn without_owners(&self) -> Facts {
        Facts { has_projects: false, has_agents: false, ..self.clone() }
    }

    pub(super) fn has_routines(&self, names: &[&String]) -> bool {
        names.iter().all(|name| self.routines.contains(name))
    }

    /// Those of other versions, or of another configuration.
    pub(super) fn other_routines(&self, used: &[&String]) -> impl Iterator<Item = &String> {
        let is_ours = |name: &String| {
            name.split_once('_').is_some_and(|(name, hash)| {
                let is_hash = hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
                is_hash && NAMES.contains(&name)
            })
        };
        self.routines.iter().filter(move |name| is_ours(name) && !used.contains(name))
    }

    /// The statements for the tables as they are; for events as they would be made, where there are none.
    pub(super) fn layout(&self, needs: &Needs) -> Result<Layout, DeliverError> {
        let Needs { events, ledger_schema, notify_channel } = needs;
        let schema = quote_identifier(self.schema(needs)?);
        let ledger = quote_identifier(ledger_schema);
        let table = format!("{schema}.{}", quote_identifier(&events.table));
        let (sequence, command) = if self.has_events {
            (self.sequence.clone(), self.command(events)?)
        } else {
            // As Postgres will name it.
            let table = events.table.get(..events.table.floor_char_boundary(NAME_BYTES_MAX - "_id_seq".len()));
            let sequence = format!("{}_id_seq", table.unwrap_or_default());
            (Some(format!("{}.{}", as_printed(self.schema(needs)?), as_printed(&sequence))), "command_id")
        };
        let next_id = match (&sequence, &self.id_default) {
            (Some(sequence), _) => format!("nextval({})", quote_literal(sequence)),
            (None, Some(default)) => default.clone(),
            (None, None) => return Err(unusable(events, "its column \"id\" has neither a sequence nor a default")),
        };
        let projects = self.has_projects.then(|| format!("{schema}.projects"));
        let agents = self.has_agents.then(|| format!("{schema}.agents"));
        let routines = Routines::new(&RoutineParts {
            ledger: &ledger,
            events: &table,
            next_id: &next_id,
            command,
            notify_channel: notify_channel.as_deref(),
            projects: projects.as_deref(),
            agents: agents.as_deref(),
        });
        let (receipts, sources) = (format!("{ledger}.event_receipts"), format!("{ledger}.event_sources"));
        Ok(Layout {
            store_sql: format!(
                "SELECT {ledger}.{}(true, $1, $2, $3, true, $4, {ledger}.{}($5, $6), {})",
                routines.store,
                routines.source,
                parameters(7..=15)
            ),
            deliver_sql: format!("CALL {ledger}.{}({}, NULL)", routines.deliver, parameters(1..=15)),
            progress_sql: PROGRESS_SQL.replace("{ledger}", &ledger).replace("{flush}", FLUSH),
            try_out_sql: TRY_OUT_SQL
                .replace("{events}", &table)
                .replace("{command}", command)
                .replace("{next_id}", &next_id),
            sequence,
            views: Views::new(&ledger, &table),
            events: table,
            ledger,
            receipts,
            sources,
            routines,
        })
    }

    /// The column for the command.
    fn command(&self, events: &TableName) -> Result<&'static str, DeliverError> {
        let has = |name: &str| self.columns.iter().any(|column| column == name);
        for name in ["id", "timestamp", "event_type", "payload", "project_id", "agent_id", "turn_id"] {
            if !has(name) {
                return Err(unusable(events, &format!("it has no column \"{name}\"")));
            }
        }
        match (has("command_id"), has("task_id")) {
            (true, _) => Ok("command_id"),
            (false, true) => Ok("task_id"),
            (false, false) => Err(unusable(events, "it has neither a column \"command_id\" nor \"task_id\"")),
        }
    }
}

/// A name as Postgres prints it: in quotes where it needs them.
fn as_printed(name: &str) -> String {
    let is_plain = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    if is_plain { name.to_owned() } else { quote_identifier(name) }
}

/// `$1, $2, …`
fn parameters(places: RangeInclusive<usize>) -> String {
    let places: Vec<String> = places.map(|place| format!("${place}")).collect();
    places.join(", ")
}

impl Layout {
    /// Whether the columns take what an event's row gives them, without storing one.
    /// A privilege that is lacking counts as fitting: it is found by its name.
    pub(super) async fn try_out(&self, client: &Client) -> Result<(), DeliverError> {
        let answer = client.query_typed(&self.try_out_sql, &[]).await;
        match answer.map_err(|error| step_error(&error)) {
            Err(error) if error.sqlstate.as_deref() != Some("42501") => Err(error),
            _ => Ok(()),
        }
    }
}

fn unusable(events: &TableName, problem: &str) -> DeliverError {
    DeliverError {
        verdict: Verdict::Operator,
        sqlstate: None,
        message: format!(
            "the table {} can't be used: {problem}; set database.events_table to another name or correct the table",
            events.quoted()
        ),
    }
}
