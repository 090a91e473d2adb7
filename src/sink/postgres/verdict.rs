//! SQLSTATE → [`Verdict`], in one match.
//!
//! Codes: <https://www.postgresql.org/docs/current/errcodes-appendix.html>. A code that is not listed pauses the
//! drainer (`Operator`): an unknown code never sets an event aside.

use crate::sink::{DeliverError, Verdict};

/// The verdict on a code. `None`: the connection failed before the server could speak.
pub fn verdict(sqlstate: Option<&str>) -> Verdict {
    let Some(code) = sqlstate else { return Verdict::Again };
    let class = code.get(..2).unwrap_or_default();
    match (class, code) {
        // serialization failure, deadlock, lock not available, query canceled (a time-out), read-only transaction
        (_, "40001" | "40P01" | "55P03" | "57014" | "25006") => Verdict::Again,
        // the server goes down, comes up, drops the database or ended this very session
        (_, "57P01" | "57P02" | "57P03" | "57P04" | "57P05") => Verdict::Again,
        // connection, insufficient resources (disk full, too many connections), system error
        ("08" | "53" | "58", _) => Verdict::Again,
        // data exception, integrity constraint, program limit
        ("22" | "23" | "54", _) => Verdict::Event,
        // authorization, unknown database, missing table or privilege; and whatever else there may be
        _ => Verdict::Operator,
    }
}

/// What tokio-postgres reports, with its verdict and in words that hold no payload.
pub fn deliver_error(error: &tokio_postgres::Error) -> DeliverError {
    let Some(db) = error.as_db_error() else {
        return connection_error(error);
    };
    let code = db.code().code();
    let mut message = format!("{}: {}", db.severity(), db.message());
    // A detail can quote the row, and with it the payload; a foreign key's names just the key.
    if code == "23503"
        && let Some(detail) = db.detail()
    {
        message.push_str("; ");
        message.push_str(detail);
    }
    if let Some(hint) = db.hint() {
        message.push_str("; ");
        message.push_str(hint);
    }
    let own_receipt = code == "23505" && db.table() == Some("event_receipts");
    let verdict = if own_receipt { Verdict::Again } else { verdict(Some(code)) };
    DeliverError { verdict, sqlstate: Some(code.to_owned()), message }
}

/// An error without a server's answer: the chain of causes in one line.
fn connection_error(error: &tokio_postgres::Error) -> DeliverError {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    let mut operator = false;
    while let Some(inner) = cause {
        message.push_str(": ");
        message.push_str(&inner.to_string());
        operator |= inner.downcast_ref::<rustls::Error>().is_some();
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            operator |= io.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
        }
        cause = inner.source();
    }
    // No connection was lost here: the settings and the server do not fit, and only a person can mend that.
    operator |= message.starts_with("error performing TLS handshake")
        || message.starts_with("invalid configuration")
        || message.contains("password missing");
    let verdict = if operator { Verdict::Operator } else { Verdict::Again };
    DeliverError { verdict, sqlstate: None, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_of_the_table_has_its_verdict() {
        let table: [(Verdict, &[&str]); 3] = [
            (
                Verdict::Again,
                &[
                    "40001", "40P01", "55P03", "57014", "08000", "08003", "08006", "08001", "08004", "53000", "53100",
                    "53200", "53300", "57P01", "57P02", "57P03", "57P04", "57P05", "58000", "58030", "25006",
                ],
            ),
            (Verdict::Operator, &["28000", "28P01", "3D000", "42P01", "42501", "42703", "42601"]),
            (Verdict::Event, &["22P05", "22021", "22003", "22P02", "23503", "23514", "23502", "23505", "54000"]),
        ];
        for (expected, codes) in table {
            for code in codes {
                assert_eq!(verdict(Some(code)), expected, "{code}");
            }
        }
        assert_eq!(verdict(None), Verdict::Again);
    }

    #[test]
    fn an_unknown_code_pauses_and_never_sets_an_event_aside() {
        for code in ["XX000", "P0001", "0A000", "25P02", "26000", "40002", "55000", "57000", "99999", "", "2"] {
            assert_eq!(verdict(Some(code)), Verdict::Operator, "{code}");
        }
    }
}
