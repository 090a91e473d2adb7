//! `emit`: events of another program or a script, always by the spool, with and without a watcher.
//!
//! Events are checked here and written to a file of their own, which the running watcher takes into the queue at once and
//! the next one when it starts. The queue is never opened: an input that stays open delays no watcher.
//!
//! Exit 0 only when all of them are durable. Standard output names them: the id of a single event, the number of a
//! stream's.

use std::io::{Read, Write as _};
use std::sync::Arc;

use crate::event::Origin;
use crate::intake::Checker;
use crate::intake::redact::Redactor;
use crate::intake::request::{AcceptedRequest, Destination, EventRequest, Layout, RequestError};
use crate::intake::schema::Schemas;
use crate::intake::spool::Spool;
use crate::json::without_byte_order_mark;
use crate::private_folder::{self, FolderError};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::client;
use super::{Context, EmitArguments, Exit, Failure};

/// A larger payload can't be an event under any configuration.
const PAYLOAD_BYTES_MAX: u64 = 256 << 20;

/// Bytes that are read from stdin at once.
const PIECE_BYTES: usize = 64 << 10;

pub fn emit(context: &Context, arguments: &EmitArguments) -> Result<Exit, Failure> {
    let single = if arguments.ndjson { None } else { Some(event(arguments)?) };
    let config = context.config();
    let schemas = Schemas::load(config.schemas.path.as_deref(), config.event_system.max_event_bytes)
        .map_err(|error| Failure::new(Exit::Configuration, error))?;
    let redactor = Redactor::new(&config.redact).map_err(|error| Failure::new(Exit::Configuration, error))?;
    let destination = Destination::Spool {
        checker: Arc::new(Checker::new(schemas, redactor)),
        bytes_max: config.queue.max_pending_bytes,
    };
    match private_folder::ensure(&config.queue.spool_path) {
        // The spool says so itself.
        Ok(_) | Err(FolderError::Io { .. } | FolderError::NotAFolder { .. }) => {}
        Err(error) => return Err(Failure::new(Exit::Configuration, format!("could not emit: {error}"))),
    }
    let spool = Spool::new(&config.queue.spool_path);
    let request = EventRequest::new(destination, spool, Origin::Cli, None, Layout::Lines);
    let accepted = match single {
        Some(event) => accept(request, &*event)?,
        None => accept(request, std::io::stdin().lock())?,
    };
    // Where no watcher runs, the next one looks into the spool when it starts.
    let _ = client::ring(&config.http.socket);
    match accepted {
        AcceptedRequest::Spooled { mut ids, .. } if !arguments.ndjson => {
            let id = ids.next().transpose();
            let id = id.map_err(|error| Failure::new(Exit::Io, format!("could not read the spool: {error}")))?;
            id.iter().for_each(|id| say(id));
        }
        accepted => say(&format_args!("{} events accepted", accepted.count())),
    }
    Ok(Exit::Fine)
}

/// Prints a line. Where nobody reads it, the events are accepted all the same.
fn say(line: &dyn std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Reads the input to its end into the request.
fn accept(mut request: EventRequest, mut input: impl Read) -> Result<AcceptedRequest, Failure> {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match input.read(&mut piece) {
            Ok(0) => return request.finish().map_err(refused),
            Ok(length) => request.feed(piece.get(..length).unwrap_or_default()).map_err(refused)?,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                let problem = format!("could not read events from stdin: {error}; nothing was accepted");
                return Err(Failure::new(Exit::Io, problem));
            }
        }
    }
}

fn refused(refusal: RequestError) -> Failure {
    let exit = match &refusal {
        RequestError::Invalid { .. } | RequestError::TooLarge { .. } => Exit::Data,
        RequestError::KeyReused
        | RequestError::Queue(_)
        | RequestError::Spool { .. }
        | RequestError::SpoolFull { .. } => Exit::Io,
    };
    Failure::new(exit, format!("could not emit: {refusal}; nothing was accepted"))
}

/// The event that the options describe, as one line of JSON.
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
    // Between tokens a line break is a blank, and within a string there is none.
    let payload = payload.get().replace(['\n', '\r'], " ");
    let mut others = Map::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            others.insert(name.to_owned(), value);
        }
    };
    put("event_type", arguments.event_type.clone().map(Value::from));
    put("timestamp", arguments.timestamp.clone().map(Value::from));
    put("event_id", arguments.event_id.clone().map(Value::from));
    put("project_id", arguments.project_id.map(Value::from));
    put("agent_id", arguments.agent_id.map(Value::from));
    put("command_id", arguments.command_id.map(Value::from));
    put("turn_id", arguments.turn_id.map(Value::from));
    let others = Value::Object(others).to_string();
    let head = others.strip_suffix('}').unwrap_or_default();
    Ok(format!("{head},\"payload\":{payload}}}").into_bytes())
}
