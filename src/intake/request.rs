//! Events that another program hands in, by HTTP or `emit`: all of a request or nothing of it.
//!
//! # Promises
//!
//! 1. **All or nothing.** The events of a request are one batch, which the queue takes whole or not at all. (`emit` writes one
//!    file of the spool, which is complete or not there.)
//! 2. **Durable before the answer**, by the queue's sync.
//! 3. **Bounded memory**: a request has at most [`REQUEST_BYTES_MAX`] and [`EVENTS_MAX`] events, and large ones are parsed one
//!    after the other.
//! 4. **Idempotent** by `event_id`, else by the request's key and the event's number in it.
//!
//! The first event that does not fit ends the request; the caller is told, so it is not kept.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value};
use thiserror::Error;
use tracing::debug;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::schema::{Invalid, Refused};
use super::spool::SpoolError;
use super::{Checker, Intake};
use crate::event::{Candidate, Event, EventId, EventType, ForeignKeys, Origin, Timestamp};
use crate::json;
use crate::queue::{Batch, QueueError};

/// Bytes of a request.
pub(crate) const REQUEST_BYTES_MAX: u64 = 16 << 20;

/// Events of a request: each takes memory beside its bytes.
const EVENTS_MAX: usize = 65_536;

/// A request above this is copied on its way to the disk while no other one is parsed.
const LARGE_REQUEST_BYTES: usize = 1 << 20;

/// What a line may have besides its payload.
const LINE_OVERHEAD_BYTES: u64 = 64 << 10;

/// Longest idempotency key.
const KEY_BYTES_MAX: usize = 255;

/// Keys that are remembered with their bodies.
const KEYS_MAX: usize = 10_000;

/// Why nothing of a request was accepted.
#[derive(Debug, Error)]
pub(crate) enum RequestError {
    #[error(transparent)]
    Event(#[from] EventError),
    #[error("there is no event: expected one JSON object, or one on each line")]
    Empty,
    #[error("a request has at most {EVENTS_MAX} events; send it in parts")]
    TooManyEvents,
    #[error("the Idempotency-Key was used before with another body; send a new key with a new request")]
    KeyReused,
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Spool(#[from] SpoolError),
}

/// What is wrong with an event, in words that show nothing of its values.
#[derive(Debug, Error)]
#[error("{}{problem}", place(.line, .field))]
pub(crate) struct EventError {
    /// Counts from 1; `None` for an event that goes over several lines.
    pub line: Option<u64>,
    pub field: Option<String>,
    pub problem: String,
    pub is_too_large: bool,
    /// Where it is known.
    pub event_type: Option<EventType>,
}

impl EventError {
    fn malformed(problem: impl fmt::Display) -> EventError {
        EventError { line: None, field: None, problem: problem.to_string(), is_too_large: false, event_type: None }
    }

    fn of(field: &str, problem: impl fmt::Display) -> EventError {
        EventError { field: Some(field.to_owned()), ..EventError::malformed(problem) }
    }

    fn missing(field: &str) -> EventError {
        EventError::of(field, "required field is missing")
    }
}

fn place(line: &Option<u64>, field: &Option<String>) -> String {
    let line = line.map(|line| format!("line {line}: ")).unwrap_or_default();
    let field = field.as_ref().map(|field| format!("{field}: ")).unwrap_or_default();
    format!("{line}{field}")
}

/// A key that a caller gave to a request, so that repeating it stores nothing twice.
#[derive(Clone, Debug)]
pub(crate) struct IdempotencyKey(String);

impl IdempotencyKey {
    /// `None` for what is empty, too long or not visible ASCII.
    pub(crate) fn new(key: &str) -> Option<Self> {
        let fits =
            !key.is_empty() && key.len() <= KEY_BYTES_MAX && key.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        fits.then(|| IdempotencyKey(key.to_owned()))
    }

    /// The identity of the `index`th event, from 0. Of the first it is the key itself where that is a UUID.
    pub(crate) fn event_id(&self, index: u64) -> EventId {
        match (index, Uuid::try_parse(&self.0)) {
            (0, Ok(id)) => EventId(id),
            (0, Err(_)) => EventId::derived(format!("request/{}", self.0).as_bytes()),
            (index, _) => EventId::derived(format!("request/{}/{index}", self.0).as_bytes()),
        }
    }
}

/// The keys that were used last, each by its first event and with a hash of its request's body. Kept in memory: after a
/// restart, or when [`KEYS_MAX`] others have been used since, a key that is used again with another body is not noticed. Its
/// events have the identities of the first ones then and count as duplicates.
#[derive(Default)]
pub(crate) struct IdempotencyKeys {
    /// In the order of their first use.
    used: Mutex<VecDeque<(EventId, u128)>>,
}

impl IdempotencyKeys {
    /// Runs `accept` unless the key was used with another body. What fails leaves the key unused.
    pub(crate) fn once<T>(
        &self,
        key: &IdempotencyKey,
        body: u128,
        accept: impl FnOnce() -> Result<T, RequestError>,
    ) -> Result<T, RequestError> {
        let id = key.event_id(0);
        let is_new = self.claim(id, body)?;
        let accepted = accept();
        if is_new && accepted.is_err() {
            self.lock().retain(|(used, _)| *used != id);
        }
        accepted
    }

    /// Whether the key is used for the first time.
    fn claim(&self, id: EventId, body: u128) -> Result<bool, RequestError> {
        let mut used = self.lock();
        match used.iter().find(|(used, _)| *used == id) {
            Some((_, known)) if *known != body => return Err(RequestError::KeyReused),
            Some(_) => return Ok(false),
            None => {}
        }
        if used.len() >= KEYS_MAX {
            used.pop_front();
        }
        used.push_back((id, body));
        Ok(true)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(EventId, u128)>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Intake {
    /// Takes in all events of a request's body: durable on return. Blocks.
    pub(crate) fn accept(&self, body: &[u8], key: Option<&IdempotencyKey>) -> Result<Vec<EventId>, RequestError> {
        match key {
            Some(key) => self.keys().once(key, xxh3_128(body), || self.accept_once(body, Some(key))),
            None => self.accept_once(body, None),
        }
    }

    fn accept_once(&self, body: &[u8], key: Option<&IdempotencyKey>) -> Result<Vec<EventId>, RequestError> {
        let reservation = self.checker().values().reserve(body.len());
        let events = read_events(self.checker(), body, key).inspect_err(|error| {
            // Neither kept nor a warning: the caller is told at once.
            if let RequestError::Event(refused) = error {
                let event_type = refused.event_type.as_ref().map_or("unknown", EventType::as_str);
                self.metrics().events_rejected.add(event_type, 1);
                debug!(error = %refused, "a request was refused");
            }
        })?;
        let _held = (body.len() > LARGE_REQUEST_BYTES).then_some(reservation);
        let ids = events.iter().map(Event::id).collect();
        self.submit(&mut Batch { events, ..Batch::default() }).wait()?;
        Ok(ids)
    }
}

/// All events of a body: one on each line, or one event over several lines; what the first line is decides.
fn read_events(checker: &Checker, body: &[u8], key: Option<&IdempotencyKey>) -> Result<Vec<Event>, RequestError> {
    let id = |index: usize| key.map_or_else(EventId::new, |key| key.event_id(index as u64));
    let mut events = Vec::new();
    if is_spread(body) {
        events.push(read_event(checker, body, None, id(0), &Origin::Http)?);
        return Ok(events);
    }
    for (number, line) in (1..).zip(body.split(|byte| *byte == b'\n')).filter(|(_, line)| !is_blank(line)) {
        if events.len() >= EVENTS_MAX {
            return Err(RequestError::TooManyEvents);
        }
        events.push(read_event(checker, line, Some(number), id(events.len()), &Origin::Http)?);
    }
    if events.is_empty() { Err(RequestError::Empty) } else { Ok(events) }
}

/// Whether the first line is the beginning of an object that ends on a later one.
fn is_spread(body: &[u8]) -> bool {
    let mut lines = json::without_byte_order_mark(body).split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    lines.find(|line| !line.is_empty()).is_some_and(|line| line.starts_with(b"{") && !line.ends_with(b"}"))
}

pub(crate) fn is_blank(line: &[u8]) -> bool {
    json::without_byte_order_mark(line).trim_ascii().is_empty()
}

/// Bytes of one event as it comes in.
pub(crate) fn event_bytes_max(checker: &Checker) -> u64 {
    checker.event_bytes_max() + LINE_OVERHEAD_BYTES
}

/// Reads and checks one event; `fallback` is its identity where it names none. The caller has reserved the memory for its
/// values.
pub(crate) fn read_event(
    checker: &Checker,
    bytes: &[u8],
    line: Option<u64>,
    fallback: EventId,
    origin: &Origin,
) -> Result<Event, EventError> {
    let bytes_max = event_bytes_max(checker);
    if bytes.len() as u64 > bytes_max {
        let problem = format!("an event has more than {bytes_max} bytes (max_event_bytes and some more)");
        return Err(EventError { line, field: None, problem, is_too_large: true, event_type: None });
    }
    let candidate = candidate(json::without_byte_order_mark(bytes), fallback, origin)
        .map_err(|error| EventError { line, ..error })?;
    checker.check(candidate).map_err(|refused| {
        let Refused { invalid, candidate } = *refused;
        let event_type = Some(EventType::new(&candidate.event_type));
        let is_too_large = matches!(invalid, Invalid::TooLarge { .. });
        let (field, problem) = match invalid {
            Invalid::TooLarge { .. } => (None, invalid.to_string()),
            Invalid::UnknownType { .. } => (Some(invalid.field().to_owned()), invalid.to_string()),
            Invalid::Payload { field, problem, .. } => (Some(field), problem),
        };
        EventError { line, field, problem, is_too_large, event_type }
    })
}

/// The members that an event may have.
const MEMBERS: [&str; 8] =
    ["event_type", "payload", "timestamp", "event_id", "project_id", "agent_id", "command_id", "turn_id"];

/// The members of an event as raw JSON.
struct Members<'a>(HashMap<&'static str, &'a str>);

impl<'a> Members<'a> {
    fn read(text: &'a str) -> Result<Members<'a>, EventError> {
        let mut members = HashMap::new();
        let mut unknown = None;
        let read = json::members(text, |key, value| match MEMBERS.iter().find(|name| **name == key) {
            Some(name) => drop(members.insert(*name, value)),
            None => drop(unknown.get_or_insert_with(|| key.to_owned())),
        });
        read.map_err(|error| EventError::malformed(format_args!("not valid JSON: {error}")))?;
        match unknown {
            Some(field) => Err(EventError::of(&field, "unknown field; an event's own data goes into \"payload\"")),
            None => Ok(Members(members)),
        }
    }

    /// null counts as absent.
    fn get(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).copied().filter(|raw| *raw != "null")
    }

    fn text(&self, name: &str) -> Result<Option<String>, EventError> {
        let Some(raw) = self.get(name) else { return Ok(None) };
        let text = json::string(raw).ok_or_else(|| EventError::of(name, "expected a string"))?;
        Ok(Some(text.text.into_owned()))
    }

    fn number(&self, name: &str) -> Result<Option<i32>, EventError> {
        let parse = |raw: &str| raw.parse().map_err(|_| EventError::of(name, "expected a whole number of 32 bits"));
        self.get(name).map(parse).transpose()
    }

    fn payload(&self) -> Result<Map<String, Value>, EventError> {
        let raw = self.0.get("payload").ok_or_else(|| EventError::missing("payload"))?;
        let mut is_repaired = false;
        let payload = json::value(raw, &mut is_repaired).map_err(|unfit| EventError::of("payload", unfit))?;
        let Value::Object(mut payload) = payload else { return Err(EventError::of("payload", "expected an object")) };
        if is_repaired
            && let Value::Object(metadata) = payload.entry("metadata").or_insert_with(|| Value::Object(Map::new()))
        {
            metadata.insert("repaired".to_owned(), true.into());
        }
        Ok(payload)
    }
}

/// Reads one event.
fn candidate(bytes: &[u8], fallback: EventId, origin: &Origin) -> Result<Candidate, EventError> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| EventError::malformed(format_args!("not valid UTF-8: {error}")))?
        .trim_ascii();
    if !text.starts_with('{') {
        return Err(EventError::malformed("expected a JSON object"));
    }
    let members = Members::read(text)?;
    let event_type = members.text("event_type")?.ok_or_else(|| EventError::missing("event_type"))?;
    let timestamp = match members.text("timestamp")? {
        Some(text) => text.parse::<Timestamp>().map_err(|_| {
            EventError::of("timestamp", "expected a time with its zone, such as 2026-01-02T03:04:05.678Z")
        })?,
        None => Timestamp::now(),
    };
    let id = match members.text("event_id")? {
        Some(text) => EventId(Uuid::try_parse(&text).map_err(|_| EventError::of("event_id", "expected a UUID"))?),
        None => fallback,
    };
    let refs = ForeignKeys {
        project_id: members.number("project_id")?,
        agent_id: members.number("agent_id")?,
        command_id: members.number("command_id")?,
        turn_id: members.number("turn_id")?,
    };
    Ok(Candidate { id, event_type, timestamp, payload: members.payload()?, refs, origin: origin.clone() })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::intake::redact::Redactor;
    use crate::intake::schema::Schemas;
    use crate::queue::{Queue, QueueConfig};
    use crate::telemetry::Metrics;

    struct Scene {
        _folder: tempfile::TempDir,
        intake: Intake,
    }

    fn scene() -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let config = QueueConfig { path: folder.path().join("queue"), max_pending_bytes: 1 << 30 };
        let queue = Queue::open(&config).unwrap().0;
        let schemas = Schemas::load(None, 1 << 20).unwrap();
        let intake = Intake::new(schemas, queue, Redactor::default(), Arc::new(Metrics::default()));
        Scene { _folder: folder, intake }
    }

    impl Scene {
        fn send(&self, body: &str) -> Result<Vec<EventId>, RequestError> {
            self.intake.accept(body.as_bytes(), None)
        }

        fn refused(&self, body: &str) -> EventError {
            match self.send(body) {
                Err(RequestError::Event(refused)) => refused,
                other => panic!("{body}: {other:?}"),
            }
        }
    }

    const EVENT: &str = r#"{"event_type":"session_ended","payload":{"session_uuid":"s","reason":"closed"}}"#;

    #[test]
    fn one_event_may_be_spread_over_lines_and_several_stand_one_on_each() {
        let scene = scene();
        let spread = EVENT.replace(',', ",\n ").replace('{', "{\n");
        let lines = format!("\n{EVENT}\n\n{EVENT}\r\n{EVENT}");
        for (body, count) in [(EVENT, 1), (&*spread, 1), (&*lines, 3)] {
            for mark in ["", "\u{feff}"] {
                assert_eq!(scene.send(&format!("{mark}{body}")).unwrap().len(), count, "{body}");
            }
        }
    }

    #[test]
    fn the_line_and_the_field_at_fault_are_named_and_nothing_is_accepted() {
        let scene = scene();
        let with = |extra: &str| format!("{EVENT}\n{}", EVENT.replacen('{', &format!("{{{extra},"), 1));
        for (body, line, field) in [
            (with(r#""surprise":1"#), 2, "surprise"),
            (with(r#""timestamp":"yesterday""#), 2, "timestamp"),
            (with(r#""event_id":"7""#), 2, "event_id"),
            (with(r#""agent_id":3000000000"#), 2, "agent_id"),
            (with(r#""agent_id":"3""#), 2, "agent_id"),
            (EVENT.replace("closed", "tired"), 1, "reason"),
            (EVENT.replace(r#""reason":"closed""#, r#""x":1"#), 1, "reason"),
            (EVENT.replace("session_ended", "session_endd"), 1, "event_type"),
            (r#"{"event_type":"session_ended"}"#.to_owned(), 1, "payload"),
            (r#"{"event_type":"session_ended","payload":[]}"#.to_owned(), 1, "payload"),
            (r#"{"payload":{}}"#.to_owned(), 1, "event_type"),
            (format!("{EVENT}\n{EVENT}\n{{\"event_type\":"), 3, ""),
            (format!("{EVENT}\nnonsense\n{EVENT}"), 2, ""),
            ("[1]".to_owned(), 1, ""),
            ("{\"a\":}\n".to_owned(), 1, ""),
        ] {
            let EventError { line: found_line, field: found_field, problem, .. } = scene.refused(&body);
            let found_field = found_field.unwrap_or_default();
            assert_eq!((found_line, &*found_field), (Some(line), field), "{body}: {problem}");
            assert!(!problem.contains("tired"), "{problem}");
        }
        assert!(matches!(scene.send(" \n"), Err(RequestError::Empty)));
        assert_eq!(scene.intake.queue().stats().pending, 0);
        assert_eq!(scene.intake.queue().stats().dead_letters, 0, "its caller was told");
        assert_eq!(scene.intake.metrics().events_rejected.get(), 15);
    }

    #[test]
    fn a_request_of_too_many_events_is_refused_as_a_whole() {
        let scene = scene();
        let line = format!("{EVENT}\n");
        assert_eq!(scene.send(&line.repeat(EVENTS_MAX)).unwrap().len(), EVENTS_MAX);
        let refused = scene.send(&line.repeat(EVENTS_MAX + 1));
        assert!(matches!(refused, Err(RequestError::TooManyEvents)), "{refused:?}");
        assert_eq!(scene.intake.queue().stats().pending, EVENTS_MAX as u64);
    }

    #[test]
    fn a_line_that_is_no_event_by_its_length_alone_is_too_large() {
        let scene = scene();
        let endless = format!("{{{}", "x".repeat((1 << 20) + LINE_OVERHEAD_BYTES as usize));
        assert!(scene.refused(&endless).is_too_large);
    }

    #[test]
    fn a_key_gives_each_event_of_a_request_an_identity_of_its_own() {
        let id = "11111111-2222-4333-8444-555555555555";
        assert_eq!(IdempotencyKey::new(id).unwrap().event_id(0).to_string(), id);
        let key = IdempotencyKey::new("order 7").unwrap();
        assert_eq!(key.event_id(0), IdempotencyKey::new("order 7").unwrap().event_id(0));
        assert_ne!(key.event_id(0), key.event_id(1));
        assert!(IdempotencyKey::new("").is_none() && IdempotencyKey::new(&"x".repeat(256)).is_none());
    }
}
