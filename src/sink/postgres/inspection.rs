//! What `check` wants to know of the database. Changes nothing.

use tokio_postgres::types::{ToSql, Type};

use super::connect::{ConnectSettings, connect_and_look, limited};
use super::verdict::{no_answer, step_error};
use crate::finding::Finding::{self, Fine, Note, Wrong};
use crate::sink::DeliverError;

/// The oldest PostgreSQL that is tested.
const POSTGRES_VERSION_MIN: i32 = 130_000;

/// The database as `check` finds it.
pub(crate) struct Inspection {
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
}

const INSPECT_SQL: &str = include_str!("sql/inspect.sql");
const CITUS_SQL: &str = include_str!("sql/citus.sql");

pub(crate) async fn inspect(settings: &ConnectSettings) -> Result<Inspection, DeliverError> {
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
    let rows = ask(INSPECT_SQL, &parameters).await?;
    let Some(row) = rows.first() else { return Err(no_answer(settings.statement_timeout)) };
    let nodes = if row.get("has_citus") { ask(CITUS_SQL, &[(&events, Type::TEXT)]).await? } else { Vec::new() };
    Ok(Inspection {
        version: row.get("version"),
        version_number: row.get("version_number"),
        missing,
        unfit: unfit.map(|error| error.message),
        lacks: row.get("lacks"),
        may_create: row.get("may_create"),
        is_read_only: row.get("is_read_only"),
        schema_missing: row.get("schema_missing"),
        encoding: row.get("encoding"),
        triggers: row.get("triggers"),
        other_node: nodes.first().map(|row| row.get(0)),
    })
}

impl Inspection {
    /// What is to be said of it. `auto_migrate`: whether a start creates what is missing.
    pub(crate) fn findings(&self, auto_migrate: bool) -> Vec<Finding> {
        let version = &self.version;
        let missing = self.missing.join(", ");
        let mut findings = vec![match (self.missing.is_empty(), auto_migrate) {
            (true, _) => match &self.unfit {
                None => Fine(format!("PostgreSQL {version}, the tables are there")),
                Some(problem) => Wrong(format!(
                    "PostgreSQL {version}; the tables are there, but no event can be stored in them: {}; correct the table, or set database.events_table to another name",
                    problem.trim_end_matches('.')
                )),
            },
            (false, _) if self.schema_missing => Wrong(format!(
                "PostgreSQL {version}; missing: {missing}, and so is the schema; CREATE SCHEMA, or correct database.events_table"
            )),
            (false, true) if !self.may_create => Wrong(format!(
                "PostgreSQL {version}; missing: {missing}, and this user may not create it; have somebody who may run the SQL that \"headspace-watcher migrate --print\" shows"
            )),
            (false, true) => Fine(format!("PostgreSQL {version}; will be created at the start: {missing}")),
            (false, false) => Wrong(format!(
                "PostgreSQL {version}; missing: {missing}; run \"headspace-watcher migrate\" or set database.auto_migrate"
            )),
        }];
        if self.version_number < POSTGRES_VERSION_MIN {
            let oldest = POSTGRES_VERSION_MIN / 10_000;
            findings.push(Wrong(format!("PostgreSQL {version} is too old; {oldest} or later is needed")));
        }
        if !self.lacks.is_empty() {
            let lacks = self.lacks.join(", ");
            findings.push(Wrong(format!("this user lacks {lacks}; GRANT it, or connect as another user")));
        }
        if !self.triggers.is_empty() {
            let triggers = self.triggers.join(", ");
            findings.push(Note(format!(
                "triggers run before a row is inserted: {triggers}; delivery stops at the first row that one of them drops"
            )));
        }
        if self.encoding != "UTF8" {
            findings.push(Wrong(format!(
                "the database has the encoding {}; delivery stops at the first text with other letters. Use a database that has UTF8",
                self.encoding
            )));
        }
        if self.is_read_only {
            let way_out = "connect to the primary (target_session_attrs=read-write), or end the read-only mode";
            findings.push(Wrong(format!("this server takes no writes; {way_out}")));
        }
        if let Some(node) = &self.other_node {
            findings.push(Note(format!(
                "Citus keeps the events on {node}: connect to that node. Through this one delivery is slow, and commits are only as durable as that node's own synchronous_commit"
            )));
        }
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database() -> Inspection {
        Inspection {
            version: "15.4".to_owned(),
            version_number: 150_004,
            missing: Vec::new(),
            unfit: None,
            lacks: Vec::new(),
            schema_missing: false,
            may_create: true,
            triggers: Vec::new(),
            other_node: None,
            is_read_only: false,
            encoding: "UTF8".to_owned(),
        }
    }

    /// What is not fine about it.
    fn wrong(change: impl FnOnce(&mut Inspection)) -> Vec<String> {
        let mut inspection = database();
        change(&mut inspection);
        let findings = inspection.findings(true);
        findings
            .into_iter()
            .filter_map(|finding| match finding {
                Fine(_) => None,
                Note(text) => Some(format!("note: {text}")),
                Wrong(text) => Some(text),
            })
            .collect()
    }

    #[test]
    fn a_database_is_judged_by_age_privileges_and_mode() {
        assert!(wrong(|_| {}).is_empty());
        assert!(wrong(|found| found.version_number = 120_009)[0].contains("13 or later"));
        assert!(wrong(|found| found.triggers = vec!["filter".to_owned()])[0].contains("inserted: filter"));
        assert!(wrong(|found| found.lacks = vec!["INSERT on events".to_owned()])[0].contains("GRANT it"));
        assert!(wrong(|found| found.is_read_only = true)[0].contains("takes no writes"));
        assert!(wrong(|found| found.encoding = "LATIN1".to_owned())[0].contains("encoding LATIN1"));
        let elsewhere = wrong(|found| found.other_node = Some("worker-2:5432".to_owned()));
        assert!(elsewhere[0].starts_with("note: Citus keeps the events on worker-2:5432: connect"), "{elsewhere:?}");
        let unfit = wrong(|found| found.unfit = Some("column \"payload\" is of type text".to_owned()));
        assert!(unfit[0].contains("is of type text; correct the table"), "{unfit:?}");
        let no_schema = wrong(|found| (found.missing, found.schema_missing) = (vec!["a.events".to_owned()], true));
        assert!(no_schema[0].contains("CREATE SCHEMA"), "{no_schema:?}");
        let no_right = wrong(|found| (found.missing, found.may_create) = (vec!["events".to_owned()], false));
        assert!(no_right[0].contains("migrate --print"), "{no_right:?}");
    }
}
