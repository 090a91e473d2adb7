//! `verify`: what `crate::verify` found, as a table for people or one JSON object for programs.

use std::io::{self, Write};

use crate::event::Timestamp;
use crate::service::connect_settings;
use crate::sink::DeliverError;
use crate::sink::postgres::{ConnectSettings, inspect};
use crate::verify::{self, ConflictingLines, Counts, IncompleteLine, MissingLine, Remedy, Report, VerifyError};
use clap::Args;
use jiff::SignedDuration;

use super::table::{self, COLUMNS};
use super::{Context, Exit, Failure, block_on, database, written};

/// Missing events that are listed for people.
const LISTED_MAX: usize = 20;

/// SQLSTATE of a statement for which the user lacks a right.
const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// The oldest that `--since` takes.
const SINCE_DAYS_MAX: i64 = 365_000;

/// Prove for each turn on disk that it is in Postgres, in the queue or among the dead letters
#[derive(Args)]
#[command(
    after_help = "Examples:\n  headspace-watcher verify\n  headspace-watcher verify --json | jq '.missing[]'\n  headspace-watcher verify --repair    # send again what is missing\n\nExit code 0: nothing is missing, or all of it was sent again; 1: something is missing, or a transcript can't be\nread; 69: the database or the queue can't be asked; 74: the spool is full or can't be used;\n78: no database is configured."
)]
pub(super) struct VerifyArguments {
    /// One JSON object; it lists all that is missing
    #[arg(long)]
    json: bool,
    /// Send again what is missing, by the spool: the running watcher takes it in, or the next one when it starts
    #[arg(long)]
    repair: bool,
    /// Whole paths and ids of what is missing, however long their lines
    #[arg(long)]
    wide: bool,

    /// Take rows that are gone for deleted on purpose: they count as removed from then on, and are not sent again
    #[arg(long, conflicts_with = "repair")]
    accept_missing: bool,
    /// Leave out what happened before: 2026-01-02T03:04:05Z, or 90d for the last 90 days
    #[arg(long, value_name = "TS|DAYSd", value_parser = since)]
    since: Option<Timestamp>,
}

pub(super) fn verify(context: &Context, arguments: &VerifyArguments) -> Result<Exit, Failure> {
    let (target, has_database) = database::of_commands(context)?;
    let database = connect_settings(context.config(), target);
    let remedy = match (arguments.repair, arguments.accept_missing) {
        (true, _) => Remedy::Repair,
        (false, true) => Remedy::Accept,
        (false, false) => Remedy::None,
    };
    let mut found = block_on(verify::verify(context.config(), &database, arguments.since, remedy))??;
    let report = found.report();
    let mut out = io::BufWriter::new(io::stdout().lock());
    let shown = if arguments.json {
        serde_json::to_writer(&mut out, &report).map_err(io::Error::from).and_then(|()| writeln!(out))
    } else {
        write_table(&mut out, &report, arguments.wide)
    };
    written(shown.and_then(|()| out.flush()))?;
    if report.turns.sent_again.max(report.sessions.sent_again) > Some(0) {
        block_on(note_triggers(&database))?;
    }
    let is_all_there = report.is_all_there();
    match found.error {
        Some(_) if !has_database => Err(database::none(context)),
        Some(error) => Err(error.into()),
        None if is_all_there => Ok(Exit::Fine),
        None => Ok(Exit::CheckFailed),
    }
}

/// Reads `--since`.
fn since(text: &str) -> Result<Timestamp, String> {
    let days = text.strip_suffix('d').and_then(|days| days.parse::<i64>().ok());
    let since = match days {
        Some(days) if (0..=SINCE_DAYS_MAX).contains(&days) => {
            Some(Timestamp::now().checked_sub(SignedDuration::from_hours(days * 24)).unwrap_or(Timestamp::MIN))
        }
        Some(_) => None,
        None => text.parse().ok(),
    };
    since.ok_or_else(|| "expected a time with its zone (2026-01-02T03:04:05Z) or days (90d)".to_owned())
}

/// The first of them by path and offset, as many as are listed.
fn first_missing(lines: impl Iterator<Item = MissingLine>) -> Vec<MissingLine> {
    let mut first: Vec<MissingLine> = Vec::new();
    for line in lines {
        let before = first.partition_point(|one| (&one.path, one.offset) < (&line.path, line.offset));
        if before < LISTED_MAX {
            first.insert(before, line);
            first.truncate(LISTED_MAX);
        }
    }
    first
}

/// What was sent again waits in the queue where a trigger drops its row.
async fn note_triggers(database: &ConnectSettings) {
    if let Ok(found) = inspect(database).await
        && !found.triggers.is_empty()
    {
        let triggers = found.triggers.join(", ");
        eprintln!("note: triggers run before a row is inserted: {triggers}; what one of them drops waits in the queue");
    }
}

impl From<VerifyError> for Failure {
    fn from(error: VerifyError) -> Self {
        let mut message = error.to_string();
        if let VerifyError::Database(DeliverError { sqlstate: Some(code), .. }) = &error
            && code == INSUFFICIENT_PRIVILEGE
        {
            message.push_str(
                "; verify itself needs SELECT on events and event_receipts, and USAGE on the schema of the latter",
            );
        }
        let exit = match error {
            VerifyError::Source(error) => Failure::from(error).exit,
            VerifyError::Database(_) | VerifyError::NotSent(_) | VerifyError::NotAccepted(_) => Exit::Unavailable,
            VerifyError::Spool { .. } | VerifyError::NotSpooled(_) => Exit::Io,
            VerifyError::Redact(_) | VerifyError::MayNotForget { .. } | VerifyError::MayNotAccept(_) => {
                Exit::Configuration
            }
        };
        Failure::new(exit, message)
    }
}

fn write_table(out: &mut impl Write, report: &Report<'_>, wide: bool) -> io::Result<()> {
    let (turns, sessions) = (&report.turns, &report.sessions);
    write_counts(out, turns, sessions)?;
    writeln!(
        out,
        "\n{} transcripts read, {} of sub-agents skipped",
        report.transcripts_read, report.sub_agent_transcripts
    )?;
    let no_turns: u64 = report.user_lines_no_turns.values().sum();
    if no_turns > 0 {
        writeln!(out, "{no_turns} user lines are no turns (\"explain FILE\" says why of each):")?;
        let mut reasons: Vec<_> = report.user_lines_no_turns.iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let reasons = reasons.iter().map(|(reason, count)| format!("{count} {reason}"));
        writeln!(out, "  {}", reasons.collect::<Vec<_>>().join(", "))?;
    }
    let without_receipt = sum(turns.without_receipt, sessions.without_receipt);
    if without_receipt > 0 {
        writeln!(out, "{without_receipt} of those in Postgres have no receipt")?;
    }
    if turns.unproven + sessions.unproven > 0 {
        writeln!(out, "unproven: neither in the queue nor among the dead letters, and Postgres could not be asked")?;
    }
    for one in &report.unreadable {
        writeln!(out, "could not read {}, so nothing is proved of it: {}", one.path, one.error)?;
    }
    for path in &report.missing_folders {
        writeln!(out, "warning: {path} does not exist: transcripts that were in it are not verified")?;
    }
    for IncompleteLine { path, offset, bytes } in report.incomplete.iter().take(LISTED_MAX) {
        writeln!(
            out,
            "warning: the last line of {path} is incomplete ({bytes} bytes from byte {offset} on): it is not stored"
        )?;
    }
    for lines in report.conflicting.iter().take(LISTED_MAX) {
        let ConflictingLines { event_id, path, offset, other_path, other_offset } = lines;
        writeln!(
            out,
            "warning: {path}:{offset} and {other_path}:{other_offset} have one uuid and different texts: only one of \
             them is stored (event {event_id})"
        )?;
    }
    for one in &report.expiring {
        writeln!(
            out,
            "warning: Claude Code keeps {} until {}, and {} events of it are not in Postgres yet; see that the watcher \
             and the database run, or raise cleanupPeriodDays in Claude Code's settings.json",
            one.path, one.kept_until, one.not_stored
        )?;
    }
    if turns.not_yet_read + sessions.not_yet_read > 0 {
        writeln!(out, "not yet read: the running watcher reads it, or the next one when it starts")?;
    }
    write_missing(out, report, wide)
}

fn sum(turns: Option<u64>, sessions: Option<u64>) -> u64 {
    turns.unwrap_or_default() + sessions.unwrap_or_default()
}

fn write_counts(out: &mut impl Write, turns: &Counts, sessions: &Counts) -> io::Result<()> {
    writeln!(out, "{:<14}{:>12}{:>12}", "", "TURNS", "SESSIONS")?;
    for (name, is_shown, turns, sessions) in [
        ("on disk", true, Some(turns.on_disk), Some(sessions.on_disk)),
        ("in Postgres", true, turns.in_postgres, sessions.in_postgres),
        ("in the queue", true, Some(turns.in_queue), Some(sessions.in_queue)),
        ("dead letters", true, Some(turns.dead_letters), Some(sessions.dead_letters)),
        ("removed", false, turns.removed, sessions.removed),
        ("not yet read", false, Some(turns.not_yet_read), Some(sessions.not_yet_read)),
        ("unproven", false, Some(turns.unproven), Some(sessions.unproven)),
        ("missing", true, turns.missing, sessions.missing),
        ("sent again", false, turns.sent_again, sessions.sent_again),
    ] {
        if is_shown || sum(turns, sessions) > 0 {
            let shown = |count: Option<u64>| count.map_or_else(|| "?".to_owned(), |count| count.to_string());
            writeln!(out, "{name:<14}{:>12}{:>12}", shown(turns), shown(sessions))?;
        }
    }
    Ok(())
}

fn write_missing(out: &mut impl Write, report: &Report<'_>, wide: bool) -> io::Result<()> {
    let missing = sum(report.turns.missing, report.sessions.missing);
    if missing == 0 {
        return Ok(());
    }
    let mut of = String::new();
    for line in first_missing(report.missing.lines()) {
        if of != line.path {
            let path = if wide {
                table::one_line(&line.path)
            } else {
                table::tail(&line.path, COLUMNS - "missing in :".len())
            };
            writeln!(out, "\nmissing in {path}:")?;
            of = line.path;
        }
        let id = if wide { &*line.event_id } else { line.event_id.get(..8).unwrap_or_default() };
        let sent = if line.sent_again { "; sent again" } else { "" };
        let row = format!("{:>10}  {:<18}  {id}  {}{sent}", line.offset, line.event_type, line.reason.described());
        writeln!(out, "{}", if wide { row } else { table::head(&row, COLUMNS) })?;
    }
    if let Some(more) = missing.checked_sub(LISTED_MAX as u64).filter(|more| *more > 0) {
        writeln!(out, "  and {more} more; --json lists all")?;
    }
    match sum(report.turns.sent_again, report.sessions.sent_again) {
        0 => writeln!(out, "\"headspace-watcher verify --repair\" sends them again"),
        sent => writeln!(out, "{sent} of {missing} sent again: the watcher takes them in from the spool"),
    }
}
