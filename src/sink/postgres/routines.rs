//! The routines that store events (`sql/`). Their names carry a hash of their text: watchers of different versions, and those
//! that found another column or setting, each use their own.

use super::verdict::ROW_DROPPED;

/// Chooses durability inside the statement, for this transaction alone, so that it also holds behind a pooler that
/// hands every transaction another server connection, and so that nothing of it is left for the pooler's next client.
///
/// A server or role that asks for less than `on` is overruled: what is taken out of the queue must be on the server's
/// disk, and on that of each standby the server requires. `remote_apply` asks for more and is kept. Warnings must reach
/// us: they tell that a commit did not wait ([`notices`](super::notices)). And plans are kept while the ledger grows: they must not
/// be those for an empty table.
pub(super) const FLUSH: &str = "concat(set_config('enable_seqscan', 'off', true), set_config('client_min_messages', 'warning', true), \
     CASE WHEN current_setting('synchronous_commit') <> 'remote_apply' THEN set_config('synchronous_commit', 'on', true) END)";

const ROW_SQL: &str = include_str!("sql/row.sql");
const SOURCE_SQL: &str = include_str!("sql/source.sql");
const STORE_SQL: &str = include_str!("sql/store.sql");
const DELIVER_SQL: &str = include_str!("sql/deliver.sql");
const VIEWS_SQL: &str = include_str!("sql/views.sql");

/// What the names of our routines begin with; a hash follows.
pub(super) const NAMES: [&str; 5] = ["source", "store", "deliver", "turns", "sessions"];

/// What a row is made of, and the arrays that hold it for the events of a window.
const VALUES: [(&str, &str); 10] = [
    ("event_id", "_event_ids"),
    ("byte_offset", "_byte_offsets"),
    ("captured_at", "_captured_at"),
    ("timestamp", "_timestamps"),
    ("event_type", "_event_types"),
    ("payload", "_payloads"),
    ("project_id", "_project_ids"),
    ("agent_id", "_agent_ids"),
    ("command_id", "_command_ids"),
    ("turn_id", "_turn_ids"),
];

/// The routines that store events in one table, and their names.
#[derive(Clone)]
pub(super) struct Routines {
    pub source: String,
    pub store: String,
    pub deliver: String,
    /// What creates them.
    pub sql: [String; 3],
}

/// What [`Routines`] are made of: names, safe in SQL, and expressions.
pub(super) struct RoutineParts<'a> {
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
    pub(super) fn new(parts: &RoutineParts<'_>) -> Routines {
        let notify = parts.notify_channel.map(quote_literal);
        let notify = notify.map(|channel| format!("PERFORM pg_notify({channel}, _row_id::text);")).unwrap_or_default();
        let row = ROW_SQL.replace("{insert}", &insert_sql(parts)).replace("{notify}", &notify);
        let (mut of_one, mut of_window) = (row.clone(), row);
        for (value, of_all) in VALUES {
            let placeholder = format!("{{{value}}}");
            of_one = of_one.replace(&placeholder, &format!("_{value}"));
            of_window = of_window.replace(&placeholder, &format!("{of_all}[_i]"));
        }
        let sql = [SOURCE_SQL, STORE_SQL, DELIVER_SQL].map(|sql| {
            sql.replace("{row_of_one}", &of_one)
                .replace("{row_of_window}", &of_window)
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

    pub(super) fn names(&self) -> [&String; 3] {
        [&self.source, &self.store, &self.deliver]
    }
}

/// The views for people. What makes them, and the names of the functions behind them.
pub(super) struct Views {
    pub turns: String,
    pub sessions: String,
    pub sql: String,
}

impl Views {
    pub(super) fn new(ledger: &str, events: &str) -> Views {
        let sql = VIEWS_SQL.replace("{ledger}", ledger).replace("{events}", events);
        let hash = xxhash_rust::xxh3::xxh3_64(sql.as_bytes());
        let [turns, sessions] = ["turns", "sessions"].map(|name| format!("{name}_{hash:016x}"));
        let sql = sql.replace("{turns}", &turns).replace("{sessions}", &sessions);
        Views { turns, sessions, sql }
    }

    pub(super) fn names(&self) -> [&String; 2] {
        [&self.turns, &self.sessions]
    }
}

/// Whose an event is, is looked up where the caller did not say it. What was found may be gone before the row refers to it: then
/// the row goes without.
fn insert_sql(parts: &RoutineParts<'_>) -> String {
    let insert = |project: &str, agent: &str| {
        format!(
            "INSERT INTO {{events}} (id, \"timestamp\", event_type, payload, project_id, agent_id, {}, turn_id)
             OVERRIDING SYSTEM VALUE
             VALUES (_row_id, {{timestamp}}, {{event_type}}, _json, {project}, {agent}, {{command_id}}, {{turn_id}});",
            parts.command
        )
    };
    let given = insert("{project_id}", "{agent_id}");
    if parts.projects.is_none() && parts.agents.is_none() {
        return given;
    }
    let project = parts.projects.map(|projects| {
        format!(
            "IF {{project_id}} IS NULL THEN
               SELECT id INTO _found_project FROM {projects} WHERE path = _json->>'project_path' LIMIT 1;
             END IF;"
        )
    });
    let agent = parts.agents.map(|agents| {
        format!(
            "IF {{agent_id}} IS NULL THEN
               SELECT id INTO _found_agent FROM {agents}
                WHERE claude_session_id::text = _json->>'session_uuid' ORDER BY id DESC LIMIT 1;
             END IF;"
        )
    });
    let found = insert("coalesce({project_id}, _found_project)", "coalesce({agent_id}, _found_agent)");
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

/// A literal that is right whatever standard_conforming_strings says.
pub(super) fn quote_literal(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('\'', "''");
    if text.contains('\\') { format!("E'{escaped}'") } else { format!("'{escaped}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_quoted() {
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal("a\\b"), "E'a\\\\b'");
    }
}
