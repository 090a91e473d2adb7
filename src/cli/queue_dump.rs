//! `queue-dump`: what waits, as a table or as lines of JSON.

use std::io::{self, IsTerminal, Write};

use crate::listing::{Filter, Listing};
use crate::source::{self, Part, SourceError};
use clap::{Args, ValueEnum};
use serde_json::Value;

use super::table::{self, COLUMNS};
use super::{Context, Exit, Failure, block_on, written};

/// Show what waits in the local queue, oldest first
#[derive(Args, Clone)]
#[command(
    after_help = "Examples:\n  headspace-watcher queue-dump --limit 20\n  headspace-watcher queue-dump --format jsonl --payload | jq .payload.text\n  headspace-watcher queue-dump --dead-letters"
)]
pub(super) struct QueueDumpArguments {
    /// table on a terminal, else jsonl, when not given
    #[arg(long, value_enum)]
    format: Option<DumpFormat>,
    /// At most so many events
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Only events after this sequence number
    #[arg(long, value_name = "SEQ")]
    after: Option<u64>,
    /// Only events of this type
    #[arg(long = "type", value_name = "T")]
    event_type: Option<String>,
    /// Only events of this session
    #[arg(long, value_name = "UUID")]
    session: Option<String>,
    /// Whole payloads; without it no text is shown
    #[arg(long)]
    payload: bool,
    /// Dead letters instead, with reasons
    #[arg(long)]
    dead_letters: bool,
    /// All columns, and whole paths and messages, however long their lines
    #[arg(long)]
    wide: bool,
}

impl QueueDumpArguments {
    pub(super) fn of_dead_letters(&self) -> Self {
        QueueDumpArguments { dead_letters: true, ..self.clone() }
    }

    fn filter(&self) -> Filter {
        Filter {
            after: self.after,
            limit: self.limit,
            event_type: self.event_type.clone(),
            session: self.session.clone(),
            payload: self.payload,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DumpFormat {
    Table,
    Jsonl,
}

pub(super) fn queue_dump(context: &Context, arguments: &QueueDumpArguments) -> Result<Exit, Failure> {
    let listing = if arguments.dead_letters { Listing::DeadLetters } else { Listing::Pending };
    let format =
        arguments.format.unwrap_or(if io::stdout().is_terminal() { DumpFormat::Table } else { DumpFormat::Jsonl });
    let out = io::BufWriter::new(io::stdout());
    let mut output = Output { format, listing, wide: arguments.wide, out, rows: 0 };
    let filter = arguments.filter();
    let part = Part::Records(listing, &filter);
    match block_on(source::read(context.config(), part, |line| output.line(line)))? {
        Ok(()) => written(output.finish()),
        Err(SourceError::Reader(error)) => written(Err(error)),
        Err(error) => Err(error.into()),
    }
}

/// Shows lines of JSON as they are or as a table.
struct Output {
    format: DumpFormat,
    listing: Listing,
    wide: bool,
    out: io::BufWriter<io::Stdout>,
    rows: u64,
}

impl Output {
    fn line(&mut self, line: &[u8]) -> io::Result<()> {
        match self.format {
            DumpFormat::Jsonl => self.out.write_all(line).and_then(|()| self.out.write_all(b"\n")),
            DumpFormat::Table => self.row(line),
        }
    }

    fn row(&mut self, line: &[u8]) -> io::Result<()> {
        let line: Value = serde_json::from_slice(line).map_err(io::Error::from)?;
        let columns = columns(self.listing, self.wide);
        if self.rows == 0 {
            writeln!(self.out, "{}", row(columns, self.wide, str::to_owned))?;
        }
        self.rows += 1;
        writeln!(self.out, "{}", row(columns, self.wide, |name| cell(name, &line, self.wide)))?;
        if self.listing == Listing::DeadLetters && !self.wide {
            writeln!(self.out, "          {}", table::head(&cell("WHY", &line, false), COLUMNS - 10))?;
        }
        for field in ["payload", "input"] {
            if let Some(value) = line.get(field) {
                writeln!(self.out, "          {value}")?;
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        if self.format == DumpFormat::Table && self.rows == 0 {
            let nothing = match self.listing {
                Listing::Pending => "nothing waits in the queue",
                Listing::DeadLetters => "no dead letters",
            };
            writeln!(self.out, "{nothing}")?;
        }
        self.out.flush()
    }
}

/// Names and widths of the columns; the last one takes what is left. Why an event is a dead letter has a line of its own
/// where the table is not wide.
fn columns(listing: Listing, wide: bool) -> &'static [(&'static str, usize)] {
    match (listing, wide) {
        (Listing::Pending, false) => &[("SEQUENCE", 8), ("TIMESTAMP", 20), ("TYPE", 18), ("FROM", 0)],
        (Listing::Pending, true) => {
            &[("SEQUENCE", 8), ("TIMESTAMP", 24), ("TYPE", 18), ("BYTES", 8), ("ATTEMPTS", 8), ("FROM", 0)]
        }
        (Listing::DeadLetters, false) => {
            &[("SEQUENCE", 8), ("FAILED AT", 20), ("TYPE", 18), ("REASON", 10), ("FROM", 0)]
        }
        (Listing::DeadLetters, true) => {
            &[("SEQUENCE", 8), ("FAILED AT", 24), ("TYPE", 18), ("REASON", 10), ("FROM", 0), ("WHY", 0)]
        }
    }
}

/// One row; its last column is cut to fit unless the table is wide.
fn row(columns: &[(&'static str, usize)], wide: bool, cell: impl Fn(&'static str) -> String) -> String {
    let mut row = String::new();
    for (number, &(name, width)) in columns.iter().enumerate() {
        let cell = cell(name);
        if number > 0 {
            row.push_str("  ");
        }
        let left = COLUMNS.saturating_sub(row.chars().count());
        let cell = match (wide, width) {
            (true, _) => cell,
            (false, 0) => table::tail(&cell, left),
            (false, width) => table::head(&cell, width),
        };
        row.push_str(&match name {
            "SEQUENCE" | "BYTES" | "ATTEMPTS" => format!("{cell:>width$}"),
            _ => format!("{cell:<width$}"),
        });
    }
    row
}

fn cell(column: &str, line: &Value, wide: bool) -> String {
    let text = |field: &str| line.get(field).and_then(Value::as_str).unwrap_or("-").to_owned();
    let number = |field: &str| line.get(field).and_then(Value::as_u64).unwrap_or_default().to_string();
    match column {
        "SEQUENCE" => number("sequence"),
        "TIMESTAMP" => time(&text("timestamp"), wide),
        "FAILED AT" => time(&text("failed_at"), wide),
        "TYPE" => text("event_type"),
        "BYTES" => number("bytes"),
        "ATTEMPTS" => number("attempts"),
        "REASON" => text("reason"),
        "FROM" => origin(line.get("origin"), wide),
        _ => {
            let state = line.get("sqlstate").and_then(Value::as_str).map(|state| format!("{state}: "));
            table::one_line(&(state.unwrap_or_default() + &text("message")))
        }
    }
}

fn origin(origin: Option<&Value>, wide: bool) -> String {
    let field = |name: &str| origin.and_then(|origin| origin.get(name));
    match (field("path").and_then(Value::as_str), field("offset").and_then(Value::as_u64)) {
        (Some(path), Some(offset)) if wide => format!("{}:{offset}", table::one_line(path)),
        (Some(path), Some(offset)) => format!("{}:{offset}", table::short_transcript(path)),
        _ => field("kind").and_then(Value::as_str).unwrap_or("-").to_owned(),
    }
}

/// `2026-01-02T03:04:05.678901234Z` → `2026-01-02T03:04:05.678Z`, or without its fraction.
fn time(timestamp: &str, wide: bool) -> String {
    match timestamp.parse::<crate::event::Timestamp>() {
        Ok(timestamp) if wide => format!("{timestamp:.3}"),
        Ok(timestamp) => format!("{timestamp:.0}"),
        Err(_) => timestamp.to_owned(),
    }
}
