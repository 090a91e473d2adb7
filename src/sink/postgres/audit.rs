//! Asks Postgres what it holds, for `verify`: needs no right but SELECT, changes nothing and makes no tables. Only
//! [`Auditor::forget_stale`] writes, for `--repair`, and [`Auditor::accept_removed`], for `--accept-missing`.
//!
//! On a connection of its own, one statement after the other, each short: what does not answer within
//! `statement_timeout` is asked again in smaller pieces.

use std::collections::HashMap;
use std::time::Duration;

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};
use uuid::Uuid;

use super::connect::{ConnectSettings, connect_and_look};
use super::verdict::{missing_error, no_answer, step_error};
use crate::sink::DeliverError;

/// Events that are asked for at once, at most.
pub(crate) const ASKED_MAX: usize = 2048;

/// What a row says of its own identity.
const IDENTITY: &str = "payload->>(CASE event_type WHEN 'session_registered' THEN 'session_uuid' ELSE 'turn_uuid' END)";

/// The `row_id` of a receipt whose row was removed on purpose: no row has it.
const REMOVED: i64 = 0;

/// The receipt of an event and what it leads to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Receipt {
    /// It says that the row was removed on purpose.
    Removed,
    /// Its row does not exist.
    WithoutRow { row_id: i64 },
    /// Its row.
    Row { row_id: i64, row: AuditedRow },
}

impl Receipt {
    /// The row that it leads to, or led to; `None` where that was removed on purpose.
    pub(crate) fn row_id(&self) -> Option<i64> {
        match self {
            Receipt::Removed => None,
            Receipt::WithoutRow { row_id } | Receipt::Row { row_id, .. } => Some(*row_id),
        }
    }
}

/// What a row says of its own identity.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct AuditedRow {
    pub event_type: String,
    /// `session_uuid` of a registration, else `turn_uuid`; `None` where the payload has none.
    pub identity: Option<String>,
}

/// A receipt that leads to no row of its event, as it was found; and what that row would say.
#[derive(Clone, Debug)]
pub(crate) struct StaleReceipt {
    pub event_id: Uuid,
    pub row_id: i64,
    pub event_type: String,
    pub identity: Option<String>,
}

/// A connection for questions.
pub(crate) struct Auditor {
    client: Client,
    statement_timeout: Duration,
    find_sql: String,
    rows_sql: String,
    forget_sql: String,
    accept_sql: String,
}

impl Auditor {
    pub(crate) async fn connect(settings: &ConnectSettings) -> Result<Auditor, DeliverError> {
        let (client, facts) = connect_and_look(settings).await?;
        let missing = facts.missing_tables(&settings.needs);
        if !missing.is_empty() {
            return Err(missing_error(&missing));
        }
        let layout = facts.layout(&settings.needs)?;
        let fitted = |sql: &str| {
            sql.replace("{identity}", IDENTITY)
                .replace("{events}", &layout.events)
                .replace("{receipts}", &layout.receipts)
                .replace("{removed}", &REMOVED.to_string())
        };
        Ok(Auditor {
            client,
            statement_timeout: settings.statement_timeout,
            find_sql: fitted(include_str!("sql/audit_find.sql")),
            rows_sql: fitted(include_str!("sql/audit_rows.sql")),
            accept_sql: fitted(include_str!("sql/audit_accept.sql")),
            forget_sql: fitted(include_str!("sql/audit_forget.sql")),
        })
    }

    /// The receipts of these events, [`ASKED_MAX`] of them at most; those that are not in the answer have none.
    pub(crate) async fn find(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, Receipt>, DeliverError> {
        let mut found = HashMap::with_capacity(ids.len());
        // Pieces that are still to be asked for; a last one of one event is given up on.
        let mut pieces = vec![ids];
        while let Some(piece) = pieces.pop() {
            match self.query(&self.find_sql, &[(&piece, Type::UUID_ARRAY)]).await {
                Ok(rows) => found.extend(rows.iter().map(receipt_of)),
                Err(error) if error.sqlstate.as_deref() == Some("57014") && piece.len() > 1 => {
                    let (left, right) = piece.split_at(piece.len() / 2);
                    pieces.extend([right, left]);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// Rows after the one numbered `after`, in their order; none at the end of the table. Gives the number to go on at.
    pub(crate) async fn rows_after(&self, after: i64) -> Result<Option<(i64, Vec<AuditedRow>)>, DeliverError> {
        let rows = self.query(&self.rows_sql, &[(&after, Type::INT8)]).await?;
        let Some(last) = rows.last().map(|row| row.get(0)) else { return Ok(None) };
        Ok(Some((last, rows.iter().map(|row| AuditedRow { event_type: row.get(1), identity: row.get(2) }).collect())))
    }

    /// Removes receipts that lead to no row of their event, each on condition that this is still so. Gives their
    /// number.
    pub(crate) async fn forget_stale(&self, stale: &[StaleReceipt]) -> Result<u64, DeliverError> {
        let ids: Vec<Uuid> = stale.iter().map(|receipt| receipt.event_id).collect();
        let rows: Vec<i64> = stale.iter().map(|receipt| receipt.row_id).collect();
        let types: Vec<&str> = stale.iter().map(|receipt| receipt.event_type.as_str()).collect();
        let identities: Vec<Option<&str>> = stale.iter().map(|receipt| receipt.identity.as_deref()).collect();
        let parameters: [(&(dyn ToSql + Sync), Type); 4] = [
            (&ids, Type::UUID_ARRAY),
            (&rows, Type::INT8_ARRAY),
            (&types, Type::TEXT_ARRAY),
            (&identities, Type::TEXT_ARRAY),
        ];
        let rows = self.query(&self.forget_sql, &parameters).await?;
        Ok(rows.first().map_or(0, |row| row.get::<_, i64>(0).unsigned_abs()))
    }

    /// Notes of receipts that lead to no row of their event that the row was removed on purpose, each on condition that it still leads
    /// there. Gives the events.
    pub(crate) async fn accept_removed(&self, gone: &[(Uuid, i64)]) -> Result<Vec<Uuid>, DeliverError> {
        let (ids, rows): (Vec<Uuid>, Vec<i64>) = gone.iter().copied().unzip();
        let rows = self.query(&self.accept_sql, &[(&ids, Type::UUID_ARRAY), (&rows, Type::INT8_ARRAY)]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    async fn query(&self, sql: &str, parameters: &[(&(dyn ToSql + Sync), Type)]) -> Result<Vec<Row>, DeliverError> {
        // Behind a pooler that takes no startup options the server's own statement_timeout holds, if it has one.
        let limit = self.statement_timeout + Duration::from_secs(1);
        match tokio::time::timeout(limit, self.client.query_typed(sql, parameters)).await {
            Ok(answer) => answer.map_err(|error| step_error(&error)),
            Err(_) => Err(no_answer(limit)),
        }
    }
}

fn receipt_of(row: &Row) -> (Uuid, Receipt) {
    let row_id: i64 = row.get(1);
    let receipt = match row.get::<_, Option<String>>(2) {
        _ if row_id == REMOVED => Receipt::Removed,
        Some(event_type) => Receipt::Row { row_id, row: AuditedRow { event_type, identity: row.get(3) } },
        None => Receipt::WithoutRow { row_id },
    };
    (row.get(0), receipt)
}
