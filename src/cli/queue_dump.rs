//! `queue-dump`: what waits, from the running watcher or from the folder.

use std::io::{self, IsTerminal, Write};

use crate::listing::{self, Filter, Listing, ListingError};
use http_body_util::BodyExt;
use serde_json::Value;

use super::client::{self, ClientError};
use super::{Context, DumpFormat, Exit, Failure, QueueDumpArguments, block_on, inspect_queue, written};

pub fn queue_dump(context: &Context, arguments: &QueueDumpArguments) -> Result<Exit, Failure> {
    let listing = if arguments.dead_letters { Listing::DeadLetters } else { Listing::Pending };
    let format =
        arguments.format.unwrap_or(if io::stdout().is_terminal() { DumpFormat::Table } else { DumpFormat::Jsonl });
    let mut output = Output::new(format, listing);
    let filter = arguments.filter();
    let shown = match block_on(from_watcher(context, listing, &filter, &mut output))? {
        Err(ClientError::NotRunning) => from_folder(context, listing, &filter, &mut output),
        Err(ClientError::NoAnswer(problem)) => {
            let socket = context.config().http.socket.display();
            return Err(Failure::new(
                Exit::Unavailable,
                format!("the watcher on {socket} does not answer: {problem}; stop it to read the queue itself"),
            ));
        }
        Ok(shown) => shown.map_err(ListingError::Reader),
    };
    match shown.and_then(|()| output.finish().map_err(ListingError::Reader)) {
        Ok(()) => Ok(Exit::Fine),
        Err(ListingError::Reader(error)) => written(Err(error)),
        Err(ListingError::Queue(error)) => Err(error.into()),
    }
}

async fn from_watcher(
    context: &Context,
    listing: Listing,
    filter: &Filter,
    output: &mut Output,
) -> Result<io::Result<()>, ClientError> {
    let mut response = client::get(&context.config().http.socket, &target(listing, filter)).await?;
    if !response.status().is_success() {
        return Err(ClientError::NoAnswer(response.status().to_string()));
    }
    while let Some(frame) = response.body_mut().frame().await {
        let frame = frame.map_err(|error| ClientError::NoAnswer(error.to_string()))?;
        if let Some(bytes) = frame.data_ref()
            && let Err(error) = output.take(bytes)
        {
            return Ok(Err(error));
        }
    }
    Ok(Ok(()))
}

/// The route and its query. Values are percent-encoded as a whole.
fn target(listing: Listing, filter: &Filter) -> String {
    let route = match listing {
        Listing::Pending => "/queue",
        Listing::DeadLetters => "/dead-letters",
    };
    let mut query = format!("payload={}", filter.payload);
    if let Some(after) = filter.after {
        query.push_str(&format!("&after={after}"));
    }
    if let Some(limit) = filter.limit {
        query.push_str(&format!("&limit={limit}"));
    }
    for (name, value) in [("type", &filter.event_type), ("session", &filter.session)] {
        if let Some(value) = value {
            let encoded: String = value.bytes().map(|byte| format!("%{byte:02X}")).collect();
            query.push_str(&format!("&{name}={encoded}"));
        }
    }
    format!("{route}?{query}")
}

fn from_folder(context: &Context, listing: Listing, filter: &Filter, output: &mut Output) -> Result<(), ListingError> {
    let queue = inspect_queue(context.config())?;
    listing::write_lines(&queue, listing, filter, |page| output.take(&page))
}

/// Shows lines of JSON as they are or as a table.
struct Output {
    format: DumpFormat,
    listing: Listing,
    out: io::BufWriter<io::Stdout>,
    /// The beginning of a line whose end has not come yet.
    partial: Vec<u8>,
    rows: u64,
}

impl Output {
    fn new(format: DumpFormat, listing: Listing) -> Self {
        Output { format, listing, out: io::BufWriter::new(io::stdout()), partial: Vec::new(), rows: 0 }
    }

    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.format == DumpFormat::Jsonl {
            return self.out.write_all(bytes);
        }
        let mut rest = bytes;
        while let Some(end) = memchr::memchr(b'\n', rest) {
            let (line, after) = rest.split_at(end);
            self.partial.extend_from_slice(line);
            let line = std::mem::take(&mut self.partial);
            self.row(&line)?;
            rest = after.strip_prefix(b"\n").unwrap_or_default();
        }
        self.partial.extend_from_slice(rest);
        Ok(())
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
