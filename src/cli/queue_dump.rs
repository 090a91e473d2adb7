//! `queue-dump`: what waits, as a table or as lines of JSON.

use std::io::{self, IsTerminal, Write};

use crate::listing::{Filter, Listing};
use crate::source::{self, Part, SourceError};
use clap::{Args, ValueEnum};
use serde_json::Value;

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
    let mut output = Output { format, listing, out: io::BufWriter::new(io::stdout()), rows: 0 };
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
        if self.rows == 0 {
            self.header()?;
        }
        self.rows += 1;
        let text = |field: &str| line.get(field).and_then(Value::as_str).unwrap_or("-").to_owned();
        let number = |field: &str| line.get(field).and_then(Value::as_u64).unwrap_or_default();
        let origin = origin(line.get("origin"));
        match self.listing {
            Listing::Pending => writeln!(
                self.out,
                "{:>9}  {:<24}  {:<18}  {:>8}  {:>8}  {origin}",
                number("sequence"),
                to_milliseconds(&text("timestamp")),
                text("event_type"),
                number("bytes"),
                number("attempts"),
            )?,
            Listing::DeadLetters => writeln!(
                self.out,
                "{:>9}  {:<24}  {:<18}  {:<10}  {:<5}  {}",
                number("sequence"),
                to_milliseconds(&text("failed_at")),
                text("event_type"),
                text("reason"),
                text("sqlstate"),
                text("message"),
            )?,
        }
        for field in ["payload", "input"] {
            if let Some(value) = line.get(field) {
                writeln!(self.out, "           {value}")?;
            }
        }
        Ok(())
    }

    fn header(&mut self) -> io::Result<()> {
        match self.listing {
            Listing::Pending => writeln!(
                self.out,
                "{:>9}  {:<24}  {:<18}  {:>8}  {:>8}  FROM",
                "SEQUENCE", "TIMESTAMP", "TYPE", "BYTES", "ATTEMPTS"
            ),
            Listing::DeadLetters => writeln!(
                self.out,
                "{:>9}  {:<24}  {:<18}  {:<10}  {:<5}  WHY",
                "SEQUENCE", "FAILED AT", "TYPE", "REASON", "STATE"
            ),
        }
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

fn origin(origin: Option<&Value>) -> String {
    let field = |name: &str| origin.and_then(|origin| origin.get(name));
    match (field("path").and_then(Value::as_str), field("offset").and_then(Value::as_u64)) {
        (Some(path), Some(offset)) => format!("{path}:{offset}"),
        _ => field("kind").and_then(Value::as_str).unwrap_or("-").to_owned(),
    }
}

/// `2026-01-02T03:04:05.678901234Z` → `2026-01-02T03:04:05.678Z`.
fn to_milliseconds(timestamp: &str) -> String {
    match timestamp.parse::<crate::event::Timestamp>() {
        Ok(timestamp) => format!("{timestamp:.3}"),
        Err(_) => timestamp.to_owned(),
    }
}
