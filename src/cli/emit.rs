//! `emit`: events of another program or a script, always by the spool, with and without a watcher.
//!
//! Events are checked here and written to one file of the spool, which the running watcher takes into the queue at once and
//! the next one when it starts. The queue is never opened: an input that stays open delays no watcher.
//!
//! Exit 0 only when all of them are durable. Standard output names them: the id of a single event, the number of a
//! stream's.

use std::io::{BufRead, Read, Write as _};

use crate::event::{EventId, Origin};
use crate::intake::Checker;
use crate::intake::redact::Redactor;
use crate::intake::request::{RequestError, event_bytes_max, is_blank, read_event};
use crate::intake::schema::Schemas;
use crate::intake::spool::{Draft, Spool};
use crate::json::without_byte_order_mark;
use crate::private_folder::{self, FolderError};
use clap::Args;
use serde::Serialize;
use serde_json::value::RawValue;

use super::client;
use super::{Context, Exit, Failure};

/// A larger payload can't be an event under any configuration.
const PAYLOAD_BYTES_MAX: u64 = 256 << 20;

/// Hand in one event, or a stream of them. Exit code 0 only when all of it is durable
#[derive(Args)]
#[command(
    after_help = "Examples:\n  headspace-watcher emit --type session_ended --payload '{\"session_uuid\":\"s\",\"reason\":\"closed\"}'\n  headspace-watcher emit --ndjson < events.jsonl\n\nExit code 65: not valid, the field is named and nothing was accepted; 74: the spool\nis full or can't be written."
)]
pub(super) struct EmitArguments {
    /// The event's type
    #[arg(long = "type", value_name = "T", required_unless_present = "ndjson")]
    event_type: Option<String>,
    /// The event's own data as a JSON object, or - to read it from stdin
    #[arg(long, value_name = "JSON|-")]
    payload: Option<String>,
    /// When it happened, with its zone: 2026-01-02T03:04:05Z [default: now]
    #[arg(long, value_name = "TS")]
    timestamp: Option<String>,
    /// The event's identity: the same one again stores nothing twice [default: a new one]
    #[arg(long, value_name = "UUID")]
    event_id: Option<String>,
    /// The row's project_id
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    project_id: Option<i64>,
    /// The row's agent_id
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    agent_id: Option<i64>,
    /// The row's command_id (task_id in older databases)
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    command_id: Option<i64>,
    /// The row's turn_id
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    turn_id: Option<i64>,
    /// Read events from stdin, one JSON object a line, as POST /events takes them; all of them or none
    #[arg(long, conflicts_with_all = [
        "event_type", "payload", "timestamp", "event_id", "project_id", "agent_id", "command_id", "turn_id"
    ])]
    ndjson: bool,
}

pub(super) fn emit(context: &Context, arguments: &EmitArguments) -> Result<Exit, Failure> {
    let single = if arguments.ndjson { None } else { Some(event(arguments)?) };
    let config = context.config();
    let schemas = Schemas::load(config.schemas.path.as_deref(), config.event_system.max_event_bytes)
        .map_err(|error| Failure::new(Exit::Configuration, error))?;
    let redactor = Redactor::new(&config.redact).map_err(|error| Failure::new(Exit::Configuration, error))?;
    let checker = Checker::new(schemas, redactor);
    match private_folder::ensure(&config.queue.spool_path) {
        // The spool says so itself.
        Ok(_) | Err(FolderError::Io { .. } | FolderError::NotAFolder { .. }) => {}
        Err(error) => return Err(Failure::new(Exit::Configuration, format!("could not emit: {error}"))),
    }
    let spool = Spool::new(&config.queue.spool_path);
    let bytes_max = config.queue.max_pending_bytes;
    let accepted = match single {
        Some(event) => add_one(&checker, &event, &spool, bytes_max).map_err(refused)?,
        None => {
            let mut draft = spool.draft(Some(bytes_max)).map_err(|error| refused(error.into()))?;
            let count = add_lines(&checker, std::io::stdin().lock(), &mut draft)?;
            draft.publish().map_err(|error| refused(error.into()))?;
            format!("{count} events accepted")
        }
    };
    // Where no watcher runs, the next one looks into the spool when it starts.
    let _ = client::notify(&config.http.socket);
    // Where nobody reads it, the events are accepted all the same.
    let _ = writeln!(std::io::stdout(), "{accepted}");
    Ok(Exit::Fine)
}

/// Returns the id of the event.
fn add_one(checker: &Checker, event: &[u8], spool: &Spool, bytes_max: u64) -> Result<String, RequestError> {
    let event = read_event(checker, event, None, EventId::new(), &Origin::Cli)?;
    let mut draft = spool.draft(Some(bytes_max))?;
    draft.add_event(&event)?;
    draft.publish()?;
    Ok(event.id().to_string())
}

/// Reads the input to its end, an event on each line; returns their number.
fn add_lines(checker: &Checker, mut input: impl BufRead, draft: &mut Draft) -> Result<u64, Failure> {
    // One more tells that a line is too long, one is its newline.
    let bytes_max = event_bytes_max(checker) + 2;
    let (mut line, mut count) = (Vec::new(), 0);
    for number in 1.. {
        line.clear();
        let read = input.by_ref().take(bytes_max).read_until(b'\n', &mut line);
        let read = read.map_err(|error| {
            let problem = format!("could not read events from stdin: {error}; nothing was accepted");
            Failure::new(Exit::Io, problem)
        })?;
        if read == 0 {
            break;
        }
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        if !is_blank(line) {
            let event = read_event(checker, line, Some(number), EventId::new(), &Origin::Cli);
            let event = event.map_err(|error| refused(error.into()))?;
            draft.add_event(&event).map_err(|error| refused(error.into()))?;
            count += 1;
        }
    }
    if count == 0 { Err(refused(RequestError::Empty)) } else { Ok(count) }
}

fn refused(refusal: RequestError) -> Failure {
    let exit = match &refusal {
        RequestError::Event(_) | RequestError::Empty | RequestError::TooManyEvents => Exit::Data,
        RequestError::KeyReused | RequestError::Queue(_) | RequestError::Spool(_) => Exit::Io,
    };
    Failure::new(exit, format!("could not emit: {refusal}; nothing was accepted"))
}

/// An event as `POST /events` takes it. null counts as absent.
#[derive(Serialize)]
struct EventLine<'a> {
    event_type: &'a Option<String>,
    payload: &'a RawValue,
    timestamp: &'a Option<String>,
    event_id: &'a Option<String>,
    project_id: &'a Option<i64>,
    agent_id: &'a Option<i64>,
    command_id: &'a Option<i64>,
    turn_id: &'a Option<i64>,
}

/// The event that the options describe, as JSON.
fn event(arguments: &EmitArguments) -> Result<Vec<u8>, Failure> {
    let payload = match arguments.payload.as_deref() {
        None => "{}".to_owned(),
        Some("-") => {
            let mut text = String::new();
            let read = std::io::stdin().lock().take(PAYLOAD_BYTES_MAX + 1).read_to_string(&mut text);
            read.map_err(|error| match error.kind() {
                std::io::ErrorKind::InvalidData => Failure::new(Exit::Data, "payload: not valid UTF-8"),
                _ => Failure::new(Exit::Io, format!("could not read the payload from stdin: {error}")),
            })?;
            if text.len() as u64 > PAYLOAD_BYTES_MAX {
                let message = format!("payload: more than {PAYLOAD_BYTES_MAX} bytes");
                return Err(Failure::new(Exit::Data, message));
            }
            text
        }
        Some(text) => text.to_owned(),
    };
    let payload: &RawValue = serde_json::from_slice(without_byte_order_mark(payload.as_bytes()))
        .map_err(|error| Failure::new(Exit::Data, format!("payload: not valid JSON: {error}")))?;
    let EmitArguments { event_type, timestamp, event_id, project_id, agent_id, command_id, turn_id, .. } = arguments;
    let line = EventLine { event_type, payload, timestamp, event_id, project_id, agent_id, command_id, turn_id };
    serde_json::to_vec(&line).map_err(|error| Failure::new(Exit::Internal, error))
}
