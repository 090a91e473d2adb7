//! SQLSTATE → [`Verdict`], in one match; and the way out, for people.
//!
//! Codes: <https://www.postgresql.org/docs/current/errcodes-appendix.html>. A code that is not listed pauses the
//! drainer (`Operator`): an unknown code never sets an event aside.

use std::io::ErrorKind;
use std::time::Duration;

use crate::sink::{DeliverError, Verdict};

/// SQLSTATE of our own: a trigger dropped the row.
pub(super) const ROW_DROPPED: &str = "HW001";

/// The verdict on a code. `None`: the connection failed before the server could speak.
pub(super) fn verdict(sqlstate: Option<&str>) -> Verdict {
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
pub(super) fn session_outlives(error: &DeliverError) -> bool {
    match error.sqlstate.as_deref() {
        Some("40001" | "40P01" | "55P03" | "57014" | "23505") => true,
        Some(_) => error.verdict == Verdict::Event,
        None => false,
    }
}

/// What someone can do about a code. Empty where the server's own message says it all or nothing can be done.
fn way_out(code: &str) -> &'static str {
    match code {
        "28P01" => "correct the password in database.url, DATABASE_URL, PGPASSWORD or ~/.pgpass",
        "28000" => "let the user in (pg_hba.conf of the server), or correct user and sslmode in database.url",
        "3D000" => "create the database or correct its name in database.url",
        "3F000" => "create the schema or correct database.events_table",
        "42501" => {
            "have somebody who may run the SQL that \"headspace-watcher migrate --print\" shows, grants included; \
             \"headspace-watcher check\" names what is lacking"
        }
        ROW_DROPPED => {
            "no event is stored until it lets all rows in: see the table's triggers (\\d in psql). \
             Rows that are not wanted can be deleted after they are stored"
        }
        "42P01" => "run \"headspace-watcher migrate\" or set database.auto_migrate",
        "2200H" => "make the column id and its sequence bigint",
        _ => "",
    }
}

/// What has a code that speaks of data and is a condition of the server, with the way out. Told by where in the server it was
/// raised, as messages are translated.
fn condition(code: &str, raised_in: &str, encoding: &str) -> Option<(Verdict, String)> {
    match (code, raised_in) {
        ("54000", "async.c") => Some((
            Verdict::Again,
            "the server's queue of notifications is full: end the session that listens and stays in a transaction \
             (pg_notification_queue_usage(), pg_stat_activity), or unset database.notify_channel"
                .to_owned(),
        )),
        ("23514", "execPartition.c") => {
            Some((Verdict::Operator, "create the partition, or a default one that takes what no other does".to_owned()))
        }
        ("22P05", _) if encoding != "UTF8" => Some((
            Verdict::Operator,
            format!(
                "the database has the encoding {encoding}, which lacks letters of this event: use one that has UTF8"
            ),
        )),
        _ => None,
    }
}

/// What tokio-postgres reports about the delivery of one event, with its verdict and in words that hold no payload.
/// `encoding`: of the database.
pub(super) fn deliver_error(error: &tokio_postgres::Error, encoding: &str) -> DeliverError {
    let Some(db) = error.as_db_error() else {
        return connection_error(error);
    };
    let code = db.code().code();
    let mut message = format!("{}: {}", db.severity(), without_values(code, db.message()));
    let detail = db.detail().unwrap_or_default();
    // A detail can quote the row, and with it the payload; a foreign key's names just the key, and that of what depends on a table
    // just that.
    if matches!(code, "23503" | "2BP01") {
        add(&mut message, detail);
    }
    add(&mut message, db.hint().unwrap_or_default());
    if let Some((verdict, way_out)) = condition(code, db.file().unwrap_or_default(), encoding) {
        add(&mut message, &way_out);
        return DeliverError { verdict, sqlstate: Some(code.to_owned()), message };
    }
    let is_own = |table: &str| matches!(table, "event_receipts" | "event_sources");
    let verdict = match verdict(Some(code)) {
        // Another delivery of this event came first: it is found when this one is sent again.
        Verdict::Event if code == "23505" && db.table() == Some("event_receipts") => Verdict::Again,
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
pub(super) fn step_error(error: &tokio_postgres::Error) -> DeliverError {
    let mut error = deliver_error(error, "UTF8");
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
    let (mut certificate, mut is_nobody_there) = (false, false);
    while let Some(inner) = cause {
        message.push_str(": ");
        message.push_str(&inner.to_string());
        certificate |= inner.downcast_ref::<rustls::Error>().is_some();
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            certificate |= io.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
            is_nobody_there = matches!(io.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused);
        }
        cause = inner.source();
    }
    // No connection was lost here: the settings and the server do not fit, and only a person can fix that.
    let way_out = if message.contains("server does not support TLS") {
        "turn on ssl in the server, or set sslmode=prefer or disable in database.url"
    } else if certificate && message.contains("nvalid peer certificate") {
        "set sslrootcert to the certificate of the authority that signed the server's; verify-full also needs the host's name in it"
    } else if certificate {
        "correct sslmode, sslrootcert, sslcert and sslkey in database.url"
    } else if message.contains("password missing") {
        "set the password in database.url, DATABASE_URL, PGPASSWORD or ~/.pgpass"
    } else if message.starts_with("invalid configuration") || message.contains("channel binding") {
        "correct database.url"
    } else {
        if is_nobody_there {
            add(&mut message, "no server is listening there");
        }
        return DeliverError { verdict: Verdict::Again, sqlstate: None, message };
    };
    add(&mut message, way_out);
    DeliverError { verdict: Verdict::Operator, sqlstate: None, message }
}

/// The server did not answer in time.
pub(super) fn no_answer(waited: Duration) -> DeliverError {
    DeliverError {
        verdict: Verdict::Again,
        sqlstate: None,
        message: format!("the server did not answer within {} ms", waited.as_millis()),
    }
}

/// The event before it is not stored, so this one may not be.
pub(super) fn predecessor_missing() -> DeliverError {
    DeliverError {
        verdict: Verdict::Again,
        sqlstate: None,
        message: "the receipt of the event before this one, or a row of event_sources, is not there".to_owned(),
    }
}

/// What the program needs is missing, and may not be created.
pub(super) fn missing_error(missing: &[String]) -> DeliverError {
    DeliverError {
        verdict: Verdict::Operator,
        sqlstate: None,
        message: format!(
            "missing in the database: {}; run \"headspace-watcher migrate\" or set database.auto_migrate",
            missing.join(", ")
        ),
    }
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

    /// Every code of the appendix of PostgreSQL 15, by the verdict on it.
    #[test]
    fn each_code_that_postgres_has_gets_the_verdict_that_was_thought_about() {
        let appendix = [
            (
                Verdict::Again,
                "08000 08001 08003 08004 08006 08007 08P01 25006 40001 40P01 53000 53100 53200 53300 53400 55P03 \
                 57014 57P01 57P02 57P03 57P04 57P05 58000 58030 58P01 58P02",
            ),
            (
                Verdict::Operator,
                "00000 01000 01003 01004 01006 01007 01008 0100C 01P01 02000 02001 03000 09000 0A000 0B000 0F000 \
                 0F001 0L000 0LP01 0P000 0Z000 0Z002 20000 21000 2200H 24000 25000 25001 25002 25003 25004 25005 \
                 25007 25008 25P01 25P02 25P03 26000 27000 28000 28P01 2B000 2BP01 2D000 2F000 2F002 2F003 2F004 \
                 2F005 34000 38000 38001 38002 38003 38004 39000 39001 39004 39P01 39P02 39P03 3B000 3B001 3D000 \
                 3F000 40000 40002 40003 42000 42501 42601 42602 42611 42622 42701 42702 42703 42704 42710 42712 \
                 42723 42725 42803 42804 42809 42830 42846 42883 428C9 42939 42P01 42P02 42P03 42P04 42P05 42P06 \
                 42P07 42P08 42P09 42P10 42P11 42P12 42P13 42P14 42P15 42P16 42P17 42P18 42P19 42P20 42P21 42P22 \
                 44000 55000 55006 55P02 55P04 57000 72000 F0000 F0001 HV000 HV001 HV002 HV004 HV005 HV006 HV007 \
                 HV008 HV009 HV00A HV00B HV00C HV00D HV00J HV00K HV00L HV00M HV00N HV00P HV00Q HV00R HV010 HV014 \
                 HV021 HV024 HV090 HV091 P0000 P0001 P0002 P0003 P0004 XX000 XX001 XX002",
            ),
            (
                Verdict::Event,
                "22000 22001 22002 22003 22004 22005 22007 22008 22009 2200B 2200C 2200D 2200F 2200G 2200L 2200M \
                 2200N 2200S 2200T 22010 22011 22012 22013 22014 22015 22016 22018 22019 2201B 2201E 2201F 2201G \
                 2201W 2201X 22021 22022 22023 22024 22025 22026 22027 2202E 2202G 2202H 22030 22031 22032 22033 \
                 22034 22035 22036 22037 22038 22039 2203A 2203B 2203C 2203D 2203E 2203F 2203G 22P01 22P02 22P03 \
                 22P04 22P05 22P06 23000 23001 23502 23503 23505 23514 23P01 54000 54001 54011 54023",
            ),
        ];
        let mut count = 0;
        for (expected, codes) in appendix {
            for code in codes.split_whitespace() {
                assert_eq!(verdict(Some(code)), expected, "{code}");
                count += 1;
            }
        }
        assert_eq!(count, 260);
    }

    #[test]
    fn a_condition_of_the_server_is_no_fault_of_an_event() {
        let verdict = |code, raised_in, encoding| condition(code, raised_in, encoding).map(|(verdict, _)| verdict);
        assert_eq!(verdict("54000", "async.c", "UTF8"), Some(Verdict::Again));
        assert_eq!(verdict("54000", "nbtutils.c", "UTF8"), None, "a value that is too long for an index");
        assert_eq!(verdict("23514", "execPartition.c", "UTF8"), Some(Verdict::Operator));
        assert_eq!(verdict("23514", "execMain.c", "UTF8"), None, "a constraint");
        assert_eq!(verdict("22P05", "conv.c", "LATIN1"), Some(Verdict::Operator));
        assert_eq!(verdict("22P05", "json.c", "UTF8"), None, "a zero character");
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
