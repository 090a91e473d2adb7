//! SQLSTATE → [`Verdict`], in one match; and the way out, for people.
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
        // a sequence at its end is the table's, though its class is that of data
        (_, "2200H") => Verdict::Operator,
        // data exception, integrity constraint, program limit
        ("22" | "23" | "54", _) => Verdict::Event,
        // authorization, unknown database, missing table or privilege; and whatever else there may be
        _ => Verdict::Operator,
    }
}

/// Whether the session that a failure came up in is still good. Else the next attempt opens a new one, and with it
/// looks anew for the server (it may have become a standby), the tables, the privileges and the password.
pub fn session_outlives(error: &DeliverError) -> bool {
    match error.sqlstate.as_deref() {
        Some("40001" | "40P01" | "55P03" | "57014") => true,
        Some(_) => error.verdict == Verdict::Event,
        None => false,
    }
}

/// What someone can do about a code. Empty where the server's own message says it all or nothing can be done.
fn way_out(code: &str) -> &'static str {
    match code {
        "28P01" => "mend the password in database.url, DATABASE_URL, PGPASSWORD or ~/.pgpass",
        "28000" => "let the user in (pg_hba.conf of the server), or mend user and sslmode in database.url",
        "3D000" => "create the database or mend its name in database.url",
        "3F000" => "create the schema or mend database.events_table",
        "42501" => {
            "grant what is missing: INSERT on events, SELECT, INSERT and UPDATE on event_receipts and event_sources, \
             USAGE on their sequences (and CREATE on the schema where tables are to be made)"
        }
        "42P01" => "run \"headspace-watcher migrate\" or set database.auto_migrate",
        "2200H" => "make the column id and its sequence bigint",
        _ => "",
    }
}

/// What tokio-postgres reports about the delivery of one event, with its verdict and in words that hold no payload.
pub fn deliver_error(error: &tokio_postgres::Error) -> DeliverError {
    let Some(db) = error.as_db_error() else {
        return connection_error(error);
    };
    let code = db.code().code();
    let mut message = format!("{}: {}", db.severity(), without_values(code, db.message()));
    let detail = db.detail().unwrap_or_default();
    // A detail can quote the row, and with it the payload; a foreign key's names just the key.
    if code == "23503" {
        add(&mut message, detail);
    }
    add(&mut message, db.hint().unwrap_or_default());
    let is_own = |table: &str| matches!(table, "event_receipts" | "event_sources");
    let verdict = match verdict(Some(code)) {
        // A trigger or constraint that someone put on the ledger is nothing that an event could be blamed for.
        Verdict::Event if db.table().is_some_and(is_own) => Verdict::Operator,
        Verdict::Event if code == "23505" && detail.contains("(id)=(") => {
            let place = "the sequence of the column id is behind the table: set it with setval()";
            add(&mut message, place);
            Verdict::Operator
        }
        verdict => verdict,
    };
    if verdict == Verdict::Operator {
        add(&mut message, way_out(code));
    }
    DeliverError { verdict, sqlstate: Some(code.to_owned()), message }
}

/// As [`deliver_error`], of a step that no single event has a part in: never an event's fault.
pub fn step_error(error: &tokio_postgres::Error) -> DeliverError {
    let mut error = deliver_error(error);
    if error.verdict == Verdict::Event {
        error.verdict = Verdict::Operator;
    }
    error
}

fn add(message: &mut String, part: &str) {
    if !part.is_empty() {
        message.push_str("; ");
        message.push_str(part);
    }
}

/// The message without what it quotes: errors of class 22 (data) quote the value, which is a piece of the payload.
fn without_values(code: &str, message: &str) -> String {
    if !code.starts_with("22") {
        return message.to_owned();
    }
    match (message.find('"'), message.rfind('"')) {
        (Some(first), Some(last)) if first < last => {
            let (before, after) = (message.get(..first), message.get(last + 1..));
            format!("{}\"…\"{}", before.unwrap_or_default(), after.unwrap_or_default())
        }
        _ => message.to_owned(),
    }
}

/// An error without a server's answer: the chain of causes in one line.
fn connection_error(error: &tokio_postgres::Error) -> DeliverError {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    let mut certificate = false;
    while let Some(inner) = cause {
        message.push_str(": ");
        message.push_str(&inner.to_string());
        certificate |= inner.downcast_ref::<rustls::Error>().is_some();
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            certificate |= io.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
        }
        cause = inner.source();
    }
    // No connection was lost here: the settings and the server do not fit, and only a person can mend that.
    let way_out = if message.contains("server does not support TLS") {
        "turn on ssl in the server, or set sslmode=prefer or disable in database.url"
    } else if certificate && message.contains("nvalid peer certificate") {
        "set sslrootcert to the certificate of whoever signed the server's, and mind the name for verify-full"
    } else if certificate {
        "mend sslmode, sslrootcert, sslcert and sslkey in database.url"
    } else if message.contains("password missing") {
        "set the password in database.url, DATABASE_URL, PGPASSWORD or ~/.pgpass"
    } else if message.starts_with("invalid configuration") || message.contains("channel binding") {
        "mend database.url"
    } else {
        return DeliverError { verdict: Verdict::Again, sqlstate: None, message };
    };
    add(&mut message, way_out);
    DeliverError { verdict: Verdict::Operator, sqlstate: None, message }
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
            (Verdict::Operator, &["28000", "28P01", "3D000", "42P01", "42501", "42703", "42601", "2200H"]),
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

    #[test]
    fn a_session_is_kept_only_where_nothing_about_it_can_be_wrong() {
        let of = |code: Option<&str>| DeliverError {
            verdict: verdict(code),
            sqlstate: code.map(str::to_owned),
            message: String::new(),
        };
        for code in ["40001", "40P01", "55P03", "57014", "23514", "22P05"] {
            assert!(session_outlives(&of(Some(code))), "{code}");
        }
        for code in ["25006", "42P01", "42501", "57P01", "53100", "26000", "42P05", "08P01", "XX000"] {
            assert!(!session_outlives(&of(Some(code))), "{code}");
        }
        assert!(!session_outlives(&of(None)));
    }

    #[test]
    fn what_a_message_quotes_of_the_data_is_left_out() {
        let message = "invalid input syntax for type integer: \"my \"secret\" text\"";
        assert_eq!(without_values("22P02", message), "invalid input syntax for type integer: \"…\"");
        let message = "value \"99999999999\" is out of range for type integer";
        assert_eq!(without_values("22003", message), "value \"…\" is out of range for type integer");
        assert_eq!(without_values("42P01", "relation \"events\" does not exist"), "relation \"events\" does not exist");
        assert_eq!(without_values("22001", "value too long"), "value too long");
    }
}
